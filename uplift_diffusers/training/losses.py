"""Multi-depth self-supervised reconstruction: every 2x step against the latents of the image at that size."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from uplift_diffusers.data.degradation import degrade
from uplift_diffusers.data.latent_cache import LatentCache
from uplift_diffusers.data.pyramid import encode_pyramid, image_pyramid
from uplift_diffusers.images.compression import consistency_for_denoise
from uplift_diffusers.images.convert import missing_detail
from uplift_diffusers.latent_space import Autoencoder, LatentCodec, LatentSpace
from uplift_diffusers.models.upsampler import UPLiFTModel


def psnr_from_mse(mse: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB from a mean squared error over values in [0, 1]."""
    return -10 * torch.log10(mse.clamp_min(1e-10))


def negative_psnr(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    The negative PSNR in dB of (B, 3, H, W) in [0, 1], a mean over images.

    It levels off at 40 dB, so that skies and blurred backgrounds do not outweigh everything else.
    """
    mse = (predicted - target).square().mean(dim=(1, 2, 3))
    return -psnr_from_mse(mse + 1e-4).mean()


PIXEL_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "l1": F.l1_loss,
    "psnr": negative_psnr,
}


class MultiDepthObjective(nn.Module):
    """
    The sum over depths d and steps k of mean((step_k - latents of the image at that size)^2).

    For every depth d the model starts from the latents and the image at 1/2^d of the resolution and takes d steps.
    With `pixel_weight`, the last step of one random depth is also decoded and compared with the image, by default
    after the consistency step of the super-resolution pipeline. With degraded inputs, the model learns to restore
    them, because the targets stay clean.

    Args:
        model: the trained model.
        vae: frozen; its latents are the targets.
        space: the VAE's latent space.
        depths: the depths d, each at least 1.
        latent_noise: standard deviation of the noise added to the starting latents, in raw units.
        pixel_weight: weight of the loss in decoded pixels, for a VAE that is cheap to decode.
        pixel_loss: "l1", the mean absolute difference on [0, 1], or "psnr", the negative PSNR in dB.
        consistent_pixels: compute that loss after the consistency step, which restores the brightness and colours that
            the latents lack; without it, the latents have to contain them.
        degraded_probability: share of the input images that are degraded with `degrade`.
        cache: stored latents of that VAE.
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
        pixel_loss: str = "l1",
        consistent_pixels: bool = True,
        degraded_probability: float = 0.0,
        cache: LatentCache | None = None,
    ):
        super().__init__()
        self.model = model
        self.vae = vae.eval().requires_grad_(False)
        self.codec = LatentCodec(self.vae, space)
        self.depths = depths
        self.latent_noise = latent_noise
        self.pixel_weight = pixel_weight
        self.pixel_loss = PIXEL_LOSSES[pixel_loss]
        self.consistent_pixels = consistent_pixels
        self.degraded_probability = degraded_probability
        self.cache = cache

    def forward(self, images: torch.Tensor, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """
        Compute the losses of a batch.

        Args:
            images: (B, 3, R, R) in [0, 1], R a multiple of spatial_factor * 2^max(depths).
            generator: source of all randomness.
        Returns:
            `loss`, and its parts: `loss_d<d>`, the latent terms of each depth, and `pixel`, the one in decoded pixels.
        """
        pyramid = image_pyramid(images, max(self.depths))
        targets = encode_pyramid(self.codec, pyramid, cache=self.cache)

        drawn = int(torch.randint(len(self.depths), (), generator=generator))
        decoded_depth = self.depths[drawn] if self.pixel_weight else None
        losses = {}
        for depth in self.depths:
            image, start, denoise = self._start(pyramid[depth], targets[depth], generator)
            noise = torch.randn(start.shape, generator=generator).to(start)
            steps = self.model(
                start + self.latent_noise * noise,
                image=image,
                num_steps=depth,
                denoise=denoise,
                generator=generator,
                return_steps=True,
            ).steps
            assert steps is not None  # they are asked for
            of_steps = [F.mse_loss(step.float(), targets[depth - 1 - index]) for index, step in enumerate(steps)]
            losses[f"loss_d{depth}"] = sum(of_steps, start=torch.zeros(()))
            if depth == decoded_depth:
                # Not clamped: a gradient must flow back from values beyond the range.
                decoded = self.codec.decode_sample(steps[-1]).float() / 2 + 0.5
                if self.consistent_pixels:
                    consistency = denoise.new_tensor([consistency_for_denoise(d) for d in denoise.tolist()])
                    decoded = decoded + consistency[:, None, None, None] * missing_detail(image, decoded)
                losses["pixel"] = self.pixel_loss(decoded, images)
        weighted = [value * (self.pixel_weight if name == "pixel" else 1.0) for name, value in losses.items()]
        losses["loss"] = sum(weighted, start=torch.zeros(()))
        return losses

    def _start(
        self, image: torch.Tensor, latents: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The input image (B, 3, r, r) of a depth, its latents, and (B,) the strength of its degradation."""
        if not self.degraded_probability:
            return image, latents, image.new_zeros(len(image))
        image, denoise = degrade(image, probability=self.degraded_probability, generator=generator)
        degraded = denoise > 0
        if degraded.any():
            latents = latents.clone()
            latents[degraded] = encode_pyramid(self.codec, [image[degraded]])[0]
        return image, latents, denoise
