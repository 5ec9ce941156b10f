"""UPLiFT: an encoder that runs once, one weight-shared 2x decoder applied at every step, and the Local Attender."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from torch import nn

from uplift_diffusers.arguments import read_whole_number
from uplift_diffusers.models.blocks import (
    NORMS,
    ConvGroup,
    interpolate_2x,
    resample_nearest,
    start_at_zero,
    total_reach,
)
from uplift_diffusers.models.conversion import (
    CONFIGS,
    PUBLISHED,
    check_state_dict,
    config_from_filename,
    convert_state_dict,
    load_safetensors,
)
from uplift_diffusers.models.image_residual import ImageResidual
from uplift_diffusers.models.local_attention import NEIGHBORHOODS, LocalAttender
from uplift_diffusers.scale import size_of

Generator = torch.Generator | list[torch.Generator] | None

IMAGE_NORMALIZATIONS = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass
class UPLiFTOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor`): (B, C, h * 2**num_steps, w * 2**num_steps), raw latents.
        steps (`list[torch.Tensor]`, *optional*): the output of every 2x step; the last one is `sample`.
    """

    sample: torch.Tensor
    steps: list[torch.Tensor] | None = None


class StepNoise(NamedTuple):
    """
    The noise of one 2x step from (h, w) to (2h, 2w), in the order in which it is drawn.

    Args:
        coarse: (B, noise_channels, h, w), for the decoder before its upsampling.
        fine: (B, noise_channels, 2h, 2w), for the decoder after its upsampling.
        refiner: (B, noise_channels, 2h, 2w), for the refiner; None without one.
    """

    coarse: torch.Tensor
    fine: torch.Tensor
    refiner: torch.Tensor | None


class GuideMaps(NamedTuple):
    """
    The output of the encoder.

    Args:
        before_last: (B, G, H, W), the second-to-last feature map.
        last: (B, G', H, W), the last feature map.
        pixels: (B, P, h * spatial_factor, w * spatial_factor), the image in [-1, 1] and the stem's features;
            None without an `ImageResidual`.
    """

    before_last: torch.Tensor
    last: torch.Tensor
    pixels: torch.Tensor | None


class StepGuide(NamedTuple):
    """
    The guide of one 2x step from (h, w) to (2h, 2w).

    Args:
        coarse: (B, G', h, w), for the decoder before its upsampling.
        fine: (B, G, 2h, 2w), for the decoder after its upsampling.
        refiner: (B, G', 2h, 2w), for the refiner.
        estimate: (B, C, 2h, 2w), the linear estimate of the step's result; None without an `ImageResidual`.
    """

    coarse: torch.Tensor
    fine: torch.Tensor
    refiner: torch.Tensor
    estimate: torch.Tensor | None


