"""Logging of a run to metrics.jsonl and a tracker, and validation on held-out photographs."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image

from uplift_diffusers.data.dataset import Crop, Photographs
from uplift_diffusers.data.degradation import through_jpeg
from uplift_diffusers.data.pyramid import encode_pyramid, image_pyramid
from uplift_diffusers.data.sources import FolderSource
from uplift_diffusers.images.compression import denoise_for_quality
from uplift_diffusers.images.files import save_image
from uplift_diffusers.latent_space import Autoencoder, LatentCodec, LatentSpace
from uplift_diffusers.models.interpolation import interpolate_latents
from uplift_diffusers.saving import replaced_when_whole
from uplift_diffusers.training.losses import psnr_from_mse

METRICS = "metrics.jsonl"

VALIDATION_DEPTHS = (1, 2)
VALIDATION_RESOLUTION = 256
VALIDATION_BATCH = 4
ROWS = 4
"""Rows in the image of a validation."""


class Validation(NamedTuple):
    """
    Args:
        figures: measured values by name.
        pictures: images by name.
    """

    figures: dict[str, float]
    pictures: dict[str, Image.Image]


class RunLog:
    """
    Writes the log and the validation images of a run, in the main process only.

    Args:
        output_dir: the run's folder.
        accelerator: holds the trackers.
        step: the step that the run continues from. Later lines, from a killed process, are dropped.
        settings: settings for the trackers.
    """

    def __init__(self, output_dir: Path, *, accelerator: Accelerator, step: int, settings: Mapping[str, Any]):
        self.output_dir = output_dir
        self.accelerator = accelerator
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            _truncate(output_dir / METRICS, step)
        if accelerator.log_with:
            shown = {
                name: value if isinstance(value, (bool, int, float)) else str(value)
                for name, value in settings.items()
            }
            accelerator.init_trackers("uplift", config=shown, init_kwargs={"tensorboard": {"purge_step": step + 1}})

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Append one line of figures."""
        self.accelerator.log(dict(figures), step=step)
        if self.accelerator.is_main_process:
            line = json.dumps({"step": step, **{name: round(value, 8) for name, value in figures.items()}})
            with (self.output_dir / METRICS).open("a") as file:
                file.write(line + "\n")

    def write_validation(self, step: int, validation: Validation) -> None:
        """Append a line of figures and save the images as validation/<name>-<step>.png."""
        self.write(step, validation.figures)
        for name, picture in validation.pictures.items():
            folder = self.output_dir / "validation"
            folder.mkdir(exist_ok=True)
            save_image(picture, folder / f"{name}-{step:06d}.png", overwrite=True)
            for tracker in self.accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: np.asarray(picture)[None]}, step=step, **layout)

    def close(self) -> None:
        """Flush and close the trackers."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def read_metrics(output_dir: Path) -> list[dict[str, float]]:
    """The complete lines of metrics.jsonl."""
    path = output_dir / METRICS
    # A process that was killed may have left half a line at the end.
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [json.loads(line) for line in lines]


def _truncate(path: Path, step: int) -> None:
    """Drop the lines that a resumed run is about to write again."""
    if path.exists():
        kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
        with replaced_when_whole(path) as file:
            file.write("".join(json.dumps(record) + "\n" for record in kept).encode())


Upsample = Callable[[torch.Tensor, int, torch.Tensor, torch.Generator], torch.Tensor]
"""
(image, depth, denoise, generator) -> raw latents: (B, 3, H, W) in [0, 1] and (B,) in [0, 1], the denoising strength,
to (B, C, 2**depth * h, 2**depth * w), with the model's current weights.
"""


class UpsamplerValidation:
    """
    Measures an upsampler on one crop of 256 px of every photograph below a folder, downsampled by 2 and by 4.

    At both scales: `val_psnr` in dB, of the decoded result against the crop; `val_latent_mse`, of the result against
    the crop's latents; and `val_latent_mse_bilinear`, of bilinear interpolation, the baseline. With
    `jpeg_qualities` also `val_psnr_<scale>x_jpeg<quality>`, for a downsampled crop saved as JPEG. The image has a row
    for each of the first photographs, at 4x: input, bilinear, prediction and target.

    Args:
        upsample: the upsampling function.
        vae: encodes and decodes the latents.
        space: the VAE's latent space.
        folder: searched recursively.
        jpeg_qualities: Pillow's qualities of JPEG inputs.
    """

    def __init__(
        self,
        upsample: Upsample,
        vae: Autoencoder,
        space: LatentSpace,
        folder: str | Path,
        *,
        jpeg_qualities: tuple[int, ...] = (),
    ):
        self.upsample, self.codec, self.jpeg_qualities = upsample, LatentCodec(vae, space), jpeg_qualities
        images = validation_crops(folder).to(vae.device)
        self.num_photographs = len(images)
        self.batches = []  # (pyramid, raw latents of its levels): they stay the same
        for part in images.split(VALIDATION_BATCH):
            pyramid = image_pyramid(part, max(VALIDATION_DEPTHS))
            self.batches.append((pyramid, encode_pyramid(self.codec, pyramid)))

    @torch.no_grad()
    def __call__(self) -> Validation:
        """Measure the model with its current weights. The noise is the same every time."""
        generator = torch.Generator().manual_seed(0)
        sums: dict[str, float] = {}
        rows = []
        for pyramid, latents in self.batches:
            for depth in VALIDATION_DEPTHS:
                target, bilinear = latents[0], interpolate_latents(latents[depth], scale=2**depth)
                clean = torch.zeros(len(target), device=target.device)
                predicted = self.upsample(pyramid[depth], depth, clean, generator).float()
                decoded = self.codec.decode(predicted)
                measured = {
                    f"val_psnr_{2**depth}x": psnr_from_mse(_mse(decoded, pyramid[0])),
                    f"val_latent_mse_{2**depth}x": _mse(predicted, target),
                    f"val_latent_mse_bilinear_{2**depth}x": _mse(bilinear, target),
                }
                for quality in self.jpeg_qualities:
                    image = through_jpeg(pyramid[depth], quality=quality)
                    denoise = clean + denoise_for_quality(quality)
                    cleaned = self.codec.decode(self.upsample(image, depth, denoise, generator).float())
                    measured[f"val_psnr_{2**depth}x_jpeg{quality}"] = psnr_from_mse(_mse(cleaned, pyramid[0]))
                for name, values in measured.items():
                    sums[name] = sums.get(name, 0.0) + values.sum().item()
            if len(rows) < ROWS:
                low = F.interpolate(pyramid[depth], scale_factor=2**depth, mode="nearest")
                columns = (low, self.codec.decode(bilinear), decoded, self.codec.decode(target))
                rows += torch.cat(columns, dim=3)  # (3, 256, 4 * 256) each
        figures = {name: total / self.num_photographs for name, total in sums.items()}
        return Validation(figures, {"input-bilinear-prediction-target": picture_of(rows[:ROWS])})


def validation_crops(folder: str | Path) -> torch.Tensor:
    """(N, 3, 256, 256) in [0, 1]: a crop of every photograph below `folder`, always the same."""
    photographs = Photographs(FolderSource(folder), Crop(resolution=VALIDATION_RESOLUTION))
    return torch.stack([photographs[0, index] for index in range(len(photographs))]).float() / 255


def picture_of(rows: list[torch.Tensor]) -> Image.Image:
    """Images (3, H, W) in [0, 1], stacked vertically."""
    return Image.fromarray(torch.cat(rows, dim=1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy())


def _mse(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """(B,), of each item."""
    return (actual - expected).square().mean(dim=(1, 2, 3))
