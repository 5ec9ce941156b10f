"""What the image alone says, linearly, of the latents of an image twice as large."""

import torch
import torch.nn.functional as F
from torch import nn

from uplift_diffusers.models.window import Window

BICUBIC_REACH_PX = 2
"""Pixels to each side that a bicubic enlargement reads."""


class ImageResidual(nn.Module):
    """
    Image -> an estimate of the latents after a 2x step, by one linear convolution over patches.

    A latent after the step stands for `spatial_factor / 2` pixels of the step's input image on each side; the
    convolution reads those and as many around them. The image is enlarged to the size of the step's input by bicubic
    interpolation first: the one trained convolution serves every step.

    Args:
        latent_channels: channels of the latents.
        spatial_factor: image pixels per latent position, an even number.
    """

    reach = 1
    """Positions to each side that an output depends on."""

    def __init__(self, latent_channels: int, spatial_factor: int):
        super().__init__()
        self.patch_size = spatial_factor // 2
        self.conv = nn.Conv2d(3 * self.patch_size**2, latent_channels, 2 * self.reach + 1)

    def forward(self, image: torch.Tensor, step: int, target: Window) -> torch.Tensor:
        """
        (B, 3, H, W) in [0, 1], the whole picture -> (B, C, h, w), the estimate on `target` of the step's output grid.

        `step` counts from 0. Beyond its border the picture goes on as its outermost pixels.
        """
        # In full precision under autocast too: the brightness of the picture goes through here.
        with torch.autocast(image.device.type, enabled=False):
            return F.conv2d(self.patches(image, step, target), self.conv.weight, self.conv.bias)

    def patches(self, image: torch.Tensor, step: int, target: Window) -> torch.Tensor:
        """What the convolution reads: (B, 3 * patch_size**2, h + 2, w + 2), of values in [-1, 1]."""
        magnification = 2**step
        seen = target.grow(self.reach)
        seen_px = seen.finer(self.patch_size)
        cells = seen_px.cover(magnification)
        if magnification > 1:
            cells = cells.grow(BICUBIC_REACH_PX)
        image = Window.whole(tuple(image.shape[2:])).crop(image, cells).to(self.conv.weight) * 2 - 1
        if magnification > 1:
            image = F.interpolate(image, scale_factor=magnification, mode="bicubic")
        image = cells.finer(magnification).crop(image, seen_px)
        top, bottom, left, right = (self.patch_size * (self.reach - margin) for margin in seen.margins(target))
        image = F.pad(image, (left, right, top, bottom), mode="replicate")
        return F.pixel_unshuffle(image, self.patch_size)

    @torch.no_grad()
    def fit(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """
        Set the convolution to the least-squares solution.

        Args:
            pairs: (image, latents): (B, 3, H, W) in [0, 1], and (B, C, h, w) of that image at twice the size.
        """
        rows = cross = 0
        for image, latents in pairs:
            patches = self.patches(image, 0, Window.whole(tuple(latents.shape[2:])))
            # In double precision, which not every accelerator has.
            features = F.unfold(patches.cpu().double(), 2 * self.reach + 1)
            features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1).transpose(1, 2).flatten(0, 1)
            rows = rows + features.T @ features
            cross = cross + features.T @ latents.cpu().double().flatten(2).transpose(1, 2).flatten(0, 1)
        # A trace of ridge: in flat pictures neighbouring pixels say the same.
        ridge = 1e-5 * rows.diagonal().mean() * torch.eye(len(rows), dtype=rows.dtype)
        solution = torch.linalg.solve(rows + ridge, cross).float()  # (patches + 1, C)
        self.conv.weight.copy_(solution[:-1].T.reshape(self.conv.weight.shape))
        self.conv.bias.copy_(solution[-1])
