"""Images at every size of a training step, and their latents."""

import torch
import torch.nn.functional as F

from uplift_diffusers.data.latent_cache import LatentCache
from uplift_diffusers.latent_space import LatentCodec


def image_pyramid(images: torch.Tensor, depth: int) -> list[torch.Tensor]:
    """(B, 3, R, R) and its reductions by 2, 4, ..., 2**depth: antialiased bicubic, rounded to 8 bits."""
    pyramid = [images]
    for level in range(1, depth + 1):
        size = images.shape[-1] // 2**level
        reduced = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)
        pyramid.append((reduced * 255).round().clamp(0, 255) / 255)
    return pyramid


def encode_pyramid(
    codec: LatentCodec, pyramid: list[torch.Tensor], *, cache: LatentCache | None = None
) -> list[torch.Tensor]:
    """The raw latents, float32 and without a gradient, of every level (B, 3, H, W) in [0, 1]."""
    encode = codec.encode if cache is None else cache.encode
    # In float32 even if the model runs in autocast, to keep the targets exact.
    with torch.no_grad(), torch.autocast(pyramid[0].device.type, enabled=False):
        return [encode(level).float() for level in pyramid]
