"""Baselines without image guidance."""

import torch
import torch.nn.functional as F

from uplift_diffusers.evaluation.predictive.peers.interface import FeatureUpsampler


class Nearest(FeatureUpsampler):
    """Nearest-neighbour interpolation: every position gets the token that contains it."""

    def forward(self, features: torch.Tensor, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(features, size=size, mode="nearest-exact")


class Bilinear(FeatureUpsampler):
    """Bilinear interpolation between the tokens' centres."""

    def forward(self, features: torch.Tensor, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(features, size=size, mode="bilinear")
