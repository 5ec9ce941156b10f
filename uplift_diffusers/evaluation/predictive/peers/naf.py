"""NAF: neighbourhood attention with queries and keys from the image only."""

import torch
import torch.nn.functional as F
from torch import nn

from uplift_diffusers.evaluation.predictive.peers.interface import FeatureUpsampler
from uplift_diffusers.scale import size_of

HEADS = 4
GROUPS = 8
WINDOW = 9
MAX_SHRINK = 4


class NAF(FeatureUpsampler):
    """
    Queries and keys come from the image at the output's and at the tokens' resolution; the features are only averaged,
    a quarter of the channels by each head, over 9x9 tokens.

    Args:
        width: width of queries and keys.
    Raises:
        ValueError: there are fewer than 9 tokens along a side, or the channels are not a multiple of the heads.
    Source: Chambon et al. 2025, "NAF: Zero-Shot Feature Upsampling via Neighborhood Attention Filtering", section 3.
        The reduction of large images and the heads' shares of the channels are the published code's.
    """

    def __init__(self, width: int = 256):
        super().__init__()
        self.image_encoder = _ImageEncoder(width)

    def forward(self, features: torch.Tensor, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        tokens = size_of(features)
        if min(tokens) < WINDOW:
            raise ValueError(f"`features` must have at least {WINDOW} tokens a side for NAF, got {tokens}.")
        if features.shape[1] % HEADS:
            raise ValueError(f"`features` must have a multiple of {HEADS} channels, got {features.shape[1]}.")
        queries = self.image_encoder(image, size)  # (B, D, H, W)
        keys = F.adaptive_avg_pool2d(queries, tokens)
        return neighborhood_attention(queries, keys, features)


class _ImageEncoder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.encoder = _branch(width // 2, kernel_size=1)
        self.sem_encoder = _branch(width // 2, kernel_size=3)
        self.rope = RotaryPositions(width // HEADS)

    def forward(self, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(B, 3, H, W) -> (B, D, *size)."""
        # Both limits hold for both sides, so that a wide image may become a square.
        limit = MAX_SHRINK * min(size)
        height, width = image.shape[2:]
        if height > MAX_SHRINK * size[0] or width > MAX_SHRINK * size[1]:
            image = F.interpolate(image, size=(min(height, limit), min(width, limit)), mode="bilinear")
        encoded = torch.cat([self.encoder(image), self.sem_encoder(image)], dim=1)
        return self.rope(F.adaptive_avg_pool2d(encoded, size))


class _Block(nn.Module):
    """GroupNorm, SiLU and convolution, twice, without a residual connection."""

    def __init__(self, width: int, kernel_size: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, width), nn.GroupNorm(GROUPS, width)
        self.conv1, self.conv2 = _conv(width, width, kernel_size), _conv(width, width, kernel_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class RotaryPositions(nn.Module):
    """
    Rotates pairs of a head's channels by angles of the position: rows for one half of the pairs, columns for the
    other.

    Positions are the centres of a grid from -1 to 1 along each axis. In training, both are scaled by a common
    random factor between 1/2 and 2.
    """

    periods: torch.Tensor

    def __init__(self, head_width: int):
        super().__init__()
        count = head_width // 4
        self.register_buffer("periods", 100 ** (torch.arange(count) / count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D, H, W) -> the same."""
        rows, columns = (
            (2 * (torch.arange(length, device=x.device, dtype=x.dtype) + 0.5) / length - 1) for length in x.shape[2:]
        )
        if self.training:
            magnification = 2 ** (2 * torch.rand((), device=x.device, dtype=x.dtype) - 1)
            rows, columns = rows * magnification, columns * magnification
        turns = 2 * torch.pi / self.periods[:, None, None]  # (d / 4, 1, 1)
        of_row = (turns * rows[:, None]).expand(-1, *x.shape[2:])
        of_column = (turns * columns).expand(-1, *x.shape[2:])
        angles = torch.cat([of_row, of_column])  # (d / 2, H, W)
        first, second = x.unflatten(1, (HEADS, 2, -1)).unbind(2)  # (B, 4, d / 2, H, W) each
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=2).flatten(1, 3)


def neighborhood_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """
    Attention of every position to the 9x9 tokens around it.

    Published as a dilated neighbourhood attention over keys and values upsampled to the output's size, dilation H //
    h. The upsampled maps repeat the tokens, so here the tokens themselves are indexed; positions with the same tokens
    share a matrix product.

    Args:
        queries: (B, D, H, W).
        keys: (B, D, h, w), h and w at least 9.
        values: (B, C, h, w).
    Returns:
        (B, C, H, W), every channel a convex combination of its 81 values.
    """
    (row_order, row_groups), (column_order, column_groups) = (
        _group(window_tokens(length, count), -(-length // count))
        for length, count in zip(queries.shape[2:], keys.shape[2:])
    )
    queries = queries.unflatten(1, (HEADS, -1)) * (queries.shape[1] // HEADS) ** -0.5
    keys, values = keys.unflatten(1, (HEADS, -1)), values.unflatten(1, (HEADS, -1))  # (B, 4, c, h, w)

    # Columns in groups of equal size, so that a row of groups is one batch of products; the shorter ones are filled
    # up by repeating their last column, which is not read again below.
    longest = max(len(columns) for columns, _ in column_groups)
    filled = torch.stack(
        [F.pad(columns, (0, longest - len(columns)), value=int(columns[-1])) for columns, _ in column_groups]
    )
    kept = torch.cat(
        [longest * index + torch.arange(len(columns)) for index, (columns, _) in enumerate(column_groups)]
    )
    column_tokens = torch.stack([tokens for _, tokens in column_groups])  # (G, 9)
    filled, kept, column_tokens = (x.to(queries.device) for x in (filled, kept, column_tokens))
    column_place = kept[column_order.argsort().to(kept)]

    bands = []
    for rows, row_tokens in row_groups:
        band = queries.index_select(3, rows.to(queries.device))[..., filled]  # (B, 4, d, R, G, n)
        band_keys, band_values = (
            x.index_select(3, row_tokens.to(x.device))[..., column_tokens] for x in (keys, values)
        )  # (B, 4, c, 9, G, 9)
        logits = torch.einsum("bkdrgn,bkdigj->bkgrnij", band, band_keys).flatten(-2)
        weights = logits.softmax(dim=-1).unflatten(-1, (WINDOW, WINDOW))
        mixed = torch.einsum("bkgrnij,bkcigj->bkcrgn", weights, band_values)
        bands.append(mixed.flatten(4).index_select(4, column_place).flatten(1, 2))  # (B, C, R, W)
    return torch.cat(bands, dim=2).index_select(2, row_order.argsort().to(queries.device))


def window_tokens(length: int, count: int) -> torch.Tensor:
    """
    (length, 9): the tokens in the window of each of `length` output positions along an axis of `count` tokens.

    The window consists of the nine nearest positions in steps of `length // count` that lie inside the axis, so it is
    shifted at the borders. Each position lies in one token.
    """
    dilation = length // count
    position = torch.arange(length)
    phase, place = position % dilation, position // dilation
    in_phase = (length - phase + dilation - 1) // dilation  # how many positions there are
    first = torch.minimum((place - WINDOW // 2).clamp_min(0), in_phase - WINDOW)
    seen = phase[:, None] + dilation * (first[:, None] + torch.arange(WINDOW))
    return ((2 * seen + 1) * count) // (2 * length)  # nearest-exact, in whole numbers


def _group(tokens: torch.Tensor, cell: int) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """
    Groups of at most `cell` neighbouring positions with the same tokens: all positions in the order of the groups,
    and for each group its positions and (9,) tokens.
    """
    cells = torch.arange(len(tokens)) // cell
    keys, group = torch.cat([cells[:, None], tokens], dim=1).unique(dim=0, return_inverse=True)
    positions = [torch.nonzero(group == index).flatten() for index in range(len(keys))]
    return torch.cat(positions), [(places, key[1:]) for places, key in zip(positions, keys)]


def _branch(width: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(_conv(3, width, kernel_size), _Block(width, kernel_size), _Block(width, kernel_size))


def _conv(inputs: int, outputs: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, padding_mode="reflect")
