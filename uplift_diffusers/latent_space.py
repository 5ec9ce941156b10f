"""LatentSpace, what a VAE's latents are; LatentCodec, which runs any of diffusers' image autoencoders."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, ModelMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import is_compiled_module

from uplift_diffusers.models.autoencoder_local import AutoencoderLocal

logger = logging.get_logger(__name__)

Autoencoder = AutoencoderKL | AutoencoderTiny | AutoencoderDC | AutoencoderLocal


@dataclass(frozen=True)
class LatentSpace:
    """
    The latents of a VAE.

    Raw latents are what upsamplers see: the posterior's mode, unscaled. Latents (without "raw") are what diffusers
    passes between pipelines: `(raw_latents - shift_factor) * scaling_factor`.

    Args:
        name: the identity that an upsampler's `config.latent_space` is compared with.
        channels: channels of the latents.
        spatial_factor: image pixels per latent position, along each axis.
        scaling_factor: see above.
        shift_factor: see above.
    """

    name: str
    channels: int
    spatial_factor: int
    scaling_factor: float
    shift_factor: float = 0.0

    @classmethod
    def of(cls, vae: Autoencoder, name: str | None = None) -> "LatentSpace":
        """
        The latent space of `vae`.

        Args:
            vae: AutoencoderKL, AutoencoderTiny, AutoencoderDC or AutoencoderLocal.
            name: declares which space the VAE's latents belong to, for a VAE that cannot be told by its config: a
                fine-tuned one, or an AutoencoderTiny, whose config does not say which VAE it stands in for.
        Raises:
            TypeError: another kind of VAE.
            ValueError: the VAE contradicts the space it is declared to be of, or normalizes its latents channel by
                channel.
        """
        vae = unwrap_compiled(vae)
        if not isinstance(vae, Autoencoder):
            raise TypeError(
                "`vae` must be an AutoencoderKL, AutoencoderTiny, AutoencoderDC or AutoencoderLocal, "
                f"got {type(vae).__name__}."
            )
        if getattr(vae.config, "latents_mean", None) is not None:
            raise ValueError(
                "`vae` must scale its latents by one factor, got one with `latents_mean` and `latents_std` for each "
                "channel, which no latent space here has."
            )
        channels, spatial_factor = vae.config.latent_channels, _spatial_factor(vae)
        scaling_factor = vae.config.scaling_factor
        shift_factor = getattr(vae.config, "shift_factor", None) or 0.0
        declared = KNOWN_SPACES.get(name)
        if declared is not None and (declared.channels, declared.spatial_factor) != (channels, spatial_factor):
            raise ValueError(
                f"`latent_space` must be the VAE's own: {name!r} has {declared.channels} channels and spatial factor "
                f"{declared.spatial_factor}, got a VAE with {channels} channels and spatial factor {spatial_factor}."
            )
        if isinstance(vae, AutoencoderTiny) and declared is not None:
            # Tiny autoencoders are trained on the scaled latents of the VAE they stand in for.
            scaling_factor, shift_factor = declared.scaling_factor, declared.shift_factor
        space = cls("", channels, spatial_factor, scaling_factor, shift_factor)
        return cls(name or _identify(vae, space), channels, spatial_factor, scaling_factor, shift_factor)

    def normalize(self, raw_latents: torch.Tensor) -> torch.Tensor:
        """Raw latents -> latents as diffusers passes them between pipelines."""
        return (raw_latents - self.shift_factor) * self.scaling_factor

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as diffusers passes them between pipelines -> raw latents."""
        return latents / self.scaling_factor + self.shift_factor

    def check_latents(self, latents: torch.Tensor) -> None:
        """Raise TypeError unless `latents` are a tensor, ValueError unless they are finite and (B, channels, h, w)."""
        if not isinstance(latents, torch.Tensor):
            raise TypeError(f"`latents` must be a tensor, got {type(latents).__name__}.")
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(
                f"`latents` must be (B, {self.channels}, h, w) for the latent space {self.name!r}, "
                f"got {tuple(latents.shape)}."
            )
        if not torch.isfinite(latents).all():
            raise ValueError(
                "`latents` must be finite, got NaN or infinity. A half-precision pipeline may have overflowed: "
                "run it in float32 or bfloat16."
            )

    def check_upsampler(self, upsampler: ModelMixin) -> None:
        """Raise ValueError, saying what was wanted and what was got, unless `upsampler` was trained for this space."""
        config = upsampler.config
        wanted = (config.latent_space, config.latent_channels, config.spatial_factor)
        if wanted == (self.name, self.channels, self.spatial_factor):
            return
        sentence = (
            "`upsampler` must have been trained for the VAE's latents: it was trained for "
            f"{wanted[0]!r} ({wanted[1]} channels, spatial factor {wanted[2]}), got "
            f"{self.name!r} ({self.channels} channels, spatial factor {self.spatial_factor})."
        )
        if wanted[1:] == (self.channels, self.spatial_factor):
            sentence += f" If these are the same latents under another name, pass latent_space={wanted[0]!r}."
        raise ValueError(sentence)


