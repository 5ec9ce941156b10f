"""EXIF data as TIFF directories, read and written without changing a tag's type and bytes."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

EXPOSURE, GPS, INTEROPERABILITY = 0x8769, 0x8825, 0xA005
"""Tags that point to a directory: EXIF (exposure), GPS (place), and interoperability."""

ORIENTATION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 0x0112, 0x011A, 0x011B, 0x0128

BYTE, SHORT, LONG, RATIONAL, UNDEFINED = 1, 3, 4, 5, 7

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Size of a value in bytes, by type."""

_WORDS = {3: 2, 8: 2, 4: 4, 9: 4, 5: 4, 10: 4, 11: 4, 13: 4, 12: 8, 16: 8, 17: 8, 18: 8}
"""Size of the units that are byte-swapped, by type."""

_MAX_BYTES = 64 * 2**20
"""Limit for all values of a directory together; entries may share bytes, so a small file could expand enormously."""

ReadAt = Callable[[int, int], bytes]


class Entry(NamedTuple):
    """A tag's type, the number of its values, and the values as bytes, in the byte order of the block."""

    kind: int
    count: int
    data: bytes


Directory = dict[int, Entry]


@dataclass(frozen=True)
class Exif:
    """
    EXIF data.

    Args:
        order: "<" (little-endian) or ">".
        main, exposure, place, interoperability: the directories.
        damaged: tags dropped because they cannot be read.
    """

    order: str = ">"
    main: Directory = field(default_factory=dict)
    exposure: Directory = field(default_factory=dict)
    place: Directory = field(default_factory=dict)
    interoperability: Directory = field(default_factory=dict)
    damaged: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.main or self.exposure or self.place or self.interoperability)

    @property
    def orientation(self) -> int:
        """1 to 8; 1 if there is none or it is invalid."""
        value = self.number(self.main.get(ORIENTATION))
        return int(value) if value is not None and value in range(1, 9) else 1

    @property
    def dpi(self) -> tuple[float, float] | None:
        """Dots per inch, horizontally and vertically, or None."""
        x, y = self.number(self.main.get(X_RESOLUTION)), self.number(self.main.get(Y_RESOLUTION))
        unit = self.number(self.main.get(RESOLUTION_UNIT)) or 2
        factor = {2.0: 1.0, 3.0: 2.54}.get(unit)
        return (x * factor, y * factor) if x and y and factor else None

    def number(self, entry: Entry | None) -> float | None:
        """The first value of a tag of integers or unsigned fractions; None if it has none."""
        if entry is None or not entry.count:
            return None
        if entry.kind == RATIONAL:
            top, bottom = struct.unpack_from(self.order + "II", entry.data)
            return top / bottom if bottom else None
        letter = {1: "B", 3: "H", 4: "I", 8: "h", 9: "i", 13: "I", 16: "Q", 18: "Q"}.get(entry.kind)
        return struct.unpack_from(self.order + letter, entry.data)[0] if letter else None

    def numbers(self, entry: Entry) -> list[int]:
        """All values of a tag of SHORT or LONG."""
        letter = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(entry.kind)
        return list(struct.unpack(f"{self.order}{entry.count}{letter}", entry.data)) if letter else []

    def without(self, *tags: int) -> "Exif":
        """A copy without the given tags, in all directories."""
        return self._changed(lambda tag, entry: None if tag in tags else entry)

    def with_dpi(self, dpi: tuple[float, float]) -> "Exif":
        """A copy with a resolution in dots per inch."""
        x, y = (Entry(RATIONAL, 1, struct.pack(self.order + "II", round(value * 1000), 1000)) for value in dpi)
        unit = Entry(SHORT, 1, struct.pack(self.order + "H", 2))
        return replace(self, main={**self.main, X_RESOLUTION: x, Y_RESOLUTION: y, RESOLUTION_UNIT: unit})

    def in_order(self, order: str) -> "Exif":
        """A copy in the byte order `order`; values of type UNDEFINED are unchanged."""
        if order == self.order:
            return self
        return replace(self._changed(lambda tag, entry: entry._replace(data=_turned(entry))), order=order)

    def _changed(self, change: Callable[[int, Entry], Entry | None]) -> "Exif":
        """A copy with changed entries in all directories, without those that become None."""

        def changed(directory: Directory) -> Directory:
            entries = ((tag, change(tag, entry)) for tag, entry in directory.items())
            return {tag: entry for tag, entry in entries if entry is not None}

        names = ("main", "exposure", "place", "interoperability")
        return replace(self, **{name: changed(getattr(self, name)) for name in names})

    def to_bytes(self) -> bytes:
        """The EXIF block, without JPEG's six-byte `Exif` prefix."""
        mark = b"II" if self.order == "<" else b"MM"
        return mark + struct.pack(self.order + "HI", 42, 8) + self.directories_at(8)

    def directories_at(self, start: int) -> bytes:
        """The directories as bytes for the offset `start`, the main one first."""
        main, exposure = dict(self.main), dict(self.exposure)

        def pointer(offset: int) -> Entry:
            return Entry(LONG, 1, struct.pack(self.order + "I", offset))

        if self.interoperability:
            exposure[INTEROPERABILITY] = pointer(0)
        if exposure:
            main[EXPOSURE] = pointer(0)
        if self.place:
            main[GPS] = pointer(0)
        at = start + _length(main)
        blocks = []
        if exposure:
            main[EXPOSURE] = pointer(at)
            after = at + _length(exposure)
            if self.interoperability:
                exposure[INTEROPERABILITY] = pointer(after)
            blocks.append(_write(exposure, at, self.order))
            if self.interoperability:
                blocks.append(_write(self.interoperability, after, self.order))
                after += len(blocks[-1])
            at = after
        if self.place:
            main[GPS] = pointer(at)
            blocks.append(_write(self.place, at, self.order))
        return b"".join([_write(main, start, self.order), *blocks])


