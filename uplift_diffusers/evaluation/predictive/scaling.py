"""
Cost of an upsampler against the number of tokens: seconds, memory and floating-point operations.

Every measurement runs in a separate process, so memory is not shared between measurements, and under limits, so it
fails before the system runs out of memory. Costs beyond the limits are extrapolated from the measurements and marked
as such.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from uplift_diffusers.evaluation.meters import peak_of, seconds_of, status_bytes
from uplift_diffusers.evaluation.predictive.peers import PEERS, load_peer
from uplift_diffusers.evaluation.predictive.peers.interface import FeatureUpsampler

REFERENCE = "uplift"
"""The method that the others are compared with."""

ENOUGH_SECONDS = 20.0
"""No other call is timed after so many: their first one, which is slower by some milliseconds, is then good enough."""

Measured = tuple[float, float | None]
"""A measurement: seconds and bytes."""

_ATEN = torch.ops.aten
_ELEMENTWISE_FLOP = {
    # Neighbourhood attention consists of products and sums, which the counter ignores by default.
    _ATEN.mul: lambda *args, out_val, **kwargs: out_val.numel(),
    _ATEN.sum: lambda values, *args, out_val=None, **kwargs: values.numel(),
    _ATEN.addcmul_: lambda *args, out_val, **kwargs: 2 * out_val.numel(),
}
for _function in _ELEMENTWISE_FLOP.values():
    _function._get_raw = True  # the counter is to hand over tensors, not their shapes


@dataclass(frozen=True)
class Workload:
    """
    One call of an upsampler to pixel resolution.

    Args:
        method: "uplift" (the published architecture), or one of `PEERS`. Weights are random, as costs do not depend on
            them.
        side: tokens along each side of the image.
        channels: C, the channels of the features.
        patch_size: edge of a token in pixels.
        query_chunk: see `load_peer`.
    """

    method: str
    side: int
    channels: int = 384
    patch_size: int = 16
    query_chunk: int | None = None

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def image_px(self) -> int:
        return self.side * self.patch_size

    def make(self, device: torch.device | str) -> Callable[[], torch.Tensor]:
        """Upsampler and inputs, ready to be called."""
        with torch.device(device):
            upsampler = self._upsampler().eval().to(device)
            features = torch.randn(1, self.channels, self.side, self.side)
            image = torch.rand(1, 3, self.image_px, self.image_px)
        return lambda: upsampler.upsample(features, image, (self.image_px, self.image_px))

    def _upsampler(self) -> FeatureUpsampler:
        if self.method != REFERENCE:
            return load_peer(self.method, channels=self.channels, query_chunk=self.query_chunk)
        # Not above: diffusers takes seconds to import, in every process that measures.
        from uplift_diffusers.evaluation.predictive.upsamplers import UPLiFT
        from uplift_diffusers.models.conversion import CONFIGS
        from uplift_diffusers.models.upsampler import UPLiFTModel

        config = {**CONFIGS["dinov3-splus16"], "latent_channels": self.channels, "spatial_factor": self.patch_size}
        return UPLiFT(UPLiFTModel(**config))


@dataclass(frozen=True)
class CostPoint:
    """
    The cost of one call.

    Args:
        tokens: number of tokens.
        image_px: edge in pixels of the image and of the result.
        flop: floating-point operations of convolutions, products and sums; norms and activations are not counted.
        seconds: of the quickest call, by the clock of [`Limits`]; extrapolated if `measured` is False; or None.
        peak_bytes: peak memory of a call beyond weights and inputs, including the result; or as for `seconds`.
        measured: whether seconds and bytes are measured, not extrapolated.
        reason: why they were not measured.
    """

    tokens: int
    image_px: int
    flop: int
    seconds: float | None
    peak_bytes: float | None
    measured: bool
    reason: str = ""


@dataclass(frozen=True)
class Limits:
    """
    Limits and settings of a measurement.

    Args:
        bytes: memory limit of one call.
        seconds: time limit of one call.
        repeats: maximum number of timed calls; none starts after `ENOUGH_SECONDS` in all.
        threads: PyTorch threads.
    """

    bytes: float
    seconds: float
    repeats: int = 3
    threads: int = 1

    def clock(self, device: str) -> Callable[[], float]:
        """What calls are timed by: the processor's time of one thread, which other programs do not change much."""
        return time.process_time if device == "cpu" and self.threads == 1 else time.perf_counter


