"""The tab Enlarge."""

import html
from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from uplift_diffusers.demo import parts, pictures
from uplift_diffusers.demo.models import Models
from uplift_diffusers.demo.text_to_image import in_words
from uplift_diffusers.demo.viewer import view, viewer
from uplift_diffusers.demo.workshop import Workshop


def enlarge_tab(workshop: Workshop, models: Models, limits: parts.Limits, examples: Sequence[Path]) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            files = parts.file_input("Pictures: drop, paste or choose", file_count="multiple")
            scale = gr.Slider(1.5, 8, value=2, step=0.1, label="Scale", info="Width and height times this", buttons=[])
            model = parts.model_input(models)
            run, stop = parts.buttons("Enlarge")
            shown_examples = parts.examples_input(examples)
        with gr.Column(scale=2, min_width=300):
            seen = viewer(label="Before and after", placeholder="The picture will appear here.")
            gallery = gr.Gallery(
                label="Enlarged pictures", visible=False, columns=4, height="auto", object_fit="contain",
                allow_preview=False, interactive=False, buttons=[],
            )  # fmt: skip
            with gr.Row():
                download = gr.DownloadButton("Download", visible=False, scale=0, min_width=160)
            figures = gr.HTML(elem_classes="figures", label="Figures")
    pairs = gr.State([])

    @parts.told
    async def enlarge(files, scale, model, request: gr.Request, progress=gr.Progress()):
        """
        Enlarge pictures as PNG files that keep the names and the metadata of the originals.

        Args:
            files: picture files, of up to 100 megapixels each.
            scale: from 1.5 to 8; the results have round(scale * width) by round(scale * height) pixels.
            model: one of the models that the server offers.
        Returns:
            Before and after of the first picture; all results; the result, or a zip of several; figures as HTML.
        """
        if not files:
            raise gr.Error("Choose a picture first.", print_exception=False)

        def work(job):
            results, failures = pictures.enlarge_files(
                job,
                [Path(file) for file in files],
                pipeline=models.enlarger(model),
                scale=scale,
                max_pixels=limits.max_pixels,
            )
            path = results[0].path if len(results) == 1 else pictures.pack(results, job.folder)
            return results, failures, path

        results, failures, path = await workshop.run(
            work, visitor=request.session_hash, report=parts.reporter(progress)
        )
        panes = [(result.before, result.after) for result in results]
        files = [str(result.path) for result in results]
        return view(panes[0], wipe=True), files, path, _enlargement_figures(results, failures), panes

    def reveal(pairs):
        several = len(pairs) > 1
        label = "Download all (zip)" if several else "Download"
        return gr.Gallery(visible=several), gr.DownloadButton(label, visible=True)

    outputs = [seen, gallery, download, figures, pairs]
    arguments = {"outputs": outputs, "show_progress_on": seen, "api_name": "enlarge", **parts.WORKING}
    running = run.click(enlarge, [files, scale, model], **arguments)
    running.success(reveal, pairs, [gallery, download], **parts.QUIET)
    parts.stoppable(stop, figures, running)
    parts.previewed(files, seen)
    gallery.select(_select_pair, pairs, seen, **parts.QUIET)
    if shown_examples is not None:
        shown_examples.click(lambda index: [str(examples[index])], shown_examples, files, **parts.QUIET)


def _select_pair(pairs: list, event: gr.SelectData):
    return view(pairs[event.index], wipe=True)


def _enlargement_figures(results: list[pictures.Enlarged], failures: list[str]) -> str:
    rows = [
        (
            result.path.name,
            parts.size_in_words(result.before.size),
            parts.size_in_words(result.after.size),
            parts.seconds_in_words(result.seconds),
            in_words(result.peak_memory_bytes),
        )
        for result in results
    ]
    names = ("Picture", "From", "To", "Time", "Peak memory")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    remarks = [*failures, *(f"{result.path.name}: {loss}" for result in results for loss in result.losses)]
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div role="status">{table}</div>' + "".join(parts.paragraph(remark) for remark in remarks)
