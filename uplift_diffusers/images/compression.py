"""Estimate a JPEG's compression from its quantisation tables."""

from collections.abc import Mapping, Sequence

from PIL import Image

_LUMINANCE_SUM = 3688
"""Sum of the luminance table in annex K of the JPEG standard (ITU-T T.81), which corresponds to quality 50."""

CLEAN_QUALITY, POOREST_QUALITY = 100, 30
"""Qualities that correspond to a `denoise` of 0 and of 1, as in training."""


def jpeg_quality(image: Image.Image) -> int | None:
    """
    The quality, from 1 to 100 on libjpeg's scale, with which the file of `image` was saved; None if it was not
    opened from a JPEG, by Pillow or by `open_image`, or was changed since.

    libjpeg scales the standard's tables, and the sum of the luminance table determines the scale. For tables of other
    programs, this is the quality with the same sum.
    """
    tables: Mapping[int, Sequence[int]] | None = getattr(image, "quantization", None)
    if not tables:
        return None
    total = sum(tables[min(tables)])
    if total <= 64:  # all entries are 1, the smallest possible
        return 100
    scale = 100 * total / _LUMINANCE_SUM
    quality = 100 - scale / 2 if scale <= 100 else 5000 / scale
    return min(max(round(quality), 1), 100)


def denoise_for_quality(quality: int | None) -> float:
    """The `denoise` for an image from a JPEG of a quality: linear from 0 at 100 to 1 at 30; 0 for None."""
    if quality is None:
        return 0.0
    return min(max((CLEAN_QUALITY - quality) / (CLEAN_QUALITY - POOREST_QUALITY), 0.0), 1.0)


def consistency_for_denoise(denoise: float) -> float:
    """
    The factor of `consistency` for an input that is denoised: 1 at 0, falling to 0 at 0.1 (quality 93).

    With a compressed input, consistency would add the removed artefacts again.
    """
    return max(0.0, 1 - 10 * denoise)
