"""Typical degradations of input images: JPEG compression, noise and blur, controlled by one strength."""

import io

import numpy as np
import torch
from PIL import Image, ImageFilter

from uplift_diffusers.images.compression import CLEAN_QUALITY, POOREST_QUALITY

NOISE_DEVIATION = 10.0
"""Standard deviation of the noise at a strength of 1, in 8-bit steps."""

BLUR_RADIUS_PX = 0.8
"""Standard deviation in pixels of the Gaussian blur at a strength of 1."""

PERIOD_PX = 16
"""Edge of the blocks of a JPEG with 4:2:0 chroma. The artefacts depend on the offset of a crop to their grid."""


def degrade(
    images: torch.Tensor, *, probability: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Degrade a share of the images, each by a strength d drawn uniformly from [0, 1].

    Of the degraded images, 80 % become JPEGs of quality round(100 - 70 d) (4:2:0 chroma in three of four, else 4:4:4),
    10 % get noise or blur, and 10 % get noise or blur and then become JPEGs. The block grid of a JPEG has a random
    offset, as in a crop of a photograph.

    Args:
        images: (B, 3, H, W) in [0, 1].
        probability: share of degraded images.
        generator: source of all randomness.
    Returns:
        (B, 3, H, W), degraded images in 8-bit steps, and (B,) the strengths, 0 for unchanged images.
    """
    draws = torch.rand(len(images), 7, generator=generator).tolist()
    result, strengths = images.clone(), torch.zeros(len(images))
    for index, (chosen, strength, kind, softens, chroma, row, column) in enumerate(draws):
        if chosen >= probability:
            continue
        strengths[index] = strength
        image = _to_pixels(images[index])
        if kind < 0.2:
            image = _blur(image, strength) if softens < 0.5 else _add_noise(image, strength, generator)
        if kind >= 0.1:
            corner = int(row * PERIOD_PX), int(column * PERIOD_PX)
            quality = round(CLEAN_QUALITY + (POOREST_QUALITY - CLEAN_QUALITY) * strength)
            image = _compress(image, quality, subsampling="4:2:0" if chroma < 0.75 else "4:4:4", corner=corner)
        result[index] = _to_tensor(image, like=images)
    return result, strengths.to(images.device)


def through_jpeg(images: torch.Tensor, *, quality: int) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1] -> the same after saving as JPEG and reading with Pillow's defaults."""
    return torch.stack(
        [_to_tensor(_compress(_to_pixels(image), quality, subsampling="4:2:0"), like=images) for image in images]
    )


def _compress(pixels: np.ndarray, quality: int, *, subsampling: str, corner: tuple[int, int] = (0, 0)) -> np.ndarray:
    """(H, W, 3) after JPEG compression, placed at `corner` of the block grid and mirrored beyond its edges."""
    top, left = corner
    padded = np.pad(pixels, ((top, 0), (left, 0), (0, 0)), mode="symmetric")
    file = io.BytesIO()
    Image.fromarray(padded).save(file, "JPEG", quality=quality, subsampling=subsampling)
    with Image.open(file) as compressed:
        return np.asarray(compressed)[top:, left:]


def _blur(pixels: np.ndarray, strength: float) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(BLUR_RADIUS_PX * strength)))


def _add_noise(pixels: np.ndarray, strength: float, generator: torch.Generator) -> np.ndarray:
    noise = torch.randn(pixels.shape, generator=generator).numpy()
    return (pixels + NOISE_DEVIATION * strength * noise).round().clip(0, 255).astype(np.uint8)


def _to_pixels(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return (image * 255).round().byte().permute(1, 2, 0).cpu().contiguous().numpy()


def _to_tensor(pixels: np.ndarray, *, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).to(like) / 255
