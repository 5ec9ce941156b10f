"""
UPLiFT in plain PyTorch: the baseline of the benchmarks.

The network for the SD1.5 VAE, written line by line from the description of the reference, without optimisation: every
encoder layer at every pixel, tensors in PyTorch's default layout, the n values of each output position gathered before
they are weighted. Parameters have the published names, so a published checkpoint loads directly, and
`uplift_diffusers.models.conversion.convert_state_dict` converts them to those of `UPLiFTModel`.
"""

import torch
import torch.nn.functional as F
from torch import nn

# (dy, dx) of the 17 values around a position, in the order of the logits.
OFFSETS = [
    *((-2, -2), (-2, 0), (-2, 2)),
    *((-1, -1), (-1, 0), (-1, 1)),
    *((0, -2), (0, -1), (0, 0), (0, 1), (0, 2)),
    *((1, -1), (1, 0), (1, 1)),
    *((2, -2), (2, 0), (2, 2)),
]


class ChannelLayerNorm(nn.LayerNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SingleConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            ChannelLayerNorm(out_channels, eps=1e-6),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 1),
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output = self.conv(hidden)
        spare = output.shape[1] - hidden.shape[1]  # a negative pad cuts
        return output + F.pad(hidden, (0, 0, 0, 0, 0, spare))


class Group(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_blocks: int):
        super().__init__()
        blocks = [SingleConv(in_channels, out_channels)]
        blocks += [SingleConv(out_channels, out_channels) for _ in range(num_blocks - 1)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.blocks(hidden)


class Encoder(nn.ModuleDict):
    def __init__(self, widths: tuple[int, ...]):
        pairs = zip((3, *widths[:-1]), widths, strict=True)
        super().__init__({f"block_{index}": Group(before, after, 2) for index, (before, after) in enumerate(pairs)})

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        maps = [image]
        for group in self.values():
            maps.append(group(maps[-1]))
        return maps[1:]


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, 2, stride=2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.up(hidden) + F.interpolate(hidden, scale_factor=2, mode="bilinear", align_corners=True)


class Decoder(nn.Module):
    def __init__(self, latent_channels: int, channels: int, guide_channels: tuple[int, int], noise_channels: int):
        super().__init__()
        self.block_0 = Group(latent_channels + guide_channels[1] + noise_channels, channels, 1)
        self.up_1 = Upsample(channels)
        self.block_1 = Group(channels + guide_channels[0] + noise_channels, channels, 2)


class Attender(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, len(OFFSETS), 1)

    def forward(self, guide: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        weights = (self.conv1(guide) + guide[:, : len(OFFSETS)]).softmax(dim=1)  # (B, n, cH, cW)
        height, width = values.shape[2:]
        padded = F.pad(values, (2, 2, 2, 2), mode="replicate")
        neighbors = torch.stack(
            [padded[:, :, 2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width] for dy, dx in OFFSETS], dim=2
        )  # (B, C, n, H, W)
        factor = guide.shape[2] // height
        neighbors = neighbors.repeat_interleave(factor, dim=3).repeat_interleave(factor, dim=4)
        return (neighbors * weights[:, None]).sum(dim=2)  # (B, C, cH, cW)


class Refiner(nn.Module):
    def __init__(self, in_channels: int, channels: int, num_blocks: int):
        super().__init__()
        self.blocks = Group(in_channels, channels, num_blocks).blocks

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.blocks(hidden)


class PlainUPLiFT(nn.Module):
    """
    The reference network for the SD1.5 VAE, 53,487,445 parameters by default.

    Args:
        encoder_channels: widths of the encoder's groups.
        channels: width of decoder and refiner.
        refiner_blocks: blocks of the refiner.
    """

    latent_channels = 4
    noise_channels = 4

    def __init__(
        self,
        encoder_channels: tuple[int, ...] = (64, 128, 256, 512, 512),
        channels: int = 512,
        refiner_blocks: int = 12,
    ):
        super().__init__()
        self.encoder = Encoder(encoder_channels)
        self.decoder = Decoder(self.latent_channels, channels, encoder_channels[-2:], self.noise_channels)
        self.attender = Attender(channels)
        self.refiner = Refiner(
            self.latent_channels + encoder_channels[-1] + self.noise_channels, channels, refiner_blocks
        )
        self.ref_outc = nn.Conv2d(channels, self.latent_channels, 1)

    def forward(
        self,
        raw_latents: torch.Tensor,
        *,
        image: torch.Tensor,
        num_steps: int = 1,
        generator: torch.Generator | None = None,
    ) -> list[torch.Tensor]:
        """
        The result of every 2x step.

        Args:
            raw_latents: (B, 4, h, w) float, unscaled.
            image: (B, 3, 8h, 8w) float in [0, 1].
            num_steps: number of 2x steps.
            generator: generator of the noise, which is drawn on its device.
        Returns:
            (B, 4, 2h, 2w), (B, 4, 4h, 4w), ...
        """
        *_, before_last, last = self.encoder(image)
        results = []
        latents = raw_latents
        for _ in range(num_steps):
            hidden = self.decoder.block_0(self._concatenate(latents, last, generator))
            hidden = self.decoder.up_1(hidden)
            hidden = self.decoder.block_1(self._concatenate(hidden, before_last, generator))
            latents = self.attender(hidden, latents)
            latents = self.ref_outc(self.refiner(self._concatenate(latents, last, generator)))
            results.append(latents)
        return results

    def _concatenate(
        self, hidden: torch.Tensor, guide: torch.Tensor, generator: torch.Generator | None
    ) -> torch.Tensor:
        batch, _, *size = hidden.shape
        guide = F.interpolate(guide, size=size, mode="nearest")
        device = generator.device if generator is not None else hidden.device
        noise = torch.randn(batch, self.noise_channels, *size, generator=generator, device=device)
        return torch.cat([hidden, guide, noise.to(hidden)], dim=1)
