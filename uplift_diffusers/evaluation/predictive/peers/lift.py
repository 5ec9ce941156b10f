"""LiFT: a small U-Net that doubles the resolution, applied repeatedly."""

import torch
import torch.nn.functional as F
from torch import nn

from uplift_diffusers.evaluation.predictive.peers.interface import FeatureUpsampler, doublings, resize
from uplift_diffusers.scale import size_of


class LiFT(FeatureUpsampler):
    """
    One learned 2x step. It is trained for a single step; several steps are an extrapolation, with the image upsampled
    bilinearly and encoded again before each.

    The guide is pooled adaptively to twice the tokens' resolution: for patch size 16 this is the original's 2x2
    max-pooling, for 8 the identity, for 14 as in LoftUp's repository.

    Args:
        channels: C, the channels of the features.
        guide_channels: channels of the image's encoding.
    Source: Suri et al. 2024, "LiFT: A Surprisingly Simple Lightweight Feature Transform for Dense ViT Descriptors".
    """

    def __init__(self, channels: int = 384, guide_channels: int = 32):
        super().__init__()
        self.image_convs_1 = nn.Sequential(
            *_strided_conv(3, guide_channels),
            *_strided_conv(guide_channels, guide_channels),
        )
        self.image_convs_2 = nn.Sequential(*_strided_conv(guide_channels, guide_channels))
        self.up1 = _Up(channels, guide_channels)
        self.outc = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, features: torch.Tensor, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        for step in range(doublings(size_of(features), size)):
            if step:
                image = F.interpolate(image, scale_factor=2, mode="bilinear")
            features = self.step(features, image)
        return resize(features, size)

    def step(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) and the normalised image -> (B, C, 2h, 2w)."""
        height, width = features.shape[2:]
        quarter = self.image_convs_1(image)
        half_guide = F.adaptive_max_pool2d(quarter, (2 * height, 2 * width))
        full_guide = self.image_convs_2(half_guide)  # (B, G, h, w)
        return self.outc(self.up1(torch.cat([features, full_guide], dim=1), half_guide))


class _Up(nn.Module):
    def __init__(self, channels: int, guide_channels: int):
        super().__init__()
        width = (channels + guide_channels) // 2
        self.up = nn.ConvTranspose2d(channels + guide_channels, width, 2, stride=2)
        self.conv_1 = nn.ModuleDict({"double_conv": _double_conv(width + guide_channels, channels // 2)})

    def forward(self, x: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        return self.conv_1["double_conv"](torch.cat([self.up(x), guide], dim=1))


def _strided_conv(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]


def _double_conv(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
