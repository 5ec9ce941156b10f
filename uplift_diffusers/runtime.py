"""Processes of a distributed job, devices and their names, and dtypes."""

import os
import platform
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

# torch is imported where it is needed: a command that only reads its share may have nothing else to do.
if TYPE_CHECKING:
    import torch

PATIENCE = timedelta(days=7)
"""How long a finished process waits for the slowest one."""

CPU_INFO = Path("/proc/cpuinfo")
"""Linux' description of the processor."""

_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})

MAX_SEED = 2**63 - 1
"""The largest seed accepted everywhere in this package."""


def process_share() -> tuple[int, int]:
    """
    Rank of this process and number of processes that `accelerate launch` or `torchrun` started; 0 and 1 without them.

    Raises:
        ValueError: the environment variables are inconsistent, so the processes could not find each other.
    """
    count = _number_in_environment("WORLD_SIZE", default=1, least=1)
    index = _number_in_environment("RANK", default=0, least=0)
    if index >= count:
        raise ValueError(f"RANK must be below WORLD_SIZE, which is {count}, got {index}. Unset both.")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if count > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE must come with {' and '.join(missing)}, got {count} without them. "
            "Start with `accelerate launch`, or unset it."
        )
    return index, count


def local_device_index() -> int | None:
    """
    The index of this process's accelerator on its machine; None without a launcher.

    Raises:
        ValueError: LOCAL_RANK is not a whole number.
    """
    return _number_in_environment("LOCAL_RANK", default=0, least=0) if "LOCAL_RANK" in os.environ else None


def choose_device(name: str = "auto") -> "torch.device":
    """
    The device called `name`, after a test computation on it.

    Args:
        name: auto (cuda, else mps, else cpu; under a launcher the accelerator of this process), cpu, cuda:1, ...
    Raises:
        ValueError: there is no such device.
    """
    import torch

    wanted = name
    if name == "auto":
        index = local_device_index()
        cuda = "cuda" if index is None else f"cuda:{index}"
        available = ((cuda, torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
        wanted = next((kind for kind, is_there in available if is_there), "cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device).item()  # "meta" is a device, but nothing can be computed there
    except Exception as error:  # what is raised for a device that is not there depends on its backend
        raise ValueError(f"`device` must be auto, cpu or a device that PyTorch finds here, got {name!r}.") from error
    return device


def sum_over_processes(*numbers: int) -> list[int]:
    """The sum of each number over all processes. Every process has to call this once, at its end."""
    if process_share()[1] == 1:
        return list(numbers)
    import torch
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    totals = torch.tensor(numbers)
    torch.distributed.all_reduce(totals)
    torch.distributed.destroy_process_group()
    return totals.tolist()


def preferred_dtype(device: "torch.device | str") -> "torch.dtype":
    """
    The fastest autocast dtype on `device`.

    bfloat16 on a CPU with AVX512_BF16 or AMX (as Linux reports it) and on GPUs that support it, float16 on other GPUs
    of NVIDIA and AMD, float32 elsewhere: a CPU without these instructions emulates bfloat16 slowly.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and _BF16_FLAGS & set(_cpu_info("flags").split()):
        return torch.bfloat16
    return torch.float32


def dtype_option(dtype: "torch.dtype") -> "dict[str, torch.dtype]":
    """
    The keyword argument of diffusers' `from_pretrained` for the dtype of the weights.

    diffusers renamed `torch_dtype` to `dtype` in 0.40, and earlier versions ignore the new name.
    """
    import diffusers
    from packaging.version import Version

    return {"dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype": dtype}


def device_name(device: "torch.device | str") -> str:
    """The accelerator's name, or the processor's."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type.upper()
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(name: str) -> str:
    """The first entry `name` of Linux' description of the processor; empty elsewhere."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name), "")


def _number_in_environment(name: str, *, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise ValueError(f"{name} must be a whole number of at least {least}, got {text!r:.40}. Unset it.")
    return int(text)