class UPLiFTEncoder(nn.Module):
    """
    Image -> the last two guide maps, at the image's resolution divided by `patch_size`.

    Args:
        in_channels: channels of the image.
        stem_channels: channels of the stem's features, which are then the input; None without a stem.
    """

    def __init__(
        self,
        in_channels: int,
        block_out_channels: tuple[int, ...],
        *,
        layers_per_block: int,
        patch_size: int,
        stem_channels: int | None,
        num_convs: int,
        norm_type: str,
    ):
        super().__init__()
        self.patch_size = patch_size
        if stem_channels is None:
            self.patches = nn.PixelUnshuffle(patch_size)
            widths = (in_channels * patch_size**2, *block_out_channels)
        else:
            self.patches = nn.Conv2d(stem_channels, block_out_channels[0], patch_size, stride=patch_size)
            widths = (block_out_channels[0], *block_out_channels)
        self.blocks = nn.ModuleList(
            ConvGroup(before, after, num_layers=layers_per_block, num_convs=num_convs, norm_type=norm_type)
            for before, after in zip(widths[:-1], widths[1:])
        )

    @property
    def reach_px(self) -> int:
        """Pixels to each side of its patch on which an output depends."""
        return self.patch_size * total_reach(self.blocks)

    def forward(self, image: torch.Tensor, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, H, W) -> the second-to-last and the last map, every `stride`-th position of each."""
        hidden = self.patches(image).contiguous(memory_format=torch.channels_last)
        for block in self.blocks[:-1]:
            hidden = block(hidden)
        return hidden[..., ::stride, ::stride], self.blocks[-1](hidden, stride)


class UPLiFTDecoder(nn.Module):
    """One 2x step on features: blocks, transposed convolution plus bilinear interpolation, blocks."""

    def __init__(
        self,
        latent_channels: int,
        channels: int,
        guide_channels: tuple[int, int],
        *,
        num_layers: tuple[int, int],
        num_convs: int,
        norm_type: str,
        noise_channels: int,
    ):
        super().__init__()
        fine_guide, coarse_guide = guide_channels
        settings = {"num_convs": num_convs, "norm_type": norm_type}
        self.coarse = ConvGroup(
            latent_channels + coarse_guide + noise_channels, channels, num_layers=num_layers[0], **settings
        )
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.fine = ConvGroup(channels + fine_guide + noise_channels, channels, num_layers=num_layers[1], **settings)

    def forward(
        self,
        latents: torch.Tensor,
        coarse_guide: torch.Tensor,
        fine_guide: torch.Tensor,
        coarse_noise: torch.Tensor,
        fine_noise: torch.Tensor,
        place: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        (B, C, h, w) and guides and noise at (h, w) and (2h, 2w) -> (B, channels, 2h, 2w).

        Args:
            place: position of the latents in the whole image, see `interpolate_2x`; None if they are the whole.
        """
        hidden = self.coarse(_concatenate(latents, coarse_guide, coarse_noise))
        hidden = self.upsample(hidden) + interpolate_2x(hidden, place)
        return self.fine(_concatenate(hidden, fine_guide, fine_noise))


