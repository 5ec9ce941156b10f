"""Training crops of photographs. Order and content depend only on a seed, so a run can be resumed exactly."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from uplift_diffusers.data.sources import Source, record_bytes
from uplift_diffusers.images.files import open_image
from uplift_diffusers.images.modes import lay_on_white, to_eight_bits

logger = logging.get_logger(__name__)

SHUFFLE_BUFFER = 256
"""Size of the shuffle buffer of a stream, in encoded photographs of about half a megabyte each, per process."""


CropFunction = Callable[[Image.Image, int, int], torch.Tensor]
"""(image, epoch, index) -> (3, R, R) uint8: what cuts training squares out of photographs."""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """
    Crops a square from a photograph. All randomness depends only on (seed, epoch, index).

    Args:
        resolution: edge of the square in pixels.
        random_crop: a random square, flipped half of the time, instead of the resized centre square.
        max_reduction: with `random_crop`, half of the squares are taken from an image downsampled by a factor drawn
            from 1 to this (fine detail at every scale); 1.0 keeps the original size.
        augment_flip: without `random_crop`, flip half of the squares.
        seed: seed of all randomness.
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
        return image.resize(
            (self.resolution, self.resolution), Image.Resampling.BILINEAR, box=(left, top, left + edge, top + edge)
        )

    def _random(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        reduction = rng.uniform(1.0, self.max_reduction) if rng.random() < 0.5 else 1.0
        # An image smaller than the crop is upsampled: the reduction is then below 1.
        reduction = min(reduction, min(image.size) / self.resolution)
        edge = round(self.resolution * reduction)
        left = int(rng.integers(0, image.width - edge + 1))
        top = int(rng.integers(0, image.height - edge + 1))
        square = image.crop((left, top, left + edge, top + edge))
        if edge != self.resolution:
            square = square.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC)
        return square


class Photographs(Dataset):
    """
    Crops of the photographs of a source, indexed by `(epoch, index)`.

    A damaged photograph is replaced with the next readable one and logged once.
    """

    def __init__(self, source: Source, crop: CropFunction):
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

    In every epoch, the shards are shuffled, and then the records in a buffer of `SHUFFLE_BUFFER`. A run is
    resumed by reading and skipping what was seen. That is exact, and reads at most two epochs' files.

    Args:
        stream: a `datasets.IterableDataset` of undecoded images.
        image_column: the column with the images.
        crop: makes the crops; a photograph's index is its position in the shuffled epoch.
        seed: seed of the order.
    """

    def __init__(self, stream: Any, image_column: str, crop: CropFunction, *, seed: int = 0):
        self.stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        self.image_column = image_column
        self.crop = crop
        self.start, self.rank, self.world_size = 0, 0, 1
        self._told: set[str] = set()

    def seek(self, start: int, *, rank: int = 0, world_size: int = 1) -> None:
        """Start at photograph `start`. Every process reads everything and decodes its share."""
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
    Endless `(epoch, index)` pairs: every epoch a permutation of `size` that depends only on (seed, epoch).

    Process `rank` of `world_size` takes every `world_size`-th pair; `start` is the number of pairs that all processes
    together have already taken.
    """

    def __init__(self, size: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1):
        self.size, self.seed, self.start, self.rank, self.world_size = size, seed, start, rank, world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position, order, order_epoch = self.start + self.rank, np.empty(0), None
        while True:
            epoch, place = divmod(position, self.size)
            if epoch != order_epoch:
                order, order_epoch = np.random.default_rng((self.seed, epoch)).permutation(self.size), epoch
            yield epoch, int(order[place])
            position += self.world_size


def first_crops(photographs: Photographs | StreamedPhotographs, count: int) -> torch.Tensor:
    """(count, 3, R, R) uint8, always the same crops: for fitting before the training."""
    if isinstance(photographs, StreamedPhotographs):
        photographs.seek(0)
        return torch.stack(list(islice(photographs, count)))
    # An item is an (epoch, index), and so are the quotient and remainder of a running number.
    return torch.stack([photographs[divmod(number, len(photographs))] for number in range(count)])


def batches(
    photographs: Photographs | StreamedPhotographs,
    batch_size: int,
    *,
    seed: int,
    start: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> Iterator[torch.Tensor]:
    """
    Endless batches (B, 3, R, R) uint8 of one process.

    Args:
        photographs: the crops.
        batch_size: crops per batch.
        seed: seed of the order.
        start: number of crops that all processes together have already used.
        rank: index of this process.
        world_size: number of processes.
        num_workers: worker processes that read ahead.
    """
    if isinstance(photographs, StreamedPhotographs):
        photographs.seek(start, rank=rank, world_size=world_size)
        sampler = None
    else:
        sampler = EpochSampler(len(photographs), seed=seed, start=start, rank=rank, world_size=world_size)
    loader = DataLoader(
        photographs,
        sampler=sampler,
        batch_size=batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    return iter(loader)


def decode(file: bytes) -> Image.Image:
    """
    An image file -> an RGB image: upright, transparency composited on white, 16 bits rounded to 8.

    Raises:
        ValueError: the file is not an image, is damaged, too large, or has pixels of more than 16 bits.
    """
    image = open_image(io.BytesIO(file)).image
    if image.mode == "I;16":  # which Pillow's own conversion would clip
        image = Image.fromarray(to_eight_bits(np.asarray(image)))
    return lay_on_white(image).convert("RGB")


def _warn_once(message: str, told: set[str]) -> None:
    if message not in told:
        told.add(message)
        logger.warning(message)
