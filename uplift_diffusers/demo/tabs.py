"""The tabs Enlarge, Create and Compare, and their shared parts."""

import asyncio
import html
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from uplift_diffusers.demo import work
from uplift_diffusers.demo.jobs import JobQueue, Report
from uplift_diffusers.demo.viewer import view, viewer
from uplift_diffusers.demo.weights import Models, Source, in_words
from uplift_diffusers.runtime import MAX_SEED
from uplift_diffusers.wording import reason

WORKING: dict[str, Any] = {"concurrency_limit": None}  # they wait in the JobQueue, where visitors take turns
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


SIZES = {
    "scale": ("by a factor", "Factor", 2),
    "width": ("to a width", "Pixels", 3840),
    "height": ("to a height", "Pixels", 2160),
    "long_side": ("to a long side", "Pixels", 3840),
    "megapixels": ("to a number of pixels", "Megapixels", 12),
}
"""Ways to give the output size, by argument of `resolve_scale`: label, label of the amount, initial amount."""


@dataclass(frozen=True)
class Limits:
    """
    Limits for visitors.

    Args:
        max_pixels: limit on an output in pixels.
        max_files: maximum number of files per job.
        is_local: whether all visitors use this machine. Only then they may choose another Stable Diffusion than that
            of the command line, and jobs per address are not limited.
    """

    max_pixels: int
    max_files: int
    is_local: bool


def enlarge_tab(jobs: JobQueue, models: Models, limits: Limits, examples: Sequence[Path]) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            files = file_input("Images: drop, paste or choose", file_count="multiple")
            with gr.Row():
                by = gr.Dropdown(
                    [(label, name) for name, (label, *_) in SIZES.items()],
                    value="scale", label="Enlarge", interactive=True, scale=3, min_width=130,
                )  # fmt: skip
                amount = gr.Number(2, label=SIZES["scale"][1], minimum=0, scale=2, min_width=110, buttons=[])
            model = model_input(models)
            with gr.Accordion("Noise", open=False):
                auto = gr.Checkbox(True, label="Automatic", info="JPEGs by their quality, other files not at all")
                denoise = gr.Slider(0, 1, value=0.3, step=0.05, label="Denoise", buttons=[], visible=False)
                kept = "How closely a clean original is kept"
                consistency = gr.Slider(0, 1, value=1, step=0.05, label="Consistency", info=kept, buttons=[])
            run, stop = buttons("Enlarge")
            shown_examples = examples_input(examples)
        with gr.Column(scale=2, min_width=300):
            seen = viewer(label="Before and after", placeholder="The image will appear here.")
            gallery = gr.Gallery(
                label="Enlarged images", visible=False, columns=4, height="auto", object_fit="contain",
                allow_preview=False, interactive=False, buttons=[],
            )  # fmt: skip
            with gr.Row():
                download = gr.DownloadButton("Download", visible=False, scale=0, min_width=160)
            figures = gr.HTML(elem_classes="figures", label="Figures")
    pairs = gr.State([])

    async def enlarge(
        files, by, amount, model, auto_denoise, denoise, consistency, request: gr.Request, progress=gr.Progress()
    ):
        """
        Upscale images to PNG files that keep the names and the metadata of the originals.

        Args:
            files: image files, of up to 100 megapixels each.
            by: what `amount` is: scale, width, height, long_side or megapixels.
            amount: the scale, from 1 to 16, or a size that determines it: pixels or megapixels of the results.
            model: one of the models that the server offers.
            auto_denoise: denoise JPEGs according to their quality and other files not at all; ignores denoise.
            denoise: from 0 to 1: how much of the compression artefacts and noise is removed.
            consistency: from 0 to 1: how closely the downsampled results match the originals.
        Returns:
            Before and after of the first image; all results; the result, or a zip of several; figures as HTML.
        """
        if not files:
            raise gr.Error("Choose an image first.", print_exception=False)
        if len(files) > limits.max_files:
            raise gr.Error(f"At most {limits.max_files} images at a time, got {len(files)}.", print_exception=False)

        def do(job):
            results, failures = work.enlarge_files(
                job,
                [Path(file) for file in files],
                pipeline=models.enlarger(model),
                wanted=work.Enlargement(by, amount, "auto" if auto_denoise else denoise, consistency),
                max_pixels=limits.max_pixels,
            )
            path = results[0].path if len(results) == 1 else work.pack(results, job.folder)
            return results, failures, path

        results, failures, path = await jobs.run(do, **asker(request, limits), report=reporter(progress))
        panes = [(result.before, result.after) for result in results]
        files = [str(result.path) for result in results]
        return view(panes[0], wipe=True), files, path, _enlargement_figures(results, failures), panes

    def reveal(pairs):
        several = len(pairs) > 1
        label = "Download all (zip)" if several else "Download"
        return gr.Gallery(visible=several), gr.DownloadButton(label, visible=True)

    outputs = [seen, gallery, download, figures, pairs]
    arguments = {"outputs": outputs, "show_progress_on": seen, "api_name": "enlarge", **WORKING}
    running = run.click(enlarge, [files, by, amount, model, auto, denoise, consistency], **arguments)
    running.success(reveal, pairs, [gallery, download], **QUIET)
    by.change(lambda by: gr.Number(SIZES[by][2], label=SIZES[by][1]), by, amount, **QUIET)
    auto.change(lambda auto: gr.Slider(visible=not auto), auto, denoise, **QUIET)
    stoppable(stop, figures, running)
    previewed(files, seen)
    gallery.select(_select_pair, pairs, seen, **QUIET)
    if shown_examples is not None:
        shown_examples.click(lambda index: [str(examples[index])], shown_examples, files, **QUIET)


