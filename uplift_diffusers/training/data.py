"""The photographs that a configuration names, and the batches that a run takes from them."""

from collections.abc import Iterator
from itertools import islice

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from uplift_diffusers.data.photographs import Crop, EpochSampler, Photographs, StreamedPhotographs
from uplift_diffusers.data.sources import load_dataset, open_source
from uplift_diffusers.training.config import TrainingConfig

MAX_NAMED = 20
"""Files that cannot be read are named one by one up to here."""


def open_photographs(config: TrainingConfig) -> Photographs | StreamedPhotographs:
    """
    What `config` is to be trained on. Raises as `open_source` does, before anything else is loaded.

    Files that cannot be read are left out and listed in `source.unreadable`.
    """
    crop = Crop(
        resolution=config.resolution,
        random_crop=config.random_crop,
        max_reduction=config.max_reduction,
        augment_flip=config.augment_flip,
        seed=config.seed,
    )
    if config.streaming:
        stream = load_dataset(
            config.dataset_name, config.dataset_config_name, image_column=config.image_column, streaming=True
        )
        return StreamedPhotographs(stream, config.image_column, crop, seed=config.seed)
    source = open_source(
        config.train_data_dir,
        dataset_name=config.dataset_name,
        dataset_config_name=config.dataset_config_name,
        image_column=config.image_column,
    )
    return Photographs(source, crop)


def first_crops(photographs: Photographs | StreamedPhotographs, count: int) -> torch.Tensor:
    """(count, 3, R, R) uint8, the same ones every time: for what is fitted before the training."""
    if isinstance(photographs, StreamedPhotographs):
        photographs.seek(0)
        return torch.stack(list(islice(photographs, count)))
    # An item is an (epoch, index), and so is the quotient and remainder of a running number.
    return torch.stack([photographs[divmod(number, len(photographs))] for number in range(count)])


def left_out(photographs: Photographs | StreamedPhotographs) -> list[str]:
    """What a person is told of the files that cannot be read."""
    problems = [] if isinstance(photographs, StreamedPhotographs) else photographs.source.unreadable
    sentences = [f"Left out: {problem}" for problem in problems[:MAX_NAMED]]
    if len(problems) > MAX_NAMED:
        sentences.append(f"Left out: {len(problems) - MAX_NAMED} more.")
    return sentences


def make_loader(
    photographs: Photographs | StreamedPhotographs, config: TrainingConfig, *, accelerator: Accelerator, start: int
) -> Iterator[torch.Tensor]:
    """Endless batches (B, 3, R, R) uint8 of this process; all processes together have had `start` photographs."""
    order = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    if isinstance(photographs, StreamedPhotographs):
        photographs.seek(start, **order)
        sampler = None
    else:
        sampler = EpochSampler(len(photographs), seed=config.seed, start=start, **order)
    loader = DataLoader(
        photographs,
        sampler=sampler,
        batch_size=config.train_batch_size,
        num_workers=config.dataloader_num_workers,
        persistent_workers=config.dataloader_num_workers > 0,
    )
    return iter(loader)
