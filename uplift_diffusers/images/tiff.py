"""Pixels of TIFF files as they are stored: Pillow reads some of the many layouts only, and some of them wrongly."""

import io
import os
import struct
import zlib
from itertools import accumulate, product
from typing import IO

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from uplift_diffusers.images.exif import LONG, Directory, Entry, Exif, read_directories
from uplift_diffusers.images.modes import DEEP_COLOR, DEEP_GREY_WITH_ALPHA, to_eight_bits

WIDTH, HEIGHT, BITS, PHOTOMETRIC, SAMPLE_FORMAT = 256, 257, 258, 262, 339
_COMPRESSION, _FILL_ORDER, _SAMPLES, _ROWS, _PLANES, _PREDICTOR = 259, 266, 277, 278, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _EXTRA_SAMPLES, _SUBSAMPLING = 322, 323, 338, 530
_STRIPS, _TILES = (273, 279), (324, 325)  # their offsets, and their sizes in bytes

_CHANNELS = {0: ("L", 1), 1: ("L", 1), 2: ("RGB", 3), 5: ("CMYK", 4), 6: ("YCbCr", 3)}
"""PIL mode and number of channels of the colours, by photometric interpretation."""

_RAW, _PACK_BITS, _DEFLATE = 1, 32773, (8, 32946)
_WITH_PREDICTOR = (*_DEFLATE, 5, 34925, 50000)  # LZW, LZMA, Zstandard
_MAX_SAMPLES, _MAX_PARTS = 8, 2**19
_BAND_BYTES = 2**24  # that are decoded at a time


def tiff_directories(stream: IO[bytes]) -> tuple[Exif, Exif | None]:
    """The first two directories of a TIFF file, as `read_directories`."""
    length = stream.seek(0, os.SEEK_END)
    return read_directories(lambda offset, size: read_at(stream, offset, size), length)


def numbers(directory: Exif, tag: int, default: int) -> list[int]:
    """The values of a tag of integers, or `[default]`."""
    entry = directory.main.get(tag)
    return (directory.numbers(entry) if entry is not None else []) or [default]


def as_small_tiff(stream: IO[bytes], directory: Exif) -> io.BytesIO:
    """The image of a directory of a BigTIFF file as a TIFF file of its own."""
    places = _TILES if _TILES[0] in directory.main else _STRIPS
    offsets, sizes = (numbers(directory, tag, 0) for tag in places)
    if len(offsets) != len(sizes) or sum(sizes) > stream.seek(0, os.SEEK_END):
        raise ValueError("its strips or tiles are not all there")
    main = {tag: entry for tag, entry in directory.main.items() if entry.kind < 13}  # the others are of BigTIFF
    return _file_of(directory.order, main, places, [read_at(stream, *place) for place in zip(offsets, sizes)])


