"""The work of the tabs: upscale image files, compare methods, generate an image from a prompt."""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from uplift_diffusers.demo.jobs import Job, stoppable
from uplift_diffusers.images.files import OpenedImage, open_image, plan_saving, save_image
from uplift_diffusers.scale import check_output_size, num_steps_for_scale, resolve_scale, size_of
from uplift_diffusers.wording import reason

if TYPE_CHECKING:
    import torch

    from uplift_diffusers.pipelines.super_resolution import UPLiFTSuperResolutionPipeline
    from uplift_diffusers.pipelines.text_to_image import UPLiFTTextToImagePipeline

SEED = 0
"""Of the noise, as `uplift-diffusers upscale` has it by default."""

PREVIEW_PX = 1024


@dataclass(frozen=True)
class Pane:
    """
    An image to display.

    Args:
        path: a file that browsers can show.
        label: a short description.
        size: (width, height) in pixels of the image that it represents.
    """

    path: Path
    label: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Enlargement:
    """
    The settings of an upscaling job.

    Args:
        by: what `amount` is: "scale", "width", "height", "long_side" or "megapixels", as in [`resolve_scale`].
        amount: the scale, or a size in pixels or megapixels.
        denoise, consistency: see [`UPLiFTSuperResolutionPipeline`].
    """

    by: str
    amount: float
    denoise: float | str = "auto"
    consistency: float = 1.0

    def scale_of(self, image: Image.Image) -> float:
        """The scale for one image. Raises ValueError if it is below 1 or above 16."""
        whole = int(self.amount) if self.by != "megapixels" and self.amount == int(self.amount) else self.amount
        size: dict[str, Any] = {self.by: whole}
        return resolve_scale((image.height, image.width), **size)


@dataclass(frozen=True)
class Enlarged:
    """
    One upscaled image.

    Args:
        path: the PNG file, named after the original.
        before: the original, upright.
        after: the file at `path`.
        seconds: from opening to saving.
        peak_memory_bytes: see [`Job`].
        losses: messages on what the result lost.
    """

    path: Path
    before: Pane
    after: Pane
    seconds: float
    peak_memory_bytes: int
    losses: tuple[str, ...]


def enlarge_files(
    job: Job,
    sources: Sequence[Path],
    *,
    pipeline: "UPLiFTSuperResolutionPipeline",
    wanted: Enlargement,
    max_pixels: int,
) -> tuple[list[Enlarged], list[str]]:
    """
    Upscale image files to PNG files below `job.folder`, like `uplift-diffusers upscale`.

    Returns:
        The results, and a message on each file that failed.
    Raises:
        ValueError: all files failed; the message is that of the first one.
        StoppedError: see [`Job`].
    """
    enlarged, failures = [], []
    for index, source in enumerate(sources):
        prefix = f"Image {index + 1} of {len(sources)}: " if len(sources) > 1 else ""
        try:
            target = _free_path(job.folder / f"{source.stem}.png")
            enlarged.append(
                _enlarge_file(job, source, target, prefix, pipeline=pipeline, wanted=wanted, max_pixels=max_pixels)
            )
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            if len(sources) == 1:
                raise
            failures.append(f"{source.name}: {reason(error)}")
    if not enlarged:
        raise ValueError(failures[0])
    return enlarged, failures


def _enlarge_file(
    job: Job,
    source: Path,
    target: Path,
    prefix: str,
    *,
    pipeline: "UPLiFTSuperResolutionPipeline",
    wanted: Enlargement,
    max_pixels: int,
) -> Enlarged:
    job.plan({"Enlarging": 1}, prefix=prefix)
    opened, scale = _open(job, source, wanted, max_pixels=max_pixels)
    settings = {"denoise": wanted.denoise, "consistency": wanted.consistency}
    image = _enlarge(job, opened.image, pipeline=pipeline, scale=scale, **settings)
    job.aside(save_image, image, target, metadata=opened.metadata, check=job.check)
    original = job.folder / "original" / target.name
    original.parent.mkdir(exist_ok=True)
    job.aside(save_for_browser, opened.image, original)
    return Enlarged(
        path=target,
        before=Pane(original, "Before", opened.image.size),
        after=Pane(target, "After", image.size),
        seconds=job.elapsed_s,
        peak_memory_bytes=job.peak_memory_bytes,
        losses=opened.losses,
    )


