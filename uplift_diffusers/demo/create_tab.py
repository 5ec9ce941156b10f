"""The tab Create."""

import asyncio
import secrets

import gradio as gr

from uplift_diffusers.cli import MAX_SEED, reason
from uplift_diffusers.demo import parts, text_to_image
from uplift_diffusers.demo.models import Models
from uplift_diffusers.demo.text_to_image import Source, in_words
from uplift_diffusers.demo.viewer import view, viewer
from uplift_diffusers.demo.workshop import Workshop


def create_tab(tab: gr.Tab, workshop: Workshop, models: Models, source: Source, limits: parts.Limits) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            prompt = gr.Textbox("", label="Prompt", lines=2, placeholder="a lighthouse on a cliff")
            negative = gr.Textbox("", label="Negative prompt", placeholder="what should not be seen")
            with gr.Row():
                steps = gr.Slider(1, 100, value=30, step=1, label="Steps", buttons=[], min_width=160)
                guidance = gr.Slider(1, 20, value=7.5, step=0.5, label="Guidance", buttons=[], min_width=160)
            with gr.Row():
                scale = gr.Slider(1, 8, value=2, step=0.5, label="Scale", buttons=[], min_width=160)
                refinement = gr.Slider(0, 0.9, value=0, step=0.1, label="Refinement", buttons=[], min_width=160)
            seed = gr.Textbox("", label="Seed", info="Empty: another one each time", max_lines=1)
            model = gr.Textbox(
                source.model,
                label="Stable Diffusion 1.x",
                info="A diffusers folder, or a repository on the hub",
                interactive=limits.other_models,
                max_lines=1,
            )
            run, stop = parts.buttons("Create")
        with gr.Column(scale=2, min_width=300):
            notice = gr.HTML(label="Notice", visible=False)
            fetch = gr.Button("Download", visible=False)
            seen = viewer(label="Small and large", placeholder="The picture will appear here, small and large.")
            with gr.Row():
                download = gr.DownloadButton("Download", visible=False, scale=0, min_width=160)
                keep = gr.Button("Keep this seed", visible=False, scale=0, min_width=200)
            figures = gr.HTML(elem_classes="figures", label="Figures")
            used_seed = gr.Textbox(label="Seed of this picture", visible=False)

    def chosen(name: str) -> Source:
        if name.strip() != source.model and not limits.other_models:
            raise ValueError("another Stable Diffusion can be named on this machine's own page alone.")
        return Source(name.strip(), source.upsampler)

    @parts.told
    async def create(
        prompt, negative_prompt, steps, guidance, seed, scale, refinement, model,
        request: gr.Request, progress=gr.Progress(),
    ):  # fmt: skip
        """
        Make a picture of a prompt with Stable Diffusion, and a larger one of its latents.

        Args:
            prompt: what to see.
            negative_prompt: what not to see.
            steps: of the denoising.
            guidance: how closely the prompt is followed.
            seed: a whole number, or nothing for a random one.
            scale: from 1 to 8.
            refinement: from 0 to 0.9, the share of the steps that is repeated at the large size.
            model: a diffusers folder of Stable Diffusion 1.x, or its repository.
        Returns:
            The small and the large picture; the large one's PNG file; figures as HTML; the seed.
        """
        if not prompt.strip():
            raise gr.Error("Write a prompt first.", print_exception=False)
        asked = text_to_image.Request(
            prompt, negative_prompt, int(steps), guidance, _parse_seed(seed), scale, refinement
        )

        def work(job):
            creator = models.creator(chosen(model))
            panes = text_to_image.create(job, asked, pipeline=creator, max_pixels=limits.max_pixels)
            facts = {"Seed": str(asked.seed), "Time": parts.seconds_in_words(job.elapsed_s)}
            return panes, parts.table({**facts, "Peak memory": in_words(job.peak_memory_bytes)})

        panes, facts = await workshop.run(work, visitor=request.session_hash, report=parts.reporter(progress))
        return view(panes), panes[1].path, facts, str(asked.seed)

    @parts.told
    async def look(model):
        """What of Stable Diffusion is on this machine: a sentence for the page, and whether to offer a download."""
        wanted = chosen(model)
        if await asyncio.to_thread(wanted.find):
            return gr.HTML("", visible=False), gr.Button(visible=False)
        try:
            missing = await asyncio.to_thread(wanted.missing)
        except (ConnectionError, ValueError) as error:
            return gr.HTML(parts.paragraph(reason(error)), visible=True), gr.Button(visible=False)
        names = " and ".join(f"{item.repository} ({in_words(item.size_bytes)})" for item in missing)
        size = in_words(sum(item.size_bytes for item in missing))
        sentence = parts.paragraph(f"Not on this machine yet: {names}.")
        return gr.HTML(sentence, visible=True), gr.Button(f"Download {size}", visible=True)

    @parts.told
    async def get(model, request: gr.Request, progress=gr.Progress()):
        """Download what `create` needs and this machine does not have."""
        await workshop.run(chosen(model).download, visitor=request.session_hash, report=parts.reporter(progress))
        return gr.HTML("", visible=False), gr.Button(visible=False)

    inputs = [prompt, negative, steps, guidance, seed, scale, refinement, model]
    creating = gr.on(
        [run.click, prompt.submit],
        create,
        inputs,
        [seen, download, figures, used_seed],
        show_progress_on=seen,
        api_name="create",
        **parts.WORKING,
    )
    creating.success(
        lambda: (gr.DownloadButton(visible=True), gr.Button(visible=True)), None, [download, keep], **parts.QUIET
    )
    getting = fetch.click(get, model, [notice, fetch], show_progress_on=seen, api_name="download", **parts.WORKING)
    parts.stoppable(stop, figures, creating, getting)
    keep.click(lambda seed: seed, used_seed, seed, **parts.QUIET)
    gr.on(
        [tab.select, model.submit, model.blur],
        look,
        model,
        [notice, fetch],
        show_progress="hidden",
        api_visibility="private",
    )


def _parse_seed(text: str | None) -> int:
    text = (text or "").strip()
    if not text:
        return secrets.randbelow(2**32)
    if not (text.isascii() and text.isdigit() and int(text) <= MAX_SEED):
        raise ValueError(f"the seed must be a whole number from 0 to {MAX_SEED}, got {text[:40]!r}.")
    return int(text)
