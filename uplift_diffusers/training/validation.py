"""Measuring an upsampler while it trains: its latents and pictures, beside latents interpolated bilinearly."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from uplift_diffusers.data.photographs import Crop, Photographs
from uplift_diffusers.data.sources import FolderSource
from uplift_diffusers.latent_space import Autoencoder, LatentSpace
from uplift_diffusers.training.logs import Validation
from uplift_diffusers.training.objective import encode_pyramid, image_pyramid, psnr_from_mse

DEPTHS = (1, 2)
RESOLUTION = 256
BATCH = 4
PICTURES = 4
"""Rows of the picture."""


class UpsamplerValidation:
    """
    What an upsampler makes of one crop of 256 px of every photograph below a folder, reduced two and four times.

    For both scales: `val_psnr`, of the decoded result against the crop, in dB; `val_latent_mse`, of the result
    against the crop's latents; and `val_latent_mse_bilinear`, of bilinear interpolation, which training has to beat.
    The picture has a row for each of the first photographs: input, bilinear, prediction and target, all decoded at
    four times the input.

    Args:
        upsample: (image, depth, generator) -> raw latents, see `uplift_diffusers.training.methods.Method`.
        vae: makes and decodes the latents.
        space: the VAE's latent space.
        folder: searched recursively.
    """

    def __init__(
        self,
        upsample: Callable[[torch.Tensor, int, torch.Generator], torch.Tensor],
        vae: Autoencoder,
        space: LatentSpace,
        folder: str | Path,
    ):
        photographs = Photographs(FolderSource(folder), Crop(resolution=RESOLUTION))
        images = torch.stack([photographs[0, index] for index in range(len(photographs))])  # uint8
        self.upsample, self.vae, self.space = upsample, vae, space
        self.batches = []  # (pyramid, raw latents of its levels): they stay the same
        for part in images.split(BATCH):
            pyramid = image_pyramid(part.to(vae.device).float() / 255, max(DEPTHS))
            self.batches.append((pyramid, encode_pyramid(vae, space, pyramid)))
        self.num_photographs = len(images)

    @torch.no_grad()
    def __call__(self) -> Validation:
        """Measure the weights that the model has now; the noise is the same every time."""
        generator = torch.Generator().manual_seed(0)
        sums: dict[str, float] = {}
        rows = []
        for pyramid, latents in self.batches:
            for depth in DEPTHS:
                target, bilinear = latents[0], interpolate_latents(latents[depth], 2**depth)
                predicted = self.upsample(pyramid[depth], depth, generator).float()
                decoded = self.space.decode(self.vae, predicted)
                for name, values in (
                    ("val_psnr", psnr_from_mse(_mse(decoded, pyramid[0]))),
                    ("val_latent_mse", _mse(predicted, target)),
                    ("val_latent_mse_bilinear", _mse(bilinear, target)),
                ):
                    key = f"{name}_{2**depth}x"
                    sums[key] = sums.get(key, 0.0) + values.sum().item()
            if len(rows) < PICTURES:
                low = F.interpolate(pyramid[depth], scale_factor=2**depth, mode="nearest")
                columns = (low, self.space.decode(self.vae, bilinear), decoded, self.space.decode(self.vae, target))
                rows += torch.cat(columns, dim=3)  # (3, 256, 4 * 256) each
        picture = torch.cat(rows[:PICTURES], dim=1).mul(255).round().byte().permute(1, 2, 0).cpu()
        figures = {name: total / self.num_photographs for name, total in sums.items()}
        return Validation(figures, {"input-bilinear-prediction-target": Image.fromarray(picture.numpy())})


def interpolate_latents(raw_latents: torch.Tensor, factor: int) -> torch.Tensor:
    """(B, C, h, w) -> (B, C, factor * h, factor * w), bilinear."""
    return F.interpolate(raw_latents, scale_factor=factor, mode="bilinear")


def _mse(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """(B,), of each item."""
    return (actual - expected).square().mean(dim=(1, 2, 3))
