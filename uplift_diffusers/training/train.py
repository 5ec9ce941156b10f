"""
Training, from the command line to the model card: one loop for all models, with exact resume, in one or more
processes.

    accelerate launch train_latent.py --recipe sd15 --train_data_dir photos --output_dir runs/uplift
    accelerate launch train_latent.py --config run.yaml --resume_from_checkpoint latest
    uplift-diffusers train --recipe embedded --vae runs/vae --train_data_dir photos --output_dir runs/small

`main` parses the flags into a configuration (`recipes`), `run` prepares and finishes what it describes, `train` is the
loop between them.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    is_tensorboard_available,
    is_wandb_available,
    parse_flag_from_env,
    set_seed,
)
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils.logging import get_logger
from huggingface_hub.errors import HTTPError  # of the HTTP library, whichever it is
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm.auto import tqdm

from uplift_diffusers.console import in_one_line, tell
from uplift_diffusers.data.dataset import Photographs, StreamedPhotographs, batches, first_crops
from uplift_diffusers.data.sources import load_dataset, open_source
from uplift_diffusers.runtime import PATIENCE, device_name, preferred_dtype, process_share
from uplift_diffusers.training.checkpoints import (
    AveragedWeights,
    TrainingState,
    changed_settings,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_settings,
    remove_partial_files,
    save_checkpoint,
    save_result,
    set_aside_later_checkpoints,
)
from uplift_diffusers.training.config import TrainingConfig
from uplift_diffusers.training.monitoring import RunLog, Validation
from uplift_diffusers.training.publishing import create_repository, publish
from uplift_diffusers.training.recipes import parse_recipe

logger = get_logger(__name__)

MAX_NAMED = 20
"""At most this many unreadable files are listed one by one."""

_TRACKERS = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
_SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
_PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
_EXPECTED = (OSError, ValueError, TypeError, ImportError, FloatingPointError, HTTPError)


def main(arguments: list[str] | None = None) -> int:
    """
    Train an upsampler; the arguments are by default those of the process.

    Returns:
        The exit code: 0, or 1 after one line on stderr about an expected error. Wrong flags exit with 2.
    """
    return run_command(lambda: run(*parse_recipe(arguments)))


def run_command(command: Callable[[], None]) -> int:
    """Run `command`, show this package's log, and turn an expected error into one line and the exit code 1."""
    try:
        with _log_on_stderr():
            command()
    except torch.OutOfMemoryError as error:
        tell(
            f"{str(error).splitlines()[0]} Try --gradient_checkpointing, a smaller --train_batch_size (with "
            "--gradient_accumulation_steps), --resolution, or --mixed_precision bf16."
        )
        return 1
    except _EXPECTED as error:
        tell(in_one_line(error))
        return 1
    return 0


def run(config: TrainingConfig, command: str) -> None:
    """
    Train what `config` describes, save it with a model card, and upload it if asked to.

    Args:
        config: the settings.
        command: the command line without the flags that follow from `config`, for the card.
    Raises:
        Exception: as `open_photographs`, `make_accelerator`, `config.open_task`, `train` and `publish` do.
    """
    photographs = open_photographs(config)  # before anything is loaded
    accelerator = make_accelerator(config)
    repository = create_repository(config) if accelerator.is_main_process else None
    with config.open_task(accelerator.device) as task:
        fit = task.fit

        def prepare() -> None:
            assert fit is not None
            fit(first_crops(photographs, task.fit_crops).to(accelerator.device) / 255)

        train(
            task.model,
            task.objective,
            config,
            photographs=photographs,
            accelerator=accelerator,
            prepare=prepare if fit is not None else None,
            validate=task.validate,
        )
    if accelerator.is_main_process:
        publish(task.model, config, accelerator=accelerator, command=command, repository=repository)


