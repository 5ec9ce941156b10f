"""Recipes of `train_latent.py`: configurations for every method."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from uplift_diffusers.cfm import (
    UNETS,
    FlowMatchingObjective,
    euler_scheduler,
    latent_multiple,
    make_unet,
    name_latents,
)
from uplift_diffusers.data.latent_cache import LatentCache
from uplift_diffusers.data.pyramid import image_pyramid
from uplift_diffusers.latent_space import Autoencoder, LatentCodec, LatentSpace
from uplift_diffusers.loading import load_upsampler, load_vae
from uplift_diffusers.models.upsampler import UPLiFTModel
from uplift_diffusers.pipelines.cfm_latent_upscale import CFMLatentUpscalePipeline
from uplift_diffusers.training.config import Task, TrainingConfig, option, parse_choices, parse_config
from uplift_diffusers.training.losses import PIXEL_LOSSES, MultiDepthObjective
from uplift_diffusers.training.monitoring import UpsamplerValidation
from uplift_diffusers.training.pixel_stage import PixelObjective, PixelStageModel, PixelValidation, load_stem

CFM_VALIDATION_STEPS = 4
"""Euler steps in validation: cheap, and enough to follow a training."""

VALIDATION_QUALITIES = (90, 75)
"""JPEG qualities for validation if the training has degraded inputs."""


@dataclass(frozen=True, kw_only=True)
class LatentTrainingConfig(TrainingConfig):
    """The settings of all methods for the latents of a VAE; data and sizes are those of the paper for SD1.5."""

    vae: str = option(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "A VAE, or a pipeline with one: a local folder or a hub id."
    )
    latent_space: str | None = option(None, "The VAE's latent space, if its config does not determine it.")
    resolution: int = option(1024)
    random_crop: bool = option(False)
    train_batch_size: int = option(1)
    max_train_steps: int | None = option(None)
    num_train_epochs: int | None = option(5)
    depths: tuple[int, ...] = option((1, 2), "Depths d: from 1/2^d of the resolution to all of it.")
    latent_cache_dir: str | None = option(None, "Folder for a cache of the VAE's latents.")

    def __post_init__(self):
        super().__post_init__()
        if self.latent_cache_dir is not None and self.random_crop:
            raise ValueError(
                "`latent_cache_dir` must not be given with `random_crop`: no crop comes twice, so its latents would "
                "be stored and never read. Pass --no-random_crop, and --augment_flip for variety."
            )
        if not self.depths or min(self.depths) < 1 or len(set(self.depths)) != len(self.depths):
            raise ValueError(f"`depths` must be different whole numbers of at least 1, got {self.depths}.")

    @contextmanager
    def open_task(self, device: torch.device) -> Iterator[Task]:
        """
        Load the VAE and make a new model for its latents.

        Raises:
            OSError: the VAE cannot be loaded, or the latent cache cannot be written.
            ValueError: the resolution does not suit the model.
        """
        vae: Any = load_vae(self.vae)
        vae.to(device)
        space = LatentSpace.of(vae, self.latent_space)
        cache = LatentCache(self.latent_cache_dir, vae, space) if self.latent_cache_dir is not None else nullcontext()
        with cache as opened:
            task = self.make_task(vae, space, cache=opened)
            task.objective.to(device)  # and so the model, before it is fitted to crops that are there
            yield task

    def make_task(self, vae: Autoencoder, space: LatentSpace, *, cache: LatentCache | None = None) -> Task:
        """A new model for the latents of `vae`, and its objective."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it trains.")

    def _check_resolution(self, multiple: int, reason: str) -> None:
        if self.resolution % multiple:
            raise ValueError(f"`resolution` must be a multiple of {multiple} for {reason}, got {self.resolution}.")


@dataclass(frozen=True, kw_only=True)
class EmbeddedDefaults(LatentTrainingConfig):
    """Data and schedule of the embedded bundle and its baselines: small enough for a laptop."""

    vae: str = option(description="The embedded autoencoder: a local folder.")
    resolution: int = option(192)
    random_crop: bool = option(True)
    max_reduction: float = option(2.0)
    train_batch_size: int = option(4)
    max_train_steps: int | None = option(6_000)
    num_train_epochs: int | None = option(None)
    learning_rate: float = option(7e-4)


