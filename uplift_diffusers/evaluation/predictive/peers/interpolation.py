"""The baselines that do not look at the image."""

import torch
import torch.nn.functional as F

from uplift_diffusers.evaluation.predictive.peers.interface import FeatureUpsampler


class Nearest(FeatureUpsampler):
    """Every position takes the token that it lies in."""

    def forward(self, features: torch.Tensor, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(features, size=size, mode="nearest-exact")


class Bilinear(FeatureUpsampler):
    """Bilinear between the tokens' centres."""

    def forward(self, features: torch.Tensor, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(features, size=size, mode="bilinear")
