"""Image files: found, opened under a size limit, and saved whole or not at all."""

import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_INPUT_PIXELS = 100_000_000
"""Pixels of the largest image that is opened."""

INPUT_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
"""What counts as an image in a folder."""

OUTPUT_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
"""Pillow's name of the format that a suffix stands for."""

MAX_EDGES = {"JPEG": 65_500, "WEBP": 16_383}
"""Pixels of the longest edge that a format holds, where that can be too few."""

# A TIFF stays uncompressed: Pillow compresses it by libtiff, which takes no EXIF directory.
_SAVE_OPTIONS = {
    "JPEG": {"quality": 95, "subsampling": "4:4:4"},
    "WEBP": {"quality": 95},
}
_OPAQUE_FORMATS = ("JPEG", "BMP")  # Pillow writes a 32-bit BMP, but hardly anything reads its fourth channel as alpha
_EIGHT_BIT_FORMATS = ("JPEG", "WEBP", "BMP")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation. Pillow turns anticlockwise."""

_KEPT_EXIF = frozenset(
    (
        ExifTags.Base.ImageDescription,
        ExifTags.Base.Make,
        ExifTags.Base.Model,
        ExifTags.Base.Software,
        ExifTags.Base.DateTime,
        ExifTags.Base.Artist,
        ExifTags.Base.HostComputer,
        ExifTags.Base.Rating,
        ExifTags.Base.Copyright,
        ExifTags.Base.XPTitle,
        ExifTags.Base.XPComment,
        ExifTags.Base.XPAuthor,
        ExifTags.Base.XPKeywords,
        ExifTags.Base.XPSubject,
    )
)
"""What the main directory says of the picture; the rest of it, as the orientation, says how its pixels were stored."""


@dataclass(frozen=True)
class OpenedImage:
    """
    What was read from an image file.

    Args:
        image: its first frame, upright: the orientation tag is applied and not there any more.
        metadata: `exif` and `icc_profile`, ready for [`save_image`], where the file has them.
        losses: sentences on what is in the file and not in here.
    """

    image: Image.Image
    metadata: dict[str, bytes] = field(default_factory=dict)
    losses: tuple[str, ...] = ()


def find_image_files(folder: Path, *, leave_out: Path | None = None) -> list[Path]:
    """Files with a suffix of an image below `folder`, sorted; nothing hidden (.name) and nothing below `leave_out`."""
    left_out = leave_out and leave_out.resolve()
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and Path(place, name).resolve() != left_out]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in INPUT_SUFFIXES and os.path.isfile(path))


def open_image(source: str | Path | BinaryIO) -> OpenedImage:
    """
    Read an image file, all of it, so that a damaged one is found out here.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no image, is damaged, or is larger than `MAX_INPUT_PIXELS`; the sentence does not name it.
    """
    with _opened(source) as file:
        frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # MPO: a photo and previews
        file.load()
        metadata, losses = _read_metadata(file)
        image = turn_upright(file)
    if frames > 1:
        losses = (f"only the first of {frames} frames is enlarged.", *losses)
    return OpenedImage(image, metadata, losses)


def check_image_header(source: str | Path | BinaryIO) -> None:
    """Raise as `open_image` does, from the beginning of the file alone: what is damaged further on passes."""
    with _opened(source):
        pass


def save_image(image: Image.Image, path: str | Path, *, metadata: dict[str, bytes] | None = None) -> None:
    """
    Save an image in the format of its suffix, whole or not at all.

    JPEG has quality 95 without chroma subsampling, WebP quality 95; the others are lossless. Where the format has no
    alpha the image is laid on white; where it has no 16 bits they are rounded to 8.

    Args:
        image: of mode L, LA, RGB, RGBA or I;16.
        path: ends in one of `OUTPUT_FORMATS`; replaced if there is such a file.
        metadata: `exif` and `icc_profile`, as in [`OpenedImage`].
    Raises:
        OSError: it cannot be written; a file that was there is as it was.
    """
    path = Path(path)
    file_format = OUTPUT_FORMATS[path.suffix.lower()]
    image = _fit_format(image, file_format)
    metadata = dict(metadata or {})
    if not _is_profile_of(metadata.get("icc_profile", b""), image.mode):
        metadata.pop("icc_profile", None)  # a WebP of a greyscale image is RGB
    with replaced_when_whole(path) as file:
        image.save(file, format=file_format, **_SAVE_OPTIONS.get(file_format, {}), **metadata)


def make_writable_folder(folder: Path) -> None:
    """Create `folder` if need be and try that files can be written there. Raises OSError if not."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = _partial_path(folder)
    probe.touch(exist_ok=False)
    probe.unlink()


