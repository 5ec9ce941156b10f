"""Seconds and memory of a call, on any device."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch


def seconds_of(
    call: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of `call` by `clock`, until `device` has done its work."""
    _synchronize(device)
    start = clock()
    call()
    _synchronize(device)
    return clock() - start


def peak_of(call: Callable[[], object], device: torch.device) -> int | None:
    """
    Peak bytes in use by `call` beyond those before it: in the allocator on CUDA, in the process on Linux; None where
    neither is known.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _reset_peak_memory():
        call()
        return None
    before = status_bytes("VmRSS")
    call()
    return max(status_bytes("VmHWM") - before, 0)


def status_bytes(name: str) -> int:
    """An entry of Linux' description of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _reset_peak_memory() -> bool:
    """Return freed memory to the system and reset the kernel's peak counter. False if that fails."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # another system than Linux with the GNU library, or not allowed to
        return False
    return True
