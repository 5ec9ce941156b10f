"""Pixels of TIFF files as they are stored: Pillow reads some of the many layouts only, and some of them wrongly."""

import io
import os
import struct
from collections.abc import Mapping
from typing import IO

import numpy as np
from PIL import Image, TiffImagePlugin

from uplift_diffusers.images.exif import LONG, Entry, Exif, read_directories
from uplift_diffusers.images.modes import DEEP_COLOR, DEEP_GREY_WITH_ALPHA, to_eight_bits

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANES = 256, 257, 258, 259, 262, 277, 284
EXTRA_SAMPLES, SAMPLE_FORMAT = 338, 339
_FILL_ORDER, _ROWS_PER_STRIP, _PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _SUBSAMPLING = 266, 278, 317, 322, 323, 530
_PLACES = _STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES = 273, 279, 324, 325

_CHANNELS = {0: ("L", 1), 1: ("L", 1), 2: ("RGB", 3), 5: ("CMYK", 4), 6: ("YCbCr", 3)}
"""PIL mode and number of channels of the colours, by photometric interpretation."""

_WITH_PREDICTOR = (5, 8, 32946, 34925, 50000)  # LZW, deflate (two numbers), LZMA, Zstandard
_COMPRESSIONS = (1, 32773, *_WITH_PREDICTOR)  # none, PackBits
_MAX_SAMPLES = 8


def tiff_directories(stream: IO[bytes]) -> tuple[Exif, Exif | None]:
    """The first two directories of a TIFF file, as `read_directories`."""
    length = stream.seek(0, os.SEEK_END)

    def read_at(offset: int, size: int) -> bytes:
        stream.seek(offset)
        return stream.read(size)

    return read_directories(read_at, length)


def numbers(directory: Exif, tag: int, default: int) -> list[int]:
    """The values of a tag of integers, or `[default]`."""
    entry = directory.main.get(tag)
    return (directory.numbers(entry) if entry is not None else []) or [default]


def with_directory(stream: IO[bytes], directory: Exif, tags: Mapping[int, list[int]]) -> io.BytesIO:
    """The data of a TIFF or BigTIFF file as a TIFF file whose only directory is `directory` with other `tags`."""
    tags = {**{tag: numbers(directory, tag, 0) for tag in _PLACES if tag in directory.main}, **tags}
    main = {tag: entry for tag, entry in directory.main.items() if entry.kind < 13}  # the others are of BigTIFF
    block = b""
    for _ in range(2):  # the directory comes first, so that the end of the data stays the end of the file
        for tag, values in tags.items():
            moved = [value + len(block) for value in values] if tag in (_STRIP_OFFSETS, _TILE_OFFSETS) else values
            main[tag] = Entry(LONG, len(moved), struct.pack(f"{directory.order}{len(moved)}I", *moved))
        block = Exif(directory.order, main).to_bytes()
    stream.seek(0)
    return io.BytesIO(block + stream.read())


def read_samples(stream: IO[bytes], first: Exif) -> np.ndarray | None:
    """
    The stored numbers, (H, W, samples) of uint8 or uint16.

    Returns:
        None if they have another size, are compressed as a picture, or belong to a palette or a rare colour space.
    """

    def number(tag: int, default: int) -> int:
        return numbers(first, tag, default)[0]

    width, height, samples, photometric = (
        number(tag, default) for tag, default in ((WIDTH, 0), (HEIGHT, 0), (SAMPLES, 1), (PHOTOMETRIC, 1))
    )
    bits, compression = set(numbers(first, BITS, 1)), number(COMPRESSION, 1)
    if (
        bits not in ({8}, {16})
        or compression not in _COMPRESSIONS
        or not _CHANNELS.get(photometric, ("", 99))[1] <= samples <= _MAX_SAMPLES
        or (photometric == 6 and numbers(first, _SUBSAMPLING, 2) != [1, 1])
    ):
        return None
    num_planes = samples if number(PLANES, 1) == 2 else 1
    num_bytes = samples // num_planes * max(bits) // 8  # of a pixel in a plane
    is_tiled = _TILE_OFFSETS in first.main
    step = number(_TILE_WIDTH, 0) if is_tiled else width

    # As 8-bit grey of as many pixels as there are bytes in a row, the bytes come as they are. Not by Image.open, which
    # limits the number of pixels.
    kept = (_FILL_ORDER, _ROWS_PER_STRIP, _TILE_HEIGHT)
    tags = {tag: numbers(first, tag, 1) for tag in kept if tag in first.main}
    tags |= {WIDTH: [width * num_bytes], HEIGHT: [height], BITS: [8], COMPRESSION: [compression], PHOTOMETRIC: [1]}
    tags |= {_TILE_WIDTH: [step * num_bytes]} if is_tiled else {}
    planes = []
    for plane in range(num_planes):
        for tag in (_TILE_OFFSETS, _TILE_BYTES) if is_tiled else (_STRIP_OFFSETS, _STRIP_BYTES):
            if tag in first.main:
                places = numbers(first, tag, 0)
                count = len(places) // num_planes
                tags[tag] = places[plane * count : (plane + 1) * count]
        with TiffImagePlugin.TiffImageFile(with_directory(stream, Exif(first.order), tags)) as file:
            array = np.asarray(file)
        array = array if max(bits) == 8 else array.view(first.order + "u2").astype(np.uint16)
        planes.append(array.reshape(height, width, -1))
    values = np.concatenate(planes, axis=2)
    if number(_PREDICTOR, 1) == 2 and compression in _WITH_PREDICTOR:  # differences along the rows, in each tile
        for left in range(0, width, step):
            part = values[:, left : left + step]
            np.cumsum(part, axis=1, dtype=values.dtype, out=part)
    return values


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
    kinds = numbers(first, EXTRA_SAMPLES, 2 if mode == "RGB" else 0)[: others.shape[2]]
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
    channels = [Image.fromarray(np.ascontiguousarray(color[..., index])) for index in range(color.shape[2])]
    return channels[0] if len(channels) == 1 else Image.merge(mode, channels), tuple(losses)
