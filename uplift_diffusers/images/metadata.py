"""Metadata of image files: read once, kept where the output format can hold it, and otherwise reported."""

import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from uplift_diffusers.images.containers import JpegParts, PngParts, photoshop_block, photoshop_resources
from uplift_diffusers.images.exif import (
    BYTE,
    RESOLUTION_UNIT,
    UNDEFINED,
    X_RESOLUTION,
    Y_RESOLUTION,
    Entry,
    Exif,
    ReadAt,
    parse_exif,
    read_directories,
)

KEPT = {
    "colour profile": {"PNG": "iCCP", "JPEG": "APP2", "WEBP": "ICCP", "TIFF": "tag 34675"},
    "EXIF data": {"PNG": "eXIf", "JPEG": "APP1, up to 64 kB", "WEBP": "EXIF", "TIFF": "its directories"},
    "XMP": {"PNG": "iTXt", "JPEG": "APP1, up to 64 kB", "WEBP": "XMP", "TIFF": "tag 700"},
    "IPTC data": {"PNG": "zTXt `Raw profile type iptc`", "JPEG": "APP13, up to 64 kB", "TIFF": "tag 33723"},
    "comment": {"PNG": "iTXt `Comment`", "JPEG": "COM, up to 64 kB"},
    "PNG text": {"PNG": "tEXt, zTXt, iTXt"},
    "resolution": {"PNG": "pHYs", "JPEG": "JFIF", "WEBP": "EXIF", "TIFF": "tags 282, 283, 296", "BMP": "header"},
    "colour space in numbers": {"PNG": "gAMA, cHRM, sRGB, cICP"},
}
"""Where each output format stores each kind of metadata. Other formats lose it, which is reported."""

MAX_SIDE_BYTES = 32 * 2**20
"""Limit in bytes for a colour profile or for all text, after decompression; no real file has more."""

_MAX_SEGMENT = 65533
"""Largest JPEG segment in bytes, without its length field."""

_MAX_JPEG_PROFILE = 255 * (_MAX_SEGMENT - 14)
"""Largest colour profile of a JPEG in bytes: as many segments as a byte counts."""

_READABLE_TEXT = 2**20
"""Longest compressed text in bytes that readers such as Pillow accept; longer ones are written uncompressed."""

_IPTC, _PHOTOSHOP_XMP, _PHOTOSHOP_EXIF, _PHOTOSHOP_ICC, _PHOTOSHOP_RESOLUTION = 0x0404, 0x0424, 0x0422, 0x040F, 0x03ED

# TIFF tags of the same kinds, which are no EXIF data.
_XMP_TAG, _ICC_TAG, _IPTC_TAG, _PHOTOSHOP_TAG = 700, 34675, 33723, 34377

_STORAGE_TAGS = (
    *(254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 274, 277, 278, 279, 280, 281, 284, 288, 289, 290),
    *(291, 292, 293, 297, 301, 317, 320, 321, 322, 323, 324, 325, 326, 327, 328, 330, 332, 333, 334, 336, 338, 339),
    *(340, 341, 342, 347, 351, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 559),
    _XMP_TAG,
    _ICC_TAG,
    _IPTC_TAG,
    _PHOTOSHOP_TAG,
    37724,  # Photoshop's layers
    0xC4A5,  # for printers, with offsets
    *range(0xB000, 0xB100),  # of several pictures in one file
)
"""Main tags on how the pixels were stored."""

_DESCRIPTION, _TRANSFER_FUNCTION = 270, 301

_SIZE_TAGS = (0x9102, 0x9214, 0xA002, 0xA003, 0xA20E, 0xA20F, 0xA210, 0xA214, 0x1001, 0x1002)
"""Tags in units of the original's pixels: its size, positions in it and its density on the sensor."""

_MAP_TAGS = (33550, 33922, 34264, 34735, 34736, 34737, 42112, 42113)
"""Tags that georeference TIFF pixels (GeoTIFF)."""

_COLOR_SPACE = 0xA001

_COLOR_TAGS = (0xA001, 0xA500, 0x012D, 0x013E, 0x013F)
"""Tags on the colour space of the pixel values, besides the interoperability directory."""