def compare_methods(
    job: Job, source: Path, *, pipeline: "UPLiFTSuperResolutionPipeline", scale: int, max_pixels: int
) -> list[Pane]:
    """
    Upscale one image by bicubic interpolation, by bilinear interpolation of its latents, and by the pipeline.

    Args:
        scale: a power of two.
    Returns:
        The three results, as PNG files below `job.folder`, without transparency.
    Raises:
        ValueError: the image cannot be opened or would become too large.
        StoppedError: see [`Job`].
    """
    import torch

    from uplift_diffusers.images.convert import Picture, assemble_pil, pad_to_multiple, read_pictures, resize
    from uplift_diffusers.latent_space import LatentCodec
    from uplift_diffusers.models.interpolation import interpolate_latents
    from uplift_diffusers.pipelines.upscale_stage import Progress, decode_strips_to_scale

    job.plan({"Interpolating": 0.4, "Enlarging": 0.6})
    opened, _ = _open(job, source, Enlargement("scale", scale), max_pixels=max_pixels)
    picture = read_pictures(opened.image)[0]
    color = picture.color  # (3, h, w)
    size = size_of(color)
    large = (size[0] * scale, size[1] * scale)
    codec = LatentCodec(pipeline.vae, pipeline.latent_space)

    images = {"Bicubic": job.aside(lambda: Picture(resize(color[None], large)[0]).to_pil())}
    with torch.no_grad(), following(job, "Interpolating", pipeline.vae) as advance:
        padded = pad_to_multiple(color[None].to(pipeline.device), codec.space.spatial_factor)
        raw_latents = interpolate_latents(codec.encode(padded), scale=scale)
        progress = Progress(advance, codec.count_strips(size_of(raw_latents)))
        strips = decode_strips_to_scale(
            raw_latents, codec=codec, size=size, num_steps=num_steps_for_scale(scale), scale=scale, progress=progress
        )
        images["Latents, bilinear"] = assemble_pil((strip[0].cpu() for strip in strips), large)
    # What is not from a JPEG, and so is not denoised, loses its transparency first.
    small = color if picture.jpeg_quality is None else opened.image
    images["UPLiFT"] = _enlarge(job, small, pipeline=pipeline, scale=scale)

    panes = []
    for label, image in images.items():
        path = job.folder / f"{source.stem} {label.lower().replace(',', '')}.png"
        job.aside(save_image, image, path, check=job.check)
        panes.append(Pane(path, label, image.size))
    return panes


@dataclass(frozen=True)
class Request:
    """
    The settings of a generation.

    Args:
        prompt, negative_prompt, steps, guidance, seed, scale, refinement: see [`UPLiFTTextToImagePipeline`].
    """

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    seed: int
    scale: float
    refinement: float


