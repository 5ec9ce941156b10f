"""Image files: finding them, opening them under a size limit, and saving them atomically."""

import io
import os
import stat
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from uplift_diffusers.images.containers import (
    JPEG_SIGNATURE,
    PNG_SIGNATURE,
    JpegParts,
    PngParts,
    has_all_frequencies,
    split_jpeg,
    split_png,
)
from uplift_diffusers.images.exif import Exif
from uplift_diffusers.images.metadata import (
    Metadata,
    finish_tiff,
    fit_metadata,
    read_jpeg_metadata,
    read_other_metadata,
    read_png_metadata,
    read_tiff_metadata,
    save_options,
)
from uplift_diffusers.images.modes import (
    DEEP_COLOR,
    DEEP_GREY_WITH_ALPHA,
    MODES,
    lay_on_white,
    to_common_mode,
    to_eight_bits,
    turn_upright,
)
from uplift_diffusers.images.tiff import (
    BITS,
    HEIGHT,
    SAMPLE_FORMAT,
    WIDTH,
    as_small_tiff,
    image_of_samples,
    numbers,
    read_at,
    read_samples,
    tiff_directories,
)
from uplift_diffusers.saving import replaced_when_whole

MAX_INPUT_PIXELS = 100_000_000
"""Pixels of the largest image that is opened."""

