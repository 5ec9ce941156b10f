"""The training loop: one story for every model trained here, exact to resume, on one process or many (DDP)."""

import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from uplift_diffusers.data.photographs import Photographs, StreamedPhotographs
from uplift_diffusers.training.checkpoints import (
    TrainingState,
    changed_settings,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    set_aside_later_checkpoints,
)
from uplift_diffusers.training.config import TrainingConfig
from uplift_diffusers.training.data import left_out, make_loader, open_photographs
from uplift_diffusers.training.logs import RunLog, Validation


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

    Randomness has no state: order and crops follow from (seed, epoch, index), noise from (seed, step, process). So a
    run that is resumed with its settings repeats the uninterrupted one: bit by bit on the CPU in float32; on a GPU, as
    far as its kernels are deterministic.

    Args:
        model: what is trained, saved and averaged.
        objective: holds `model`; `objective(images, generator=)` with images (B, 3, R, R) in [0, 1] returns a dict of
            scalars whose `loss` is differentiable.
        config: see `TrainingConfig`.
        accelerator: made before the models, so that every process initialises them alike.
        photographs: what is trained on; by default what `config` names.
        prepare: called before the first step of a new run, to fit what need not be learned; not where one is resumed.
        validate: called with the averaged weights in place; what it returns is logged.
    Returns:
        `config.output_dir`, which now holds the model as `from_pretrained` loads it.
    Raises:
        FileNotFoundError: no photographs, or no checkpoint where one was required.
        FileExistsError: `config.output_dir` holds checkpoints of another run, and none is to be resumed.
        FloatingPointError: the loss stopped being finite.
        OSError: a checkpoint or the result cannot be written; the last checkpoint is as it was.
    """
    output_dir = Path(config.output_dir)
    photographs = open_photographs(config) if photographs is None else photographs
    for sentence in left_out(photographs):
        accelerator.print(sentence)
    images_per_step = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    num_steps, validation_steps = (
        steps or math.ceil(epochs * len(photographs) / images_per_step)
        for steps, epochs in (
            (config.max_train_steps, config.num_train_epochs),
            (config.validation_steps, config.validation_epochs),
        )
    )

    checkpoint = _checkpoint_to_resume(config, accelerator=accelerator)
    if checkpoint is None and prepare is not None:
        prepare()
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    scheduler = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=num_steps
    )
    ema = EMAModel(parameters, decay=config.ema_decay) if config.use_ema else None
    state = TrainingState(
        model=model, optimizer=optimizer, scheduler=scheduler, ema=ema, scaler=getattr(accelerator, "scaler", None)
    )
    settings = dataclasses.asdict(config) | {
        "num_processes": accelerator.num_processes,
        "num_photographs": None if config.streaming else len(photographs),
    }
    del settings["hub_token"]
    if checkpoint is not None:
        _resume(checkpoint, state, output_dir, accelerator=accelerator, settings=settings)
    if ema is not None:
        ema.to(accelerator.device)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    log = RunLog(output_dir, accelerator=accelerator, step=state.step, settings=settings)
    accelerator.wait_for_everyone()

    loader = make_loader(photographs, config, accelerator=accelerator, start=state.step * images_per_step)
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
        scheduler.step()
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
            # In one order on every process: they are added up by their place, and a loss may be known sooner on one.
            state.sums = accelerator.reduce(dict(sorted(state.sums.items())), reduction="mean")
            if not torch.isfinite(state.sums["loss"]):
                raise FloatingPointError(
                    f"The loss is {state.sums['loss'].item()} at step {state.step}. "
                    "Lower `learning_rate` and resume from the last checkpoint."
                )
        if logs:
            rate = (state.step - clocked_step) * images_per_step / (time.perf_counter() - clock)
            means = {name: value.item() / (state.step - state.logged_step) for name, value in state.sums.items()}
            progress.set_postfix(loss=f"{means['loss']:.4g}", images_per_s=f"{rate:.3g}")
            log.write(state.step, {**means, "lr": scheduler.get_last_lr()[0], "images_per_s": rate})
            state.sums, state.logged_step = {}, state.step
        if validates and accelerator.is_main_process:
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

    if accelerator.is_main_process:
        with AveragedWeights(ema, parameters):
            _save_result(model.eval(), output_dir)
    accelerator.wait_for_everyone()
    return output_dir


def _checkpoint_to_resume(config: TrainingConfig, *, accelerator: Accelerator) -> Path | None:
    """What `config.resume_from_checkpoint` asks for; damaged ones on the way to it are named."""
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
        accelerator.print(f"Skipped: {problem}")
    return path


def _resume(
    path: Path, state: TrainingState, output_dir: Path, *, accelerator: Accelerator, settings: dict[str, Any]
) -> None:
    """Bring `state` to where the checkpoint is, and tell what is different since then."""
    load_checkpoint(path, state)
    accelerator.print(f"Resumed from {path}.")
    for change in changed_settings(path, settings):
        accelerator.print(f"Changed since then: {change}")
    accelerator.wait_for_everyone()  # until all have read it
    if accelerator.is_main_process:
        for moved in set_aside_later_checkpoints(output_dir, state.step):
            accelerator.print(f"Set aside: {moved}")


def _save_result(model: ModelMixin, output_dir: Path) -> None:
    """`model.save_pretrained(output_dir)`, every file of it whole or not at all."""
    temporary = output_dir / ".result.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    for path in temporary.iterdir():
        path.replace(output_dir / path.name)
    temporary.rmdir()


class AveragedWeights:
    """Within it, the parameters hold their moving average."""

    def __init__(self, ema: EMAModel | None, parameters: list[nn.Parameter]):
        self.ema, self.parameters = ema, parameters

    def __enter__(self) -> None:
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)

    def __exit__(self, *exception) -> None:
        if self.ema is not None:
            self.ema.restore(self.parameters)


def _step_generator(seed: int, step: int, micro_step: int, process: int) -> torch.Generator:
    state = np.random.SeedSequence((seed, step, micro_step, process)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))
