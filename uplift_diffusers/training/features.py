"""Training upsamplers of a backbone's features: recipes, the loss, validation, and the command."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from uplift_diffusers.data.dataset import CropFunction, Photographs
from uplift_diffusers.data.sources import FolderSource
from uplift_diffusers.feature_space import FeatureBackbone, FeatureSpace, resize_bilinear
from uplift_diffusers.models.conversion import CONFIGS
from uplift_diffusers.models.upsampler import UPLiFTModel
from uplift_diffusers.pipelines.features import principal_components
from uplift_diffusers.scale import size_of
from uplift_diffusers.training.config import Task, TrainingConfig, option, parse_choices, parse_config
from uplift_diffusers.training.monitoring import ROWS, VALIDATION_BATCH, VALIDATION_DEPTHS, Validation, picture_of
from uplift_diffusers.training.train import run, run_command

UpsampleFeatures = Callable[[torch.Tensor, torch.Tensor, tuple[int, int]], torch.Tensor]
"""(features, image, size) -> features: (B, C, h, w) and (B, 3, H, W) in [0, 1] to (B, C, *size)."""


@dataclass(frozen=True)
class Squash:
    """Resizes a whole photograph to a square, ignoring its aspect ratio, as in the published training."""

    resolution: int

    def __call__(self, image: Image.Image, epoch: int, index: int) -> torch.Tensor:
        """An RGB image -> (3, resolution, resolution) uint8."""
        square = image.resize((self.resolution, self.resolution), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)


@dataclass(frozen=True, kw_only=True)
class FeatureTrainingConfig(TrainingConfig):
    """The paper's recipe for DINOv2-S/14: one epoch of ImageNet at 448 px, depths 1 to 3, no augmentation, float32."""

    model_settings: ClassVar[dict] = {
        name: value
        for name, value in CONFIGS["dinov2-s14"].items()
        if name not in ("latent_channels", "latent_space", "spatial_factor", "encoder_spatial_factor")
    }
    """Constructor arguments of UPLiFTModel that do not depend on the backbone."""
    published_depths: ClassVar[tuple[int, ...]] = (1, 2, 3)

    backbone: str = option("facebook/dinov2-small", "A vision transformer: a local folder or a hub id.")
    feature_space: str | None = option(None, "The backbone's feature space, if its config does not determine it.")
    image_normalization: str | None = option(
        None, "Of the backbone's input: imagenet, half or sat493m; by default its own."
    )
    method: str = option("uplift", "The model: uplift, or lift, the same network without the Local Attender.")
    depths: tuple[int, ...] = option(
        None, "Depths d: from 1/2^d of the resolution in d 2x steps; by default those of the recipe, and 1 for lift."
    )
    resolution: int = option(448)
    squash: bool = option(True, "Resize whole photographs to a square; off: crop squares, see random_crop.")
    random_crop: bool = option(False)
    train_batch_size: int = option(32)
    max_train_steps: int | None = option(None)
    num_train_epochs: int | None = option(1)
    lr_scheduler: str = option("constant")
    lr_warmup_steps: int = option(0)
    use_ema: bool = option(False)
    mixed_precision: str = option("no")

    def __post_init__(self):
        super().__post_init__()
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {self.method!r}.")
        if self.depths is None:
            object.__setattr__(self, "depths", (1,) if self.method == "lift" else self.published_depths)
        if not self.depths or min(self.depths) < 1 or len(set(self.depths)) != len(self.depths):
            raise ValueError(f"`depths` must be different whole numbers of at least 1, got {self.depths}.")
        if self.squash and (self.random_crop or self.augment_flip):
            raise ValueError("`squash` must be off with `random_crop` or `augment_flip`. Pass --no-squash.")

    def make_crop(self) -> CropFunction:
        return Squash(self.resolution) if self.squash else super().make_crop()

    @contextmanager
    def open_task(self, device: torch.device) -> Iterator[Task]:
        """
        Load the backbone and make a new model for its features.

        Raises:
            OSError: the backbone cannot be loaded.
            TypeError: the backbone's class is not supported.
            ValueError: the resolution does not suit the backbone.
        """
        backbone = FeatureBackbone.from_pretrained(
            self.backbone, self.feature_space, image_normalization=self.image_normalization
        )
        backbone.model.to(device).requires_grad_(False)
        yield self.make_task(backbone)

    def make_task(self, backbone: FeatureBackbone) -> Task:
        """
        A new model for the features of `backbone`, and its objective.

        Raises:
            ValueError: the resolution does not suit the backbone.
        """
        multiple = backbone.space.patch_size * 2 ** max(self.depths)
        if self.resolution % multiple:
            raise ValueError(
                f"`resolution` must be a multiple of {multiple} for patches of {backbone.space.patch_size} px and a "
                f"depth of {max(self.depths)}, got {self.resolution}."
            )
        model, objective, upsample = METHODS[self.method](self, backbone)
        validate = None
        if self.validation_data_dir is not None:
            validate = FeatureValidation(
                upsample, backbone, self.validation_data_dir, resolution=self.resolution, depths=VALIDATION_DEPTHS
            )
        return Task(model=model, objective=objective, validate=validate)