_XMP_NOTES: tuple[tuple[str, str | None, str | None], ...] = (
    (
        "http://ns.adobe.com/tiff/1.0/",
        "Orientation|ImageWidth|ImageLength|BitsPerSample|SamplesPerPixel|Compression|PhotometricInterpretation",
        None,
    ),
    ("http://www.metadataworkinggroup.com/schemas/regions/", "AppliedToDimensions", None),
    ("http://ns.adobe.com/exif/1.0/", "PixelXDimension|PixelYDimension", None),
    ("http://ns.adobe.com/xap/1.0/", "Thumbnails", None),
    ("http://ns.adobe.com/xmp/note/", "HasExtendedXMP", None),
    ("http://ns.adobe.com/hdr-gain-map/1.0/", None, "gain map (HDR)"),
    ("http://ns.apple.com/HDRGainMap/1.0/", None, "gain map (HDR)"),
    ("http://ns.google.com/photos/1.0/container/", "Directory|Version", None),
    ("http://ns.google.com/photos/1.0/camera/", "MicroVideo[A-Za-z]*|MotionPhoto[A-Za-z]*", "motion picture"),
    ("http://ns.google.com/photos/1.0/image/", None, "second picture"),
    ("http://ns.google.com/photos/1.0/depthmap/", None, "depth map"),
    ("http://ns.google.com/photos/1.0/panorama/", "[A-Za-z]*Pixels", "panorama's sizes in pixels"),
)
"""XMP that does not apply to the output: the namespace, the names in it (None: all), and what is reported."""

_XMP_PLACES: tuple[tuple[str, str | None, str | None], ...] = (
    ("http://www.metadataworkinggroup.com/schemas/regions/", "Regions", "list of face regions, which turning moves,"),
    ("http://ns.microsoft.com/photo/1.2/", "RegionInfo", "list of face regions, which turning moves,"),
)
"""In the same way, XMP that does not apply to an image that was turned."""

_SRGB_CHROMATICITIES = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


@dataclass(frozen=True)
class Metadata:
    """
    Metadata of a file that also applies to the upscaled image.

    Args:
        icc_profile: colour profile.
        exif: EXIF data without orientation, sizes in pixels and other tags on how the original was stored.
        xmp: an XMP packet in UTF-8, without the same.
        iptc: IPTC-IIM records.
        comments: comments of JPEG, GIF and JPEG 2000, as bytes.
        texts: (name, data) of PNG text chunks.
        dpi: dots per inch, horizontally and vertically. Unchanged, so an upscaled image prints larger.
        color_chunks: data of the PNG chunks gAMA, cHRM, sRGB and cICP, by name.
    """

    icc_profile: bytes | None = None
    exif: Exif | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    comments: tuple[bytes, ...] = ()
    texts: tuple[tuple[bytes, bytes], ...] = ()
    dpi: tuple[float, float] | None = None
    color_chunks: Mapping[bytes, bytes] | None = None

    def without_color_space(self) -> "Metadata":
        """A copy without colour space, for pixels that were converted to sRGB."""
        exif = self.exif.without(*_COLOR_TAGS) if self.exif else None
        exif = replace(exif, interoperability={}) if exif else None
        return replace(self, icc_profile=None, color_chunks=None, exif=exif or None)