def train(
    model: ModelMixin,
    objective: nn.Module,
    config: TrainingConfig,
    *,
    accelerator: Accelerator,
    photographs: Photographs | StreamedPhotographs | None = None,
    prepare: Callable[[], None] | None = None,
    validate: Callable[[], Validation] | None = None,
) -> Path:
    """
    Minimise `objective` over photographs and save the result.

    Randomness is stateless: order and crops depend on (seed, epoch, index), noise on (seed, step, process). So a
    resumed run with the same settings equals the uninterrupted one: bit for bit on the CPU in float32; on a GPU, as
    far as its kernels are deterministic.

    Args:
        model: the model to train, average and save.
        objective: contains `model`, see `Task`.
        config: the settings.
        accelerator: made before the models, so every process initialises them identically.
        photographs: the training data; by default from `config`.
        prepare: called before the first step of a new run, but not of a resumed one.
        validate: called with the averaged weights; its result is logged.
    Returns:
        `config.output_dir`, which then holds the model for `from_pretrained`.
    Raises:
        FileNotFoundError: there are no photographs, or a required checkpoint is missing.
        FileExistsError: `config.output_dir` holds checkpoints of another run, and none is to be resumed.
        ValueError: the checkpoint belongs to another model.
        FloatingPointError: the loss is no longer finite.
        OSError: a checkpoint or the result cannot be written; the last checkpoint is unchanged.
    """
    # 1. What there is to do
    output_dir = Path(config.output_dir)
    photographs = open_photographs(config) if photographs is None else photographs
    _log_unreadable(photographs)
    images_per_step = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    num_steps, validation_steps = (
        steps or _steps_of_epochs(epochs, photographs, images_per_step)
        for steps, epochs in (
            (config.max_train_steps, config.num_train_epochs),
            (config.validation_steps, config.validation_epochs),
        )
    )

    # 2. The state, new or resumed
    checkpoint = _checkpoint_to_resume(config)
    if checkpoint is None and prepare is not None:
        prepare()
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.9, config.adam_beta2))
    ema = EMAModel(parameters, decay=config.ema_decay) if config.use_ema else None
    state = TrainingState(
        model=model,
        optimizer=optimizer,
        scheduler=_make_scheduler(config, optimizer, num_steps),
        ema=ema,
        scaler=getattr(accelerator, "scaler", None),
    )
    settings = dataclasses.asdict(config) | {
        "mixed_precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
        "num_photographs": len(photographs) if isinstance(photographs, Sized) else None,
    }
    del settings["hub_token"]
    if checkpoint is not None:
        load_checkpoint(checkpoint, state)
        logger.info(f"Resumed from {checkpoint}.")
        for change in changed_settings(checkpoint, settings):
            logger.warning(f"Changed since then: {change}")
    accelerator.wait_for_everyone()  # until all have read it
    if accelerator.is_main_process:
        remove_partial_files(output_dir)
        for moved in set_aside_later_checkpoints(output_dir, state.step):
            logger.warning(f"Set aside: {moved}")
    if ema is not None:
        ema.to(accelerator.device)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    log = RunLog(output_dir, accelerator=accelerator, step=state.step, settings=settings)
    accelerator.wait_for_everyone()

    # 3. Step after step
    loader = batches(
        photographs,
        config.train_batch_size,
        seed=config.seed,
        start=state.step * images_per_step,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=config.dataloader_num_workers,
    )
    progress = tqdm(
        total=num_steps, initial=state.step, unit="step", disable=not accelerator.is_main_process, mininterval=5
    )
    clock, clocked_step = time.perf_counter(), state.step
    model.train()
    while state.step < num_steps:
        for micro_step in range(config.gradient_accumulation_steps):
            images = next(loader).to(accelerator.device).float() / 255  # (B, 3, R, R)
            generator = _step_generator(config.seed, state.step, micro_step, accelerator.process_index)
            is_last = micro_step == config.gradient_accumulation_steps - 1
            with nullcontext() if is_last else accelerator.no_sync(objective):
                losses = objective(images, generator=generator)
                accelerator.backward(losses["loss"] / config.gradient_accumulation_steps)
            for name, value in losses.items():
                state.sums[name] = state.sums.get(name, 0) + value.detach() / config.gradient_accumulation_steps
        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        state.scheduler.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(parameters)
        state.step += 1
        progress.update()

        last = state.step == num_steps
        logs = state.step % config.logging_steps == 0 or last
        saves = state.step % config.checkpointing_steps == 0 or last
        validates = validate is not None and (state.step % validation_steps == 0 or last)
        if logs or saves:
            # Sorted, because the values are summed by position, and their order may differ between processes.
            reduced: Any = accelerator.reduce(dict(sorted(state.sums.items())), reduction="mean")
            state.sums = reduced
            if not torch.isfinite(state.sums["loss"]):
                raise FloatingPointError(
                    f"The loss is {state.sums['loss'].item()} at step {state.step}. "
                    "Lower `learning_rate` and resume from the last checkpoint."
                )
        if logs:
            rate = (state.step - clocked_step) * images_per_step / (time.perf_counter() - clock)
            means = {name: value.item() / (state.step - state.logged_step) for name, value in state.sums.items()}
            progress.set_postfix(loss=f"{means['loss']:.4g}", images_per_s=f"{rate:.3g}", refresh=False)
            log.write(state.step, {**means, "lr": float(state.scheduler.get_last_lr()[0]), "images_per_s": rate})
            state.sums, state.logged_step = {}, state.step
        if validate is not None and validates and accelerator.is_main_process:
            with AveragedWeights(ema, parameters), torch.no_grad():
                model.eval()
                log.write_validation(state.step, validate())
                model.train()
        if saves and accelerator.is_main_process:
            save_checkpoint(output_dir, state, settings=settings, keep=config.checkpoints_total_limit)
        if validates or saves:
            accelerator.wait_for_everyone()
        if logs or validates or saves:
            clock, clocked_step = time.perf_counter(), state.step  # what they took is not training
    progress.close()
    log.close()

    # 4. The result
    if accelerator.is_main_process:
        with AveragedWeights(ema, parameters):
            save_result(model.eval(), output_dir)
    accelerator.wait_for_everyone()
    return output_dir