@dataclass(frozen=True, kw_only=True)
class DINOv3TrainingConfig(FeatureTrainingConfig):
    """The paper's recipe for DINOv3-S+/16: depths 1 and 2."""

    published_depths: ClassVar[tuple[int, ...]] = (1, 2)

    backbone: str = option("facebook/dinov3-vits16plus-pretrain-lvd1689m")


@dataclass(frozen=True, kw_only=True)
class SmallFeatureTrainingConfig(FeatureTrainingConfig):
    """A network of a quarter of the size on squares of 224 px, trained in about an hour on a laptop."""

    model_settings: ClassVar[dict] = {
        **FeatureTrainingConfig.model_settings,
        "encoder_block_out_channels": (16, 32, 32, 32),
        "decoder_channels": 32,
    }

    published_depths: ClassVar[tuple[int, ...]] = (1, 2)

    resolution: int = option(224)
    train_batch_size: int = option(4)
    max_train_steps: int | None = option(2_000)
    num_train_epochs: int | None = option(None)
    lr_scheduler: str = option("cosine")
    lr_warmup_steps: int = option(100)


RECIPES: dict[str, type[FeatureTrainingConfig]] = {
    "dinov2-s14": FeatureTrainingConfig,
    "dinov3-splus16": DINOv3TrainingConfig,
    "small": SmallFeatureTrainingConfig,
}
"""Configurations by `--recipe`."""


