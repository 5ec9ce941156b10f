"""Cost of an output: seconds per stage, and memory."""

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from uplift_diffusers.evaluation.methods import Method
from uplift_diffusers.evaluation.protocols import Sample


@dataclass(frozen=True)
class Cost:
    """
    Medians over calls after a warm-up.

    Args:
        edge: the output's edge in pixels.
        seconds: from the small image or latents to the large image.
        encode, decode: seconds spent in the VAE's `encode` and `decode`.
        upsample: the remaining seconds.
        peak_bytes: peak memory of a call beyond what was in use before it, such as the weights; None if the system
            does not report it.
    """

    edge: int
    seconds: float
    encode: float
    upsample: float
    decode: float
    peak_bytes: int | None


def measure_cost(method: Method, sample: Sample, *, repeats: int, device: torch.device) -> Cost:
    """
    Call a method once to warm up, once for its memory, and `repeats` times to measure.

    The VAEs' `encode`, `decode` and `decode_strips` are replaced with timed versions during the calls, which separates
    the stages of any pipeline with a VAE. Decoding latents to the guide image counts as decoding.
    """
    calls = []
    with _stopwatch(method.vaes, device) as stages:
        method(sample)
        peak = _peak_of(lambda: method(sample), device)
        for _ in range(repeats):
            stages.update(encode=0.0, decode=0.0)
            seconds = _seconds_of(lambda: method(sample), device)
            calls.append((seconds, stages["encode"], seconds - sum(stages.values()), stages["decode"]))
    seconds, encode, upsample, decode = (statistics.median(column) for column in zip(*calls, strict=True))
    return Cost(sample.size[0], seconds, encode, upsample, decode, peak)


@contextmanager
def _stopwatch(vaes: list[torch.nn.Module], device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds that the VAEs spend in each stage inside the block."""
    stages = {"encode": 0.0, "decode": 0.0}

    def timed(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            results = []
            stages[name] += _seconds_of(lambda: results.append(function(*args, **kwargs)), device)
            return results[0]

        return call

    def timed_strips(function: Callable) -> Callable:
        def call(*args, **kwargs):
            strips = function(*args, **kwargs)
            advance = timed("decode", lambda: next(strips, None))
            while (strip := advance()) is not None:
                yield strip

        return call

    replaced = []
    for vae in vaes:
        for name in ("encode", "decode", "decode_strips"):
            if hasattr(vae, name):
                function = getattr(vae, name)
                # On the instance, in front of its class's method.
                setattr(vae, name, timed_strips(function) if name == "decode_strips" else timed(name, function))
                replaced.append((vae, name))
    try:
        yield stages
    finally:
        for vae, name in replaced:
            delattr(vae, name)


def _seconds_of(call: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _peak_of(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak bytes in use by `call` beyond those before it: in the allocator on CUDA, in the process on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _reset_peak_memory():
        call()
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def _reset_peak_memory() -> bool:
    """Return freed memory to the system and reset the kernel's peak counter. False if that fails."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # another system than Linux with the GNU library, or not allowed to
        return False
    return True


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