def _steps_of_epochs(epochs: int | None, photographs: Photographs | StreamedPhotographs, images_per_step: int) -> int:
    assert epochs is not None  # where there are no steps
    assert isinstance(photographs, Sized)  # a stream has steps
    return math.ceil(epochs * len(photographs) / images_per_step)


def open_photographs(config: TrainingConfig) -> Photographs | StreamedPhotographs:
    """
    The photographs of `config`. Unreadable files are skipped and listed in `source.unreadable`.

    Raises:
        Exception: as `open_source` and `load_dataset` do.
    """
    crop = config.make_crop()
    if config.streaming:
        assert config.dataset_name is not None
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


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """
    The accelerator of a run. It also sets the seed of initialisation, so call this before making a network.

    Raises:
        ImportError: the tracker `config.report_to` is not installed.
        ValueError: the launcher shards weights or optimiser states, which checkpoints do not support; or fp16 is not
            supported on the device.
    """
    tracker = None if config.report_to == "none" else config.report_to
    if tracker is not None and not _TRACKERS[tracker]():
        raise ImportError(f"`report_to` is {tracker!r}, which is not installed. Run `pip install {tracker}`.")
    output_dir = Path(config.output_dir)
    # The other processes wait while one validates or saves, for longer than the ten minutes that NCCL allows.
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")  # PartialState does not look at it, Accelerator does
    # Not every loss depends on every weight: at depths 1 and 2, the linear estimate of the third step has no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    device: Any = PartialState(cpu=on_cpu, **patience.to_kwargs()).device
    accelerator = Accelerator(
        mixed_precision=_choose_precision(config, device),
        log_with=tracker,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "logs")),
        kwargs_handlers=[patience, unused],
    )
    if accelerator.distributed_type in _SHARDING:
        raise ValueError(
            f"Launch with DDP (`multi_gpu`), got {accelerator.distributed_type.value}. Weights, gradients and Adam "
            "take 16 bytes a parameter, 0.9 GB for the largest UPLiFT. Activations take the most memory, and sharding "
            "does not split them: use --gradient_checkpointing."
        )
    set_seed(config.seed)
    return accelerator


def _choose_precision(config: TrainingConfig, device: torch.device) -> str:
    """The precision of `config.mixed_precision`; `auto` is that of the resumed run, else the fastest on the device."""
    if config.mixed_precision != "auto":
        return config.mixed_precision
    checkpoint = None
    if config.resume_from_checkpoint is not None:
        checkpoint, _ = find_checkpoint(Path(config.output_dir), config.resume_from_checkpoint)
    if checkpoint is not None:
        precision, reason = read_settings(checkpoint)["mixed_precision"], f"which {checkpoint.name} was trained in"
    else:
        precision = _PRECISIONS[preferred_dtype(device)]
        reason = f"the fastest on {device_name(device)}"
    logger.info(f"mixed_precision: {precision}, {reason}.")
    return precision


def _checkpoint_to_resume(config: TrainingConfig) -> Path | None:
    """The checkpoint for `config.resume_from_checkpoint`. Damaged newer ones are logged."""
    output_dir = Path(config.output_dir)
    if config.resume_from_checkpoint is None:
        if there := list_checkpoints(output_dir):
            raise FileExistsError(
                f"`output_dir` must hold no checkpoints of another run, got {there[-1]}. "
                "Resume with resume_from_checkpoint='latest', or name another folder."
            )
        return None
    path, problems = find_checkpoint(output_dir, config.resume_from_checkpoint)
    for problem in problems:
        logger.warning(f"Skipped: {problem}")
    return path


def _make_scheduler(config: TrainingConfig, optimizer: torch.optim.Optimizer, num_steps: int) -> LRScheduler:
    if not config.lr_floor:
        return get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=num_steps
        )

    def cosine_to_floor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(config.lr_warmup_steps, 1))
        return rise * (config.lr_floor + (1 - config.lr_floor) * (1 + math.cos(math.pi * step / num_steps)) / 2)

    return LambdaLR(optimizer, cosine_to_floor)


def _step_generator(seed: int, step: int, micro_step: int, process: int) -> torch.Generator:
    state = np.random.SeedSequence((seed, step, micro_step, process)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


def _log_unreadable(photographs: Photographs | StreamedPhotographs) -> None:
    problems: list[str] = [] if isinstance(photographs, StreamedPhotographs) else photographs.source.unreadable
    for problem in problems[:MAX_NAMED]:
        logger.warning(f"Left out: {problem}")
    if len(problems) > MAX_NAMED:
        logger.warning(f"Left out: {len(problems) - MAX_NAMED} more.")


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Show this package's log from level INFO on stderr, in the first process and within this block only."""
    package = logging.getLogger(__name__.partition(".")[0])
    handler, level = logging.StreamHandler(), package.level
    handler.setLevel(logging.INFO if process_share()[0] == 0 else logging.ERROR)
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
