"""Convolution and norm blocks of UPLiFT."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels at every position of (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelBias(nn.Module):
    """A bias per channel, added to (B, C, H, W) in place; used instead of a norm; preserves contrast."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.add_(self.bias)


NORMS = {"layer_norm": ChannelLayerNorm, "batch_norm": nn.BatchNorm2d, "bias": ChannelBias}


def start_at_zero(layer: nn.Module) -> None:
    """Set every parameter of a new layer to zero: its output is zero until it has learnt."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def total_reach(blocks: Iterable[Any]) -> int:
    """Positions to each side on which the output of `blocks`, run one after the other, depends."""
    return sum(block.reach for block in blocks)


def add_shared_channels(hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Add `residual`, cut or zero-padded to the channels of `hidden`, to `hidden` in place."""
    shared = min(hidden.shape[1], residual.shape[1])
    hidden[:, :shared] += residual[:, :shared]
    return hidden


class SampledConv2d(nn.Conv2d):
    """A 3x3 convolution without bias that can compute every `stride`-th position only."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, hidden: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return F.conv2d(hidden, self.weight, stride=stride, padding=1)


class ConvBlock(nn.Module):
    """
    `num_convs` times [3x3 convolution, norm, ReLU], then a 1x1 convolution, plus the block's input.

    If the channel counts differ, the input is cut or zero-padded to the output's channels before it is added.
    """

    def __init__(self, in_channels: int, out_channels: int, *, num_convs: int, norm_type: str):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_convs
        self.convs = nn.ModuleList(SampledConv2d(before, after) for before, after in zip(widths[:-1], widths[1:]))
        self.norms = nn.ModuleList(NORMS[norm_type](out_channels) for _ in range(num_convs))
        self.proj = nn.Conv2d(out_channels, out_channels, 1)

    @property
    def reach(self) -> int:
        """Positions to each side on which an output depends."""
        return len(self.convs)

    def forward(self, hidden: torch.Tensor, stride: int = 1) -> torch.Tensor:
        """(B, in, H, W) -> (B, out, ceil(H/stride), ceil(W/stride)): every `stride`-th position of the full output."""
        residual = hidden[..., ::stride, ::stride]
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            last = index == len(self.convs) - 1
            # Only the last 3x3 convolution may be strided: the ones before it are needed at every position.
            hidden = conv(hidden, stride if last else 1)
            hidden = F.relu(norm(hidden), inplace=True)
        hidden = self.proj(hidden)
        return add_shared_channels(hidden, residual)


class ConvGroup(nn.Module):
    """`num_layers` blocks in sequence; the first one sets the width."""

    _gradient_checkpointing_func: Callable[..., torch.Tensor]

    def __init__(self, in_channels: int, out_channels: int, *, num_layers: int, num_convs: int, norm_type: str):
        super().__init__()
        self.layers = nn.ModuleList(
            ConvBlock(out_channels if index else in_channels, out_channels, num_convs=num_convs, norm_type=norm_type)
            for index in range(num_layers)
        )
        self.gradient_checkpointing = False  # set, with the function, by `ModelMixin.enable_gradient_checkpointing`

    @property
    def reach(self) -> int:
        """Positions to each side on which an output depends."""
        return total_reach(self.layers)

    def forward(self, hidden: torch.Tensor, stride: int = 1) -> torch.Tensor:
        """(B, in, H, W) -> (B, out, ceil(H/stride), ceil(W/stride)): every `stride`-th position of the full output."""
        for index, layer in enumerate(self.layers):
            inputs = (hidden, stride if index == len(self.layers) - 1 else 1)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(layer, *inputs)
            else:
                hidden = layer(*inputs)
        return hidden


def resample_nearest(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Resample (B, C, H, W) to `size` by nearest neighbour: output i takes input floor(i * in / out).

    Whole reductions are strided views without a copy.
    """
    height, width = features.shape[2:]
    if height % size[0] == 0 and width % size[1] == 0:
        return features[..., :: height // size[0], :: width // size[1]]
    return F.interpolate(features, size=size, mode="nearest")


def interpolate_2x(values: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
    """
    2x bilinear interpolation with `align_corners=True`, of a whole image or of a part of one.

    With n input positions, output i is sampled at i (n - 1) / (2n - 1), so the weights depend on the position in the
    whole. They are rounded to float32 as in F.interpolate: the exact weights differ from those by 2e-4 at n = 1500,
    which would make tiles visible. At an edge inside the whole, the outermost two outputs of a part lack a neighbour
    and are wrong.

    Args:
        values: (B, C, H, W) float.
        place: (4,) integers: row and column of `values[..., 0, 0]` in the whole, and the whole's rows and columns.
            A tensor, so a compiled model is not compiled again for every place. None: `values` are the whole.
    Returns:
        (B, C, 2H, 2W), dtype of `values`.
    """
    if place is None:
        return F.interpolate(values, scale_factor=2, mode="bilinear", align_corners=True)
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    result = values.to(dtype)
    for dim, first, count in ((2, place[0], place[2]), (3, place[1], place[3])):
        size = values.shape[dim]
        outputs = torch.arange(2 * size, device=values.device) + 2 * first  # places in the whole
        source = outputs.to(dtype) * ((count - 1).to(dtype) / (2 * count - 1).to(dtype))
        lower = source.floor()
        weight = (source - lower).unflatten(0, (-1,) + (1,) * (3 - dim))
        upper = torch.minimum(lower + 1, count - 1)
        lower, upper = ((index.long() - first).clamp(0, size - 1) for index in (lower, upper))
        result = torch.lerp(result.index_select(dim, lower), result.index_select(dim, upper), weight)
    return result.to(values.dtype)
