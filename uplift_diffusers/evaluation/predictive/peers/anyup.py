"""AnyUp: JAFAR for features of any backbone, with attention to a window."""

import torch
import torch.nn.functional as F
from torch import nn

from uplift_diffusers.evaluation.predictive.peers.interface import FeatureUpsampler
from uplift_diffusers.evaluation.predictive.peers.jafar import (
    GROUPS,
    RotaryPositions,
    as_sequence,
    mix_by_attention,
)
from uplift_diffusers.scale import size_of

BASIS_SIZE = 5


class AnyUp(FeatureUpsampler):
    """
    JAFAR with two differences: the keys do not depend on the number of feature channels, and a pixel attends
    only to the tokens in a window around it.

    Args:
        width: width of queries and keys.
        window_ratio: half the window's side relative to the image's; 0 for no window.
        query_chunk: positions per attention chunk; None for all, as published by default. The result is the
            same; the scores take 4 * query_chunk * T numbers regardless of the window, which is a mask.
    Source: Wimmer et al. 2026, "AnyUp: Universal Feature Upsampling", section 3. The unification of the features is
        the published code's, which differs from the paper's formula: see `FeatureUnification`.
    """

    def __init__(self, width: int = 128, *, window_ratio: float = 0.1, query_chunk: int | None = None):
        super().__init__()
        self.image_encoder = _encoder(3, width)
        self.key_encoder = _encoder(width, width)
        self.query_encoder = _encoder(width, width)
        self.key_features_encoder = nn.Sequential(
            FeatureUnification(width), ResidualBlock(width), ResidualBlock(width)
        )
        self.aggregation = _encoder(2 * width, width, kernel_size=3)
        self.rope = RotaryPositions(width)
        self.cross_decode = _CrossDecode(width)
        self.window_ratio, self.query_chunk = window_ratio, query_chunk

    def forward(self, features: torch.Tensor, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        encoded = self.rope(self.image_encoder(image))  # (B, D, H, W)
        queries = F.adaptive_avg_pool2d(self.query_encoder(encoded), size)
        of_image = F.adaptive_avg_pool2d(self.key_encoder(encoded), size_of(features))
        of_features = self.key_features_encoder(F.normalize(features, dim=1))
        keys = self.aggregation(torch.cat([of_image, of_features], dim=1))
        return self.cross_decode(queries, keys, features, window_ratio=self.window_ratio, query_chunk=self.query_chunk)


class ResidualBlock(nn.Module):
    """JAFAR's residual block, with the names of AnyUp's checkpoints."""

    def __init__(self, width: int):
        super().__init__()
        halves = [(nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, width, 1, bias=False)) for _ in range(2)]
        self.block = nn.Sequential(*halves[0], *halves[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)


class FeatureUnification(nn.Module):
    """
    Features of any number C of channels -> D channels.

    Every channel is correlated with D filters of 5x5. The paper then takes a softmax over the filters and the mean
    over the channels. The published code, and so the published weights, read the C D maps in another order: map
    c D + j is taken for row (c D + j) // C of D rows, the softmax runs over the rows and the mean along them.
    """

    def __init__(self, width: int):
        super().__init__()
        self.basis = nn.Parameter(torch.randn(width, 1, BASIS_SIZE, BASIS_SIZE))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, D, h, w)."""
        batch, channels, height, width = features.shape
        pad = BASIS_SIZE // 2
        maps = F.conv2d(features.reshape(-1, 1, height, width), self.basis, padding=pad)  # (B C, D, h, w)
        ones = features.new_ones(1, 1, height, width)
        inside = F.conv2d(ones, features.new_ones(1, 1, BASIS_SIZE, BASIS_SIZE), padding=pad)
        rows = (maps / inside).view(batch, len(self.basis), channels, height, width)
        return rows.softmax(dim=1).mean(dim=2)


class _CrossDecode(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv2d = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.cross_attn = _CrossAttention(width)

    def forward(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        features: torch.Tensor,
        *,
        window_ratio: float,
        query_chunk: int | None,
    ) -> torch.Tensor:
        """(B, D, H, W), (B, D, h, w) and (B, C, h, w) -> (B, C, H, W)."""
        size, tokens = queries.shape[2:], features.shape[2:]
        masks = None
        if window_ratio:
            outside_rows, outside_columns = (
                _outside(length, count, window_ratio, queries.device) for length, count in zip(size, tokens)
            )

            def outside(part: slice) -> torch.Tensor:
                place = torch.arange(size[0] * size[1], device=queries.device)[part]
                rows, columns = outside_rows[place // size[1]], outside_columns[place % size[1]]
                return (rows[:, :, None] | columns[:, None, :]).flatten(1)

            masks = outside

        projected = self.cross_attn.project(as_sequence(self.conv2d(queries)), as_sequence(keys))
        mixed = mix_by_attention(*projected, as_sequence(features), query_chunk=query_chunk, masks=masks)
        return mixed.transpose(1, 2).unflatten(2, size)


class _CrossAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm_q, self.norm_k = nn.RMSNorm(width), nn.RMSNorm(width)
        # The published attention projects values and discards them: `out_proj` and the last third of the input
        # projection have no influence.
        self.attention = nn.MultiheadAttention(width, 1)

    def project(self, queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, P, D) and (B, T, D) -> the same."""
        weights, biases = self.attention.in_proj_weight.chunk(3), self.attention.in_proj_bias.chunk(3)
        queries = F.linear(self.norm_q(queries), weights[0], biases[0])
        return queries, F.linear(self.norm_k(keys), weights[1], biases[1])


def window(length: int, count: int, ratio: float) -> torch.Tensor:
    """(length, 2): for each of `length` outputs along an axis, the first of the `count` tokens in its window and
    the one after the last. In float32, as published, because rounding matters at a window's edges."""
    centres = (torch.arange(length, dtype=torch.float32) + 0.5) / length
    starts = ((centres - ratio).clamp(0, 1) * count).floor()
    stops = ((centres + ratio).clamp(0, 1) * count).ceil()
    return torch.stack([starts, stops], dim=1).long()


def _outside(length: int, count: int, ratio: float, device: torch.device) -> torch.Tensor:
    """(length, count) bool: the tokens along an axis outside an output's window."""
    starts, stops = window(length, count, ratio).to(device)[:, :, None].unbind(1)
    tokens = torch.arange(count, device=device)
    return (tokens < starts) | (tokens >= stops)


def _encoder(inputs: int, width: int, kernel_size: int = 1) -> nn.Sequential:
    first = nn.Conv2d(inputs, width, kernel_size, padding=kernel_size // 2, padding_mode="reflect", bias=False)
    return nn.Sequential(first, ResidualBlock(width), ResidualBlock(width))
