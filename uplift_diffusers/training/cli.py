"""Command line of `train_latent.py`."""

import argparse
from contextlib import nullcontext

from uplift_diffusers.data.latent_cache import LatentCache
from uplift_diffusers.latent_space import LatentSpace
from uplift_diffusers.loading import load_vae
from uplift_diffusers.training.config import parse_config, take_config_file
from uplift_diffusers.training.data import first_crops, open_photographs
from uplift_diffusers.training.launch import make_accelerator, run_command
from uplift_diffusers.training.loop import train
from uplift_diffusers.training.methods import make_method
from uplift_diffusers.training.publishing import create_repository, publish
from uplift_diffusers.training.recipes import RECIPES
from uplift_diffusers.training.validation import UpsamplerValidation

CROPS_TO_FIT = 200
"""Training crops from which a model's linear part is fitted before the training."""


def main(arguments: list[str] | None = None) -> int:
    """Parse the flags, train, and return the exit code: 1 and one line on stderr for what a person can put right."""
    return run_command(_train, arguments)


def _train(arguments: list[str] | None) -> None:
    """Load the VAE, train an upsampler of its latents, save it."""
    settings, arguments = take_config_file(arguments)
    selector = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    selector.add_argument("--recipe", choices=tuple(RECIPES), default="sd15")
    selector.add_argument("--method", choices=("uplift", "lift", "cfm"), default="uplift")
    from_file = [f"--{name}={settings.pop(name)}" for name in ("recipe", "method") if name in settings]
    selected, rest = selector.parse_known_args([*from_file, *arguments])
    config = parse_config(
        RECIPES[selected.recipe][selected.method],
        rest,
        settings=settings,
        description=(
            "Train an upsampler of the latents of a VAE. --recipe sd15 | embedded; --method uplift | lift | cfm; "
            f"{selected.recipe}, {selected.method}:"
        ),
    )

    photographs = open_photographs(config)  # before anything is loaded
    accelerator = make_accelerator(config)
    repository = create_repository(config) if accelerator.is_main_process else None
    vae = load_vae(config.vae).to(accelerator.device)
    space = LatentSpace.of(vae, config.latent_space)
    memory = LatentCache(config.latent_cache_dir, vae, space) if config.latent_cache_dir is not None else nullcontext()
    with memory as cache:
        method = make_method(config, vae, space, cache=cache)

        def fit() -> None:
            method.fit(first_crops(photographs, CROPS_TO_FIT).to(accelerator.device) / 255)

        validate = None
        if config.validation_data_dir is not None:
            validate = UpsamplerValidation(method.upsample, vae, space, config.validation_data_dir)
        train(
            method.model,
            method.objective,
            config,
            photographs=photographs,
            accelerator=accelerator,
            prepare=fit if method.fit is not None else None,
            validate=validate,
        )
    if accelerator.is_main_process:
        command = f"accelerate launch train_latent.py --recipe {selected.recipe} --method {selected.method}"
        publish(method.model, config, accelerator=accelerator, command=command, repository=repository)
