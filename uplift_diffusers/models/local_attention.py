"""The Local Attender: neighbourhoods, the pooling operator, and the layer that predicts its weights."""

import torch
import torch.nn.functional as F
from torch import nn

from uplift_diffusers.models.blocks import ChannelLayerNorm, add_shared_channels, start_at_zero

_NEIGHBORHOOD_RULES = {
    5: lambda dy, dx: abs(dy) + abs(dx) <= 1,
    9: lambda dy, dx: max(abs(dy), abs(dx)) <= 1,
    13: lambda dy, dx: abs(dy) + abs(dx) <= 2,
    17: lambda dy, dx: max(abs(dy), abs(dx)) <= 1 or (dy % 2 == 0 and dx % 2 == 0),
    25: lambda dy, dx: True,
}

NEIGHBORHOODS = tuple(_NEIGHBORHOOD_RULES)


def neighborhood_offsets(neighborhood: int) -> tuple[tuple[int, int], ...]:
    """
    Offsets (dy, dx) of a neighbourhood, in the order of the attention logits (row by row).

    Args:
        neighborhood: 5 (plus), 9 (3x3), 13 (diamond of radius 2), 17 (3x3 and the eight points two away), 25 (5x5).
    Raises:
        ValueError: unknown neighbourhood.
    Source: Walmer et al. 2026, section 3.2; the order is that of the published checkpoints.
    """
    if neighborhood not in _NEIGHBORHOOD_RULES:
        raise ValueError(f"`neighborhood` must be one of {NEIGHBORHOODS}, got {neighborhood}.")
    rule = _NEIGHBORHOOD_RULES[neighborhood]
    return tuple((dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if rule(dy, dx))


def local_attention(logits: torch.Tensor, values: torch.Tensor, neighborhood: int) -> torch.Tensor:
    """
    Pool `values` over a fixed neighbourhood with softmax weights: the Local Attender without its 1x1 convolution.

    The positions of `logits` form c x c cells, one per value token. Every position of a cell is the weighted mean
    of the n values around the cell's token; the border is replicated. Time is O(nT) for T output
    positions. Apart from the output, memory holds the n weights of each position and one product at a time.

    Args:
        logits: (B, n, cH, cW) float, c >= 1 an integer.
        values: (B, C, H, W) float.
        neighborhood: n, see `neighborhood_offsets`.
    Returns:
        (B, C, cH, cW), dtype of `values`. Each position is a convex combination of n values.
    Raises:
        ValueError: shapes do not fit each other.
    Source: Walmer et al. 2026, section 3.2.
    """
    offsets = neighborhood_offsets(neighborhood)
    if logits.ndim != 4 or values.ndim != 4 or logits.shape[0] != values.shape[0] or logits.shape[1] != len(offsets):
        raise ValueError(
            f"`logits` must be (B, {len(offsets)}, cH, cW) and `values` (B, C, H, W), "
            f"got {tuple(logits.shape)} and {tuple(values.shape)}."
        )
    batch, channels, height, width = values.shape
    factor = logits.shape[2] // height
    if factor < 1 or logits.shape[2:] != (factor * height, factor * width):
        raise ValueError(
            f"`logits` must be an integer number of times as large as `values`, "
            f"got {tuple(logits.shape[2:])} and {(height, width)}."
        )

    weights = logits.softmax(dim=1).to(values.dtype)
    # Split cells into phases, so that every product below runs along contiguous rows of the value grid.
    weights = F.pixel_unshuffle(weights, factor).view(batch, len(offsets), factor**2, height, width)
    padded = F.pad(values, (2, 2, 2, 2), mode="replicate").unsqueeze(2)  # (B, C, 1, H + 4, W + 4)
    pooled = values.new_zeros(batch, channels, factor**2, height, width)
    for index, (dy, dx) in enumerate(offsets):
        shifted = padded[..., 2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width]
        pooled = pooled.addcmul_(weights[:, index, None], shifted)
    return F.pixel_shuffle(pooled.flatten(1, 2), factor)  # (B, C, cH, cW)


class LocalAttender(nn.Module):
    """
    Pools the values around each cell with softmax weights that a 1x1 convolution predicts from the guide.

    Args:
        guide_channels: channels of the guide.
        neighborhood: number of values that are pooled, see `neighborhood_offsets`.
        residual: add the guide to the logits, as every block of the published checkpoints adds its input. Otherwise
            the guide is normalised before the convolution, which is initialised to zero, so training starts from
            uniform weights. (With the residual, a guide of large values saturates the softmax.)
    Source: Walmer et al. 2026, section 3.2.
    """

    def __init__(self, guide_channels: int, neighborhood: int, *, residual: bool = True):
        super().__init__()
        self.neighborhood = neighborhood
        self.norm = None if residual else ChannelLayerNorm(guide_channels)
        self.conv = nn.Conv2d(guide_channels, neighborhood, 1)
        if not residual:
            start_at_zero(self.conv)

    @property
    def reach(self) -> int:
        """Values to each side on which an output depends."""
        return max(abs(dy) for dy, _ in neighborhood_offsets(self.neighborhood))

    def logits(self, guide: torch.Tensor) -> torch.Tensor:
        """(B, G, H, W) -> (B, n, H, W), the logits of the weights."""
        if self.norm is not None:
            return self.conv(self.norm(guide))
        return add_shared_channels(self.conv(guide), guide)

    def forward(self, guide: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(B, G, cH, cW) and (B, C, H, W) -> (B, C, cH, cW)."""
        return local_attention(self.logits(guide), values, self.neighborhood)