class UPLiFTRefiner(nn.Module):
    """Attended latents -> refined latents at the same size."""

    def __init__(
        self,
        latent_channels: int,
        channels: int,
        guide_channels: int,
        *,
        num_layers: int,
        num_convs: int,
        norm_type: str,
        noise_channels: int,
        residual: bool,
        estimate_channels: int,
    ):
        super().__init__()
        self.residual = residual
        self.blocks = ConvGroup(
            latent_channels + guide_channels + noise_channels + estimate_channels,
            channels,
            num_layers=num_layers,
            num_convs=num_convs,
            norm_type=norm_type,
        )
        self.conv_out = nn.Conv2d(channels, latent_channels, 1)
        if estimate_channels:
            start_at_zero(self.conv_out)

    def forward(
        self, latents: torch.Tensor, guide: torch.Tensor, noise: torch.Tensor, estimate: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, C, H, W), guide, noise and estimate of the same size -> (B, C, H, W)."""
        parts = (latents, guide, noise) if estimate is None else (latents, guide, noise, estimate)
        refined = self.conv_out(self.blocks(_concatenate(*parts)))
        if estimate is not None:
            return estimate + refined
        return latents + refined if self.residual else refined


class UPLiFTModel(ModelMixin, ConfigMixin):
    r"""
    Upsamples latents 2x a step under the guidance of the low-resolution image.

    The defaults are the published SD1.5 VAE variant (53.5 M parameters). A LiFT upsampler is the same class with
    `neighborhood=None` and `reencode_image=True`.

    Args:
        latent_channels (`int`): channels of the latents.
        spatial_factor (`int`): image pixels per latent position, along each axis.
        latent_space (`str`): name of the latent space this model was trained for; pipelines reject any other.
        encoder_block_out_channels (`tuple[int, ...]`): widths of the encoder's groups, at least two.
        encoder_layers_per_block (`int`): blocks in each group.
        encoder_patch_size (`int`): edge in pixels of the patches that the encoder works on (1: on pixels).
        encoder_stem_channels (`int`): width of the stem.
        encoder_stem_layers (`int`): blocks of a stem at every pixel, before the patches are formed; 0 for no stem.
        encoder_spatial_factor (`int`, *optional*): image pixels per latent position in the encoder's input; if it
            differs from `spatial_factor`, the image is resized first (16 for backbones with patch size 14).
        image_normalization (`str`): `"none"` (the encoder sees [0, 1]) or `"imagenet"`.
        decoder_channels (`int`): width of the decoder and of its guide features.
        decoder_layers (`tuple[int, int]`): blocks of the decoder before and after its upsampling.
        neighborhood (`int`, *optional*): offsets of the Local Attender: 5, 9, 13, 17 or 25; None replaces it with a
            1x1 convolution of the decoder's features.
        attender_residual (`bool`): add the decoder's features to the Local Attender's logits, as the published
            checkpoints do; see `LocalAttender`.
        refiner_channels (`int`): width of the refiner.
        refiner_layers (`int`): blocks of the refiner; 0 for no refiner.
        refiner_residual (`bool`): add the attended latents to the refiner's output.
        denoise_channel (`bool`): the encoder has an additional input channel, the strength of the denoising.
        image_residual (`bool`): add a linear estimate from the image's pixels and the stem's features to the
            refiner's output, and to its input; see `ImageResidual`.
        noise_channels (`int`): channels of standard normal noise concatenated to each of the step's three inputs.
        encoder_convs_per_block (`int`): 3x3 convolutions in a block of the encoder.
        decoder_convs_per_block (`int`): 3x3 convolutions in a block of the decoder and the refiner.
        norm_type (`str`): `"layer_norm"` (over channels), `"batch_norm"`, or `"bias"` (a bias instead of a norm).
        reencode_image (`bool`): encode the bilinearly upsampled image again at every step, as LiFT does.
    Raises:
        ValueError: an argument is out of range.
    Source: Walmer et al. 2026, section 3; LiFT: Suri et al. 2024.
    """

    config: Any  # diffusers' FrozenDict: its entries are attributes, too

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ConvGroup"]  # noqa: RUF012 - lists, as diffusers has them
    _repeated_blocks = ["ConvBlock"]  # noqa: RUF012
    # Each by itself, because tiles do not go through `forward`.
    _group_offload_block_modules = ["stem", "encoder", "decoder", "attender", "proj_out", "refiner", "estimator"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        spatial_factor: int = 8,
        latent_space: str = "sd15-vae",
        encoder_block_out_channels: tuple[int, ...] = (64, 128, 256, 512, 512),
        encoder_layers_per_block: int = 2,
        encoder_patch_size: int = 1,
        encoder_stem_channels: int = 32,
        encoder_stem_layers: int = 0,
        encoder_spatial_factor: int | None = None,
        image_normalization: str = "none",
        decoder_channels: int = 512,
        decoder_layers: tuple[int, int] = (1, 2),
        neighborhood: int | None = 17,
        attender_residual: bool = True,
        refiner_channels: int = 512,
        refiner_layers: int = 12,
        refiner_residual: bool = False,
        denoise_channel: bool = False,
        image_residual: bool = False,
        noise_channels: int = 4,
        encoder_convs_per_block: int = 1,
        decoder_convs_per_block: int = 1,
        norm_type: str = "layer_norm",
        reencode_image: bool = False,
    ):
        super().__init__()
        _check_config(**{name: value for name, value in locals().items() if name not in ("self", "__class__")})

        settings = {"num_convs": decoder_convs_per_block, "norm_type": norm_type}
        fine_guide, coarse_guide = encoder_block_out_channels[-2:]
        image_channels = 3 + denoise_channel
        self.stem = (
            ConvGroup(
                image_channels,
                encoder_stem_channels,
                num_layers=encoder_stem_layers,
                num_convs=encoder_convs_per_block,
                norm_type=norm_type,
            )
            if encoder_stem_layers
            else None
        )
        self.encoder = UPLiFTEncoder(
            image_channels,
            encoder_block_out_channels,
            layers_per_block=encoder_layers_per_block,
            patch_size=encoder_patch_size,
            stem_channels=encoder_stem_channels if encoder_stem_layers else None,
            num_convs=encoder_convs_per_block,
            norm_type=norm_type,
        )
        self.decoder = UPLiFTDecoder(
            latent_channels,
            decoder_channels,
            (fine_guide, coarse_guide),
            num_layers=decoder_layers,
            noise_channels=noise_channels,
            **settings,
        )
        self.attender = None
        if neighborhood is None:
            self.proj_out = nn.Conv2d(decoder_channels, latent_channels, 1)
        else:
            self.attender = LocalAttender(decoder_channels, neighborhood, residual=attender_residual)
        self.refiner = (
            UPLiFTRefiner(
                latent_channels,
                refiner_channels,
                coarse_guide,
                num_layers=refiner_layers,
                noise_channels=noise_channels,
                residual=refiner_residual,
                estimate_channels=latent_channels if image_residual else 0,
                **settings,
            )
            if refiner_layers
            else None
        )
        pixel_channels = 3 + (encoder_stem_channels if encoder_stem_layers else 0)
        self.estimator = ImageResidual(latent_channels, spatial_factor, pixel_channels) if image_residual else None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "UPLiFTModel":
        """
        Load a model like `ModelMixin.from_pretrained`, or from a repository published by the authors of the paper.

        The latter have no `config.json`; they are listed in `conversion.PUBLISHED`.

        Args:
            pretrained_model_name_or_path: a folder or a repository's "owner/name".
            kwargs: those of `ModelMixin.from_pretrained`. For published repositories: `dtype` (or `torch_dtype`),
                `revision`, `cache_dir`, `token`, `local_files_only` and `force_download`.
        Returns:
            The model, in evaluation mode.
        Raises:
            TypeError: an option is not supported for a published repository.
            OSError, ValueError: as `ModelMixin.from_pretrained` and `huggingface_hub.hf_hub_download`.
        """
        published = PUBLISHED.get(str(pretrained_model_name_or_path))
        if published is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        options = {name: value for name, value in kwargs.items() if value is not None}
        if "variant" in options:
            raise ValueError(
                f"`variant` must be left out for a published checkpoint, got {options['variant']!r}: it has only one. "
                "Pass `dtype=torch.float16` for half precision."
            )
        options.pop("use_safetensors", None)  # they are nothing else
        dtype = _read_dtype(options.pop("dtype", options.pop("torch_dtype", torch.float32)))
        path = hf_hub_download(str(pretrained_model_name_or_path), published.filename, **options)
        return cls.from_single_file(path, config=published.config, dtype=dtype)

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike,
        *,
        config: str | dict | None = None,
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
    ) -> "UPLiFTModel":
        """
        Load a checkpoint published by the authors of the paper. All names and shapes have to match.

        Args:
            path: a .safetensors file.
            config: "sd15-vae", "dinov2-s14" or "dinov3-splus16", the published networks; or constructor
                arguments; or a folder or repository with a `config.json`. By default derived from the file name, if
                it is the published one.
            dtype: dtype of the weights.
            variant: not supported; version 0.1 used this name for `config`.
        Returns:
            The model, in evaluation mode.
        Raises:
            TypeError: `dtype` is not a floating-point `torch.dtype`.
            ValueError: `config` is missing and the file name is unknown; or the file is not safetensors, is damaged,
                or has another network's weights.
            FileNotFoundError: there is no such file.
        """
        dtype = _read_dtype(dtype)
        if variant is not None:
            raise ValueError(f"`variant` must be left out, got {variant!r}. Name the network by `config={variant!r}`.")
        if config is None:
            config = config_from_filename(path)
        arguments: Any = config  # diffusers types both of the following as the tuples that other options give
        if not isinstance(config, dict):
            arguments = CONFIGS[config] if config in CONFIGS else cls.load_config(config)
        state_dict = convert_state_dict(load_safetensors(path))
        with torch.device("meta"):
            model: Any = cls.from_config(arguments)
        check_state_dict(state_dict, model.state_dict())
        for name, tensor in state_dict.items():
            if tensor.is_floating_point():
                state_dict[name] = tensor.to(dtype)  # read from the mapped file; no copy where the dtype fits
        model.load_state_dict(state_dict, assign=True)
        model.register_to_config(_name_or_path=str(path))
        return model.eval()

    def forward(
        self,
        raw_latents: torch.Tensor,
        *,
        image: torch.Tensor,
        num_steps: int = 1,
        generator: Generator = None,
        noise: Iterable[StepNoise] | None = None,
        denoise: torch.Tensor | float = 0.0,
        return_steps: bool = False,
        return_dict: bool = True,
    ) -> UPLiFTOutput | tuple[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Upsample raw latents under image guidance.

        Args:
            raw_latents: (B, C, h, w) float, unscaled (for a VAE: the posterior's mode).
            image: (B, 3, h * spatial_factor, w * spatial_factor) float in [0, 1].
            num_steps: number of 2x steps, >= 1.
            generator: one generator, or one for each item of the batch, which makes an item's result independent of
                the rest of the batch. Noise is drawn in float32 on the generator's device.
            noise: the noise of every step, instead of drawing it from `generator`; see `draw_noise`.
            denoise: from 0 (none) to 1: how much of the image's compression artefacts and noise to remove, one
                number or (B,); for a model with `denoise_channel`.
            return_steps: also return the output of every step.
            return_dict: return a [`UPLiFTOutput`] instead of a tuple.
        Returns:
            (B, C, h * 2**num_steps, w * 2**num_steps), dtype and device of `raw_latents`.
        Raises:
            TypeError: `num_steps` is not a whole number.
            ValueError: rank, channels, batch or image size do not match, or num_steps is below 1.
        Source: Walmer et al. 2026, section 3.1.
        """
        num_steps = self.check_inputs(raw_latents, image, num_steps, generator)
        if noise is None:
            noise = self.draw_noise(raw_latents, num_steps, generator)
        latents = raw_latents.contiguous(memory_format=torch.channels_last)
        maps = None
        steps = []
        for index, step_noise in enumerate(noise):
            if maps is None or self.config.reencode_image:
                maps = self.encode(image.to(raw_latents), step=index, num_steps=num_steps, denoise=denoise)
            latents = self.step(latents, self.guide(maps, size_of(latents)), step_noise)
            steps.append(latents)
        sample = latents.contiguous()
        steps = [*steps[:-1], sample] if return_steps else None
        if not return_dict:
            return (sample, steps) if steps is not None else (sample,)
        return UPLiFTOutput(sample=sample, steps=steps)

    def encode(
        self, image: torch.Tensor, *, step: int, num_steps: int, denoise: torch.Tensor | float = 0.0
    ) -> GuideMaps:
        """
        Guide maps of the image, computed only at the positions that the steps sample.

        Args:
            image: (B, 3, h * spatial_factor, w * spatial_factor) in [0, 1].
            step: the first step that uses them, counted from 0; with `reencode_image`, the only one.
            num_steps: total number of 2x steps.
            denoise: as for `forward`.
        """
        config = self.config
        hidden = network_input(image, config.image_normalization, denoise if config.denoise_channel else None)
        factor = config.encoder_spatial_factor or config.spatial_factor
        if factor != config.spatial_factor:
            size = tuple(length // config.spatial_factor * factor for length in image.shape[2:])
            # In float32: there is no antialiased resizing in bfloat16 on CPUs.
            hidden = F.interpolate(hidden.float(), size=size, mode="bilinear", antialias=True).to(image.dtype)
        magnification = 2**step if config.reencode_image else 1
        if magnification > 1:
            hidden = F.interpolate(hidden, scale_factor=magnification, mode="bilinear")
        # Positions per latent of the model's input, of the maps and of the finest grid that they are sampled on: where
        # that takes whole strides, what lies between those positions need not be computed.
        positions = factor * magnification // config.encoder_patch_size
        finest = 2 ** (step + 1) if config.reencode_image else 2**num_steps
        stride = positions // finest if positions % finest == 0 else 1
        pixels = [image * 2 - 1]
        if self.stem is not None:
            hidden = self.stem(hidden.contiguous(memory_format=torch.channels_last))
            pixels.append(hidden)
        before_last, last = self.encoder(hidden, stride)
        return GuideMaps(before_last, last, _concatenate(*pixels) if self.estimator is not None else None)

    def guide(self, maps: GuideMaps, size: tuple[int, int]) -> StepGuide:
        """The guide of the step with an input of `size` (h, w), by nearest neighbour."""
        doubled = (2 * size[0], 2 * size[1])
        return StepGuide(
            coarse=resample_nearest(maps.last, size),
            fine=resample_nearest(maps.before_last, doubled),
            refiner=resample_nearest(maps.last, doubled),
            estimate=None if self.estimator is None else self.estimator(maps.pixels, doubled).to(maps.last.dtype),
        )

    def step(
        self, latents: torch.Tensor, guide: StepGuide, noise: StepNoise, place: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        One 2x step: (B, C, h, w) -> (B, C, 2h, 2w).

        Args:
            place: position of the latents in the whole image, see `interpolate_2x`; None if they are the whole.
        """
        features = self.decoder(latents, guide.coarse, guide.fine, noise.coarse, noise.fine, place=place)
        output = self.attender(features, latents) if self.attender is not None else self.proj_out(features)
        if self.refiner is not None:
            output = self.refiner(output, guide.refiner, noise.refiner, guide.estimate)
        return output

    def step_reach(self, output_reach: int) -> int:
        """
        Number of input positions to each side of a window that a step needs for an output that is exact up to
        `output_reach` positions beyond the window: with c 3x3 convolutions in the decoder before its upsampling, f
        after it and r in the refiner, c + 1 + floor((r + f + output_reach) / 2). The 1 is for the bilinear
        interpolation. The Local Attender, with a radius of at most 2, never needs more than c + 1.
        """
        refiner_reach = self.refiner.blocks.reach if self.refiner is not None else 0
        return self.decoder.coarse.reach + 1 + (refiner_reach + self.decoder.fine.reach + output_reach) // 2

    def guide_reach(self, step: int) -> int:
        """Number of input latents to each side whose pixels the guide of step `step`, from 0, depends on."""
        config = self.config
        magnification = 2**step if config.reencode_image else 1
        factor = config.encoder_spatial_factor or config.spatial_factor
        stem_reach_px = self.stem.reach if self.stem is not None else 0
        reach_px = -(-(stem_reach_px + self.encoder.reach_px) // magnification)
        if factor != config.spatial_factor:
            reach_px += -(-max(factor, config.spatial_factor) // config.spatial_factor)
        if magnification > 1:
            reach_px += 1
        return -(-reach_px // factor)

    def draw_noise(self, raw_latents: torch.Tensor, num_steps: int, generator: Generator) -> Iterator[StepNoise]:
        """The noise of each step in turn for `raw_latents` (B, C, h, w), in their dtype and on their device."""
        batch, _, height, width = raw_latents.shape

        def draw(factor: int) -> torch.Tensor:
            shape = (batch, self.config.noise_channels, height * factor, width * factor)
            if not self.config.noise_channels:
                return raw_latents.new_empty(shape)
            if generator is None:  # torch.compile does not take `generator=None` where sizes are symbolic
                noise = torch.randn(shape, device=raw_latents.device, dtype=torch.float32)
            else:
                noise = randn_tensor(shape, generator=generator, device=raw_latents.device, dtype=torch.float32)
            return noise.to(raw_latents.dtype)

        for step in range(num_steps):
            coarse, fine = 2**step, 2 ** (step + 1)
            yield StepNoise(draw(coarse), draw(fine), draw(fine) if self.refiner is not None else None)

    def check_inputs(
        self, raw_latents: torch.Tensor, image: torch.Tensor, num_steps: int, generator: Generator
    ) -> int:
        """`num_steps` as an int. Raise TypeError or ValueError unless the arguments of `forward` match."""
        channels, factor = self.config.latent_channels, self.config.spatial_factor
        num_steps = read_whole_number("num_steps", num_steps)
        if raw_latents.ndim != 4 or raw_latents.shape[1] != channels:
            raise ValueError(f"`raw_latents` must be (B, {channels}, h, w), got {tuple(raw_latents.shape)}.")
        batch, _, height, width = raw_latents.shape
        expected = (batch, 3, height * factor, width * factor)
        if tuple(image.shape) != expected:
            raise ValueError(
                f"`image` must be {expected} for `raw_latents` of {tuple(raw_latents.shape)}, "
                f"got {tuple(image.shape)}. One latent position covers {factor} x {factor} pixels."
            )
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"`generator` must have one entry for each of the {batch} items, got {len(generator)}.")
        return num_steps


def network_input(
    image: torch.Tensor, normalization: str, denoise: torch.Tensor | float | None = None
) -> torch.Tensor:
    """
    The input of the first layer.

    Args:
        image: (B, 3, H, W) in [0, 1].
        normalization: one of `IMAGE_NORMALIZATIONS`.
        denoise: a number or (B,), which becomes a fourth channel; None for no such channel.
    Returns:
        (B, 3, H, W) or (B, 4, H, W).
    """
    mean, std = IMAGE_NORMALIZATIONS[normalization]
    normalized = (image - image.new_tensor(mean)[:, None, None]) / image.new_tensor(std)[:, None, None]
    if denoise is None:
        return normalized
    strength = torch.as_tensor(denoise, dtype=image.dtype, device=image.device).reshape(-1, 1, 1, 1)
    return torch.cat([normalized, strength.expand(len(image), 1, *image.shape[2:])], dim=1)


def _read_dtype(dtype: torch.dtype) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"`dtype` must be a floating-point torch.dtype, got {dtype!r}.")
    return dtype


def _concatenate(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, dim=1).contiguous(memory_format=torch.channels_last)


def _check_config(**config) -> None:
    for name in (
        "latent_channels",
        "spatial_factor",
        "encoder_layers_per_block",
        "encoder_patch_size",
        "encoder_stem_channels",
        "decoder_channels",
        "refiner_channels",
        "encoder_convs_per_block",
        "decoder_convs_per_block",
    ):
        if config[name] < 1:
            raise ValueError(f"`{name}` must be at least 1, got {config[name]}.")
    for name in ("encoder_stem_layers", "refiner_layers", "noise_channels"):
        if config[name] < 0:
            raise ValueError(f"`{name}` must be at least 0, got {config[name]}.")
    if len(config["encoder_block_out_channels"]) < 2:
        raise ValueError(
            "`encoder_block_out_channels` must have at least two entries, because the decoder uses the last two maps, "
            f"got {config['encoder_block_out_channels']}."
        )
    if len(config["decoder_layers"]) != 2 or min(config["decoder_layers"]) < 1:
        raise ValueError(f"`decoder_layers` must be two numbers of at least 1, got {config['decoder_layers']}.")
    factor = config["spatial_factor"]
    if config["image_residual"] and (
        not config["refiner_layers"]
        or config["refiner_residual"]
        or config["reencode_image"]
        or config["encoder_spatial_factor"] not in (None, factor)
        or factor < 2
        or factor & (factor - 1)
    ):
        raise ValueError(
            "`image_residual` must go with a refiner, without `refiner_residual`, `reencode_image` and "
            "`encoder_spatial_factor`, and with a `spatial_factor` that is a power of two."
        )
    for name, known in (
        ("norm_type", tuple(NORMS)),
        ("image_normalization", tuple(IMAGE_NORMALIZATIONS)),
        ("neighborhood", (*NEIGHBORHOODS, None)),
    ):
        if config[name] not in known:
            raise ValueError(f"`{name}` must be one of {known}, got {config[name]!r}.")
    encoder_factor = config["encoder_spatial_factor"] or config["spatial_factor"]
    if encoder_factor % config["encoder_patch_size"]:
        raise ValueError(
            f"`encoder_patch_size` must divide the {encoder_factor} pixels per latent position, "
            f"got {config['encoder_patch_size']}."
        )
