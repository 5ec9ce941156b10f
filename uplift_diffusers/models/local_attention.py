"""Parameter-free tensor operations of UPLiFT: neighbourhoods, local attention, nearest resampling."""

import torch
import torch.nn.functional as F

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

    The positions of `logits` form c x c cells, one for each value token. Every position of a cell is the weighted mean
    of the n values around the cell's token; beyond the border the nearest value stands in. Time is O(nT) for T output
    positions. Beside the output, memory holds the n weights of each position and one product at a time.

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


def resample_nearest(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Resample (B, C, H, W) to `size` by nearest neighbour: output i takes input floor(i * in / out).

    Whole reductions are strided views without a copy.
    """
    height, width = features.shape[2:]
    if height % size[0] == 0 and width % size[1] == 0:
        return features[..., :: height // size[0], :: width // size[1]]
    return F.interpolate(features, size=size, mode="nearest")


def match_channel_statistics(values: torch.Tensor, reference: torch.Tensor, factor: float) -> torch.Tensor:
    """
    Move the mean and standard deviation of every channel of `values` towards those of `reference`.

    values + factor * ((values - mean(values)) * std(reference) / std(values) + mean(reference) - values), over the
    positions of each item and channel. Where a channel of `values` is constant its mean moves alone.

    Args:
        values: (B, C, H, W) float.
        reference: (B, C, h, w) float.
        factor: 0 gives `values`, 1 the statistics of `reference`.
    Returns:
        (B, C, H, W), dtype of `values`, computed in float32.
    Source: AdaIN, Huang and Belongie 2017, equation 8; the blend is that of diffusers' LTXLatentUpsamplePipeline.
    """
    if factor == 0:
        return values
    std, mean = torch.std_mean(values.float(), dim=(2, 3), correction=0, keepdim=True)  # (B, C, 1, 1)
    reference_std, reference_mean = torch.std_mean(reference.float(), dim=(2, 3), correction=0, keepdim=True)
    matched = (values.float() - mean) * (reference_std / std.clamp_min(1e-5)) + reference_mean
    return torch.lerp(values.float(), matched, factor).to(values.dtype)


def interpolate_window_2x(
    values: torch.Tensor,
    *,
    origin: tuple[int, int],
    size: tuple[int, int],
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> torch.Tensor:
    """
    A window of F.interpolate(whole, scale_factor=2, mode="bilinear", align_corners=True), from a window of `whole`.

    Of n positions, output i is read at i (n - 1) / (2n - 1), so the weights depend on the place in the whole. They are
    rounded as F.interpolate rounds them, to float32: the exact ones differ from its by 2e-4 at n = 1500, and tiles
    would show.

    Args:
        values: (B, C, H, W) float, a window of the whole.
        origin: row and column of `values[..., 0, 0]` in the whole.
        size: height and width of the whole.
        rows: first row of the output's window and the one after its last.
        columns: the same for columns.
    Returns:
        (B, C, rows, columns), dtype of `values`.
    """
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    window = values.to(dtype)
    for dim, first, count, (start, stop) in ((2, origin[0], size[0], rows), (3, origin[1], size[1], columns)):
        numerator, denominator = torch.tensor([count - 1, 2 * count - 1], dtype=dtype)
        source = torch.arange(start, stop, dtype=dtype) * (numerator / denominator)
        lower = source.long()
        weight = (source - lower).to(values.device).unflatten(0, (-1,) + (1,) * (3 - dim))
        upper = (lower + 1).clamp_max(count - 1)
        lower, upper = (lower - first).to(values.device), (upper - first).to(values.device)
        window = torch.lerp(window.index_select(dim, lower), window.index_select(dim, upper), weight)
    return window.to(values.dtype)
