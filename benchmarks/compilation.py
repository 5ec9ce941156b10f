"""
What `torch.compile` costs, and when: CPU seconds of the first call at every size, beside those of the next call.

    python -m benchmarks.compilation                                # the embedded upsampler and the 53.5 M network
    python -m benchmarks.compilation --models embedded --sizes 64 96 128 160 --num_steps 2

Default settings: `torch.compile(upsampler)`, called as the pipelines call it. The sizes come one after the other, in
one piece; then, compiled again, an image of twice the last size in tiles of the first, a row for every tile. Inductor
starts with an empty cache, and compiles in this process, so that its time is this process's and its children's, and
not what else the machine does. "graphs" are those that were traced in the call.
"""

import argparse
import os
import resource

import diffusers
import torch
from torch._dynamo.utils import counters

from benchmarks.inference import FULL_SIZE
from benchmarks.measure import environment
from uplift_diffusers import UPLiFTModel, UPLiFTSuperResolutionPipeline, embedded_bundle
from uplift_diffusers.pipelines.upscale_stage import Progress, upscale_raw_latents

MODELS = ("embedded", "53.5 M")


def make_model(name: str) -> UPLiFTModel:
    if name == "embedded":
        return UPLiFTSuperResolutionPipeline.from_pretrained(embedded_bundle()).upsampler
    torch.manual_seed(0)
    return UPLiFTModel(
        encoder_block_out_channels=FULL_SIZE["encoder_channels"],
        decoder_channels=FULL_SIZE["channels"],
        refiner_channels=FULL_SIZE["channels"],
        refiner_layers=FULL_SIZE["refiner_blocks"],
    ).eval()


class Clock:
    """CPU seconds of this process and of the compilers that it started, and graphs traced, since the last reading."""

    def __init__(self):
        self.before = self._now()

    def read(self) -> tuple[float, int]:
        now = self._now()
        passed = now[0] - self.before[0], now[1] - self.before[1]
        self.before = now
        return passed

    def _now(self) -> tuple[float, int]:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used), counters["stats"]["unique_graphs"]


def make_call(model, edge: int, num_steps: int, **settings):
    """A function that upsamples latents for an image of `edge` x `edge` pixels."""
    channels, factor = model.config.latent_channels, model.config.spatial_factor
    latents = torch.randn(1, channels, edge // factor, edge // factor, generator=torch.Generator().manual_seed(0))
    image = torch.rand(1, 3, edge, edge, generator=torch.Generator().manual_seed(0))
    settings = {"image": image, "upsampler": model, "num_steps": num_steps, **settings}
    return lambda: upscale_raw_latents(latents, generator=torch.Generator().manual_seed(0), **settings)


@torch.no_grad()
def measure(name: str, sizes: list[int], num_steps: int) -> None:
    compiled = torch.compile(make_model(name))
    for edge in sizes:
        call = make_call(compiled, edge, num_steps)
        clock = Clock()
        call()
        first, graphs = clock.read()
        call()
        print(
            f"| {name} | {edge} -> {edge * 2**num_steps} | {first:.2f} | {clock.read()[0]:.2f} | {graphs} |",
            flush=True,
        )

    torch.compiler.reset()
    edge, tile_size = 2 * sizes[-1], sizes[0]
    rows = []
    progress = Progress(lambda done, total: rows.append(clock.read()), total=0)
    call = make_call(torch.compile(make_model(name)), edge, num_steps, tile_size=tile_size, progress=progress)
    clock = Clock()
    call()
    tiles = [rows[start : start + num_steps] for start in range(0, len(rows), num_steps)]
    for index, steps in enumerate(tiles[:4], start=1):
        seconds, graphs = (sum(values) for values in zip(*steps, strict=True))
        print(f"| {name} | tile {index} of {len(tiles)}, {tile_size} px | {seconds:.2f} | - | {graphs} |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 160], help="edges in pixels")
    parser.add_argument("--num_steps", type=int, default=1)
    options = parser.parse_args(arguments)
    diffusers.utils.logging.set_verbosity_error()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.compiler.config.force_disable_caches = True
    print(", ".join(f"{name} {value}" for name, value in environment("cpu").items()) + "\n")
    print("| model | size | first call, CPU s | next call | graphs |\n| --- | --- | --- | --- | --- |")
    for name in options.models:
        torch.compiler.reset()
        measure(name, options.sizes, options.num_steps)


if __name__ == "__main__":
    main()
