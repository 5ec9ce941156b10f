"""Checkpoints of the training state: written atomically, checked by SHA-256, and restored exactly."""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from uplift_diffusers.saving import folder_when_whole, sync

PREFIX = "checkpoint-"
STATE = "state.json"
CHECKSUMS = "checksums.json"
"""The SHA-256 of every other file of a checkpoint."""


@dataclass(kw_only=True)
class TrainingState:
    """
    All state that changes from step to step.

    Args:
        model: the trained network.
        optimizer: Adam.
        scheduler: of the learning rate.
        ema: the moving average of the trained parameters, or None.
        scaler: of the gradients, with fp16 only.
        step: optimiser steps taken.
        logged_step: the last step that has a line in the log.
        sums: of the losses since then, by name.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None
    scaler: torch.amp.GradScaler | None
    step: int = 0
    logged_step: int = 0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)


def save_checkpoint(output_dir: Path, state: TrainingState, *, settings: dict, keep: int) -> Path:
    """
    Write `output_dir/checkpoint-<step>`, and remove all but the newest `keep` checkpoints.

    Args:
        output_dir: the run's folder.
        state: the state to write.
        settings: the run's settings, JSON values by name, for `changed_settings`.
        keep: number of checkpoints to keep.
    Raises:
        OSError: the checkpoint cannot be written. Existing checkpoints are unchanged.
    """
    final = output_dir / f"{PREFIX}{state.step}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with folder_when_whole(final, overwrite=True) as folder:
            _write(folder, state, settings)
    except (OSError, SafetensorError) as error:
        there = list_checkpoints(output_dir)
        raise OSError(
            f"`{final}` cannot be written: {error}. "
            + (f"The last good one is {there[-1].name}; make room and resume from it." if there else "There is none.")
        ) from error
    for path in list_checkpoints(output_dir)[:-keep]:
        # Under a name that is removed later where this is not done: half a checkpoint would look like a damaged one.
        going = path.with_name(f".{path.name}.partial")
        shutil.rmtree(going, ignore_errors=True)
        path.rename(going)
        shutil.rmtree(going)
    return final


def save_result(model: ModelMixin, output_dir: Path) -> None:
    """`model.save_pretrained(output_dir)`, every file of it whole or not at all."""
    temporary = output_dir / ".result.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    for path in sorted(temporary.iterdir()):
        sync(path)
        path.replace(output_dir / path.name)
    temporary.rmdir()
    sync(output_dir)


def remove_partial_files(output_dir: Path) -> None:
    """Remove the partial files of killed processes below `output_dir`."""
    for path in output_dir.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def load_checkpoint(path: Path, state: TrainingState) -> None:
    """
    Restore everything that `save_checkpoint` wrote into `state`.

    Args:
        path: from `find_checkpoint`, which checks it.
        state: of a model and optimizer made with the same settings.
    Raises:
        ValueError: the checkpoint belongs to another model or other trained parameters, or has no moving average.
    """
    content = json.loads((path / STATE).read_text())
    if state.ema is not None and content["ema_step"] is None:
        raise ValueError(f"`{path}` holds no moving average. Resume with --no-use_ema or start again.")
    try:
        state.model.load_state_dict(load_file(path / "model.safetensors"))
        _load_optimizer_tensors(state.optimizer, load_file(path / "optimizer.safetensors"))
        if state.ema is not None:
            shadow = load_file(path / "ema.safetensors")
            for index, tensor in enumerate(state.ema.shadow_params):
                tensor.copy_(shadow[str(index)])
            state.ema.optimization_step = content["ema_step"]
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"`{path}` was written for another model: {' '.join(str(error).split()):.300}. "
            "Resume with the settings that it was started with, or start again in another folder."
        ) from error
    state.scheduler.load_state_dict(content["scheduler"])
    for group, rate in zip(state.optimizer.param_groups, state.scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    if state.scaler is not None and content["scaler"]:
        state.scaler.load_state_dict(content["scaler"])
    state.step = content["step"]
    state.logged_step = content["logged_step"]
    state.sums = {name: torch.tensor(value) for name, value in content["sums"].items()}


def read_settings(path: Path) -> dict:
    """The settings that the checkpoint `path` was written with."""
    return json.loads((path / STATE).read_text())["settings"]


def changed_settings(path: Path, settings: dict) -> list[str]:
    """`name: then -> now` for every setting that has changed since the checkpoint `path` was written."""
    then = read_settings(path)
    now = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    return [f"{name}: {then[name]!r} -> {now[name]!r}" for name in now if name in then and then[name] != now[name]]


def set_aside_later_checkpoints(output_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step` to abandoned-checkpoint-<step>, so that nothing resumes from them."""
    moved = []
    for step_of_path, path in _numbered(output_dir):
        if step_of_path > step:
            target = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(path.rename(target))
    return moved


