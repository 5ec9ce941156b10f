"""Coupling Flow Matching: the velocity from noised latents of the enlarged image to those of the large one."""

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import nn

from uplift_diffusers.data.latent_cache import LatentCache
from uplift_diffusers.flow_matching import (
    TIMESTEPS,
    enlarge,
    noise_context,
    point_on_path,
    predict_velocity,
    velocity,
)
from uplift_diffusers.latent_space import Autoencoder, LatentSpace
from uplift_diffusers.training.objective import encode_pyramid, image_pyramid


class FlowMatchingObjective(nn.Module):
    """
    mean((predicted velocity - (x1 - x0))^2) at a time drawn evenly from [0, 1] for every picture.

    Its authors train a network for one factor. To serve several, the factor of a batch is drawn from `depths`; the
    network is not told it, the context shows it.

    Args:
        model: what is trained.
        vae: frozen; makes the context and the target x1.
        space: the VAE's latent space.
        depths: the low-resolution image is 1/2^d of the image, d drawn evenly.
        cache: of that VAE's latents.
    Source: see `uplift_diffusers.flow_matching`.
    """

    def __init__(
        self,
        model: UNet2DModel,
        vae: Autoencoder,
        space: LatentSpace,
        *,
        depths: tuple[int, ...],
        cache: LatentCache | None = None,
    ):
        super().__init__()
        self.model = model
        self.vae = vae.eval().requires_grad_(False)
        self.space = space
        self.depths = depths
        self.cache = cache

    def forward(self, images: torch.Tensor, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """(B, 3, R, R) in [0, 1], R / spatial_factor a multiple of `latent_multiple(model)` -> `loss`."""
        depth = self.depths[int(torch.randint(len(self.depths), (), generator=generator))]
        low = image_pyramid(images, depth)[depth]
        pyramid = [images, enlarge(low, images.shape[2:])]
        target, context = encode_pyramid(self.vae, self.space, pyramid, cache=self.cache)
        target, context = self.space.scale(target), self.space.scale(context)  # (B, C, r, r)

        noise = torch.randn(context.shape, generator=generator).to(context)
        time = torch.rand(len(images), generator=generator).to(context)
        source = noise_context(context, noise)
        predicted = predict_velocity(
            self.model, point_on_path(source, target, time), context, timestep=time * TIMESTEPS
        )
        return {"loss": F.mse_loss(predicted.float(), velocity(source, target))}
