"""The super-resolution protocol: photographs reduced by whole factors, enlarged by every method, compared with
themselves."""

from pathlib import Path

import torch
from PIL import Image

from uplift_diffusers.evaluation.digests import digest
from uplift_diffusers.evaluation.methods import Sample, to_tensor
from uplift_diffusers.evaluation.metrics import preview, to_bytes
from uplift_diffusers.evaluation.real_images import Item, Photographs, centre_square

GREYSCALE_MODES = ("1", "L", "LA", "La", "I", "F")


class SuperResolution:
    """
    Photographs, cut to centre crops at their own resolution and reduced as Pillow does (bicubic, antialiased, 8 bits).

    Args:
        photographs (`Photographs`, `str` or `Path`): the photographs, or the folder where they are.
        scales (`tuple[int, ...]`): whole factors.
        crop (`int`): edge of the crops in pixels.
        multiple (`int`): of which the reduced crops' edge must be one, the VAE's spatial factor.
        allow_greyscale (`bool`): measure greyscale photographs as RGB with equal channels.
    Raises:
        FileNotFoundError: no folder, or no photograph in it.
        ValueError: a photograph that is no image, too small or greyscale, or a crop that does not suit the scales.
    """

    name = "super-resolution"
    paired = True
    statistics = None

    def __init__(
        self,
        photographs: Photographs | str | Path,
        *,
        scales: tuple[int, ...],
        crop: int,
        multiple: int = 1,
        allow_greyscale: bool = False,
    ):
        for scale in scales:
            if crop < 1 or crop % (scale * multiple):
                raise ValueError(
                    f"`crop` must be a multiple of {scale * multiple} for {scale}x, got {crop}. The reduced crop is "
                    f"encoded in blocks of {multiple} pixels."
                )
        self.scales, self.crop, self.multiple = tuple(scales), crop, multiple
        self.photographs = photographs if isinstance(photographs, Photographs) else Photographs(photographs)
        self._check_photographs(allow_greyscale)
        self.items = self.real_items = self.photographs.items
        self.real_count, self.real_edge = len(self.items), crop
        self.real_digest = digest([item.digest for item in self.items])
        self.identity = self.real_identity = {"protocol": self.name, "crop": crop}

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
        """Nothing: the photographs are there."""

    def outline(self) -> list[Sample]:
        """All samples, without their images."""
        size = (self.crop, self.crop)
        return [Sample(name=item.name, scale=scale, size=size) for item in self.items for scale in self.scales]

    def sample(self, item: Item, scale: int) -> Sample:
        """The photograph `item`, reduced by `scale`."""
        return _reduced(self._crop(item), name=item.name, scale=scale)

    def timing_sample(self, *, scale: int, edge: int) -> Sample:
        """The first photograph such that the output has `edge` pixels."""
        crop = self._crop(self.items[0])
        return _reduced(crop.resize((edge, edge), Image.BICUBIC), name=f"{edge} px", scale=scale)

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


def _reduced(crop: Image.Image, *, name: str, scale: int) -> Sample:
    small = crop.resize((crop.width // scale, crop.height // scale), Image.BICUBIC)
    return Sample(name=name, scale=scale, size=(crop.height, crop.width), image=small, truth=to_tensor(crop))