class FeatureObjective(nn.Module):
    """
    The sum over depths d of a loss between features upsampled from 1/2^d of the resolution and those of the image.

    The backbone runs once for each size. It is frozen, and sees every size in float32.

    Args:
        model: the trained model.
        backbone: computes the inputs and the targets.
        depths: the depths d, each at least 1.
    """

    def __init__(self, model: nn.Module, backbone: FeatureBackbone, *, depths: tuple[int, ...]):
        super().__init__()
        self.model = model
        self.backbone = backbone
        self.depths = depths

    def forward(self, images: torch.Tensor, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """
        Compute the losses of a batch.

        Args:
            images: (B, 3, R, R) in [0, 1], R a multiple of patch_size * 2^max(depths).
            generator: source of all randomness.
        Returns:
            `loss`, and its parts `loss_d<d>`, one for each depth.
        """
        pyramid = image_pyramid(images, max(self.depths))
        # In float32 even if the model runs in autocast, to keep the targets exact.
        with torch.autocast(images.device.type, enabled=False):
            features = [self.backbone.encode(image).float() for image in pyramid]
        losses = {f"loss_d{depth}": self.depth_loss(depth, pyramid, features, generator) for depth in self.depths}
        losses["loss"] = sum(losses.values(), start=torch.zeros(()))
        return losses

    def depth_loss(
        self, depth: int, pyramid: list[torch.Tensor], features: list[torch.Tensor], generator: torch.Generator
    ) -> torch.Tensor:
        """The loss of one depth; level l of `pyramid` and `features` is at 1/2^l of the resolution."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it minimises.")


class EveryStepObjective(FeatureObjective):
    """
    Mean squared error of every 2x step against the features of the image at that size.

    Source: Walmer et al. 2026, section 3.3, equations for L_simple and L_d.
    """

    def depth_loss(
        self, depth: int, pyramid: list[torch.Tensor], features: list[torch.Tensor], generator: torch.Generator
    ) -> torch.Tensor:
        steps = self.model(
            features[depth], image=pyramid[depth], num_steps=depth, generator=generator, return_steps=True
        ).steps
        targets = features[:depth][::-1]
        losses = [F.mse_loss(step.float(), target) for step, target in zip(steps, targets, strict=True)]
        return sum(losses, start=torch.zeros(()))


class FinalSizeObjective(FeatureObjective):
    """
    JAFAR's loss at the size of the image's features, for a model that upsamples to it in one call.

    The mean of 1 - cosine over positions, and the mean squared error after scaling both, position by position, so
    the target's channels span 0 to 1.

    Source: Couairon et al. 2025, section 3, and its published training; AnyUp uses the same.
    """

    def depth_loss(
        self, depth: int, pyramid: list[torch.Tensor], features: list[torch.Tensor], generator: torch.Generator
    ) -> torch.Tensor:
        target = features[0]
        predicted = self.model(features[depth], pyramid[depth], size_of(target)).float()
        low, high = target.amin(dim=1, keepdim=True), target.amax(dim=1, keepdim=True)
        prediction_in_span, target_in_span = ((values - low) / (high - low + 1e-6) for values in (predicted, target))
        cosine = F.cosine_similarity(predicted, target, dim=1)
        return (1 - cosine).mean() + F.mse_loss(prediction_in_span, target_in_span)


class TrainedPeer(nn.Module):
    """
    A published upsampler to be trained.

    Args:
        network: a module with `upsample(features, image, size)`, see `UpsampleFeatures`.
        name: its name for `load_peer`.
        channels: channels of the features that it is trained for.
    """

    def __init__(self, network: nn.Module, *, name: str, channels: int):
        super().__init__()
        self.network: Any = network
        self.name, self.channels = name, channels

    def forward(self, features: torch.Tensor, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return self.network.upsample(features, image, size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the network's tensors to a .safetensors file, with their published names, for `load_peer`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}
        save_file(tensors, Path(folder) / "diffusion_pytorch_model.safetensors")

    def loading_lines(self) -> str:
        """For the model card."""
        return (
            "from uplift_diffusers.evaluation.predictive.peers import load_peer\n\n"
            f'upsampler = load_peer("{self.name}", channels={self.channels}, weights="the folder of this card")'
        )


Method = tuple[Any, FeatureObjective, UpsampleFeatures]
"""The model to train and save, its objective, and its upsampling function."""


def _make_uplift(config: FeatureTrainingConfig, backbone: FeatureBackbone, **changes) -> Method:
    space = backbone.space
    model: Any = UPLiFTModel(
        **{**config.model_settings, **changes},
        latent_channels=space.channels,
        spatial_factor=space.patch_size,
        latent_space=space.name,
        # Halved step by step, the encoder's maps meet the positions of every step: 16 pixels for patches of 14.
        encoder_spatial_factor=2 ** math.ceil(math.log2(space.patch_size)),
    )
    model.to(backbone.model.device)

    def upsample(features: torch.Tensor, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return model(features, image=image, num_steps=(size[0] // features.shape[2]).bit_length() - 1).sample

    return model, EveryStepObjective(model, backbone, depths=config.depths), upsample


def _make_lift(config: FeatureTrainingConfig, backbone: FeatureBackbone) -> Method:
    """LiFT of the same size: no Local Attender, and the upsampled image is encoded again at every step."""
    return _make_uplift(config, backbone, neighborhood=None, reencode_image=True)


METHODS: dict[str, Callable[[FeatureTrainingConfig, FeatureBackbone], Method]] = {
    "uplift": _make_uplift,
    "lift": _make_lift,
}
"""Constructors by value of `--method`; see `add_peer`."""


def add_peer(name: str, make_network: Callable[[FeatureSpace], nn.Module]) -> None:
    """
    Add a published upsampler that is trained by reconstruction, such as JAFAR or AnyUp, to `--method`.

    Args:
        name: the value of `--method`, and its name for `load_peer`.
        make_network: makes a new network with `upsample(features, image, size)` for the features of a space.
    """

    def make(config: FeatureTrainingConfig, backbone: FeatureBackbone) -> Method:
        space = backbone.space
        model = TrainedPeer(make_network(space), name=name, channels=space.channels).to(backbone.model.device)
        return model, FinalSizeObjective(model, backbone, depths=config.depths), model

    METHODS[name] = make


class FeatureValidation:
    """
    Measures an upsampler on every photograph below a folder, resized to a square and downsampled by 2 and by 4.

    At both scales: `val_cosine`, the mean cosine between the result and the features of the square, and `val_mse`;
    and both for bilinear interpolation, the baseline. The image has a row for each of the first
    photographs, at the largest scale, in the colours of the target's principal components: bilinear, prediction,
    target.

    Args:
        upsample: the upsampling function.
        backbone: computes the features.
        folder: searched recursively.
        resolution: edge of the square in pixels.
        depths: the square is downsampled by 2**depth, where the backbone's patches fit.
    """

    def __init__(
        self,
        upsample: UpsampleFeatures,
        backbone: FeatureBackbone,
        folder: str | Path,
        *,
        resolution: int,
        depths: tuple[int, ...],
    ):
        self.upsample = upsample
        self.depths = [depth for depth in depths if resolution % (backbone.space.patch_size * 2**depth) == 0]
        photographs = Photographs(FolderSource(folder), Squash(resolution))
        images = torch.stack([photographs[0, index] for index in range(len(photographs))])
        self.num_photographs = len(images)
        self.batches = []  # (image, features) of every level
        for part in images.split(VALIDATION_BATCH):
            pyramid = image_pyramid(part.to(backbone.model.device).float() / 255, max(self.depths))
            self.batches.append([(image, backbone.encode(image).float()) for image in pyramid])

    @torch.no_grad()
    def __call__(self) -> Validation:
        """Measure the model with its current weights."""
        sums: dict[str, float] = {}
        rows = []
        for levels in self.batches:
            target = levels[0][1]
            size = size_of(target)
            for depth in self.depths:
                image, features = levels[depth]
                predicted = self.upsample(features, image, size).float()
                bilinear = F.interpolate(features, size=size, mode="bilinear")
                for kind, values in (("", predicted), ("_bilinear", bilinear)):
                    cosine = F.cosine_similarity(values, target, dim=1).mean(dim=(1, 2))
                    mse = (values - target).square().mean(dim=(1, 2, 3))
                    for name, measured in (("cosine", cosine), ("mse", mse)):
                        key = f"val_{name}{kind}_{2**depth}x"
                        sums[key] = sums.get(key, 0.0) + measured.sum().item()
            if len(rows) < ROWS:
                colours = principal_components(target)
                rows += torch.cat([colours(values) for values in (bilinear, predicted, target)], dim=3).clamp(0, 1)
        picture = picture_of(rows[:ROWS])
        enlarged = picture.resize((8 * picture.width, 8 * picture.height), Image.Resampling.NEAREST)
        figures = {name: total / self.num_photographs for name, total in sums.items()}
        return Validation(figures, {"bilinear-prediction-target": enlarged})


def image_pyramid(images: torch.Tensor, depth: int) -> list[torch.Tensor]:
    """(B, 3, R, R), and it downsampled by 2, 4, ..., 2**depth, each from the original: bilinear and antialiased."""
    size = images.shape[-1]
    return [resize_bilinear(images, (size // 2**level,) * 2) for level in range(depth + 1)]


def main(arguments: list[str] | None = None) -> int:
    """
    Train an upsampler of features; the arguments are by default those of the process.

    Returns:
        The exit code: 0, or 1 after one line on stderr about an expected error. Wrong flags exit with 2.
    """
    return run_command(lambda: run(*parse_recipe(arguments)))


def parse_recipe(arguments: list[str] | None = None) -> tuple[FeatureTrainingConfig, str]:
    """The configuration selected by the command line, and the command that selects it."""
    chosen, settings, rest = parse_choices({"recipe": tuple(RECIPES)}, arguments)
    recipe = chosen["recipe"]
    config = parse_config(
        RECIPES[recipe],
        rest,
        settings=settings,
        description=f"Train an upsampler of a backbone's features. --recipe {' | '.join(RECIPES)}. "
        f"The settings of {recipe}:",
    )
    return config, f"accelerate launch train_features.py --recipe {recipe}"
