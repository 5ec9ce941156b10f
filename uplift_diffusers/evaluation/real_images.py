"""The real images that a set of outputs is compared with: photographs, or what is known of their features."""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torchvision.transforms.functional import to_pil_image

from uplift_diffusers.data.sources import open_source
from uplift_diffusers.evaluation.digests import digest_bytes
from uplift_diffusers.evaluation.inception import NUM_FEATURES
from uplift_diffusers.evaluation.metrics import to_bytes
from uplift_diffusers.images.convert import read_pictures
from uplift_diffusers.images.files import open_image


@dataclass(frozen=True)
class Item:
    """
    A photograph or a prompt.

    Args:
        name: its path below its folder, or its number.
        digest: of everything that it is.
    """

    name: str
    digest: str


class Photographs:
    """
    All photographs of a source, each read once to know what it is.

    Args:
        data_dir (`str` or `Path`, *optional*): a folder, searched recursively, or tar shards, see [`open_source`].
        dataset_name (`str`, *optional*): a dataset in place of it.
        image_column (`str`): of the dataset.
        limit (`int`, *optional*): only so many, the first ones.
    Attributes:
        items: their names, which do not depend on where `data_dir` lies, and digests.
        sizes: (width, height) of each, as stored.
        modes: PIL's of each.
    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file that is no image; what is damaged further on is told of when its turn comes.
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
        places = None if data_dir is None else Path(data_dir) if Path(data_dir).is_dir() else Path(data_dir).parent
        self.items, self.sizes, self.modes = [], [], []
        for index in range(len(self.source))[:limit]:
            name, content = self.source.name(index), self.source.read(index)
            try:
                with Image.open(io.BytesIO(content)) as file:
                    self.sizes.append(file.size)
                    self.modes.append(file.mode)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise ValueError(f"{name}: not an image that can be read.") from error
            if places is not None and Path(name).is_relative_to(places):
                name = str(Path(name).relative_to(places))
            self.items.append(Item(name, digest_bytes(content)))
        self._indices = {item: index for index, item in enumerate(self.items)}

    def read(self, item: Item) -> Image.Image:
        """The photograph, upright, in RGB. Raises ValueError, with its name, where it is damaged."""
        index = self._indices[item]
        try:
            # Of any mode; PIL's conversion would clip 16 bits.
            picture = read_pictures(open_image(io.BytesIO(self.source.read(index))).image)[0]
        except ValueError as error:
            raise ValueError(f"{self.source.name(index)}: {error}") from error
        return to_pil_image(to_bytes(picture.color))


@dataclass(frozen=True)
class FeatureStatistics:
    """
    What is known of a set of images: their features, or mean and covariance of these.

    Args:
        features: (n, 2048), or None.
        patch_features: (n * patches, 2048), or None.
        mean, covariance: (2048,) and (2048, 2048), or None.
    """

    features: torch.Tensor | None = None
    patch_features: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    covariance: torch.Tensor | None = None

    @property
    def count(self) -> int | None:
        """Number of images; None where it is not known."""
        return None if self.features is None else len(self.features)

    def serves(self, metric: str) -> bool:
        """Whether "fid", "patch_fid" or "kid" can be computed from it."""
        if metric == "fid":
            return self.features is not None or self.mean is not None
        return (self.patch_features if metric == "patch_fid" else self.features) is not None


def load_statistics(path: Path) -> FeatureStatistics:
    """
    Read statistics of real images.

    Args:
        path: .safetensors or .npz (as pytorch-fid and others publish them) with `mu` and `sigma`, or with `features`.
    Raises:
        ValueError: there is something else in it.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {
                    name: torch.from_numpy(file[name]) for name in file.files if name in ("features", "mu", "sigma")
                }
        else:
            arrays = load_file(path)
    except (SafetensorError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"`real_images` must be a .safetensors or .npz file of statistics, got {path}.") from error
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if shapes.get("features", ())[1:] == (NUM_FEATURES,):
        return FeatureStatistics(features=arrays["features"])
    if shapes.get("mu") == (NUM_FEATURES,) and shapes.get("sigma") == (NUM_FEATURES, NUM_FEATURES):
        return FeatureStatistics(mean=arrays["mu"], covariance=arrays["sigma"])
    raise ValueError(
        f"`real_images` must have features (n, {NUM_FEATURES}), or mu ({NUM_FEATURES},) and sigma ({NUM_FEATURES}, "
        f"{NUM_FEATURES}), got {shapes or 'nothing'} in {path}."
    )


def centre_square(image: Image.Image, edge: int | None = None) -> Image.Image:
    """The square in the centre, of `edge` pixels or else as large as can be."""
    edge = min(image.size) if edge is None else edge
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    return image.crop((left, top, left + edge, top + edge))
