"""What every training command begins and ends with: the accelerator, and one line for what a person can put right."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import ProjectConfiguration, is_tensorboard_available, is_wandb_available, set_seed
from huggingface_hub.errors import HTTPError  # of the HTTP library, whichever it is

from uplift_diffusers.training.config import TrainingConfig

_TRACKERS = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
_SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
_EXPECTED = (OSError, ValueError, TypeError, ImportError, FloatingPointError, HTTPError)


def run_command(command: Callable[[list[str] | None], None], arguments: list[str] | None = None) -> int:
    """Run `command(arguments)` and return the exit code: 1 and one line on stderr for an expected error."""
    try:
        command(arguments)
    except torch.OutOfMemoryError as error:
        print(
            f"{str(error).splitlines()[0]} Try --gradient_checkpointing, a smaller --train_batch_size (with "
            "--gradient_accumulation_steps), --resolution, or --mixed_precision bf16.",
            file=sys.stderr,
        )
        return 1
    except _EXPECTED as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """
    The accelerator of a run, and the seed of its initialisation set: to be called before any network is made.

    Raises:
        ImportError: the tracker that `config.report_to` names is not installed.
        ValueError: launched so that weights or optimiser states are split over processes, which checkpoints here
            cannot hold; or fp16 on a device without it.
    """
    tracker = None if config.report_to == "none" else config.report_to
    if tracker is not None and not _TRACKERS[tracker]():
        raise ImportError(f"`report_to` is {tracker!r}, which is not installed. Run `pip install {tracker}`.")
    output_dir = Path(config.output_dir)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=tracker,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    if accelerator.distributed_type in _SHARDING:
        raise ValueError(
            f"Launch with DDP (`multi_gpu`), got {accelerator.distributed_type.value}. Weights, gradients and Adam "
            "take 16 bytes a parameter, 0.9 GB for the largest UPLiFT: what takes memory are activations, which "
            "sharding leaves whole and --gradient_checkpointing does not."
        )
    set_seed(config.seed)
    return accelerator
