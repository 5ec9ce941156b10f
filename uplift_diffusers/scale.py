"""The scale of an upscaling: what is allowed, and the 2x steps it takes."""

import math

MAX_SCALE = 16


def check_scale(scale: float) -> None:
    """Raise TypeError or ValueError unless `scale` is a number from 1 to 16."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"`scale` must be a number, got {type(scale).__name__}.")
    if not 1 <= scale <= MAX_SCALE:  # False for NaN too
        raise ValueError(f"`scale` must be from 1 to {MAX_SCALE}, got {scale}.")


def num_steps_for_scale(scale: float, *, latent_output: bool = False) -> int:
    """
    The number of 2x steps that reach `scale` or overshoot it.

    Args:
        scale: any real number from 1 to 16.
        latent_output: latents are asked for, which exist at powers of two alone.
    Returns:
        ceil(log2(scale)): 0 for 1, 1 up to 2, 2 up to 4, ...
    Raises:
        TypeError: not a number.
        ValueError: out of range, NaN, or no power of two where one is needed.
    """
    check_scale(scale)
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