@dataclass
class _Reading:
    """Metadata collected while reading a file, its orientation, and messages on what is lost."""

    icc_profile: bytes | None = None
    exif: Exif | None = None
    xmp: bytes | None = None
    photoshop: bytes = b""
    iptc: bytes | None = None
    comments: tuple[bytes, ...] = ()
    texts: tuple[tuple[bytes, bytes], ...] = ()
    dpi: tuple[float, float] | None = None
    color_chunks: dict[bytes, bytes] | None = None
    losses: tuple[str, ...] = ()

    def lose(self, sentence: str) -> None:
        if sentence not in self.losses:
            self.losses = (*self.losses, sentence)

    def lose_aspect(self, x: int, y: int) -> None:
        """A density without a unit: it says how wide a pixel is."""
        if x != y:
            self.lose(f"its pixels are not square (density {x}:{y}), which is left out.")

    def take_exif(self, data: bytes) -> None:
        try:
            self.exif = parse_exif(data)
        except (ValueError, struct.error):
            self.lose("its EXIF data is damaged and is left out.")

    def finish(self) -> tuple[Metadata, int, tuple[str, ...]]:
        exif, orientation, dpi = self.exif, 1, _sane_dpi(self.dpi)
        if exif is not None:
            orientation, dpi = exif.orientation, dpi or _sane_dpi(exif.dpi)
            if exif.damaged:
                names = ", ".join(dict.fromkeys(map(tag_name, exif.damaged)))
                self.lose(f"damaged EXIF tags are left out: {_shortened(names)}.")
            if _TRANSFER_FUNCTION in exif.main:
                self.lose("its curve of brightness (TransferFunction) is left out.")
            description = exif.main.get(_DESCRIPTION, Entry(2, 0, b"")).data
            if description.startswith((b"ImageJ=", b'{"shape"')) or b"<OME" in description[:1000]:
                self.lose("its ImageDescription, which is about the stored data (ImageJ, OME), is left out.")
                exif = exif.without(_DESCRIPTION)
            if exif.main.keys() & set(_MAP_TAGS):
                self.lose("its georeferencing (GeoTIFF), which is in pixels, is left out.")
            offsets = [tag for tag, entry in exif.main.items() if entry.kind in (13, 18)]
            raw = range(0xC612, 0xC800) if 0xC612 in exif.main else ()  # DNG: how a camera's raw data are developed
            exif = exif.without(*_SIZE_TAGS, *_MAP_TAGS)
            main = exif.without(*_STORAGE_TAGS, *offsets, *raw).main
            exif = replace(exif, main=main, damaged=())
            if dpi and not exif.without(X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT):
                exif = None  # a TIFF file has its resolution there
        xmp = self.xmp
        if xmp:
            xmp, left_out = clean_xmp(xmp, is_turned=orientation != 1)
            for thing in left_out:
                self.lose(f"its {thing} is left out.")
        resources = photoshop_resources(self.photoshop)
        profile = self.icc_profile
        if profile is not None and (len(profile) < 132 or profile[36:40] != b"acsp"):
            self.lose("its colour profile is damaged and is left out.")
            profile = None
        if profile is not None and len(profile) > MAX_SIDE_BYTES:
            self.lose("its colour profile is too long and is left out.")
            profile = None
        metadata = Metadata(
            icc_profile=profile,
            exif=exif or None,
            xmp=xmp or None,
            iptc=self.iptc or resources.get(_IPTC) or None,
            comments=self.comments,
            texts=self.texts,
            dpi=dpi,
            color_chunks=self.color_chunks,
        )
        return metadata, orientation, self.losses


def read_jpeg_metadata(parts: JpegParts, info: Mapping[Any, Any]) -> tuple[Metadata, int, tuple[str, ...]]:
    """The metadata, the orientation (1 to 8) and messages on losses, of a JPEG file with this `Image.info`."""
    reading = _Reading(dpi=info.get("dpi"))
    exif, profile_parts, num_parts, extended, other_pictures = b"", {}, 0, False, False
    for marker, data in parts.segments:
        if marker == 0xE1 and data.startswith(b"Exif\0"):
            exif += data[6:]
        elif marker == 0xE1 and data.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            reading.xmp = reading.xmp or data[29:]
        elif marker == 0xE1 and data.startswith(b"http://ns.adobe.com/xmp/extension/\0"):
            extended = True
        elif marker == 0xE2 and data.startswith(b"ICC_PROFILE\0") and len(data) > 14:
            profile_parts.setdefault(data[12], data[14:])
            num_parts = data[13]
        elif marker == 0xE2 and data.startswith(b"MPF\0"):
            other_pictures = _num_other_pictures(data[4:]) > 0
        elif marker == 0xED and data.startswith(b"Photoshop 3.0\0"):
            reading.photoshop += data[14:]
        elif marker == 0xEB and data.startswith(b"JP"):
            reading.lose("its content credentials (C2PA), which hold for the original only, are left out.")
        elif marker == 0xFE:
            reading.comments += (data,)
    if info.get("jfif_unit") == 0:
        reading.lose_aspect(*info["jfif_density"])
    if exif:
        reading.take_exif(exif)
    if profile_parts:
        if sorted(profile_parts) == list(range(1, num_parts + 1)):
            reading.icc_profile = b"".join(profile_parts[number] for number in sorted(profile_parts))
        else:
            reading.lose("its colour profile is damaged and is left out.")
    if extended:
        reading.lose("its extended XMP is left out.")
    if b"ftyp" in parts.trailer[:4096]:
        reading.lose("the video appended to the image is left out.")
    if other_pictures:
        reading.lose("the file's other images (an HDR gain map, a depth map or a second view) are left out.")
    if not parts.is_whole:
        reading.lose("the file's last bytes are missing: the lower edge may be blurred or grey.")
    return reading.finish()