INPUT_FORMATS = (
    *("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "AVIF", "JPEG2000", "PSD", "QOI", "TGA", "PPM"),
    *("ICO", "ICNS", "CUR", "DIB", "DDS", "PCX", "DCX", "SGI", "SUN", "MSP", "XBM", "XPM"),
)
"""Pillow's names of the formats that are opened. Excluded are formats that run code or other programs, such as EPS."""

HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
"""Suffixes opened by `pillow-heif`, if it is installed."""

INPUT_SUFFIXES = HEIF_SUFFIXES | {
    suffix for suffix, name in Image.registered_extensions().items() if name in INPUT_FORMATS
}
"""Suffixes that count as images in a folder."""

OUTPUT_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
"""Pillow's format name by suffix."""

MAX_EDGES = {"JPEG": 65_500, "WEBP": 16_383}
"""Longest edge in pixels that a format allows, if it is limited."""

_SAVE_OPTIONS = {
    "JPEG": {"quality": 95, "subsampling": "4:4:4"},
    "WEBP": {"quality": 95},
}
_OPAQUE_FORMATS = ("JPEG", "BMP")  # Pillow writes a 32-bit BMP, but hardly anything reads its fourth channel as alpha
_EIGHT_BIT_FORMATS = ("JPEG", "WEBP", "BMP")

_HEAD_BYTES = 2**20
_MISSING_ROWS = 32  # of a JPEG whose end is missing: two rows of its blocks, which decoders hold back


@dataclass(frozen=True)
class OpenedImage:
    """
    The contents of an image file.

    Args:
        image: the first frame, upright, of mode L, LA, RGB, RGBA or I;16.
        metadata: metadata that also applies to the upscaled image, for [`save_image`].
        losses: messages on what was lost.
    """

    image: Image.Image
    metadata: Metadata = field(default_factory=Metadata)
    losses: tuple[str, ...] = ()


@dataclass(frozen=True)
class FoundFiles:
    """
    The contents of a folder, searched recursively.

    Args:
        files: files with an image suffix, sorted by path.
        left_out: number of other files, by suffix; hidden ones (.name) are not counted.
        problems: paths that could not be searched or used, with a message: unreadable folders, links to
            folders, broken links, and entries with an image suffix that are not files.
    """

    files: tuple[Path, ...]
    left_out: Mapping[str, int]
    problems: tuple[tuple[Path, str], ...]


def find_image_files(folder: str | Path, *, leave_out: Path | None = None) -> FoundFiles:
    """
    Find images below `folder`.

    Args:
        leave_out: a folder to skip, such as the output folder.
    """
    unseen = leave_out and leave_out.resolve()
    files, left_out, problems = [], Counter(), []

    def note(error: OSError) -> None:
        problems.append((Path(error.filename or folder), f"{error.strerror or error}."))

    for place, folders, names in os.walk(folder, onerror=note):
        entered = []
        for name in folders:
            path = Path(place, name)
            if name.startswith(".") or path.resolve() == unseen:
                continue
            if path.is_symlink():
                problems.append((path, "a link to a folder, which is not followed."))
            else:
                entered.append(name)
        folders[:] = entered
        for name in names:
            path = Path(place, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() not in INPUT_SUFFIXES:
                left_out[path.suffix.lower() or "no suffix"] += 1
            elif os.path.isfile(path):
                files.append(path)
            else:
                problems.append((path, _what_is_no_file(path)))
    return FoundFiles(tuple(sorted(files)), dict(sorted(left_out.items())), tuple(sorted(problems)))


def open_image(source: str | Path | IO[bytes]) -> OpenedImage:
    """
    Read and decode an image file completely, so damage is found here.

    Metadata (texts, profiles, EXIF data) never prevents an image from being opened: what is damaged or
    too long is reported in `losses`. CMYK is converted to sRGB with the file's profile. The EXIF orientation is
    applied; an orientation that is only in XMP is not, as in browsers.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not an image, is of an unsupported format, damaged, or larger than `MAX_INPUT_PIXELS`;
            the message does not name the file.
    """
    with _explaining_damage(), _stream(source) as stream:
        head = stream.read(_HEAD_BYTES)
        if head.startswith(PNG_SIGNATURE):
            return _read_png(split_png(stream))
        if head.startswith(JPEG_SIGNATURE):
            return _read_jpeg(split_jpeg(stream), stream)
        if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _read_tiff(stream)
        with _pillow_open(stream, head) as file:
            file.load()
            if file.format == "JPEG2000":
                stream.seek(0)
                head = stream.read()
            metadata, orientation, losses = read_other_metadata(file, head)
            is_padded = file.format == "TGA" and file.mode in ("LA", "RGBA") and not head[17] & 15
            if is_padded and not file.getchannel("A").getbbox():  # without any alpha
                return _opened(file.convert(file.mode.removesuffix("A")), metadata, orientation, losses)
            return _opened(file, metadata, orientation, losses)


def check_image_header(source: str | Path | IO[bytes]) -> None:
    """Raise as `open_image` does, but read only the header; damage further on is not detected."""
    with _explaining_damage(), _stream(source) as stream:
        head = stream.read(4096)
        if head.startswith(PNG_SIGNATURE):
            stream = io.BytesIO(split_png(stream, header_only=True).pixels)
        elif head.startswith(JPEG_SIGNATURE):
            stream = io.BytesIO(split_jpeg(stream, header_only=True).pixels or head)
        elif head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            _check_tiff(tiff_directories(stream)[0])
            return  # Pillow knows fewer kinds of TIFF than are read here
        with _pillow_open(stream, head):
            pass


def plan_saving(opened: OpenedImage, suffix: str) -> OpenedImage:
    """
    Prepare an opened image for saving with `suffix`: in the result, `metadata` is what the format can hold, and
    `losses` has messages on the rest. Call this before the work, to report losses early.

    Raises:
        ValueError: `suffix` is not one of `OUTPUT_FORMATS`.
    """
    file_format, image, suffix = _format_of(suffix), opened.image, suffix.lower()
    losses = list(opened.losses)
    if (
        file_format in _OPAQUE_FORMATS
        and image.mode in ("LA", "RGBA")
        and np.asarray(image.getchannel("A")).min() < 255
    ):
        losses.append(f"a {suffix} has no transparency: the image is composited on white.")
    if file_format in _EIGHT_BIT_FORMATS and image.mode == "I;16":
        losses.append(f"its 16-bit grey becomes 8-bit in a {suffix}.")
    is_grey = _is_grey(image.mode, file_format)
    metadata, more = fit_metadata(opened.metadata, file_format, is_grey=is_grey, suffix=suffix)
    return replace(opened, metadata=metadata, losses=(*losses, *more))


def save_image(
    image: Image.Image,
    path: str | Path,
    *,
    metadata: Metadata | None = None,
    overwrite: bool = False,
    check: Callable[[], None] | None = None,
) -> None:
    """
    Save an image atomically, in the format of its suffix.

    JPEG is saved with quality 95 without chroma subsampling, WebP with quality 95; the other formats are lossless. If
    the format has no alpha, the image is composited on white; if it has no 16-bit mode, values are rounded to 8 bits.
    Metadata that the format cannot hold is dropped; [`plan_saving`] reports it beforehand.

    Args:
        path: a path with one of the suffixes in `OUTPUT_FORMATS`.
        overwrite: replace an existing file. Links, named pipes, sockets and devices are never replaced.
        check: called before each block is written. An exception from it ends the saving.
    Raises:
        ValueError: the suffix is not supported, or the range of the pixels is unknown.
        FileExistsError: the path exists and is not to be replaced, even if it has appeared in the meantime.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    path = Path(path)
    file_format = _format_of(path.suffix)
    image = _fit_format(image, file_format)
    metadata, _ = fit_metadata(
        metadata or Metadata(), file_format, is_grey=_is_grey(image.mode, file_format), suffix=path.suffix
    )
    options = {**_SAVE_OPTIONS.get(file_format, {}), **save_options(metadata, file_format)}
    with replaced_when_whole(path, overwrite=overwrite) as file:
        target: Any = _PythonFile(file, check)
        image.save(target, format=file_format, **options)
        if file_format == "TIFF":
            _append_to_tiff(file, metadata)


class _PythonFile:
    """A file that Pillow's encoders write to through Python; directly, they lose system errors such as a full disk."""

    def __init__(self, file: IO[bytes], check: Callable[[], None] | None = None):
        self._file, self._check = file, check
        self.read, self.seek, self.tell, self.flush = file.read, file.seek, file.tell, file.flush

    def write(self, data: bytes) -> int:
        if self._check is not None:
            self._check()
        return self._file.write(data)


def _format_of(suffix: str) -> str:
    file_format = OUTPUT_FORMATS.get(suffix.lower())
    if file_format is None:
        raise ValueError(f"`path` must end in {', '.join(OUTPUT_FORMATS)}, got {suffix!r}.")
    return file_format


def _is_grey(mode: str, file_format: str) -> bool:
    return mode in ("L", "LA", "I;16") and file_format != "WEBP"  # which has colour only


def _fit_format(image: Image.Image, file_format: str) -> Image.Image:
    if image.mode not in MODES:
        image, _ = to_common_mode(image, icc_profile=image.info.get("icc_profile"))
    if image.mode == "I;16" and file_format in _EIGHT_BIT_FORMATS:
        image = Image.fromarray(to_eight_bits(np.asarray(image)))
    if file_format in _OPAQUE_FORMATS:
        image = lay_on_white(image)
    if file_format == "WEBP" and image.mode in ("L", "LA"):
        image = image.convert("RGB" if image.mode == "L" else "RGBA")
    if image.info:  # from which Pillow would take metadata
        image = image.copy()
        image.info = {}
    return image


def _append_to_tiff(file: IO[bytes], metadata: Metadata) -> None:
    length = file.seek(0, os.SEEK_END)
    length += file.write(b"\0" * (length % 2))

    order = "<" if read_at(file, 0, 2) == b"II" else ">"
    directories = finish_tiff(partial(read_at, file), length, metadata)
    if directories is not None:
        file.seek(length)
        file.write(directories)
        file.seek(4)
        file.write(struct.pack(order + "I", length))


@contextmanager
def _explaining_damage() -> Iterator[None]:
    """Turn errors in the block into those of `open_image`, and suppress warnings."""
    with warnings.catch_warnings():
        # Pillow warns of sizes that are within the limit here, and of damaged metadata, which is reported elsewhere.
        warnings.simplefilter("ignore")
        try:
            yield
        except _Refusal as refusal:
            raise ValueError(str(refusal)) from None
        except UnidentifiedImageError:
            raise ValueError("not an image, or an unsupported format.") from None
        except Image.DecompressionBombError:
            raise ValueError(f"larger than the limit of {MAX_INPUT_PIXELS / 1e6:g} megapixels.") from None
        except MemoryError:
            raise
        except Exception as error:  # what a decoder raises at a damaged file depends on the format and the damage
            if isinstance(error, OSError) and error.errno is not None:  # from the system: the file cannot be read
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            reason = "".join(letter if letter.isprintable() else "?" for letter in reason)
            is_rare = any(
                word in reason.lower() for word in ("unsupported", "not supported", "unknown", "unimplemented")
            )
            what = "of an unsupported kind" if is_rare else "damaged or cut off"
            raise ValueError(f"the image is {what} ({reason}).") from error


class _Refusal(Exception):  # noqa: N818
    """A file is not read for a reason other than damage; the message says why."""


@contextmanager
def _stream(source: str | Path | IO[bytes]) -> Iterator[IO[bytes]]:
    if not isinstance(source, str | os.PathLike):
        source.seek(0)
        yield source
        return
    mode = os.stat(source).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a named pipe would wait for ever
        raise _Refusal("not a file, but a named pipe, a socket or a device.")
    with open(source, "rb") as stream:
        if os.fstat(stream.fileno()).st_size == 0:
            raise _Refusal("the file is empty.")
        yield stream


@contextmanager
def _pillow_open(
    stream: IO[bytes], head: bytes, formats: tuple[str, ...] = INPUT_FORMATS
) -> Iterator[ImageFile.ImageFile]:
    """The image in a stream, within the size limit; its pixels are not read yet."""
    stream.seek(0)
    try:
        file = _heif(stream) if _is_heif(head) else Image.open(stream, formats=formats)
    except UnidentifiedImageError:
        name = formats[0] if len(formats) == 1 else _name_of_format(head)
        if name is None:
            raise
        raise _Refusal(f"damaged, or an unsupported kind of {name}.") from None
    with file:
        if file.width * file.height > MAX_INPUT_PIXELS:
            raise Image.DecompressionBombError
        yield file


def _name_of_format(head: bytes) -> str | None:
    """The format that a file has by its first bytes, according to Pillow."""
    for name in INPUT_FORMATS if len(head) >= 16 else ():
        _, accept = Image.OPEN.get(name, (None, None))
        if accept is not None and accept(head[:16]) is True:
            return name
    return None


def _is_heif(head: bytes) -> bool:
    (size,) = struct.unpack(">I", head[:4]) if len(head) >= 4 else (0,)
    brands = {head[at : at + 4] for at in (8, *range(16, min(size, 256), 4))} if head[4:8] == b"ftyp" else set()
    return bool(brands & {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}) and not (
        brands & {b"avif", b"avis"}
    )


def _heif(stream: IO[bytes]) -> ImageFile.ImageFile:
    try:
        from pillow_heif import HeifImageFile  # pyright: ignore[reportMissingImports] - nothing installs it
    except ImportError:
        raise _Refusal("HEIC images need pillow-heif: pip install pillow-heif.") from None
    return HeifImageFile(stream)


def _opened(
    image: Image.Image, metadata: Metadata, orientation: int, losses: tuple[str, ...], **conversion
) -> OpenedImage:
    if image.width * image.height > MAX_INPUT_PIXELS:  # of an icon, which may be larger than it says
        raise Image.DecompressionBombError
    if 0 in image.size:
        raise ValueError("it has no pixels")
    common, more = to_common_mode(image, icc_profile=metadata.icc_profile, **conversion)
    if image.mode in ("CMYK", "LAB"):
        metadata = metadata.without_color_space()
    upright = turn_upright(common, orientation)
    if upright is image or upright.info:
        upright = upright.copy()
        upright.info = {}
    return OpenedImage(upright, metadata, (*losses, *more))


def _read_png(parts: PngParts) -> OpenedImage:
    with _pillow_open(io.BytesIO(parts.pixels), b"", ("PNG",)) as file:
        metadata, orientation, losses = read_png_metadata(parts, file.info)
        if parts.depth == 16 and parts.color_type in (2, 6):
            losses = (*losses, DEEP_COLOR)
        key = next((data for name, data in parts.chunks if name == b"tRNS"), b"")
        if parts.color_type == 2 and parts.depth == 16 and len(key) == 6:
            image = _keyed_deep_rgb(parts.pixels, struct.unpack(">3H", key))
            return _opened(image, metadata, orientation, losses)
        file.load()
        if parts.color_type == 4 and file.mode == "RGBA":  # as Pillow opens 16-bit grey with alpha
            image = Image.merge("LA", (file.getchannel("R"), file.getchannel("A")))
            return _opened(image, metadata, orientation, (*losses, DEEP_GREY_WITH_ALPHA))
        color_key = None
        if parts.color_type == 0 and len(key) == 2:
            highest = 2**parts.depth - 1
            color_key = (int.from_bytes(key) & highest) * (1 if parts.depth == 16 else 255 // highest)
        elif parts.color_type == 2 and len(key) == 6:
            color_key = tuple(value & 255 for value in struct.unpack(">3H", key))
        return _opened(file, metadata, orientation, losses, color_key=color_key)


def _keyed_deep_rgb(pixels: bytes, key: tuple[int, int, int]) -> Image.Image:
    """The RGBA image of a PNG of 16 bits a channel and a transparent colour. Pillow reads the upper bytes only."""
    halves = []
    for rawmode in ("RGB;16B", "RGB;16L"):  # taken for values of the other byte order, they have the lower bytes above
        with Image.open(io.BytesIO(pixels), formats=("PNG",)) as file:
            file.tile = [tile._replace(args=rawmode) for tile in file.tile]
            file.load()
            halves.append(np.asarray(file))
    is_key = np.ones(halves[0].shape[:2], bool)
    for channel, value in enumerate(key):
        is_key &= (halves[0][..., channel] == value >> 8) & (halves[1][..., channel] == value & 255)
    image = Image.fromarray(halves[0])
    image.putalpha(Image.fromarray(np.where(is_key, 0, 255).astype(np.uint8)))
    return image


def _read_jpeg(parts: JpegParts, stream: IO[bytes]) -> OpenedImage:
    if parts.pixels is None:
        source = stream
    else:
        source = io.BytesIO(parts.pixels if parts.is_whole else _with_end(parts.pixels))
    with _pillow_open(source, b"", ("JPEG",)) as file:
        file.load()
        metadata, orientation, losses = read_jpeg_metadata(parts, file.info)
        opened = _opened(file, metadata, orientation, losses)
        image: Any = opened.image
        image.quantization = getattr(file, "quantization", None)  # what `jpeg_quality` reads off a file
        return opened


def _with_end(pixels: bytes) -> bytes:
    """Add the end marker to a JPEG file without one, if hardly anything is missing."""
    whole = pixels + b"\xff\xd9"
    if not has_all_frequencies(pixels):
        # Some bytes of zeros let the decoder finish the last block if it is there.
        stops, ends = (_decoded_rows(pixels + tail) for tail in (b"\0" * 8, b"\xff\xd9"))
        missing = int((~stops & ends).sum())
        if missing > min(_MISSING_ROWS, max(18, len(ends) // 8)):
            share = round(100 * missing / len(ends))
            what = f"{share} % of its rows are missing" if share < 100 else "its end is missing"
            raise _Refusal(f"the image is damaged or cut off ({what}).")
    return whole


def _decoded_rows(pixels: bytes) -> np.ndarray:
    """(H,) bool: the rows of a truncated JPEG file that are decoded; black rows do not count."""
    with _pillow_open(io.BytesIO(pixels), b"", ("JPEG",)) as file:
        try:
            file.load()
        except OSError:
            file.tile = []  # the rows that are there stay
        array = np.asarray(file)
    return np.asarray(array.reshape(len(array), -1).any(axis=1))


def _read_tiff(stream: IO[bytes]) -> OpenedImage:
    first, second = tiff_directories(stream)
    _check_tiff(first)
    metadata, orientation, losses = read_tiff_metadata(first, second)
    values = read_samples(stream, first)
    if values is not None:
        image, more = image_of_samples(values, first)
        return _opened(image, metadata, orientation, (*losses, *more))
    stream.seek(0)
    if stream.read(4) == b"MM\0+":  # a BigTIFF in this byte order, which Pillow does not read
        stream = as_small_tiff(stream, first)
    with _pillow_open(stream, b"", ("TIFF",)) as file:
        file.load_end = lambda: None  # where Pillow applies the orientation, also one that is in XMP only
        file.load()
        return _opened(file.copy(), metadata, orientation, losses)  # a copy has the size before it is turned


def _check_tiff(first: Exif) -> None:
    """Raise if a TIFF is too large or, in plain words, if its sample format is not supported."""
    width, height = (numbers(first, tag, 0)[0] for tag in (WIDTH, HEIGHT))
    if width * height > MAX_INPUT_PIXELS:
        raise Image.DecompressionBombError
    if width * height == 0:
        raise ValueError("it has no pixels")
    bits, formats = max(numbers(first, BITS, 1)), set(numbers(first, SAMPLE_FORMAT, 1))
    if 3 in formats:
        kind = f"{bits}-bit floating-point pixels, whose range is unknown"
    elif formats & {5, 6}:
        kind = "complex-valued pixels"
    elif bits > 64:
        kind = f"{bits}-bit pixels"
    elif 2 in formats:
        kind = f"signed {bits}-bit pixels, from {-(2 ** (bits - 1))} to {2 ** (bits - 1) - 1}"
    elif bits > 16 or 8 < bits < 16:
        kind = f"{bits}-bit pixels, from 0 to {2**bits - 1}"
    else:
        return
    raise _Refusal(f"{kind}: save it with 8 or 16 bits.")


def _what_is_no_file(path: Path) -> str:
    if not path.is_symlink():
        return "not a file, but a named pipe, a socket or a device."
    return "a broken link." if not path.exists() else "a link to something that is not a file."
