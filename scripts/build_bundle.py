"""
Make the embedded bundle from a trained autoencoder and upsampler, in half precision.

    python -m scripts.build_bundle --vae runs/vae --upsampler runs/upsampler --output_dir runs/bundle
"""

import argparse
from pathlib import Path

import torch

from uplift_diffusers.models.autoencoder_local import AutoencoderLocal
from uplift_diffusers.models.upsampler import UPLiFTModel
from uplift_diffusers.pipelines.super_resolution import UPLiFTSuperResolutionPipeline
from uplift_diffusers.runtime import dtype_option


def main(arguments: list[str] | None = None) -> None:
    """Load both models, check that they match, and save the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", required=True, help="Folder of the AutoencoderLocal.")
    parser.add_argument("--upsampler", required=True, help="Folder of the UPLiFTModel.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the pipeline.")
    options = parser.parse_args(arguments)

    pipeline = UPLiFTSuperResolutionPipeline(
        vae=AutoencoderLocal.from_pretrained(options.vae, **dtype_option(torch.float16)),
        upsampler=UPLiFTModel.from_pretrained(options.upsampler, **dtype_option(torch.float16)),
    )
    for component in (pipeline.vae, pipeline.upsampler):
        component.register_to_config(_name_or_path=None)  # not where it was on this machine
    pipeline.save_pretrained(options.output_dir)
    size = sum(path.stat().st_size for path in options.output_dir.rglob("*") if path.is_file())
    print(f"{options.output_dir}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
