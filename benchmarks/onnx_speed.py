"""
The embedded bundle in onnxruntime beside PyTorch, and how soon the example script begins its work.

    python scripts/export_onnx.py uplift-2x.onnx
    python -m benchmarks.onnx_speed uplift-2x.onnx

One thread. The two take turns on one picture. Times are CPU seconds of the process, medians, which other work on the
machine lengthens less than the clock's. The start is that of `examples/onnx_upscale.py` in a fresh process, up to the
moment when it calls the network: by the clock and in CPU seconds, the fastest and the median.
"""

import argparse
import importlib.metadata
import statistics
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime
import torch

from benchmarks.measure import environment
from uplift_diffusers import UPLiFTSuperResolutionPipeline, embedded_bundle
from uplift_diffusers.latent_space import LatentCodec

ROOT = Path(__file__).resolve().parent.parent
START = """
import runpy, sys, time
import onnxruntime

class Session(onnxruntime.InferenceSession):
    def run(self, *inputs):
        print(time.time(), time.process_time())
        sys.exit()

onnxruntime.InferenceSession = Session
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def measure_start(model: str, *, repeats: int) -> list[tuple[float, float]]:
    """(seconds by the clock, CPU seconds) of every start."""
    files = [ROOT / "examples" / "onnx_upscale.py", model, ROOT / "examples" / "coffee.jpg", "never-written.png"]
    starts = []
    for _ in range(repeats):
        begin = time.time()
        run = subprocess.run([sys.executable, "-c", START, *files], check=True, capture_output=True, text=True)
        clock, cpu = map(float, run.stdout.split())
        starts.append((clock - begin, cpu))
    return starts


def compare(model: str, sizes: list[int], *, repeats: int) -> dict[int, tuple[float, float, float]]:
    """By edge of the picture: CPU seconds of PyTorch and of onnxruntime, and the largest difference of the outputs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    num_steps = int(session.get_modelmeta().custom_metadata_map["scale"]).bit_length() - 1
    pipe = UPLiFTSuperResolutionPipeline.from_pretrained(embedded_bundle())
    pipe.vae.disable_tiling()
    codec = LatentCodec(pipe.vae)

    @torch.no_grad()
    def eager(image: torch.Tensor) -> torch.Tensor:
        latents = pipe.upsampler(codec.encode(image), image=image, num_steps=num_steps).sample
        return codec.decode(latents)

    found = {}
    for size in sizes:
        image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        functions = (lambda image=image: eager(image), lambda image=image: session.run(None, {"image": image.numpy()}))
        expected, (sample,) = (function() for function in functions)
        seconds: tuple[list[float], ...] = ([], [])
        for _ in range(repeats):
            for function, times in zip(functions, seconds, strict=True):
                begin = time.process_time()
                function()
                times.append(time.process_time() - begin)
        difference = (expected - torch.from_numpy(sample)).abs().max().item()
        found[size] = (*map(statistics.median, seconds), difference)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what scripts/export_onnx.py made of the embedded bundle")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 384], help="edges in pixels")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| image | PyTorch, eager | onnxruntime | | difference |\n| --- | --- | --- | --- | --- |")
    for size, (eager, onnx, difference) in compare(options.model, options.sizes, repeats=options.repeats).items():
        cells = (f"{size} x {size}", f"{eager:.2f} s", f"{onnx:.2f} s", f"{eager / onnx:.2f}x", f"{difference:.1e}")
        print("| " + " | ".join(cells) + " |", flush=True)
    clock, cpu = zip(*measure_start(options.model, repeats=options.repeats), strict=True)
    print(f"\nStart: {min(clock):.2f} s by the clock (median {statistics.median(clock):.2f})", end=", ")
    print(f"{min(cpu):.2f} s of the CPU (median {statistics.median(cpu):.2f})")
    print({"onnxruntime": importlib.metadata.version("onnxruntime"), **environment("cpu")})


if __name__ == "__main__":
    main()
