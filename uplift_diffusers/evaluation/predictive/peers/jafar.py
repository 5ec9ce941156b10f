"""JAFAR: pixels attend to all tokens, and every output is a mixture of the features themselves."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from uplift_diffusers.evaluation.predictive.peers.interface import FeatureUpsampler, split_queries
from uplift_diffusers.scale import size_of

HEADS = 4
GROUPS = 8


class JAFAR(FeatureUpsampler):
    """
    Queries come from the image, keys from the image modulated by the features, values are the features.

    Args:
        channels: C, the channels of the features.
        width: width of queries and keys.
        query_chunk: positions per attention chunk; None for all, as published. The result is the same; the
            scores take 4 * query_chunk * T numbers.
    Source: Couairon et al. 2025, "JAFAR: Jack up Any Feature at Any Resolution", section 3.
    """

    def __init__(self, channels: int = 384, width: int = 128, *, query_chunk: int | None = None):
        super().__init__()
        self.image_encoder = encoder(3, width)
        self.key_encoder = encoder(width, width)
        self.query_encoder = encoder(width, width)
        self.key_features_encoder = encoder(channels, width)
        self.rope = RotaryPositions(width)
        self.sft_key = _Modulation(width)
        self.cross_decode = _CrossDecode(channels, width)
        self.query_chunk = query_chunk

    def forward(self, features: torch.Tensor, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        encoded = self.rope(self.image_encoder(image))  # (B, D, H, W)
        queries = F.group_norm(F.adaptive_avg_pool2d(self.query_encoder(encoded), size), GROUPS)
        keys = F.group_norm(F.adaptive_avg_pool2d(self.key_encoder(encoded), size_of(features)), GROUPS)
        keys = self.sft_key(keys, self.key_features_encoder(F.normalize(features, dim=1)))
        return self.cross_decode(queries, keys, features, self.query_chunk)


class ResidualBlock(nn.Module):
    """x + conv(SiLU(GroupNorm(conv(SiLU(GroupNorm(x)))))), with 1x1 convolutions."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, width), nn.GroupNorm(GROUPS, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 1, bias=False), nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


def encoder(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), ResidualBlock(width), ResidualBlock(width))


class RotaryPositions(nn.Module):
    """
    Rows and columns, from 0 to 1 including both ends, as angles of learned frequencies.

    Channels c and c + D/2 form a pair, but the former uses an angle of the row and the latter one of the
    column, so this is not a rotation. The published weights were trained with it.
    """

    def __init__(self, width: int):
        super().__init__()
        frequencies = (2 * math.pi * 100 ** -torch.linspace(0, 1, width // 4)).repeat(2)  # (D / 2)
        self.freqs = nn.Parameter(torch.block_diag(frequencies, frequencies))  # (2, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = (torch.linspace(0, 1, length, device=x.device, dtype=x.dtype) for length in x.shape[2:])
        of_row, of_column = self.freqs[:, :, None, None]  # (D, 1, 1) each
        angles = of_row * rows[:, None] + of_column * columns  # (D, H, W)
        first, second = x.chunk(2, dim=1)
        return x * angles.cos() + torch.cat([-second, first], dim=1) * angles.sin()


class _Modulation(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma, self.beta = nn.Conv2d(width, width, 1, bias=False), nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self.gamma(condition) * x + self.beta(condition)


class _CrossDecode(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv2d = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.cross_attn = _CrossAttention(channels, width)

    def forward(
        self, queries: torch.Tensor, keys: torch.Tensor, features: torch.Tensor, query_chunk: int | None
    ) -> torch.Tensor:
        """(B, D, H, W), (B, D, h, w) and (B, C, h, w) -> (B, C, H, W)."""
        projected = self.cross_attn.project(as_sequence(self.conv2d(queries)), as_sequence(keys))
        mixed = mix_by_attention(*projected, as_sequence(features), query_chunk=query_chunk)
        return mixed.transpose(1, 2).unflatten(2, queries.shape[2:])


class _CrossAttention(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.norm_q, self.norm_k = nn.RMSNorm(width), nn.RMSNorm(width)
        self.norm_v = nn.RMSNorm(channels)  # in the checkpoints, without influence
        self.attention = _Projections(channels, width)

    def project(self, queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, P, D) and (B, T, D) -> the same."""
        attention, (query_bias, key_bias, _) = self.attention, self.attention.in_proj_bias.chunk(3)
        queries = F.linear(self.norm_q(queries), attention.q_proj_weight, query_bias)
        return queries, F.linear(self.norm_k(keys), attention.k_proj_weight, key_bias)


class _Projections(nn.Module):
    """
    The parameters of the published attention. Its values are projected and then discarded, because only the attention
    weights are used: `v_proj_weight`, `out_proj` and a third of `in_proj_bias` have no effect.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.q_proj_weight, self.k_proj_weight, self.v_proj_weight = (
            nn.Parameter(nn.init.xavier_uniform_(torch.empty(width, inputs))) for inputs in (width, width, channels)
        )
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)


def as_sequence(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H W, C)."""
    return x.flatten(2).transpose(1, 2)


def mix_by_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    query_chunk: int | None,
    masks: Callable[[slice], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Mixtures of the values, with attention weights averaged over the heads.

    Args:
        queries, keys: (B, P, D) and (B, T, D).
        values: (B, T, C).
        query_chunk: queries per chunk; None for all.
        masks: for a slice of n queries, (n, T) bool, True for tokens that a query must not attend to.
    Returns:
        (B, P, C), each position a convex combination of the values.
    """
    queries, keys = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (queries, keys))  # (B, 4, P or T, D / 4)
    queries = queries * queries.shape[-1] ** -0.5
    chunks = []
    for part in split_queries(queries.shape[2], query_chunk):
        scores = queries[:, :, part] @ keys.transpose(2, 3)  # (B, 4, n, T)
        if masks is not None:
            scores = scores.masked_fill_(masks(part), -torch.inf)
        chunks.append(scores.softmax(dim=-1).mean(dim=1) @ values)
    return torch.cat(chunks, dim=1) if len(chunks) > 1 else chunks[0]
