"""The scale of an upscaling: what is allowed, and the 2x steps it takes."""

import math

from uplift_diffusers.arguments import read_number

MAX_SCALE = 16


def read_scale(scale: float) -> float:
    """`scale` as a float. Raise TypeError or ValueError unless it is a number from 1 to 16."""
    return read_number("scale", scale, minimum=1, maximum=MAX_SCALE)


def num_steps_for_scale(scale: float, *, latent_output: bool = False) -> int:
    """
    The number of 2x steps that reach `scale` or overshoot it.

    Args:
        scale: any real number from 1 to 16.
        latent_output: latents are asked for, which exist only at powers of two.
    Returns:
        ceil(log2(scale)): 0 for 1, 1 up to 2, 2 up to 4, ...
    Raises:
        TypeError: not a number.
        ValueError: out of range, NaN, or no power of two where one is needed.
    """
    scale = read_scale(scale)
    num_steps = math.ceil(math.log2(scale))
    if latent_output and scale != 2**num_steps:
        raise ValueError(
            f"`scale` must be 1, 2, 4, 8 or 16 where latents are asked for, got {scale}. "
            "Ask for an image, which is reduced from the next power of two."
        )
    return num_steps


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) times `scale`, each rounded to the nearest whole pixel and at least 1."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
