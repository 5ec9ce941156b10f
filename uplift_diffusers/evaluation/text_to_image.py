"""The text-to-image protocol: Stable Diffusion makes the latents of every prompt once, every method enlarges them."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save
from tqdm.auto import tqdm

from uplift_diffusers.evaluation.digests import digest, digest_bytes, digest_configs, digest_weights, versions
from uplift_diffusers.evaluation.methods import Sample, to_tensor
from uplift_diffusers.evaluation.metrics import to_bytes
from uplift_diffusers.evaluation.real_images import Item, Photographs, centre_square, load_statistics
from uplift_diffusers.evaluation.records import write_whole
from uplift_diffusers.latent_space import LatentSpace


class TextToImage:
    """
    Prompts, the latents that a Stable Diffusion makes of them, and real images to compare the outputs with.

    The latents of every prompt are kept in a file each: they are made once, whatever is measured on them.

    Args:
        prompts (`list[str]`): what to make.
        pipeline ([`DiffusionPipeline`]): a Stable Diffusion, on the device where it is to run.
        folder (`Path`): where the latents are kept.
        real_images (`str` or `Path`): folder or tar shards of photographs, of which the centre squares are taken; or
            a file of statistics, see [`load_statistics`].
        scales (`tuple[int, ...]`): whole factors.
        seed (`int`): prompt number i starts from noise of the seed `seed + i`.
        num_inference_steps, guidance_scale: of the denoising.
    Raises:
        FileNotFoundError: no real images.
        ValueError: a pipeline that is no latent diffusion.
    """

    name = "text-to-image"
    paired = False

    def __init__(
        self,
        prompts: list[str],
        *,
        pipeline: DiffusionPipeline,
        folder: Path,
        real_images: str | Path,
        scales: tuple[int, ...],
        seed: int = 0,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
    ):
        if not hasattr(pipeline, "vae") or not hasattr(pipeline, "unet"):
            raise ValueError(
                f"`stable_diffusion` must be a pipeline with a U-Net and a VAE, got a {type(pipeline).__name__}."
            )
        self.prompts, self.pipeline, self.folder = prompts, pipeline, folder
        self.scales, self.seed = tuple(scales), seed
        self.denoising = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        self.space = LatentSpace.of(pipeline.vae)
        self.multiple = self.space.spatial_factor
        networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        self.identity = {
            "protocol": self.name,
            "stable_diffusion": digest_weights(networks),
            "configurations": digest_configs({"pipeline": pipeline, **pipeline.components}),
            "seed": seed,
            **self.denoising,
        }
        self.real_identity = {"protocol": self.name, "real_images": "centre squares"}
        made_by = digest([self.identity, versions(), pipeline.device.type])
        self.items = [Item(f"{index:05d}", digest([prompt, index, made_by])) for index, prompt in enumerate(prompts)]

        self.photographs, self.statistics, self.real_items, self.real_edge = None, None, [], None
        if Path(real_images).suffix in (".npz", ".safetensors"):
            self.statistics = load_statistics(Path(real_images))
            self.real_count, self.real_digest = self.statistics.count, digest_bytes(Path(real_images).read_bytes())
            return
        self.photographs = Photographs(real_images)
        self.real_items = self.photographs.items
        self.real_count, self.real_edge = len(self.real_items), min(map(min, self.photographs.sizes))
        self.real_digest = digest([item.digest for item in self.real_items])

    def prepare(self, *, rank: int, world_size: int) -> None:
        """Make the latents of this process's share of the prompts, as far as they are not there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pipeline.set_progress_bar_config(disable=True)
        share = [index for index in range(rank, len(self.items), world_size) if not self._path(index).is_file()]
        for index in tqdm(share, unit="prompt", desc="Stable Diffusion", disable=None if rank == 0 else True):
            generator = torch.Generator().manual_seed(self.seed + index)
            latents = self.pipeline(
                self.prompts[index], generator=generator, output_type="latent", **self.denoising
            ).images
            write_whole(self._path(index), save({"latents": latents.float().cpu().contiguous()}))

    def outline(self) -> list[Sample]:
        """All samples, without their latents."""
        return [
            Sample(name=item.name, scale=scale, size=(self.output_edge(scale),) * 2)
            for item in self.items
            for scale in self.scales
        ]

    def sample(self, item: Item, scale: int) -> Sample:
        """The latents of the prompt `item`."""
        latents = load_file(self._path(int(item.name)))["latents"]
        return self._sample(latents, name=item.name, scale=scale)

    def timing_sample(self, *, scale: int, edge: int) -> Sample:
        """Noise in place of latents such that the output has `edge` pixels: content costs no time."""
        length = edge // (scale * self.space.spatial_factor)
        latents = torch.randn(1, self.space.channels, length, length, generator=torch.Generator().manual_seed(0))
        return self._sample(latents, name=f"{edge} px", scale=scale)

    def output_edge(self, scale: int) -> int:
        """Pixels of the outputs."""
        return self.pipeline.unet.config.sample_size * self.space.spatial_factor * scale

    def real_pixels(self, item: Item) -> torch.Tensor:
        """(1, 3, H, H) uint8, the centre square of a photograph at its own resolution."""
        return to_bytes(to_tensor(centre_square(self.photographs.read(item))))

    def previews(self, rows: list[int]) -> None:
        """None: there is no photograph of a prompt."""

    def _path(self, index: int) -> Path:
        item = self.items[index]
        return self.folder / f"{item.name}-{item.digest}.safetensors"

    def _sample(self, latents: torch.Tensor, *, name: str, scale: int) -> Sample:
        size = tuple(length * self.space.spatial_factor * scale for length in latents.shape[2:])
        return Sample(name=name, scale=scale, size=size, latents=latents)