KNOWN_SPACES = {
    space.name: space
    for space in (
        LatentSpace("sd15-vae", 4, 8, 0.18215),
        LatentSpace("sdxl-vae", 4, 8, 0.13025),
        LatentSpace("sd3-vae", 16, 8, 1.5305, 0.0609),
        LatentSpace("flux-vae", 16, 8, 0.3611, 0.1159),
        LatentSpace("sana-dc-ae", 32, 32, 0.41407),
    )
}
"""Latent spaces told by channels, spatial factor, scale and shift; sd15-vae is also Stable Diffusion 1.x and 2.x."""


class LatentCodec:
    """
    Encodes and decodes through one VAE, between images in [0, 1] and raw latents.

    A float16 VAE whose output is not finite runs again in float32, with a warning, and is float16 again afterwards.
    The SDXL VAE runs in float32 at once if its config has `force_upcast`, as in diffusers' pipelines. For other VAEs
    the flag says nothing, for it is AutoencoderKL's default.

    Args:
        vae: AutoencoderKL, AutoencoderTiny, AutoencoderDC or AutoencoderLocal.
        latent_space: the space, or the name of the space, that the VAE's latents belong to, where its config does not
            say it; see `LatentSpace.of`.
    Raises:
        TypeError, ValueError: as `LatentSpace.of`.
    """

    def __init__(self, vae: Autoencoder, latent_space: LatentSpace | str | None = None):
        self.vae = vae
        self.space = latent_space if isinstance(latent_space, LatentSpace) else LatentSpace.of(vae, latent_space)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """
        Encode (B, 3, H, W) in [0, 1], H and W multiples of `spatial_factor`, to raw latents (B, C, h, w).

        A KL autoencoder gives its posterior's mode: nothing here is random.

        Raises:
            ValueError: the output is not finite, in float32 either.
        """

        def encode(sample: torch.Tensor) -> torch.Tensor:
            output = self.vae.encode(sample)
            if hasattr(output, "latent_dist"):
                return output.latent_dist.mode()
            if hasattr(output, "latents"):  # an AutoencoderTiny's, which are scaled
                return self.space.denormalize(output.latents)
            return output.latent

        return self._run_finite(encode, image * 2 - 1)

    def native(self, raw_latents: torch.Tensor) -> torch.Tensor:
        """Raw latents -> what `vae.decode` takes: the same, but for an AutoencoderTiny, which takes scaled ones."""
        is_tiny = isinstance(unwrap_compiled(self.vae), AutoencoderTiny)
        return self.space.normalize(raw_latents) if is_tiny else raw_latents

    def decode(self, raw_latents: torch.Tensor) -> torch.Tensor:
        """
        Decode raw latents (B, C, h, w) to float32 images (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: the output is not finite, in float32 either.
        """
        sample = self._run_finite(lambda latents: self.vae.decode(latents).sample, self.native(raw_latents))
        return _to_image(sample)

    def count_strips(self, size: tuple[int, int]) -> int:
        """How many strips `decode_strips` gives for latents of `size` (h, w)."""
        if self._decodes_in_strips:
            return self.vae.count_strips(size)
        return 1

    @property
    def _decodes_in_strips(self) -> bool:
        return hasattr(self.vae, "decode_strips") and self.vae.dtype != torch.float16

    def decode_strips(self, raw_latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """
        The rows of what `decode` gives, from top to bottom.

        Returns:
            An iterator over (B, 3, rows, W): strips if the VAE decodes in strips, else the whole picture. It is whole
            in float16 too, where an overflow anywhere concerns all of it.
        """
        if not self._decodes_in_strips:
            yield self.decode(raw_latents)
            return
        for strip in self.vae.decode_strips(raw_latents.to(self.vae.dtype)):
            yield _to_image(_check_finite(strip))

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
                    "one made for float16, to save the time."
                )
        if vae.dtype == torch.float16:
            with _in_float32(vae):
                output = function(sample.float())
        return _check_finite(output)


