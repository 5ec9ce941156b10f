"""LatentSpace describes a VAE's latents; LatentCodec runs any of diffusers' image autoencoders."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderTiny,
    ModelMixin,
)
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.utils import logging

from uplift_diffusers.arguments import read_whole_number
from uplift_diffusers.images.convert import resize
from uplift_diffusers.models.autoencoder_local import AutoencoderLocal
from uplift_diffusers.scale import size_of

logger = logging.get_logger(__name__)

VideoAutoencoder = AutoencoderKLQwenImage | AutoencoderKLWan
Autoencoder = (
    AutoencoderKL | AutoencoderKLFlux2 | AutoencoderTiny | AutoencoderDC | AutoencoderLocal | VideoAutoencoder
)
Factor = float | tuple[float, ...]
Model = TypeVar("Model", bound=ModelMixin)

PACKING = 2
"""Edge of the latent patches that transformers treat as one token."""


@dataclass(frozen=True)
class LatentSpace:
    """
    The latents of a VAE.

    Raw latents are the input of upsamplers: the posterior's mode, unscaled, always (B, channels, h, w). Latents
    (without "raw") are scaled as for diffusers' denoisers: `(raw_latents - shift_factor) * scaling_factor`. Pipelines
    called with `output_type="latent"` may also return another layout; see `read`.

    Args:
        name: the identity that an upsampler's `config.latent_space` is compared with.
        channels: channels of the latents.
        spatial_factor: image pixels per latent position, along each axis.
        scaling_factor: one for all channels, or one per channel.
        shift_factor: one for all channels, or one per channel.
    """

    name: str
    channels: int
    spatial_factor: int
    scaling_factor: Factor
    shift_factor: Factor = 0.0

    @classmethod
    def of(cls, vae: Autoencoder, name: str | None = None) -> "LatentSpace":
        """
        The latent space of `vae`.

        Args:
            vae: one of the classes of `Autoencoder`.
            name: which space the VAE's latents belong to, for a VAE that cannot be identified by its config: a
                fine-tuned one, or an AutoencoderTiny, as its config does not name the VAE that it replaces.
        Raises:
            TypeError: `vae` is of another class.
            ValueError: the VAE does not match the space called `name`, does not encode RGB images, or is an
                AutoencoderKL with a mean and a standard deviation per channel.
        """
        vae = unwrap_compiled(vae)
        if not isinstance(vae, Autoencoder):
            *names, last = (kind.__name__ for kind in get_args(Autoencoder))
            raise TypeError(f"`vae` must be an {', '.join(names)} or {last}, got {type(vae).__name__}.")
        space = _describe(vae)
        declared = None if name is None else KNOWN_SPACES.get(name)
        if declared is not None and declared.shape != space.shape:
            raise ValueError(
                f"`latent_space` must be the VAE's own: {name!r} has {declared.channels} channels and spatial factor "
                f"{declared.spatial_factor}, got a VAE with {space.channels} channels and spatial factor "
                f"{space.spatial_factor}."
            )
        if isinstance(vae, AutoencoderTiny) and declared is not None:
            # Tiny autoencoders are trained on the scaled latents of the VAE that they replace.
            return declared
        return replace(space, name=name or _identify(vae, space))

    @property
    def shape(self) -> tuple[int, int]:
        """Channels and spatial factor."""
        return self.channels, self.spatial_factor

    def normalize(self, raw_latents: torch.Tensor) -> torch.Tensor:
        """Raw latents (B, C, h, w) -> latents (B, C, h, w), scaled as for diffusers' denoisers."""
        shift, scale = _broadcast(self.shift_factor, raw_latents), _broadcast(self.scaling_factor, raw_latents)
        return (raw_latents - shift) * scale

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w), scaled as for diffusers' denoisers -> raw latents (B, C, h, w)."""
        return latents / _broadcast(self.scaling_factor, latents) + _broadcast(self.shift_factor, latents)

    def read(self, latents: torch.Tensor, *, size: tuple[int, int]) -> torch.Tensor:
        """
        The output of a diffusers pipeline with `output_type="latent"` -> raw latents.

        Args:
            latents: (B, C, h, w), (B, C, 1, h, w), or packed, (B, h/2 * w/2, 4C): 2x2 patches, row by row.
            size: (h, w), as `check_layout` returns it.
        Returns:
            (B, C, h, w), dtype of `latents`.
        """
        if latents.ndim == 3:
            height, width = size
            latents = latents.transpose(1, 2).unflatten(2, (height // PACKING, width // PACKING))
            latents = F.pixel_shuffle(latents, PACKING)  # (B, C, h, w)
        elif latents.ndim == 5:
            latents = latents.squeeze(2)
        return self.denormalize(latents)

    def write(self, raw_latents: torch.Tensor, *, ndim: int = 4) -> torch.Tensor:
        """
        The inverse of `read`.

        Args:
            raw_latents: (B, C, h, w); to be packed, h and w have to be even.
            ndim: rank of the layout: 4, 5, or 3 for packed latents.
        """
        latents = self.normalize(raw_latents)
        if ndim == 3:
            return F.pixel_unshuffle(latents, PACKING).flatten(2).transpose(1, 2)  # (B, h/2 * w/2, 4C)
        return latents.unsqueeze(2) if ndim == 5 else latents

    def check_layout(
        self, latents: torch.Tensor, *, height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:
        """
        Check latents in any layout that `read` takes.

        Args:
            latents: output of a diffusers pipeline with `output_type="latent"`.
            height, width: size of the image in pixels, as passed to that pipeline; required for packed latents.
        Returns:
            (h, w) in latents.
        Raises:
            TypeError: `latents` are not a tensor; `height` or `width` is not a whole number.
            ValueError: `latents` are not finite, have another shape, or belong to an image of another size; or they
                are packed, and `height` and `width` are missing.
        """
        _check_tensor(latents)
        shape, channels = tuple(latents.shape), self.channels
        is_packed = latents.ndim == 3 and shape[2] == PACKING**2 * channels
        is_video = latents.ndim == 5 and shape[1:3] == (channels, 1)
        if not (is_packed or is_video or (latents.ndim == 4 and shape[1] == channels)):
            raise ValueError(
                f"`latents` must be (B, {channels}, h, w), one frame (B, {channels}, 1, h, w) or packed "
                f"(B, h/2 * w/2, {PACKING**2 * channels}) for the latent space {self.name!r}, got {shape}."
            )
        given = [value for value in (height, width) if value is not None]
        if len(given) == 1 or (is_packed and not given):
            raise ValueError(
                f"`height` and `width` must both be given for packed latents of shape {shape}, "
                f"got {height} and {width}. Pass those of the image, in pixels."
            )
        size = size_of(latents)
        if given:
            # Rounded down to whole patches, as the pipelines do with `height` and `width`.
            step = self.spatial_factor * (PACKING if is_packed else 1)
            rows, columns = (
                read_whole_number(name, value, minimum=step) // step
                for name, value in (("height", height), ("width", width))
            )
            expected = rows * columns if is_packed else (rows, columns)
            if expected != (shape[1] if is_packed else size):
                raise ValueError(
                    f"`height` and `width` must be those of the image of `latents`, got {height} and {width} pixels "
                    f"for latents of shape {shape}."
                )
            size = (rows * PACKING, columns * PACKING) if is_packed else size
        _check_all_finite(latents)
        return size

    def check_latents(self, latents: torch.Tensor) -> None:
        """Raise TypeError unless `latents` are a tensor, ValueError unless they are finite and (B, channels, h, w)."""
        _check_tensor(latents)
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(
                f"`latents` must be (B, {self.channels}, h, w) for the latent space {self.name!r}, "
                f"got {tuple(latents.shape)}."
            )
        _check_all_finite(latents)

    def check_upsampler(self, upsampler: ModelMixin) -> None:
        """Raise ValueError unless `upsampler` was trained for this space."""
        config = upsampler.config
        wanted = (config.latent_space, config.latent_channels, config.spatial_factor)
        if wanted == (self.name, self.channels, self.spatial_factor):
            return
        sentence = (
            "`upsampler` must have been trained for the VAE's latents: it was trained for "
            f"{wanted[0]!r} ({wanted[1]} channels, spatial factor {wanted[2]}), got "
            f"{self.name!r} ({self.channels} channels, spatial factor {self.spatial_factor})."
        )
        if wanted[1:] == self.shape:
            sentence += f" If these are the same latents under another name, pass latent_space={wanted[0]!r}."
        raise ValueError(sentence)


@dataclass(frozen=True)
class Flux2LatentSpace(LatentSpace):
    """
    The latents of FLUX.2. The denoiser gets 2x2 patches, normalized by the VAE's batch-norm statistics.

    `Flux2Pipeline` returns packed, normalized latents; `Flux2KleinPipeline` raw ones, (B, C, h, w).

    Args:
        patch_mean, patch_std: 4C values, one per channel and patch position. An AutoencoderTiny has none and takes raw
            latents only.
    """

    patch_mean: tuple[float, ...] | None = None
    patch_std: tuple[float, ...] | None = None

    def normalize(self, raw_latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._statistics(raw_latents)
        return F.pixel_shuffle((F.pixel_unshuffle(raw_latents, PACKING) - mean) / std, PACKING)

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._statistics(latents)
        return F.pixel_shuffle(F.pixel_unshuffle(latents, PACKING) * std + mean, PACKING)

    def read(self, latents: torch.Tensor, *, size: tuple[int, int]) -> torch.Tensor:
        return latents if latents.ndim == 4 else super().read(latents, size=size)

    def write(self, raw_latents: torch.Tensor, *, ndim: int = 4) -> torch.Tensor:
        return raw_latents if ndim == 4 else super().write(raw_latents, ndim=ndim)

    def check_layout(
        self, latents: torch.Tensor, *, height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:
        size = super().check_layout(latents, height=height, width=width)
        if latents.ndim != 4:
            self._statistics(latents)
        return size

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.patch_mean is None or self.patch_std is None:
            raise ValueError(
                "`latents` must be raw, (B, C, h, w), for a VAE without the batch-norm statistics of FLUX.2, "
                f"got {tuple(latents.shape)}. Use the AutoencoderKLFlux2, or denormalize them with its statistics."
            )
        return _by_channel(self.patch_mean, latents), _by_channel(self.patch_std, latents)


def _read_statistics(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of every channel -> scaling and shift factors, rounded as diffusers' pipelines round them."""
    return tuple((1.0 / torch.tensor(std)).tolist()), tuple(mean)


WAN21_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN21_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

KNOWN_SPACES = {
    space.name: space
    for space in (
        LatentSpace("sd15-vae", 4, 8, 0.18215),
        LatentSpace("sdxl-vae", 4, 8, 0.13025),
        LatentSpace("sd3-vae", 16, 8, 1.5305, 0.0609),
        LatentSpace("flux-vae", 16, 8, 0.3611, 0.1159),
        Flux2LatentSpace("flux2-vae", 32, 8, 1.0),
        LatentSpace("wan21-vae", 16, 8, *_read_statistics(WAN21_MEAN, WAN21_STD)),
        LatentSpace("sana-dc-ae", 32, 32, 0.41407),
    )
}
"""
Known latent spaces, identified by channels, spatial factor, scale and shift.

sd15-vae: Stable Diffusion 1.x and 2.x. flux-vae: FLUX.1 and Z-Image. flux2-vae: FLUX.2 dev and klein. wan21-vae: Wan
2.1 and Qwen-Image, which has the encoder of Wan 2.1 and a decoder trained for images.
"""


class LatentCodec:
    """
    Converts between images in [0, 1] and raw latents with one VAE.

    If a float16 VAE gives an output that is not finite, it runs again in float32, with a warning, and is cast back
    afterwards. The SDXL VAE runs in float32 from the start if its config has `force_upcast`, as in diffusers'
    pipelines. For other VAEs the flag is ignored, because it is AutoencoderKL's default.

    Args:
        vae: one of the classes of `Autoencoder`. A video VAE gets single frames.
        latent_space: the space, or the name of the space, that the VAE's latents belong to, if its config does not
            determine it; see `LatentSpace.of`.
    Raises:
        TypeError, ValueError: as `LatentSpace.of`.
    """

    def __init__(self, vae: Autoencoder, latent_space: LatentSpace | str | None = None):
        self.vae = vae
        self.space = latent_space if isinstance(latent_space, LatentSpace) else LatentSpace.of(vae, latent_space)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """
        Encode (B, 3, H, W) in [0, 1], H and W multiples of `spatial_factor`, to raw latents (B, C, h, w).

        A KL autoencoder gives its posterior's mode, so the result is deterministic.

        Raises:
            ValueError: the output is not finite, even in float32.
        """
        return self._run_finite(self.encode_sample, image * 2 - 1)

    def encode_sample(self, sample: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] in the VAE's dtype -> raw latents, without checks."""
        output: Any = self.vae.encode(sample.unsqueeze(2) if self._is_video else sample)
        if hasattr(output, "latent_dist"):
            mode = output.latent_dist.mode()
            return mode.squeeze(2) if self._is_video else mode
        if hasattr(output, "latents"):  # an AutoencoderTiny's, which are scaled
            return self.space.read(output.latents, size=size_of(output.latents))
        return output.latent

    def native(self, raw_latents: torch.Tensor) -> torch.Tensor:
        """Raw latents -> the input of `vae.decode`: scaled for an AutoencoderTiny, one frame for a video VAE."""
        if isinstance(unwrap_compiled(self.vae), AutoencoderTiny):
            return self.space.write(raw_latents)
        return raw_latents.unsqueeze(2) if self._is_video else raw_latents

    @property
    def _is_video(self) -> bool:
        return isinstance(unwrap_compiled(self.vae), VideoAutoencoder)

    def decode(self, raw_latents: torch.Tensor) -> torch.Tensor:
        """
        Decode raw latents (B, C, h, w) to float32 images (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: the output is not finite, even in float32.
        """
        return _to_image(self._run_finite(self.decode_sample, raw_latents))

    def decode_sample(self, raw_latents: torch.Tensor) -> torch.Tensor:
        """Raw latents in the VAE's dtype -> (B, 3, H, W), about [-1, 1], without checks."""
        decode: Callable[..., Any] = self.vae.decode
        sample = decode(self.native(raw_latents)).sample
        return sample[:, :, 0] if self._is_video else sample

    def resize(self, raw_latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """
        Raw latents of the same image at another size: decoded, resized in pixels, encoded again.

        This costs one round trip through the VAE; interpolated latents would decode to a blur.

        Args:
            raw_latents: (B, C, h, w).
            size: (height, width) in latents.
        Returns:
            (B, C, *size).
        """
        if tuple(raw_latents.shape[2:]) == tuple(size):
            return raw_latents
        height, width = (length * self.space.spatial_factor for length in size)
        return self.encode(resize(self.decode(raw_latents), (height, width)))

    def count_strips(self, size: tuple[int, int]) -> int:
        """The number of strips that `decode_strips` gives for latents of `size` (h, w)."""
        if self._decodes_in_strips:
            return self.vae.count_strips(size)
        return 1

    @property
    def _decodes_in_strips(self) -> bool:
        return hasattr(self.vae, "decode_strips") and self.vae.dtype != torch.float16

    def decode_strips(self, raw_latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """
        The output of `decode` in strips of rows, from top to bottom.

        Returns:
            An iterator over (B, 3, rows, W): strips if the VAE decodes in strips, else the whole image. In float16 it
            is always the whole image, because an overflow anywhere means decoding everything again.
        """
        if not self._decodes_in_strips:
            yield self.decode(raw_latents)
            return
        # `map` does not hold a strip while the next one is decoded, as a loop does.
        yield from map(_to_image, map(_check_finite, self.vae.decode_strips(raw_latents.to(self.vae.dtype))))

    def _run_finite(self, function: Callable[[torch.Tensor], torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        """function(sample) in the VAE's dtype, or in float32 where float16 overflows."""
        vae = self.vae
        overflows = self.space.name == "sdxl-vae" and getattr(vae.config, "force_upcast", False)
        if not (vae.dtype == torch.float16 and overflows):
            output = function(sample.to(vae.dtype))
            if _is_finite(output):
                return output
            if vae.dtype == torch.float16:
                logger.warning(
                    "`vae` overflowed in float16 and runs again in float32. Load it in float32 or bfloat16, or use "
                    "one made for float16, which is faster."
                )
        if vae.dtype == torch.float16:
            with _in_float32(vae):
                output = function(sample.float())
        return _check_finite(output)


def unwrap_compiled(model: Model) -> Model:
    """The original of a model compiled by `torch.compile`, or `model` if it is not compiled."""
    return getattr(model, "_orig_mod", model)


def _to_image(sample: torch.Tensor) -> torch.Tensor:
    """What a VAE decodes to, about [-1, 1] -> float32 in [0, 1]."""
    return (sample.float() / 2).add_(0.5).clamp_(0, 1)


def _is_finite(output: torch.Tensor) -> bool:
    # Not with torch.isfinite, which allocates tensors of the size of the image.
    return all(extreme.isfinite().item() for extreme in output.aminmax())


def _check_finite(output: torch.Tensor) -> torch.Tensor:
    """`output`. Raises ValueError if it is not finite."""
    if not _is_finite(output):
        raise ValueError(
            f"`vae` must give finite values, got NaN or infinity in {output.dtype}. "
            "Its weights or its input are broken."
        )
    return output


@contextmanager
def _in_float32(vae: Autoencoder) -> Iterator[None]:
    """Convert the float16 tensors of `vae` to float32 within the block; the round trip is exact."""
    halves = [tensor for tensor in (*vae.parameters(), *vae.buffers()) if tensor.dtype == torch.float16]
    if any(tensor.is_meta for tensor in halves) or _is_group_offload_enabled(vae):
        raise ValueError(
            "`vae` must be in float32 or bfloat16 if its weights are offloaded layer by layer, got float16, which "
            "overflowed. Load the pipeline with dtype=torch.bfloat16."
        )
    try:
        for tensor in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor in halves:
            tensor.data = tensor.data.half()


def _describe(vae: Autoencoder) -> LatentSpace:
    """The latent space of `vae`, without its name."""
    config: Any = vae.config
    in_channels = config.get("in_channels", config.get("input_channels", 3))
    if isinstance(vae, AutoencoderKLWan):
        in_channels //= (config.patch_size or 1) ** 2  # of Wan 2.2 the config counts those of patches
    if in_channels != 3:
        raise ValueError(f"`vae` must encode RGB images, got one of {in_channels} channels.")
    if isinstance(vae, VideoAutoencoder):
        factor = config.get("scale_factor_spatial", 2 ** len(config.temperal_downsample))
        return LatentSpace("", config.z_dim, factor, *_read_statistics(config.latents_mean, config.latents_std))
    if config.get("latents_mean") is not None:
        raise ValueError(
            f"`vae` must scale its latents by one factor if it is an {type(vae).__name__}, got one with "
            "`latents_mean` and `latents_std` for each channel."
        )
    if isinstance(vae, AutoencoderLocal):
        return LatentSpace("", config.latent_channels, vae.spatial_factor, config.scaling_factor)
    widths = config.get("encoder_block_out_channels") or config.block_out_channels
    shape = config.latent_channels, 2 ** (len(widths) - 1)
    if isinstance(vae, AutoencoderKLFlux2):
        # Buffers, not weights: they are where the VAE runs, also if its weights are offloaded.
        norm: Any = vae.bn
        std = torch.sqrt(norm.running_var.float() + config.batch_norm_eps)
        return Flux2LatentSpace(
            "", *shape, 1.0, patch_mean=tuple(norm.running_mean.tolist()), patch_std=tuple(std.tolist())
        )
    return LatentSpace("", *shape, config.scaling_factor, config.get("shift_factor") or 0.0)


def _identify(vae: Autoencoder, space: LatentSpace) -> str:
    """The name a VAE's config gives its latents: its own, that of a known space, or one made of its numbers."""
    if isinstance(vae, AutoencoderLocal):
        return vae.config.latent_space
    if not isinstance(vae, AutoencoderTiny):
        for known in KNOWN_SPACES.values():
            if known == _without_weights(replace(space, name=known.name)):
                return known.name
    name = f"{type(vae).__name__}-c{space.channels}-f{space.spatial_factor}"
    if isinstance(space.scaling_factor, tuple):
        statistics = repr((space.scaling_factor, space.shift_factor)).encode()
        return f"{name}-statistics{zlib.crc32(statistics):08x}"
    scale = "" if isinstance(space, Flux2LatentSpace) else f"-scale{space.scaling_factor:g}"
    return name + scale + (f"-shift{space.shift_factor:g}" if space.shift_factor else "")


def _without_weights(space: LatentSpace) -> LatentSpace:
    """`space` without the statistics that are in the VAE's weights and not in its config."""
    return replace(space, patch_mean=None, patch_std=None) if isinstance(space, Flux2LatentSpace) else space


def _broadcast(factor: Factor, latents: torch.Tensor) -> float | torch.Tensor:
    """One factor as it is, or one for each channel as (C, 1, 1)."""
    return _by_channel(factor, latents) if isinstance(factor, tuple) else factor


def _by_channel(values: tuple[float, ...], latents: torch.Tensor) -> torch.Tensor:
    """One value for each channel of `latents`, (C, 1, 1)."""
    return latents.new_tensor(values)[:, None, None]


def _check_tensor(latents: torch.Tensor) -> None:
    if not isinstance(latents, torch.Tensor):
        raise TypeError(f"`latents` must be a tensor, got {type(latents).__name__}.")


def _check_all_finite(latents: torch.Tensor) -> None:
    if not torch.isfinite(latents).all():
        raise ValueError(
            "`latents` must be finite, got NaN or infinity. A half-precision pipeline may have overflowed: "
            "run it in float32 or bfloat16."
        )
