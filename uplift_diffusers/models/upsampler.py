"""UPLiFT: an encoder that runs once, one weight-shared 2x decoder applied step after step, the Local Attender."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub.errors import HTTPError
from torch import nn

from uplift_diffusers.models.blocks import NORMS, ConvGroup, add_shared_channels, run_trimmed
from uplift_diffusers.models.conversion import (
    VARIANTS,
    check_state_dict,
    convert_state_dict,
    load_safetensors,
    variant_from_name,
)
from uplift_diffusers.models.hub import CheckpointSource
from uplift_diffusers.models.image_residual import ImageResidual
from uplift_diffusers.models.local_attention import (
    NEIGHBORHOODS,
    interpolate_window_2x,
    local_attention,
    neighborhood_offsets,
    resample_nearest,
)
from uplift_diffusers.models.window import NO_MARGINS, Margins, Span, Window, trim

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
        steps (`list[torch.Tensor]`, *optional*): the result of every 2x step; the last one is `sample`.
    """

    sample: torch.Tensor
    steps: list[torch.Tensor] | None = None


class StepNoise(NamedTuple):
    """
    The noise of one 2x step for the whole picture, in the order in which it is drawn.

    Args:
        coarse: (B, noise_channels, h, w), of the decoder before the 2x.
        fine: (B, noise_channels, 2h, 2w), of the decoder after it.
        refiner: (B, noise_channels, 2h, 2w), of the refiner; None without one.
    """

    coarse: torch.Tensor
    fine: torch.Tensor
    refiner: torch.Tensor | None


class StepWindows(NamedTuple):
    """
    What each part of one 2x step has to see so that its output is exact on a window.

    Args:
        entered: latents, and the decoder before the 2x, at the step's input resolution; the rest is at its output's.
        upsampled: the decoder after the 2x.
        attended: the Local Attender's output and the refiner's input.
        refined: the step's output.
    """

    entered: Window
    upsampled: Window
    attended: Window
    refined: Window


class Guides(NamedTuple):
    """
    Guide maps of a part of the picture, at `positions` x `positions` positions for a latent of the model's input.

    Args:
        before_last: (B, G, H, W), the encoder's map before the last.
        last: (B, G', H, W), its last map.
        cells: the part of the picture, in latents of the model's input.
        positions: see above.
    """

    before_last: torch.Tensor
    last: torch.Tensor
    cells: Window
    positions: int

    def sample(self, features: torch.Tensor, window: Window) -> torch.Tensor:
        """`before_last` or `last` at `window` of a grid of any resolution, by nearest neighbour."""
        # Nearest sampling repeats itself from latent to latent, so whole latents may be cut out before it.
        level = window.grid[0] // self.cells.grid[0]
        cells = window.cover(level)
        features = self.cells.finer(self.positions).crop(features, cells.finer(self.positions))
        features = resample_nearest(features, cells.finer(level).shape)
        return cells.finer(level).crop(features, window)


ENCODER_BAND = 2**16
"""Patches that the encoder works on at a time where no gradient is asked for: its maps are the largest there are."""


