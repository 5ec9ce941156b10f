"""Multi-depth self-supervised reconstruction: every 2x step against the latents of the image at that size."""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from uplift_diffusers.data.latent_cache import LatentCache
from uplift_diffusers.latent_space import Autoencoder, LatentSpace
from uplift_diffusers.models.upsampler import UPLiFTModel

JPEG_QUALITIES = (40, 95)
"""Pillow's quality of compressed starting images: what is found on the web, from poor to hardly visible."""


class MultiDepthObjective(nn.Module):
    """
    The sum over depths d and steps k of mean((step_k - latents of the image at that size)^2).

    For every depth d the model starts from the latents and the image at 1/2^d of the resolution and applies d steps.
    With `pixel_weight`, the last step of one depth, drawn anew each time, is decoded too and compared with the image
    (L1 on [0, 1]).

    Args:
        model: what is trained.
        vae: frozen; its latents are the targets.
        space: the VAE's latent space.
        depths: see above.
        latent_noise: standard deviation of the noise added to the starting latents, raw units. Targets stay clean.
        pixel_weight: weight of the loss in decoded pixels, for a VAE that is cheap to decode.
        jpeg_probability: share of the starting images that are compressed, so that the model learns to take the
            traces of it away. Targets stay clean.
        cache: of that VAE's latents.
    Source: Walmer et al. 2026, section 3.3, equations for L_simple and L_d.
    """

    def __init__(
        self,
        model: UPLiFTModel,
        vae: Autoencoder,
        space: LatentSpace,
        *,
        depths: tuple[int, ...],
        latent_noise: float,
        pixel_weight: float = 0.0,
        jpeg_probability: float = 0.0,
        cache: LatentCache | None = None,
    ):
        super().__init__()
        self.model = model
        self.vae = vae.eval().requires_grad_(False)
        self.space = space
        self.depths = depths
        self.latent_noise = latent_noise
        self.pixel_weight = pixel_weight
        self.jpeg_probability = jpeg_probability
        self.cache = cache

    def forward(self, images: torch.Tensor, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """
        (B, 3, R, R) in [0, 1], R a multiple of spatial_factor * 2^max(depths) -> `loss` and its parts.

        `loss_d<d>` are the latent terms of each depth, `pixel` the L1 in decoded pixels.
        """
        pyramid = image_pyramid(images, max(self.depths))
        targets = encode_pyramid(self.vae, self.space, pyramid, cache=self.cache)

        drawn = int(torch.randint(len(self.depths), (), generator=generator))
        decoded_depth = self.depths[drawn] if self.pixel_weight else None
        losses = {}
        for depth in self.depths:
            image, start = pyramid[depth], targets[depth]
            if self.jpeg_probability:
                image = jpeg_compressed(image, probability=self.jpeg_probability, generator=generator)
                start = encode_pyramid(self.vae, self.space, [image])[0]
            noise = torch.randn(start.shape, generator=generator).to(start)
            start = start + self.latent_noise * noise
            steps = self.model(start, image=image, num_steps=depth, generator=generator, return_steps=True).steps
            losses[f"loss_d{depth}"] = sum(
                F.mse_loss(step.float(), targets[depth - 1 - index]) for index, step in enumerate(steps)
            )
            if depth == decoded_depth:
                # Not clamped: a gradient must flow back from values beyond the range.
                decoded = self.vae.decode(self.space.native(self.vae, steps[-1])).sample.float() / 2 + 0.5
                losses["pixel"] = F.l1_loss(decoded, images)
        losses["loss"] = sum(value * (self.pixel_weight if name == "pixel" else 1.0) for name, value in losses.items())
        return losses


def encode_pyramid(
    vae: Autoencoder, space: LatentSpace, pyramid: list[torch.Tensor], *, cache: LatentCache | None = None
) -> list[torch.Tensor]:
    """The raw latents, float32 and without a gradient, of every level (B, 3, H, W) in [0, 1]."""
    # In float32 whatever autocast the model runs in: rounded targets are wrong targets.
    with torch.no_grad(), torch.autocast(pyramid[0].device.type, enabled=False):
        return [(space.encode(vae, level) if cache is None else cache.encode(level)).float() for level in pyramid]


def psnr_from_mse(mse: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB from a mean squared error over values in [0, 1]."""
    return -10 * torch.log10(mse.clamp_min(1e-10))


def image_pyramid(images: torch.Tensor, depth: int) -> list[torch.Tensor]:
    """(B, 3, R, R) and its reductions by 2, 4, ..., 2**depth: antialiased bicubic, rounded to 8 bits."""
    pyramid = [images]
    for level in range(1, depth + 1):
        size = images.shape[-1] // 2**level
        reduced = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)
        pyramid.append((reduced * 255).round().clamp(0, 255) / 255)
    return pyramid


def jpeg_compressed(images: torch.Tensor, *, probability: float, generator: torch.Generator) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1], each with `probability` as a JPEG of one of `JPEG_QUALITIES` shows it, drawn evenly."""
    draws = torch.rand(len(images), generator=generator)
    low, high = JPEG_QUALITIES
    qualities = torch.randint(low, high + 1, (len(images),), generator=generator)
    result = images.clone()
    for index in (draws < probability).nonzero().flatten().tolist():
        result[index] = through_jpeg(images[index], quality=int(qualities[index]))
    return result


def through_jpeg(image: torch.Tensor, *, quality: int) -> torch.Tensor:
    """(3, H, W) in [0, 1] -> the same as Pillow reads it back from a JPEG."""
    file = io.BytesIO()
    pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as compressed:
        return torch.from_numpy(np.array(compressed)).permute(2, 0, 1).to(image) / 255
