"""The training loop: one story for every model trained here, exact to resume, on one process or many (DDP)."""

import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from uplift_diffusers.data.image_folder import EpochSampler, ImageFolder
from uplift_diffusers.training.checkpoints import (
    changed_settings,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    set_aside_later_checkpoints,
)
from uplift_diffusers.training.config import TrainingConfig


def train(
    model: ModelMixin,
    objective: nn.Module,
    config: TrainingConfig,
    *,
    accelerator: Accelerator,
    validate: Callable[[], dict[str, float]] | None = None,
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
        validate: called with the averaged weights in place; its figures go to metrics.jsonl.
    Returns:
        `config.output_dir`, which now holds the model as `from_pretrained` loads it.
    Raises:
        FileNotFoundError: no photographs, or no checkpoint where one was required.
        FileExistsError: `config.output_dir` holds checkpoints of another run, and none is to be resumed.
        FloatingPointError: the loss stopped being finite.
    """
    output_dir = Path(config.output_dir)
    dataset = ImageFolder(
        config.train_data_dir,
        resolution=config.resolution,
        random_crop=config.random_crop,
        max_reduction=config.max_reduction,
        seed=config.seed,
    )

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    ema = EMAModel(parameters, decay=config.ema_decay) if config.use_ema else None

    settings = dataclasses.asdict(config) | {
        "num_processes": accelerator.num_processes,
        "num_photographs": len(dataset),
    }
    step = 0
    if config.resume_from_checkpoint is None and list_checkpoints(output_dir):
        raise FileExistsError(
            f"`output_dir` must hold no checkpoints of another run, got {list_checkpoints(output_dir)[-1]}. "
            "Resume with resume_from_checkpoint='latest', or name another folder."
        )
    if config.resume_from_checkpoint is not None:
        path, problems = find_checkpoint(output_dir, config.resume_from_checkpoint)
        for problem in problems:
            accelerator.print(f"Skipped: {problem}")
        if path is not None:
            step = load_checkpoint(path, model=model, optimizer=optimizer, scheduler=scheduler, ema=ema)
            accelerator.print(f"Resumed from {path}.")
            for change in changed_settings(path, settings):
                accelerator.print(f"Changed since then: {change}")
            if accelerator.is_main_process:
                for moved in set_aside_later_checkpoints(output_dir, step):
                    accelerator.print(f"Set aside: {moved}")
    if ema is not None:
        ema.to(accelerator.device)
    objective, optimizer = accelerator.prepare(objective, optimizer)

    log_path = output_dir / "metrics.jsonl"
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        _truncate_log(log_path, step)
    accelerator.wait_for_everyone()

    images_per_step = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    sampler = EpochSampler(
        len(dataset),
        seed=config.seed,
        start=step * images_per_step,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    loader = iter(
        DataLoader(
            dataset,
            sampler=sampler,
            batch_size=config.train_batch_size,
            num_workers=config.dataloader_num_workers,
            persistent_workers=config.dataloader_num_workers > 0,
        )
    )

    progress = tqdm(
        total=config.max_train_steps, initial=step, unit="step", disable=not accelerator.is_main_process, mininterval=5
    )
    sums: dict[str, torch.Tensor] = {}
    logged_at, logged_step = time.perf_counter(), step
    model.train()
    while step < config.max_train_steps:
        for micro_step in range(config.gradient_accumulation_steps):
            images = next(loader).to(accelerator.device).float() / 255  # (B, 3, R, R)
            generator = _step_generator(config.seed, step, micro_step, accelerator.process_index)
            is_last = micro_step == config.gradient_accumulation_steps - 1
            with nullcontext() if is_last else accelerator.no_sync(objective):
                losses = objective(images, generator=generator)
                accelerator.backward(losses["loss"] / config.gradient_accumulation_steps)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / config.gradient_accumulation_steps
        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(parameters)
        step += 1
        progress.update()

        last = step == config.max_train_steps
        logs, saves = step % config.logging_steps == 0 or last, step % config.checkpointing_steps == 0 or last
        validates = validate is not None and (step % config.validation_steps == 0 or last)
        if (logs or saves) and not torch.isfinite(sums["loss"]):
            raise FloatingPointError(
                f"The loss is {sums['loss'].item()} at step {step}. "
                "Lower `learning_rate` and resume from the last checkpoint."
            )
        if logs:
            elapsed, steps = time.perf_counter() - logged_at, step - logged_step
            record = {name: value.item() / steps for name, value in sums.items()}
            record |= {"lr": scheduler.get_last_lr()[0], "images_per_s": steps * images_per_step / elapsed}
            progress.set_postfix(loss=f"{record['loss']:.4g}", images_per_s=f"{record['images_per_s']:.3g}")
            if accelerator.is_main_process:
                _append_log(log_path, {"step": step, **record})
            sums, logged_at, logged_step = {}, time.perf_counter(), step

        if validates and accelerator.is_main_process:
            with _AveragedWeights(ema, parameters), torch.no_grad():
                model.eval()
                _append_log(log_path, {"step": step, **validate()})
                model.train()
            logged_at = time.perf_counter()
        if saves and accelerator.is_main_process:
            save_checkpoint(
                output_dir,
                step=step,
                model=model,
                optimizer=optimizer,
                scheduler=scheduler,
                ema=ema,
                settings=settings,
                keep=config.checkpoints_total_limit,
            )
        if validates or saves:
            accelerator.wait_for_everyone()
    progress.close()

    if accelerator.is_main_process:
        with _AveragedWeights(ema, parameters):
            model.eval()
            model.save_pretrained(output_dir)
    accelerator.wait_for_everyone()
    return output_dir


class _AveragedWeights:
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


def _append_log(path: Path, record: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in record.items()}) + "\n")


def _truncate_log(path: Path, step: int) -> None:
    """Drop the lines that a resumed run is about to write again."""
    if path.exists():
        # A process that was killed may have left half a line at the end.
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept))
