"""Photographs with labels or depths for every pixel, in the published layouts of the data sets."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from uplift_diffusers.images.files import find_image_files, open_image
from uplift_diffusers.wording import reason

IGNORED = 255
"""The class of pixels that are ignored in training and scores."""

UNKNOWN = -1

IMAGE_SIZE = 448
"""Edge in pixels: of the short side before the centre crop, and of the crop."""

# The 182 classes of COCO-Stuff in the order of their numbers, 0 to 181: first number and coarse class of every run.
_COCO_RUNS = (
    "0:9 1:11 9:8 15:7 25:6 33:10 43:5 51:2 61:3 71:0 77:1 83:4 91:17 93:22 94:20 96:22 97:15 98:25 99:16 100:13 "
    "101:12 103:17 105:23 106:15 108:17 109:15 110:21 111:15 112:25 113:13 118:22 119:26 120:14 122:15 123:22 124:21 "
    "126:24 127:20 128:22 129:15 130:17 131:16 132:15 133:22 134:24 135:21 136:17 137:25 138:16 139:21 140:17 141:22 "
    "142:16 143:21 145:25 146:21 147:26 148:21 149:24 150:20 151:17 152:14 153:21 154:26 155:15 156:23 157:20 158:21 "
    "159:24 160:15 161:24 162:22 163:25 164:15 165:20 166:17 168:22 169:14 170:18 177:26 179:19 181:24 182:"
)
_CITYSCAPES_CLASSES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The values in `labelIds` of the 19 scored classes; the other 15 are ignored."""


@dataclass(frozen=True)
class Pair:
    """A photograph and the file with the target values of its pixels."""

    name: str
    image: Path
    target: Path


@dataclass(frozen=True)
class Classes:
    """
    The meaning of the values in label files.

    Args:
        count: number of classes.
        of_value: (256,), the class of each value, `IGNORED`, or `UNKNOWN` for an invalid value.
    """

    count: int
    of_value: np.ndarray

    @classmethod
    def in_order(cls, count: int, *, ignored: Sequence[int] = (IGNORED,)) -> "Classes":
        """The values are the classes 0 to count - 1."""
        of_value = np.full(256, UNKNOWN)
        of_value[:count] = np.arange(count)
        of_value[list(ignored)] = IGNORED
        return cls(count, of_value)


class LabelledImages(Dataset):
    """
    Squares of photographs with a class for every pixel.

    The short side is scaled to `size` (bilinear, antialiased; labels nearest-exact) and the centre cropped.

    Args:
        pairs: at least one.
        classes: meaning of the values in the label files.
        size: edge in pixels.
    """

    def __init__(self, pairs: Sequence[Pair], classes: Classes, *, size: int = IMAGE_SIZE):
        self.pairs, self.classes, self.size = list(pairs), classes, size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns:
            The image, (3, size, size) float in [0, 1], and the classes, (size, size) int64.
        Raises:
            ValueError: a value is not a class, or a label has another size than its photograph.
            OSError: a file cannot be read.
        """
        pair = self.pairs[index]
        image = read_image(pair.image)
        label = torch.from_numpy(read_label(pair.target, self.classes))
        return square(image, self.size), square_target(label, image, self.size, pair).long()


class DepthImages(Dataset):
    """
    Squares of photographs with a depth for every pixel; 0 means no depth.

    Args:
        pairs: at least one; targets are .npy of floats or 16-bit .png.
        units_per_metre: unit of the values in the files.
        size: edge in pixels.
    """

    def __init__(self, pairs: Sequence[Pair], *, units_per_metre: float = 1.0, size: int = IMAGE_SIZE):
        self.pairs, self.units_per_metre, self.size = list(pairs), units_per_metre, size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The image, (3, size, size) float in [0, 1], and metres, (size, size) float32."""
        pair = self.pairs[index]
        image = read_image(pair.image)
        depth = torch.from_numpy(read_depth(pair.target)) / self.units_per_metre
        return square(image, self.size), square_target(depth, image, self.size, pair)


class Squares(Dataset):
    """Squares of photographs without targets."""

    def __init__(self, images: Sequence[Path], *, size: int = IMAGE_SIZE):
        self.images, self.size = list(images), size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        """(3, size, size) float in [0, 1]."""
        return square(read_image(self.images[index]), self.size)