def _select_pair(pairs: list, event: gr.SelectData):
    return view(pairs[event.index], wipe=True)


def _enlargement_figures(results: list[work.Enlarged], failures: list[str]) -> str:
    rows = [
        (
            result.path.name,
            size_in_words(result.before.size),
            size_in_words(result.after.size),
            seconds_in_words(result.seconds),
            in_words(result.peak_memory_bytes),
        )
        for result in results
    ]
    names = ("Picture", "From", "To", "Time", "Peak memory")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    remarks = [*failures, *(f"{result.path.name}: {loss}" for result in results for loss in result.losses)]
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div role="status">{table}</div>' + "".join(paragraph(remark) for remark in remarks)


def create_tab(tab: gr.Tab, jobs: JobQueue, models: Models, source: Source, limits: Limits) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            prompt = gr.Textbox("", label="Prompt", lines=2, placeholder="a lighthouse on a cliff")
            negative = gr.Textbox("", label="Negative prompt", placeholder="what to avoid")
            with gr.Row():
                steps = gr.Slider(1, 100, value=30, step=1, label="Steps", buttons=[], min_width=160)
                guidance = gr.Slider(1, 20, value=7.5, step=0.5, label="Guidance", buttons=[], min_width=160)
            with gr.Row():
                scale = gr.Slider(1, 8, value=2, step=0.5, label="Scale", buttons=[], min_width=160)
                refinement = gr.Slider(0, 0.9, value=0, step=0.1, label="Refinement", buttons=[], min_width=160)
            seed = gr.Textbox("", label="Seed", info="Leave empty for a random seed", max_lines=1)
            model = gr.Textbox(
                source.model,
                label="Stable Diffusion 1.x",
                info="A diffusers folder, or a repository on the hub",
                interactive=limits.is_local,
                max_lines=1,
            )
            run, stop = buttons("Create")
        with gr.Column(scale=2, min_width=300):
            notice = gr.HTML(label="Notice", visible=False)
            fetch = gr.Button("Download", visible=False)
            seen = viewer(label="Small and large", placeholder="The small and the large image will appear here.")
            with gr.Row():
                download = gr.DownloadButton("Download", visible=False, scale=0, min_width=160)
                keep = gr.Button("Keep this seed", visible=False, scale=0, min_width=200)
            figures = gr.HTML(elem_classes="figures", label="Figures")
            used_seed = gr.Textbox(label="Seed of this image", visible=False)

    def chosen(name: str) -> Source:
        if name.strip() != source.model and not limits.is_local:
            raise ValueError("another Stable Diffusion can only be chosen on the page of this machine.")
        return Source(name.strip(), source.upsampler)

    async def create(
        prompt, negative_prompt, steps, guidance, seed, scale, refinement, model,
        request: gr.Request, progress=gr.Progress(),
    ):  # fmt: skip
        """
        Generate an image with Stable Diffusion, and a larger one from the same latents.

        Args:
            prompt: the prompt.
            negative_prompt: the negative prompt.
            steps: denoising steps.
            guidance: guidance scale.
            seed: a whole number, or empty for a random one.
            scale: from 1 to 8.
            refinement: from 0 to 0.9, the share of the steps that is repeated at the large size.
            model: a diffusers folder of Stable Diffusion 1.x, or its repository.
        Returns:
            The small and the large image; the large one's PNG file; figures as HTML; the seed.
        """
        if not prompt.strip():
            raise gr.Error("Write a prompt first.", print_exception=False)
        asked = work.Request(prompt, negative_prompt, int(steps), guidance, parse_seed(seed), scale, refinement)

        def do(job):
            creator = models.creator(chosen(model))
            panes = work.create(job, asked, pipeline=creator, max_pixels=limits.max_pixels)
            facts = {"Seed": str(asked.seed), "Time": seconds_in_words(job.elapsed_s)}
            return panes, table({**facts, "Peak memory": in_words(job.peak_memory_bytes)})

        panes, facts = await jobs.run(do, **asker(request, limits), report=reporter(progress))
        return view(panes), panes[1].path, facts, str(asked.seed)

    async def look(model):
        """Which parts of Stable Diffusion are missing: a message for the page, and whether to offer a download."""
        wanted = chosen(model)
        if await asyncio.to_thread(wanted.find):
            return gr.HTML("", visible=False), gr.Button(visible=False)
        try:
            missing = await asyncio.to_thread(wanted.missing)
        except (ConnectionError, ValueError) as error:
            return gr.HTML(paragraph(reason(error)), visible=True), gr.Button(visible=False)
        names = " and ".join(f"{item.repository} ({in_words(item.size_bytes)})" for item in missing)
        size = in_words(sum(item.size_bytes for item in missing))
        sentence = paragraph(f"Not on this machine yet: {names}.")
        return gr.HTML(sentence, visible=True), gr.Button(f"Download {size}", visible=True)

    async def get(model, request: gr.Request, progress=gr.Progress()):
        """Download the missing models for `create`."""
        await jobs.run(chosen(model).download, **asker(request, limits), report=reporter(progress))
        return gr.HTML("", visible=False), gr.Button(visible=False)

    inputs = [prompt, negative, steps, guidance, seed, scale, refinement, model]
    creating = gr.on(
        [run.click, prompt.submit],
        create,
        inputs,
        [seen, download, figures, used_seed],
        show_progress_on=seen,
        api_name="create",
        **WORKING,
    )
    creating.success(
        lambda: (gr.DownloadButton(visible=True), gr.Button(visible=True)), None, [download, keep], **QUIET
    )
    getting = fetch.click(get, model, [notice, fetch], show_progress_on=seen, api_name="download", **WORKING)
    stoppable(stop, figures, creating, getting)
    keep.click(lambda seed: seed, used_seed, seed, **QUIET)
    gr.on(
        [tab.select, model.submit, model.blur],
        look,
        model,
        [notice, fetch],
        show_progress="hidden",
        api_visibility="private",
    )


