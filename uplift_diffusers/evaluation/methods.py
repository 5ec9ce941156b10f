"""Upscaling methods behind one interface, so that whatever is compared sees the same pixels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from uplift_diffusers.images import resize
from uplift_diffusers.latent_space import Autoencoder, LatentSpace

Method = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(low, high) -> enlarged: (1, 3, h, w) and (1, 3, H, W) in [0, 1] to (1, 3, H, W). Only `vae` may look at `high`."""


def bicubic(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Bicubic interpolation of the pixels."""
    return resize(low, tuple(high.shape[2:]))


def latent_bilinear(vae: Autoencoder, space: LatentSpace) -> Method:
    """Bilinear interpolation of the low-resolution image's latents, decoded: what an upsampler has to beat."""

    def upscale(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        size = tuple(length // space.spatial_factor for length in high.shape[2:])
        return space.decode(vae, F.interpolate(space.encode(vae, low).float(), size=size, mode="bilinear"))

    return upscale


def vae_round_trip(vae: Autoencoder, space: LatentSpace) -> Method:
    """The high-resolution image itself, encoded and decoded: the ceiling of everything that goes through the VAE."""

    def upscale(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return space.decode(vae, space.encode(vae, high))

    return upscale


def super_resolution(pipeline, *, seed: int) -> Method:
    """A super-resolution pipeline; every image is made with a generator seeded by `seed`."""

    def upscale(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        scale = high.shape[2] / low.shape[2]
        return pipeline(image=low, scale=scale, generator=torch.Generator().manual_seed(seed), output_type="pt").images

    return upscale