@dataclass(frozen=True, kw_only=True)
class UpsamplerTrainingConfig(LatentTrainingConfig):
    """The paper's recipe for the SD1.5 VAE: all depths in every step, L2 on every intermediate result."""

    model_settings: ClassVar[dict] = {}
    """Constructor arguments of UPLiFTModel; `latent_channels`, `spatial_factor` and `latent_space` are the VAE's."""

    lr_scheduler: str = option("constant")
    lr_warmup_steps: int = option(0)
    use_ema: bool = option(False)
    depths: tuple[int, ...] = option((1, 2, 3, 4), "Depths d: from 1/2^d of the resolution in d steps of 2x.")
    latent_noise: float = option(1.0, "Standard deviation of the noise added to the input latents, in raw units.")
    pixel_weight: float = option(0.0, "Weight of the loss between the decoded last step and the image.")
    pixel_loss: str = option("l1", "That loss: L1 on [0, 1], or the negative PSNR in dB.")
    consistent_pixels: bool = option(True, "That loss after the consistency step; off if latents are the result.")
    initial_stem: str | None = option(None, "Result of --stage pixels, or an upsampler, for its stem.")
    pretrained_model: str | None = option(None, "A trained upsampler for these latents to start from.")
    degraded_probability: float = option(0.0, "Share of the input images with JPEG artefacts, noise or blur.")

    def __post_init__(self):
        super().__post_init__()
        for name in ("latent_noise", "pixel_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if self.pixel_loss not in PIXEL_LOSSES:
            raise ValueError(f"`pixel_loss` must be one of {', '.join(PIXEL_LOSSES)}, got {self.pixel_loss!r}.")
        check_probability("degraded_probability", self.degraded_probability)
        if self.initial_stem is not None and self.pretrained_model is not None:
            raise ValueError("`initial_stem` must not be given with `pretrained_model`, which has a stem.")

    def make_task(self, vae: Autoencoder, space: LatentSpace, *, cache: LatentCache | None = None) -> Task:
        """
        A new UPLiFTModel, or the one in `pretrained_model` with its settings, and the recipe's objective.

        The linear part of a new model is fitted before the training.
        """
        self._check_resolution(space.spatial_factor * 2 ** max(self.depths), f"depth {max(self.depths)}")
        if self.pretrained_model is not None:
            model = load_upsampler(self.pretrained_model)
            space.check_upsampler(model)
        else:
            model = self._make_model(space)
        objective = MultiDepthObjective(
            model,
            vae,
            space,
            depths=self.depths,
            latent_noise=self.latent_noise,
            pixel_weight=self.pixel_weight,
            pixel_loss=self.pixel_loss,
            consistent_pixels=self.consistent_pixels,
            degraded_probability=self.degraded_probability,
            cache=cache,
        )

        def upsample(
            image: torch.Tensor, depth: int, denoise: torch.Tensor, generator: torch.Generator
        ) -> torch.Tensor:
            latents = LatentCodec(vae, space).encode(image)
            return model(latents, image=image, num_steps=depth, denoise=denoise, generator=generator).sample

        @torch.no_grad()
        def fit(crops: torch.Tensor) -> None:
            assert model.estimator is not None
            levels = len(model.estimator.convs)
            pyramids = [image_pyramid(images, levels) for images in crops.split(8)]
            targets = [LatentCodec(vae, space).encode(pyramid[0]) for pyramid in pyramids]
            for depth in range(1, levels + 1):
                images = [pyramid[depth] for pyramid in pyramids]
                pixels: list[Any] = [model.encode(image, step=0, num_steps=depth).pixels for image in images]
                model.estimator.fit(list(zip(pixels, targets, strict=True)))

        validate = None
        if self.validation_data_dir is not None:
            qualities = VALIDATION_QUALITIES if self.degraded_probability else ()
            validate = UpsamplerValidation(upsample, vae, space, self.validation_data_dir, jpeg_qualities=qualities)
        is_fitted = self.pretrained_model is not None or model.estimator is None
        return Task(model, objective, fit=None if is_fitted else fit, validate=validate)

    def _make_model(self, space: LatentSpace) -> UPLiFTModel:
        settings = dict(self.model_settings)
        stage = None
        if self.initial_stem is not None:
            stage = load_stem(self.initial_stem)
            settings["encoder_stem_channels"] = stage.config.stem_channels
            settings["encoder_stem_layers"] = stage.config.stem_layers
            settings["denoise_channel"] = stage.config.denoise_channel
        model = UPLiFTModel(
            **settings,
            latent_channels=space.channels,
            spatial_factor=space.spatial_factor,
            latent_space=space.name,
        )
        if stage is not None:
            _start_from(stage, model)
        return model


@dataclass(frozen=True, kw_only=True)
class EmbeddedTrainingConfig(EmbeddedDefaults, UpsamplerTrainingConfig):
    """The embedded bundle's upsampler, trained on photographs with an additional loss on decoded pixels."""

    model_settings: ClassVar[dict] = {
        "encoder_block_out_channels": (128, 128),
        "encoder_layers_per_block": 1,
        "encoder_patch_size": 4,
        "encoder_stem_channels": 48,
        "encoder_stem_layers": 10,
        "encoder_convs_per_block": 2,
        "image_normalization": "imagenet",
        "decoder_channels": 48,
        "decoder_layers": (1, 1),
        "neighborhood": 17,
        "attender_residual": False,
        "refiner_channels": 96,
        "refiner_layers": 4,
        "denoise_channel": True,
        "image_residual": True,
        "noise_channels": 0,
        "norm_type": "bias",
    }

    learning_rate: float = option(5e-4)
    latent_noise: float = option(0.02)
    pixel_weight: float = option(10.0)
    degraded_probability: float = option(0.45)


LIFT_SETTINGS = {"neighborhood": None, "reencode_image": True, "image_residual": False}
"""
Arguments that make a UPLiFTModel a LiFT: no Local Attender, and the upsampled image is encoded again at every step.

With the training depth of 1 these are the differences that the UPLiFT paper names. The image residual of the embedded
recipe is in neither paper, so the baseline has none; its refiner adds its input to its output instead. Everything else
is as in the UPLiFT of the same recipe, so that the two are nearly of the same size.
Source: Walmer et al. 2026, figure 2 and section 3; Suri et al. 2024.
"""


@dataclass(frozen=True, kw_only=True)
class LiFTTrainingConfig(UpsamplerTrainingConfig):
    """LiFT for the SD1.5 VAE: trained to take one step, which is repeated for more."""

    model_settings: ClassVar[dict] = {**UpsamplerTrainingConfig.model_settings, **LIFT_SETTINGS}

    depths: tuple[int, ...] = option((1,))


@dataclass(frozen=True, kw_only=True)
class EmbeddedLiFTTrainingConfig(EmbeddedTrainingConfig):
    """LiFT on the data and schedule of the embedded bundle."""

    model_settings: ClassVar[dict] = {
        **EmbeddedTrainingConfig.model_settings,
        **LIFT_SETTINGS,
        "refiner_residual": True,
    }

    depths: tuple[int, ...] = option((1,))


@dataclass(frozen=True, kw_only=True)
class CFMTrainingConfig(LatentTrainingConfig):
    """Coupling Flow Matching for the SD1.5 VAE; learning rate, warm-up and moving average as its authors have them."""

    learning_rate: float = option(3e-5)
    lr_scheduler: str = option("constant_with_warmup")
    lr_warmup_steps: int = option(1000)
    unet: str = option("published", f"Size of the U-Net: {', '.join(UNETS)}.")

    def __post_init__(self):
        super().__post_init__()
        if self.unet not in UNETS:
            raise ValueError(f"`unet` must be one of {tuple(UNETS)}, got {self.unet!r}.")

    def make_task(self, vae: Autoencoder, space: LatentSpace, *, cache: LatentCache | None = None) -> Task:
        """A new U-Net, validated in `CFM_VALIDATION_STEPS` Euler steps."""
        model = make_unet(self.unet, space.channels)
        self._check_resolution(space.spatial_factor * latent_multiple(model), f"the U-Net {self.unet!r}")
        name_latents(model, space)
        objective = FlowMatchingObjective(model, vae, space, depths=self.depths, cache=cache)
        pipeline = CFMLatentUpscalePipeline(vae, model, euler_scheduler(), latent_space=self.latent_space)
        pipeline.set_progress_bar_config(disable=True)

        def upsample(
            image: torch.Tensor, depth: int, denoise: torch.Tensor, generator: torch.Generator
        ) -> torch.Tensor:
            settings = {"num_inference_steps": CFM_VALIDATION_STEPS, "generator": generator}
            output: Any = pipeline(image=image, scale=2**depth, output_type="latent", **settings)
            return space.denormalize(output.images)

        validate = None
        if self.validation_data_dir is not None:
            validate = UpsamplerValidation(upsample, vae, space, self.validation_data_dir)
        return Task(model, objective, validate=validate)


@dataclass(frozen=True, kw_only=True)
class EmbeddedCFMTrainingConfig(EmbeddedDefaults, CFMTrainingConfig):
    """Coupling Flow Matching on the data and schedule of the embedded bundle."""

    unet: str = option("same-time")


@dataclass(frozen=True, kw_only=True)
class PixelTrainingConfig(TrainingConfig):
    """The first stage of the embedded recipe, `--stage pixels`: the encoder's stem, trained on pixels."""

    resolution: int = option(192, "Edge of the 4x crops in pixels; the 2x crops have half of it.")
    max_reduction: float = option(2.0)
    train_batch_size: int = option(13)
    batch_4x: int = option(5, "Images per batch for 4x; the others are for 2x.")
    max_train_steps: int | None = option(20_000)
    adam_beta2: float = option(0.99)
    lr_floor: float = option(0.02)
    max_grad_norm: float = option(0.3)
    degraded_probability: float = option(0.45, "Share of the inputs with JPEG artefacts, noise or blur.")
    stem_channels: int = option(48, "Width of the stem.")
    stem_layers: int = option(10, "Residual blocks of the stem, of two 3x3 convolutions each.")

    def __post_init__(self):
        super().__post_init__()
        check_probability("degraded_probability", self.degraded_probability)
        if self.resolution % 4:
            raise ValueError(f"`resolution` must be a multiple of 4, got {self.resolution}.")
        if not self.random_crop:
            raise ValueError("`random_crop` must be on in the pixel stage: its inputs are crops at their own size.")
        if not 1 <= self.batch_4x < self.train_batch_size:
            raise ValueError(
                f"`batch_4x` must be at least 1 and below `train_batch_size`, got {self.batch_4x} and "
                f"{self.train_batch_size}."
            )
        for name in ("stem_channels", "stem_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    @contextmanager
    def open_task(self, device: torch.device) -> Iterator[Task]:
        """A new stem with its two heads."""
        model: Any = PixelStageModel(stem_channels=self.stem_channels, stem_layers=self.stem_layers)
        model.to(device)
        objective = PixelObjective(model, batch_4x=self.batch_4x, degraded_probability=self.degraded_probability)
        validate = None
        if self.validation_data_dir is not None:
            validate = PixelValidation(model, self.validation_data_dir, jpeg_qualities=VALIDATION_QUALITIES)
        yield Task(model, objective, validate=validate)


RECIPES: dict[str, dict[str, type[LatentTrainingConfig]]] = {
    "sd15": {"uplift": UpsamplerTrainingConfig, "lift": LiFTTrainingConfig, "cfm": CFMTrainingConfig},
    "embedded": {
        "uplift": EmbeddedTrainingConfig,
        "lift": EmbeddedLiFTTrainingConfig,
        "cfm": EmbeddedCFMTrainingConfig,
    },
}
"""Configurations by `--recipe` and `--method`."""


def parse_recipe(arguments: list[str] | None = None) -> tuple[TrainingConfig, str]:
    """
    The configuration selected by the command line, by default that of the process, and the command that selects it.

    Raises:
        OSError: the --config file cannot be read.
        ValueError: the file is not a YAML mapping, or the recipe has no such stage.
        SystemExit: a flag is wrong.
    """
    choices = {"recipe": tuple(RECIPES), "method": tuple(RECIPES["sd15"]), "stage": ("upsampler", "pixels")}
    chosen, settings, rest = parse_choices(choices, arguments)
    config_class: type[TrainingConfig] = RECIPES[chosen["recipe"]][chosen["method"]]
    if chosen["stage"] == "pixels":
        if config_class is not EmbeddedTrainingConfig:
            raise ValueError(
                "`stage` must be upsampler unless the recipe is embedded and the method uplift, got pixels for "
                f"{chosen['recipe']}, {chosen['method']}."
            )
        config_class = PixelTrainingConfig
    config = parse_config(
        config_class,
        rest,
        settings=settings,
        description="Train an upsampler for the latents of a VAE. "
        + "; ".join(f"--{name} {' | '.join(values)}" for name, values in choices.items())
        + f". The settings of {', '.join(chosen.values())}:",
    )
    flags = [f"--{name} {value}" for name, value in chosen.items() if (name, value) != ("stage", "upsampler")]
    return config, " ".join(["accelerate launch train_latent.py", *flags])


def check_probability(name: str, value: float) -> None:
    """Raise ValueError unless `value` is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be in [0, 1], got {value}.")


def _start_from(stage: PixelStageModel, model: UPLiFTModel) -> None:
    """Load the weights of the pixel stage into the stem of `model`."""
    names = {"convs_per_block": "encoder_convs_per_block", "norm_type": "norm_type"}
    names["image_normalization"] = "image_normalization"
    for name, name_there in names.items():
        expected, actual = model.config[name_there], stage.config[name]
        if actual != expected:
            raise ValueError(f"`initial_stem` must have {name}={expected!r} for this recipe, got {actual!r}.")
    assert model.stem is not None  # the stage says how deep it is
    model.stem.load_state_dict(stage.stem.state_dict())