class UPLiFTEncoder(nn.Module):
    """Image -> the last two guide maps, at the image's resolution divided by `patch_size`."""

    def __init__(
        self,
        block_out_channels: tuple[int, ...],
        *,
        layers_per_block: int,
        patch_size: int,
        stem_channels: int,
        stem_layers: int,
        num_convs: int,
        norm_type: str,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.stem = None
        self.patches = nn.PixelUnshuffle(patch_size)
        widths = (3 * patch_size**2, *block_out_channels)
        if stem_layers:
            self.stem = ConvGroup(3, stem_channels, num_layers=stem_layers, num_convs=num_convs, norm_type=norm_type)
            self.patches = nn.Conv2d(stem_channels, block_out_channels[0], patch_size, stride=patch_size)
            widths = (block_out_channels[0], *block_out_channels)
        self.blocks = nn.ModuleList(
            ConvGroup(before, after, num_layers=layers_per_block, num_convs=num_convs, norm_type=norm_type)
            for before, after in zip(widths[:-1], widths[1:])
        )

    @property
    def reach_px(self) -> int:
        """Pixels to each side of its patch on which an output depends."""
        stem_reach_px = self.stem.reach if self.stem is not None else 0
        return stem_reach_px + self.patch_size * sum(block.reach for block in self.blocks)

    def forward(self, image: torch.Tensor, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) -> the map before the last and the last one, every `stride`-th position of each."""
        height, width = (size // self.patch_size for size in image.shape[2:])
        bands = 1 if self.training or torch.is_grad_enabled() else -(-height * width // ENCODER_BAND)
        if bands > 1:
            return self._encode_bands(image, stride, -(-height // (bands * stride)) * stride)
        hidden = self._embed(image)
        for block in self.blocks[:-1]:
            hidden = block(hidden)
        return hidden[..., ::stride, ::stride], self.blocks[-1](hidden, stride)

    def _embed(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, D, H / patch_size, W / patch_size), what the first group is given."""
        hidden = image if self.stem is None else self.stem(image.contiguous(memory_format=torch.channels_last))
        return self.patches(hidden).contiguous(memory_format=torch.channels_last)

    def _encode_bands(self, image: torch.Tensor, stride: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, `rows` rows of patches at a time, a multiple of `stride`, exact by a halo as in `tiling`."""
        pixels = Window.whole(tuple(image.shape[2:]))
        whole = pixels.cover(self.patch_size)
        layers = [layer for block in self.blocks[:-1] for layer in block.layers]
        # Halos are multiples of the stride too, so that the same positions are sampled.
        last_halo = -(-self.blocks[-1].reach // stride) * stride
        halo = last_halo + -(-sum(layer.reach for layer in layers) // stride) * stride
        stem_halo = -(-self.stem.reach // self.patch_size) if self.stem is not None else 0
        maps = []
        for start in range(0, whole.rows.size, rows):
            band = Window(Span(start, min(start + rows, whole.rows.size), whole.rows.size), whole.columns)
            outer, inner = (Window(band.rows.grow(reach), band.columns) for reach in (halo, last_halo))
            embedded = Window(outer.rows.grow(stem_halo), outer.columns)
            hidden = embedded.crop(self._embed(pixels.crop(image, embedded.finer(self.patch_size))), outer)
            seen = run_trimmed(layers, hidden, outer.margins(inner))
            before_last = inner.crop(seen, band)[..., ::stride, ::stride]
            top = (band.rows.start - inner.rows.start) // stride
            last = self.blocks[-1](seen, stride)[:, :, top : top + before_last.shape[2]]
            maps.append((before_last.contiguous(memory_format=torch.channels_last), last))
        before_last, last = zip(*maps, strict=True)
        return torch.cat(before_last, dim=2), torch.cat(last, dim=2)


class UPLiFTDecoder(nn.Module):
    """One 2x step on features: blocks, transposed convolution beside bilinear interpolation, blocks."""

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
        *,
        windows: StepWindows,
    ) -> torch.Tensor:
        """
        (B, C, h, w) and guides and noise at (h, w) and (2h, 2w) -> (B, channels, 2h, 2w).

        Latents and what is coarse fill `windows.entered`, what is fine `windows.upsampled`, the output
        `windows.attended`.
        """
        source, target = windows.upsampled.interpolated_from(), windows.upsampled
        hidden = self.coarse(
            _concatenate(latents, coarse_guide, coarse_noise), margins=windows.entered.margins(source)
        )
        hidden = source.finer(2).crop(self.upsample(hidden), target) + _interpolate_2x(hidden, source, target)
        return self.fine(_concatenate(hidden, fine_guide, fine_noise), margins=target.margins(windows.attended))


class LocalAttender(nn.Module):
    """Pools the values around each cell with weights that a 1x1 convolution predicts from the guide."""

    def __init__(self, guide_channels: int, neighborhood: int):
        super().__init__()
        self.neighborhood = neighborhood
        self.conv = nn.Conv2d(guide_channels, neighborhood, 1)

    @property
    def reach(self) -> int:
        """Values to each side on which an output depends."""
        return max(abs(dy) for dy, _ in neighborhood_offsets(self.neighborhood))

    def forward(self, guide: torch.Tensor, values: torch.Tensor, margins: Margins = NO_MARGINS) -> torch.Tensor:
        """
        (B, G, cH, cW) and (B, C, H, W) -> (B, C, cH, cW).

        Args:
            margins: how far the cells of the values go beyond the guide, in positions of the guide.
        """
        # As every block of the published checkpoints, the convolution adds its input to its output.
        logits = add_shared_channels(self.conv(guide), guide)
        if margins == NO_MARGINS:
            return local_attention(logits, values, self.neighborhood)
        top, bottom, left, right = margins
        logits = F.pad(logits, (left, right, top, bottom))  # n channels: small beside the guide
        return trim(local_attention(logits, values, self.neighborhood), margins)


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
            nn.init.zeros_(self.conv_out.weight)
            nn.init.zeros_(self.conv_out.bias)

    def forward(
        self,
        latents: torch.Tensor,
        guide: torch.Tensor,
        noise: torch.Tensor,
        estimate: torch.Tensor | None,
        margins: Margins = NO_MARGINS,
    ) -> torch.Tensor:
        """(B, C, H, W), guide, noise and estimate of the same size -> (B, C, H, W) without `margins`."""
        parts = (latents, guide, noise) if estimate is None else (latents, guide, noise, estimate)
        refined = self.conv_out(self.blocks(_concatenate(*parts), margins=margins))
        if estimate is not None:
            return trim(estimate, margins) + refined
        return trim(latents, margins) + refined if self.residual else refined


class UPLiFTModel(ModelMixin, ConfigMixin):
    r"""
    Upsamples latents 2x a step under the guidance of the low-resolution image.

    The defaults are the published SD1.5 VAE variant (53.5 M parameters). A LiFT upsampler is the same class with
    `neighborhood=None` and `reencode_image=True`.

    Args:
        latent_channels (`int`): channels of the latents.
        spatial_factor (`int`): image pixels per latent position, along each axis.
        latent_space (`str`): name of the latents this model was trained for; pipelines refuse other ones.
        encoder_block_out_channels (`tuple[int, ...]`): widths of the encoder's groups, at least two.
        encoder_layers_per_block (`int`): blocks in each group.
        encoder_patch_size (`int`): the encoder works on `encoder_patch_size`-pixel patches (1: on pixels).
        encoder_stem_channels (`int`): width of the encoder's stem.
        encoder_stem_layers (`int`): blocks of a stem at every pixel, before the patches are formed; 0 leaves it out.
        encoder_spatial_factor (`int`, *optional*): image pixels per latent position that the encoder sees; where it
            differs from `spatial_factor` the image is resized first (16 for backbones of patch 14).
        image_normalization (`str`): `"none"` (the encoder sees [0, 1]) or `"imagenet"`.
        decoder_channels (`int`): width of the decoder and of its guide features.
        decoder_layers (`tuple[int, int]`): blocks of the decoder before and after the 2x.
        neighborhood (`int`, *optional*): offsets of the Local Attender: 5, 9, 13, 17 or 25; None replaces it by a 1x1
            convolution from the decoder's features.
        refiner_channels (`int`): width of the refiner.
        refiner_layers (`int`): blocks of the refiner; 0 leaves it out.
        refiner_residual (`bool`): add the attended latents to the refiner's output.
        image_residual (`bool`): add a linear estimate from the image's pixels to the refiner's output, and let the
            refiner see it, so that the network has to learn only what is not linear; see `ImageResidual`.
        noise_channels (`int`): channels of standard normal noise concatenated at each of the step's three inputs.
        encoder_convs_per_block (`int`): 3x3 convolutions in a block of the encoder.
        decoder_convs_per_block (`int`): 3x3 convolutions in a block of the decoder and the refiner.
        norm_type (`str`): `"layer_norm"` (over channels), `"batch_norm"`, or `"bias"`: none, a bias in its place.
        reencode_image (`bool`): encode the image anew at every step, magnified bilinearly, as LiFT does.
    Raises:
        ValueError: an argument out of its range.
    Source: Walmer et al. 2026, section 3; LiFT: Suri et al. 2024.
    """

    _supports_gradient_checkpointing = True

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
        refiner_channels: int = 512,
        refiner_layers: int = 12,
        refiner_residual: bool = False,
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
        guide_channels = encoder_block_out_channels[-2:]
        self.encoder = UPLiFTEncoder(
            encoder_block_out_channels,
            layers_per_block=encoder_layers_per_block,
            patch_size=encoder_patch_size,
            stem_channels=encoder_stem_channels,
            stem_layers=encoder_stem_layers,
            num_convs=encoder_convs_per_block,
            norm_type=norm_type,
        )
        self.decoder = UPLiFTDecoder(
            latent_channels,
            decoder_channels,
            guide_channels,
            num_layers=decoder_layers,
            noise_channels=noise_channels,
            **settings,
        )
        self.attender = LocalAttender(decoder_channels, neighborhood) if neighborhood is not None else None
        self.proj_out = nn.Conv2d(decoder_channels, latent_channels, 1) if neighborhood is None else None
        self.refiner = (
            UPLiFTRefiner(
                latent_channels,
                refiner_channels,
                guide_channels[1],
                num_layers=refiner_layers,
                noise_channels=noise_channels,
                residual=refiner_residual,
                estimate_channels=latent_channels if image_residual else 0,
                **settings,
            )
            if refiner_layers
            else None
        )
        self.estimator = ImageResidual(latent_channels, spatial_factor) if image_residual else None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "UPLiFTModel":
        """
        Load a model as `ModelMixin.from_pretrained` does, or a published checkpoint as `from_single_file` does.

        A published checkpoint is a folder or repository without `config.json` and with exactly one .safetensors file.
        Which network it is follows from its name; `variant` is, as everywhere in diffusers, that of the weights.

        Args:
            pretrained_model_name_or_path: a folder or a repository's "owner/name".
            kwargs: those of `ModelMixin.from_pretrained`. Published checkpoints take `dtype` (or `torch_dtype`),
                `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only` and `force_download`.
        Returns:
            The model, in evaluation mode.
        Raises:
            FileNotFoundError: there is neither a configuration nor a .safetensors file, or no such place.
            ValueError: the published checkpoint has no known name, does not fit it or does not take an option.
            OSError: as `from_single_file` and `ModelMixin.from_pretrained`.
        """
        options = dict(kwargs)
        where = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")
        source = CheckpointSource(
            pretrained_model_name_or_path, **{name: options.pop(name) for name in where if name in options}
        )
        config = cls.config_name
        if not (source.is_known_to_lack(config) and not source.holds(config)):
            try:
                return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            except (OSError, HTTPError):
                # Only now, so that an ordinary repository is asked nothing that diffusers would not ask.
                if source.holds(config):
                    raise
        return cls._from_source(source, **_published_options(options))

    @classmethod
    def from_single_file(
        cls,
        path_or_hub_id: str | os.PathLike,
        *,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "UPLiFTModel":
        """
        Load a checkpoint that the authors of the paper published. Every name and shape has to fit.

        Args:
            path_or_hub_id: a .safetensors file, a folder that holds one or a repository ("owner/name") that does.
            variant: "sd15-vae", "dinov2-s14" or "dinov3-splus16"; by default what the file, folder or repository is
                called, where it bears the name that the authors gave it.
            dtype: of the weights, float32 by default.
            subfolder: folder inside the folder or repository.
            revision: branch, tag or commit of the repository.
            cache_dir: the hub's cache, if not the usual one.
            token: access token, or True for the stored one.
            local_files_only: use what the cache holds and stay off the network.
            force_download: download even what the cache holds.
        Returns:
            The model, in evaluation mode.
        Raises:
            TypeError: `dtype` is not a `torch.dtype`.
            ValueError: no or unknown `variant`, several files, not safetensors, damaged, or another network's weights.
            FileNotFoundError: no such file, folder, repository or revision, no .safetensors file in it, or offline
                and not in the cache.
            PermissionError: a gated repository.
            ConnectionError: the hub does not answer, or the download broke off.
        """
        if variant is not None and variant not in VARIANTS:
            raise ValueError(f"`variant` must be one of {tuple(VARIANTS)}, got {variant!r}.")
        source = CheckpointSource(
            path_or_hub_id,
            subfolder=subfolder,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return cls._from_source(source, variant=variant, dtype=dtype)

    @classmethod
    def _from_source(
        cls, source: CheckpointSource, *, variant: str | None = None, dtype: torch.dtype | None = None
    ) -> "UPLiFTModel":
        dtype = torch.float32 if dtype is None else dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"`dtype` must be a floating-point torch.dtype, got {dtype!r}.")
        names = source.possible_names()
        variant = variant or next(filter(None, map(variant_from_name, names)), None)
        if variant is None:
            raise ValueError(
                f"`variant` must be given for `{source.location}`, whose name tells nothing of the network, got None. "
                f"Call `{cls.__name__}.from_single_file` with one of {tuple(VARIANTS)}."
            )

        state_dict = convert_state_dict(load_safetensors(source.fetch()))
        with torch.device("meta"):
            model = cls(**VARIANTS[variant])
        check_state_dict(state_dict, model.state_dict(), variant=variant)
        for name, tensor in state_dict.items():
            if tensor.is_floating_point():
                state_dict[name] = tensor.to(dtype)  # read from the mapped file; no copy where the dtype fits
        model.load_state_dict(state_dict, assign=True)
        model.register_to_config(_name_or_path=source.location)
        return model.eval()

    def forward(
        self,
        raw_latents: torch.Tensor,
        *,
        image: torch.Tensor,
        num_steps: int = 1,
        generator: Generator = None,
        noise: Iterable[StepNoise] | None = None,
        window: Window | None = None,
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
                the batch around it. Noise is drawn in float32 on the generator's device.
            noise: of every step for the whole picture, in place of drawing it from `generator`; see `draw_noise`.
            window: the part of the output to compute, exactly as it is in the whole; see `tiling.upsample_tiled`.
            return_steps: also return the result of every step; with `window`, of what the next step has to see.
            return_dict: return a [`UPLiFTOutput`] instead of a tuple.
        Returns:
            (B, C, h * 2**num_steps, w * 2**num_steps), dtype and device of `raw_latents`.
        Raises:
            ValueError: rank, channels, batch or image size do not match, or num_steps is below 1.
        Source: Walmer et al. 2026, section 3.1.
        """
        self.check_inputs(raw_latents, image, num_steps, generator)
        if noise is None:
            noise = self.draw_noise(raw_latents, num_steps, generator)
        if window is None:
            window = Window.whole(tuple(raw_latents.shape[2:])).finer(2**num_steps)
        steps = self._upsample(raw_latents, image, noise, self.plan_windows(window, num_steps))
        sample = steps[-1].contiguous()
        steps = [*steps[:-1], sample] if return_steps else None
        if not return_dict:
            return (sample, steps) if return_steps else (sample,)
        return UPLiFTOutput(sample=sample, steps=steps)

    def plan_windows(self, output: Window, num_steps: int) -> list[StepWindows]:
        """
        What every step has to see so that the last one's output is exact on the window `output`.

        With r 3x3 convolutions in the refiner, f in the decoder after the 2x and c before it, a window of whole input
        positions takes a halo of c + 1 + floor((r + f) / 2) of them on each side. The one is the bilinear
        interpolation's. The Local Attender never needs more: its radius of at most 2 is within c + 1.
        """
        plan = []
        for _ in range(num_steps):
            attended = output.grow(self.refiner.blocks.reach if self.refiner is not None else 0)
            upsampled = attended.grow(self.decoder.fine.reach)
            entered = upsampled.interpolated_from().grow(self.decoder.coarse.reach)
            plan.append(StepWindows(entered, upsampled, attended, output))
            output = entered
        return plan[::-1]

    def draw_noise(self, raw_latents: torch.Tensor, num_steps: int, generator: Generator) -> Iterator[StepNoise]:
        """The noise of one step after the other for `raw_latents` (B, C, h, w), in their dtype and on their device."""
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

    def _upsample(
        self, raw_latents: torch.Tensor, image: torch.Tensor, noise: Iterable[StepNoise], windows: list[StepWindows]
    ) -> list[torch.Tensor]:
        """The result of every step on its `refined` window, from latents and image of the whole picture."""
        whole = Window.whole(tuple(raw_latents.shape[2:]))
        latents = whole.crop(raw_latents, windows[0].entered).contiguous(memory_format=torch.channels_last)
        guides = None
        steps = []
        for step, (step_windows, step_noise) in enumerate(zip(windows, noise, strict=True)):
            if guides is None or self.config.reencode_image:
                last_use = step if self.config.reencode_image else len(windows) - 1
                guides = self._encode_image(
                    image,
                    # The first step sees the most of the picture.
                    step_windows.entered.cover(2**step),
                    magnification=2**step,
                    finest=2 ** (last_use + 1),
                    like=raw_latents,
                )
            estimate = None
            if self.estimator is not None:
                estimate = self.estimator(image, step, step_windows.attended)
            latents = self._upsample_2x(latents, guides, step_noise, estimate, step_windows)
            steps.append(latents)
        return steps

    def _encode_image(
        self, image: torch.Tensor, cells: Window, *, magnification: int, finest: int, like: torch.Tensor
    ) -> Guides:
        """Guide maps of the magnified image, on `cells` latents, sampled no finer than `finest` times the latents."""
        config = self.config
        factor = config.encoder_spatial_factor or config.spatial_factor
        reach_px = -(-self.encoder.reach_px // magnification)
        if factor != config.spatial_factor:
            reach_px += -(-max(factor, config.spatial_factor) // config.spatial_factor)
        if magnification > 1:
            reach_px += 1
        seen = cells.grow(-(-reach_px // factor))
        whole = Window.whole(tuple(image.shape[2:]))
        image = whole.crop(image, seen.finer(config.spatial_factor)).to(like)

        mean, std = IMAGE_NORMALIZATIONS[config.image_normalization]
        image = (image - image.new_tensor(mean)[:, None, None]) / image.new_tensor(std)[:, None, None]
        if factor != config.spatial_factor:
            image = F.interpolate(image, size=seen.finer(factor).shape, mode="bilinear", antialias=True)
        if magnification > 1:
            image = F.interpolate(image, scale_factor=magnification, mode="bilinear")
        # Positions per latent of the input, of the encoder's maps and of the finest step: the maps are only ever
        # sampled at whole strides, so what lies between those positions need not be computed.
        positions = factor * magnification // config.encoder_patch_size
        stride = positions // finest if positions % finest == 0 else 1
        positions //= stride
        before_last, last = (
            seen.finer(positions).crop(features, cells.finer(positions)) for features in self.encoder(image, stride)
        )
        return Guides(before_last, last, cells, positions)

    def _upsample_2x(
        self,
        latents: torch.Tensor,
        guides: Guides,
        noise: StepNoise,
        estimate: torch.Tensor | None,
        windows: StepWindows,
    ) -> torch.Tensor:
        """(B, C, h, w) on `windows.entered` -> (B, C, 2h, 2w) on `windows.refined`."""
        entered, upsampled, attended, refined = windows
        coarse, fine = Window.whole(entered.grid), Window.whole(upsampled.grid)
        features = self.decoder(
            latents,
            guides.sample(guides.last, entered),
            guides.sample(guides.before_last, upsampled),
            coarse.crop(noise.coarse, entered),
            fine.crop(noise.fine, upsampled),
            windows=windows,
        )
        if self.attender is not None:
            values = attended.cover(2).grow(self.attender.reach)
            margins = values.finer(2).margins(attended)
            output = self.attender(features, entered.crop(latents, values), margins)
        else:
            output = self.proj_out(features)
        if self.refiner is not None:
            output = self.refiner(
                output,
                guides.sample(guides.last, attended),
                fine.crop(noise.refiner, attended),
                estimate,
                attended.margins(refined),
            )
        return output

    def check_inputs(
        self, raw_latents: torch.Tensor, image: torch.Tensor, num_steps: int, generator: Generator
    ) -> None:
        """Raise ValueError unless the arguments of `forward` fit the model and each other."""
        channels, factor = self.config.latent_channels, self.config.spatial_factor
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"`num_steps` must be a whole number of at least 1, got {num_steps}.")
        if raw_latents.ndim != 4 or raw_latents.shape[1] != channels:
            raise ValueError(f"`raw_latents` must be (B, {channels}, h, w), got {tuple(raw_latents.shape)}.")
        batch, _, height, width = raw_latents.shape
        expected = (batch, 3, height * factor, width * factor)
        if tuple(image.shape) != expected:
            raise ValueError(
                f"`image` must be {expected} for `raw_latents` of {tuple(raw_latents.shape)}, "
                f"got {tuple(image.shape)}. One latent position stands for {factor} x {factor} pixels."
            )
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"`generator` must have one entry for each of the {batch} items, got {len(generator)}.")


def _published_options(options: dict) -> dict:
    """`dtype` of `from_pretrained`'s options; the others have to be left alone for a published checkpoint."""
    options = {"low_cpu_mem_usage": True, **options}
    del options["low_cpu_mem_usage"]  # always so
    torch_dtype, dtype = options.pop("torch_dtype", None), options.pop("dtype", None)
    neutral = {"use_safetensors": True}
    for name, value in options.items():
        if value is not None and value is not neutral.get(name, False):
            raise ValueError(
                f"`{name}` must be left out for a published checkpoint, got {value!r}. "
                "Convert it first: load it, `save_pretrained` it to a folder and load that."
            )
    return {"dtype": torch_dtype if dtype is None else dtype}


def _concatenate(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, dim=1).contiguous(memory_format=torch.channels_last)


def _interpolate_2x(hidden: torch.Tensor, source: Window, target: Window) -> torch.Tensor:
    """2x bilinear with `align_corners=True` from the window `source` to the window `target` of the output's grid."""
    if source.is_whole and target.is_whole:
        return F.interpolate(hidden, scale_factor=2, mode="bilinear", align_corners=True)
    return interpolate_window_2x(
        hidden,
        origin=(source.rows.start, source.columns.start),
        size=source.grid,
        rows=(target.rows.start, target.rows.stop),
        columns=(target.columns.start, target.columns.stop),
    )


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
            "`encoder_block_out_channels` must have at least two entries, for the decoder uses the last two maps, "
            f"got {config['encoder_block_out_channels']}."
        )
    if len(config["decoder_layers"]) != 2 or min(config["decoder_layers"]) < 1:
        raise ValueError(f"`decoder_layers` must be two numbers of at least 1, got {config['decoder_layers']}.")
    if config["image_residual"] and (
        not config["refiner_layers"] or config["refiner_residual"] or config["spatial_factor"] % 2
    ):
        raise ValueError("`image_residual` must go with a refiner, without `refiner_residual`, and an even factor.")
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