def read_png_metadata(parts: PngParts, info: Mapping[Any, Any]) -> tuple[Metadata, int, tuple[str, ...]]:
    """As `read_jpeg_metadata`, for a PNG file."""
    reading = _Reading()
    size, texts = 0, []
    for name, data in parts.chunks:
        if name in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = data.split(b"\0", 1)[0].decode("latin-1")[:79]
            text = _readable_text(name, data)
            if text is None:
                reading.lose(f"its text `{_printable(keyword)}` is damaged and is left out.")
                continue
            size += len(text[1])
            if size > MAX_SIDE_BYTES:
                reading.lose(f"its text `{_printable(keyword)}` is too long and is left out.")
            elif not _take_profile_text(reading, keyword, *text):
                texts.append(text)
        elif name == b"eXIf":
            reading.take_exif(data)
        elif name == b"iCCP":
            profile = _unpacked(data.split(b"\0", 1)[-1][1:])
            if profile is None:
                reading.lose("its colour profile is damaged and is left out.")
            reading.icc_profile = profile
        elif name == b"pHYs" and len(data) == 9:
            x, y, unit = struct.unpack(">IIB", data)
            if unit == 1:
                reading.dpi = (x * 0.0254, y * 0.0254)
            else:
                reading.lose_aspect(x, y)
        elif len(data) == {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"cICP": 4}.get(name):
            reading.color_chunks = {name: data, **(reading.color_chunks or {})}  # of two, the first one holds
        elif name in (b"gAMA", b"cHRM", b"sRGB", b"cICP"):
            reading.lose(f"its chunk {name.decode()} is damaged and is left out.")
        elif name == b"caBX":
            reading.lose("its content credentials (C2PA), which hold for the original only, are left out.")
        elif name == b"fdAT":
            reading.lose("only the first frame of the animation is upscaled.")
    reading.texts = tuple(texts)
    for name in parts.damaged:
        reading.lose(f"its chunk {_printable(name)} is damaged (a wrong checksum) and is left out.")
    return reading.finish()


def read_tiff_metadata(first: Exif, second: Exif | None) -> tuple[Metadata, int, tuple[str, ...]]:
    """As `read_jpeg_metadata`, for a TIFF file with these directories."""

    def data(tag: int) -> bytes:
        entry = first.main.get(tag)
        return b"" if entry is None else entry.data

    reading = _Reading(exif=first, dpi=first.dpi, xmp=data(_XMP_TAG) or None, photoshop=data(_PHOTOSHOP_TAG))
    reading.icc_profile = data(_ICC_TAG) or None
    reading.iptc = data(_IPTC_TAG) or None
    if second is not None and not int(second.number(second.main.get(254)) or 0) & 5:  # no preview and no mask
        reading.lose("only the first of several images is upscaled.")
    return reading.finish()


def read_other_metadata(image: Image.Image, head: bytes) -> tuple[Metadata, int, tuple[str, ...]]:
    """
    As `read_jpeg_metadata`, for any other format.

    Args:
        image: as opened by Pillow.
        head: the first bytes of the file, or the whole file of a JPEG 2000, which has metadata at its end too.
    """
    info = image.info
    reading = _Reading(dpi=info.get("dpi"), icc_profile=_bytes(info.get("icc_profile")), xmp=_bytes(info.get("xmp")))
    reading.comments = tuple(filter(None, [_bytes(info.get("comment"))]))
    if exif := _bytes(info.get("exif")):
        reading.take_exif(exif)
    for number, _, data in getattr(image, "resources", None) or ():  # PSD
        if number == _PHOTOSHOP_ICC:
            reading.icc_profile = data
        elif number == _PHOTOSHOP_XMP:
            reading.xmp = data
        elif number == _PHOTOSHOP_EXIF:
            reading.take_exif(data)
        elif number == _IPTC:
            reading.iptc = data
        elif number == _PHOTOSHOP_RESOLUTION and len(data) >= 16:
            x, _, _, y = struct.unpack_from(">IHHI", data)
            reading.dpi = (x / 65536, y / 65536)
    if image.format == "BMP":
        reading.icc_profile = _bmp_profile(head)
        reading.color_chunks = _bmp_color(head)
        if head[70:74] == b"KNIL" and head[14:18] == struct.pack("<I", 124):
            reading.lose("its colour profile, which is another file, is left out.")
    elif image.format == "JPEG2000":
        reading.icc_profile = reading.icc_profile or _jp2_profile(head)
        reading.xmp = _jp2_block(head, bytes.fromhex("be7acfcb97a942e89c71999491e3afac"))
        reading.iptc = _jp2_block(head, bytes.fromhex("33c7a4d2b81d4723a0baf1a3e097ad38"))
        if exif := _jp2_block(head, b"JpgTiffExif->JP2"):
            reading.take_exif(exif)
    elif image.format == "QOI" and head[13:14] == b"\1":
        reading.color_chunks = {b"gAMA": struct.pack(">I", 100_000)}  # linear
    elif image.format in ("AVIF", "HEIF"):
        reading.color_chunks = _nclx(head)
    if (bits := _bits(image.format, head)) > 8 and image.mode != "I;16":
        reading.lose(f"its {bits}-bit colour becomes 8-bit.")
    if image.format != "PSD" and getattr(image, "is_animated", False):
        reading.lose("only the first of several images is upscaled.")
    return reading.finish()


