"""
The first stage of the embedded recipe: the encoder's stem is trained to upsample pixels, without a VAE.

A step costs a fraction of a step of the whole upsampler, which then starts from the trained stem (`--initial_stem`).
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from uplift_diffusers.data.degradation import degrade, through_jpeg
from uplift_diffusers.data.pyramid import image_pyramid
from uplift_diffusers.images.compression import denoise_for_quality
from uplift_diffusers.models.blocks import ConvGroup, start_at_zero
from uplift_diffusers.models.upsampler import UPLiFTModel, network_input
from uplift_diffusers.training.losses import psnr_from_mse
from uplift_diffusers.training.monitoring import ROWS, VALIDATION_BATCH, Validation, picture_of, validation_crops

SCALES = (2, 4)

RESIDUAL_SCALE = 0.1
"""Factor of the heads' output, which is added to the bicubic upsampling; it balances their learning rate."""


class PixelStageModel(ModelMixin, ConfigMixin):
    """
    The stem of an [`UPLiFTModel`]'s encoder with a pixel-shuffle head for each of the scales 2 and 4.

    A head is one 3x3 convolution, initialised to zero. Its output is added to the bicubic upsampling of the image.

    Args:
        stem_channels (`int`): width of the stem; `encoder_stem_channels` of the upsampler.
        stem_layers (`int`): residual blocks of the stem; `encoder_stem_layers` of the upsampler.
        convs_per_block (`int`): 3x3 convolutions in a block; `encoder_convs_per_block` of the upsampler.
        norm_type (`str`): norm of the blocks; `norm_type` of the upsampler.
        image_normalization (`str`): `image_normalization` of the upsampler.
        denoise_channel (`bool`): the stem has a fourth input channel, the denoising strength; `denoise_channel` of the
            upsampler.
    """

    config: Any  # diffusers' FrozenDict: its entries are attributes, too

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        stem_channels: int = 48,
        stem_layers: int = 10,
        convs_per_block: int = 2,
        norm_type: str = "bias",
        image_normalization: str = "imagenet",
        denoise_channel: bool = True,
    ):
        super().__init__()
        self.stem = ConvGroup(
            3 + denoise_channel, stem_channels, num_layers=stem_layers, num_convs=convs_per_block, norm_type=norm_type
        )
        self.head2, self.head4 = (nn.Conv2d(stem_channels, 3 * scale**2, 3, padding=1) for scale in SCALES)
        for head in (self.head2, self.head4):
            start_at_zero(head)

    def forward(self, image: torch.Tensor, *, scale: int, denoise: torch.Tensor) -> torch.Tensor:
        """
        Upscale images.

        Args:
            image: (B, 3, H, W) in [0, 1].
            scale: 2 or 4.
            denoise: (B,) in [0, 1], the denoising strength.
        Returns:
            (B, 3, scale * H, scale * W), float32, not clamped.
        """
        config = self.config
        seen = network_input(image, config.image_normalization, denoise if config.denoise_channel else None)
        features = self.stem(seen.contiguous(memory_format=torch.channels_last))
        residual = F.pixel_shuffle({2: self.head2, 4: self.head4}[scale](features).float(), scale)
        return F.interpolate(image.float(), scale_factor=scale, mode="bicubic") + RESIDUAL_SCALE * residual


