"""Conversion of PIL images, arrays and tensors to one kind of tensor, and back to the original kind."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, TiffImagePlugin

from uplift_diffusers.images.compression import jpeg_quality
from uplift_diffusers.images.exif import ORIENTATION, parse_exif
from uplift_diffusers.images.modes import to_common_mode, turn_upright

ImageInput = Image.Image | np.ndarray | torch.Tensor | list[Image.Image] | list[np.ndarray] | list[torch.Tensor]

_TENSOR_DTYPES = (torch.uint8, torch.uint16, torch.float16, torch.bfloat16, torch.float32, torch.float64)


_GROWTH_PX = 4
"""Pixels that the visible part grows by at every size, see [`fill_transparent`]."""


@dataclass(frozen=True)
class Picture:
    """
    One image.

    Args:
        color: (3, H, W) float32 in [0, 1].
        alpha: (1, H, W) float32 in [0, 1], or None.
        mode: the PIL mode of the output: L, LA, RGB, RGBA or I;16.
        jpeg_quality: quality of the JPEG file that it was opened from, or None; see [`jpeg_quality`].
    """

    color: torch.Tensor
    alpha: torch.Tensor | None = None
    mode: str = "RGB"
    jpeg_quality: int | None = None

    @property
    def height(self) -> int:
        return self.color.shape[1]

    @property
    def width(self) -> int:
        return self.color.shape[2]

    def to_pil(self) -> Image.Image:
        """As an image of the original mode: greyscale stays greyscale, alpha is kept, 16-bit stays 16-bit."""
        return assemble_pil([self.color], (self.height, self.width), alpha=self.alpha, mode=self.mode)

    def to_tensor(self) -> torch.Tensor:
        """(3, H, W), or (4, H, W) with alpha, float32 in [0, 1]."""
        return self.color if self.alpha is None else torch.cat([self.color, self.alpha])


def assemble_pil(
    strips: Iterable[torch.Tensor], size: tuple[int, int], *, alpha: torch.Tensor | None = None, mode: str = "RGB"
) -> Image.Image:
    """
    The image of a [`Picture`] with colour given in strips, from top to bottom, to avoid holding it all as floats.

    Args:
        strips: (3, rows, W) each, as `Picture.color`.
        size: (height, width).
        alpha, mode: as in `Picture`.
    """
    image = Image.new(mode, (size[1], size[0]))
    top = 0
    for strip in strips:
        for rows in strip.split(256, dim=1):
            bottom = top + rows.shape[1]
            rows_alpha = None if alpha is None else alpha[:, top:bottom]
            image.paste(_strip_to_pil(rows, rows_alpha, mode), (0, top))
            top = bottom
        del strip, rows  # the next strip is computed without this one in memory
    return image


def read_pictures(image: ImageInput) -> list[Picture]:
    """
    Read one or several images.

    Args:
        image: a PIL image (any mode of at most 16 bits; EXIF orientation is applied); an array (H, W), (H, W, C) or
            (B, H, W, C); a tensor (C, H, W) or (B, C, H, W); or a list of these. C is 1 (grey), 2 (grey and alpha), 3
            (RGB) or 4 (RGB and alpha). Floats of 16, 32 or 64 bits are in [0, 1]; uint8 and uint16 span their type.
    Raises:
        TypeError: `image` is something else, such as a nested list; has another dtype; is a masked array; or is a
            sparse, quantized or nested tensor or one on the device "meta".
        ValueError: `image` is empty, has a wrong shape, or values that are not finite or out of range.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("`image` must hold at least one image, got an empty list.")
        return [picture for item in image for picture in _read(item, " in a list")]
    return _read(image)


def read_batch(image: ImageInput) -> torch.Tensor:
    """
    Read images of one size as (B, 3, H, W) in [0, 1]; transparency is composited on white.

    Raises:
        TypeError, ValueError: as `read_pictures`; or the sizes differ.
    """
    pictures = read_pictures(image)
    sizes = {(picture.height, picture.width) for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"`image` must hold images of one size, got {sorted(sizes)} (height, width).")
    return torch.stack(
        [picture.color if picture.alpha is None else 1 - picture.alpha * (1 - picture.color) for picture in pictures]
    )


