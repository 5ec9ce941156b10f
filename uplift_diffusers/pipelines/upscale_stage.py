"""The upscale stage shared by the pipelines: checks, upsampling, colour correction, decoding."""

from collections.abc import Callable, Iterator

import torch
from diffusers import AutoencoderTiny
from diffusers.utils.torch_utils import is_compiled_module

from uplift_diffusers.arguments import read_number, read_whole_number
from uplift_diffusers.images.convert import interpolate, missing_detail
from uplift_diffusers.latent_space import LatentCodec, LatentSpace
from uplift_diffusers.models.upsampler import Generator, UPLiFTModel
from uplift_diffusers.scale import num_steps_for_scale, scaled_size
from uplift_diffusers.tiling import split_into_tiles, upsample_tiled

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

TileSize = int | str | None
AUTO_TILE_SIZE = 768
"""Tile size in pixels for `tile_size="auto"`; a smaller image is one tile."""

MIN_TILE_SIZE = 64

CONSISTENCY_REACH = 4
"""Reach of `make_consistent` in image pixels to each side: two for each of its interpolations."""


def check_request(*, scale: float, adain_factor: float, output_type: str, tile_size: TileSize) -> int:
    """
    Check the arguments of the stage.

    Returns:
        The number of 2x steps.
    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
    read_number("adain_factor", adain_factor, minimum=0, maximum=1)
    read_tile_size(tile_size)
    return num_steps_for_scale(scale)


def read_tile_size(tile_size: TileSize) -> int | None:
    """
    The edge of a tile in pixels, None for no tiles.

    Raises:
        TypeError, ValueError: `tile_size` is not `"auto"`, None or a whole number of at least 64.
    """
    if isinstance(tile_size, str) and tile_size == "auto":
        return AUTO_TILE_SIZE
    return None if tile_size is None else read_whole_number("tile_size", tile_size, minimum=MIN_TILE_SIZE)


def check_generator(generator: Generator, count: int, *, noun: str = "items") -> None:
    """Raise TypeError or ValueError unless `generator` is None, one generator, or a list of `count`."""
    for entry in generator if isinstance(generator, list) else [generator]:
        if not isinstance(entry, torch.Generator) and generator is not None:
            raise TypeError(f"`generator` must be a torch.Generator or a list of them, got {type(entry).__name__}.")
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"`generator` must have one entry for each of the {count} {noun}, got {len(generator)}.")


def require_components(**components: object) -> None:
    """Raise ValueError if the pipeline was built without one of `components`."""
    for name, component in components.items():
        if component is None:
            raise ValueError(
                f"`{name}` must be a model, got None: this pipeline can only encode prompts. Load it with its {name}."
            )


def check_guide_vae(space: LatentSpace, guide_vae: AutoencoderTiny | None) -> None:
    """Raise TypeError or ValueError unless `guide_vae` is None or an AutoencoderTiny of the shape of `space`."""
    if guide_vae is None:
        return
    if not isinstance(guide_vae, AutoencoderTiny):
        raise TypeError(f"`guide_vae` must be an AutoencoderTiny, got {type(guide_vae).__name__}.")
    tiny = LatentSpace.of(guide_vae)
    if (tiny.channels, tiny.spatial_factor) != (space.channels, space.spatial_factor):
        raise ValueError(
            f"`guide_vae` must decode the latents of {space.name!r} ({space.channels} channels, spatial factor "
            f"{space.spatial_factor}), got {tiny.channels} channels and spatial factor {tiny.spatial_factor}."
        )


class Progress:
    """
    Counts the parts of a call's work: every step of every tile, and every decoded strip.

    Args:
        callback: called with the number of parts done and the total, or None.
        total: total number of parts.
    """

    def __init__(self, callback: Callable[[int, int], None] | None, total: int):
        self.callback, self.total, self.done = callback, total, 0

    def advance(self) -> None:
        """Count one more part and call the callback. An exception raised in it ends the work."""
        self.done += 1
        if self.callback is not None:
            self.callback(self.done, self.total)


def count_parts(
    codec: LatentCodec, size: tuple[int, int], *, num_steps: int, tile_size: TileSize, decodes: bool = True
) -> int:
    """
    The number of times `upscale_raw_latents` and `decode_strips_to_scale` advance a `Progress` for one batch.

    Args:
        size: (height, width) in pixels of the image, multiples of the spatial factor.
        decodes: whether the latents are decoded.
    """
    factor = codec.space.spatial_factor
    latents = (size[0] // factor, size[1] // factor)
    num_tiles = sum(map(len, split_into_tiles(latents, _edge(latents, factor, read_tile_size(tile_size)))))
    large = (latents[0] * 2**num_steps, latents[1] * 2**num_steps)
    return num_tiles * num_steps + (codec.count_strips(large) if decodes else 0)


def upscale_raw_latents(
    raw_latents: torch.Tensor,
    *,
    image: torch.Tensor | None,
    upsampler: UPLiFTModel,
    num_steps: int,
    generator: Generator = None,
    adain_factor: float = 0.0,
    denoise: float = 0.0,
    tile_size: TileSize = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """
    Upsample raw latents under the image's guidance and correct their statistics.

    Args:
        raw_latents: (B, C, h, w) float, unscaled.
        image: (B, 3, f*h, f*w) float in [0, 1]; ignored if `num_steps` is 0.
        upsampler: trained for these latents.
        num_steps: number of 2x steps, >= 0.
        generator: one, or one for each item.
        adain_factor: from 0 to 1, see `match_channel_statistics`.
        denoise: from 0 to 1, see `UPLiFTModel.forward`.
        tile_size: edge of a tile in pixels of the image, `"auto"` or None; the output does not depend on it.
        progress: advanced after every step of every tile.
    Returns:
        (B, C, h * 2**num_steps, w * 2**num_steps), dtype of `upsampler`; `raw_latents` if `num_steps` is 0.
    Raises:
        ValueError: the upsampler's output is not finite.
    """
    if num_steps == 0:
        return raw_latents
    assert image is not None
    edge_px = read_tile_size(tile_size)
    latents, image = raw_latents.to(upsampler.dtype), image.to(raw_latents.device)
    if edge_px is None and is_compiled_module(upsampler):
        # In one piece, as it was compiled. Noise is drawn here, for a compiled model takes no generator.
        noise = list(upsampler.draw_noise(latents, num_steps, generator))
        upsampled = upsampler(latents, image=image, num_steps=num_steps, noise=noise, denoise=denoise).sample
        if progress is not None:
            for _ in range(num_steps):
                progress.advance()
    else:
        upsampled = upsample_tiled(
            upsampler,
            latents,
            image=image,
            num_steps=num_steps,
            generator=generator,
            denoise=denoise,
            tile_size=edge_px or max(image.shape[2:]),
            callback_on_step=progress.advance if progress is not None else None,
        )
    if not torch.isfinite(upsampled).all():
        raise ValueError(
            f"`upsampler` must give finite latents, got NaN or infinity in {upsampler.dtype}. "
            "Run it in float32 or bfloat16: upsampler.to(torch.bfloat16)."
        )
    return match_channel_statistics(upsampled, raw_latents, adain_factor)


def match_channel_statistics(values: torch.Tensor, reference: torch.Tensor, factor: float) -> torch.Tensor:
    """
    Move the mean and standard deviation of every channel of `values` towards those of `reference`.

    values + factor * ((values - mean(values)) * std(reference) / std(values) + mean(reference) - values), over the
    positions of each item and channel. If a channel of `values` is constant, only its mean moves.

    Args:
        values: (B, C, H, W) float.
        reference: (B, C, h, w) float.
        factor: 0 gives `values`, 1 the statistics of `reference`.
    Returns:
        (B, C, H, W), dtype of `values`, computed in float32.
    Source: AdaIN, Huang and Belongie 2017, equation 8; the blend is that of diffusers' LTXLatentUpsamplePipeline.
    """
    if factor == 0:
        return values
    std, mean = torch.std_mean(values.float(), dim=(2, 3), correction=0, keepdim=True)  # (B, C, 1, 1)
    reference_std, reference_mean = torch.std_mean(reference.float(), dim=(2, 3), correction=0, keepdim=True)
    matched = (values.float() - mean) * (reference_std / std.clamp_min(1e-5)) + reference_mean
    return torch.lerp(values.float(), matched, factor).to(values.dtype)


def decode_to_scale(raw_latents: torch.Tensor, **settings) -> torch.Tensor:
    """
    Decode upscaled raw latents, crop the padding, and downsample to the exact size.

    Args, Raises: as for `decode_strips_to_scale`.
    Returns:
        (B, 3, round(scale * height), round(scale * width)) float32 in [0, 1].
    """
    strips = list(decode_strips_to_scale(raw_latents, **settings))
    return strips[0] if len(strips) == 1 else torch.cat(strips, dim=2)


def decode_strips_to_scale(
    raw_latents: torch.Tensor,
    *,
    codec: LatentCodec,
    size: tuple[int, int],
    num_steps: int,
    scale: float,
    image: torch.Tensor | None = None,
    consistency: float = 0.0,
    progress: Progress | None = None,
) -> Iterator[torch.Tensor]:
    """
    The output of `decode_to_scale` in strips of rows, from top to bottom, to avoid holding all of it in memory.

    No strip stays in memory while the next one is decoded: hence the `del` in the loops on the way.

    Args:
        raw_latents: (B, C, h, w), from `upscale_raw_latents`.
        codec: runs the VAE.
        size: (height, width) in pixels of the image before padding and upscaling.
        num_steps: number of 2x steps of the upscaling.
        scale: scale of the output, at most 2**num_steps.
        image: (B, 3, *size) in [0, 1], the input image; needed for `consistency`.
        consistency: from 0 to 1, see `make_consistent`; applied before downsampling to `scale`.
        progress: advanced after every strip.
    Returns:
        An iterator over (B, 3, rows, round(scale * width)) float32 in [0, 1]: strips if the VAE decodes in strips and
        `scale` is 2**num_steps, else the whole.
    """
    made, wanted = scaled_size(size, 2**num_steps), scaled_size(size, scale)
    strips = _crop_strips(_watched(codec.decode_strips(raw_latents), progress), made)
    if image is not None and num_steps > 0:
        strips = make_consistent(strips, image, 2**num_steps, consistency)
    if made == wanted:
        yield from strips
    else:
        yield _reduce_strips(strips, made[0], wanted)


def make_consistent(
    strips: Iterator[torch.Tensor], image: torch.Tensor, factor: int, strength: float
) -> Iterator[torch.Tensor]:
    """
    Correct an upscaled image y towards its input x: y + strength * up(x - reduce(y)).

    Downsampled, the result equals x to within the error of the interpolation, which restores colour and detail that a
    VAE loses. Both interpolations are bicubic, and `reduce` is antialiased. They reach only four pixels of x to
    each side, so y is processed in strips, with the same result up to float32 rounding.

    Args:
        strips: y, from top to bottom: (B, 3, rows, factor * W) float32 in [0, 1], factor * H rows in total.
        image: x, (B, 3, H, W) float32 in [0, 1].
        factor: size of y relative to x.
        strength: from 0 (no correction) to 1.
    Returns:
        An iterator over (B, 3, rows, factor * W) in [0, 1], factor * H rows in total.
    Source: iterative back-projection, Irani and Peleg 1991; one iteration.
    """
    if strength == 0:
        yield from strips
        return
    height = image.shape[2]
    kept, top, done = None, 0, 0  # rows of y from row factor * top of it on; rows of the image that are done
    for strip in strips:
        pending = strip if kept is None else torch.cat([kept, strip], dim=2)
        del strip  # nothing but `kept` stays in memory while the next strip is decoded
        there = top + pending.shape[2] // factor
        ready = height if there == height else there - CONSISTENCY_REACH
        if ready > done:
            first, last = max(done - CONSISTENCY_REACH, 0), min(ready + CONSISTENCY_REACH, height)
            part = pending[:, :, (first - top) * factor : (last - top) * factor]
            rows = slice((done - first) * factor, (ready - first) * factor)
            yield _correct(part, image[:, :, first:last], rows, strength)
            done = ready
            del part
        keep = max(done - CONSISTENCY_REACH, 0)
        kept, top = pending[:, :, (keep - top) * factor :].clone(), keep
        del pending


def _correct(y: torch.Tensor, x: torch.Tensor, rows: slice, strength: float) -> torch.Tensor:
    """`rows` of y after `make_consistent`."""
    missing = missing_detail(x, y)[:, :, rows]
    return torch.add(y[:, :, rows], missing, alpha=strength, out=missing).clamp_(0, 1)


def _watched(strips: Iterator[torch.Tensor], progress: Progress | None) -> Iterator[torch.Tensor]:
    for strip in strips:
        if progress is not None:
            progress.advance()
        yield strip
        del strip


def _edge(latents: tuple[int, int], spatial_factor: int, tile_size: int | None) -> int:
    """The edge of a tile in latents."""
    return max(latents) if tile_size is None else tile_size // spatial_factor


def _crop_strips(strips: Iterator[torch.Tensor], size: tuple[int, int]) -> Iterator[torch.Tensor]:
    """The first `size` (height, width) pixels of an image."""
    height, width = size
    for strip in strips:
        strip = strip[..., : max(height, 0), :width]
        height -= strip.shape[2]
        if strip.shape[2]:
            yield strip
        del strip


def _reduce_strips(strips: Iterator[torch.Tensor], height: int, size: tuple[int, int]) -> torch.Tensor:
    """`images.resize` of an image of `height`, given as `strips`, with little memory beyond the result."""
    rows = None
    top = 0
    # The interpolation is separable: widths first, strip by strip, then heights, which never grow and so fit in place.
    for strip in strips:
        narrow = interpolate(strip, (strip.shape[2], size[1]))
        rows = narrow.new_empty(*narrow.shape[:2], height, size[1]) if rows is None else rows
        rows[:, :, top : top + strip.shape[2]] = narrow
        top += strip.shape[2]
        del strip, narrow
    assert rows is not None  # there is at least one strip
    for columns in rows.split(256, dim=3):
        columns[:, :, : size[0]] = interpolate(columns, (size[0], columns.shape[3]))
    return rows[:, :, : size[0]].clamp_(0, 1)