@contextmanager
def _opened(source: str | Path | BinaryIO) -> Iterator[Image.Image]:
    """The image file of a size within the limit; errors, those in the block included, as `open_image` raises them."""
    if isinstance(source, str | Path) and Path(source).stat().st_size == 0:
        raise ValueError("the file is empty.")
    with warnings.catch_warnings():
        # Pillow warns of sizes that are within the limit here, and of damaged metadata, which is told of elsewhere.
        warnings.simplefilter("ignore")
        try:
            with Image.open(source) as file:
                if file.width * file.height > MAX_INPUT_PIXELS:
                    raise Image.DecompressionBombError
                yield file
        except UnidentifiedImageError:
            raise ValueError("not an image, or of a kind that Pillow does not read.") from None
        except Image.DecompressionBombError:
            raise ValueError(f"larger than the limit of {MAX_INPUT_PIXELS / 1e6:g} megapixels.") from None
        except MemoryError:
            raise
        except Exception as error:  # what a decoder raises at a damaged file depends on the format and the damage
            if isinstance(error, OSError) and error.errno is not None:  # from the system: the file cannot be read
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise ValueError(f"the image is damaged or cut off ({reason}).") from error


def _read_metadata(image: Image.Image) -> tuple[dict[str, bytes], tuple[str, ...]]:
    metadata, losses = {}, ()
    try:
        exif = _keep_exif(image)
    except Exception:  # here, too, it depends on the damage
        losses += ("its EXIF data is damaged and is left out.",)
    else:
        if exif:
            metadata["exif"] = exif
    profile = image.info.get("icc_profile")
    if profile and _is_profile_of(profile, image.mode):
        metadata["icc_profile"] = profile
    elif profile:
        losses += (f"its colour profile, {_space_of(profile)}, does not fit the output and is left out.",)
    return metadata, losses


def turn_upright(image: Image.Image) -> Image.Image:
    """A copy, turned as its EXIF orientation says and without the tag; damaged EXIF data turn nothing."""
    # Not by ImageOps.exif_transpose, which writes the EXIF data anew and fails where they are damaged.
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # as in _read_metadata, which tells of it
        turn = None
    upright = image.copy() if turn is None else image.transpose(turn)
    for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):  # where Pillow finds the tag
        upright.info.pop(key, None)
    return upright


def _keep_exif(image: Image.Image) -> bytes:
    source, kept = image.getexif(), Image.Exif()
    for tag in _KEPT_EXIF & set(source):
        kept[tag] = source[tag]
    if exposure := dict(source.get_ifd(ExifTags.IFD.Exif)):
        for size_tag in (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight, ExifTags.IFD.Interop):
            exposure.pop(size_tag, None)  # the output has its own size
        kept[ExifTags.IFD.Exif] = exposure
    if place := dict(source.get_ifd(ExifTags.IFD.GPSInfo)):
        kept[ExifTags.IFD.GPSInfo] = place
    return kept.tobytes() if kept else b""


def _space_of(profile: bytes) -> str:
    """The colour space in the header of an ICC profile: RGB, GRAY, CMYK, ..."""
    return profile[16:20].decode("latin-1").strip()


def _is_profile_of(profile: bytes, mode: str) -> bool:
    """Whether `profile` describes what an image of `mode` is given back as, which is greyscale or RGB."""
    is_grey = mode in ("1", "L", "LA", "La") or mode.startswith("I")
    return _space_of(profile) == ("GRAY" if is_grey else "RGB") and mode != "CMYK"


def _fit_format(image: Image.Image, file_format: str) -> Image.Image:
    if image.mode == "I;16" and file_format in _EIGHT_BIT_FORMATS:
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))  # 65535 = 255 * 257
    if image.mode in ("LA", "RGBA") and file_format in _OPAQUE_FORMATS:
        paper = Image.new(image.mode.removesuffix("A"), image.size, "white")
        paper.paste(image.convert(paper.mode), mask=image.getchannel("A"))
        image = paper
    if file_format == "WEBP" and image.mode in ("L", "LA"):
        image = image.convert("RGB" if image.mode == "L" else "RGBA")
    return image


@contextmanager
def replaced_when_whole(path: Path) -> Iterator[BufferedRandom]:
    """A file to write to that becomes `path` at the end of the block, and vanishes if the block does not get there."""
    partial = _partial_path(path.parent)
    try:
        with partial.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _partial_path(folder: Path) -> Path:
    return folder / f".uplift-{os.getpid()}-{secrets.token_hex(4)}.partial"
