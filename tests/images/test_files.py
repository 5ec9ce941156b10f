"""Files opened, planned and saved."""

import io
import os
import re
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, features

from tests.images.making import SRGB, camera_exif, encoded, picture, png, tiff, with_chunks, with_segments, xmp
from uplift_diffusers.images import files
from uplift_diffusers.images.exif import Entry, Exif
from uplift_diffusers.images.files import (
    INPUT_FORMATS,
    INPUT_SUFFIXES,
    OUTPUT_FORMATS,
    OpenedImage,
    check_image_header,
    find_image_files,
    open_image,
    plan_saving,
    save_image,
)
from uplift_diffusers.images.tiff import tiff_directories

GREY16 = np.linspace(0, 65535, 24 * 32).round().astype(np.uint16).reshape(24, 32)


def opened(data):
    return open_image(io.BytesIO(data))


def pixels(data):
    return np.asarray(opened(data).image).astype(int)


def difference(image, other):
    """Mean absolute difference of two images of one size and mode, in 8-bit levels."""
    assert (image.size, image.mode) == (other.size, other.mode)
    return np.abs(np.asarray(image, dtype=float) - np.asarray(other, dtype=float)).mean()


# Kinds of files


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [
        *((name, "RGB") for name in ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000", "TGA", "PPM", "ICO")),
        *((name, "RGB") for name in ("DIB", "DDS", "PCX", "SGI", "QOI")),
        *((name, "1") for name in ("MSP", "XBM")),
    ],
)
def test_formats_are_read(file_format, mode):
    source = picture(32, 32).convert(mode)
    if file_format == "QOI":  # which older versions of Pillow only read: a run of 62 pixels of one colour
        data = b"qoif" + struct.pack(">IIBB", 31, 2, 3, 0) + b"\xfe\x0a\x14\x1e\xfc" + b"\0" * 7 + b"\1"
        assert (pixels(data) == (10, 20, 30)).all()
        return
    image = opened(encoded(source, file_format)).image
    assert image.size == (32, 32)
    expected = source.convert("L" if mode == "1" else "RGB")
    assert difference(image.convert(expected.mode), expected) < (12 if file_format in ("GIF", "JPEG", "WEBP") else 2)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_and_turned_once():
    data = encoded(picture(), "AVIF", quality=100, exif=camera_exif(6))
    result = opened(data)
    assert difference(result.image, picture().transpose(Image.Transpose.ROTATE_270)) < 3
    assert result.metadata.exif.orientation == 1


def test_every_suffix_of_the_formats_that_are_read_is_found():
    registered = {suffix for suffix, name in Image.registered_extensions().items() if name in INPUT_FORMATS}
    assert registered | {".heic", ".heif", ".hif"} == INPUT_SUFFIXES
    assert {".jfif", ".jpe", ".jp2", ".tga", ".pnm", ".apng", ".qoi", ".avif", ".ico"} <= INPUT_SUFFIXES
    assert {".eps", ".ps", ".wmf", ".emf", ".pdf", ".iim", ".fits", ".h5"}.isdisjoint(INPUT_SUFFIXES)


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n",
        b"not pixels at all",
        b"\xd7\xcd\xc6\x9a" + b"\0" * 100,
        b"SIMPLE  =                    T" + b" " * 3000,
    ],
)
def test_what_is_no_picture_or_a_program_is_not_opened(data):
    for read in (open_image, check_image_header):
        with pytest.raises(ValueError, match="not an image, or an unsupported format"):
            read(io.BytesIO(data))


def test_postscript_starts_no_program(tmp_path):
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    script.chmod(0o755)
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    code = "import sys; from uplift_diffusers.images.files import open_image; open_image(sys.argv[1])"
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.png"],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(Path(files.__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert "an unsupported format" in result.stderr
    assert not (tmp_path / "started").exists()


def test_heic_without_its_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + b"\0" * 100
    with pytest.raises(ValueError, match="HEIC images need pillow-heif: pip install pillow-heif"):
        opened(data)


