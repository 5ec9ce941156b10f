"""
Train the embedded bundle's autoencoder on a folder of photographs.

    accelerate launch -m uplift_diffusers.embedded.train_autoencoder \\
        --train_data_dir photos/train --validation_data_dir photos/val --output_dir runs/vae

It starts from the linear solution (principal components of 8x8 blocks) and learns the convolutional parts beside it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from uplift_diffusers.data.image_folder import ImageFolder
from uplift_diffusers.models.autoencoder import AutoencoderLocal
from uplift_diffusers.training.config import TrainingConfig, option, parse_config
from uplift_diffusers.training.loop import train
from uplift_diffusers.training.objective import psnr_from_mse


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrainingConfig(TrainingConfig):
    """The defaults are the embedded bundle's recipe."""

    resolution: int = option(128, "Edge of the training crops in pixels, a multiple of 8.")
    # At 1e-3 this network, which has no norms, diverged at about step 2,150.
    learning_rate: float = option(4e-4, "Peak learning rate of Adam.")
    max_train_steps: int = option(5_000, "Optimiser steps.")
    max_reduction: float = option(2.0, "Half of the random crops come from a picture reduced by up to this factor.")
    mixed_precision: str = option("bf16", "no, bf16 or fp16 (accelerate's autocast).")
    latent_channels: int = option(40, "Channels of the latents.")
    encoder_layers_per_block: tuple[int, ...] = option((2, 3), "Residual blocks of the encoder at 1/4 and at 1/8.")
    decoder_layers_per_block: tuple[int, ...] = option((4, 4), "Residual blocks of the decoder at 1/4 and at 1/8.")
    pretrained_model: str | None = option(
        None, "Autoencoder to go on from: a local folder. Residual blocks that it lacks start as the identity."
    )
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


def initial_blocks(dataset: ImageFolder, *, crops: int = 800) -> torch.Tensor:
    """(N, 3, 8, 8) in [-1, 1]: the blocks of the first `crops` crops, every fourth one."""
    # An item is an (epoch, index), and so is the quotient and remainder of a running number.
    images = torch.stack([dataset[divmod(number, len(dataset))] for number in range(crops)]).float()
    blocks = F.unfold(images, 8, stride=8).transpose(1, 2).reshape(-1, 3, 8, 8)
    return blocks[::4] / 127.5 - 1


def main(arguments: list[str] | None = None) -> None:
    """Parse the flags, fit the linear code, train, save."""
    config = parse_config(AutoencoderTrainingConfig, arguments, description=__doc__)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    set_seed(config.seed)
    model = AutoencoderLocal(
        latent_channels=config.latent_channels,
        encoder_layers_per_block=config.encoder_layers_per_block,
        decoder_layers_per_block=config.decoder_layers_per_block,
        latent_space=config.latent_space,
    )
    dataset = ImageFolder(
        config.train_data_dir, resolution=config.resolution, max_reduction=config.max_reduction, seed=config.seed
    )
    if config.pretrained_model is None:
        model.fit_linear_code(initial_blocks(dataset))
    else:
        load_pretrained(model, config.pretrained_model)

    validate = None
    if config.validation_data_dir is not None:
        photographs = ImageFolder(config.validation_data_dir, resolution=256, random_crop=False)
        images = torch.stack([photographs[0, index] for index in range(len(photographs))])

        def validate() -> dict[str, float]:
            target = images.float() / 127.5 - 1
            mse = [
                (model(part.to(model.device)).sample.clamp(-1, 1).cpu() - part).square().mean(dim=(1, 2, 3)) / 4
                for part in target.split(8)
            ]
            return {"val_psnr": psnr_from_mse(torch.cat(mse)).mean().item()}

    train(model, ReconstructionObjective(model, config), config, accelerator=accelerator, validate=validate)


if __name__ == "__main__":
    main()
