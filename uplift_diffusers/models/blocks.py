"""Convolution and norm blocks of UPLiFT."""

import torch
import torch.nn.functional as F
from torch import nn


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of every position of (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS = {"layer_norm": ChannelLayerNorm, "batch_norm": nn.BatchNorm2d}


def add_shared_channels(hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Add `residual` to `hidden` in place, cut or zero-padded to its channels."""
    shared = min(hidden.shape[1], residual.shape[1])
    hidden[:, :shared] += residual[:, :shared]
    return hidden


class ConvBlock(nn.Module):
    """
    `num_convs` times [3x3 convolution, norm, ReLU], then a 1x1 convolution, plus the block's input.

    Where the channel counts differ, the input is cut or zero-padded to the output's channels before it is added.
    """

    def __init__(self, in_channels: int, out_channels: int, *, num_convs: int, norm_type: str):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_convs
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in zip(widths[:-1], widths[1:])
        )
        self.norms = nn.ModuleList(NORMS[norm_type](out_channels) for _ in range(num_convs))
        self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, hidden: torch.Tensor, stride: int = 1) -> torch.Tensor:
        """(B, in, H, W) -> (B, out, ceil(H/stride), ceil(W/stride)): every `stride`-th position of the full output."""
        residual = hidden[..., ::stride, ::stride]
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            last = index == len(self.convs) - 1
            # Only the last 3x3 convolution may be strided: the ones before it are needed at every position.
            hidden = F.conv2d(hidden, conv.weight, stride=stride if last else 1, padding=1)
            hidden = F.relu(norm(hidden), inplace=True)
        hidden = self.proj(hidden)
        return add_shared_channels(hidden, residual)


class ConvGroup(nn.Module):
    """`num_layers` blocks in a row, the first of which sets the width."""

    def __init__(self, in_channels: int, out_channels: int, *, num_layers: int, num_convs: int, norm_type: str):
        super().__init__()
        self.layers = nn.ModuleList(
            ConvBlock(out_channels if index else in_channels, out_channels, num_convs=num_convs, norm_type=norm_type)
            for index in range(num_layers)
        )

    def forward(self, hidden: torch.Tensor, stride: int = 1) -> torch.Tensor:
        for layer in self.layers[:-1]:
            hidden = layer(hidden)
        return self.layers[-1](hidden, stride)
