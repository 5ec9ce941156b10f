"""
Train the embedded bundle's autoencoder on a folder of photographs.

    accelerate launch -m scripts.train_autoencoder \\
        --train_data_dir photos/train --validation_data_dir photos/val --output_dir runs/vae

It starts from the linear solution (principal components of 8x8 blocks) and trains convolutional residuals.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from uplift_diffusers.data.dataset import Crop, Photographs
from uplift_diffusers.data.sources import FolderSource
from uplift_diffusers.models.autoencoder_local import AutoencoderLocal
from uplift_diffusers.training.config import Task, TrainingConfig, option, parse_config
from uplift_diffusers.training.losses import psnr_from_mse
from uplift_diffusers.training.monitoring import VALIDATION_RESOLUTION, Validation
from uplift_diffusers.training.train import run, run_command

COMMAND = "accelerate launch -m scripts.train_autoencoder"


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrainingConfig(TrainingConfig):
    """The defaults are the embedded bundle's recipe."""

    resolution: int = option(128, "Edge of the training crops in pixels, a multiple of 8.")
    # At 1e-3 this network, which has no norms, diverged at about step 2,150.
    learning_rate: float = option(4e-4)
    max_train_steps: int = option(5_000)
    max_reduction: float = option(2.0)
    latent_channels: int = option(40, "Channels of the latents.")
    encoder_layers_per_block: tuple[int, ...] = option((2, 3), "Residual blocks of the encoder at 1/4 and at 1/8.")
    decoder_layers_per_block: tuple[int, ...] = option((4, 2), "Residual blocks of the decoder at 1/4 and at 1/8.")
    pretrained_model: str | None = option(
        None, "Autoencoder to start from: a local folder. New residual blocks start as the identity, surplus ones go."
    )
    freeze_encoder: bool = option(False, "Train only the decoder, so latents and their upsamplers stay valid.")
    latent_space: str = option("uplift-embedded", "Name of the latent space, which upsamplers are checked against.")
    latent_noise: float = option(0.03, "Standard deviation of the noise on the latents, which have about 1.")
    gradient_weight: float = option(0.5, "Weight of the L1 loss between image gradients.")

    def __post_init__(self):
        super().__post_init__()
        if self.resolution % AutoencoderLocal.spatial_factor:
            raise ValueError(
                f"`resolution` must be a multiple of {AutoencoderLocal.spatial_factor}, got {self.resolution}."
            )

    @contextmanager
    def open_task(self, device: torch.device) -> Iterator[Task]:
        """A new autoencoder, either fitted linearly before the training or initialised from another one."""
        model = AutoencoderLocal(
            latent_channels=self.latent_channels,
            encoder_layers_per_block=self.encoder_layers_per_block,
            decoder_layers_per_block=self.decoder_layers_per_block,
            latent_space=self.latent_space,
        )
        if self.freeze_encoder:
            model.linear_encoder.requires_grad_(False)
            model.encoder.requires_grad_(False)

        def start(crops: torch.Tensor) -> None:
            if self.pretrained_model is None:
                model.fit_linear_code(blocks_of(crops).to(model.device))
            else:
                load_pretrained(model, self.pretrained_model)

        validate = None
        if self.validation_data_dir is not None:
            squares = Photographs(
                FolderSource(self.validation_data_dir), Crop(resolution=VALIDATION_RESOLUTION, random_crop=False)
            )
            held_out = torch.stack([squares[0, index] for index in range(len(squares))]).float() / 127.5 - 1

            def validate() -> Validation:
                mse = [
                    (model(part.to(model.device)).sample.clamp(-1, 1).cpu() - part).square().mean(dim=(1, 2, 3)) / 4
                    for part in held_out.split(8)
                ]
                return Validation({"val_psnr": psnr_from_mse(torch.cat(mse)).mean().item()}, pictures={})

        crops = 800 if self.pretrained_model is None else 1
        yield Task(model, ReconstructionObjective(model, self), fit=start, fit_crops=crops, validate=validate)


class ReconstructionObjective(nn.Module):
    """L1 + RMSE (per image) + L1 between horizontal and vertical gradients, with noise on the latents."""

    def __init__(self, model: AutoencoderLocal, config: AutoencoderTrainingConfig):
        super().__init__()
        self.model = model
        self.latent_noise = config.latent_noise
        self.gradient_weight = config.gradient_weight

    def forward(self, images: torch.Tensor, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        target = images * 2 - 1
        latents = self.model.encode(target).latent.float()
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        output = self.model.decode(latents + self.latent_noise * noise).sample.float()
        error = output - target
        mse = error.square().mean(dim=(1, 2, 3))  # (B,), range [-1, 1]
        gradient = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + mse.clamp_min(1e-8).sqrt().mean() + self.gradient_weight * gradient
        return {"loss": loss, "psnr": psnr_from_mse(mse.detach() / 4).mean(), "latent_std": latents.detach().std()}


def load_pretrained(model: AutoencoderLocal, folder: str) -> None:
    """Start from another autoencoder of the same widths: new residual blocks are the identity, surplus ones go."""
    pretrained = AutoencoderLocal.from_pretrained(folder).state_dict()
    weights = model.state_dict()
    for name, value in weights.items():
        if name in pretrained:
            weights[name] = pretrained[name]
        elif ".conv2." in name:
            weights[name] = torch.zeros_like(value)
    model.load_state_dict(weights)


def blocks_of(crops: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) in [0, 1] -> (M, 3, 8, 8) in [-1, 1]: every fourth of their blocks."""
    blocks = F.unfold(crops * 2 - 1, 8, stride=8)  # (N, 3 * 64, H / 8 * W / 8)
    return blocks.transpose(1, 2).reshape(-1, 3, 8, 8)[::4]


def main(arguments: list[str] | None = None) -> int:
    """Train and return the exit code: 0, or 1 after one line on stderr about an expected error."""
    return run_command(lambda: run(parse_config(AutoencoderTrainingConfig, arguments, description=__doc__), COMMAND))


if __name__ == "__main__":
    raise SystemExit(main())
