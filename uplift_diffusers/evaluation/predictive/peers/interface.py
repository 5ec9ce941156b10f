"""The common interface of feature upsamplers, and shared parts."""

import torch
import torch.nn.functional as F
from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FeatureUpsampler(nn.Module):
    """
    Upsamples the features of a frozen backbone to any size, guided by the image.

    A subclass implements `forward(features, image, size)` on the normalised image, as its paper describes it.
    """

    def upsample(self, features: torch.Tensor, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """
        Args:
            features: (B, C, h, w) float, the tokens returned by the backbone.
            image: (B, 3, H, W) float in [0, 1], the backbone's input.
            size: (height, width) of the result, at least (h, w).
        Returns:
            (B, C, *size), dtype and device of `features`.
        Raises:
            ValueError: rank, channels, batch or size do not fit.
        """
        if features.ndim != 4:
            raise ValueError(f"`features` must be (B, C, h, w), got {tuple(features.shape)}.")
        if image.ndim != 4 or image.shape[1] != 3 or len(image) != len(features):
            raise ValueError(f"`image` must be ({len(features)}, 3, H, W), got {tuple(image.shape)}.")
        if size[0] < features.shape[2] or size[1] < features.shape[3]:
            raise ValueError(f"`size` must be at least {tuple(features.shape[2:])}, the tokens', got {tuple(size)}.")
        return self(features, self.normalize(image.to(features)), tuple(size))

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        """Normalise with ImageNet's mean and standard deviation, for all backbones, as in all published upsamplers."""
        mean, std = image.new_tensor(IMAGENET_MEAN), image.new_tensor(IMAGENET_STD)
        return (image - mean[:, None, None]) / std[:, None, None]


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize bilinearly, antialiased when downsampling; returns the same tensor if the size is already right."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    # In float32: on a CPU there is no antialiasing in half precision.
    return F.interpolate(x.float(), size=size, mode="bilinear", antialias=True).to(x.dtype)


def doublings(tokens: tuple[int, int], size: tuple[int, int]) -> int:
    """The number of 2x steps from `tokens` to at least `size`."""
    steps = 0
    while tokens[0] << steps < size[0] or tokens[1] << steps < size[1]:
        steps += 1
    return steps


def split_queries(count: int, chunk: int | None) -> list[slice]:
    """Slices of `chunk` queries each; one slice for None."""
    chunk = chunk or count
    return [slice(start, start + chunk) for start in range(0, count, chunk)]