class PixelObjective(nn.Module):
    """
    L1 between upscaled images and targets, on [0, 1], at 2x and at 4x.

    The images of a batch are rotated by multiples of 90 degrees. The last `batch_4x` are downsampled by 4; from the
    others, a square of half the edge is downsampled by 2, so all inputs have the same size.

    Args:
        model: the trained model.
        batch_4x: number of images in a batch for 4x.
        degraded_probability: share of the inputs that are degraded with `degrade`.
    """

    def __init__(self, model: PixelStageModel, *, batch_4x: int, degraded_probability: float):
        super().__init__()
        self.model = model
        self.batch_4x = batch_4x
        self.degraded_probability = degraded_probability

    def forward(self, images: torch.Tensor, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """
        Compute the losses of a batch.

        Args:
            images: (B, 3, R, R) in [0, 1], B > batch_4x, R a multiple of 4.
            generator: source of all randomness.
        Returns:
            `l1_2x`, `l1_4x`, and `loss`, their sum.
        """
        turns = torch.randint(4, (len(images),), generator=generator).tolist()
        images = torch.stack([image.rot90(turn, (1, 2)) for image, turn in zip(images, turns, strict=True)])
        num_2x, half = len(images) - self.batch_4x, images.shape[-1] // 2
        corners = torch.randint(half + 1, (num_2x, 2), generator=generator).tolist()
        squares = [image[:, y : y + half, x : x + half] for image, (y, x) in zip(images, corners, strict=False)]
        losses = {}
        for scale, targets in ((2, torch.stack(squares)), (4, images[num_2x:])):
            small = image_pyramid(targets, scale.bit_length() - 1)[-1]
            small, denoise = degrade(small, probability=self.degraded_probability, generator=generator)
            losses[f"l1_{scale}x"] = F.l1_loss(self.model(small, scale=scale, denoise=denoise), targets)
        return {**losses, "loss": losses["l1_2x"] + losses["l1_4x"]}


class PixelValidation:
    """
    Measures a `PixelStageModel` on the crops of `validation_crops`, downsampled by 2 and by 4.

    `val_psnr_<scale>x` in dB from clean inputs, `val_psnr_<scale>x_jpeg<quality>` from JPEGs. The image has a row
    for each of the first photographs, at 4x: input, bicubic, prediction and target.

    Args:
        model: the model to measure.
        folder: searched recursively.
        jpeg_qualities: Pillow's qualities of JPEG inputs.
    """

    def __init__(self, model: PixelStageModel, folder: str | Path, *, jpeg_qualities: tuple[int, ...] = ()):
        self.model, self.jpeg_qualities = model, jpeg_qualities
        self.images = validation_crops(folder)

    @torch.no_grad()
    def __call__(self) -> Validation:
        """Measure the model with its current weights."""
        sums: dict[str, float] = {}
        rows: list[torch.Tensor] = []
        for part in self.images.split(VALIDATION_BATCH):
            target = part.to(self.model.device)
            for scale, small in zip(SCALES, image_pyramid(target, 2)[1:], strict=True):
                enlarged = self._measure(f"val_psnr_{scale}x", small, target, scale, 0.0, sums)
                for quality in self.jpeg_qualities:
                    compressed, strength = through_jpeg(small, quality=quality), denoise_for_quality(quality)
                    self._measure(f"val_psnr_{scale}x_jpeg{quality}", compressed, target, scale, strength, sums)
            if len(rows) < ROWS:
                size = target.shape[2:]
                bicubic = F.interpolate(small, size=size, mode="bicubic").clamp(0, 1)
                rows += torch.cat([F.interpolate(small, size=size), bicubic, enlarged, target], dim=3)
        figures = {name: total / len(self.images) for name, total in sums.items()}
        return Validation(figures, {"input-bicubic-prediction-target": picture_of(rows[:ROWS])})

    def _measure(
        self,
        name: str,
        small: torch.Tensor,
        target: torch.Tensor,
        scale: int,
        strength: float,
        sums: dict[str, float],
    ) -> torch.Tensor:
        """Add the PSNR of every upscaled image, clamped and rounded to 8 bits, to `sums[name]`; returns the images."""
        denoise = torch.full((len(small),), strength, device=small.device)
        enlarged = (self.model(small, scale=scale, denoise=denoise).clamp(0, 1) * 255).round() / 255
        psnr = psnr_from_mse((enlarged - target).square().mean(dim=(1, 2, 3)))
        sums[name] = sums.get(name, 0.0) + psnr.sum().item()
        return enlarged


def load_stem(folder: str | Path) -> PixelStageModel:
    """
    The result of the pixel stage, or of an upsampler. Its `stem` initialises the encoder of a new upsampler.

    Args:
        folder: a result of the pixel stage; or an upsampler with a stem, for other latents too, for a stem sees only
            pixels.
    Raises:
        OSError: there is no model in the folder.
        ValueError: the model is of another class, or an upsampler without a stem.
    """
    config: Any = PixelStageModel.load_config(folder)
    name = config.get("_class_name")
    if name == PixelStageModel.__name__:
        return PixelStageModel.from_pretrained(folder)
    upsampler = UPLiFTModel.from_pretrained(folder) if name == UPLiFTModel.__name__ else None
    if upsampler is None or upsampler.stem is None:
        raise ValueError(
            f"`initial_stem` must be a folder that --stage pixels made, or an upsampler with a stem, got {folder} "
            f"with a {name}."
        )
    config = upsampler.config
    stage = PixelStageModel(
        stem_channels=config.encoder_stem_channels,
        stem_layers=config.encoder_stem_layers,
        convs_per_block=config.encoder_convs_per_block,
        norm_type=config.norm_type,
        image_normalization=config.image_normalization,
        denoise_channel=config.denoise_channel,
    )
    stage.stem.load_state_dict(upsampler.stem.state_dict())
    return stage