def open_dataset(name: str, folder: str | Path, split: str, *, size: int = IMAGE_SIZE) -> LabelledImages:
    """
    Open a data set in its published layout.

    Args:
        name: one of `DATASETS`.
        folder: the unpacked data set.
        split: "train" or "val"; for CamVid, "val" is the published test split, as in the literature.
        size: edge of the squares in pixels.
    Raises:
        FileNotFoundError: the layout is different, or a photograph has no label.
        ValueError: the name is unknown.
    """
    if name not in DATASETS:
        raise ValueError(f"`dataset` must be one of {tuple(DATASETS)}, got {name!r}.")
    find_pairs, classes = DATASETS[name]
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"`data_dir` must be a folder, got {folder}.")
    return LabelledImages(find_pairs(Path(folder), split), classes(), size=size)


def pair_folders(images: str | Path, targets: str | Path, *, suffixes: Sequence[str] = (".png",)) -> list[Pair]:
    """
    Pair the photographs below one folder with the files of the same relative name below another.

    Suffixes are lower case or upper case, as those of photographs.

    Raises:
        FileNotFoundError: a folder is missing or empty, the two do not match, or a photograph has no target.
    """
    images, targets = Path(images), Path(targets)
    for folder in (images, targets):
        if not folder.is_dir():
            raise FileNotFoundError(f"`{folder}` is not a folder.")
    found = find_photographs(images)
    pairs, missing = [], []
    for image in found:
        name = image.relative_to(images).with_suffix("")
        spellings = [spelling for suffix in suffixes for spelling in (suffix, suffix.upper())]
        candidates = [path for suffix in spellings if (path := targets / f"{name}{suffix}").is_file()]
        pairs += [Pair(str(name), image, path) for path in candidates[:1]]
        missing += [] if candidates else [str(name)]
    if not pairs:
        raise FileNotFoundError(
            f"`{targets}` must hold a file for each photograph of `{images}`, with the same name and ending in "
            f"{' or '.join(suffixes)}, got none that matches, such as {missing[0]}{suffixes[0]}."
        )
    if missing:
        raise FileNotFoundError(
            f"`{targets}` must hold a file for each photograph, got none for {len(missing)} of {len(found)}, the "
            f"first of them {missing[0]}."
        )
    return pairs


def find_photographs(folder: str | Path) -> list[Path]:
    """
    All image files below a folder, sorted.

    Raises:
        FileNotFoundError: there are none.
    """
    if found := find_image_files(Path(folder)).files:
        return list(found)
    raise FileNotFoundError(f"`{folder}` must hold photographs, got none.")


def read_image(path: Path) -> torch.Tensor:
    """(3, H, W) float in [0, 1]."""
    try:
        image = open_image(path).image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"`{path}`: {error}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def read_label(path: Path, classes: Classes) -> np.ndarray:
    """
    (H, W) uint8, the class of every pixel.

    Raises:
        ValueError: the file is damaged, not a label image, or has values that are not classes.
    """
    with _naming(path), Image.open(path) as file:
        values = np.array(file)  # of a palette image its indices
    if values.ndim != 2 or values.dtype.kind not in "uib":
        raise ValueError(f"`{path}` must have one whole number per pixel, got an image of mode {file.mode}.")
    values = values.astype(np.int64)
    known = (values >= 0) & (values < 256)
    mapped = np.where(known, classes.of_value[np.where(known, values, 0)], UNKNOWN)
    if (mapped == UNKNOWN).any():
        raise ValueError(
            f"`{path}` must have labels of the {classes.count} classes, got the value {values[mapped == UNKNOWN][0]}."
        )
    return mapped.astype(np.uint8)


