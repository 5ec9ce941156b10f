"""What a command runs on: its share of the processes of one job, and the names of devices."""

import os
import platform
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

# torch is imported where it is needed: a command that only asks for its share may have nothing else to do.
if TYPE_CHECKING:
    import torch

PATIENCE = timedelta(days=7)
"""How long a process that is done waits for the slowest one."""

CPU_INFO = Path("/proc/cpuinfo")
"""Where Linux describes the processor."""

_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


def process_share() -> tuple[int, int]:
    """The index of this process, and how many `accelerate launch` or `torchrun` started: 0 and 1 without them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_device_index() -> int | None:
    """Which accelerator of its machine this process takes; None for a process that was started by itself."""
    index = os.environ.get("LOCAL_RANK")
    return None if index is None else int(index)


def sum_over_processes(*numbers: int) -> list[int]:
    """The sum of every number over all processes, each of which has to call this once, at its end."""
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
    The dtype of autocast that `device` computes fastest in.

    bfloat16 on a CPU with AVX512_BF16 or AMX (as Linux reports it) and on GPUs that have it, float16 on other GPUs of
    NVIDIA and AMD, float32 elsewhere: a CPU without these instructions emulates bfloat16 slowly.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and _BF16_FLAGS & set(_cpu_info("flags").split()):
        return torch.bfloat16
    return torch.float32


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
