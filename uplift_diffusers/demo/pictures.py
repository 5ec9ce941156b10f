"""What the tabs Enlarge and Compare do with picture files."""

import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from uplift_diffusers.cli import check_output_size, reason
from uplift_diffusers.demo.workshop import Job, stoppable
from uplift_diffusers.images.files import OpenedImage, open_image, plan_saving, save_image
from uplift_diffusers.scale import num_steps_for_scale

if TYPE_CHECKING:
    import torch

    from uplift_diffusers.pipelines.super_resolution import UPLiFTSuperResolutionPipeline

SEED = 0
"""Of the noise, as `uplift-diffusers upscale` has it by default."""

STAGES = {"Encoding": 0.06, "Enlarging": 0.32, "Decoding": 0.62}
"""The stages of an enlargement and what share of the time they take with the embedded bundle."""

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
    scale: float,
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
                _enlarge_file(job, source, target, prefix, pipeline=pipeline, scale=scale, max_pixels=max_pixels)
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
    scale: float,
    max_pixels: int,
) -> Enlarged:
    job.plan(STAGES, prefix=prefix)
    opened = _open(source, scale=scale, max_pixels=max_pixels)
    with _watched(job, _stages(pipeline, size=opened.image.size[::-1], scale=scale)):
        image = pipeline(image=opened.image, scale=scale, generator=_generator()).images[0]
    save_image(image, target, metadata=opened.metadata)
    original = job.folder / "original" / target.name
    original.parent.mkdir(exist_ok=True)
    save_for_browser(opened.image, original)
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
    import torch.nn.functional as F

    from uplift_diffusers.images.convert import Picture, assemble_pil, pad_to_multiple, read_pictures, resize
    from uplift_diffusers.pipelines.upscale_stage import decode_strips_to_scale, resolve_tile_size

    job.plan({"Interpolating": 0.4, **{stage: 0.6 * share for stage, share in STAGES.items()}})
    opened = _open(source, scale=scale, max_pixels=max_pixels)
    color = read_pictures(opened.image)[0].color  # (3, h, w)
    size = tuple(color.shape[1:])
    large = (size[0] * scale, size[1] * scale)
    space, tile_size = pipeline.latent_space, resolve_tile_size("auto", size)

    images = {"Bicubic": Picture(resize(color[None], large)[0]).to_pil()}
    stages = _stages(pipeline, size=size, scale=scale)
    with torch.no_grad(), _watched(job, {"Interpolating": stages["Decoding"]}):
        padded = pad_to_multiple(color[None].to(pipeline.device), space.spatial_factor)
        raw_latents = space.encode(pipeline.vae, padded, tile_size=tile_size).float()
        raw_latents = F.interpolate(raw_latents, scale_factor=scale, mode="bilinear")
        strips = decode_strips_to_scale(
            raw_latents,
            space=space,
            vae=pipeline.vae,
            size=size,
            num_steps=num_steps_for_scale(scale),
            scale=scale,
            tile_size=tile_size,
        )
        images["Latents, bilinear"] = assemble_pil((strip[0].cpu() for strip in strips), large)
    with _watched(job, stages):
        images["UPLiFT"] = pipeline(image=color, scale=scale, generator=_generator()).images[0]

    panes = []
    for label, image in images.items():
        path = job.folder / f"{source.stem} {label.lower().replace(',', '')}.png"
        save_image(image, path)
        panes.append(Pane(path, label, image.size))
    return panes


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


def _open(source: Path, *, scale: float, max_pixels: int) -> OpenedImage:
    opened = plan_saving(open_image(source), ".png")
    check_output_size(opened.image.size, scale, ".png", max_pixels=max_pixels)
    return opened


def _as_shown(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = image.point(lambda value: value / 256).convert("L")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert(mode)


def _generator() -> "torch.Generator":
    import torch

    return torch.Generator().manual_seed(SEED)  # on the CPU: the same noise on every device


def _free_path(path: Path) -> Path:
    candidate, count = path, 1
    while candidate.exists():
        count += 1
        candidate = path.with_stem(f"{path.stem} {count}")
    return candidate


def _stages(
    pipeline: "UPLiFTSuperResolutionPipeline", *, size: tuple[int, int], scale: float
) -> "dict[str, tuple[torch.nn.Module, int]]":
    """The network of every stage, and how many positions it makes of a picture of `size` (height, width)."""
    factor = pipeline.latent_space.spatial_factor
    latents = math.prod(-(-length // factor) for length in size)
    enlarged = latents * 4 ** num_steps_for_scale(scale)
    return {
        "Encoding": (pipeline.vae.encoder, latents),
        "Enlarging": (pipeline.upsampler, enlarged),
        "Decoding": (pipeline.vae.decoder, enlarged * factor**2),
    }


@contextmanager
def _watched(job: Job, stages: "dict[str, tuple[torch.nn.Module, int]]") -> Iterator[None]:
    """Within the block, `job` follows the stages, tile by tile, and their layers ask it whether to go on."""
    done = dict.fromkeys(stages, 0)

    def counter(stage):
        def count(module, arguments, output):
            tensor = getattr(output, "sample", output)  # (1, C, height, width)
            done[stage] += tensor.shape[2] * tensor.shape[3]
            job.advance(stage, done[stage] / stages[stage][1])

        return count

    hooks = [module.register_forward_hook(counter(stage)) for stage, (module, _) in stages.items()]
    try:
        with stoppable(job, *(module for module, _ in stages.values())):
            yield
    finally:
        for hook in hooks:
            hook.remove()
