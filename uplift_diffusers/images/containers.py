"""Split PNG and JPEG files into image data for Pillow and metadata, so damaged metadata does not lose the image."""

import re
import struct
import zlib
from dataclasses import dataclass, field
from typing import IO

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"

_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PROGRESSIVE, _SCAN, _END = 0xC2, 0xDA, 0xD9
# In the entropy-coded data of a scan, FF 00 is a byte FF and D0 to D7 are restarts; anything else is the next marker.
_NEXT_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)


@dataclass(frozen=True)
class PngParts:
    """
    A PNG file.

    Args:
        pixels: a PNG file with only the chunks of the image, without transparency unless it has a palette.
        depth, color_type: as in the header.
        chunks: (name, data) of the other chunks, in order.
        damaged: names of chunks dropped because of a wrong checksum.
    """

    pixels: bytes
    depth: int
    color_type: int
    chunks: list[tuple[bytes, bytes]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class JpegParts:
    """
    A JPEG file.

    Args:
        pixels: a JPEG file with only the segments of the image, including JFIF and Adobe; None if the file's
            structure is invalid and it has to be decoded as it is.
        segments: (marker, data) of the other segments, in order.
        is_whole: whether it has an end marker.
        trailer: bytes after the end marker.
    """

    pixels: bytes | None
    segments: list[tuple[int, bytes]] = field(default_factory=list)
    is_whole: bool = True
    trailer: bytes = b""


def png_chunk(name: bytes, data: bytes) -> bytes:
    """A chunk as stored in a file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def split_png(file: IO[bytes], *, header_only: bool = False) -> PngParts:
    """
    Split a PNG file.

    Args:
        header_only: stop at the image data.
    Raises:
        ValueError: the image data is damaged.
    """
    file.seek(len(PNG_SIGNATURE))
    pixels, chunks, damaged = [PNG_SIGNATURE], [], []
    depth = color_type = -1
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if header_only and name == b"IDAT":
            pixels.append(png_chunk(b"IDAT", b""))
            break
        data = file.read(length)
        crc = file.read(4)
        is_cut = len(crc) < 4
        is_sound = not is_cut and struct.unpack(">I", crc)[0] == zlib.crc32(data, zlib.crc32(name))
        if name in _PIXEL_CHUNKS:
            if not is_sound and not (is_cut and name in (b"IDAT", b"IEND")):  # what is cut off, the decoder notices
                raise ValueError(f"the checksum of the chunk {name.decode()} is wrong")
            if name == b"IHDR":
                if len(data) != 13:
                    raise ValueError("the header has a wrong length")
                depth, color_type = data[8:10]
            elif depth < 0:
                raise ValueError("the header is missing")
            if name != b"IEND":
                pixels.append(png_chunk(name, data))
        elif not is_sound:
            damaged.append(name.decode("latin-1"))
        elif name == b"tRNS" and color_type == 3:
            pixels.append(png_chunk(name, data))
        else:
            chunks.append((name, data))
        if name == b"IEND":
            break
    if depth < 0:
        raise ValueError("the header is missing")
    pixels.append(png_chunk(b"IEND", b""))
    return PngParts(b"".join(pixels), depth, color_type, chunks, damaged)


def split_jpeg(file: IO[bytes], *, header_only: bool = False) -> JpegParts:
    """
    Split a JPEG file. If its structure is invalid, it is left to the decoder.

    Args:
        header_only: stop at the image data.
    """
    file.seek(2)
    pixels, segments = [b"\xff\xd8"], []
    while True:
        marker = _next_marker(file)
        length_bytes = file.read(2)
        if marker is None or marker == _END or len(length_bytes) < 2:
            return JpegParts(None, segments)
        (length,) = struct.unpack(">H", length_bytes)
        data = file.read(max(0, length - 2))
        if length < 2 or len(data) < length - 2:
            return JpegParts(None, segments)
        is_beside = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if is_beside and not (marker == 0xE0 or (marker == 0xEE and data.startswith(b"Adobe"))):
            segments.append((marker, data))
            continue
        pixels.append(bytes([0xFF, marker]) + length_bytes + data)
        if marker == _SCAN:
            break
    if header_only:
        return JpegParts(b"".join(pixels), segments)
    rest = file.read()
    end, is_whole = _find_end(rest)
    return JpegParts(b"".join([*pixels, rest[:end]]), segments, is_whole, rest[end:])


def _next_marker(file: IO[bytes]) -> int | None:
    byte = file.read(1)
    skipped = 0
    while byte and byte != b"\xff":  # decoders pass over some bytes between segments
        byte = file.read(1)
        skipped += 1
        if skipped > 4096:
            return None
    while byte == b"\xff":
        byte = file.read(1)
    return byte[0] if byte and byte != b"\0" else None


def _find_end(data: bytes) -> tuple[int, bool]:
    """The end of the image in the data after the first scan header, and whether it has an end marker."""
    at = 0
    while found := _NEXT_MARKER.search(data, at):
        marker = found[1][0]
        if marker == _END:
            return found.end(), True
        at = found.end()
        if marker in (0x01, 0xD8):
            continue
        if at + 2 > len(data):
            break
        at += struct.unpack_from(">H", data, at)[0]
    return len(data), False


def has_all_frequencies(pixels: bytes) -> bool:
    """
    Whether a truncated progressive JPEG has data for every frequency of every component, so only the last bits of some
    are missing.

    Args:
        pixels: as in [`JpegParts`].
    """
    at, num_components, scans = 2, 0, []
    while found := _NEXT_MARKER.search(pixels, at):
        marker, at = found[1][0], found.end()
        if at + 2 > len(pixels):
            break
        (length,) = struct.unpack_from(">H", pixels, at)
        data = pixels[at + 2 : at + length]
        if marker == _PROGRESSIVE and len(data) > 5:
            num_components = data[5]
        elif marker == _SCAN and data and len(data) >= 4 + 2 * data[0]:
            last_frequency, approximation = data[2 + 2 * data[0]], data[3 + 2 * data[0]]
            scans.append((set(data[1 : 1 + 2 * data[0] : 2]), last_frequency, approximation >> 4))
        at += length
    if not num_components or not scans:
        return False
    whole = scans if scans[-1][2] else scans[:-1]  # one that refines leaves what was there before it
    covered = set().union(*(components for components, last_frequency, _ in whole if last_frequency == 63))
    return len(covered) == num_components


def photoshop_resources(data: bytes) -> dict[int, bytes]:
    """The resources of a Photoshop block (8BIM), by number, up to the first damaged one."""
    resources: dict[int, bytes] = {}
    at = 0
    while data[at : at + 4] == b"8BIM" and at + 12 <= len(data):
        (number,) = struct.unpack_from(">H", data, at + 4)
        name_length = data[at + 6]
        at += 6 + 1 + name_length + (1 + name_length) % 2
        if at + 4 > len(data):
            break
        (size,) = struct.unpack_from(">I", data, at)
        at += 4
        if at + size > len(data):
            break
        resources.setdefault(number, data[at : at + size])
        at += size + size % 2
    return resources


def photoshop_block(resources: dict[int, bytes]) -> bytes:
    """The inverse of `photoshop_resources`."""
    return b"".join(
        b"8BIM" + struct.pack(">H", number) + b"\0\0" + struct.pack(">I", len(data)) + data + b"\0" * (len(data) % 2)
        for number, data in resources.items()
    )
