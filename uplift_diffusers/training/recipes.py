"""Recipes: what `train_latent.py` trains, by which method, and with which settings."""

from dataclasses import dataclass
from typing import ClassVar

from uplift_diffusers.training.config import TrainingConfig, option
from uplift_diffusers.training.unets import UNETS


@dataclass(frozen=True, kw_only=True)
class LatentTrainingConfig(TrainingConfig):
    """
    What every method needs that is trained on the latents of a VAE; data and size are the paper's for SD1.5.

    A configuration names its `method`, which `uplift_diffusers.training.methods` looks at.
    """

    vae: str = option(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "A VAE, or a pipeline that has one: a local folder or a hub id."
    )
    latent_space: str | None = option(None, "Declares the VAE's latent space where its config does not say it.")
    resolution: int = option(1024)
    random_crop: bool = option(False)
    train_batch_size: int = option(1)
    max_train_steps: int | None = option(None)
    num_train_epochs: int | None = option(5)
    depths: tuple[int, ...] = option((1, 2), "Depths d: from 1/2^d of the resolution to all of it.")
    latent_cache_dir: str | None = option(None, "Folder that keeps the VAE's latents, so that each is computed once.")

    def __post_init__(self):
        super().__post_init__()
        if self.latent_cache_dir is not None and self.random_crop:
            raise ValueError(
                "`latent_cache_dir` must not be given with `random_crop`: no crop comes twice, so its latents would "
                "be stored and never read. Pass --no-random_crop, and --augment_flip for variety."
            )
        if not self.depths or min(self.depths) < 1 or len(set(self.depths)) != len(self.depths):
            raise ValueError(f"`depths` must be different whole numbers of at least 1, got {self.depths}.")


@dataclass(frozen=True, kw_only=True)
class EmbeddedDefaults(LatentTrainingConfig):
    """Data and schedule of whatever is trained for the embedded bundle: small enough for a laptop."""

    vae: str = option(description="The embedded autoencoder: a local folder.")
    resolution: int = option(192)
    random_crop: bool = option(True)
    max_reduction: float = option(2.0)
    train_batch_size: int = option(4)
    max_train_steps: int | None = option(6_000)
    num_train_epochs: int | None = option(None)
    learning_rate: float = option(7e-4)
    mixed_precision: str = option("bf16")


@dataclass(frozen=True, kw_only=True)
class UpsamplerTrainingConfig(LatentTrainingConfig):
    """The paper's recipe for the SD1.5 VAE: every depth in every step, L2 on every intermediate result."""

    method: ClassVar[str] = "uplift"
    model_settings: ClassVar[dict] = {}
    """Constructor arguments of UPLiFTModel; `latent_channels`, `spatial_factor` and `latent_space` are the VAE's."""

    lr_scheduler: str = option("constant")
    lr_warmup_steps: int = option(0)
    use_ema: bool = option(False)
    depths: tuple[int, ...] = option((1, 2, 3, 4), "Depths d: from 1/2^d of the resolution in d steps of 2x.")
    latent_noise: float = option(1.0, "Deviation of the noise added to the starting latents, in raw units.")
    pixel_weight: float = option(0.0, "Weight of the L1 loss between a decoded last step and the image.")
    jpeg_probability: float = option(0.0, "Share of the starting images that are JPEG-compressed; targets stay clean.")

    def __post_init__(self):
        super().__post_init__()
        for name in ("latent_noise", "pixel_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if not 0 <= self.jpeg_probability <= 1:
            raise ValueError(f"`jpeg_probability` must be in [0, 1], got {self.jpeg_probability}.")


@dataclass(frozen=True, kw_only=True)
class EmbeddedTrainingConfig(EmbeddedDefaults, UpsamplerTrainingConfig):
    """The embedded bundle's upsampler, trained on photographs with a term in decoded pixels."""

    model_settings: ClassVar[dict] = {
        "encoder_block_out_channels": (128, 128),
        "encoder_layers_per_block": 2,
        "encoder_patch_size": 4,
        "encoder_stem_channels": 32,
        "encoder_stem_layers": 4,
        "encoder_convs_per_block": 2,
        "image_normalization": "imagenet",
        "decoder_channels": 128,
        "decoder_layers": (1, 2),
        "neighborhood": 17,
        "refiner_channels": 128,
        "refiner_layers": 8,
        "image_residual": True,
        "noise_channels": 0,
        "norm_type": "bias",
    }

    learning_rate: float = option(1e-3)
    latent_noise: float = option(0.02)
    pixel_weight: float = option(10.0)


LIFT_SETTINGS = {"neighborhood": None, "reencode_image": True, "image_residual": False}
"""
What makes an UPLiFTModel a LiFT: no Local Attender, and the image is encoded anew, magnified, at every step.

With the depth of 1 in training these are the differences that the UPLiFT paper names. The image residual of the
embedded recipe is ours and in neither paper, and stays out of the baseline, whose refiner adds its input to its output
instead. The rest, the refiner included, is that of the UPLiFT of the same recipe, so that the two compare at nearly
the same size.
Source: Walmer et al. 2026, figure 2 and section 3; Suri et al. 2024.
"""


@dataclass(frozen=True, kw_only=True)
class LiFTTrainingConfig(UpsamplerTrainingConfig):
    """LiFT for the SD1.5 VAE: trained to take one step, which is repeated for more."""

    method: ClassVar[str] = "lift"
    model_settings: ClassVar[dict] = {**UpsamplerTrainingConfig.model_settings, **LIFT_SETTINGS}

    depths: tuple[int, ...] = option((1,))


@dataclass(frozen=True, kw_only=True)
class EmbeddedLiFTTrainingConfig(EmbeddedTrainingConfig):
    """LiFT on the data and schedule of the embedded bundle."""

    method: ClassVar[str] = "lift"
    model_settings: ClassVar[dict] = {
        **EmbeddedTrainingConfig.model_settings,
        **LIFT_SETTINGS,
        "refiner_residual": True,
    }

    depths: tuple[int, ...] = option((1,))


@dataclass(frozen=True, kw_only=True)
class CFMTrainingConfig(LatentTrainingConfig):
    """Coupling Flow Matching for the SD1.5 VAE; learning rate, warm-up and moving average as its authors have them."""

    method: ClassVar[str] = "cfm"

    learning_rate: float = option(3e-5)
    lr_scheduler: str = option("constant_with_warmup")
    lr_warmup_steps: int = option(1000)
    unet: str = option("published", f"Size of the U-Net: {', '.join(UNETS)}.")

    def __post_init__(self):
        super().__post_init__()
        if self.unet not in UNETS:
            raise ValueError(f"`unet` must be one of {tuple(UNETS)}, got {self.unet!r}.")


@dataclass(frozen=True, kw_only=True)
class EmbeddedCFMTrainingConfig(EmbeddedDefaults, CFMTrainingConfig):
    """Coupling Flow Matching on the data and schedule of the embedded bundle."""

    unet: str = option("same-time")


RECIPES: dict[str, dict[str, type[LatentTrainingConfig]]] = {
    "sd15": {"uplift": UpsamplerTrainingConfig, "lift": LiFTTrainingConfig, "cfm": CFMTrainingConfig},
    "embedded": {
        "uplift": EmbeddedTrainingConfig,
        "lift": EmbeddedLiFTTrainingConfig,
        "cfm": EmbeddedCFMTrainingConfig,
    },
}
"""Configurations by `--recipe` and `--method`."""
