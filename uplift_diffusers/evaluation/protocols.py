"""
What is enlarged, and what the outputs are compared with.

`SuperResolution` reduces photographs, and the outputs are compared with the photographs. `TextToImage` has Stable
Diffusion make the latents of prompts, and the outputs are compared with a set of real images.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from tqdm.auto import tqdm

from uplift_diffusers.data.sources import open_source
from uplift_diffusers.evaluation.metrics import preview, to_bytes, to_tensor
from uplift_diffusers.evaluation.records import (
    Entry,
    RecordStore,
    digest,
    digest_bytes,
    digest_configs,
    digest_weights,
    versions,
)
from uplift_diffusers.evaluation.statistics import load_statistics
from uplift_diffusers.images.convert import read_pictures
from uplift_diffusers.images.files import open_image
from uplift_diffusers.latent_space import LatentSpace

GREYSCALE_MODES = ("1", "L", "LA", "La", "I", "F")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """
    What a method is given: an image or the latents of one.

    Args:
        name: path of the photograph below its folder, or number of the prompt.
        scale: whole factor.
        size: (height, width) in pixels of the output.
        image: RGB, `size` reduced by `scale`, where the photographs are reduced. With a JPEG protocol it has the
            `format` and `quantization` of the JPEG file.
        latents: (1, C, h, w), scaled, where Stable Diffusion made them.
        truth: (1, 3, height, width) in [0, 1], the photograph that `image` was; only `vae_round_trip` may look at it.
    """

    name: str
    scale: int
    size: tuple[int, int]
    image: Image.Image | None = None
    latents: torch.Tensor | None = None
    truth: torch.Tensor | None = None


@dataclass(frozen=True)
class Item:
    """
    A photograph or a prompt.

    Args:
        name: its path below its folder, or its number.
        digest: of everything that it is, 16 hexadecimal digits.
    """

    name: str
    digest: str


class PhotographFiles:
    """
    All photographs of a source, each read once to know what it is.

    Args:
        data_dir (`str` or `Path`, *optional*): a folder, searched recursively, or tar shards, as in [`open_source`].
        dataset_name (`str`, *optional*): a dataset in place of it.
        image_column (`str`): of the dataset.
        limit (`int`, *optional*): only so many, the first ones.
    Attributes:
        items: their names, which do not depend on where `data_dir` lies, and digests.
        sizes: (width, height) of each, as stored.
        modes: Pillow's modes of each.
    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file that is no image. Damage beyond a file's header is found when the file is read.
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        *,
        dataset_name: str | None = None,
        image_column: str = "image",
        limit: int | None = None,
    ):
        self.source = open_source(data_dir, dataset_name=dataset_name, image_column=image_column)
        if self.source.unreadable:
            raise ValueError(self.source.unreadable[0])
        root = None if data_dir is None else Path(data_dir) if Path(data_dir).is_dir() else Path(data_dir).parent
        self.items, self.sizes, self.modes = [], [], []
        for index in range(len(self.source))[:limit]:
            name, content = self.source.name(index), self.source.read(index)
            try:
                with Image.open(io.BytesIO(content)) as file:
                    self.sizes.append(file.size)
                    self.modes.append(file.mode)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise ValueError(f"{name}: not an image that can be read.") from error
            if root is not None and Path(name).is_relative_to(root):
                name = str(Path(name).relative_to(root))
            self.items.append(Item(name, digest_bytes(content)))
        self._indices = {item: index for index, item in enumerate(self.items)}

    def read(self, item: Item) -> Image.Image:
        """The photograph, upright, in RGB. Raises ValueError, with its name, where it is damaged."""
        index = self._indices[item]
        try:
            # Of any mode; Pillow's conversion would clip 16 bits.
            picture = read_pictures(open_image(io.BytesIO(self.source.read(index))).image)[0]
        except ValueError as error:
            raise ValueError(f"{self.source.name(index)}: {error}") from error
        return to_pil_image(to_bytes(picture.color))


