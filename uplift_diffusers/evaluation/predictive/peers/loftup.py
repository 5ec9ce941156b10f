"""LoftUp: every pixel attends to all tokens, in two layers of cross-attention."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from uplift_diffusers.evaluation.predictive.peers.interface import (
    ChannelNorm,
    FeatureUpsampler,
    resize,
    split_queries,
)

HEADS = 4
IMAGE_FREQUENCIES = 20
TOKEN_FREQUENCIES = 5
TOKEN_POSITION_CHANNELS = 2 * 2 * TOKEN_FREQUENCIES
FOURIER_CHANNELS = 2 * 5 * IMAGE_FREQUENCIES + 3


class LoftUp(FeatureUpsampler):
    """
    Fourier features of colours and coordinates become queries, the normalised tokens keys and values.

    The result has the size of the image, so for another size the image is resized. Colours are scaled by the minimum
    and maximum of the whole batch, so the result depends on the other images in it.

    Args:
        channels: C, the channels of the features.
        query_chunk: pixels per attention chunk; None for all, as published. The result is the same; the
            scores take 4 * query_chunk * T numbers.
    Raises:
        ValueError: the features are in half precision.
    Source: Huang et al. 2025, "LoftUp: Learning a Coordinate-Based Feature Upsampler for Vision Foundation Models",
        section 3.1. Frequencies and the layout of the phases are those of the published code.
    """

    def __init__(self, channels: int = 384, *, query_chunk: int | None = None):
        super().__init__()
        self.channelnorm = ChannelNorm(channels)
        self.upsampler = _Upsampler(channels)
        self.query_chunk = query_chunk

    def forward(self, features: torch.Tensor, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if features.dtype in (torch.float16, torch.bfloat16):  # one rounding moves a sine of 22,026 x by several turns
            raise ValueError(f"`features` must be float32 for LoftUp, got {features.dtype}. Convert its network, too.")
        return self.upsampler(self.channelnorm(features), resize(image, size), self.query_chunk)


class _Upsampler(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        width = channels + TOKEN_POSITION_CHANNELS
        self.lr_pe = SineEncoding(2, TOKEN_FREQUENCIES)
        self.fourier_feat = nn.ModuleDict({"1": SineEncoding(5, IMAGE_FREQUENCIES)})
        self.first_conv = nn.Sequential(
            ChannelNorm(FOURIER_CHANNELS),
            *_conv(FOURIER_CHANNELS, width),
            *_conv(width, width),
        )
        self.ca_transformer = _Transformer(width, hidden=channels)
        self.final_conv = nn.Sequential(nn.Conv2d(width, channels, 1), nn.LayerNorm(channels, eps=1e-6))

    def forward(self, features: torch.Tensor, image: torch.Tensor, query_chunk: int | None) -> torch.Tensor:
        query = self.first_conv(self.fourier_features(image))  # (B, C + 20, H, W)
        position = self.lr_pe(_coordinates(features)).expand(len(features), -1, -1, -1)
        tokens = torch.cat([features, position], dim=1).flatten(2).transpose(1, 2)  # (B, T, C + 20)
        attended = self.ca_transformer(query.flatten(2).transpose(1, 2), tokens, query_chunk)
        conv, norm = self.final_conv
        result = conv(attended.transpose(1, 2).unflatten(2, image.shape[2:]))
        return norm(result.movedim(1, -1)).movedim(-1, 1)

    def fourier_features(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 203, H, W): sines, cosines and the colours themselves."""
        colours = minmax(image)
        signals = torch.cat([_coordinates(image).expand(len(image), -1, -1, -1), colours], dim=1)
        return torch.cat([self.fourier_feat["1"](signals), colours], dim=1)


class SineEncoding(nn.Module):
    """
    Sines, then cosines, of every signal at every frequency, with learned phases.

    Frequencies reach exp(10), so one rounding of a product moves a sine by 1e-3. The order of operations is that of
    the published code: signal times frequency, rounded, plus phase.
    """

    def __init__(self, signals: int, frequencies: int):
        super().__init__()
        # Read as (2, frequencies, signals), without transposing: the published weights are laid out so.
        self.biases = nn.Parameter(torch.randn(2, signals, frequencies))
        self.frequencies = frequencies

    def forward(self, signals: torch.Tensor) -> torch.Tensor:
        """(B, S, H, W) -> (B, 2 F S, H, W), frequency by frequency."""
        frequencies = torch.exp(torch.linspace(-2, 10, self.frequencies, device=signals.device))
        phases = self.biases.reshape(2, self.frequencies, signals.shape[1], 1, 1)
        angles = signals[:, None] * frequencies.to(signals).view(-1, 1, 1, 1)  # (B, F, S, H, W)
        return torch.cat([(angles + phases[0]).flatten(1, 2).sin(), (angles + phases[1]).flatten(1, 2).cos()], dim=1)


class _Transformer(nn.Module):
    def __init__(self, width: int, hidden: int, depth: int = 2):
        super().__init__()
        self.layers: Iterable[Any] = nn.ModuleList(
            nn.ModuleList([_CrossAttention(width), _FeedForward(width, hidden)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, query: torch.Tensor, tokens: torch.Tensor, query_chunk: int | None) -> torch.Tensor:
        """(B, P, D) and (B, T, D) -> (B, P, D). Pixels do not attend to each other, so chunks are exact."""
        chunks = []
        for part in split_queries(query.shape[1], query_chunk):
            hidden = query[:, part]
            for attention, feed_forward in self.layers:
                hidden = hidden + attention(hidden, tokens)
                hidden = hidden + feed_forward.net(hidden)
            chunks.append(self.norm(hidden))
        return torch.cat(chunks, dim=1) if len(chunks) > 1 else chunks[0]


class _CrossAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm_q, self.norm_kv = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)

    def forward(self, query: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(B, P, D) and (B, T, D) -> (B, P, D)."""
        weights, biases = self.attention.in_proj_weight.chunk(3), self.attention.in_proj_bias.chunk(3)
        tokens = self.norm_kv(tokens)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, 4, P or T, D / 4)
            for x, weight, bias in zip((self.norm_q(query), tokens, tokens), weights, biases, strict=True)
        )
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, 4, P, T)
        return self.attention.out_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width)
        )


def minmax(image: torch.Tensor) -> torch.Tensor:
    """Scale each colour channel to [-0.5, 0.5] by its minimum and maximum over the whole batch."""
    low, high = (extreme(image, dim=(0, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
    return (image - low) / (high - low).clamp_min(1e-4) - 0.5


def _coordinates(like: torch.Tensor) -> torch.Tensor:
    """(1, 2, H, W): rows and columns, each from -1 to 1."""
    axes = [torch.linspace(-1, 1, length, device=like.device, dtype=like.dtype) for length in like.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def _conv(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