def fit_metadata(
    metadata: Metadata, file_format: str, *, is_grey: bool, suffix: str
) -> tuple[Metadata, tuple[str, ...]]:
    """
    The part of `metadata` that a file of `file_format` can hold, and messages on the rest.

    Args:
        file_format: Pillow's format name, one of those in `KEPT`.
        is_grey: whether the file's pixels are greyscale.
        suffix: the file's suffix, for the messages.
    """
    lost, losses = [], []

    def holds(kind: str) -> bool:
        return file_format in KEPT[kind]

    space = _space_of(metadata.icc_profile) if metadata.icc_profile else ""
    if space and (
        not holds("colour profile") or (file_format == "JPEG" and len(metadata.icc_profile or b"") > _MAX_JPEG_PROFILE)
    ):
        lost.append("colour profile")
        metadata = replace(metadata, icc_profile=None)
    elif space and space != ("GRAY" if is_grey else "RGB"):
        losses.append(f"its colour profile, {space}, does not fit the output and is left out.")
        metadata = replace(metadata, icc_profile=None)
    if metadata.exif and not holds("EXIF data"):
        lost.append("EXIF data" + " (with their mark of Adobe RGB)" * _is_adobe_rgb(metadata.exif))
        metadata = replace(metadata, exif=None)
    if metadata.exif and file_format == "JPEG":
        exif, left_out = _shortened_exif(metadata.exif, _MAX_SEGMENT - 6 - 2)
        if left_out:
            losses.append(f"more EXIF data than a {suffix} holds: left out {_plural(left_out)}.")
        metadata = replace(metadata, exif=exif)
    if metadata.xmp and (not holds("XMP") or (file_format == "JPEG" and len(metadata.xmp) > _MAX_SEGMENT - 29 - 2)):
        lost.append("XMP")
        metadata = replace(metadata, xmp=None)
    if metadata.iptc and (
        not holds("IPTC data") or (file_format == "JPEG" and len(metadata.iptc) > _MAX_SEGMENT - 14 - 14)
    ):
        lost.append("IPTC data")
        metadata = replace(metadata, iptc=None)
    longest = (_MAX_SEGMENT if file_format == "JPEG" else MAX_SIDE_BYTES) if holds("comment") else -1
    comments = tuple(comment for comment in metadata.comments if len(comment) <= longest)
    if comments != metadata.comments:
        lost.append("comment")
        metadata = replace(metadata, comments=comments)
    if metadata.texts and not holds("PNG text"):
        keywords = dict.fromkeys(data.split(b"\0", 1)[0].decode("latin-1") for _, data in metadata.texts)
        lost.append(f"PNG text ({_shortened(', '.join(map(_printable, keywords)))})")
        metadata = replace(metadata, texts=())
    if metadata.color_chunks and not holds("colour space in numbers"):
        if meaning := _color_meaning(metadata):
            losses.append(f"its colours need {meaning}, which a {suffix} cannot store.")
        metadata = replace(metadata, color_chunks=None)
    if lost:
        losses.append(f"a {suffix} cannot hold its {_plural(lost)}: left out.")
    return metadata, tuple(losses)


def save_options(metadata: Metadata, file_format: str) -> dict[str, Any]:
    """Arguments of Pillow's `save` for fitted metadata. For a TIFF, [`finish_tiff`] writes the rest."""
    options: dict[str, Any] = {}
    if metadata.icc_profile:
        options["icc_profile"] = metadata.icc_profile
    if metadata.dpi and file_format != "WEBP":
        options["dpi"] = metadata.dpi
    elif file_format == "BMP":
        options["dpi"] = (0, 0)  # unknown, where Pillow would write 96
    exif = metadata.exif
    if metadata.dpi and file_format == "WEBP":
        exif = (exif or Exif()).with_dpi(metadata.dpi)
    if exif and file_format in ("JPEG", "PNG", "WEBP"):
        options["exif"] = b"Exif\0\0" + exif.to_bytes()
    if file_format == "WEBP" and metadata.xmp:
        options["xmp"] = metadata.xmp
    if file_format == "JPEG":
        segments = []
        if metadata.xmp:
            segments.append((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + metadata.xmp))
        if metadata.iptc:
            segments.append((0xED, b"Photoshop 3.0\0" + photoshop_block({_IPTC: metadata.iptc})))
        segments += [(0xFE, comment) for comment in metadata.comments]
        options["extra"] = b"".join(
            bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data for marker, data in segments
        )
    if file_format == "PNG":
        options["pnginfo"] = _png_info(metadata)
    return options


