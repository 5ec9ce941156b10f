"""Bilinear interpolation of latents: the baseline for upsamplers."""

import torch
import torch.nn.functional as F


def interpolate_latents(raw_latents: torch.Tensor, *, scale: int) -> torch.Tensor:
    """(B, C, h, w), unscaled, of any float type -> (B, C, h * scale, w * scale) float32, by pixel centres."""
    return F.interpolate(raw_latents.float(), scale_factor=scale, mode="bilinear")
