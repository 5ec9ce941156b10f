"""
Time, FLOP and memory of the upsampler, compared with the same network in plain PyTorch (`benchmarks/reference.py`).

    python -m benchmarks.inference --output_dir runs/inference          # 53.5 M parameters, up to 512 -> 2048
    python -m benchmarks.inference --cases 128x2 128x4 --repeats 15     # only the small sizes
    python -m benchmarks.inference --count_memory --cases 512x4 1024x4 2048x4 --methods uplift tiled
    python -m benchmarks.inference --tiny                               # the same command in seconds, to try it

A case EDGExSCALE is an image of EDGE x EDGE pixels with latents of an eighth of that, which are upsampled by SCALE.
The methods are `plain`, the baseline; `uplift`, the model with default settings; `tiled`, with `upsample_tiled`;
`compiled`, with `torch.compile`; and `plain_bf16` and `uplift_bf16`, in bfloat16. They run in one process,
alternating, with a matrix product as a reference between them; peak memory is measured in a fresh process for each.

Writes results.json, report.md and time.png, and prints the report. The weights are random, from a seed. With
--count_memory nothing is computed: the methods run on tensors without data, and the live tensors at the peak are
counted, without weights and inputs, so any size is possible. The workspace of convolutions is not included.
"""

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import diffusers
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.measure import (
    MATMUL_EDGE,
    LiveMemory,
    count_flop,
    environment,
    fit_exponent,
    in_fresh_process,
    interleave,
    make_matmul,
    peak_of_call,
)
from benchmarks.reference import PlainUPLiFT
from uplift_diffusers import UPLiFTModel
from uplift_diffusers.models.conversion import convert_state_dict
from uplift_diffusers.tiling import upsample_tiled

METHODS = ("plain", "uplift", "tiled", "compiled", "plain_bf16", "uplift_bf16")
FULL_SIZE = {"encoder_channels": (64, 128, 256, 512, 512), "channels": 512, "refiner_blocks": 12}
TINY = {"encoder_channels": (8, 8, 20), "channels": 20, "refiner_blocks": 2}


@dataclass(frozen=True)
class Case:
    """An image of `edge` x `edge` pixels, upsampled by `num_steps` 2x steps."""

    edge: int
    num_steps: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        edge, _, scale = text.partition("x")
        known = {str(2**steps): steps for steps in range(1, 5)}
        if not edge.isdigit() or int(edge) < 8 or int(edge) % 8 or scale not in known:
            raise argparse.ArgumentTypeError(f"must be EDGEx2, x4, x8 or x16 with a multiple of 8, got {text!r}")
        return cls(int(edge), known[scale])

    @property
    def output_edge(self) -> int:
        return self.edge * 2**self.num_steps


@dataclass
class Measurement:
    """
    One method in one case.

    Args:
        seconds: seconds of every round.
        flop: FLOP of convolutions and products.
        matmul_seconds: seconds of a matrix product of `MATMUL_EDGE` in the method's dtype, in the same rounds.
        difference: largest absolute difference to the plain network's output, divided by its standard deviation; None
            without the method `plain`.
        peak_bytes: see `measure.peak_of_call`.
    """

    seconds: list[float]
    flop: int
    matmul_seconds: list[float]
    difference: float | None
    peak_bytes: int | None = None
    median_s: float = field(init=False)

    def __post_init__(self):
        self.median_s = statistics.median(self.seconds)

    @property
    def share(self) -> float:
        """Share of the rate of the matrix product."""
        return self.flop / self.median_s / (2 * MATMUL_EDGE**3 / statistics.median(self.matmul_seconds))