def test_sizes_over_the_limit_are_refused():
    for size, file_format in (((20_000, 20_000), "PNG"), ((10_001, 10_000), "TIFF")):
        options = {"compression": "group4"} if file_format == "TIFF" else {}
        data = encoded(Image.new("1", size), file_format, **options)
        with pytest.raises(ValueError, match="larger than the limit of 100 megapixels"):
            opened(data)


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match="the file is empty"):
        open_image(tmp_path / "empty.png")
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "none.png")
    with pytest.raises(IsADirectoryError):
        open_image(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(ValueError, match="a named pipe"):
            open_image(tmp_path / "pipe.png")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 2, 2, 16, 3), "damaged, or an unsupported kind of PSD."),
        (encoded(picture(), "GIF")[:30], "damaged, or an unsupported kind of GIF."),
        (
            b"BM" + struct.pack("<IHHIIiiHHI", 72, 0, 0, 70, 56, 1, 1, 1, 16, 3) + bytes(54),
            "the image is of an unsupported kind (Unsupported BMP bitfields layout).",
        ),
    ],
)
def test_the_format_of_what_is_not_read_is_named(data, sentence):
    for read in (open_image, check_image_header):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            read(io.BytesIO(data))


def test_the_fourth_channel_of_a_tga_without_alpha_is_padding():
    def tga(alpha, bits):
        header = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 4, 3, 32, 32 | bits)
        return opened(header + bytes([3, 2, 1, alpha]) * 12).image

    assert np.asarray(tga(0, 0))[0, 0].tolist() == [1, 2, 3]
    for alpha, bits in ((0, 8), (128, 8), (128, 0)):
        assert np.asarray(tga(alpha, bits))[0, 0].tolist() == [1, 2, 3, alpha]


# What the numbers mean


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("L", "L"), ("1", "L"), ("P", "RGB"), ("RGB", "RGB"), ("RGBA", "RGBA"), ("LA", "LA"), ("I;16", "I;16")],
)
def test_modes_come_back_as_grey_or_colour(mode, expected):
    source = Image.fromarray(GREY16) if mode == "I;16" else picture().convert(mode)
    result = opened(encoded(source, "PNG")).image
    assert result.mode == expected
    assert result.info == {}
    assert difference(result, source if mode == expected else source.convert(expected)) == 0


@pytest.mark.parametrize(
    ("depth", "color_type", "key"),
    [(1, 0, 1), (2, 0, 2), (4, 0, 9), (8, 0, 100), (16, 0, 40_000), (8, 2, (1, 2, 3)), (16, 2, (258, 772, 5))],
)
def test_transparent_colour_of_every_depth_becomes_alpha(depth, color_type, key):
    rng = np.random.default_rng(0)
    channels = 1 if color_type == 0 else 3
    values = rng.integers(0, 2**depth, (9, 11, channels))
    is_key = rng.random((9, 11)) < 0.4
    values[is_key] = key
    values[0, 0] = np.array(key) ^ 1  # differs in the last bit only
    is_key[0, 0] = False
    is_key |= (values == key).all(axis=2)
    stored = np.broadcast_to(key, channels)
    data = png(values, depth=depth, color_type=color_type, chunks=[(b"tRNS", struct.pack(f">{channels}H", *stored))])
    image = opened(data).image
    assert image.mode == ("LA" if channels == 1 else "RGBA")
    array = np.asarray(image).astype(int)
    assert ((array[..., -1] == 0) == is_key).all()
    assert set(np.unique(array[..., -1])) <= {0, 255}
    assert np.abs(array[..., :-1] - values * 255 / (2**depth - 1)).max() < 1.01


def test_transparent_entries_of_a_palette_become_alpha():
    image = picture().quantize(8)
    data = encoded(image, "PNG", transparency=bytes([0, 128, 255]))
    expected = Image.open(io.BytesIO(data)).convert("RGBA")
    assert difference(opened(data).image, expected) == 0
    assert set(np.unique(np.asarray(expected)[..., 3])) == {0, 128, 255}
    gif = encoded(image, "GIF", transparency=3)
    assert ((pixels(gif)[..., 3] == 0) == (np.asarray(image) == 3)).all()


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_deep_grey_with_alpha_stays_grey_and_is_told(file_format):
    values = np.dstack([GREY16, GREY16[::-1]])
    result = opened(png(values, depth=16, color_type=4) if file_format == "PNG" else tiff(values, t338=[2]))
    assert result.image.mode == "LA"
    assert np.abs(np.asarray(result.image) - values / 257).max() <= 1
    assert result.losses == ("its 16-bit grey becomes 8-bit, because it has transparency.",)


