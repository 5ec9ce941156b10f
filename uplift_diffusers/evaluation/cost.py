"""Cost of an output: seconds per stage, and memory."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from uplift_diffusers.evaluation.meters import peak_of, seconds_of
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
        peak = peak_of(lambda: method(sample), device)
        for _ in range(repeats):
            stages.update(encode=0.0, decode=0.0)
            seconds = seconds_of(lambda: method(sample), device)
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
            stages[name] += seconds_of(lambda: results.append(function(*args, **kwargs)), device)
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