def make_run(method: str, case: Case, options: argparse.Namespace):
    """A function without arguments that upsamples once and returns (1, 4, h, w)."""
    torch.manual_seed(0)
    network = PlainUPLiFT(**(TINY if options.tiny else FULL_SIZE)).eval()
    inputs = {"image": torch.rand(1, 3, case.edge, case.edge), "num_steps": case.num_steps}
    raw_latents = torch.randn(1, 4, case.edge // 8, case.edge // 8)
    if not method.startswith("plain"):
        network = _as_uplift(network)
    dtype = torch.bfloat16 if method.endswith("bf16") else torch.float32
    # Not by Module.to, which cannot convert tensors without data, see count_peak.
    weights = {name: tensor.to(options.device, dtype) for name, tensor in network.state_dict().items()}
    network.load_state_dict(weights, assign=True)
    inputs["image"] = inputs["image"].to(options.device, dtype)
    raw_latents = raw_latents.to(options.device, dtype)
    if method == "compiled":
        network.compile(fullgraph=True)
    call = partial(upsample_tiled, network, tile_size=options.tile_size) if method == "tiled" else network

    @torch.no_grad()
    def run() -> torch.Tensor:
        randomness = {"generator": torch.Generator().manual_seed(0)}
        if method == "compiled":  # a generator cannot be part of a graph
            randomness = {"noise": list(network.draw_noise(raw_latents, case.num_steps, **randomness))}
        output = call(raw_latents, **inputs, **randomness)
        if method.startswith("plain"):
            return output[-1]
        return output if method == "tiled" else output.sample

    return run


def _as_uplift(plain: PlainUPLiFT) -> UPLiFTModel:
    """The same network as a UPLiFTModel."""
    groups = plain.encoder.values()
    with torch.device("meta"):
        model = UPLiFTModel(
            encoder_block_out_channels=tuple(group.blocks[0].conv[0].out_channels for group in groups),
            decoder_channels=plain.ref_outc.in_channels,
            refiner_channels=plain.ref_outc.in_channels,
            refiner_layers=len(plain.refiner.blocks),
        ).eval()
    model.load_state_dict(convert_state_dict(plain.state_dict()), assign=True)
    return model


def measure_case(case: Case, options: argparse.Namespace) -> dict[str, Measurement]:
    runs = {method: make_run(method, case, options) for method in options.methods}
    outputs, flop = {}, {}
    for method, run in runs.items():  # the first runs, whose time does not count
        # A compiled graph cannot be looked into; it has the work of the model.
        counted = make_run("uplift", case, options) if method == "compiled" else run
        outputs[method], flop[method] = count_flop(counted)
        if method == "compiled":
            outputs[method] = run()
    matmuls = {
        f"matmul {dtype}": make_matmul(device=options.device, dtype=dtype)
        for dtype in sorted({_dtype_of(method) for method in runs}, key=str)
    }
    seconds = interleave(
        {**runs, **matmuls}, rounds=options.repeats, max_seconds=options.max_seconds, device=options.device
    )
    return {
        method: Measurement(
            seconds[method],
            flop[method],
            seconds[f"matmul {_dtype_of(method)}"],
            _difference(outputs[method], outputs.get("plain")),
        )
        for method in runs
    }


def _difference(output: torch.Tensor, expected: torch.Tensor | None) -> float | None:
    return None if expected is None else ((output.float() - expected).abs().max() / expected.std()).item()


def measure_peak(method: str, case: Case, options: argparse.Namespace) -> int:
    diffusers.utils.logging.set_verbosity_error()
    set_threads(options)
    return peak_of_call(make_run(method, case, options), device=options.device)


def count_peak(method: str, case: Case, options: argparse.Namespace) -> int:
    """Peak bytes of the tensors that the method creates."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        run = make_run(method, case, options)
        with LiveMemory() as memory:
            run()
    return memory.peak


def _dtype_of(method: str) -> torch.dtype:
    return torch.bfloat16 if method.endswith("bf16") else torch.float32


def set_threads(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)


def report(results: dict[Case, dict[str, Measurement]], facts: dict) -> str:
    """Tables in Markdown."""
    lines = [", ".join(f"{name} {value}" for name, value in facts.items()) + ".", ""]
    lines += [
        "| image | output | method | seconds | speed | GFLOP | share of matmul | difference | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, measurements in results.items():
        plain = measurements.get("plain")
        for method, measured in measurements.items():
            ratio = f"{plain.median_s / measured.median_s:.2f}x" if plain else "-"
            difference = "-" if measured.difference is None else f"{measured.difference:.1e}"
            peak = "-" if measured.peak_bytes is None else f"{measured.peak_bytes / 1e6:.0f} MB"
            lines.append(
                f"| {case.edge} | {case.output_edge} | {method} | {measured.median_s:.3f} | {ratio} | "
                f"{measured.flop / 1e9:.0f} | {measured.share:.0%} | {difference} | {peak} |"
            )
    for method, exponent in exponents(results).items():
        lines += ["", f"{method}: seconds grow with the output's pixels to the power of {exponent:.3f}."]
    return "\n".join(lines) + "\n"


def exponents(results: dict[Case, dict[str, Measurement]]) -> dict[str, float]:
    """Of time against output pixels at the most frequent scale, for methods with at least two sizes."""
    fitted = {}
    for method in METHODS:
        points = _points(results, method)
        if len(points) > 1:
            fitted[method] = fit_exponent(*map(list, zip(*points, strict=True)))
    return fitted


def _points(results: dict[Case, dict[str, Measurement]], method: str) -> list[tuple[int, float]]:
    steps = [case.num_steps for case in results]
    most = max(steps, key=steps.count)
    return [
        (case.output_edge**2, measurements[method].median_s)
        for case, measurements in results.items()
        if case.num_steps == most and method in measurements
    ]


def plot(results: dict[Case, dict[str, Measurement]], path: Path) -> None:
    """Time against output pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method, exponent in exponents(results).items():
        pixels, seconds = zip(*_points(results, method), strict=True)
        axes.loglog(pixels, seconds, "o-", label=f"{method}: exponent {exponent:.2f}")
    axes.set(xlabel="output pixels", ylabel="seconds")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=150)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/inference"))
    parser.add_argument("--cases", type=Case.parse, nargs="+", metavar="EDGExSCALE")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=[m for m in METHODS if m != "compiled"])
    parser.add_argument("--repeats", type=int, default=7, help="rounds; the median is reported")
    parser.add_argument("--max_seconds", type=float, default=240, help="limit of a case, after two rounds")
    parser.add_argument("--tile_size", type=int, help="tile size in pixels (default: 256)")
    parser.add_argument("--threads", type=int, default=0, help="PyTorch threads; 0 for the default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--count_memory", action="store_true", help="print peak memory and compute nothing")
    parser.add_argument("--no_memory", action="store_true", help="skip peak memory, which takes a process per method")
    parser.add_argument("--tiny", action="store_true", help="a network of a few thousand parameters, small images")
    options = parser.parse_args(arguments)
    options.cases = options.cases or [
        Case.parse(text)
        for text in (("16x2", "16x4", "32x4") if options.tiny else ("128x2", "128x4", "256x4", "512x4"))
    ]
    options.tile_size = options.tile_size or (16 if options.tiny else 256)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    diffusers.utils.logging.set_verbosity_error()
    if options.count_memory:
        for case in options.cases:
            for method in options.methods:
                peak = count_peak(method, case, options)
                print(f"{case.edge} -> {case.output_edge} {method}: {peak / 1e6:.0f} MB", flush=True)
        return
    set_threads(options)
    results = {}
    for case in options.cases:
        results[case] = measure_case(case, options)
        if not options.no_memory:
            for method, measured in results[case].items():
                measured.peak_bytes = in_fresh_process(measure_peak, method, case, options)

    facts = {**environment(options.device), "tile_size": options.tile_size}
    text = report(results, facts)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    content = {
        "environment": facts,
        "exponents": exponents(results),
        "cases": [
            {**asdict(case), "methods": {method: asdict(measured) for method, measured in measurements.items()}}
            for case, measurements in results.items()
        ],
    }
    (options.output_dir / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    (options.output_dir / "report.md").write_text(text)
    plot(results, options.output_dir / "time.png")
    print(text)


if __name__ == "__main__":
    main()