@pytest.mark.parametrize("channels", [3, 4])
def test_deep_colour_becomes_eight_bit_and_is_told(channels):
    values = np.random.default_rng(0).integers(0, 65536, (9, 11, channels)).astype(np.uint16)
    for data in (png(values, depth=16, color_type={3: 2, 4: 6}[channels]), tiff(values, photometric=2)):
        result = opened(data)
        assert np.abs(np.asarray(result.image) - values / 257).max() < 1
        assert result.losses == ("its 16-bit colour becomes 8-bit.",)


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_tiff_whose_white_is_zero_is_no_negative(kind, order, compression):
    highest = np.iinfo(kind).max
    values = (GREY16 >> (0 if highest == 65535 else 8)).astype(kind)
    black_is_zero, white_is_zero = (
        pixels(tiff(values, order=order, photometric=photometric, compression=compression)) for photometric in (1, 0)
    )
    assert (black_is_zero == values).all()
    assert (white_is_zero == highest - values.astype(int)).all()


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "group4", "jpeg"])
def test_tiff_whose_white_is_zero_is_no_negative_however_it_is_compressed(compression):
    source = picture().convert("1" if compression == "group4" else "L")
    data = encoded(source, "TIFF", compression=compression)
    at = data.index(struct.pack("<HHI", 262, 3, 1)) + 8
    inverted = data[:at] + bytes([1 - data[at]]) + data[at + 1 :]
    assert (pixels(inverted) == 255 - pixels(data)).all()
    assert difference(opened(data).image, source.convert("L")) < 3


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("layout", ["pixels", "planes", "tiles"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("photometric", "extra"),
    [(0, ()), (0, (2,)), (1, (1,)), (1, (2,)), (2, ()), (2, (0,)), (2, (1,)), (2, (0, 2)), (5, ())],
)
def test_tiff_of_every_layout_shows_what_it_stores(photometric, extra, kind, layout, order):
    num_colors = {2: 3, 5: 4}.get(photometric, 1)
    highest = np.iinfo(kind).max
    stored = np.random.default_rng(0).integers(0, highest, (16, 32, num_colors + len(extra)), dtype=kind)
    if 1 in extra:  # the colours are multiplied by alpha
        stored[..., -1] |= highest // 2 + 1
        stored[..., :-1] //= 2
    color, alpha = stored[..., :num_colors].astype(float), stored[..., -1:] if max(extra, default=0) else None
    if photometric == 0:
        color = highest - color
    elif photometric == 5:
        color = (highest - color[..., :3]) * (highest - color[..., 3:]) / highest
    color = color * highest / alpha if 1 in extra else color
    expected = color if alpha is None else np.concatenate([color, alpha], axis=2)
    size = stored.nbytes // stored.shape[2]
    tags = {"t338": list(extra)} if extra else {}
    written = stored
    if layout == "planes":
        written = np.moveaxis(stored, 2, 0).reshape(stored.shape)
        starts = range(8, 8 + stored.nbytes, size)
        tags |= {"t284": [2], "t273": list(starts), "t279": [size] * len(starts)}
    elif layout == "tiles":
        written = stored.reshape(16, 2, 16, -1).swapaxes(0, 1).reshape(stored.shape)
        half = stored.nbytes // 2
        tags |= {"t322": [16], "t323": [16], "t324": [8, 8 + half], "t325": [half] * 2}
    array = pixels(tiff(written, order=order, photometric=photometric, **tags))
    scale = 255 if array.max() < 256 else 65535
    assert scale == (65535 if expected.shape[2] == 1 and highest > 255 else 255)
    assert np.abs(array.reshape(expected.shape) - expected * scale / highest).max() < 2


def test_big_tiff_of_both_byte_orders_is_read():
    for order in "<>":
        first, _ = tiff_directories(io.BytesIO(tiff(GREY16, order=order)))
        table = b""
        for tag, entry in first.main.items():
            value = struct.pack(order + "Q", 16) if tag == 273 else entry.data
            table += struct.pack(order + "HHQ", tag, 16 if tag == 273 else entry.kind, 1) + value.ljust(8, b"\0")
        head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HHHQ", 43, 8, 0, 16 + GREY16.nbytes)
        block = struct.pack(order + "Q", len(first.main)) + table + bytes(8)
        assert (pixels(head + GREY16.astype(order + "u2").tobytes() + block) == GREY16).all()


def test_tiff_that_is_cut_off_within_its_last_row_is_refused():
    values = np.asarray(picture())
    first, _ = tiff_directories(io.BytesIO(tiff(values, photometric=2)))
    place = Entry(4, 1, struct.pack("<I", len(first.to_bytes())))  # the pixels come last
    moved = Exif("<", {**first.main, 273: place}).to_bytes() + values.tobytes()
    assert (pixels(moved) == values).all()
    with pytest.raises(ValueError, match="damaged or cut off"):
        opened(moved[:-9])


@pytest.mark.parametrize(
    "tags",
    [
        {"t273": [2**31]},
        {"t273": [8, 8], "t278": [8]},  # one strip of three is missing
        {"t278": [0]},
        {"t322": [0], "t323": [16], "t324": [8], "t325": [768]},
        {"t322": [60_000], "t323": [60_000], "t324": [8], "t325": [768]},
        {"t284": [2], "t262": [2], "t277": [3], "t258": [8, 8, 8]},  # one plane of three is there
        {"t257": [50_000], "t278": [1]},
        {"t256": [0]},
        {"t258": [65535]},
        {"t258": [12]},
        {"t277": [65535]},
    ],
)
@pytest.mark.parametrize("compression", [1, 8])
def test_tiff_that_contradicts_itself_is_refused_in_one_sentence(tags, compression):
    with pytest.raises(ValueError, match=r"^(the image is |damaged, or |\d+-bit pixels)[^\n]*\.$"):
        opened(tiff(np.zeros((24, 32), np.uint8), compression=compression, **tags))


def test_pillows_limit_does_not_count_the_bytes_of_a_tiff(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 24)
    assert difference(opened(encoded(picture(), "TIFF", compression="tiff_lzw")).image, picture()) == 0


@pytest.mark.parametrize("planes", [1, 2])
def test_a_tiff_that_is_read_in_parts_is_the_same(monkeypatch, planes):
    values = np.random.default_rng(0).integers(0, 65536, (32, 48, 3), dtype=np.uint16)
    strips = encoded(picture(64, 100), "TIFF", compression="tiff_lzw", tiffinfo={278: 3})
    stored = np.moveaxis(values, 2, 0) if planes == 2 else values[None]
    stored = stored.reshape(len(stored), 2, 16, 3, 16, -1).swapaxes(2, 3).reshape(values.shape)
    size = 512 if planes == 2 else 1536
    tags = {"t322": [16], "t323": [16], "t324": list(range(8, 8 + values.nbytes, size)), "t284": [planes]}
    tags["t325"] = [size] * len(tags["t324"])
    tiles = tiff(stored, photometric=2, **tags)
    monkeypatch.setattr("uplift_diffusers.images.tiff._BAND_BYTES", 1)
    assert difference(opened(strips).image, picture(64, 100)) == 0
    assert np.abs(pixels(tiles) - values / 257).max() < 1


def test_grey_and_alpha_of_a_tiff_with_differences_along_the_rows():
    values = np.dstack([GREY16, GREY16[::-1]])
    differences = values.copy()
    differences[:, 1:] -= values[:, :-1]
    for order in "<>":
        array = pixels(tiff(differences, order=order, compression=8, t338=[2], t317=[2]))
        assert np.abs(array - values / 257).max() <= 1


@pytest.mark.parametrize(
    ("kind", "sample_format", "sentence"),
    [
        (np.float32, 3, "32-bit floating-point pixels, whose range is unknown: save it with 8 or 16 bits."),
        (np.float64, 3, "64-bit floating-point pixels"),
        (np.float16, 3, "16-bit floating-point pixels"),
        (np.int16, 2, "signed 16-bit pixels, from -32768 to 32767: save it"),
        (np.int8, 2, "signed 8-bit pixels, from -128 to 127"),
        (np.int32, 2, "signed 32-bit pixels, from -2147483648 to 2147483647"),
        (np.uint32, 1, "32-bit pixels, from 0 to 4294967295"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_that_are_not_read_are_named_in_terms_of_the_file(kind, sample_format, sentence, channels):
    values = np.ones((4, 5) if channels == 1 else (4, 5, 3), kind)
    data = tiff(values, photometric=1 if channels == 1 else 2, t339=[sample_format] * channels)
    for read in (open_image, check_image_header):
        with pytest.raises(ValueError, match=f"^{sentence}"):
            read(io.BytesIO(data))


def test_portable_float_map_is_named():
    data = b"Pf\n2 2\n-1.0\n" + np.ones((2, 2), "<f4").tobytes()
    with pytest.raises(ValueError, match="floating-point"):
        opened(data)


def cmyk_profile():
    """A profile of four inks by a table of two steps for each: Lab, which falls with every ink."""
    table = []
    for index in range(16):
        cyan, magenta, yellow, black = (index >> shift & 1 for shift in (3, 2, 1, 0))
        lightness = max(0, 95 - 25 * cyan - 35 * magenta - 8 * yellow - 70 * black)
        a, b = -40 * cyan + 60 * magenta, -40 * cyan + 80 * yellow
        table += [round(lightness * 652.8), round((a + 128) * 256), round((b + 128) * 256)]
    lut = b"mft2\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut += struct.pack(">HH", 2, 2) + struct.pack(">8H", *([0, 65535] * 4))
    lut += struct.pack(">48H", *table) + struct.pack(">6H", *([0, 65535] * 3))
    white = struct.pack(">iii", 63190, 65536, 54061)
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 6) + b"press\0" + b"\0" * 78,
        b"wtpt": b"XYZ \0\0\0\0" + white,
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"A2B0": lut,
    }
    start, index, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        body += b"\0" * (-len(body) % 4)
        index += name + struct.pack(">II", start + len(body), len(data))
        body += data
    header = struct.pack(">I", start + len(body)) + b"\0" * 4 + struct.pack(">I", 0x02200000) + b"prtrCMYKLab "
    return (header + b"\0" * 12 + b"acsp" + b"\0" * 28 + white).ljust(128, b"\0") + index + body


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_four_inks_go_through_their_own_profile(file_format):
    inks = Image.new("CMYK", (16, 16), (0, 255, 0, 0))
    options = {"quality": 100} if file_format == "JPEG" else {}
    profile = cmyk_profile()
    result = opened(encoded(inks, file_format, icc_profile=profile, exif=camera_exif(), **options))
    expected = ImageCms.profileToProfile(
        inks, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert difference(result.image, expected) < 2
    assert difference(result.image, inks.convert("RGB")) > 20
    assert result.losses == ()
    assert result.metadata.icc_profile is None  # it describes other numbers
    for without in (None, profile[:400]):
        losses = opened(encoded(inks, file_format, icc_profile=without, **options)).losses
        assert any("it is CMYK" in loss for loss in losses)


def test_orientations_are_applied_once():
    for orientation in range(1, 9):
        data = encoded(picture(), "PNG", exif=camera_exif(orientation))
        result = opened(data)
        assert difference(result.image, ImageOps.exif_transpose(Image.open(io.BytesIO(data)))) == 0
        assert result.metadata.exif.orientation == 1


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_orientation_of_a_tiff_is_applied_once(compression, orientation):
    data = encoded(picture(), "TIFF", compression=compression, tiffinfo={0x0112: orientation})
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}[orientation]
    assert difference(opened(data).image, picture().transpose(turn)) == 0


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_that_is_in_xmp_only_turns_nothing(file_format):
    packet = xmp('tiff:Orientation="6"')
    options = {"xmp": packet}
    if file_format == "PNG":
        options = {}
    elif file_format == "TIFF":
        options = {"tiffinfo": {700: packet}}
    data = encoded(picture(), file_format, **options)
    if file_format == "PNG":
        data = with_chunks(data, (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet))
    result = opened(data)
    assert result.image.size == (32, 24)
    assert b"Rating" in result.metadata.xmp
    assert b"Orientation" not in result.metadata.xmp


# Damage and what lies beside the pixels


@pytest.mark.parametrize("options", [{}, {"quality": 95, "subsampling": 0}, {"progressive": True}, {"quality": 30}])
@pytest.mark.parametrize("size", [(48, 32), (200, 200)])
def test_jpeg_without_its_end_is_shown_as_far_as_it_goes(options, size):
    data = encoded(picture(*size), "JPEG", **options)
    whole = pixels(data)
    for missing in (1, 2):
        result = opened(data[:-missing])
        assert (np.asarray(result.image) == whole).all()
        assert "last bytes are missing" in result.losses[0]
    part = np.abs(pixels(data[:-12]) - whole)
    assert part[: size[1] // 2 - 2].max() <= (0 if not options.get("progressive") else 60)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_jpeg_of_which_much_is_missing_is_refused(options):
    data = encoded(picture(400, 400), "JPEG", quality=95, **options)
    missing = "its end is missing" if options else r"[4-6]\d % of its rows are missing"
    with pytest.raises(ValueError, match=rf"damaged or cut off \({missing}\)"):
        opened(data[: len(data) // (4 if options else 2)])


def test_black_rows_are_not_taken_for_missing_ones():
    array = np.array(picture(200, 200))
    array[80:] = 0
    data = encoded(Image.fromarray(array), "JPEG")
    assert (pixels(data[:-2]) == pixels(data)).all()


def test_png_that_is_cut_off_is_refused_and_one_without_its_end_is_not():
    data = encoded(picture(), "PNG")
    assert (pixels(data[:-12]) == pixels(data)).all()
    with pytest.raises(ValueError, match="damaged or cut off"):
        opened(data[: len(data) // 2])


def test_wrong_checksum_costs_a_chunk_of_text_only():
    data = with_chunks(encoded(picture(), "PNG"), (b"tEXt", b"Title\0a boat"), (b"tEXt", b"Author\0somebody"))
    at = data.index(b"a boat")
    result = opened(data[:at] + b"A" + data[at + 1 :])
    assert difference(result.image, picture()) == 0
    assert result.losses == ("its chunk tEXt is damaged (a wrong checksum) and is left out.",)
    assert result.metadata.texts == ((b"tEXt", b"Author\0somebody"),)
    check_image_header(io.BytesIO(data[:at] + b"A" + data[at + 1 :]))
    at = data.index(b"IDAT") + 10
    with pytest.raises(ValueError, match="checksum of the chunk IDAT is wrong"):
        opened(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def test_jpeg_segments_that_make_no_sense_cost_nothing():
    data = with_segments(
        encoded(picture(), "JPEG"),
        (0xE1, b"Exif\0\0nonsense"),
        (0xE2, b"ICC_PROFILE\0\2\3nonsense"),
        (0xE2, b"MPF\0nonsense"),
        (0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\xff\xff\xff\xff"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe\0"),
        (0xEE, b"nonsense"),
    )
    result = opened(data)
    assert difference(result.image, opened(encoded(picture(), "JPEG")).image) == 0
    assert "its EXIF data is damaged and is left out." in result.losses
    assert "its colour profile is damaged and is left out." in result.losses


def test_pages_are_not_counted():
    single = tiff(np.zeros((8, 8), np.uint8))
    (start,) = struct.unpack_from("<I", single, 4)
    directory, data = single[start:-4], bytearray(single[:-4])
    for _ in range(40_000):
        data += struct.pack("<I", len(data) + 4) + directory
    read = []

    class Counting(io.BytesIO):
        def read(self, size=-1):
            read.append(size)
            return super().read(size)

    result = open_image(Counting(bytes(data + b"\0\0\0\0")))
    assert result.losses == ("only the first of several images is upscaled.",)
    assert len(read) < 1000


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_only_the_first_picture_is_taken_and_that_is_told(file_format):
    frames = [picture(seed=seed) for seed in (0, 1, 2)]
    options = {"lossless": True} if file_format == "WEBP" else {}
    result = opened(encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options))
    if file_format == "PNG":  # of two, the first one is not part of the animation
        hidden = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:2], default_image=True)
        assert opened(hidden).losses == result.losses
    assert len(result.losses) == 1
    assert result.losses[0].startswith("only the first")
    assert difference(result.image.convert("RGB"), frames[0]) < 12


def test_previews_are_no_second_pictures():
    preview = encoded(picture(8, 6), "TIFF", tiffinfo={254: 1})
    assert opened(preview).losses == ()
    data = io.BytesIO()
    with Image.new("RGB", (1, 1)) as _:
        picture().save(data, "TIFF", save_all=True, append_images=[picture(8, 6)])
    raw = bytearray(data.getvalue())
    first = struct.unpack_from("<I", raw, 4)[0]
    second = struct.unpack_from("<I", raw, first + 2 + 12 * struct.unpack_from("<H", raw, first)[0])[0]
    # the second directory's first tag becomes NewSubfileType 1, a reduced picture
    struct.pack_into("<HHII", raw, second + 2, 254, 4, 1, 1)
    assert opened(bytes(raw)).losses == ()


def test_mpo_gives_the_main_picture_and_a_line():
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    result = opened(data)
    assert difference(result.image, picture()) < 6
    assert any("other images" in loss for loss in result.losses)


# Saving


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".JPEG", ".webp", ".tif", ".tiff", ".bmp"])
def test_suffix_picks_the_format(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    save_image(picture(), path)
    with Image.open(path) as image:
        assert image.format == OUTPUT_FORMATS[suffix.lower()]
        is_lossy = image.format in ("JPEG", "WEBP")
        assert difference(image.convert("RGB"), picture()) < (6 if is_lossy else 1e-9)


def test_jpeg_is_written_at_quality_95_without_chroma_subsampling(tmp_path):
    save_image(picture(), tmp_path / "a.jpg")
    expected = Image.open(io.BytesIO(encoded(picture(), "JPEG", quality=95, subsampling=0)))
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.quantization == expected.quantization
        assert [component[1:3] for component in image.layer] == [(1, 1)] * 3


def test_other_suffixes_are_refused(tmp_path):
    for save in (lambda: save_image(picture(), tmp_path / "a.gif"), lambda: plan_saving(OpenedImage(picture()), "")):
        with pytest.raises(ValueError, match=r"must end in .png, .jpg"):
            save()
    assert list(tmp_path.iterdir()) == []


def with_alpha(mode):
    """`picture()`, opaque in its right half and transparent in its left one."""
    image = picture().convert(mode)
    alpha = Image.new("L", image.size, 0)
    alpha.paste(255, (16, 0, 32, 24))
    image.putalpha(alpha)
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_alpha_is_kept(tmp_path, mode, suffix):
    save_image(with_alpha(mode), tmp_path / f"a{suffix}")
    image = open_image(tmp_path / f"a{suffix}").image
    assert image.mode == ("RGBA" if suffix == ".webp" else mode)
    assert (np.asarray(image.getchannel("A")) == np.asarray(with_alpha(mode).getchannel("A"))).all()


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_on_white_where_the_format_has_none(tmp_path, suffix, mode):
    expected = picture().convert(mode.removesuffix("A"))
    expected.paste("white", (0, 0, 16, 24))
    save_image(with_alpha(mode), tmp_path / f"a{suffix}")
    assert difference(open_image(tmp_path / f"a{suffix}").image, expected) < 3


def test_what_the_pixels_lose_is_told_before_the_work():
    opaque = picture().convert("RGBA")
    deep = OpenedImage(Image.fromarray(GREY16))
    for suffix in OUTPUT_FORMATS:
        losses = plan_saving(OpenedImage(with_alpha("LA")), suffix.upper()).losses
        composited = (f"a {suffix} has no transparency: the image is composited on white.",)
        assert losses == (composited if suffix in (".jpg", ".jpeg", ".bmp") else ())
        rounded = (f"its 16-bit grey becomes 8-bit in a {suffix}.",)
        assert plan_saving(deep, suffix).losses == (() if suffix in (".png", ".tif", ".tiff") else rounded)
        assert plan_saving(OpenedImage(opaque), suffix).losses == ()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_stays_sixteen_bit(tmp_path, suffix):
    save_image(Image.fromarray(GREY16), tmp_path / f"a{suffix}")
    assert difference(open_image(tmp_path / f"a{suffix}").image, Image.fromarray(GREY16)) == 0


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".bmp"])
def test_sixteen_bit_grey_is_rounded_to_eight_where_the_format_has_no_more(tmp_path, suffix):
    save_image(Image.fromarray(GREY16), tmp_path / f"a{suffix}")
    expected = Image.fromarray((GREY16 / 65535 * 255).round().astype(np.uint8))
    assert difference(open_image(tmp_path / f"a{suffix}").image.convert("L"), expected) < 2


def test_images_of_other_modes_are_saved_and_their_info_is_not_written(tmp_path):
    image = picture().convert("CMYK")
    image.info = {"comment": b"of another file", "icc_profile": SRGB, "dpi": (300, 300)}
    save_image(image, tmp_path / "a.jpg")
    result = open_image(tmp_path / "a.jpg")
    assert result.image.mode == "RGB"
    assert result.metadata.comments == ()
    assert result.metadata.icc_profile is None


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_have_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "ordinary").touch()
    save_image(picture(), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_an_existing_file_is_replaced_only_on_request(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        save_image(picture(), path)
    assert path.read_bytes() == b"precious"
    save_image(picture(), path, overwrite=True)
    assert difference(open_image(path).image, picture()) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_a_full_disk_is_named_with_the_output(tmp_path, monkeypatch, suffix):
    encode = Image.Image.save

    def onto_full_disk(self, file, **options):
        with open("/dev/full", "r+b", buffering=0) as full:
            file.write, file.flush, file.tell = full.write, full.flush, lambda: 0
            file.seek = lambda *arguments: 0
            encode(self, file, **options)

    monkeypatch.setattr(Image.Image, "save", onto_full_disk)
    with pytest.raises(OSError, match="No space left") as raised:
        save_image(picture(400, 400), tmp_path / f"a{suffix}")
    assert raised.value.filename == str(tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == []


# Folders


def test_folder_is_searched_and_nothing_is_passed_over_in_silence(tmp_path):
    for name in ("b.jpg", "a.PNG", "sub/c.jfif", "sub/d.heic", "notes.txt", "more.TXT", "README", "x.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for hidden in (".d.png", ".trash/e.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).touch()
    (tmp_path / "to-folder").symlink_to(tmp_path / "sub")
    (tmp_path / "to-file.png").symlink_to(tmp_path / "b.jpg")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "b.jpg").touch()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
    found = find_image_files(tmp_path, leave_out=tmp_path / "sub" / ".." / "done")
    assert [path.relative_to(tmp_path).as_posix() for path in found.files] == [
        "a.PNG",
        "b.jpg",
        "sub/c.jfif",
        "sub/d.heic",
        "to-file.png",
    ]
    assert found.left_out == {".mp4": 1, ".txt": 2, "no suffix": 1}
    problems = {path.name: sentence for path, sentence in found.problems}
    assert problems.pop("pipe.png", "a named pipe").count("a named pipe") == 1
    assert problems == {
        "dangling.png": "a broken link.",
        "to-folder": "a link to a folder, which is not followed.",
    }


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.png").touch()
    scandir = os.scandir

    def denied(path):  # permissions mean nothing to root
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    found = find_image_files(tmp_path)
    assert [path.name for path in found.files] == ["a.png"]
    assert found.problems == ((tmp_path / "closed", "Permission denied."),)
    assert stat.S_ISDIR((tmp_path / "closed").stat().st_mode)
