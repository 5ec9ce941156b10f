"""Image files by a few lines, where Pillow cannot write what is needed."""

import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin

from uplift_diffusers.images.containers import PNG_SIGNATURE, png_chunk
from uplift_diffusers.images.exif import Entry, Exif

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY_PROFILE = SRGB[:16] + b"GRAY" + SRGB[20:]


def picture(width=32, height=24, seed=0):
    """A smooth RGB image with one dark edge, at the left, so that turning and mirroring it can be told."""
    noise = np.random.default_rng(seed).integers(60, 256, (3, 4, 3), dtype=np.uint8)
    array = np.array(Image.fromarray(noise).resize((width, height), Image.BICUBIC))
    array[:, : width // 4] //= 8
    return Image.fromarray(array)


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(values, *, depth, color_type, chunks=()):
    """A PNG of (H, W) or (H, W, channels) integers, with `chunks` (name, data) before the pixels."""
    values = np.asarray(values)
    height, width = values.shape[:2]
    rows = values.reshape(height, -1)
    if depth == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1  # (H, values of a row, depth)
        lines = [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits]
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    parts = [
        (b"IHDR", header),
        *chunks,
        (b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines))),
        (b"IEND", b""),
    ]
    return PNG_SIGNATURE + b"".join(png_chunk(*part) for part in parts)


def tiff(values, *, order="<", photometric=1, compression=1, **tags):
    """A TIFF of one strip of (H, W) or (H, W, channels) numbers, raw (1) or deflated (8); `tags` are t258=[...]."""
    values = np.asarray(values)
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if compression == 8 else data
    data += b"\0" * (len(data) % 2)
    numbers = {
        256: [width], 257: [height], 258: [values.itemsize * 8] * channels, 259: [compression], 262: [photometric],
        273: [8], 277: [channels], 278: [height], 279: [len(data)],
    }  # fmt: skip
    numbers |= {int(tag[1:]): value for tag, value in tags.items()}
    main = {
        tag: Entry(4 if max(value) > 65535 else 3, len(value), struct.pack(
            f"{order}{len(value)}{'I' if max(value) > 65535 else 'H'}", *value))
        for tag, value in numbers.items()
    }  # fmt: skip
    mark = {"<": b"II", ">": b"MM"}[order]
    head = mark + struct.pack(order + "HI", 42, 8 + len(data))
    return head + data + Exif(order, main).directories_at(8 + len(data))


def with_segments(jpeg, *segments):
    """A JPEG file with more segments (marker, data) behind its first two bytes."""
    inserted = b"".join(bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data for marker, data in segments)
    return jpeg[:2] + inserted + jpeg[2:]


def with_chunks(file, *chunks):
    """A PNG file with more chunks (name, data) behind its header."""
    return file[:33] + b"".join(png_chunk(*chunk) for chunk in chunks) + file[33:]


def camera_exif(orientation=1):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Camera works"
    exif[ExifTags.Base.Copyright] = "Someone"
    exif[ExifTags.IFD.Exif] = {
        ExifTags.Base.DateTimeOriginal: "2026:01:02 03:04:05",
        ExifTags.Base.ExposureTime: TiffImagePlugin.IFDRational(1, 100),
        ExifTags.Base.ExifImageWidth: 32,
        ExifTags.Base.ExifImageHeight: 24,
    }
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N", ExifTags.GPS.GPSLatitude: (1.0, 2.0, 3.0)}
    return exif.tobytes()


def xmp(attributes="", elements="", prefixes=""):
    return (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        f'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {prefixes} '
        f'xmp:Rating="4" {attributes}>{elements}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()