def finish_tiff(data_at: ReadAt, length: int, metadata: Metadata) -> bytes | None:
    """
    Bytes to append to a TIFF file written by Pillow to add all metadata, and the new offset of its first directory;
    None if there is nothing to add.

    Args:
        data_at, length: the file, as in `read_directories`; `length` is even.
    """
    written, _ = read_directories(data_at, length)
    exif = (metadata.exif or Exif(written.order)).in_order(written.order)
    extra = {}
    if metadata.xmp:
        extra[_XMP_TAG] = Entry(BYTE, len(metadata.xmp), metadata.xmp)
    if metadata.iptc:
        extra[_IPTC_TAG] = Entry(UNDEFINED, len(metadata.iptc), metadata.iptc)
    if not exif and not extra:
        return None
    return replace(exif, main={**exif.main, **extra, **written.main}).directories_at(length)


def clean_xmp(packet: bytes, *, is_turned: bool = False) -> tuple[bytes, list[str]]:
    """
    An XMP packet in UTF-8 without what does not apply to the upscaled, upright image.

    Returns:
        The packet, and names of the removed references to other data in the file, which are reported.
    """
    has_mark = packet[:2] in (b"\xff\xfe", b"\xfe\xff")
    if has_mark or b"\0" in packet[:2]:
        codec = "utf-16" if has_mark else ("utf-16-le" if packet[1:2] == b"\0" else "utf-16-be")
        try:
            packet = packet.decode(codec).encode()
        except UnicodeDecodeError:
            return b"", ["XMP, which is damaged,"]
    packet, left_out = packet.rstrip(b"\0"), []
    for uri, names, thing in (*_XMP_NOTES, *(_XMP_PLACES if is_turned else ())):
        pattern = rb"xmlns:([A-Za-z_][\w.-]*)\s*=\s*[\"']" + re.escape(uri.encode()) + rb"[\"']"
        for prefix in list(dict.fromkeys(found[1] for found in re.finditer(pattern, packet)))[:4]:
            packet, count = _without(packet, prefix, (names or r"[\w.-]+").encode())
            if count and thing and thing not in left_out:
                left_out.append(thing)
    return packet, left_out


def _without(packet: bytes, prefix: bytes, names: bytes) -> tuple[bytes, int]:
    """XMP without the attributes and elements of these names, and the number removed."""
    name = re.escape(prefix) + rb":(?:" + names + rb")"
    packet, count = re.subn(rb"\s" + name + rb"\s*=\s*(?:\"[^\"]*\"|'[^']*')", b"", packet)
    kept, at = [], 0
    for opening in re.finditer(rb"<(" + name + rb")(?=[\s/>])[^<>]*>", packet):
        if opening.start() < at:
            continue
        end = opening.end()
        if not opening[0].endswith(b"/>"):
            closing = b"</" + opening[1] + b">"
            end = packet.find(closing, end)
            if end < 0:
                break
            end += len(closing)
        kept.append(packet[at : opening.start()])
        at, count = end, count + 1
    return b"".join([*kept, packet[at:]]), count


def tag_name(tag: int) -> str:
    """The EXIF name of a tag, or its number."""
    return ExifTags.TAGS.get(tag) or ExifTags.GPSTAGS.get(tag) or f"0x{tag:04x}"


def _shortened_exif(exif: Exif, max_bytes: int) -> tuple[Exif | None, list[str]]:
    """EXIF data without as many of the largest tags as necessary, and the names of those."""
    left_out = []
    while exif and len(exif.to_bytes()) > max_bytes:
        entries = {**exif.main, **exif.exposure, **exif.place, **exif.interoperability}
        largest = max(entries, key=lambda tag: len(entries[tag].data))
        exif = exif.without(largest)
        left_out.append(tag_name(largest))
    return exif or None, left_out


