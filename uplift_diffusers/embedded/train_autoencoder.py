"""
Train the embedded bundle's autoencoder on a folder of photographs.

    accelerate launch -m uplift_diffusers.embedded.train_autoencoder \\
        --train_data_dir photos/train --validation_data_dir photos/val --output_dir runs/vae

It starts from the linear solution (principal components of 8x8 blocks) and learns the convolutional parts beside it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from uplift_diffusers.data.photographs import Crop, Photographs
from uplift_diffusers.data.sources import FolderSource
from uplift_diffusers.models.autoencoder_local import AutoencoderLocal
from uplift_diffusers.training.config import TrainingConfig, option, parse_config
from uplift_diffusers.training.data import first_crops, open_photographs
from uplift_diffusers.training.launch import make_accelerator, run_command
from uplift_diffusers.training.logs import Validation
from uplift_diffusers.training.loop import train
from uplift_diffusers.training.objective import psnr_from_mse
from uplift_diffusers.training.publishing import create_repository, publish


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrainingConfig(TrainingConfig):
    """The defaults are the embedded bundle's recipe."""

    resolution: int = option(128, "Edge of the training crops in pixels, a multiple of 8.")
    # At 1e-3 this network, which has no norms, diverged at about step 2,150.
    learning_rate: float = option(4e-4)
    max_train_steps: int = option(5_000)
    max_reduction: float = option(2.0)
    mixed_precision: str = option("bf16")
    latent_channels: int = option(40, "Channels of the latents.")
    encoder_layers_per_block: tuple[int, ...] = option((2, 3), "Residual blocks of the encoder at 1/4 and at 1/8.")
    decoder_layers_per_block: tuple[int, ...] = option((4, 4), "Residual blocks of the decoder at 1/4 and at 1/8.")
    pretrained_model: str | None = option(
        None, "Autoencoder to go on from: a local folder. Residual blocks that it lacks start as the identity."
    )
    freeze_encoder: bool = option(False, "Train the decoder alone: latents, and their upsamplers, stay valid.")
    latent_space: str = option("uplift-embedded", "The name under which upsamplers ask for these latents.")
    latent_noise: float = option(0.03, "Deviation of the noise on the latents, whose own is about 1.")
    gradient_weight: float = option(0.5, "Weight of the L1 loss between image gradients.")

    def __post_init__(self):
        super().__post_init__()
        if self.resolution % AutoencoderLocal.spatial_factor:
            raise ValueError(
                f"`resolution` must be a multiple of {AutoencoderLocal.spatial_factor}, got {self.resolution}."
            )


class ReconstructionObjective(nn.Module):
    """L1 + RMSE (per picture) + L1 between horizontal and vertical gradients, with noise on the latents."""

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
    """Start from another autoencoder of the same widths; residual blocks that it lacks start as the identity."""
    weights = AutoencoderLocal.from_pretrained(folder).state_dict()
    for name, value in model.state_dict().items():
        if name not in weights:
            weights[name] = torch.zeros_like(value) if ".conv2." in name else value
    model.load_state_dict(weights)


def initial_blocks(dataset: Photographs, *, crops: int = 800) -> torch.Tensor:
    """(N, 3, 8, 8) in [-1, 1]: the blocks of the first `crops` crops, every fourth one."""
    images = first_crops(dataset, crops).float()
    blocks = F.unfold(images, 8, stride=8).transpose(1, 2).reshape(-1, 3, 8, 8)
    return blocks[::4] / 127.5 - 1


def main(arguments: list[str] | None = None) -> int:
    """Parse the flags, train, and return the exit code: 1 and one line on stderr for what a person can put right."""
    return run_command(_train, arguments)


def _train(arguments: list[str] | None) -> None:
    """Fit the linear code, or load what to go on from, train, save."""
    config = parse_config(AutoencoderTrainingConfig, arguments, description=__doc__)
    photographs = open_photographs(config)  # before anything is loaded
    accelerator = make_accelerator(config)
    repository = create_repository(config) if accelerator.is_main_process else None
    model = AutoencoderLocal(
        latent_channels=config.latent_channels,
        encoder_layers_per_block=config.encoder_layers_per_block,
        decoder_layers_per_block=config.decoder_layers_per_block,
        latent_space=config.latent_space,
    )

    def start() -> None:
        if config.pretrained_model is None:
            model.fit_linear_code(initial_blocks(photographs))
        else:
            load_pretrained(model, config.pretrained_model)

    if config.freeze_encoder:
        model.linear_encoder.requires_grad_(False)
        model.encoder.requires_grad_(False)

    validate = None
    if config.validation_data_dir is not None:
        held_out = Photographs(FolderSource(config.validation_data_dir), Crop(resolution=256, random_crop=False))
        images = torch.stack([held_out[0, index] for index in range(len(held_out))])

        def validate() -> Validation:
            target = images.float() / 127.5 - 1
            mse = [
                (model(part.to(model.device)).sample.clamp(-1, 1).cpu() - part).square().mean(dim=(1, 2, 3)) / 4
                for part in target.split(8)
            ]
            return Validation({"val_psnr": psnr_from_mse(torch.cat(mse)).mean().item()}, pictures={})

    train(
        model,
        ReconstructionObjective(model, config),
        config,
        photographs=photographs,
        accelerator=accelerator,
        prepare=start,
        validate=validate,
    )
    if accelerator.is_main_process:
        command = "accelerate launch -m uplift_diffusers.embedded.train_autoencoder"
        publish(model, config, accelerator=accelerator, command=command, repository=repository)


if __name__ == "__main__":
    raise SystemExit(main())