def parse_exif(data: bytes) -> Exif:
    """The EXIF data of a block. Raises ValueError if it has no directory."""
    while data.startswith(b"Exif\0\0"):
        data = data[6:]
    return read_directories(lambda offset, size: data[offset : offset + size], len(data))[0]


def read_directories(read_at: ReadAt, length: int) -> tuple[Exif, Exif | None]:
    """
    The first main directory with its subdirectories, and the next main one, of a TIFF file or an EXIF block.

    Args:
        read_at: (offset, size) -> that many bytes, or fewer at the end.
        length: total length in bytes.
    Raises:
        ValueError: there is no TIFF header, or the first directory lies outside the file.
    """
    head = read_at(0, 16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 8:
        raise ValueError("no TIFF header")
    (version,) = struct.unpack_from(order + "H", head, 2)
    is_big = version == 43
    if (is_big and len(head) < 16) or version not in (42, 43):
        raise ValueError("no TIFF header")
    (start,) = struct.unpack_from(order + ("Q" if is_big else "I"), head, 8 if is_big else 4)
    damaged: list[int] = []
    main, after = _read(read_at, start, length, order, is_big, damaged)

    def below(directory: Directory, tag: int) -> Directory:
        entry = directory.pop(tag, None)
        offset = Exif(order).number(entry)
        if not offset:
            return {}
        try:
            return _read(read_at, int(offset), length, order, is_big, damaged)[0]
        except ValueError:
            damaged.append(tag)
            return {}

    exposure = below(main, EXPOSURE)
    first = Exif(order, main, exposure, below(main, GPS), below(exposure, INTEROPERABILITY), tuple(damaged))
    second = None
    if after:
        try:
            second = Exif(order, _read(read_at, after, length, order, is_big, [])[0])
        except ValueError:
            second = None
    return first, second


def _read(
    read_at: ReadAt, start: int, length: int, order: str, is_big: bool, damaged: list[int]
) -> tuple[Directory, int]:
    """A directory and the offset of the next one. Unreadable tags are added to `damaged`."""
    count_size, entry_size, room = (8, 20, 8) if is_big else (2, 12, 4)
    word = order + ("Q" if is_big else "I")
    count_bytes = read_at(start, count_size)
    if start < 8 or start >= length or len(count_bytes) < count_size:
        raise ValueError("a directory lies outside")
    (count,) = struct.unpack(order + ("Q" if is_big else "H"), count_bytes)
    if count > 65535:
        raise ValueError("a directory has too many tags")
    table = read_at(start + count_size, count * entry_size + room)
    directory: Directory = {}
    total = 0
    for at in range(0, min(count, len(table) // entry_size) * entry_size, entry_size):
        tag, kind = struct.unpack_from(order + "HH", table, at)
        (number,) = struct.unpack_from(word, table, at + 4)
        size = _SIZES.get(kind, 0) * number
        data = table[at + entry_size - room : at + entry_size]
        if size > room:
            (offset,) = struct.unpack(word, data)
            total += size
            data = b"" if offset >= length or size > length or total > _MAX_BYTES else read_at(offset, size)
        if kind not in _SIZES or len(data) < size or tag in directory:
            damaged.append(tag)
        else:
            directory[tag] = Entry(kind, number, data[:size])
    end = count * entry_size
    (after,) = struct.unpack(word, table[end:]) if len(table) == end + room else (0,)
    return directory, after


def _length(directory: Directory) -> int:
    """Length in bytes when written."""
    values = sum(len(entry.data) + len(entry.data) % 2 for entry in directory.values() if len(entry.data) > 4)
    return 2 + 12 * len(directory) + 4 + values


def _write(directory: Directory, start: int, order: str) -> bytes:
    table, values = [struct.pack(order + "H", len(directory))], []
    at = start + 2 + 12 * len(directory) + 4
    for tag, entry in sorted(directory.items()):
        table.append(struct.pack(order + "HHI", tag, entry.kind, entry.count))
        if len(entry.data) <= 4:
            table.append(entry.data.ljust(4, b"\0"))
        else:
            table.append(struct.pack(order + "I", at))
            values.append(entry.data + b"\0" * (len(entry.data) % 2))
            at += len(values[-1])
    return b"".join([*table, b"\0\0\0\0", *values])


def _turned(entry: Entry) -> bytes:
    width = _WORDS.get(entry.kind, 1)
    words = (entry.data[at : at + width][::-1] for at in range(0, len(entry.data), width))
    return b"".join(words) if width > 1 else entry.data