def unwrap_compiled(model: ModelMixin) -> ModelMixin:
    """The model that `torch.compile` was given, or `model` if it is not compiled."""
    return model._orig_mod if is_compiled_module(model) else model


def _to_image(sample: torch.Tensor) -> torch.Tensor:
    """What a VAE decodes to, about [-1, 1] -> float32 in [0, 1]."""
    return (sample.float() / 2).add_(0.5).clamp_(0, 1)


def _is_finite(output: torch.Tensor) -> bool:
    # Not by torch.isfinite, which makes tensors of the size of a picture on the way.
    return all(extreme.isfinite().item() for extreme in output.aminmax())


def _check_finite(output: torch.Tensor) -> torch.Tensor:
    """`output`. Raises ValueError if it is not finite."""
    if not _is_finite(output):
        raise ValueError(
            f"`vae` must give finite values, got NaN or infinity in {output.dtype}. "
            "Its weights or what it was given are broken."
        )
    return output


@contextmanager
def _in_float32(vae: Autoencoder) -> Iterator[None]:
    """Hold the float16 tensors of `vae` in float32 for the while; the way there and back is exact."""
    halves = [tensor for tensor in (*vae.parameters(), *vae.buffers()) if tensor.dtype == torch.float16]
    if any(tensor.is_meta for tensor in halves):
        raise ValueError(
            "`vae` must be in float32 or bfloat16 where its weights are offloaded one by one, got float16, which "
            "overflowed. Load the pipeline with dtype=torch.bfloat16."
        )
    try:
        for tensor in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor in halves:
            tensor.data = tensor.data.half()


def _spatial_factor(vae: Autoencoder) -> int:
    if isinstance(vae, AutoencoderLocal):
        return vae.spatial_factor
    widths = (
        vae.config.encoder_block_out_channels if not isinstance(vae, AutoencoderKL) else vae.config.block_out_channels
    )
    return 2 ** (len(widths) - 1)


def _identify(vae: Autoencoder, space: LatentSpace) -> str:
    """The name a VAE's config gives its latents: its own, that of a known space, or one made of its numbers."""
    if isinstance(vae, AutoencoderLocal):
        return vae.config.latent_space
    if not isinstance(vae, AutoencoderTiny):
        for known in KNOWN_SPACES.values():
            if known == LatentSpace(known.name, *_numbers(space)):
                return known.name
    shift = f"-shift{space.shift_factor:g}" if space.shift_factor else ""
    return f"{type(vae).__name__}-c{space.channels}-f{space.spatial_factor}-scale{space.scaling_factor:g}{shift}"


def _numbers(space: LatentSpace) -> tuple[int, int, float, float]:
    return space.channels, space.spatial_factor, space.scaling_factor, space.shift_factor
