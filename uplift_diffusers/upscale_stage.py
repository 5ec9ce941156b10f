"""The upscale stage that the pipelines share: check, complete the guide, upsample, correct the colour, decode."""

import torch
from diffusers import AutoencoderTiny

from uplift_diffusers.functional import match_channel_statistics
from uplift_diffusers.images import resize
from uplift_diffusers.latent_space import Autoencoder, LatentSpace
from uplift_diffusers.models.uplift import Generator, UPLiFTModel
from uplift_diffusers.scale import num_steps_for_scale, scaled_size

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_request(*, scale: float, adain_factor: float, output_type: str) -> int:
    """
    Check what is asked of the stage.

    Returns:
        The number of 2x steps.
    Raises:
        TypeError, ValueError: `scale`, `adain_factor` or `output_type` is not as the pipelines document it.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
    check_fraction("adain_factor", adain_factor)
    return num_steps_for_scale(scale, latent_output=output_type == "latent")


def check_fraction(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}.")
    if not 0 <= value <= 1:  # False for NaN too
        raise ValueError(f"`{name}` must be from 0 to 1, got {value}.")


def check_generator(generator: Generator, count: int, *, noun: str = "items") -> None:
    """Raise TypeError or ValueError unless `generator` is None, one generator, or a list of `count`."""
    for entry in generator if isinstance(generator, list) else [generator]:
        if entry is not None and not isinstance(entry, torch.Generator):
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
    Returns:
        (B, C, h * 2**num_steps, w * 2**num_steps), dtype of `upsampler`; `raw_latents` for no steps.
    Raises:
        ValueError: the upsampler's output is not finite.
    """
    if num_steps == 0:
        return raw_latents
    upsampled = upsampler(
        raw_latents.to(upsampler.dtype), image=guide.to(raw_latents.device), num_steps=num_steps, generator=generator
    ).sample
    if not torch.isfinite(upsampled).all():
        raise ValueError(
            f"`upsampler` must give finite latents, got NaN or infinity in {upsampler.dtype}. "
            "Run it in float32 or bfloat16: upsampler.to(torch.bfloat16)."
        )
    return match_channel_statistics(upsampled, raw_latents, adain_factor)


def decode_to_scale(
    raw_latents: torch.Tensor,
    *,
    space: LatentSpace,
    vae: Autoencoder,
    size: tuple[int, int],
    num_steps: int,
    scale: float,
) -> torch.Tensor:
    """
    Decode upscaled raw latents, cut what the image was padded by, and reduce it to its exact size.

    Args:
        size: (height, width) in pixels of the image before it was padded and upscaled.
        num_steps: number of 2x steps that were made.
    Returns:
        (B, 3, round(scale * height), round(scale * width)) float32 in [0, 1].
    """
    image = space.decode(vae, raw_latents)  # (B, 3, 2**n * f*h, 2**n * f*w)
    image = image[..., : size[0] * 2**num_steps, : size[1] * 2**num_steps]
    return resize(image, scaled_size(size, scale))