Measure = Callable[[Workload, Limits, str], Measured | str]


def count_flop(workload: Workload) -> int:
    """
    Floating-point operations of a call, counted without executing it; 0 for interpolation, which is not counted.

    Raises:
        ValueError: the method needs more tokens.
    """
    if workload.method in PEERS and not PEERS[workload.method].licence:
        return 0  # what is counted otherwise is the arithmetic of indices
    call = workload.make("meta")
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_ELEMENTWISE_FLOP) as counter:
        call()
    return counter.get_total_flops()


def measure_costs(
    methods: Sequence[str],
    sides: Iterable[int],
    *,
    limits: Limits,
    channels: int = 384,
    patch_size: int = 16,
    query_chunk: int | None = None,
    device: str = "cpu",
    measure: Measure | None = None,
) -> dict[str, list[CostPoint]]:
    """
    By method, a point for each number of tokens, in ascending order, except those that a method does not support.

    Args:
        methods: "uplift" and names of `PEERS`.
        sides: tokens along each side.
        limits: see [`Limits`].
        channels, patch_size, query_chunk: see [`Workload`].
        device: "cpu" or "cuda".
        measure: replaces `measure_in_process`, for example to cache its results.
    """
    measure = measure or measure_in_process
    points: dict[str, list[CostPoint]] = {method: [] for method in methods}
    jobs = [(method, side) for method in methods for side in sorted(set(sides))]
    for method, side in tqdm(jobs, desc="Time and memory", unit="point", disable=None, dynamic_ncols=True):
        workload = Workload(method, side, channels, patch_size, query_chunk)
        try:
            flop = count_flop(workload)
        except ValueError:
            continue
        known = [point for point in points[method] if point.measured]
        computed = _compute(workload, flop, known)
        reason = _why_not(computed, limits)
        if not reason:
            measured = measure(workload, limits, device)
            if isinstance(measured, str):
                reason = measured
            else:
                computed = measured
        points[method].append(
            CostPoint(workload.tokens, workload.image_px, flop, *computed, measured=not reason, reason=reason)
        )
    return points


def fit_exponent(points: Sequence[CostPoint], quantity: str, *, last: int | None = None) -> float | None:
    """
    The least-squares slope of log(quantity) over log(tokens), from measured points; None for fewer than two.

    Args:
        quantity: "seconds", "peak_bytes" or "flop" (which is always known).
        last: use only this many points, those with the most tokens.
    """
    known = [point for point in points if (point.measured or quantity == "flop") and getattr(point, quantity)]
    known = known[-last:] if last else known
    if len(known) < 2:
        return None
    tokens, values = np.log([[point.tokens, getattr(point, quantity)] for point in known]).T
    return float(np.polyfit(tokens, values, 1)[0])


def find_crossing(points: Sequence[CostPoint], reference: Sequence[CostPoint], quantity: str) -> float | None:
    """
    The number of tokens from which a method costs more than the reference; None if it never does.

    The ratio of the two is interpolated linearly between points, which is exact if one grows as T and the other
    as a T + b T^2.
    """
    others = {point.tokens: getattr(point, quantity) for point in reference}
    ratios = [
        (point.tokens, getattr(point, quantity) / others[point.tokens])
        for point in points
        if getattr(point, quantity) and others.get(point.tokens)
    ]
    for (tokens, ratio), (more_tokens, more) in zip(ratios, ratios[1:]):
        if ratio < 1 <= more:
            return tokens + (more_tokens - tokens) * (1 - ratio) / (more - ratio)
    return None


def _compute(workload: Workload, flop: int, known: Sequence[CostPoint]) -> tuple[float | None, float | None]:
    """Extrapolate seconds at the speed of the largest measured call, and bytes as a T + b T^2 fitted to all calls."""
    if not known:
        return None, None
    largest = known[-1]
    growth = flop / largest.flop if largest.flop else workload.tokens / largest.tokens
    seconds = largest.seconds * growth if largest.seconds is not None else None
    bytes_known = [(point.tokens, point.peak_bytes) for point in known if point.peak_bytes]
    return seconds, _fit_bytes(bytes_known, workload.tokens) if bytes_known else None


