"""Training state on disk: written whole or not at all, read back exactly, safetensors and JSON only."""

import json
import shutil
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

PREFIX = "checkpoint-"
STATE = "state.json"


def save_checkpoint(
    output_dir: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    ema: EMAModel | None,
    settings: dict,
    keep: int,
) -> Path:
    """
    Write `output_dir/checkpoint-<step>` under a temporary name, rename it, and drop all but the newest `keep`.

    `settings` are what the run depends on, JSON values by name, for `changed_settings`.
    """
    final = output_dir / f"{PREFIX}{step}"
    temporary = output_dir / f".{PREFIX}{step}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(_contiguous(model.state_dict()), temporary / "model.safetensors")
    save_file(_optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
    if ema is not None:
        shadow = {str(index): tensor for index, tensor in enumerate(ema.shadow_params)}
        save_file(_contiguous(shadow), temporary / "ema.safetensors")
    state = {
        "step": step,
        "scheduler": {k: v for k, v in scheduler.state_dict().items() if isinstance(v, (int, float, bool, list))},
        "ema_step": None if ema is None else ema.optimization_step,
        "bytes": {path.name: path.stat().st_size for path in sorted(temporary.glob("*.safetensors"))},
        "settings": settings,
    }
    (temporary / STATE).write_text(json.dumps(state, indent=2))
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for path in list_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(path)
    return final


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    ema: EMAModel | None,
) -> int:
    """Restore everything that `save_checkpoint` wrote; returns the step it was written at."""
    state = json.loads((path / STATE).read_text())
    model.load_state_dict(load_file(path / "model.safetensors"))
    _load_optimizer_tensors(optimizer, load_file(path / "optimizer.safetensors"))
    scheduler.load_state_dict(state["scheduler"])
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    if ema is not None:
        if state["ema_step"] is None:
            raise ValueError(f"`{path}` holds no moving average. Resume with --no-use_ema or start afresh.")
        shadow = load_file(path / "ema.safetensors")
        for index, tensor in enumerate(ema.shadow_params):
            tensor.copy_(shadow[str(index)])
        ema.optimization_step = state["ema_step"]
    return state["step"]


def changed_settings(path: Path, settings: dict) -> list[str]:
    """`name: then -> now` for every setting that is not as it was when the checkpoint `path` was written."""
    then = json.loads((path / STATE).read_text())["settings"]
    now = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    return [f"{name}: {then.get(name)!r} -> {now.get(name)!r}" for name in now if then.get(name) != now.get(name)]


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
