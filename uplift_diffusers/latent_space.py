"""What a VAE's latents are, and encoding and decoding through any of diffusers' image autoencoders."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, ModelMixin

from uplift_diffusers.models.autoencoder import AutoencoderLocal

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
            ValueError: the VAE contradicts the space it is declared to be of.
        """
        if not isinstance(vae, Autoencoder):
            raise TypeError(
                "`vae` must be an AutoencoderKL, AutoencoderTiny, AutoencoderDC or AutoencoderLocal, "
                f"got {type(vae).__name__}."
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

    def encode(self, vae: Autoencoder, image: torch.Tensor) -> torch.Tensor:
        """
        Encode (B, 3, H, W) in [0, 1], H and W multiples of `spatial_factor`, to raw latents (B, C, h, w).

        A KL autoencoder gives its posterior's mode: nothing here is random.
        """
        output = vae.encode((image * 2 - 1).to(vae.dtype))
        if isinstance(vae, AutoencoderKL):
            return output.latent_dist.mode()
        if isinstance(vae, AutoencoderTiny):
            return self.unscale(output.latents)
        return output.latent

    def decode(self, vae: Autoencoder, raw_latents: torch.Tensor) -> torch.Tensor:
        """Decode raw latents (B, C, h, w) to float32 images (B, 3, H, W) in [0, 1]."""
        if isinstance(vae, AutoencoderTiny):
            raw_latents = self.scale(raw_latents)
        sample = vae.decode(raw_latents.to(vae.dtype)).sample
        return (sample.float() / 2 + 0.5).clamp(0, 1)

    def check_latents(self, latents: torch.Tensor) -> None:
        """Raise ValueError unless `latents` are finite and (B, channels, h, w)."""
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
