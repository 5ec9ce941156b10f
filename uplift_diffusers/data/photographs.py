"""Photographs as training crops whose order and content follow from a seed alone."""

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Sampler

from uplift_diffusers.data.sources import Source, record_bytes
from uplift_diffusers.images.files import open_image
from uplift_diffusers.images.modes import lay_on_white, to_eight_bits

SHUFFLE_BUFFER = 256
"""Encoded photographs among which the next one of a stream is drawn; half a megabyte each, in every process."""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """
    A square of a photograph, drawn from (seed, epoch, index): a resumed run sees what an uninterrupted one would have.

    Args:
        resolution: edge of the square in pixels.
        random_crop: a random square, flipped half of the time, instead of the whole picture's centre.
        max_reduction: with `random_crop`, half of the squares are taken from a picture reduced by a factor drawn from
            1 to this (fine detail at every scale); 1.0 keeps the original size.
        augment_flip: without `random_crop`, flip half of the squares.
        seed: see above.
    """

    resolution: int
    random_crop: bool = True
    max_reduction: float = 1.0
    augment_flip: bool = False
    seed: int = 0

    def __call__(self, image: Image.Image, epoch: int, index: int) -> torch.Tensor:
        """An RGB image -> (3, resolution, resolution) uint8."""
        rng = np.random.default_rng((self.seed, epoch, index))
        square = self._random(image, rng) if self.random_crop else self._centre(image)
        if (self.random_crop or self.augment_flip) and rng.random() < 0.5:
            square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)

    def _centre(self, image: Image.Image) -> Image.Image:
        edge = min(image.size)
        left, top = (image.width - edge) / 2, (image.height - edge) / 2
        return image.resize((self.resolution,) * 2, Image.BILINEAR, box=(left, top, left + edge, top + edge))

    def _random(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        reduction = rng.uniform(1.0, self.max_reduction) if rng.random() < 0.5 else 1.0
        # A picture smaller than the crop is enlarged: reduction then falls below 1.
        reduction = min(reduction, min(image.size) / self.resolution)
        edge = round(self.resolution * reduction)
        left = int(rng.integers(0, image.width - edge + 1))
        top = int(rng.integers(0, image.height - edge + 1))
        square = image.crop((left, top, left + edge, top + edge))
        if edge != self.resolution:
            square = square.resize((self.resolution,) * 2, Image.BICUBIC)
        return square


class Photographs(Dataset):
    """
    Crops of the photographs of a source, asked for as `(epoch, index)`.

    A photograph that turns out to be damaged is told of once, and the next one that can be read takes its place.
    """

    def __init__(self, source: Source, crop: Crop):
        self.source = source
        self.crop = crop
        self._told: set[str] = set()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> torch.Tensor:
        """(3, resolution, resolution) uint8. Raises ValueError if no photograph at all can be read."""
        epoch, index = item
        problems = []
        for place in (*range(index, len(self)), *range(index)):
            try:
                image = decode(self.source.read(place))
            except (OSError, ValueError) as error:
                problems.append(f"{self.source.name(place)}: {error}")
                continue
            for problem in problems:
                _warn_once(f"{problem} {self.source.name(place)} takes its place.", self._told)
            return self.crop(image, epoch, index)
        raise ValueError(f"None of the {len(self)} photographs can be read. The first: {problems[0]}")


class StreamedPhotographs(IterableDataset):
    """
    Crops of the photographs of a Hugging Face dataset that is downloaded as it is read, in an endless stream.

    Every epoch the stream is shuffled, its shards and then in a buffer of `SHUFFLE_BUFFER`. A run is resumed by
    reading up to where it was and throwing that away: exact, at the price of reading at most two epochs' files.

    Args:
        stream: a `datasets.IterableDataset` of undecoded images.
        image_column: where they are in a record.
        crop: see `Crop`; a photograph's index is its place in the shuffled epoch.
        seed: of the order.
    """

    def __init__(self, stream: Any, image_column: str, crop: Crop, *, seed: int = 0):
        self.stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        self.image_column = image_column
        self.crop = crop
        self.start, self.rank, self.world_size = 0, 0, 1
        self._told: set[str] = set()

    def seek(self, start: int, *, rank: int = 0, world_size: int = 1) -> None:
        """Begin there, as an `EpochSampler` does. Every process reads the whole stream and decodes its share."""
        self.start, self.rank, self.world_size = start, rank, world_size

    def __iter__(self) -> Iterator[torch.Tensor]:
        waiting = []  # places of damaged photographs, which the next one that can be read takes
        for position, epoch, index, record in self._records():
            if position % self.world_size != self.rank and not waiting:
                continue
            try:
                image = decode(record_bytes(record))
            except (OSError, ValueError) as error:
                name = record["path"] or f"photograph {index} of epoch {epoch}"
                _warn_once(f"{name}: {error} The next one takes its place.", self._told)
                if position % self.world_size == self.rank:
                    waiting.append((epoch, index))
                if waiting and epoch > waiting[0][0] + 1:
                    raise ValueError("None of the photographs of the stream can be read.") from error
                continue
            for place in waiting:
                yield self.crop(image, *place)
            waiting = []
            if position % self.world_size == self.rank:
                yield self.crop(image, epoch, index)

    def _records(self) -> Iterator[tuple[int, int, int, dict]]:
        """(position, epoch, index in the epoch, record) of everything from `start` on."""
        epoch = position = 0
        while True:
            self.stream.set_epoch(epoch)
            begun = position
            for index, record in enumerate(self.stream):
                if position >= self.start:
                    yield position, epoch, index, record[self.image_column]
                position += 1
            length = position - begun
            if length == 0:
                raise ValueError("The streamed dataset is empty.")
            epoch += 1
            if position < self.start:  # every epoch is as long as the first one
                skipped = (self.start - position) // length
                epoch, position = epoch + skipped, position + skipped * length


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


def decode(file: bytes) -> Image.Image:
    """
    An image file -> an RGB image: upright, transparency laid on white, 16 bits rounded to 8.

    Raises:
        ValueError: it is not an image, is damaged, too large, or has pixels of more than 16 bits.
    """
    image = open_image(io.BytesIO(file)).image
    if image.mode == "I;16":  # which Pillow's own conversion would clip
        image = Image.fromarray(to_eight_bits(np.asarray(image)))
    return lay_on_white(image).convert("RGB")


def _warn_once(message: str, told: set[str]) -> None:
    # Not by Python's own filter, which forgets what it showed whenever filters are changed, as Pillow's callers do.
    if message not in told:
        told.add(message)
        warnings.warn(message, stacklevel=3)