def _fit_bytes(known: Sequence[tuple[int, float]], tokens: int) -> float:
    """Least squares of relative errors, both terms at least 0; from one point, only the quadratic term."""
    if len(known) == 1:
        return known[0][1] * (tokens / known[0][0]) ** 2
    counts, values = np.array(known, dtype=np.float64).T
    terms = np.stack([counts, counts**2], axis=1) / values[:, None]
    candidates = []
    for used in ([0, 1], [0], [1]):
        weights = np.zeros(2)
        weights[used] = np.linalg.lstsq(terms[:, used], np.ones(len(values)), rcond=None)[0]
        if (weights >= 0).all():
            candidates.append((np.square(terms @ weights - 1).sum(), weights))
    weights = min(candidates, key=lambda candidate: candidate[0])[1]
    return float(weights @ [tokens, tokens**2])


def _why_not(computed: tuple[float | None, float | None], limits: Limits) -> str:
    seconds, peak_bytes = computed
    if peak_bytes is not None and peak_bytes > limits.bytes:
        return "memory"
    return "time" if seconds is not None and seconds > limits.seconds else ""


def measure_in_process(workload: Workload, limits: Limits, device: str) -> Measured | str:
    """Seconds and bytes of a call, measured in another process; "memory" or "time" if a limit was exceeded."""
    order = json.dumps({"workload": asdict(workload), "limits": asdict(limits), "device": device})
    environment = {**os.environ, "OMP_NUM_THREADS": str(limits.threads), "PYTHONPATH": os.pathsep.join(sys.path)}
    patience = 120 + 4 * (limits.repeats + 2) * limits.seconds
    try:
        finished = subprocess.run(
            [sys.executable, "-m", __spec__.name, order],
            capture_output=True,
            text=True,
            env=environment,
            timeout=patience,
        )
    except subprocess.TimeoutExpired:
        return "time"
    if finished.returncode:
        if any(sign in finished.stderr for sign in ("allocate memory", "MemoryError", "out of memory")):
            return "memory"
        raise RuntimeError(f"{workload.method} at {workload.tokens} tokens failed:\n{finished.stderr}")
    return tuple(json.loads(finished.stdout.splitlines()[-1]))


def _measure_here(workload: Workload, limits: Limits, device: str) -> Measured:
    torch.set_num_threads(limits.threads)
    torch.manual_seed(0)
    call = workload.make(device)
    if device == "cpu":
        import resource  # not on Windows

        # After imports and weights: their address space is not the call's.
        in_use = status_bytes("VmData")
        limit = int(in_use + 1.25 * limits.bytes)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with torch.inference_mode():
        seconds: list[float] = []

        def timed() -> None:
            seconds.append(seconds_of(call, torch.device(device), limits.clock(device)))

        # The largest peak: what the system takes back meanwhile of code that lies in memory makes a peak look smaller.
        peaks = [peak_of(timed, torch.device(device))]
        while len(seconds) < limits.repeats and sum(seconds) < ENOUGH_SECONDS:
            peaks.append(peak_of(timed, torch.device(device)))
    known = [peak for peak in peaks if peak is not None]
    return min(seconds), max(known, default=None)


def available_bytes(device: str) -> float:
    """Available memory: of the GPU, or of the machine as Linux estimates it; elsewhere its total memory."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def known_methods() -> tuple[str, ...]:
    return REFERENCE, *PEERS


def sides_of(tokens: Iterable[int]) -> list[int]:
    """
    Tokens per side from numbers of tokens.

    Raises:
        ValueError: a number is not a square.
    """
    sides = []
    for count in tokens:
        side = math.isqrt(count)
        if side < 1 or side**2 != count:
            raise ValueError(f"`tokens` must be squares, got {count}. Near it are {side**2} and {(side + 1) ** 2}.")
        sides.append(side)
    return sides


if __name__ == "__main__":
    _order = json.loads(sys.argv[1])
    print(json.dumps(_measure_here(Workload(**_order["workload"]), Limits(**_order["limits"]), _order["device"])))
