"""How strongly a JPEG was compressed, read off its quantisation tables."""

from collections.abc import Mapping, Sequence

from PIL import Image

_LUMINANCE_SUM = 3688
"""Sum of the table for luminance in annex K of the JPEG standard (ITU-T T.81), which quality 50 stands for."""

CLEAN_QUALITY, POOREST_QUALITY = 100, 30
"""Qualities that stand for a `denoise` of 0 and of 1: those that upsamplers are trained with."""


def jpeg_quality(image: Image.Image) -> int | None:
    """
    The quality, from 1 to 100 on the scale of libjpeg, with which the file of `image` was saved; None if it was not
    opened from a JPEG, by Pillow or by `open_image`, or was changed since.

    libjpeg scales the standard's tables; how much follows from the sum of the table for luminance. Tables of other
    programs get the quality whose table has the same sum.
    """
    tables: Mapping[int, Sequence[int]] | None = getattr(image, "quantization", None)
    if not tables:
        return None
    total = sum(tables[min(tables)])
    if total <= 64:  # all of them are 1, the smallest that there is
        return 100
    scale = 100 * total / _LUMINANCE_SUM
    quality = 100 - scale / 2 if scale <= 100 else 5000 / scale
    return min(max(round(quality), 1), 100)


def denoise_for_quality(quality: int | None) -> float:
    """The `denoise` that suits a picture from a JPEG of a quality, 0 for None: linear between 100 and 30."""
    if quality is None:
        return 0.0
    return min(max((CLEAN_QUALITY - quality) / (CLEAN_QUALITY - POOREST_QUALITY), 0.0), 1.0)


def consistency_for_denoise(denoise: float) -> float:
    """
    How much of the consistency with an input is left that is denoised: 1 for 0, none from 0.1 (quality 93) on.

    What a compressed input has and its cleaned enlargement lacks are the traces of compression.
    """
    return max(0.0, 1 - 10 * denoise)
