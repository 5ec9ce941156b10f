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


def device_name(device: "torch.device | str") -> str:
    """The accelerator's name, or the processor's."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type.upper()
    info = Path("/proc/cpuinfo")  # Linux, where `platform` knows only the architecture
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