def read_samples(stream: IO[bytes], first: Exif) -> np.ndarray | None:
    """
    The stored numbers, (H, W, samples) of uint8 or uint16.

    Returns:
        None if they have another size, are compressed as a picture, or belong to a palette or a rare colour space.
    Raises:
        ValueError: strips or tiles are missing or make no sense.
    """

    def number(tag: int, default: int) -> int:
        return numbers(first, tag, default)[0]

    width, height, samples, photometric = (
        number(tag, default) for tag, default in ((WIDTH, 0), (HEIGHT, 0), (_SAMPLES, 1), (PHOTOMETRIC, 1))
    )
    bits, compression = set(numbers(first, BITS, 1)), number(_COMPRESSION, _RAW)
    if (
        bits not in ({8}, {16})
        or compression not in (_RAW, _PACK_BITS, *_WITH_PREDICTOR)
        or number(_FILL_ORDER, 1) != 1
        or not _CHANNELS.get(photometric, ("", 99))[1] <= samples <= _MAX_SAMPLES
        or (photometric == 6 and numbers(first, _SUBSAMPLING, 2) != [1, 1])
    ):
        return None
    num_planes = samples if number(_PLANES, 1) == 2 else 1
    num_bytes = max(bits) // 8

    # 1. Where the parts are: tiles, or strips as wide as the image, of which the last one is shorter
    is_tiled = _TILES[0] in first.main
    offsets_tag, sizes_tag = _TILES if is_tiled else _STRIPS
    offsets, sizes = numbers(first, offsets_tag, 0), numbers(first, sizes_tag, 0)
    step = number(_TILE_WIDTH, 0) if is_tiled else width
    rows = number(_TILE_HEIGHT, 0) if is_tiled else min(number(_ROWS, height), height)
    across, down = (-(-length // part) if part else 0 for length, part in ((width, step), (height, rows)))
    count = across * down
    if (
        offsets_tag not in first.main
        or not 0 < count * num_planes <= min(len(offsets), _MAX_PARTS)
        or count * step * rows > 4 * width * height + 2**24
    ):
        raise ValueError("its strips or tiles are not all there")

    # 2. Their bytes, plane by plane, some rows of parts at a time
    channels = samples // num_planes
    row_bytes = step * channels * num_bytes
    band = max(1, _BAND_BYTES // (across * rows * row_bytes))
    values = np.empty((height, width, samples), f"u{num_bytes}")
    for plane, start in product(range(num_planes), range(0, down, band)):
        target = values[start * rows : (start + band) * rows, :, plane * channels : (plane + 1) * channels]
        num_down = min(band, down - start)
        lines = across * num_down * rows if is_tiled else len(target)
        parts, lengths = [], [row_bytes * min(rows, lines - line) for line in range(0, lines, rows)]
        for index, length in enumerate(lengths, plane * count + start * across):
            if compression != _RAW:  # nothing sensible becomes twice as large
                length = min(sizes[index] if index < len(sizes) and sizes[index] else 2**32, 2 * length + 1024)
            parts.append(read_at(stream, offsets[index], length))
        data = _unpacked(parts, lengths, compression, row_bytes)
        array = np.frombuffer(data, f"{first.order}u{num_bytes}").reshape(lines, step, channels)
        if number(_PREDICTOR, 1) == 2 and compression in _WITH_PREDICTOR:  # differences along the rows
            array = np.cumsum(array, axis=1, dtype=values.dtype)
        if is_tiled:
            tiles = array.reshape(num_down, across, rows, step, channels)
            array = tiles.swapaxes(1, 2).reshape(num_down * rows, across * step, channels)
        target[:] = array[: len(target), :width]
    return values


def _unpacked(parts: list[bytes], lengths: list[int], compression: int, row_bytes: int) -> bytes:
    """The contents of parts, one after the other; `lengths` are those of the contents, equal except for the last."""
    if compression in _DEFLATE:
        parts = [zlib.decompressobj().decompress(part, length) for part, length in zip(parts, lengths)]
    if compression in (_RAW, *_DEFLATE):
        if [len(part) for part in parts] != lengths:
            raise ValueError("image file is truncated")
        return b"".join(parts)
    # Pillow has the other decoders. Taken for 8-bit grey, the bytes come as they are.
    tags = {WIDTH: row_bytes, HEIGHT: sum(lengths) // row_bytes, _ROWS: lengths[0] // row_bytes}
    tags |= {BITS: 8, _COMPRESSION: compression, PHOTOMETRIC: 1}
    main = {tag: _longs("<", [value]) for tag, value in tags.items()}
    with _Unlimited(_file_of("<", main, _STRIPS, parts)) as file:
        return file.tobytes()


class _Unlimited(TiffImagePlugin.TiffImageFile):
    """Without Pillow's limit of pixels, which are bytes here."""

    load_prepare = ImageFile.ImageFile.load_prepare


def _file_of(order: str, main: Directory, places: tuple[int, int], parts: list[bytes]) -> io.BytesIO:
    """A TIFF file with one directory, of strips or tiles whose offsets and sizes have the tags `places`."""
    starts = list(accumulate(map(len, parts), initial=8))
    main = {**main, places[0]: _longs(order, starts[:-1]), places[1]: _longs(order, [len(part) for part in parts])}
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, starts[-1])
    return io.BytesIO(b"".join([head, *parts, Exif(order, main).directories_at(starts[-1])]))


def _longs(order: str, values: list[int]) -> Entry:
    return Entry(LONG, len(values), struct.pack(f"{order}{len(values)}I", *values))


def read_at(stream: IO[bytes], offset: int, size: int) -> bytes:
    """Bytes of a file, fewer at its end."""
    stream.seek(min(offset, 2**40))  # behind the end of any file
    return stream.read(size)


def image_of_samples(values: np.ndarray, first: Exif) -> tuple[Image.Image, tuple[str, ...]]:
    """
    The image of `read_samples`, of mode L, LA, I;16, RGB, RGBA, CMYK or YCbCr, and messages on what is lost.

    Of several additional channels, the first one that is said to be alpha is taken; inks have none.
    """
    photometric, highest, losses = numbers(first, PHOTOMETRIC, 1)[0], np.iinfo(values.dtype).max, []
    mode, num_colors = _CHANNELS[photometric]
    color, others = values[..., :num_colors], values[..., num_colors:]
    color = highest - color if photometric == 0 else color
    # 1: the colours are multiplied by it, 2: they are not, 999: the same, as Corel Draw wrote it
    kinds = numbers(first, _EXTRA_SAMPLES, 2 if mode == "RGB" else 0)[: others.shape[2]]
    at = next((index for index, kind in enumerate(kinds) if kind in (1, 2, 999) and mode in ("L", "RGB")), None)
    if others.shape[2] > (at is not None):
        losses.append("its channels besides colour and transparency are left out.")
    if at is not None:
        alpha = others[..., at : at + 1]
        if kinds[at] == 1:
            share = np.maximum(alpha, 1) / np.float32(highest)
            color = np.minimum(np.round(color / share), highest).astype(values.dtype)
        color, mode = np.concatenate([color, alpha], axis=2), mode + "A"
    if highest > 255 and mode != "L":
        color = to_eight_bits(color)
        losses.append(DEEP_GREY_WITH_ALPHA if mode == "LA" else DEEP_COLOR)
    if color.shape[2] == 1:
        return Image.fromarray(np.ascontiguousarray(color[..., 0])), tuple(losses)
    return Image.frombytes(mode, (color.shape[1], color.shape[0]), color.tobytes()), tuple(losses)
