"""FeatUp's stack of joint bilateral upsamplers, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn

from uplift_diffusers.evaluation.predictive.peers.interface import ChannelNorm, FeatureUpsampler, doublings, resize
from uplift_diffusers.scale import size_of

RADIUS = 3
DIAMETER = 2 * RADIUS + 1
LEVELS = 4


class FeatUp(FeatureUpsampler):
    """
    Four joint bilateral 2x levels with separate weights, and a small correction of the result.

    The published network always runs all four. Here only as many levels run as the requested size needs, so the
    result after each level can be examined; 16x is as published.

    Args:
        channels: C, the channels of the features.
        layer_norm: normalise the features first. Weights without it were published, too.
    Source: Fu et al. 2024, "FeatUp: A Model-Agnostic Framework for Features at Any Resolution", section 3.2. The
        corrections of kernel and result are those of the published code.
    """

    def __init__(self, channels: int = 384, *, layer_norm: bool = True):
        super().__init__()
        # The names of the published checkpoints, in which `model.0` is the backbone.
        self.model = nn.ModuleDict({"1": ChannelNorm(channels)} if layer_norm else {})
        self.upsampler = _Stack(channels)

    def forward(self, features: torch.Tensor, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        levels = min(doublings(size_of(features), size), LEVELS)
        for norm in self.model.values():
            features = norm(features)
        return resize(self.upsampler(features, image, levels), size)


class _Stack(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.up1, self.up2, self.up3, self.up4 = (JointBilateralUpsampler() for _ in range(LEVELS))
        self.fixup_proj = nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(channels, channels, 1))

    def forward(self, features: torch.Tensor, image: torch.Tensor, levels: int) -> torch.Tensor:
        for level in (self.up1, self.up2, self.up3, self.up4)[:levels]:
            height, width = features.shape[2:]
            features = level(features, F.adaptive_avg_pool2d(image, (2 * height, 2 * width)))
        return features + 0.1 * self.fixup_proj(features)


class JointBilateralUpsampler(nn.Module):
    """
    One 2x level: bicubic, then a 7x7 kernel per position, the same for all channels.

    The kernel is a softmax over learned similarities of the guide times a Gaussian of the distance, normalised, and
    corrected by a small network, after which it does not have to sum to one.
    """

    def __init__(self, key_channels: int = 32):
        super().__init__()
        count = DIAMETER**2
        self.range_temp = nn.Parameter(torch.tensor(0.0))
        self.sigma_spatial = nn.Parameter(torch.tensor(1.0))
        self.range_proj = _two_convs(3, key_channels)
        self.fixup_proj = _two_convs(count + 3, count)

    def forward(self, features: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) and (B, 3, 2h, 2w) -> (B, C, 2h, 2w)."""
        kernel = self.range_kernel(guide) * self.spatial_kernel()
        kernel = kernel / kernel.sum(dim=1, keepdim=True).clamp_min(1e-7)
        kernel = kernel + 0.1 * self.fixup_proj(torch.cat([kernel, guide], dim=1))
        magnified = F.interpolate(features, size=guide.shape[2:], mode="bicubic")
        result = torch.zeros_like(magnified)
        for index, neighbour in enumerate(_neighbours(magnified)):
            result = result.addcmul_(kernel[:, index : index + 1], neighbour)
        return result

    def range_kernel(self, guide: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 49, H, W), sums to one."""
        keys = self.range_proj(guide)  # (B, 32, H, W)
        similarities = [(neighbour * keys).sum(dim=1) for neighbour in _neighbours(keys)]
        temperature = self.range_temp.exp().clamp(1e-4, 1e4)
        return (temperature * torch.stack(similarities, dim=1)).softmax(dim=1)

    def spatial_kernel(self) -> torch.Tensor:
        """(49, 1, 1), of distances that are 1 at the middle of the kernel's sides."""
        distance = torch.linspace(-1, 1, DIAMETER, device=self.sigma_spatial.device, dtype=self.sigma_spatial.dtype)
        squares = (distance[:, None] ** 2 + distance**2).view(-1, 1, 1)
        return torch.exp(-squares / (2 * self.sigma_spatial**2))


def _neighbours(x: torch.Tensor) -> list[torch.Tensor]:
    """Views of (B, C, H, W) shifted to each of the 49 places, row by row; the border is reflected."""
    height, width = x.shape[2:]
    padded = F.pad(x, (RADIUS,) * 4, mode="reflect")
    shifts = [(dy, dx) for dy in range(DIAMETER) for dx in range(DIAMETER)]
    return [padded[..., dy : dy + height, dx : dx + width] for dy, dx in shifts]


def _two_convs(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.GELU(), nn.Dropout2d(0.1), nn.Conv2d(outputs, outputs, 1))