def parse_seed(text: str | None) -> int:
    text = (text or "").strip()
    if not text:
        return secrets.randbelow(2**32)
    if not (text.isascii() and text.isdigit() and int(text) <= MAX_SEED):
        raise ValueError(f"the seed must be a whole number from 0 to {MAX_SEED}, got {text[:40]!r}.")
    return int(text)


def compare_tab(jobs: JobQueue, models: Models, limits: Limits, examples: Sequence[Path]) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            file = file_input("Image: drop, paste or choose", file_count="single")
            scale = gr.Radio([2, 4, 8], value=4, label="Scale")
            model = model_input(models)
            run, stop = buttons("Compare")
            shown_examples = examples_input(examples)
        with gr.Column(scale=2, min_width=300):
            seen = viewer(label="Three methods", placeholder="Three methods will appear here, side by side.")
            figures = gr.HTML(elem_classes="figures", label="Figures")

    async def compare(file, scale, model, request: gr.Request, progress=gr.Progress()):
        """
        Upscale an image by bicubic interpolation, by bilinear interpolation of its latents, and by UPLiFT.

        Args:
            file: an image file.
            scale: 2, 4 or 8.
            model: one of the models that the server offers.
        Returns:
            The three images, as PNG files; figures as HTML.
        """
        if not file:
            raise gr.Error("Choose an image first.", print_exception=False)

        def do(job):
            panes = work.compare_methods(
                job, Path(file), pipeline=models.enlarger(model), scale=scale, max_pixels=limits.max_pixels
            )
            return view(panes), table(
                {"Time": seconds_in_words(job.elapsed_s), "Peak memory": in_words(job.peak_memory_bytes)}
            )

        return await jobs.run(do, **asker(request, limits), report=reporter(progress))

    arguments = {"show_progress_on": seen, "api_name": "compare", **WORKING}
    running = run.click(compare, [file, scale, model], [seen, figures], **arguments)
    stoppable(stop, figures, running)
    previewed(file, seen)
    if shown_examples is not None:
        shown_examples.click(lambda index: str(examples[index]), shown_examples, file, **QUIET)