def _take_profile_text(reading: _Reading, keyword: str, name: bytes, data: bytes) -> bool:
    """Whether a PNG text holds metadata of another kind, which is then recorded."""
    if keyword == "XML:com.adobe.xmp":
        reading.xmp = reading.xmp or _text_of(name, data)
        return True
    kind = keyword.removeprefix("Raw profile type ")  # of ImageMagick: a name, a length and hexadecimal digits
    if kind == keyword or kind.lower() not in ("exif", "app1", "xmp", "iptc", "8bim", "icc", "icm"):
        return False
    lines = _text_of(name, data).strip().split(b"\n", 2)
    try:
        content = bytes.fromhex(lines[2].decode("ascii"))
    except (IndexError, ValueError):
        reading.lose(f"its text `{_printable(keyword)}` is damaged and is left out.")
        return True
    kind = kind.lower()
    if kind in ("iptc", "8bim"):
        is_block = content.startswith(b"8BIM") or content.startswith(b"Photoshop 3.0\0")
        reading.photoshop += (
            content.removeprefix(b"Photoshop 3.0\0") if is_block else photoshop_block({_IPTC: content})
        )
    elif kind in ("icc", "icm"):
        reading.icc_profile = reading.icc_profile or content
    elif content.startswith(b"http://ns.adobe.com/xap/1.0/\0") or kind == "xmp":
        reading.xmp = reading.xmp or content.removeprefix(b"http://ns.adobe.com/xap/1.0/\0")
    elif reading.exif is None:
        reading.take_exif(content)
    return True


def _readable_text(name: bytes, data: bytes) -> tuple[bytes, bytes] | None:
    """A PNG text chunk that every reader accepts: stored uncompressed if it is long after decompression."""
    keyword, _, rest = data.partition(b"\0")
    if name == b"zTXt":
        text = _unpacked(rest[1:])
        if text is None:
            return None
        return (name, data) if len(text) <= _READABLE_TEXT else (b"tEXt", keyword + b"\0" + text)
    if name == b"iTXt":
        if len(rest) < 2 or rest[2:].count(b"\0") < 2:
            return None
        if rest[0]:
            language, translated, packed = rest[2:].split(b"\0", 2)
            text = _unpacked(packed)
            if text is None:
                return None
            if len(text) > _READABLE_TEXT:
                return name, keyword + b"\0\0\0" + language + b"\0" + translated + b"\0" + text
    return name, data


def _text_of(name: bytes, data: bytes) -> bytes:
    """The text of a readable chunk, as bytes."""
    rest = data.partition(b"\0")[2]
    if name == b"tEXt":
        return rest
    if name == b"zTXt":
        return _unpacked(rest[1:]) or b""
    text = rest[2:].split(b"\0", 2)[2]
    return (_unpacked(text) or b"") if rest[0] else text


