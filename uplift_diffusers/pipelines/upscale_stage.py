"""The upscale stage that the pipelines share: check, complete the guide, upsample, correct the colour, decode."""

from collections.abc import Iterator

import torch
from diffusers import AutoencoderTiny

from uplift_diffusers.images.convert import interpolate
from uplift_diffusers.latent_space import Autoencoder, LatentSpace
from uplift_diffusers.models.local_attention import match_channel_statistics
from uplift_diffusers.models.upsampler import Generator, UPLiFTModel
from uplift_diffusers.scale import num_steps_for_scale, scaled_size
from uplift_diffusers.tiling import upsample_tiled

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

TileSize = int | str | None
AUTO_TILE_SIZE = 512
AUTO_TILE_ABOVE = 768
"""`tile_size="auto"`: tiles of 512 px for images with an edge above 768 px."""


def check_request(*, scale: float, adain_factor: float, output_type: str, tile_size: TileSize) -> int:
    """
    Check what is asked of the stage.

    Returns:
        The number of 2x steps.
    Raises:
        TypeError, ValueError: an argument is not as the pipelines document it.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
    check_fraction("adain_factor", adain_factor)
    check_tile_size(tile_size)
    return num_steps_for_scale(scale, latent_output=output_type == "latent")


def check_tile_size(tile_size: TileSize) -> None:
    """Raise TypeError or ValueError unless `tile_size` is `"auto"`, None or a whole number of at least 64."""
    if tile_size is None or tile_size == "auto":
        return
    if isinstance(tile_size, bool) or not isinstance(tile_size, int):
        raise TypeError(f"`tile_size` must be 'auto', None or a whole number of pixels, got {tile_size!r}.")
    if tile_size < 64:
        raise ValueError(f"`tile_size` must be at least 64 pixels, got {tile_size}. 512 is a good start.")


def resolve_tile_size(tile_size: TileSize, size: tuple[int, int]) -> int | None:
    """The edge of a tile in pixels for an image of `size` (height, width), None for no tiles."""
    if tile_size == "auto":
        return AUTO_TILE_SIZE if max(size) > AUTO_TILE_ABOVE else None
    return tile_size


def check_fraction(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}.")
    if not 0 <= value <= 1:  # False for NaN too
        raise ValueError(f"`{name}` must be from 0 to 1, got {value}.")


def check_generator(generator: Generator, count: int, *, noun: str = "items") -> None:
    """Raise TypeError or ValueError unless `generator` is None, one generator, or a list of `count`."""
    for entry in generator if isinstance(generator, list) else [generator]:
        if not isinstance(entry, torch.Generator) and generator is not None:
            raise TypeError(f"`generator` must be a torch.Generator or a list of them, got {type(entry).__name__}.")
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"`generator` must have one entry for each of the {count} {noun}, got {len(generator)}.")


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


def upscale_raw_latents(
    raw_latents: torch.Tensor,
    *,
    guide: torch.Tensor | None,
    upsampler: UPLiFTModel,
    num_steps: int,
    generator: Generator = None,
    adain_factor: float = 0.0,
    tile_size: TileSize = None,
) -> torch.Tensor:
    """
    Upsample raw latents under the guide's guidance and correct their statistics.

    Args:
        raw_latents: (B, C, h, w) float, unscaled.
        guide: (B, 3, f*h, f*w) float in [0, 1]; not looked at where `num_steps` is 0.
        upsampler: trained for these latents.
        num_steps: number of 2x steps, >= 0.
        generator: one, or one for each item.
        adain_factor: from 0 to 1, see `match_channel_statistics`.
        tile_size: edge of a tile in pixels of the guide, `"auto"` or None; the output does not depend on it.
    Returns:
        (B, C, h * 2**num_steps, w * 2**num_steps), dtype of `upsampler`; `raw_latents` for no steps.
    Raises:
        ValueError: the upsampler's output is not finite.
    """
    if num_steps == 0:
        return raw_latents
    tile_size = resolve_tile_size(tile_size, tuple(guide.shape[2:]))
    latents = raw_latents.to(upsampler.dtype)
    arguments = {"image": guide.to(raw_latents.device), "num_steps": num_steps}
    if tile_size is None:
        # Drawn here, for a compiled upsampler takes no generator.
        noise = list(upsampler.draw_noise(latents, num_steps, generator))
        upsampled = upsampler(latents, **arguments, noise=noise).sample
    else:
        upsampled = upsample_tiled(upsampler, latents, **arguments, generator=generator, tile_size=tile_size)
    if not torch.isfinite(upsampled).all():
        raise ValueError(
            f"`upsampler` must give finite latents, got NaN or infinity in {upsampler.dtype}. "
            "Run it in float32 or bfloat16: upsampler.to(torch.bfloat16)."
        )
    return match_channel_statistics(upsampled, raw_latents, adain_factor)


def decode_to_scale(raw_latents: torch.Tensor, **settings) -> torch.Tensor:
    """
    Decode upscaled raw latents, cut what the image was padded by, and reduce it to its exact size.

    Args, Raises: see `decode_strips_to_scale`.
    Returns:
        (B, 3, round(scale * height), round(scale * width)) float32 in [0, 1].
    """
    strips = list(decode_strips_to_scale(raw_latents, **settings))
    return strips[0] if len(strips) == 1 else torch.cat(strips, dim=2)


def decode_strips_to_scale(
    raw_latents: torch.Tensor,
    *,
    space: LatentSpace,
    vae: Autoencoder,
    size: tuple[int, int],
    num_steps: int,
    scale: float,
    tile_size: TileSize = None,
) -> Iterator[torch.Tensor]:
    """
    The rows of what `decode_to_scale` gives, from top to bottom, so that it need not lie in memory whole.

    Args:
        raw_latents: (B, C, h, w), as `upscale_raw_latents` gives them.
        size: (height, width) in pixels of the image before it was padded and upscaled.
        num_steps: number of 2x steps that were made.
        scale: of the output, at most 2**num_steps.
        tile_size: as for `upscale_raw_latents`; looked at for an AutoencoderLocal, see `LatentSpace.decode`.
    Returns:
        An iterator over (B, 3, rows, round(scale * width)) float32 in [0, 1]: strips where there are tiles and `scale`
        is 2**num_steps, else the whole.
    """
    tile_size = resolve_tile_size(tile_size, size)
    # A decoder is lighter than an upsampler, and larger tiles have less halo.
    decoder_tile_size = None if tile_size is None else 3 * tile_size // 2
    made, wanted = scaled_size(size, 2**num_steps), scaled_size(size, scale)
    strips = _crop_strips(space.decode_strips(vae, raw_latents, tile_size=decoder_tile_size), made)
    if made == wanted:
        yield from strips
    else:
        yield _reduce_strips(strips, made[0], wanted)


def _crop_strips(strips: Iterator[torch.Tensor], size: tuple[int, int]) -> Iterator[torch.Tensor]:
    """The first `size` (height, width) pixels of a picture."""
    height, width = size
    for strip in strips:
        strip = strip[..., : max(height, 0), :width]
        height -= strip.shape[2]
        if strip.shape[2]:
            yield strip


def _reduce_strips(strips: Iterator[torch.Tensor], height: int, size: tuple[int, int]) -> torch.Tensor:
    """`images.resize` of the picture of `height` that is made of `strips`, with little memory beside the result."""
    rows = None
    top = 0
    # The interpolation is separable: widths first, strip by strip, then heights, which never grow and so fit in place.
    for strip in strips:
        narrow = interpolate(strip, (strip.shape[2], size[1]))
        rows = narrow.new_empty(*narrow.shape[:2], height, size[1]) if rows is None else rows
        rows[:, :, top : top + strip.shape[2]] = narrow
        top += strip.shape[2]
    for columns in rows.split(256, dim=3):
        columns[:, :, : size[0]] = interpolate(columns, (size[0], columns.shape[3]))
    return rows[:, :, : size[0]].clamp_(0, 1)