def find_checkpoint(output_dir: Path, request: str) -> tuple[Path | None, list[str]]:
    """
    The checkpoint for `request`, and a message for every damaged one that was skipped.

    Args:
        output_dir: the run's folder.
        request: `latest` (an error if there is none), `if-any` (None if there is none), or a checkpoint's path.
    Raises:
        FileNotFoundError: a checkpoint is required and none is usable.
    """
    if request not in ("latest", "if-any"):
        if problem := _damage(Path(request)):
            raise FileNotFoundError(f"`resume_from_checkpoint`: {problem}")
        return Path(request), []
    problems = []
    for path in reversed(list_checkpoints(output_dir)):
        problem = _damage(path)
        if problem is None:
            return path, problems
        problems.append(problem)
    if request == "latest":
        raise FileNotFoundError(
            f"`resume_from_checkpoint` is 'latest', but `{output_dir}` holds no usable checkpoint. "
            + "".join(f"{problem} " for problem in problems)
            + "Pass 'if-any' to start from the beginning in that case."
        )
    return None, problems


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders below `output_dir`, oldest first."""
    return [path for _, path in _numbered(output_dir)]


def _numbered(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint below `output_dir`, oldest first."""
    return sorted((step, path) for path in output_dir.glob(f"{PREFIX}*") if (step := _step_of(path)) is not None)


class AveragedWeights:
    """Context manager in which the parameters hold their moving average."""

    def __init__(self, ema: EMAModel | None, parameters: list[nn.Parameter]):
        self.ema, self.parameters = ema, parameters

    def __enter__(self) -> None:
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)

    def __exit__(self, *exception) -> None:
        if self.ema is not None:
            self.ema.restore(self.parameters)


def _write(folder: Path, state: TrainingState, settings: dict) -> None:
    save_file(_contiguous(state.model.state_dict()), folder / "model.safetensors")
    save_file(_optimizer_tensors(state.optimizer), folder / "optimizer.safetensors")
    if state.ema is not None:
        shadow = {str(index): tensor for index, tensor in enumerate(state.ema.shadow_params)}
        save_file(_contiguous(shadow), folder / "ema.safetensors")
    schedule = state.scheduler.state_dict()
    content = {
        "step": state.step,
        "logged_step": state.logged_step,
        "sums": {name: value.item() for name, value in state.sums.items()},
        "scheduler": {name: value for name, value in schedule.items() if isinstance(value, (int, float, bool, list))},
        "ema_step": None if state.ema is None else state.ema.optimization_step,
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
        "settings": settings,
    }
    (folder / STATE).write_text(json.dumps(content, indent=2))
    checksums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2))


def _damage(path: Path) -> str | None:
    """A message on the damage of a checkpoint, or None."""
    try:
        checksums = json.loads((path / CHECKSUMS).read_text())
        names = {"model.safetensors", "optimizer.safetensors", STATE, *checksums}
        for name in sorted(names):
            if not (path / name).is_file():
                return f"`{path / name}` is missing."
            if _sha256(path / name) != checksums[name]:
                return f"`{path / name}` is damaged: its SHA-256 is not the one in {CHECKSUMS}."
        step = json.loads((path / STATE).read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"`{path}` is not a checkpoint ({error})."
    named = _step_of(path)
    if named is not None and named != step:
        return f"`{path}` is damaged: it holds step {step}."
    return None


def _step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None if it has another name."""
    match = re.fullmatch(rf"{PREFIX}(\d+)", path.name, re.ASCII)
    return int(match[1]) if match else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return _contiguous({f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()})


def _load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes = {index: parameter.shape for index, parameter in enumerate(parameters)}
    if any(shapes.get(index) != entry["exp_avg"].shape for index, entry in state.items()):
        raise RuntimeError("Adam's averages belong to other parameters")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