def _unpacked(data: bytes) -> bytes | None:
    """Decompressed data; None if that fails or it is longer than `MAX_SIDE_BYTES`."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, MAX_SIDE_BYTES + 1)
    except zlib.error:
        return None
    return text if unpacker.eof and len(text) <= MAX_SIDE_BYTES else None


def _png_info(metadata: Metadata) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for name, data in (metadata.color_chunks or {}).items():
        info.add(name, data)
    if metadata.xmp:
        info.add(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp)
    if metadata.iptc:
        block = photoshop_block({_IPTC: metadata.iptc})
        text = f"\niptc\n{len(block):8}\n{block.hex()}\n".encode()
        info.add(b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(text))
    for comment in metadata.comments:
        try:
            text = comment.decode()
        except UnicodeDecodeError:
            text = comment.decode("latin-1")
        info.add(b"iTXt", b"Comment\0\0\0\0\0" + text.rstrip("\0").encode())
    for name, data in metadata.texts:
        info.add(name, data)
    return info


def _color_meaning(metadata: Metadata) -> str:
    """The colour space in PNG chunks if it is not sRGB and nothing else in the file defines one; else empty."""
    chunks = metadata.color_chunks or {}
    if cicp := chunks.get(b"cICP"):
        if cicp[0] in (1, 2) and cicp[1] in (1, 2, 6, 13, 14, 15) and cicp[3]:
            return ""
        narrow = "" if cicp[3] else " (in a narrow range)"
        return f"the primaries {cicp[0]} and the transfer function {cicp[1]} of cICP{narrow}"
    if metadata.icc_profile or b"sRGB" in chunks:
        return ""
    meanings = []
    gamma = int.from_bytes(chunks.get(b"gAMA", b""))
    if gamma and abs(gamma - 45455) > 500:
        meanings.append(f"a gamma of {gamma / 100_000:g} (gAMA)")
    if b"cHRM" in chunks:
        values = struct.unpack(">8I", chunks[b"cHRM"])
        if any(abs(value - own) > 1000 for value, own in zip(values, _SRGB_CHROMATICITIES, strict=True)):
            meanings.append("their own primaries (cHRM)")
    return " and ".join(meanings)


def _is_adobe_rgb(exif: Exif) -> bool:
    index, space = exif.interoperability.get(1), exif.exposure.get(_COLOR_SPACE)
    return (index is not None and index.data.startswith(b"R03")) or (space is not None and exif.number(space) == 2)


def _space_of(profile: bytes) -> str:
    """The colour space in the header of an ICC profile: RGB, GRAY, CMYK, ..."""
    return _printable(profile[16:20].decode("latin-1").strip())


def _num_other_pictures(block: bytes) -> int:
    """The number of further images in a JPEG file, without previews."""
    try:
        first, _ = read_directories(lambda offset, size: block[offset : offset + size], len(block))
    except (ValueError, struct.error):
        return 0
    entry = first.main.get(0xB002)
    if entry is None:
        return 0
    attributes = [
        struct.unpack_from(first.order + "I", entry.data, at)[0] for at in range(16, len(entry.data) - 15, 16)
    ]
    return sum(attribute & 0xFFFFFF not in (0x010001, 0x010002) for attribute in attributes)


def _bmp_profile(head: bytes) -> bytes | None:
    """The colour profile embedded in a BMP file of version 5."""
    if len(head) < 138 or head[14:18] != struct.pack("<I", 124) or head[70:74] != b"DEBM":
        return None
    offset, size = struct.unpack_from("<II", head, 126)
    return head[14 + offset : 14 + offset + size] or None


def _bmp_color(head: bytes) -> dict[bytes, bytes] | None:
    """The gamma and the primaries of a BMP file of version 4 or 5 that has its own, as PNG chunks."""
    if len(head) < 122 or int.from_bytes(head[14:18], "little") < 108 or head[70:74] != bytes(4):
        return None
    *ends, gamma, _, _ = struct.unpack_from("<12I", head, 74)  # X, Y and Z of red, green and blue; 2**30 is 1
    places = [ends[at : at + 3] for at in (0, 3, 6)]
    places.insert(0, [sum(axis) for axis in zip(*places, strict=True)])  # white
    if not gamma or not all(place[1] for place in places):
        return None
    numbers = [round(100_000 * value / sum(place)) for place in places for value in place[:2]]
    return {b"gAMA": struct.pack(">I", round(100_000 * 65536 / gamma)), b"cHRM": struct.pack(">8I", *numbers)}


def _jp2_profile(head: bytes) -> bytes | None:
    at = head.find(b"colr\2")
    if at < 4:
        return None
    (size,) = struct.unpack_from(">I", head, at - 4)
    return head[at + 7 : at - 4 + size] or None


def _jp2_block(data: bytes, name: bytes) -> bytes | None:
    """The content of the box of a JPEG 2000 file with a `name` of 16 bytes."""
    at = data.find(b"uuid" + name)
    if at < 4:
        return None
    (size,) = struct.unpack_from(">I", data, at - 4)
    return data[at + 20 : at - 4 + size if size else None] or None


def _bits(file_format: str | None, head: bytes) -> int:
    """Bits of a channel of a JPEG 2000, AVIF or HEIC file; 8 for other formats."""
    mark, place = {"JPEG2000": (b"\xff\x4f\xff\x51", 42), "AVIF": (b"av1C", 6), "HEIF": (b"hvcC", 21)}.get(
        file_format or "", (b"", 0)
    )
    at = head.find(mark) + place
    if not mark or not place <= at < len(head):
        return 8
    if file_format == "AVIF":
        return 8 if not head[at] & 0x40 else 12 if head[at] & 0x20 else 10
    return (head[at] & 127) + 1 if file_format == "JPEG2000" else (head[at] & 7) + 8


def _nclx(head: bytes) -> dict[bytes, bytes] | None:
    """The colour space of an AVIF or HEIC image as a cICP chunk, unless it is sRGB."""
    at = head.find(b"colrnclx")
    if at < 0 or len(head) < at + 15:
        return None
    primaries, transfer = struct.unpack_from(">HH", head, at + 8)
    if (primaries in (1, 2, 5, 6, 7) and transfer in (1, 2, 6, 7, 13, 14, 15)) or max(primaries, transfer) > 255:
        return None
    return {b"cICP": bytes([primaries, transfer, 0, 1])}


def _sane_dpi(dpi: tuple[float, float] | None) -> tuple[float, float] | None:
    """A resolution that every format can store, or None."""
    try:
        x, y = (float(value) for value in dpi or ())
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 1 <= x <= 65535 and 1 <= y <= 65535 else None


def _bytes(value: object) -> bytes | None:
    if isinstance(value, str):
        return value.encode()
    return value if isinstance(value, bytes) and value else None


def _plural(things: list[str]) -> str:
    return things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _shortened(text: str, length: int = 120) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."
