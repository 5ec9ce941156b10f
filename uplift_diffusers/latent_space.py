"""What a VAE's latents are, and encoding and decoding through any of diffusers' image autoencoders."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, ModelMixin

from uplift_diffusers.models.autoencoder_local import AutoencoderLocal
from uplift_diffusers.tiling import decode_strips, decode_tiled, encode_tiled

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
                fine-tuned one, or an AutoencoderTiny, whose config does not say whose latents it speaks.
        Raises:
            TypeError: another kind of VAE.
            ValueError: the VAE contradicts the space it is declared to be of, or normalizes its latents channel by
                channel.
        """
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

    def scale(self, raw_latents: torch.Tensor) -> torch.Tensor:
        """Raw latents -> latents as diffusers passes them between pipelines."""
        return (raw_latents - self.shift_factor) * self.scaling_factor

    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as diffusers passes them between pipelines -> raw latents."""
        return latents / self.scaling_factor + self.shift_factor

    def encode(self, vae: Autoencoder, image: torch.Tensor, *, tile_size: int | None = None) -> torch.Tensor:
        """
        Encode (B, 3, H, W) in [0, 1], H and W multiples of `spatial_factor`, to raw latents (B, C, h, w).

        A KL autoencoder gives its posterior's mode: nothing here is random. What is said of float16 and of `tile_size`
        at `decode` holds.
        """

        def encode(sample: torch.Tensor) -> torch.Tensor:
            if tile_size is not None and isinstance(vae, AutoencoderLocal):
                return encode_tiled(vae, sample, tile_size=tile_size)
            output = vae.encode(sample)
            if isinstance(vae, AutoencoderKL):
                return output.latent_dist.mode()
            if isinstance(vae, AutoencoderTiny):
                return self.unscale(output.latents)
            return output.latent

        return self._run_finite(vae, encode, image * 2 - 1)

    def native(self, vae: Autoencoder, raw_latents: torch.Tensor) -> torch.Tensor:
        """Raw latents -> what `vae.decode` takes: the same, but for an AutoencoderTiny, which takes scaled ones."""
        return self.scale(raw_latents) if isinstance(vae, AutoencoderTiny) else raw_latents

    def decode(self, vae: Autoencoder, raw_latents: torch.Tensor, *, tile_size: int | None = None) -> torch.Tensor:
        """
        Decode raw latents (B, C, h, w) to float32 images (B, 3, H, W) in [0, 1].

        A float16 VAE whose output is not finite runs again in float32, with a warning, and is float16 again when this
        returns. The SDXL VAE runs in float32 at once where its config has `force_upcast`, as in diffusers' pipelines.
        For other VAEs the flag says nothing, for it is AutoencoderKL's default.

        Args:
            vae: of this latent space, or an AutoencoderTiny that stands in for it, whose own scale is not looked at.
            tile_size: edge of a tile in pixels of the image, for an AutoencoderLocal, which is exact in tiles. The
                other VAEs see the whole picture, or what `vae.enable_tiling()` lets them see, which is not exact.
        Raises:
            ValueError: the output is not finite, in float32 either.
        """

        def decode(latents: torch.Tensor) -> torch.Tensor:
            if tile_size is not None and isinstance(vae, AutoencoderLocal):
                return decode_tiled(vae, latents, tile_size=tile_size)
            return vae.decode(latents).sample

        sample = self._run_finite(vae, decode, self.native(vae, raw_latents))
        return (sample.float() / 2).add_(0.5).clamp_(0, 1)

    def decode_strips(
        self, vae: Autoencoder, raw_latents: torch.Tensor, *, tile_size: int | None = None
    ) -> Iterator[torch.Tensor]:
        """
        The rows of what `decode` gives, from top to bottom.

        Args, Raises: see `decode`.
        Returns:
            An iterator over (B, 3, rows, W). Where `tile_size` tells and the VAE is an AutoencoderLocal, a strip of
            at most `tile_size` rows is decoded at a time; else there is one, the whole picture. So it is in float16,
            where an overflow anywhere concerns all of it.
        """
        if tile_size is None or not isinstance(vae, AutoencoderLocal) or vae.dtype == torch.float16:
            yield self.decode(vae, raw_latents, tile_size=tile_size)
            return
        for strip in decode_strips(vae, raw_latents.to(vae.dtype), tile_size=tile_size):
            yield _check_finite(strip).float().div_(2).add_(0.5).clamp_(0, 1)

    def _run_finite(
        self, vae: Autoencoder, function: Callable[[torch.Tensor], torch.Tensor], sample: torch.Tensor
    ) -> torch.Tensor:
        """function(sample) in the VAE's dtype, or in float32 where float16 overflows."""
        overflows = self.name == "sdxl-vae" and getattr(vae.config, "force_upcast", False)
        if not (vae.dtype == torch.float16 and overflows):
            output = function(sample.to(vae.dtype))
            if _is_finite(output):
                return output
            if vae.dtype == torch.float16:
                warnings.warn(
                    "`vae` overflowed in float16 and runs again in float32. Load it in float32 or bfloat16, or use "
                    "one made for float16, to save the time.",
                    stacklevel=2,
                )
        if vae.dtype == torch.float16:
            with _in_float32(vae):
                output = function(sample.float())
        return _check_finite(output)

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
