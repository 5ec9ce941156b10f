"""A linear estimate, from the image's pixels, of the latents of an image two, four or eight times as large."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from uplift_diffusers.scale import size_of


class ImageResidual(nn.Module):
    """
    Pixels and the stem's features -> an estimate of the latents after a 2x step.

    With a spatial factor f, a latent after step k covers f / 2**k pixels of the image along each axis. One linear
    convolution per k reads these pixels and one pixel around them. When a latent covers less than one pixel, the
    last convolution reads bilinearly upsampled pixels.

    Args:
        latent_channels: channels of the latents.
        spatial_factor: image pixels per latent position, a power of two of at least 2.
        pixel_channels: channels of the pixels and the stem's features.
    """

    margin_px = 1

    def __init__(self, latent_channels: int, spatial_factor: int, pixel_channels: int):
        super().__init__()
        patches = [2**power for power in range(spatial_factor.bit_length() - 1)]
        self.convs = nn.ModuleDict(
            {
                f"{patch}px": nn.Conv2d(
                    pixel_channels,
                    latent_channels,
                    patch + 2 * self.margin_px,
                    stride=patch,
                    padding=self.margin_px,
                    padding_mode="replicate",
                )
                for patch in reversed(patches)
            }
        )

    def forward(self, pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(B, pixel_channels, H, W) -> (B, C, *size), the estimate on a grid of the size of a step's output."""
        # In full precision under autocast too, because the image's brightness passes through here.
        with torch.autocast(pixels.device.type, enabled=False):
            pixels, conv = self._reading(pixels, size)
            return conv(pixels.to(conv.weight.dtype))

    def _reading(self, pixels: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, nn.Conv2d]:
        """The convolution for outputs of `size`, and its input."""
        if size[0] > pixels.shape[2]:
            pixels = F.interpolate(pixels, size=size, mode="bilinear")
        conv: Any = self.convs[f"{pixels.shape[2] // size[0]}px"]
        return pixels, conv

    @torch.no_grad()
    def fit(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """
        Set the convolution of one step to the least-squares solution.

        Args:
            pairs: (pixels, latents): (B, pixel_channels, H, W), and (B, C, h, w) of that image at the step's size.
        """
        rows = cross = torch.zeros(())
        for pixels, latents in pairs:
            pixels, conv = self._reading(pixels, size_of(latents))
            padded = F.pad(pixels, (self.margin_px,) * 4, mode="replicate")
            # In double precision, which not every accelerator supports.
            features = F.unfold(padded.cpu().double(), conv.kernel_size, stride=conv.stride)
            features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1).transpose(1, 2).flatten(0, 1)
            rows = rows + features.T @ features
            cross = cross + features.T @ latents.cpu().double().flatten(2).transpose(1, 2).flatten(0, 1)
        # A small ridge term: in flat images, neighbouring pixels are collinear.
        ridge = 1e-5 * rows.diagonal().mean() * torch.eye(len(rows), dtype=rows.dtype)
        solution = torch.linalg.solve(rows + ridge, cross).float()  # (patch + 1, C)
        conv.load_state_dict({"weight": solution[:-1].T.reshape(conv.weight.shape), "bias": solution[-1]})
