"""Conversion of PIL images of every mode, orientation and kind of transparency to a few modes."""

import io

import numpy as np
from PIL import Image

MODES = ("L", "LA", "RGB", "RGBA", "I;16")
"""The resulting PIL modes: greyscale or colour, with or without alpha, and 16-bit greyscale."""

DEEP_GREY_WITH_ALPHA = "its 16-bit grey becomes 8-bit, because it has transparency."
DEEP_COLOR = "its 16-bit colour becomes 8-bit."

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that makes an image upright, by EXIF orientation. Pillow rotates anticlockwise."""


def lay_on_white(image: Image.Image) -> Image.Image:
    """An LA or RGBA image composited on white, as L or RGB; other images unchanged."""
    if image.mode not in ("LA", "RGBA"):
        return image
    paper = Image.new(image.mode.removesuffix("A"), image.size, "white")
    paper.paste(image.convert(paper.mode), mask=image.getchannel("A"))
    return paper


def to_eight_bits(values: np.ndarray) -> np.ndarray:
    """16-bit values (H, ...) -> uint8, rounded."""
    rounded = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), 64):  # in strips, which stay in the processor's cache
        rounded[top : top + 64] = values[top : top + 64].astype(np.uint32) * 255 + 32895 >> 16  # round(values / 257)
    return rounded


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image rotated and mirrored according to an EXIF orientation from 1 to 8."""
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


def to_common_mode(
    image: Image.Image, *, color_key: int | tuple[int, ...] | None = None, icc_profile: bytes | None = None
) -> tuple[Image.Image, tuple[str, ...]]:
    """
    Convert an image to one of `MODES`.

    Args:
        image: a PIL image of any mode.
        color_key: the transparent grey value or colour, in the image's levels.
        icc_profile: the profile for the conversion of CMYK to sRGB.
    Returns:
        The image, and messages on what is only approximate or lost.
    Raises:
        ValueError: the pixels are floats, or integers that are not 16-bit values.
    """
    mode = image.mode
    if mode == "F":
        raise ValueError("`image` must have 8- or 16-bit pixels, got floating-point ones (PIL mode F), whose range is "
                         "unknown. Pass an array in [0, 1].")  # fmt: skip
    if mode.startswith("I"):  # I, I;16, I;16B, ...: PIL's own conversion to 8 bits would clip it
        values = np.asarray(image)
        if mode == "I" and not 0 <= values.min() <= values.max() <= 65535:
            raise ValueError(
                f"`image` of PIL mode I must have 16-bit values, got {values.min()} to {values.max()}. "
                "Pass an array in [0, 1]."
            )
        values = values.astype(np.uint16)
        if color_key is None:
            return Image.fromarray(values), ()
        image = Image.fromarray(to_eight_bits(values))
        image.putalpha(Image.fromarray(np.where(values == color_key, 0, 255).astype(np.uint8)))
        return image, (DEEP_GREY_WITH_ALPHA,)
    if mode == "CMYK":
        return _cmyk_to_rgb(image, icc_profile)
    if mode in ("1", "L", "RGB", "RGBX"):
        image = image.convert("L" if mode in ("1", "L") else "RGB")
        if color_key is not None:
            values = np.asarray(image)
            values = values[..., None] if values.ndim == 2 else values  # (H, W, channels)
            image.putalpha(Image.fromarray(np.where((values == color_key).all(axis=2), 0, 255).astype(np.uint8)))
        return image, ()
    if mode in ("La", "LA"):
        return image.convert("LA"), ()
    return image.convert("RGBA" if mode == "RGBa" or image.has_transparency_data else "RGB"), ()


def _cmyk_to_rgb(image: Image.Image, icc_profile: bytes | None) -> tuple[Image.Image, tuple[str, ...]]:
    if icc_profile:
        try:
            from PIL import ImageCms

            profile, srgb = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
            assert converted is not None  # as it is only where a picture is converted in place
            return converted, ()
        except Exception:  # no colour management in this Pillow, or a profile that it cannot use, in many ways
            why = "with an unusable colour profile"
    else:
        why = "without a colour profile"
    return image.convert("RGB"), (f"it is CMYK {why}: its colours are approximate.",)