def asker(request: gr.Request, limits: Limits) -> dict[str, Any]:
    """The owner of a job, for `JobQueue.run`. API clients without a session are identified by their address."""
    address = request.client.host if request.client else ""
    return {"visitor": request.session_hash or address, "address": None if limits.is_local else address}


def reporter(progress: gr.Progress) -> Report:
    """A report function that updates Gradio's progress bar."""
    return lambda fraction, sentence: progress(fraction, desc=sentence)


def file_input(label: str, *, file_count: Literal["single", "multiple"]) -> gr.File:
    return gr.File(label=label, file_count=file_count, file_types=["image"], type="filepath", height=150)


def model_input(models: Models) -> gr.Dropdown:
    names = list(models.super_resolution)
    return gr.Dropdown(names, value=names[-1], label="Model", interactive=True)


def buttons(name: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return gr.Button(name, variant="primary", min_width=120), gr.Button("Cancel", min_width=120)


def examples_input(examples: Sequence[Path]) -> gr.Dataset | None:
    if not examples:
        return None
    samples = [[str(path)] for path in examples]
    return gr.Dataset(label="Examples", components=[gr.Image(visible=False)], samples=samples, type="index")


def stoppable(stop: gr.Button, figures: gr.HTML, *running) -> None:
    """Let `stop` cancel the listeners `running`, whether waiting or running."""
    stop.click(lambda: paragraph("Cancelled."), None, figures, cancels=list(running), **QUIET)


def previewed(files: gr.File, seen: gr.HTML) -> None:
    """Show an image as soon as it is chosen."""

    async def preview(files):
        chosen = [files] if isinstance(files, str) else files
        if not chosen:
            return None
        folder = Path(tempfile.mkdtemp(dir=seen.GRADIO_CACHE))
        return view([await asyncio.to_thread(work.preview, Path(chosen[0]), folder)])

    files.change(preview, files, seen, show_progress="minimal", api_visibility="private")


def table(facts: dict[str, str]) -> str:
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{html.escape(fact)}</td></tr>' for name, fact in facts.items())
    return f'<div role="status"><table><tbody>{rows}</tbody></table></div>'


def paragraph(sentence: str) -> str:
    return f'<p role="status">{html.escape(sentence)}</p>'


def size_in_words(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def seconds_in_words(seconds: float) -> str:
    return f"{seconds:.1f} s"
