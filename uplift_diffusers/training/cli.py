"""Command line of `train_latent.py`."""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from uplift_diffusers.data.image_folder import ImageFolder, find_images
from uplift_diffusers.latent_space import Autoencoder, LatentSpace, load_vae
from uplift_diffusers.models.uplift import UPLiFTModel
from uplift_diffusers.training.config import parse_config
from uplift_diffusers.training.loop import train
from uplift_diffusers.training.objective import MultiDepthObjective, image_pyramid, psnr_from_mse
from uplift_diffusers.training.recipes import RECIPES


def main(arguments: list[str] | None = None) -> int:
    """Parse the flags, train, and return the exit code: 1 and one line on stderr for what a person can put right."""
    try:
        _train(arguments)
    except (OSError, ValueError, TypeError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _train(arguments: list[str] | None) -> None:
    """Load the VAE, train an UPLiFT on its latents, save it."""
    selector = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    selector.add_argument("--recipe", choices=tuple(RECIPES), default="sd15")
    selected, rest = selector.parse_known_args(arguments)
    config = parse_config(
        RECIPES[selected.recipe],
        rest,
        description=f"Train an UPLiFT on the latents of a VAE. --recipe {' | '.join(RECIPES)}; {selected.recipe}:",
    )

    find_images(config.train_data_dir)  # before anything is loaded
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    set_seed(config.seed)
    vae = load_vae(config.vae).to(accelerator.device)
    space = LatentSpace.of(vae, config.latent_space)
    multiple = space.spatial_factor * 2 ** max(config.depths)
    if config.resolution % multiple:
        raise ValueError(
            f"`resolution` must be a multiple of {multiple} for depth {max(config.depths)}, got {config.resolution}."
        )
    model = UPLiFTModel(
        **config.model_settings,
        latent_channels=space.channels,
        spatial_factor=space.spatial_factor,
        latent_space=space.name,
    )
    objective = MultiDepthObjective(
        model,
        vae,
        space,
        depths=config.depths,
        latent_noise=config.latent_noise,
        pixel_weight=config.pixel_weight,
    )
    validate = None
    if config.validation_data_dir is not None:
        validate = make_validation(model, vae, space, config.validation_data_dir)
    train(model, objective, config, accelerator=accelerator, validate=validate)


def make_validation(model: UPLiFTModel, vae: Autoencoder, space: LatentSpace, folder: str | Path):
    """A function that measures 2x and 4x PSNR, in dB, on one crop of 256 px of every photograph of `folder`."""
    photographs = ImageFolder(folder, resolution=256, random_crop=True, seed=0)
    images = torch.stack([photographs[0, index] for index in range(len(photographs))]).float() / 255

    def validate() -> dict[str, float]:
        sums = {1: 0.0, 2: 0.0}
        generator = torch.Generator().manual_seed(0)
        for part in images.split(4):
            pyramid = image_pyramid(part.to(model.device), max(sums))
            for depth in sums:
                latents = space.encode(vae, pyramid[depth])
                sample = model(latents, image=pyramid[depth], num_steps=depth, generator=generator).sample
                output = space.decode(vae, sample)
                mse = (output - pyramid[0]).square().mean(dim=(1, 2, 3))
                sums[depth] += psnr_from_mse(mse).sum().item()
        return {f"val_psnr_{2**depth}x": total / len(images) for depth, total in sums.items()}

    return validate
