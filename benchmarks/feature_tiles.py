"""
Time and memory of UPLiFTFeaturePipeline with tiles of several sizes, each in a process of its own.

    python -m benchmarks.feature_tiles --tile_sizes 0 768 512

A DINOv3-S+/16 and its upsampler, with random weights, on one image; 0 is no tiles.
"""

import argparse
import time

import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from benchmarks.measure import environment, in_fresh_process, peak_resident_bytes
from uplift_diffusers import FeatureSpace, UPLiFTFeaturePipeline, UPLiFTModel
from uplift_diffusers.models.conversion import CONFIGS

DINOV3_SPLUS16 = DINOv3ViTConfig(
    hidden_size=384,
    intermediate_size=1536,
    num_hidden_layers=12,
    num_attention_heads=6,
    patch_size=16,
    num_register_tokens=4,
    use_gated_mlp=True,
)


def measure(tile_size: int | None, image_px: int) -> tuple[float, float]:
    """Processor seconds of a call, and the peak of the process in GiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = DINOv3ViTModel(DINOV3_SPLUS16)
    config = {**CONFIGS["dinov3-splus16"], "latent_space": FeatureSpace.of(backbone).name}
    pipe = UPLiFTFeaturePipeline(backbone, UPLiFTModel(**config).eval())
    image = torch.rand(1, 3, image_px, image_px)
    begin = time.process_time()
    pipe(image, tile_size=tile_size)
    return time.process_time() - begin, peak_resident_bytes() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tile_sizes", type=int, nargs="+", default=[0, 768, 512])
    parser.add_argument("--image_px", type=int, default=816)
    options = parser.parse_args()
    print(environment("cpu"))
    print("| `tile_size` | processor seconds | peak GiB |\n| --- | --- | --- |", flush=True)
    for size in options.tile_sizes:
        seconds, peak = in_fresh_process(measure, size or None, options.image_px)
        print(f"| {size or None} | {seconds:.1f} | {peak:.1f} |", flush=True)


if __name__ == "__main__":
    main()
