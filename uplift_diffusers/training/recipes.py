"""Recipes: what `train_latent.py` trains, and with which settings."""

from dataclasses import dataclass
from typing import ClassVar

from uplift_diffusers.training.config import TrainingConfig, option


@dataclass(frozen=True, kw_only=True)
class UpsamplerTrainingConfig(TrainingConfig):
    """The paper's recipe for the SD1.5 VAE: every depth in every step, L2 on every intermediate result."""

    model_settings: ClassVar[dict] = {}
    """Constructor arguments of UPLiFTModel; `latent_channels`, `spatial_factor` and `latent_space` are the VAE's."""

    vae: str = option(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "A VAE, or a pipeline that has one: a local folder or a hub id."
    )
    latent_space: str | None = option(None, "Declares the VAE's latent space where its config does not say it.")
    resolution: int = option(1024, "Edge of the training crops in pixels.")
    random_crop: bool = option(False, "Random crops and flips; off: the whole picture's centre square, resized.")
    train_batch_size: int = option(1, "Images per process and micro-step.")
    max_train_steps: int = option(125_000, "Optimiser steps (125,000 are 5 epochs of Unsplash-Lite).")
    lr_scheduler: str = option("constant", "diffusers' schedule: constant, constant_with_warmup, linear, cosine, ...")
    lr_warmup_steps: int = option(0, "Optimiser steps over which the learning rate rises from zero.")
    use_ema: bool = option(False, "Keep an exponential moving average of the weights and save it as the result.")
    depths: tuple[int, ...] = option((1, 2, 3, 4), "Depths d: from 1/2^d of the resolution in d steps of 2x.")
    latent_noise: float = option(1.0, "Deviation of the noise added to the starting latents, in raw units.")
    pixel_weight: float = option(0.0, "Weight of the L1 loss between a decoded last step and the image.")

    def __post_init__(self):
        super().__post_init__()
        if not self.depths or min(self.depths) < 1 or len(set(self.depths)) != len(self.depths):
            raise ValueError(f"`depths` must be different whole numbers of at least 1, got {self.depths}.")
        for name in ("latent_noise", "pixel_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class EmbeddedTrainingConfig(UpsamplerTrainingConfig):
    """The embedded bundle: small enough for a laptop, trained on photographs with a term in decoded pixels."""

    model_settings: ClassVar[dict] = {
        "encoder_block_out_channels": (128, 128),
        "encoder_layers_per_block": 2,
        "encoder_patch_size": 4,
        "decoder_channels": 128,
        "decoder_layers": (1, 2),
        "neighborhood": 17,
        "refiner_channels": 128,
        "refiner_layers": 8,
        "refiner_residual": True,
        "noise_channels": 0,
    }

    vae: str = option(description="The embedded autoencoder: a local folder.")
    resolution: int = option(192, "Edge of the training crops in pixels.")
    random_crop: bool = option(True, "Random crops and flips; off: the whole picture's centre square, resized.")
    max_reduction: float = option(2.0, "Half of the random crops come from a picture reduced by up to this factor.")
    train_batch_size: int = option(4, "Images per process and micro-step.")
    max_train_steps: int = option(4_200, "Optimiser steps.")
    learning_rate: float = option(7e-4, "Peak learning rate of Adam.")
    lr_scheduler: str = option("cosine", "diffusers' schedule: constant, constant_with_warmup, linear, cosine, ...")
    lr_warmup_steps: int = option(200, "Optimiser steps over which the learning rate rises from zero.")
    use_ema: bool = option(True, "Keep an exponential moving average of the weights and save it as the result.")
    mixed_precision: str = option("bf16", "no, bf16 or fp16 (accelerate's autocast).")
    depths: tuple[int, ...] = option((1, 2), "Depths d: from 1/2^d of the resolution in d steps of 2x.")
    latent_noise: float = option(0.02, "Deviation of the noise added to the starting latents, in raw units.")
    pixel_weight: float = option(10.0, "Weight of the L1 loss between a decoded last step and the image.")


RECIPES = {"sd15": UpsamplerTrainingConfig, "embedded": EmbeddedTrainingConfig}
