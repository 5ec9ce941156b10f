"""The methods that `train_latent.py` trains: what the model is, what it minimises, and how its result enlarges."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import ModelMixin
from torch import nn

from uplift_diffusers.data.latent_cache import LatentCache
from uplift_diffusers.flow_matching import euler_scheduler, latent_multiple, name_latents
from uplift_diffusers.latent_space import Autoencoder, LatentSpace
from uplift_diffusers.models.upsampler import UPLiFTModel
from uplift_diffusers.pipelines.cfm_latent_upscale import CFMLatentUpscalePipeline
from uplift_diffusers.training.flow_matching_objective import FlowMatchingObjective
from uplift_diffusers.training.objective import MultiDepthObjective, image_pyramid
from uplift_diffusers.training.recipes import CFMTrainingConfig, LatentTrainingConfig, UpsamplerTrainingConfig
from uplift_diffusers.training.unets import make_unet

VALIDATION_STEPS = 4
"""Euler steps in validation: enough to follow a training, and cheap."""


@dataclass(frozen=True)
class Method:
    """
    What is trained and how its result is looked at.

    Args:
        model: what is trained and saved.
        objective: holds `model`; see `uplift_diffusers.training.loop.train`.
        upsample: (image, depth, generator) -> raw latents: (B, 3, H, W) in [0, 1] to (B, C, 2**depth * h,
            2**depth * w), with the weights that the model has then.
        fit: (crops) -> None: sets, before the training, what has a closed solution, from (N, 3, R, R) in [0, 1].
    """

    model: ModelMixin
    objective: nn.Module
    upsample: Callable[[torch.Tensor, int, torch.Generator], torch.Tensor]
    fit: Callable[[torch.Tensor], None] | None = None


def make_method(
    config: LatentTrainingConfig, vae: Autoencoder, space: LatentSpace, *, cache: LatentCache | None = None
) -> Method:
    """
    A new model of what `config` trains, and what belongs to it.

    Raises:
        ValueError: the crops do not suit the model.
    """
    make = {"uplift": _make_upsampler, "lift": _make_upsampler, "cfm": _make_flow_matching}[config.method]
    return make(config, vae, space, cache)


def _make_upsampler(
    config: UpsamplerTrainingConfig, vae: Autoencoder, space: LatentSpace, cache: LatentCache | None
) -> Method:
    _check_resolution(config, space.spatial_factor * 2 ** max(config.depths), f"depth {max(config.depths)}")
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
        jpeg_probability=config.jpeg_probability,
        cache=cache,
    )

    def upsample(image: torch.Tensor, depth: int, generator: torch.Generator) -> torch.Tensor:
        return model(space.encode(vae, image), image=image, num_steps=depth, generator=generator).sample

    @torch.no_grad()
    def fit(crops: torch.Tensor) -> None:
        pairs = []
        for images in crops.split(8):
            pyramid = image_pyramid(images, 2)
            pairs += [(small, space.encode(vae, large)) for large, small in pairwise(pyramid)]
        model.estimator.fit(pairs)

    return Method(model, objective, upsample, fit if model.estimator is not None else None)


def _make_flow_matching(
    config: CFMTrainingConfig, vae: Autoencoder, space: LatentSpace, cache: LatentCache | None
) -> Method:
    model = make_unet(config.unet, space.channels)
    _check_resolution(config, space.spatial_factor * latent_multiple(model), f"the U-Net {config.unet!r}")
    name_latents(model, space)
    objective = FlowMatchingObjective(model, vae, space, depths=config.depths, cache=cache)
    pipeline = CFMLatentUpscalePipeline(vae, model, euler_scheduler(), latent_space=config.latent_space)
    pipeline.set_progress_bar_config(disable=True)

    def upsample(image: torch.Tensor, depth: int, generator: torch.Generator) -> torch.Tensor:
        latents = pipeline(
            image=image,
            scale=2**depth,
            num_inference_steps=VALIDATION_STEPS,
            generator=generator,
            output_type="latent",
        ).images
        return space.unscale(latents)

    return Method(model, objective, upsample)


def _check_resolution(config: LatentTrainingConfig, multiple: int, reason: str) -> None:
    if config.resolution % multiple:
        raise ValueError(f"`resolution` must be a multiple of {multiple} for {reason}, got {config.resolution}.")
