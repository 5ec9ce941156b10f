"""Shared measurements of the benchmarks: interleaved timing, memory of a fresh process, the machine's FLOP rate."""

import importlib.metadata
import multiprocessing
import os
import platform
import resource
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from uplift_diffusers.evaluation.meters import seconds_of
from uplift_diffusers.runtime import device_name

Result = TypeVar("Result")

MATMUL_EDGE = 2048


def interleave(
    functions: dict[str, Callable[[], object]], *, rounds: int, max_seconds: float, device: str
) -> dict[str, list[float]]:
    """
    Seconds of every function in every round. The functions alternate, so other load on the machine affects all of
    them.

    Args:
        rounds: maximum number of rounds; the first two are always made.
        max_seconds: no round starts after this time.
    """
    seconds = {name: [] for name in functions}
    begin = time.perf_counter()
    for index in range(rounds):
        if index >= 2 and time.perf_counter() - begin > max_seconds:
            break
        for name, function in functions.items():
            seconds[name].append(seconds_of(function, torch.device(device)))
    return seconds


def make_matmul(*, device: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """A product of two square matrices of `MATMUL_EDGE`, `2 * MATMUL_EDGE**3` FLOP: the machine's peak rate."""
    left, right = (torch.randn(MATMUL_EDGE, MATMUL_EDGE, device=device, dtype=dtype) for _ in range(2))
    return lambda: left @ right


def count_flop(function: Callable[[], Result]) -> tuple[Result, int]:
    """The result of `function`, and the FLOP of the convolutions and products that it computes."""
    with FlopCounterMode(display=False) as counter:
        result = function()
    return result, counter.get_total_flops()


def peak_of_call(function: Callable[[], object], *, device: str) -> int:
    """
    Peak bytes that `function` uses beyond those in use before, including its result.

    Call it in a fresh process, see [`in_fresh_process`]: reuse of memory that was freed before would not be seen.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if reset.is_file():
        reset.write_text("5")  # forget the peak of loading
    before = psutil.Process().memory_info().rss
    function()
    return peak_resident_bytes() - before


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all live tensors created in its context, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, output)
        return output

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            size = self.known[storage] = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size


def peak_resident_bytes() -> int:
    """The peak memory of this process."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage on Linux counts what the process held before it became this program
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_fresh_process(function: Callable, *inputs):
    """`function(*inputs)`, called in a new Python process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, inputs)


def fit_exponent(pixels: list[int], seconds: list[float]) -> float:
    """e of seconds ~ pixels**e, by least squares of the logarithms."""
    logs = torch.tensor([pixels, seconds], dtype=torch.float64).log()
    x, y = logs - logs.mean(dim=1, keepdim=True)
    return (x @ y / (x @ x)).item()


def environment(device: str) -> dict[str, str | int]:
    """Versions and hardware that the figures depend on."""
    versions = {name: importlib.metadata.version(name) for name in ("uplift-diffusers", "torch", "diffusers")}
    return {
        **versions,
        "python": platform.python_version(),
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
