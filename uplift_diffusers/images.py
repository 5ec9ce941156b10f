"""The input boundary: whatever a person calls an image becomes one kind of tensor, and goes back as it came."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from uplift_diffusers.image_files import turn_upright

ImageInput = Image.Image | np.ndarray | torch.Tensor | list[Image.Image] | list[np.ndarray] | list[torch.Tensor]


@dataclass(frozen=True)
class Picture:
    """
    One image.

    Args:
        color: (3, H, W) float32 in [0, 1].
        alpha: (1, H, W) float32 in [0, 1], or None.
        mode: the PIL mode to give back: L, LA, RGB, RGBA or I;16.
    """

    color: torch.Tensor
    alpha: torch.Tensor | None = None
    mode: str = "RGB"

    @property
    def height(self) -> int:
        return self.color.shape[1]

    @property
    def width(self) -> int:
        return self.color.shape[2]

    def to_pil(self) -> Image.Image:
        """As an image of the mode it came in: greyscale stays greyscale, alpha is kept, 16-bit stays 16-bit."""
        return assemble_pil([self.color], (self.height, self.width), alpha=self.alpha, mode=self.mode)

    def to_tensor(self) -> torch.Tensor:
        """(3, H, W), or (4, H, W) with alpha, float32 in [0, 1]."""
        return self.color if self.alpha is None else torch.cat([self.color, self.alpha])


def assemble_pil(
    strips: Iterable[torch.Tensor], size: tuple[int, int], *, alpha: torch.Tensor | None = None, mode: str = "RGB"
) -> Image.Image:
    """
    The image of a [`Picture`] whose colour comes in strips, from top to bottom, so that it never is there as floats.

    Args:
        strips: (3, rows, W) each, as `Picture.color`.
        size: height and width.
        alpha, mode: as those of the picture.
    """
    image = Image.new(mode, size[::-1])
    top = 0
    for strip in strips:
        for rows in strip.split(256, dim=1):
            bottom = top + rows.shape[1]
            rows_alpha = None if alpha is None else alpha[:, top:bottom]
            image.paste(_strip_to_pil(rows, rows_alpha, mode), (0, top))
            top = bottom
    return image


def read_pictures(image: ImageInput) -> list[Picture]:
    """
    Read one image or several.

    Args:
        image: a PIL image (any mode; EXIF orientation is applied); an array (H, W), (H, W, C) or (B, H, W, C); a
            tensor (C, H, W) or (B, C, H, W); or a list of these. C is 1, 3, or 4 (with alpha). Floats are in [0, 1],
            integers span their type (uint8, uint16).
    Raises:
        TypeError: something else.
        ValueError: empty, a shape that is no image, values that are not finite or out of range.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("`image` must hold at least one image, got an empty list.")
        return [picture for item in image for picture in read_pictures(item)]
    if isinstance(image, Image.Image):
        return [_from_pil(image)]
    if isinstance(image, np.ndarray):
        batch = image if image.ndim == 4 else image[None]
        batch = batch[..., None] if batch.ndim == 3 else batch  # greyscale (H, W)
        return [_from_array(item) for item in batch]
    if isinstance(image, torch.Tensor):
        batch = image if image.ndim == 4 else image[None]
        if batch.ndim != 4:
            raise ValueError(f"`image` must be (C, H, W) or (B, C, H, W), got {tuple(image.shape)}.")
        return [
            _from_array(
                item.permute(1, 2, 0).float().cpu().numpy()
                if item.is_floating_point()
                else item.permute(1, 2, 0).cpu().numpy()
            )
            for item in batch
        ]
    raise TypeError(f"`image` must be a PIL image, an array, a tensor or a list of these, got {type(image).__name__}.")


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (B, C, H, W) in [0, 1] to `size` (height, width) by antialiased bicubic interpolation, clamped."""
    if tuple(image.shape[2:]) == tuple(size):
        return image
    return interpolate(image, size).clamp(0, 1)


def read_batch(image: ImageInput) -> torch.Tensor:
    """
    Read images of one size as (B, 3, H, W) in [0, 1], without their alpha.

    Raises:
        TypeError, ValueError: as `read_pictures`; or sizes differ.
    """
    colors = [picture.color for picture in read_pictures(image)]
    sizes = {tuple(color.shape[1:]) for color in colors}
    if len(sizes) > 1:
        raise ValueError(f"`image` must hold images of one size, got {sorted(sizes)} (height, width).")
    return torch.stack(colors)


def interpolate(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (B, C, H, W) to `size` (height, width) by antialiased bicubic interpolation, not clamped."""
    return F.interpolate(image, size=size, mode="bicubic", antialias=True)


def pad_to_multiple(image: torch.Tensor, factor: int) -> torch.Tensor:
    """Extend (B, C, H, W) to the right and below, by its last pixels, to whole multiples of `factor`."""
    height, width = image.shape[2:]
    return F.pad(image, (0, -width % factor, 0, -height % factor), mode="replicate")


def _from_pil(image: Image.Image) -> Picture:
    image = turn_upright(image)
    if image.mode.startswith("I"):  # I, I;16, I;16B, ...: 16-bit greyscale; PIL's own conversion would clip it
        values = np.asarray(image).astype(np.int64)
        if values.size and not 0 <= values.min() <= values.max() <= 65535:
            raise ValueError(
                f"`image` of PIL mode {image.mode} must have 16-bit values, got {values.min()} to {values.max()}. "
                "Pass an array in [0, 1]."
            )
        return _from_array(values.astype(np.uint16))
    if image.mode == "F":
        raise ValueError(
            "`image` must have integer pixels, got PIL mode F, whose range is unknown. Pass an array in [0, 1]."
        )
    transparent = image.has_transparency_data
    grey = image.mode in ("1", "L", "LA", "La")
    mode = ("LA" if transparent else "L") if grey else ("RGBA" if transparent else "RGB")
    # PIL knows the way from every mode to these; premultiplied alpha has to be taken off first.
    image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))
    if mode == "LA" and image.mode != "LA":
        image = image.convert("RGBA").convert("LA")
    return _from_array(np.asarray(image.convert(mode)))


def _from_array(array: np.ndarray) -> Picture:
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"`image` must be (H, W, C) with 1, 3 or 4 channels and at least one pixel, got {array.shape}."
        )
    if array.dtype == np.uint8:
        values = torch.from_numpy(array.astype(np.float32) / 255)
    elif array.dtype == np.uint16:
        values = torch.from_numpy(array.astype(np.float32) / 65535)
    elif np.issubdtype(array.dtype, np.floating):
        values = torch.from_numpy(array.astype(np.float32))
        # A rounding error beyond the range, as resizing leaves it, is no reason to refuse an image.
        if not torch.isfinite(values).all() or values.min() < -1e-3 or values.max() > 1 + 1e-3:
            raise ValueError(
                f"`image` must have finite values in [0, 1], got {values.min():.4g} to {values.max():.4g}. "
                "Divide 8-bit values by 255."
            )
        values = values.clamp(0, 1)
    else:
        raise ValueError(f"`image` must be uint8, uint16 or float, got {array.dtype}.")
    values = values.permute(2, 0, 1)  # (C, H, W)
    has_alpha = values.shape[0] in (2, 4)
    color = values[:-1] if has_alpha else values
    alpha = values[-1:] if has_alpha else None
    if color.shape[0] == 3:
        mode = "RGBA" if has_alpha else "RGB"
    else:
        mode = "LA" if has_alpha else ("I;16" if array.dtype == np.uint16 else "L")
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
