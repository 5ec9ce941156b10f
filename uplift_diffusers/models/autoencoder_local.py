"""A small, strictly local autoencoder: a linear block code plus convolutional residuals on both sides."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from uplift_diffusers.models.blocks import run_trimmed
from uplift_diffusers.models.window import NO_MARGINS, Margins, trim


class ResidualBlock(nn.Module):
    """x + conv3x3(relu(conv3x3(x))); no norm, so that an output depends on its neighbourhood alone."""

    reach = 2

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.conv2(torch.relu(self.conv1(hidden)))


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
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    @property
    def reach(self) -> int:
        """Latents to each side whose pixels an output depends on."""
        fine = 1 + sum(block.reach for block in self.fine)
        coarse = 1 + sum(block.reach for block in self.coarse)
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
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    @property
    def fine_reach(self) -> int:
        """Latents to each side on which an output depends by the layers after the 2x."""
        positions = 1 + sum(block.reach for block in self.fine)
        return -(-positions // 2)

    @property
    def reach(self) -> int:
        """Latents to each side on which an output depends."""
        return 1 + sum(block.reach for block in self.coarse) + self.fine_reach

    def forward(self, latents: torch.Tensor, margins: Margins = NO_MARGINS) -> torch.Tensor:
        """(B, latent_channels, h, w) -> (B, 3, 8h, 8w) without `margins`, which are in latents."""
        kept = tuple(min(margin, self.fine_reach) for margin in margins)
        cut = tuple(margin - keep for margin, keep in zip(margins, kept))
        hidden = latents.contiguous(memory_format=torch.channels_last)
        hidden = run_trimmed([self.conv_in, *self.coarse], hidden, cut)  # (B, coarse, h, w)
        hidden = self.upsample(hidden)  # (B, fine, 2h, 2w)
        hidden = run_trimmed([*self.fine, self.conv_out], hidden, tuple(2 * keep for keep in kept))
        return self.shuffle(hidden)


class AutoencoderLocal(ModelMixin, ConfigMixin):
    r"""
    The autoencoder of the embedded bundle, with the interface of diffusers' deterministic autoencoders.

    The code is linear at its core: an 8x8 convolution with stride 8 and its transpose, which [`fit_linear_code`]
    sets to the principal components of 8x8 RGB blocks. A convolutional encoder and decoder stand beside it, start at
    zero, and learn what the linear code cannot say. There is no attention and no norm over space, so every output
    pixel depends on a bounded neighbourhood of the input.

    Args:
        latent_channels (`int`): channels of the latents.
        block_out_channels (`tuple[int, int]`): width of the convolutional parts at 1/4 and at 1/8 of the resolution.
        encoder_layers_per_block (`tuple[int, int]`): residual blocks of the encoder at 1/4 and at 1/8.
        decoder_layers_per_block (`tuple[int, int]`): residual blocks of the decoder at 1/4 and at 1/8.
        scaling_factor (`float`): multiplies raw latents to give latents of unit standard deviation.
        latent_space (`str`): the name under which upsamplers ask for these latents.
    """

    spatial_factor = 8

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

    @property
    def encoder_reach(self) -> int:
        """Latents to each side whose pixels a latent depends on: the halo of an exactly encoded tile."""
        return self.encoder.reach

    @property
    def decoder_reach(self) -> int:
        """Latents to each side on which the pixels of a latent depend: the halo of an exactly decoded tile."""
        return self.decoder.reach

    @apply_forward_hook
    def encode(self, sample: torch.Tensor, return_dict: bool = True) -> EncoderOutput | tuple[torch.Tensor]:
        """Encode (B, 3, H, W) in [-1, 1], H and W multiples of 8, to raw latents (B, C, H/8, W/8)."""
        self.check_sample(sample)
        latent = self.linear_encoder(sample) + self.encoder(sample)
        return EncoderOutput(latent=latent) if return_dict else (latent,)

    @apply_forward_hook
    def decode(
        self, latents: torch.Tensor, return_dict: bool = True, *, margins: Margins = NO_MARGINS
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """
        Decode raw latents (B, C, h, w) to (B, 3, 8h, 8w), about [-1, 1], not clamped.

        Args:
            margins: latents at the top, bottom, left and right that are there as neighbours and are not decoded.
        """
        self.check_latents(latents)
        sample = self.linear_decoder(trim(latents, margins)) + self.decoder(latents, margins)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

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
        return self.decode(self.encode(sample).latent, return_dict=return_dict)

    @torch.no_grad()
    def fit_linear_code(self, blocks: torch.Tensor) -> None:
        """
        Set the linear encoder and decoder to the principal components of image blocks.

        With eigenvalues l_k and eigenvectors v_k, latent k is <v_k, x - mean> / (g l_k^(1/4)), half way between
        whitening (1/2) and an orthonormal code (0); g makes the standard deviation over all latents 1.

        Args:
            blocks: (N, 3, 8, 8) in [-1, 1], N at least 192 and better tens of thousands.
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
        self.linear_encoder.weight.copy_(components / scale[:, None, None, None])
        self.linear_encoder.bias.copy_(-(self.linear_encoder.weight.double() * mean[:, None, None]).sum(dim=(1, 2, 3)))
        self.linear_decoder.weight.copy_(components * scale[:, None, None, None])
        self.linear_decoder.bias.copy_(mean)