def fill_transparent(color: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """
    Give transparent pixels the colours of the nearest visible ones, so an interpolation or a network does not blend
    hidden colours into visible edges.

    The visible part is grown by a few pixels, then the same is done to the image at half the size, and so on; pixels
    that are still hidden are filled from there.

    Args:
        color: (3, H, W) in [0, 1].
        alpha: (1, H, W) in [0, 1]; 0 is transparent.
    Returns:
        (3, H, W): `color` where `alpha` is above 0, the filled colours elsewhere.
    Source: after the push-pull pyramid of Gortler et al., The Lumigraph, SIGGRAPH 1996, section 3.4.
    """
    seen = alpha[0] > 0
    if seen.all() or not seen.any():
        return color
    return _fill(color.clone(), seen)


def _fill(color: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """(3, H, W), which is filled in place, and its mask (H, W) with at least one True -> (3, H, W)."""
    for _ in range(_GROWTH_PX):
        if seen.all():
            return color
        seen = _grow(color, seen)
    weight = F.avg_pool2d(seen[None].float(), 2, ceil_mode=True)
    half = F.avg_pool2d(color * seen, 2, ceil_mode=True) / weight.clamp_min(1e-6)
    half = _fill(half, weight[0] > 0)
    return torch.where(seen, color, F.interpolate(half[None], size=color.shape[1:], mode="bilinear")[0])


def _grow(color: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Give hidden pixels next to visible ones the mean of these, in place, and return the new mask."""
    rows = seen.clone()
    rows[:, 1:] |= seen[:, :-1]
    rows[:, :-1] |= seen[:, 1:]
    grown = rows.clone()
    grown[1:] |= rows[:-1]
    grown[:-1] |= rows[1:]
    y, x = (grown & ~seen).nonzero(as_tuple=True)  # (n,)
    total, weight = color.new_zeros(3, len(y)), color.new_zeros(len(y))
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            beside_y, beside_x = (y + down).clamp(0, seen.shape[0] - 1), (x + right).clamp(0, seen.shape[1] - 1)
            is_seen = seen[beside_y, beside_x].to(color.dtype)
            total += color[:, beside_y, beside_x] * is_seen
            weight += is_seen
    color[:, y, x] = total / weight
    return grown


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (B, C, H, W) in [0, 1] to `size` (height, width) by antialiased bicubic interpolation, clamped."""
    if tuple(image.shape[2:]) == tuple(size):
        return image
    return interpolate(image, size).clamp(0, 1)


def interpolate(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (B, C, H, W) to `size` (height, width) by antialiased bicubic interpolation, not clamped."""
    if size[1] == 1:  # where the antialiasing of PyTorch 2.14 repeats the first row
        return F.interpolate(image.mT, size=size[::-1], mode="bicubic", antialias=True).mT
    return F.interpolate(image, size=size, mode="bicubic", antialias=True)


def missing_detail(image: torch.Tensor, enlarged: torch.Tensor) -> torch.Tensor:
    """
    The difference between an image x and its downsampled upscaling y, upsampled: up(x - reduce(y)).

    Both interpolations are bicubic, and `reduce` is antialiased. Each reaches two pixels of x to each side.

    Args:
        image: x, (B, 3, H, W).
        enlarged: y, (B, 3, s * H, s * W) for an integer s.
    Returns:
        (B, 3, s * H, s * W).
    """
    missing = image.to(enlarged) - interpolate(enlarged, (image.shape[2], image.shape[3]))
    return F.interpolate(missing, size=(enlarged.shape[2], enlarged.shape[3]), mode="bicubic")


def pad_to_multiple(image: torch.Tensor, factor: int) -> torch.Tensor:
    """Pad (B, C, H, W) at the right and bottom with its edge pixels to multiples of `factor`."""
    height, width = image.shape[2:]
    return F.pad(image, (0, -width % factor, 0, -height % factor), mode="replicate")


def _read(image: object, where: str = "") -> list[Picture]:
    if isinstance(image, Image.Image):
        return [_from_pil(image)]
    if isinstance(image, np.ma.MaskedArray):
        raise TypeError("`image` must be an array without a mask, got a masked one. Pass image.filled(0).")
    if isinstance(image, np.ndarray):
        array = np.asarray(image)  # a matrix keeps two dimensions whatever is done to it
        batch = array if array.ndim == 4 else array[None]
        batch = batch[..., None] if batch.ndim == 3 else batch  # greyscale (H, W)
        _check_shape(batch.shape, array.shape, "(H, W, C)", channels_last=True)
        return [_from_array(item) for item in batch]
    if isinstance(image, torch.Tensor):
        _check_tensor(image)
        batch = image if image.ndim == 4 else image[None]
        if batch.ndim != 4:
            raise ValueError(
                f"`image` must be (C, H, W) or (B, C, H, W), got {tuple(image.shape)}."
                + (" Pass image[None] if it is greyscale." if image.ndim == 2 else "")
            )
        batch = batch.detach().permute(0, 2, 3, 1)  # (B, H, W, C)
        _check_shape(batch.shape, tuple(image.shape), "(C, H, W)", channels_last=False)
        batch = batch.float() if batch.is_floating_point() else batch
        return [_from_array(item.resolve_neg().cpu().numpy()) for item in batch]
    raise TypeError(
        f"`image` must be a PIL image, an array, a tensor or a list of these, got {type(image).__name__}{where}."
    )


def _check_tensor(image: torch.Tensor) -> None:
    if image.is_nested:
        raise TypeError("`image` must be a tensor, got a nested one. Pass a list of tensors.")
    if image.layout != torch.strided:
        raise TypeError(f"`image` must be a dense tensor, got {image.layout}. Pass image.to_dense().")
    if image.is_meta:
        raise TypeError("`image` must be a tensor with values, got one on the device meta, which has none.")
    if image.dtype not in _TENSOR_DTYPES:
        _refuse_dtype(str(image.dtype).removeprefix("torch."))


def _refuse_dtype(name: str) -> None:
    hint = "Pass 8-bit values as uint8, 16-bit ones as uint16, or floats in [0, 1]."
    if name == "bool":
        hint = "Multiply by 255 and pass uint8."
    elif name.startswith("complex"):
        hint = "Pass its real part."
    raise TypeError(f"`image` must be uint8, uint16 or float of 16, 32 or 64 bits, got {name}. {hint}")


def _check_shape(batch: tuple[int, ...], given: tuple[int, ...], wanted: str, *, channels_last: bool) -> None:
    """Raise ValueError unless `batch` is a shape (B, H, W, C) of images; `given` is the shape in the message."""
    is_image = len(batch) == 4 and batch[3] in (1, 2, 3, 4)
    if is_image and 0 not in batch:
        return
    if is_image:
        raise ValueError(f"`image` must have at least one pixel, got {tuple(given)}.")
    # Where the channels are, if not where they belong: first instead of last, or last instead of first.
    other = (given[-3] if channels_last else given[-1]) if len(given) in (3, 4) else 0
    hint = ""
    if other in (1, 2, 3, 4):
        if channels_last:
            hint = f" Its channels seem to come first: pass np.moveaxis(image, {len(given) - 3}, -1)."
        else:
            axes = "2, 0, 1" if len(given) == 3 else "0, 3, 1, 2"
            hint = f" Its channels seem to come last: pass image.permute({axes})."
    raise ValueError(
        f"`image` must be {wanted} or (B, {wanted[1:]} with 1, 2, 3 or 4 channels, got {tuple(given)}.{hint}"
    )


def _from_pil(image: Image.Image) -> Picture:
    tiles = getattr(image, "tile", None)  # of a file that is not read yet
    rawmode = tiles[0][3] if tiles else image.mode
    try:
        image.load()
    except Exception as error:  # what a decoder raises at a damaged file depends on the format and the damage
        raise ValueError(f"`image` must be an image that loads, got one that does not: {error}") from error
    if 0 in image.size:
        raise ValueError(f"`image` must have at least one pixel, got {image.size}.")
    common, _ = to_common_mode(image, color_key=_color_key(image, rawmode), icc_profile=image.info.get("icc_profile"))
    picture = _from_array(np.asarray(turn_upright(common, _orientation(image))))
    return replace(picture, jpeg_quality=jpeg_quality(image))


def _color_key(image: Image.Image, rawmode: object) -> int | tuple[int, ...] | None:
    """The transparent value of an image without a palette, in the file's levels, as Pillow has it."""
    key = image.info.get("transparency")
    if image.mode == "1" and isinstance(key, int):
        return 255 if key else 0
    if image.mode == "L" and isinstance(key, int) and image.format == "PNG":
        key *= {"L;2": 85, "L;4": 17}.get(str(rawmode), 1)
    if image.mode in ("L", "I", "I;16", "I;16B") and isinstance(key, int):
        return key
    return tuple(key) if image.mode == "RGB" and isinstance(key, tuple) and len(key) == 3 else None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8. An orientation in XMP is ignored, as in browsers."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1  # Pillow has turned it
    try:
        if data := image.info.get("exif"):
            return parse_exif(data).orientation
        if "xmp" not in image.info and "XML:com.adobe.xmp" not in image.info:
            value = image.getexif().get(ORIENTATION, 1)
            return value if value in range(1, 9) else 1
    except Exception:  # damaged data turn nothing
        pass
    return 1


def _from_array(array: np.ndarray) -> Picture:
    """(H, W) or (H, W, C)."""
    array = array[..., None] if array.ndim == 2 else array
    is_integer = array.dtype.kind == "u" and array.dtype.itemsize <= 2
    if is_integer:
        values = torch.from_numpy(array.astype(np.float32) / np.iinfo(array.dtype).max)
    elif array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            values = torch.from_numpy(array.astype(np.float32))
        # Rounding errors beyond the range, such as those of a resize, are accepted.
        if not torch.isfinite(values).all() or values.min() < -1e-3 or values.max() > 1 + 1e-3:
            hint = "Divide 8-bit values by 255." if values.max() > 1 else "Shift and scale them, or clip them."
            raise ValueError(
                f"`image` must have finite values in [0, 1], got {values.min():.4g} to {values.max():.4g}. {hint}"
            )
        values = values.clamp(0, 1)
    else:
        _refuse_dtype(str(array.dtype))
    values = values.permute(2, 0, 1)  # (C, H, W)
    has_alpha = values.shape[0] in (2, 4)
    color = values[:-1] if has_alpha else values
    alpha = values[-1:] if has_alpha else None
    if color.shape[0] == 3:
        mode = "RGBA" if has_alpha else "RGB"
    else:
        mode = "LA" if has_alpha else ("I;16" if is_integer and array.dtype.itemsize == 2 else "L")
    return Picture(color.expand(3, -1, -1).contiguous(), alpha, mode)


def _strip_to_pil(color: torch.Tensor, alpha: torch.Tensor | None, mode: str) -> Image.Image:
    color = color.mean(dim=0, keepdim=True) if mode in ("L", "LA", "I;16") else color
    if mode == "I;16":
        return Image.fromarray(_quantize(color[0], 65535).astype(np.uint16))
    channels = color if alpha is None else torch.cat([color, alpha])
    array = _quantize(channels, 255).astype(np.uint8).transpose(1, 2, 0)  # (H, W, channels)
    return Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)


def _quantize(values: torch.Tensor, levels: int) -> np.ndarray:
    return (values.clamp(0, 1) * levels).round().cpu().numpy()
