"""What the tabs do: enlarge picture files, compare methods, make a picture of a prompt."""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from uplift_diffusers.demo.jobs import Job, stoppable
from uplift_diffusers.images.files import OpenedImage, open_image, plan_saving, save_image
from uplift_diffusers.scale import check_output_size, num_steps_for_scale, resolve_scale
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
    A picture to look at.

    Args:
        path: a file that browsers show.
        label: what it is, in a few words.
        size: (width, height) in pixels of the picture it stands for.
    """

    path: Path
    label: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Enlargement:
    """
    How to enlarge.

    Args:
        by: what `amount` is: "scale", "width", "height", "long_side" or "megapixels", as in [`resolve_scale`].
        amount: how large.
        denoise, consistency: see [`UPLiFTSuperResolutionPipeline`].
    """

    by: str
    amount: float
    denoise: float | str = "auto"
    consistency: float = 1.0

    def scale_of(self, image: Image.Image) -> float:
        """For one picture. Raises ValueError where it would have to shrink, or to grow more than 16 times."""
        whole = int(self.amount) if self.by != "megapixels" and self.amount == int(self.amount) else self.amount
        return resolve_scale(image.size[::-1], **{self.by: whole})


@dataclass(frozen=True)
class Enlarged:
    """
    One picture, enlarged.

    Args:
        path: the PNG file, whose name is that of the original.
        before: the original, upright.
        after: the file at `path`.
        seconds: from opening to saving.
        peak_memory_bytes: see [`Job`].
        losses: sentences on what was in the file and is not in the result.
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
    Enlarge picture files to PNG files below `job.folder`, as `uplift-diffusers upscale` does.

    Returns:
        The enlarged ones, and a sentence on each of the other ones.
    Raises:
        ValueError: none could be enlarged; says why the first one could not.
        StoppedError: see [`Job`].
    """
    enlarged, failures = [], []
    for index, source in enumerate(sources):
        prefix = f"Picture {index + 1} of {len(sources)}: " if len(sources) > 1 else ""
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
    job.aside(save_image, image, target, metadata=opened.metadata)
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
    Enlarge one picture by bicubic interpolation, by bilinear interpolation of its latents, and by the pipeline.

    Args:
        scale: a power of two.
    Returns:
        The three, as PNG files below `job.folder`; transparency is left out.
    Raises:
        ValueError: it cannot be opened or would become too large.
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
    size = tuple(color.shape[1:])
    large = (size[0] * scale, size[1] * scale)
    codec = LatentCodec(pipeline.vae, pipeline.latent_space)

    images = {"Bicubic": job.aside(lambda: Picture(resize(color[None], large)[0]).to_pil())}
    with torch.no_grad(), following(job, "Interpolating", pipeline.vae) as advance:
        padded = pad_to_multiple(color[None].to(pipeline.device), codec.space.spatial_factor)
        raw_latents = interpolate_latents(codec.encode(padded), scale=scale)
        progress = Progress(advance, codec.count_strips(tuple(raw_latents.shape[2:])))
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
        job.aside(save_image, image, path)
        panes.append(Pane(path, label, image.size))
    return panes


@dataclass(frozen=True)
class Request:
    """
    What is asked for.

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
    Make a picture of a prompt.

    Returns:
        What was denoised, decoded as it is, and the picture that it is enlarged to, as PNG files below `job.folder`.
    Raises:
        ValueError: an argument is not as above, or the safety checker holds the picture back.
        StoppedError: see [`Job`].
    """
    import torch

    from uplift_diffusers.latent_space import LatentCodec

    codec = LatentCodec(pipeline.vae, pipeline.latent_space)
    edge = pipeline.unet.config.sample_size * codec.space.spatial_factor
    check_output_size((edge, edge), request.scale, max_pixels=max_pixels)
    num_refining = int(request.steps * request.refinement)
    job.plan({"Denoising": request.steps, "Refining": num_refining * request.scale**2, "Decoding": 2})
    denoised = None

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
        output = pipeline(
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
            raise ValueError("the safety checker held the picture back. Try another seed or another prompt.")
        small = codec.decode(codec.space.denormalize(denoised.float()))
    job.advance("Decoding", 1)
    images = {"small": pipeline.image_processor.postprocess(small * 2 - 1)[0], "large": output.images[0]}
    panes = []
    for label, (name, image) in zip(("Stable Diffusion", "Enlarged"), images.items()):
        path = job.folder / f"seed {request.seed} {name}.png"
        job.aside(save_image, image, path)
        panes.append(Pane(path, label, image.size))
    return panes[0], panes[1]


def preview(source: Path, folder: Path) -> Pane:
    """The picture of a file that is not yet enlarged. Raises ValueError, saying why, if there is none."""
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
    """Save as a PNG file of 8 bits a channel, whatever the mode."""
    _as_shown(image).save(path, compress_level=1)


def _open(job: Job, source: Path, wanted: Enlargement, *, max_pixels: int) -> tuple[OpenedImage, float]:
    """The picture, and its scale."""
    opened = plan_saving(job.aside(open_image, source), ".png")
    scale = wanted.scale_of(opened.image)
    check_output_size(opened.image.size[::-1], scale, max_pixels=max_pixels)
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
    **settings: float | str,
) -> Image.Image:
    import torch

    generator = torch.Generator().manual_seed(SEED)  # on the CPU: the same noise on every device
    with following(job, "Enlarging", pipeline.vae, pipeline.upsampler) as advance:
        settings = {"generator": generator, "callback_on_progress": advance, **settings}
        return pipeline(image=image, scale=scale, **settings).images[0]


def _free_path(path: Path) -> Path:
    candidate, count = path, 1
    while candidate.exists():
        count += 1
        candidate = path.with_stem(f"{path.stem} {count}")
    return candidate


@contextmanager
def following(job: Job, stage: str, *modules: "torch.nn.Module") -> Iterator[Callable[[int, int], None]]:
    """
    Within the block, `job` follows a pipeline through `stage`, and can stop it at every layer of `modules`.

    Returns:
        What the pipeline takes as `callback_on_progress`.
    """
    with stoppable(job, *modules):
        yield lambda done, total: job.advance(stage, done / total)