class SuperResolution:
    """
    Photographs, cut to centre crops at their own resolution and reduced as Pillow does (bicubic, antialiased, 8 bits).

    Args:
        photographs (`PhotographFiles`, `str` or `Path`): the photographs, or the folder where they are.
        scales (`tuple[int, ...]`): whole factors.
        crop (`int`): edge of the crops in pixels.
        multiple (`int`): of which the reduced crops' edge must be one, the VAE's spatial factor.
        jpeg_quality (`int`, *optional*): from 1 to 100: the reduced crops are compressed by Pillow as JPEGs of this
            quality before any method sees them.
        allow_greyscale (`bool`): measure greyscale photographs as RGB with equal channels.
    Raises:
        FileNotFoundError: no folder, or no photograph in it.
        ValueError: a photograph that is no image, too small or greyscale, a crop that does not suit the scales, or
            another JPEG quality.
    """

    name = "super-resolution"
    paired = True
    statistics = None

    def __init__(
        self,
        photographs: PhotographFiles | str | Path,
        *,
        scales: tuple[int, ...],
        crop: int,
        multiple: int = 1,
        jpeg_quality: int | None = None,
        allow_greyscale: bool = False,
    ):
        for scale in scales:
            if crop < 1 or crop % (scale * multiple):
                raise ValueError(
                    f"`crop` must be a multiple of {scale * multiple} for {scale}x, got {crop}. The reduced crop is "
                    f"encoded in blocks of {multiple} pixels."
                )
        if jpeg_quality is not None and not 1 <= jpeg_quality <= 100:
            raise ValueError(f"`jpeg_quality` must be from 1 to 100, got {jpeg_quality}.")
        self.scales, self.crop, self.multiple, self.jpeg_quality = tuple(scales), crop, multiple, jpeg_quality
        self.photographs = photographs if isinstance(photographs, PhotographFiles) else PhotographFiles(photographs)
        self._check_photographs(allow_greyscale)
        self.items = self.real_items = self.photographs.items
        self.real_count, self.real_edge = len(self.items), crop
        self.real_digest = digest([item.digest for item in self.items])
        self.identity = self.real_identity = {"protocol": self.name, "crop": crop}
        if jpeg_quality is not None:
            self.identity = {**self.real_identity, "jpeg_quality": jpeg_quality}

    def _check_photographs(self, allow_greyscale: bool) -> None:
        items, sizes, modes = self.photographs.items, self.photographs.sizes, self.photographs.modes
        small = [(item, size) for item, size in zip(items, sizes, strict=True) if min(size) < self.crop]
        if small:
            item, (width, height) = small[0]
            raise ValueError(
                f"`crop` must fit into every photograph, got {self.crop} and {len(small)} smaller ones, such as "
                f"{item.name} of {width} x {height}."
            )
        grey = [item for item, mode in zip(items, modes, strict=True) if mode.split(";")[0] in GREYSCALE_MODES]
        if grey and not allow_greyscale:
            raise ValueError(
                f"The photographs must be in colour, got {len(grey)} in greyscale, such as {grey[0].name}. Take them "
                "out, or pass --allow_greyscale to measure them as RGB with equal channels."
            )

    def prepare(self, *, rank: int, world_size: int) -> None:
        """Do nothing: the photographs are there."""

    def outline(self) -> list[Sample]:
        """All samples, without their images."""
        size = (self.crop, self.crop)
        return [Sample(name=item.name, scale=scale, size=size) for item in self.items for scale in self.scales]

    def sample(self, item: Item, scale: int) -> Sample:
        """The photograph `item`, reduced by `scale`."""
        return self._reduced(self._crop(item), name=item.name, scale=scale)

    def timing_sample(self, *, scale: int, edge: int) -> Sample:
        """The first photograph such that the output has `edge` pixels."""
        crop = self._crop(self.items[0])
        return self._reduced(crop.resize((edge, edge), Image.Resampling.BICUBIC), name=f"{edge} px", scale=scale)

    def output_edge(self, scale: int) -> int:
        """Pixels of the outputs."""
        return self.crop

    def real_pixels(self, item: Item) -> torch.Tensor:
        """(1, 3, crop, crop) uint8, the photograph itself."""
        return to_bytes(to_tensor(self._crop(item)))

    def previews(self, rows: list[int]) -> list[torch.Tensor]:
        """The centres of the photographs, as records keep them of outputs."""
        return [preview(self.real_pixels(self.items[row])) for row in rows]

    def _crop(self, item: Item) -> Image.Image:
        return centre_square(self.photographs.read(item), self.crop)

    def _reduced(self, crop: Image.Image, *, name: str, scale: int) -> Sample:
        small = crop.resize((crop.width // scale, crop.height // scale), Image.Resampling.BICUBIC)
        if self.jpeg_quality is not None:
            small = _as_jpeg(small, self.jpeg_quality)
        return Sample(name=name, scale=scale, size=(crop.height, crop.width), image=small, truth=to_tensor(crop))


class TextToImage:
    """
    Prompts, the latents that a Stable Diffusion makes of them, and real images to compare the outputs with.

    The latents of every prompt are kept in a record each: they are made once, whatever is measured on them.

    Args:
        prompts (`list[str]`): what to make.
        pipeline ([`DiffusionPipeline`]): a Stable Diffusion, on the device where it is to run.
        store ([`RecordStore`]): where the latents are kept.
        real_images (`str` or `Path`): folder or tar shards of photographs, of which the centre squares are taken; or
            a file of statistics, as in [`load_statistics`].
        scales (`tuple[int, ...]`): whole factors.
        seed (`int`): prompt number i starts from noise of the seed `seed + i`.
        num_inference_steps (`int`), guidance_scale (`float`): of the denoising.
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
        store: RecordStore,
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
        self.prompts, self.pipeline, self.store = prompts, pipeline, store
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
        self.photographs = PhotographFiles(real_images)
        self.real_items = self.photographs.items
        self.real_count, self.real_edge = len(self.real_items), min(map(min, self.photographs.sizes))
        self.real_digest = digest([item.digest for item in self.real_items])

    def prepare(self, *, rank: int, world_size: int) -> None:
        """Make the latents of this process's share of the prompts, as far as they are not there."""
        self.pipeline.set_progress_bar_config(disable=True)
        denoise: Any = self.pipeline  # what all pipelines have in common is not callable
        share = [item for item in self.items[rank::world_size] if not self.store.holds(_latents_entry(item))]
        for item in tqdm(share, unit="prompt", desc="Stable Diffusion", disable=None if rank == 0 else True):
            index = int(item.name)
            generator = torch.Generator().manual_seed(self.seed + index)
            output = denoise(self.prompts[index], generator=generator, output_type="latent", **self.denoising)
            self.store.write(_latents_entry(item), {"latents": output.images.float()})

    def outline(self) -> list[Sample]:
        """All samples, without their latents."""
        sizes = {scale: (self.output_edge(scale), self.output_edge(scale)) for scale in self.scales}
        return [Sample(name=item.name, scale=scale, size=sizes[scale]) for item in self.items for scale in self.scales]

    def sample(self, item: Item, scale: int) -> Sample:
        """The latents of the prompt `item`."""
        return self._sample(self.store.read(_latents_entry(item))["latents"], name=item.name, scale=scale)

    def timing_sample(self, *, scale: int, edge: int) -> Sample:
        """Noise in place of latents such that the output has `edge` pixels: the time does not depend on content."""
        length = edge // (scale * self.space.spatial_factor)
        latents = torch.randn(1, self.space.channels, length, length, generator=torch.Generator().manual_seed(0))
        return self._sample(latents, name=f"{edge} px", scale=scale)

    def output_edge(self, scale: int) -> int:
        """Pixels of the outputs."""
        return self.pipeline.unet.config.sample_size * self.space.spatial_factor * scale

    def real_pixels(self, item: Item) -> torch.Tensor:
        """(1, 3, H, H) uint8, the centre square of a photograph at its own resolution."""
        assert self.photographs is not None  # `item` is one of them
        return to_bytes(to_tensor(centre_square(self.photographs.read(item))))

    def previews(self, rows: list[int]) -> None:
        """None: there is no photograph of a prompt."""

    def _sample(self, latents: torch.Tensor, *, name: str, scale: int) -> Sample:
        size = (latents.shape[2] * self.multiple * scale, latents.shape[3] * self.multiple * scale)
        return Sample(name=name, scale=scale, size=size, latents=latents)


def centre_square(image: Image.Image, edge: int | None = None) -> Image.Image:
    """The square in the centre, of `edge` pixels or as large as the image allows."""
    edge = min(image.size) if edge is None else edge
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    return image.crop((left, top, left + edge, top + edge))


def read_prompts(path: str | Path, *, limit: int | None = None) -> list[str]:
    """
    Read prompts, in any script.

    Args:
        path: a .json file of captions as COCO publishes them, of which every image gives its first one, in the order
            of their ids; or any other text file in UTF-8 with a prompt on every line that is not empty.
        limit: only the first so many.
    Raises:
        FileNotFoundError: no such file.
        ValueError: another encoding, another kind of JSON, or no prompt in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`prompts` must be a file, got {str(path)!r}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`prompts` must be in UTF-8, got another encoding in {path}. Save it as UTF-8.") from error
    prompts = _coco_captions(text, path) if path.suffix == ".json" else text.split("\n")
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"`prompts` must hold at least one prompt, got none in {path}.")
    return prompts[:limit]


def _coco_captions(text: str, path: Path) -> list[str]:
    try:
        annotations = json.loads(text)["annotations"]
        first: dict[int, str] = {}
        for annotation in sorted(annotations, key=lambda annotation: (annotation["image_id"], annotation["id"])):
            first.setdefault(annotation["image_id"], str(annotation["caption"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`prompts` must be COCO captions where it is JSON (annotations with image_id, id and caption), got "
            f"something else in {path}."
        ) from error
    return list(first.values())


def _as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """`image` after compression, with the `format` and `quantization` of the JPEG file that it was read from."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    jpeg = Image.open(file)
    jpeg.load()
    return jpeg


def _latents_entry(item: Item) -> Entry:
    return Entry("latents", item.name, {"latents": item.digest})
