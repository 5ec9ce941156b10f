"""What the image alone says, linearly, of the latents of an image twice as large."""

import torch
import torch.nn.functional as F
from torch import nn


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

    def __init__(self, latent_channels: int, spatial_factor: int):
        super().__init__()
        self.patch_size = spatial_factor // 2
        self.conv = nn.Conv2d(3 * self.patch_size**2, latent_channels, 3)

    def forward(self, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C, *size), the estimate on the grid of the step's output."""
        # In full precision under autocast too: the brightness of the picture goes through here.
        with torch.autocast(image.device.type, enabled=False):
            return self.conv(self.patches(image, size))

    def patches(self, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """What the convolution reads: (B, 3 * patch_size**2, h + 2, w + 2) for `size` (h, w), values in [-1, 1]."""
        image = image.to(self.conv.weight.dtype) * 2 - 1
        magnification = size[0] * self.patch_size // image.shape[2]
        if magnification > 1:
            image = F.interpolate(image, scale_factor=magnification, mode="bicubic")
        # Beyond its border the picture goes on as its outermost pixels.
        image = F.pad(image, (self.patch_size,) * 4, mode="replicate")
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
            # In double precision, which not every accelerator has.
            features = F.unfold(self.patches(image, tuple(latents.shape[2:])).cpu().double(), 3)
            features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1).transpose(1, 2).flatten(0, 1)
            rows = rows + features.T @ features
            cross = cross + features.T @ latents.cpu().double().flatten(2).transpose(1, 2).flatten(0, 1)
        # A trace of ridge: in flat pictures neighbouring pixels say the same.
        ridge = 1e-5 * rows.diagonal().mean() * torch.eye(len(rows), dtype=rows.dtype)
        solution = torch.linalg.solve(rows + ridge, cross).float()  # (patches + 1, C)
        self.conv.weight.copy_(solution[:-1].T.reshape(self.conv.weight.shape))
        self.conv.bias.copy_(solution[-1])