def create(job: Job, request: Request, *, pipeline: "UPLiFTTextToImagePipeline", max_pixels: int) -> tuple[Pane, Pane]:
    """
    Generate an image from a prompt.

    Returns:
        The small image, decoded from the denoised latents, and the upscaled one, as PNG files below `job.folder`.
    Raises:
        ValueError: an argument is invalid, or the safety checker rejects the image.
        StoppedError: see [`Job`].
    """
    import torch

    from uplift_diffusers.latent_space import LatentCodec

    codec = LatentCodec(pipeline.vae, pipeline.latent_space)
    edge = pipeline.unet.config.sample_size * codec.space.spatial_factor
    check_output_size((edge, edge), request.scale, max_pixels=max_pixels)
    num_refining = int(request.steps * request.refinement)
    job.plan({"Denoising": request.steps, "Refining": num_refining * request.scale**2, "Decoding": 2})
    denoised: Any = None

    def follow(denoiser, step, timestep, tensors):
        nonlocal denoised
        if denoiser is pipeline:
            denoised = tensors["latents"]
            job.advance("Denoising", (step + 1) / request.steps)
        else:
            job.advance("Refining", (step + 1) / num_refining)
        return tensors

    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    with stoppable(job, *modules), torch.no_grad():
        output: Any = pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt or None,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            generator=torch.Generator().manual_seed(request.seed),
            scale=request.scale,
            refine_strength=request.refinement,
            callback_on_step_end=follow,
        )
        if any(output.nsfw_content_detected or ()):
            raise ValueError("the safety checker rejected the image. Try another seed or another prompt.")
        small = codec.decode(codec.space.denormalize(denoised.float()))
    job.advance("Decoding", 1)
    shown: Any = pipeline.image_processor.postprocess(small * 2 - 1)
    images = {"small": shown[0], "large": output.images[0]}
    panes = []
    for label, (name, image) in zip(("Stable Diffusion", "Enlarged"), images.items()):
        path = job.folder / f"seed {request.seed} {name}.png"
        job.aside(save_image, image, path, check=job.check)
        panes.append(Pane(path, label, image.size))
    return panes[0], panes[1]


def preview(source: Path, folder: Path) -> Pane:
    """A preview of an input file. Raises ValueError, with the reason, if it cannot be opened."""
    image = open_image(source).image
    size = image.size
    image = _as_shown(image)
    image.thumbnail((PREVIEW_PX, PREVIEW_PX))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{source.stem}.png"
    image.save(path, compress_level=1)
    return Pane(path, "Before", size)


def pack(results: Sequence[Enlarged], folder: Path) -> Path:
    """One zip of all results."""
    path = folder / "enlarged.zip"
    with zipfile.ZipFile(path, "w") as archive:  # PNG files are compressed as they are
        for result in results:
            archive.write(result.path, result.path.name)
    return path


def save_for_browser(image: Image.Image, path: Path) -> None:
    """Save as a PNG file with 8 bits per channel, for any mode."""
    _as_shown(image).save(path, compress_level=1)


def _open(job: Job, source: Path, wanted: Enlargement, *, max_pixels: int) -> tuple[OpenedImage, float]:
    """The opened image and its scale."""
    opened = plan_saving(job.aside(open_image, source), ".png")
    scale = wanted.scale_of(opened.image)
    check_output_size((opened.image.height, opened.image.width), scale, max_pixels=max_pixels)
    return opened, scale


def _as_shown(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = image.point(lambda value: value / 256).convert("L")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert(mode)


def _enlarge(
    job: Job,
    image: "Image.Image | torch.Tensor",
    *,
    pipeline: "UPLiFTSuperResolutionPipeline",
    scale: float,
    **settings: Any,
) -> Image.Image:
    import torch

    generator = torch.Generator().manual_seed(SEED)  # on the CPU: the same noise on every device
    with following(job, "Enlarging", pipeline.vae, pipeline.upsampler) as advance:
        settings = {"generator": generator, "callback_on_progress": advance, **settings}
        output: Any = pipeline(image=image, scale=scale, **settings)
        return output.images[0]


def _free_path(path: Path) -> Path:
    candidate, count = path, 1
    while candidate.exists():
        count += 1
        candidate = path.with_stem(f"{path.stem} {count}")
    return candidate


@contextmanager
def following(job: Job, stage: str, *modules: "torch.nn.Module") -> Iterator[Callable[[int, int], None]]:
    """
    Within the block, report a pipeline's progress in `stage` to `job`, which can stop it at every layer of `modules`.

    Returns:
        The `callback_on_progress` for the pipeline.
    """
    with stoppable(job, *modules):
        yield lambda done, total: job.advance(stage, done / total)
