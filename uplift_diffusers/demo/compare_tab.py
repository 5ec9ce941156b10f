"""The tab Compare."""

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from uplift_diffusers.demo import parts, pictures
from uplift_diffusers.demo.models import Models
from uplift_diffusers.demo.text_to_image import in_words
from uplift_diffusers.demo.viewer import view, viewer
from uplift_diffusers.demo.workshop import Workshop


def compare_tab(workshop: Workshop, models: Models, limits: parts.Limits, examples: Sequence[Path]) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            file = parts.file_input("Picture: drop, paste or choose", file_count="single")
            scale = gr.Radio([2, 4, 8], value=4, label="Scale")
            model = parts.model_input(models)
            run, stop = parts.buttons("Compare")
            shown_examples = parts.examples_input(examples)
        with gr.Column(scale=2, min_width=300):
            seen = viewer(label="Three methods", placeholder="Three methods will appear here, side by side.")
            figures = gr.HTML(elem_classes="figures", label="Figures")

    @parts.told
    async def compare(file, scale, model, request: gr.Request, progress=gr.Progress()):
        """
        Enlarge a picture by bicubic interpolation, by bilinear interpolation of its latents, and by UPLiFT.

        Args:
            file: a picture file.
            scale: 2, 4 or 8.
            model: one of the models that the server offers.
        Returns:
            The three pictures, as PNG files; figures as HTML.
        """
        if not file:
            raise gr.Error("Choose a picture first.", print_exception=False)

        def work(job):
            panes = pictures.compare_methods(
                job, Path(file), pipeline=models.enlarger(model), scale=scale, max_pixels=limits.max_pixels
            )
            return view(panes), parts.table(
                {"Time": parts.seconds_in_words(job.elapsed_s), "Peak memory": in_words(job.peak_memory_bytes)}
            )

        return await workshop.run(work, visitor=request.session_hash, report=parts.reporter(progress))

    arguments = {"show_progress_on": seen, "api_name": "compare", **parts.WORKING}
    running = run.click(compare, [file, scale, model], [seen, figures], **arguments)
    parts.stoppable(stop, figures, running)
    parts.previewed(file, seen)
    if shown_examples is not None:
        shown_examples.click(lambda index: str(examples[index]), shown_examples, file, **parts.QUIET)
