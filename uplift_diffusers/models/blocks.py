"""Convolution and norm blocks of UPLiFT."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from uplift_diffusers.models.window import NO_MARGINS, Margins, trim


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of every position of (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelBias(nn.Module):
    """A bias for every channel of (B, C, H, W), in the place of a norm: contrast stays what it is."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.bias


NORMS = {"layer_norm": ChannelLayerNorm, "batch_norm": nn.BatchNorm2d, "bias": ChannelBias}


def add_shared_channels(hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Add `residual` to `hidden` in place, cut or zero-padded to its channels."""
    shared = min(hidden.shape[1], residual.shape[1])
    hidden[:, :shared] += residual[:, :shared]
    return hidden


def run_trimmed(layers: Sequence[nn.Module], hidden: torch.Tensor, margins: Margins) -> torch.Tensor:
    """
    Run zero-padded layers on a window, and cut `margins` off as soon as no later layer needs them.

    At the picture's own border there is no margin, and zero padding is what the whole picture has there. Elsewhere it
    spoils as many positions as the layers reach, which the margins must hold.

    Args:
        layers: each with `reach`, how many positions away its input is felt, or a convolution.
        hidden: (B, C, H, W).
        margins: positions to cut off in the end.
    Returns:
        (B, D, H - margins, W - margins).
    """
    reaches = [layer.kernel_size[0] // 2 if isinstance(layer, nn.Conv2d) else layer.reach for layer in layers]
    needed = sum(reaches)
    for layer, reach in zip(layers, reaches, strict=True):
        hidden = layer(hidden)
        needed -= reach
        spare = tuple(max(margin - needed, 0) for margin in margins)
        hidden = trim(hidden, spare)
        margins = tuple(margin - cut for margin, cut in zip(margins, spare))
    return hidden


class SampledConv2d(nn.Conv2d):
    """A 3x3 convolution without bias that can be asked for every `stride`-th position alone."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, hidden: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return F.conv2d(hidden, self.weight, stride=stride, padding=1)


class ConvBlock(nn.Module):
    """
    `num_convs` times [3x3 convolution, norm, ReLU], then a 1x1 convolution, plus the block's input.

    Where the channel counts differ, the input is cut or zero-padded to the output's channels before it is added.
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
    """`num_layers` blocks in a row, the first of which sets the width."""

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
        return sum(layer.reach for layer in self.layers)

    def forward(self, hidden: torch.Tensor, stride: int = 1, margins: Margins = NO_MARGINS) -> torch.Tensor:
        """
        (B, in, H, W) -> (B, out, H, W).

        Args:
            stride: give every `stride`-th position alone.
            margins: what to cut off, see `run_trimmed`; for stride 1.
        """
        if margins != NO_MARGINS:
            return run_trimmed(self.layers, hidden, margins)
        for index, layer in enumerate(self.layers):
            inputs = (hidden, stride if index == len(self.layers) - 1 else 1)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(layer, *inputs)
            else:
                hidden = layer(*inputs)
        return hidden
