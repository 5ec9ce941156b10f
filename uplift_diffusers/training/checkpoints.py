"""Training state on disk: written whole or not at all, read back exactly, safetensors and JSON only."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

PREFIX = "checkpoint-"
STATE = "state.json"


@dataclass(kw_only=True)
class TrainingState:
    """
    All that changes from step to step.

    Args:
        scaler: of the gradients, with fp16 alone.
        step: optimiser steps taken.
        logged_step: the last step that a line of the log was written after.
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
    Write `output_dir/checkpoint-<step>` under a temporary name, rename it, and drop all but the newest `keep`.

    Args:
        output_dir: the run's folder.
        state: what is written.
        settings: what the run depends on, JSON values by name, for `changed_settings`.
        keep: see above.
    Raises:
        OSError: it cannot be written; the checkpoints that were there are as they were.
    """
    final = output_dir / f"{PREFIX}{state.step}"
    temporary = output_dir / f".{PREFIX}{state.step}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, state, settings)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        there = list_checkpoints(output_dir)
        raise OSError(
            f"`{final}` cannot be written: {error}. "
            + (f"The last good one is {there[-1].name}; make room and resume from it." if there else "There is none.")
        ) from error
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for path in list_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(path)
    return final


def _write(folder: Path, state: TrainingState, settings: dict) -> None:
    folder.mkdir(parents=True)
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
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))},
        "settings": settings,
    }
    (folder / STATE).write_text(json.dumps(content, indent=2))


def load_checkpoint(path: Path, state: TrainingState) -> None:
    """Put everything that `save_checkpoint` wrote into `state`."""
    content = json.loads((path / STATE).read_text())
    state.model.load_state_dict(load_file(path / "model.safetensors"))
    _load_optimizer_tensors(state.optimizer, load_file(path / "optimizer.safetensors"))
    state.scheduler.load_state_dict(content["scheduler"])
    for group, rate in zip(state.optimizer.param_groups, state.scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    if state.ema is not None:
        if content["ema_step"] is None:
            raise ValueError(f"`{path}` holds no moving average. Resume with --no-use_ema or start afresh.")
        shadow = load_file(path / "ema.safetensors")
        for index, tensor in enumerate(state.ema.shadow_params):
            tensor.copy_(shadow[str(index)])
        state.ema.optimization_step = content["ema_step"]
    if state.scaler is not None and content.get("scaler"):
        state.scaler.load_state_dict(content["scaler"])
    state.step = content["step"]
    state.logged_step = content.get("logged_step", state.step)  # older checkpoints lack it, and the sums
    state.sums = {name: torch.tensor(value) for name, value in content.get("sums", {}).items()}


def read_settings(path: Path) -> dict:
    """The settings that the checkpoint `path` was written with."""
    return json.loads((path / STATE).read_text())["settings"]


def changed_settings(path: Path, settings: dict) -> list[str]:
    """`name: then -> now` for every setting that is not as it was when the checkpoint `path` was written."""
    then = read_settings(path)
    now = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    return [f"{name}: {then[name]!r} -> {now[name]!r}" for name in now if name in then and then[name] != now[name]]


def set_aside_later_checkpoints(output_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step` to abandoned-checkpoint-<step>, so that nothing resumes from them."""
    moved = []
    for path in list_checkpoints(output_dir):
        if int(path.name.removeprefix(PREFIX)) > step:
            target = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(path.rename(target))
    return moved


def find_checkpoint(output_dir: Path, request: str) -> tuple[Path | None, list[str]]:
    """
    The checkpoint that `request` asks for, and a sentence for every damaged one passed over.

    Args:
        output_dir: the run's folder.
        request: `latest` (an error if there is none), `if-any` (none is fine), or a checkpoint's path.
    Raises:
        FileNotFoundError: nothing usable where something was required.
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
            "Say 'if-any' to start afresh in that case."
        )
    return None, problems


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders below `output_dir`, oldest first."""
    numbered = [(path.name.removeprefix(PREFIX), path) for path in output_dir.glob(f"{PREFIX}*")]
    return [path for number, path in sorted(((int(n), p) for n, p in numbered if n.isdigit()))]


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, as a sentence, or None."""
    try:
        sizes = json.loads((path / STATE).read_text())["bytes"]
    except (OSError, ValueError, KeyError) as error:
        return f"`{path}` is not a checkpoint ({error})."
    for name, expected in sizes.items():
        actual = (path / name).stat().st_size if (path / name).exists() else 0
        if actual != expected:
            return f"`{path / name}` is damaged: {actual} of {expected} bytes."
    return None


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
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
