"""
Write a bundle, or an upsampler, as an ONNX file with dynamic shapes.

    python scripts/export_onnx.py uplift-2x.onnx
    python scripts/export_onnx.py uplift-4x.onnx --model ./my-bundle --num_steps 2
    python scripts/export_onnx.py upsampler.onnx --model UPLiFT-upsampler/uplift_sd1.5vae --upsampler_only

Needs `pip install onnx onnxscript`. docs/onnx.md has the inputs and outputs of the file.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from uplift_diffusers import UPLiFTModel, UPLiFTSuperResolutionPipeline, embedded_bundle
from uplift_diffusers.latent_space import LatentCodec
from uplift_diffusers.models.upsampler import StepNoise
from uplift_diffusers.saving import check_output_path, make_writable_folder

MAX_LATENTS = 4096
"""Largest supported edge, in latents."""


class UpsamplerGraph(nn.Module):
    """Raw latents (B, C, h, w), image (B, 3, fh, fw) in [0, 1] and noise -> latents, 2**num_steps times as large."""

    def __init__(self, upsampler: UPLiFTModel, num_steps: int):
        super().__init__()
        self.upsampler, self.num_steps = upsampler, num_steps

    def forward(
        self, raw_latents: torch.Tensor, image: torch.Tensor, noise: list[StepNoise] | None = None
    ) -> torch.Tensor:
        return self.upsampler(raw_latents, image=image, num_steps=self.num_steps, noise=noise).sample


class ImageGraph(nn.Module):
    """Image (B, 3, H, W) in [0, 1], H and W multiples of the spatial factor, and noise -> a larger one in [0, 1]."""

    def __init__(self, codec: LatentCodec, upsampler: UPLiFTModel, num_steps: int):
        super().__init__()
        self.vae, self.codec = codec.vae, codec
        self.upsample = UpsamplerGraph(upsampler, num_steps)

    def forward(self, image: torch.Tensor, noise: list[StepNoise] | None = None) -> torch.Tensor:
        raw_latents = self.upsample(self.codec.encode_sample(image * 2 - 1), image, noise)
        return (self.codec.decode_sample(raw_latents) / 2 + 0.5).clamp(0, 1)


def export(model: str | os.PathLike, path: str | os.PathLike, *, num_steps: int, upsampler_only: bool) -> None:
    """
    Write an ONNX file atomically, into a folder that is made if needed.

    Args:
        model: a folder or repository: a UPLiFTSuperResolutionPipeline, or a UPLiFTModel with `upsampler_only`.
        path: path of the file.
        num_steps: number of 2x steps.
        upsampler_only: export without the VAE.
    Raises:
        OSError: the file cannot be written, which is found before the work; or the model cannot be loaded.
    """
    path = Path(path)
    check_output_path(path, overwrite=True)
    make_writable_folder(path.parent)
    if upsampler_only:
        upsampler = UPLiFTModel.from_pretrained(model)
        graph = UpsamplerGraph(upsampler, num_steps)
    else:
        pipeline = UPLiFTSuperResolutionPipeline.from_pretrained(model)
        pipeline.vae.disable_tiling()
        upsampler = pipeline.upsampler
        graph = ImageGraph(LatentCodec(pipeline.vae, pipeline.config.latent_space), upsampler, num_steps)
    config, factor = upsampler.config, upsampler.config.spatial_factor

    batch, height, width = Dim("batch", max=64), Dim("h", min=2, max=MAX_LATENTS), Dim("w", min=2, max=MAX_LATENTS)
    # Sizes that occur in no layer, so the exporter does not confuse them with constants of the network.
    raw_latents = torch.rand(2, config.latent_channels, 11, 13)
    arguments = {"image": torch.rand(2, 3, 11 * factor, 13 * factor)}
    shapes = {"image": {0: batch, 2: factor * height, 3: factor * width}}
    if upsampler_only:
        arguments = {"raw_latents": raw_latents, **arguments}
        shapes = {"raw_latents": {0: batch, 2: height, 3: width}, **shapes}
    names = list(arguments)
    if config.noise_channels:
        arguments["noise"], shapes["noise"] = list(upsampler.draw_noise(raw_latents, num_steps, None)), []
        for step, noise in enumerate(arguments["noise"]):
            axes = {}
            for part, factor_of_part in (("coarse", 2**step), ("fine", 2 ** (step + 1)), ("refiner", 2 ** (step + 1))):
                if getattr(noise, part) is None:
                    axes[part] = None
                else:
                    axes[part] = {0: batch, 2: factor_of_part * height, 3: factor_of_part * width}
                    names.append(f"noise_{step}_{part}")
            shapes["noise"].append(StepNoise(**axes))
    program = torch.onnx.export(
        graph.eval(),
        kwargs=arguments,
        dynamic_shapes=shapes,
        input_names=names,
        output_names=["sample"],
        dynamo=True,
        verbose=False,
    )
    program.model.metadata_props.update(spatial_factor=str(factor), scale=str(2**num_steps))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        program.save(Path(folder) / path.name, external_data=False)
        os.replace(Path(folder) / path.name, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the file to write")
    parser.add_argument("--model", default=embedded_bundle(), help="folder or repository; by default the bundle")
    parser.add_argument("--num_steps", type=int, default=1, choices=(1, 2, 3, 4), help="2x steps (default: 1)")
    parser.add_argument("--upsampler_only", action="store_true", help="latents in, latents out, without the VAE")
    options = parser.parse_args()
    export(options.model, options.path, num_steps=options.num_steps, upsampler_only=options.upsampler_only)


if __name__ == "__main__":
    main()