def read_depth(path: Path) -> np.ndarray:
    """
    (H, W) float32 in the file's units; values that are negative or not finite become 0.

    Raises:
        ValueError: the file is damaged, or has another shape.
    """
    with _naming(path):
        if path.suffix.lower() == ".npy":
            depth = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as file:
                depth = np.array(file)
    if depth.ndim != 2:
        raise ValueError(f"`{path}` must have one depth per pixel, got the shape {depth.shape}.")
    depth = depth.astype(np.float32)
    return np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in the errors of Pillow and numpy, which are of many kinds for a damaged file."""
    try:
        yield
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise ValueError(f"`{path}` must be a file that can be read, got: {reason(error)}") from error


def square(image: torch.Tensor, size: int) -> torch.Tensor:
    """(3, H, W) -> (3, size, size): the short side scaled, the centre cropped."""
    scaled = F.interpolate(image[None], size=_scaled(image.shape[1:], size), mode="bilinear", antialias=True)[0]
    return _centre(scaled, size)


def square_target(target: torch.Tensor, image: torch.Tensor, size: int, pair: Pair) -> torch.Tensor:
    """(H, W) -> (size, size), as `square` but without mixing values."""
    if target.shape != image.shape[1:]:
        raise ValueError(
            f"`{pair.target}` must have the size of its photograph, {tuple(image.shape[1:])}, "
            f"got {tuple(target.shape)}."
        )
    values = target[None, None].float()
    scaled = F.interpolate(values, size=_scaled(image.shape[1:], size), mode="nearest-exact")[0, 0]
    return _centre(scaled, size).to(target.dtype)


def _scaled(shape: Sequence[int], size: int) -> tuple[int, int]:
    height, width = shape
    short = min(height, width)
    return max(size, round(height * size / short)), max(size, round(width * size / short))


def _centre(x: torch.Tensor, size: int) -> torch.Tensor:
    top, left = (x.shape[-2] - size) // 2, (x.shape[-1] - size) // 2
    return x[..., top : top + size, left : left + size]


def _first_folder(*candidates: Path) -> Path:
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"`data_dir` must be in its published layout, got no folder `{candidates[0]}`.")


def _voc(folder: Path, split: str) -> list[Pair]:
    root = _first_folder(folder / "VOCdevkit" / "VOC2012", folder / "VOC2012", folder)
    names = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not names.is_file():
        raise FileNotFoundError(f"`data_dir` must be in VOC's published layout, got no file `{names}`.")
    pairs = [
        Pair(name, root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png")
        for name in names.read_text().split()
    ]
    for pair in pairs:
        for path in (pair.image, pair.target):
            if not path.is_file():
                raise FileNotFoundError(f"`{path}` must be there for the list {names.name}, got no such file.")
    return pairs


def _ade20k(folder: Path, split: str) -> list[Pair]:
    root = _first_folder(folder / "ADEChallengeData2016", folder)
    part = {"train": "training", "val": "validation"}[split]
    return pair_folders(_first_folder(root / "images" / part), _first_folder(root / "annotations" / part))


def _cityscapes(folder: Path, split: str) -> list[Pair]:
    images, targets = _first_folder(folder / "leftImg8bit" / split), _first_folder(folder / "gtFine" / split)
    pairs = []
    for image in find_photographs(images):
        name = str(image.relative_to(images).with_suffix("")).removesuffix("_leftImg8bit")
        target = targets / f"{name}_gtFine_labelIds.png"
        if not target.is_file():
            raise FileNotFoundError(f"`{target}` must be there for its photograph, got no such file.")
        pairs.append(Pair(name, image, target))
    return pairs


def _cocostuff(folder: Path, split: str) -> list[Pair]:
    part = f"{split}2017"
    images = _first_folder(folder / "images" / part, folder / part)
    places = ("annotations", "stuffthingmaps", "stuffthingmaps_trainval2017", "")
    return pair_folders(images, _first_folder(*(folder / place / part for place in places)))


def _camvid(folder: Path, split: str) -> list[Pair]:
    part = {"train": "train", "val": "test"}[split]
    return pair_folders(_first_folder(folder / part), _first_folder(folder / f"{part}annot"))


def _cityscapes_classes() -> Classes:
    of_value = np.full(256, UNKNOWN)
    of_value[:34] = IGNORED
    of_value[255] = IGNORED  # -1, the licence plate
    of_value[list(_CITYSCAPES_CLASSES)] = np.arange(len(_CITYSCAPES_CLASSES))
    return Classes(len(_CITYSCAPES_CLASSES), of_value)


def _cocostuff_classes() -> Classes:
    runs = [run.split(":") for run in _COCO_RUNS.split()]
    of_value = np.full(256, UNKNOWN)
    for (start, coarse), (stop, _) in zip(runs, runs[1:]):
        of_value[int(start) : int(stop)] = int(coarse)
    of_value[IGNORED] = IGNORED
    return Classes(27, of_value)


DATASETS: dict[str, tuple[Callable[[Path, str], list[Pair]], Callable[[], Classes]]] = {
    "voc": (_voc, lambda: Classes.in_order(21)),
    "ade20k": (_ade20k, lambda: Classes.in_order(151)),  # 0, "other", counts: so the published figures do it
    "cityscapes": (_cityscapes, _cityscapes_classes),
    "cocostuff27": (_cocostuff, _cocostuff_classes),
    "camvid": (_camvid, lambda: Classes.in_order(11, ignored=(11, IGNORED))),
}
"""By name: how photographs and labels are found, and what the labels mean."""
