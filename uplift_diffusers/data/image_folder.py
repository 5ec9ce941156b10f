"""A folder of photographs as training crops whose order and content follow from a seed alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from uplift_diffusers.image_files import INPUT_SUFFIXES, find_image_files, open_image


def find_images(folder: str | Path) -> list[Path]:
    """Image files below `folder`, sorted by path. Raises FileNotFoundError if there is no folder or no image in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"`{folder}` is not a folder.")
    paths = find_image_files(folder)
    if not paths:
        raise FileNotFoundError(f"No images below `{folder}`. Known are: {', '.join(sorted(INPUT_SUFFIXES))}.")
    return paths


class ImageFolder(Dataset):
    """
    Square RGB crops of the photographs below a folder.

    An item is asked for as `(epoch, index)`; its crop, scale and flip are drawn from (seed, epoch, index), so that a
    resumed run sees exactly what an uninterrupted one would have seen.

    Args:
        folder (`str` or `Path`): searched recursively.
        resolution (`int`): edge of the crops in pixels.
        random_crop (`bool`): a random crop, flipped half of the time, instead of the whole picture's centre.
        max_reduction (`float`): with `random_crop`, half of the crops are taken from a picture reduced by a factor
            drawn from 1 to this (fine detail at every scale); 1.0 keeps the original size.
        seed (`int`): see above.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resolution: int,
        random_crop: bool = True,
        max_reduction: float = 1.0,
        seed: int = 0,
    ):
        self.paths = find_images(folder)
        self.resolution = resolution
        self.random_crop = random_crop
        self.max_reduction = max_reduction
        self.seed = seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: tuple[int, int]) -> torch.Tensor:
        """(3, resolution, resolution) uint8."""
        epoch, index = item
        try:
            image = open_image(self.paths[index]).image.convert("RGB")
        except ValueError as error:
            raise ValueError(f"{self.paths[index]}: {error}") from error
        if self.random_crop:
            crop = self._random_crop(image, np.random.default_rng((self.seed, epoch, index)))
        else:
            crop = self._centre_crop(image)
        return torch.from_numpy(np.array(crop)).permute(2, 0, 1)

    def _centre_crop(self, image: Image.Image) -> Image.Image:
        edge = min(image.size)
        left, top = (image.width - edge) / 2, (image.height - edge) / 2
        return image.resize((self.resolution,) * 2, Image.BILINEAR, box=(left, top, left + edge, top + edge))

    def _random_crop(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        reduction = rng.uniform(1.0, self.max_reduction) if rng.random() < 0.5 else 1.0
        # A picture smaller than the crop is enlarged: reduction then falls below 1.
        reduction = min(reduction, min(image.size) / self.resolution)
        edge = round(self.resolution * reduction)
        left = int(rng.integers(0, image.width - edge + 1))
        top = int(rng.integers(0, image.height - edge + 1))
        crop = image.crop((left, top, left + edge, top + edge))
        if edge != self.resolution:
            crop = crop.resize((self.resolution,) * 2, Image.BICUBIC)
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return crop


class EpochSampler(Sampler[tuple[int, int]]):
    """
    Endless `(epoch, index)` pairs: every epoch a new permutation of `size`, from (seed, epoch) alone.

    Process `rank` of `world_size` takes every `world_size`-th pair; `start` is the number of pairs that all processes
    together have already consumed.
    """

    def __init__(self, size: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1):
        self.size, self.seed, self.start, self.rank, self.world_size = size, seed, start, rank, world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position, order, order_epoch = self.start + self.rank, None, None
        while True:
            epoch, place = divmod(position, self.size)
            if epoch != order_epoch:
                order, order_epoch = np.random.default_rng((self.seed, epoch)).permutation(self.size), epoch
            yield epoch, int(order[place])
            position += self.world_size
