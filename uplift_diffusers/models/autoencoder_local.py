"""A small, strictly local autoencoder: a linear block code plus convolutional residuals on both sides."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, EncoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from uplift_diffusers.models.blocks import start_at_zero, total_reach
from uplift_diffusers.scale import size_of
from uplift_diffusers.tiling import Window, run_on_tile, split_into_tiles, tile_edge

TILE_SIZE = 768
"""Edge of a tile in pixels. Larger tiles have relatively smaller halos and need more memory."""


class ResidualBlock(nn.Module):
    """x + conv3x3(relu(conv3x3(x))), without a norm, so an output depends only on its neighbourhood."""

    reach = 2

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.conv2(F.relu(self.conv1(hidden), inplace=True))


class ConvolutionalEncoder(nn.Module):
    """(B, 3, H, W) -> (B, latent_channels, H/8, W/8); its last layer starts at zero."""

    def __init__(self, latent_channels: int, block_out_channels: tuple[int, int], layers_per_block: tuple[int, int]):
        super().__init__()
        fine, coarse = block_out_channels
        self.unshuffle = nn.PixelUnshuffle(4)
        self.conv_in = nn.Conv2d(3 * 4**2, fine, 3, padding=1)
        self.fine = nn.Sequential(*(ResidualBlock(fine) for _ in range(layers_per_block[0])))
        self.downsample = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(*(ResidualBlock(coarse) for _ in range(layers_per_block[1])))
        self.conv_out = nn.Conv2d(coarse, latent_channels, 3, padding=1)
        start_at_zero(self.conv_out)

    @property
    def reach(self) -> int:
        """Latents to each side whose pixels an output depends on."""
        fine = 1 + total_reach(self.fine)
        coarse = 1 + total_reach(self.coarse)
        # The strided convolution reads one position more. Two positions are a latent.
        return coarse + -(-(fine + 1) // 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        # Convolutions on CPUs are faster in this layout and take less memory.
        hidden = self.unshuffle(image).contiguous(memory_format=torch.channels_last)
        hidden = self.fine(self.conv_in(hidden))  # (B, fine, H/4, W/4)
        hidden = self.coarse(self.downsample(hidden))  # (B, coarse, H/8, W/8)
        return self.conv_out(hidden)


class ConvolutionalDecoder(nn.Module):
    """(B, latent_channels, h, w) -> (B, 3, 8h, 8w); its last layer starts at zero."""

    def __init__(self, latent_channels: int, block_out_channels: tuple[int, int], layers_per_block: tuple[int, int]):
        super().__init__()
        fine, coarse = block_out_channels
        self.conv_in = nn.Conv2d(latent_channels, coarse, 3, padding=1)
        self.coarse = nn.Sequential(*(ResidualBlock(coarse) for _ in range(layers_per_block[1])))
        self.upsample = nn.Sequential(nn.Conv2d(coarse, 2**2 * fine, 1), nn.PixelShuffle(2))
        self.fine = nn.Sequential(*(ResidualBlock(fine) for _ in range(layers_per_block[0])))
        self.conv_out = nn.Conv2d(fine, 3 * 4**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(4)
        start_at_zero(self.conv_out)

    @property
    def reach(self) -> int:
        """Latents to each side on which an output depends."""
        fine = 1 + total_reach(self.fine)  # two positions are a latent
        return 1 + total_reach(self.coarse) + -(-fine // 2)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden = latents.contiguous(memory_format=torch.channels_last)
        hidden = self.coarse(self.conv_in(hidden))  # (B, coarse, h, w)
        hidden = self.upsample(hidden)  # (B, fine, 2h, 2w)
        return self.shuffle(self.conv_out(self.fine(hidden)))


class AutoencoderLocal(ModelMixin, AutoencoderMixin, ConfigMixin):
    r"""
    The autoencoder of the embedded bundle, with the interface of diffusers' deterministic autoencoders.

    The core is a linear code: an 8x8 convolution with stride 8 and its transpose, which [`fit_linear_code`]
    sets to the principal components of 8x8 RGB blocks. A convolutional encoder and decoder, initialised to zero, add
    what the linear code cannot represent. There is no attention and no norm over space, so every output
    pixel depends on a bounded neighbourhood of the input, and tiling is exact. Tiling is on by default, except when
    gradients are needed; `disable_tiling()` turns it off.

    Args:
        latent_channels (`int`): channels of the latents.
        block_out_channels (`tuple[int, int]`): width of the convolutional parts at 1/4 and at 1/8 of the resolution.
        encoder_layers_per_block (`tuple[int, int]`): residual blocks of the encoder at 1/4 and at 1/8.
        decoder_layers_per_block (`tuple[int, int]`): residual blocks of the decoder at 1/4 and at 1/8.
        scaling_factor (`float`): multiplies raw latents to give latents of unit standard deviation.
        latent_space (`str`): name of the latent space, which upsamplers are matched by.
    """

    config: Any  # diffusers' FrozenDict: its entries are attributes, too

    spatial_factor = 8
    _no_split_modules = ["ResidualBlock"]  # noqa: RUF012 - lists, as diffusers has them
    _repeated_blocks = ["ResidualBlock"]  # noqa: RUF012
    # Each by itself, because `encode` and `decode` do not go through `forward`.
    _group_offload_block_modules = ["linear_encoder", "encoder", "linear_decoder", "decoder"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 40,
        block_out_channels: tuple[int, int] = (96, 192),
        encoder_layers_per_block: tuple[int, int] = (2, 2),
        decoder_layers_per_block: tuple[int, int] = (4, 2),
        scaling_factor: float = 1.0,
        latent_space: str = "uplift-embedded",
    ):
        super().__init__()
        factor = self.spatial_factor
        if not 1 <= latent_channels <= 3 * factor**2:
            raise ValueError(f"`latent_channels` must be from 1 to {3 * factor**2}, got {latent_channels}.")
        for name, values in (
            ("block_out_channels", block_out_channels),
            ("encoder_layers_per_block", encoder_layers_per_block),
            ("decoder_layers_per_block", decoder_layers_per_block),
        ):
            if len(values) != 2:
                raise ValueError(
                    f"`{name}` must have two entries, for 1/4 and for 1/8 of the resolution, got {values}."
                )

        self.linear_encoder = nn.Conv2d(3, latent_channels, factor, stride=factor)
        self.encoder = ConvolutionalEncoder(latent_channels, block_out_channels, encoder_layers_per_block)
        self.linear_decoder = nn.ConvTranspose2d(latent_channels, 3, factor, stride=factor)
        self.decoder = ConvolutionalDecoder(latent_channels, block_out_channels, decoder_layers_per_block)
        self.enable_tiling()

    def enable_tiling(self, tile_size: int = TILE_SIZE) -> None:
        """
        Encode and decode in tiles, which bounds memory and changes the output only by float32 rounding.

        Args:
            tile_size: largest edge of a tile in pixels, at least 8.
        """
        self.tile_edge = tile_edge(tile_size, self.spatial_factor)
        self.use_tiling = True

    @property
    def encoder_reach(self) -> int:
        """Number of latents to each side whose pixels a latent depends on: the halo of an encoded tile."""
        return self.encoder.reach

    @property
    def decoder_reach(self) -> int:
        """Number of latents to each side on which the pixels of a latent depend: the halo of a decoded tile."""
        return self.decoder.reach

    @apply_forward_hook
    def encode(self, sample: torch.Tensor, return_dict: bool = True) -> EncoderOutput | tuple[torch.Tensor]:
        """Encode (B, 3, H, W) in [-1, 1], H and W multiples of 8, to raw latents (B, C, H/8, W/8)."""
        self.check_sample(sample)
        size = (sample.shape[2] // self.spatial_factor, sample.shape[3] // self.spatial_factor)
        if self._is_tiled(size):
            latent = sample.new_empty(len(sample), self.config.latent_channels, *size)
            for row in self._tiles(size):
                for tile in row:
                    latent[..., tile.slices[0], tile.slices[1]] = run_on_tile(
                        self._encode, sample, tile, halo=self.encoder_reach, input_factor=self.spatial_factor
                    )
        else:
            latent = self._encode(sample)
        return EncoderOutput(latent=latent) if return_dict else (latent,)

    @apply_forward_hook
    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Decode raw latents (B, C, h, w) to (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        self.check_latents(latents)
        if self._is_tiled(size_of(latents)):
            height, width = (length * self.spatial_factor for length in latents.shape[2:])
            sample, top = latents.new_empty(len(latents), 3, height, width), 0
            for strip in self._decode_strips(latents):
                sample[:, :, top : top + strip.shape[2]] = strip
                top += strip.shape[2]
        else:
            sample = self._decode(latents)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def count_strips(self, size: tuple[int, int]) -> int:
        """The number of strips that `decode_strips` gives for latents of `size` (h, w)."""
        return len(self._tiles(size))

    @apply_forward_hook
    def decode_strips(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """
        The output of `decode` in strips of rows, from top to bottom, to avoid holding a large image in memory.

        Args:
            latents: raw, (B, C, h, w).
        Returns:
            An iterator over (B, 3, rows, 8w), about [-1, 1], not clamped, without gradient: a row of tiles each, or
            the whole if tiling is off.
        Raises:
            ValueError: `latents` cannot be decoded; raised by the call, not by the iteration.
        """
        self.check_latents(latents)
        return self._decode_strips(latents)

    def _decode_strips(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        size = size_of(latents)
        for row in self._tiles(size):
            height = (row[0].rows.stop - row[0].rows.start) * self.spatial_factor
            strip, left = latents.new_empty(len(latents), 3, height, size[1] * self.spatial_factor), 0
            for tile in row:
                with torch.no_grad():  # not around the yield, where it would reach into the caller
                    sample = run_on_tile(
                        self._decode, latents, tile, halo=self.decoder_reach, output_factor=self.spatial_factor
                    )
                strip[..., left : left + sample.shape[3]] = sample
                left += sample.shape[3]
            yield strip
            del strip  # the next one is decoded without it in memory

    def _tiles(self, size: tuple[int, int]) -> list[list[Window]]:
        return split_into_tiles(size, self.tile_edge if self.use_tiling else max(size))

    def _is_tiled(self, size: tuple[int, int]) -> bool:
        """Whether an image of `size` (h, w) latents is processed in tiles, which have no gradient."""
        return self.use_tiling and max(size) > self.tile_edge and not torch.is_grad_enabled()

    def _encode(self, sample: torch.Tensor) -> torch.Tensor:
        return self.linear_encoder(sample) + self.encoder(sample)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.linear_decoder(latents) + self.decoder(latents)

    def check_sample(self, sample: torch.Tensor) -> None:
        """Raise ValueError unless `sample` can be encoded."""
        if sample.ndim != 4 or sample.shape[1] != 3 or any(size % self.spatial_factor for size in sample.shape[2:]):
            raise ValueError(
                f"`sample` must be (B, 3, H, W) with H and W multiples of {self.spatial_factor}, "
                f"got {tuple(sample.shape)}. Pad or crop the image first."
            )

    def check_latents(self, latents: torch.Tensor) -> None:
        """Raise ValueError unless `latents` can be decoded."""
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"`latents` must be (B, {self.config.latent_channels}, h, w), got {tuple(latents.shape)}."
            )

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Encode and decode: (B, 3, H, W) in [-1, 1] to its reconstruction."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict=return_dict)

    @torch.no_grad()
    def fit_linear_code(self, blocks: torch.Tensor) -> None:
        """
        Set the linear encoder and decoder to the principal components of image blocks.

        With eigenvalues l_k and eigenvectors v_k, latent k is <v_k, x - mean> / (g l_k^(1/4)), halfway between
        whitening (1/2) and an orthonormal code (0); g makes the standard deviation over all latents 1.

        Args:
            blocks: (N, 3, 8, 8) in [-1, 1], N at least 192; tens of thousands are better.
        """
        factor, channels = self.spatial_factor, self.config.latent_channels
        if blocks.ndim != 4 or tuple(blocks.shape[1:]) != (3, factor, factor) or len(blocks) < 3 * factor**2:
            raise ValueError(
                f"`blocks` must be (N, 3, {factor}, {factor}) with N >= {3 * factor**2}, got {tuple(blocks.shape)}."
            )
        blocks = blocks.to(torch.float64)
        mean = blocks.mean(dim=(0, 2, 3))  # (3,)
        flat = (blocks - mean[:, None, None]).flatten(1)  # (N, 192)
        eigenvalues, eigenvectors = torch.linalg.eigh(flat.T @ flat / len(flat))  # ascending
        eigenvalues = eigenvalues.flip(0)[:channels].clamp_min(1e-12)
        components = eigenvectors.flip(1)[:, :channels].T  # (C, 192)
        scale = eigenvalues**0.25 * eigenvalues.sqrt().mean().sqrt()  # (C,)
        components = components.reshape(channels, 3, factor, factor)
        assert self.linear_encoder.bias is not None
        self.linear_encoder.weight.copy_(components / scale[:, None, None, None])
        self.linear_encoder.bias.copy_(-(self.linear_encoder.weight.double() * mean[:, None, None]).sum(dim=(1, 2, 3)))
        self.linear_decoder.load_state_dict({"weight": components * scale[:, None, None, None], "bias": mean})
