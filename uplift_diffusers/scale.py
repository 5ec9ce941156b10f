"""Upscaling factors: the allowed range, the number of 2x steps, and the scale for a requested output size."""

import math
from typing import TYPE_CHECKING

from uplift_diffusers.arguments import read_number, read_whole_number

if TYPE_CHECKING:
    import torch

MAX_SCALE = 16
MAX_MEGAPIXELS = 1e6


def read_scale(scale: float) -> float:
    """`scale` as a float. Raise TypeError or ValueError unless it is a number from 1 to 16."""
    return read_number("scale", scale, minimum=1, maximum=MAX_SCALE)


def num_steps_for_scale(scale: float) -> int:
    """
    The smallest number of 2x steps that reaches `scale`.

    Args:
        scale: any real number from 1 to 16.
    Returns:
        ceil(log2(scale)): 0 for 1, 1 up to 2, 2 up to 4, ...
    Raises:
        TypeError: `scale` is not a number.
        ValueError: `scale` is out of range or NaN.
    """
    return math.ceil(math.log2(read_scale(scale)))


def size_of(picture: "torch.Tensor") -> tuple[int, int]:
    """Height and width of (..., H, W)."""
    height, width = picture.shape[-2:]
    return height, width


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) times `scale`, each rounded to the nearest whole pixel and at least 1."""
    scale = float(scale)  # a float32 would round large sizes
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def resolve_scale(
    size: tuple[int, int],
    *,
    scale: float | None = None,
    width: int | None = None,
    height: int | None = None,
    megapixels: float | None = None,
    long_side: int | None = None,
) -> float:
    """
    The scale for an output size, given in one of four ways.

    Args:
        size: (height, width) of the image in pixels.
        scale: from 1 to 16, returned unchanged.
        width, height: output size in pixels. `scaled_size` then gives exactly that width or that height; with both,
            the largest size with the image's aspect ratio that fits.
        megapixels: output size in millions of pixels, up to the rounding of the edges.
        long_side: the output's longer edge in pixels, exact.
    Returns:
        The scale, from 1 to 16.
    Raises:
        TypeError: a value is not a number, or not a whole number of pixels.
        ValueError: none or several of the four are given, or the scale would be below 1 or above 16.
    """
    ways = {"scale": scale, "megapixels": megapixels, "long_side": long_side}
    given = [name for name, value in ways.items() if value is not None]
    given += ["width/height"] if width is not None or height is not None else []
    if len(given) != 1:
        raise ValueError(
            "Exactly one of `scale`, `width` and `height`, `megapixels` or `long_side` must be given, "
            f"got {', '.join(given) or 'none'}."
        )
    if scale is not None:
        return read_scale(scale)
    if megapixels is not None:
        megapixels = read_number("megapixels", megapixels, minimum=0, maximum=MAX_MEGAPIXELS)
        return _in_range(math.sqrt(megapixels * 1e6 / (size[0] * size[1])), size, f"{megapixels:g} megapixels")
    if long_side is not None:
        long_side = read_whole_number("long_side", long_side)
        return _in_range(long_side / max(size), size, f"a long side of {long_side} pixels")
    height = None if height is None else read_whole_number("height", height)
    width = None if width is None else read_whole_number("width", width)
    scales = ([] if height is None else [height / size[0]]) + ([] if width is None else [width / size[1]])
    wanted = " and ".join(f"a {name} of {value}" for name, value in (("width", width), ("height", height)) if value)
    return _in_range(min(scales), size, f"{wanted} pixels")


def check_output_size(
    size: tuple[int, int], scale: float, *, max_pixels: int, max_edge: int | None = None, kind: str = "file"
) -> None:
    """
    Reject an output that would be too large, before any work.

    Args:
        size: (height, width) of the image in pixels.
        scale: from 1 to 16.
        max_pixels: limit on the upscaled image before it is downsampled, at the next power of two of the scale.
        max_edge: longest edge in pixels that the output format allows; None for no limit.
        kind: name of the format, for the error message.
    Raises:
        ValueError: the output would be larger.
    """
    num_steps = num_steps_for_scale(scale)
    height, width = (edge * 2**num_steps for edge in size)
    if num_steps and width * height > max_pixels:
        raise ValueError(
            f"{size[1]} x {size[0]} pixels would be upscaled to {width} x {height}, "
            f"more than the limit of {max_pixels / 1e6:g} megapixels."
        )
    height, width = scaled_size(size, scale)
    if max_edge is not None and max(width, height) > max_edge:
        raise ValueError(f"the output of {width} x {height} pixels has an edge over the {max_edge} of a {kind}.")


def _in_range(scale: float, size: tuple[int, int], wanted: str) -> float:
    scale = next((limit for limit in (1.0, float(MAX_SCALE)) if math.isclose(scale, limit, rel_tol=1e-12)), scale)
    if not 1 <= scale <= MAX_SCALE:
        rule = "smaller than the image" if scale < 1 else f"more than {MAX_SCALE} times as large"
        raise ValueError(f"{wanted} requested for an image of {size[1]} x {size[0]} pixels, which is {rule}.")
    return scale
