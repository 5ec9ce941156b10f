"""What lies beside the pixels: kept where the output can hold it, else named."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.images.making import (
    GREY_PROFILE,
    SRGB,
    camera_exif,
    encoded,
    picture,
    png,
    tiff,
    with_chunks,
    with_segments,
    xmp,
)
from uplift_diffusers.images.containers import photoshop_block
from uplift_diffusers.images.exif import Entry, Exif, parse_exif
from uplift_diffusers.images.files import OUTPUT_FORMATS, OpenedImage, open_image, plan_saving, save_image
from uplift_diffusers.images.metadata import KEPT, Metadata, clean_xmp, read_other_metadata

SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "TIFF": ".tif", "BMP": ".bmp"}

EXIF = Exif(
    ">",
    main={
        0x010F: Entry(2, 5, b"Acme\0"),
        0x8298: Entry(2, 10, b"A. Person\0"),
        0x013E: Entry(5, 2, struct.pack(">4I", 313, 1000, 329, 1000)),
    },
    exposure={
        0x9003: Entry(2, 20, b"2020:01:02 03:04:05\0"),
        0x9101: Entry(7, 4, b"\1\2\3\0"),
        0x9204: Entry(10, 1, struct.pack(">ii", -2, 0)),
        0x9286: Entry(7, 20, b"UNICODE\0" + "a boat".encode("utf-16-be")),
        0x927C: Entry(7, 40, b"MN" * 20),
        0xA001: Entry(3, 1, struct.pack(">H", 65535)),
        0xA301: Entry(7, 1, b"\1"),
    },
    place={1: Entry(2, 2, b"N\0"), 2: Entry(5, 3, struct.pack(">6I", 52, 1, 30, 1, 1234, 100))},
    interoperability={1: Entry(2, 4, b"R03\0"), 2: Entry(7, 4, b"0100")},
)
EVERYTHING = Metadata(
    icc_profile=SRGB,
    exif=EXIF,
    xmp=xmp(),
    iptc=b"\x1c\x02\x78\0\6a boat",
    comments=(b"a comment", b"another one"),
    texts=((b"tEXt", b"parameters\0a boat\nSteps: 20"), (b"iTXt", "Title\0\0\0de\0Titel\0Schön".encode())),
    dpi=(300.0, 150.0),
    color_chunks={b"gAMA": struct.pack(">I", 100_000), b"cHRM": struct.pack(">8I", *range(10_000, 90_000, 10_000))},
)
FIELDS = {
    "colour profile": "icc_profile",
    "EXIF data": "exif",
    "XMP": "xmp",
    "IPTC data": "iptc",
    "comment": "comments",
    "PNG text": "texts",
    "resolution": "dpi",
    "colour space in numbers": "color_chunks",
}


def opened(data):
    return open_image(io.BytesIO(data))


def saved(tmp_path, metadata, file_format, image=None):
    """What is read from a file that was saved with `metadata`."""
    path = tmp_path / f"a{SUFFIXES[file_format]}"
    save_image(image or picture(), path, metadata=metadata, overwrite=True)
    return open_image(path)


def same(value, expected):
    if isinstance(expected, Exif):
        value = value.in_order(expected.order)
        main = {tag: value.main.get(tag) for tag in expected.main}
        return (main, value.exposure, value.place, value.interoperability) == (
            expected.main, expected.exposure, expected.place, expected.interoperability,
        )  # fmt: skip
    if isinstance(expected, tuple) and isinstance(expected[0], float):
        return np.allclose(value, expected, rtol=0, atol=0.02)
    return value == expected


@pytest.mark.parametrize("kind", list(KEPT))
@pytest.mark.parametrize("file_format", list(SUFFIXES))
def test_every_kind_is_kept_as_it_is_where_the_table_says_so_and_told_elsewhere(tmp_path, kind, file_format):
    field = FIELDS[kind]
    metadata = Metadata(**{field: getattr(EVERYTHING, field)})
    losses = plan_saving(OpenedImage(picture(), metadata), SUFFIXES[file_format]).losses
    result = saved(tmp_path, metadata, file_format).metadata
    if file_format in KEPT[kind]:
        value = getattr(result, field)
        expected = getattr(metadata, field)
        if kind == "comment" and file_format == "PNG":
            value, expected = result.texts, tuple((b"iTXt", b"Comment\0\0\0\0\0" + text) for text in expected)
        if kind == "resolution" and file_format == "JPEG":
            expected = (300.0, 150.0)
        assert same(value, expected)
        assert losses == ()
    else:
        assert result == Metadata()
        (loss,) = losses
        assert SUFFIXES[file_format] in loss
        assert (kind if kind != "colour space in numbers" else "gamma of 1") in loss


@pytest.mark.parametrize("file_format", list(SUFFIXES))
def test_everything_together_is_kept_or_told_in_one_sentence(tmp_path, file_format):
    plan = plan_saving(OpenedImage(picture(), EVERYTHING), SUFFIXES[file_format])
    result = saved(tmp_path, EVERYTHING, file_format)
    assert result.losses == ()
    for kind, field in FIELDS.items():
        if file_format in KEPT[kind] and kind != "comment":
            expected = getattr(EVERYTHING, field)
            value = getattr(result.metadata, field)
            value = value[: len(expected)] if field == "texts" else value
            assert same(value, expected) or (field == "texts" and set(expected) <= set(result.metadata.texts))
    assert len(plan.losses) <= 2


def test_pillow_and_others_read_what_is_written(tmp_path):
    for file_format in ("PNG", "JPEG", "WEBP", "TIFF"):
        saved(tmp_path, EVERYTHING, file_format)
        with Image.open(tmp_path / f"a{SUFFIXES[file_format]}") as image:
            image.load()
            exif = image.getexif()
            assert exif[0x010F] == "Acme"
            assert exif.get_ifd(0x8769)[0x9003] == "2020:01:02 03:04:05"
            assert exif.get_ifd(0x8825)[2] == (52.0, 30.0, 12.34)
            assert image.info["icc_profile"] == SRGB
            assert b"Rating" in (image.info.get("xmp") or image.info["XML:com.adobe.xmp"].encode())
            if file_format == "PNG":
                assert image.text["parameters"] == "a boat\nSteps: 20"
                assert image.text["Title"] == "Schön"
                assert image.info["gamma"] == 1.0
            if file_format != "WEBP":
                assert image.info["dpi"][0] == pytest.approx(300, abs=0.01)
            assert np.abs(np.asarray(image).astype(int) - np.asarray(picture())).mean() < 6


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_is_applied_once_and_other_exif_kept(tmp_path, file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(picture(), file_format, exif=camera_exif(6), **options)
    for output in ("PNG", "JPEG", "WEBP", "TIFF"):
        source = opened(data)
        saved(tmp_path, source.metadata, output, image=source.image)
        with Image.open(tmp_path / f"a{SUFFIXES[output]}") as image:
            assert image.size == (24, 32)
            exif = image.getexif()
            assert 0x0112 not in exif
            assert ImageOps.exif_transpose(image).size == (24, 32)
            assert exif[0x010F] == "Camera works"
            assert exif.get_ifd(0x8769) == {0x9003: "2026:01:02 03:04:05", 0x829A: 0.01}
            assert exif.get_ifd(0x8825)[2] == (1.0, 2.0, 3.0)


def test_one_damaged_tag_costs_itself_only():
    block = bytearray(EXIF.to_bytes())
    at = block.index(struct.pack(">HH", 0x927C, 7))
    struct.pack_into(">I", block, at + 8, 10**6)  # the maker's note lies outside
    result = opened(with_segments(encoded(picture(), "JPEG"), (0xE1, b"Exif\0\0" + bytes(block))))
    assert result.losses == ("damaged EXIF tags are left out: MakerNote.",)
    assert same(result.metadata.exif, EXIF.without(0x927C))


def test_exif_that_points_into_itself_ends():
    block = bytearray(EXIF.to_bytes())
    at = block.index(struct.pack(">HHI", 0x8769, 4, 1))
    struct.pack_into(">I", block, at + 8, 8)  # the exposure is the main directory again
    assert parse_exif(bytes(block)).main[0x010F].data == b"Acme\0"
    with pytest.raises(ValueError, match="no TIFF header"):
        parse_exif(b"Exif\0\0nonsense")
    with pytest.raises(ValueError, match="outside"):
        parse_exif(b"MM\0*\xff\xff\xff\xff")


def test_tags_that_say_how_the_original_was_stored_are_not_kept():
    tags = {0x0100: 1000, 0x0101: 500, 0x0128: 2, 0x0103: 6, 0x0201: 7, 34264: 3}
    main = {tag: Entry(3, 1, struct.pack(">H", value)) for tag, value in tags.items()}
    sizes = {0xA002: Entry(3, 1, b"\0\1"), 0xA003: Entry(3, 1, b"\0\1"), 0x9214: Entry(3, 2, b"\0\1\0\1")}
    exif = Exif(">", {**EXIF.main, **main}, {**EXIF.exposure, **sizes}, EXIF.place, EXIF.interoperability)
    data = with_segments(encoded(picture(), "JPEG"), (0xE1, b"Exif\0\0" + exif.to_bytes()))
    result = opened(data)
    assert result.metadata.exif.main.keys() == EXIF.main.keys() | {0x0128}
    assert result.metadata.exif.exposure == EXIF.exposure
    assert result.losses == ("its georeferencing (GeoTIFF), which is in pixels, is left out.",)


def test_tiff_tags_that_are_no_exif_become_their_own_kinds(tmp_path):
    block = photoshop_block({0x0404: b"\x1c\x02\x78\0\6a boat", 0x0425: b"hash"})
    data = tiff(
        np.asarray(picture()), photometric=2, t700=list(xmp()), t34675=list(SRGB), t34377=list(block), t330=[8],
        t282=[1], t283=[1],
    )  # fmt: skip
    # The helper writes numbers as SHORT; these kinds are bytes.
    buffer = io.BytesIO()
    picture().save(buffer, "TIFF", tiffinfo={700: xmp(), 34377: block}, icc_profile=SRGB, dpi=(200, 200))
    result = opened(buffer.getvalue())
    assert result.metadata == Metadata(icc_profile=SRGB, xmp=xmp(), iptc=b"\x1c\x02\x78\0\6a boat", dpi=(200.0, 200.0))
    assert opened(data).image.size == (32, 24)


def test_more_exif_than_a_jpeg_holds_is_told_before_the_work(tmp_path):
    long = Exif(">", EXIF.main, {**EXIF.exposure, 0x9286: Entry(7, 70_000, b"ASCII\0\0\0" + b"x" * 69_992)})
    source = opened(encoded(picture(), "PNG", exif=b"Exif\0\0" + long.to_bytes()))
    assert source.losses == ()
    plan = plan_saving(source, ".jpg")
    assert plan.losses == ("more EXIF data than a .jpg holds: left out UserComment.",)
    assert same(saved(tmp_path, source.metadata, "JPEG").metadata.exif, long.without(0x9286))
    assert same(saved(tmp_path, source.metadata, "PNG").metadata.exif, long)


def test_longer_comments_and_profiles_than_a_jpeg_holds_are_told(tmp_path):
    metadata = Metadata(comments=(b"short", b"x" * 70_000), icc_profile=SRGB + bytes(17 * 2**20))
    assert plan_saving(OpenedImage(picture(), metadata), ".png").losses == ()
    losses = plan_saving(OpenedImage(picture(), metadata), ".jpg").losses
    assert losses == ("a .jpg cannot hold its colour profile and comment: left out.",)
    assert saved(tmp_path, metadata, "JPEG").metadata == Metadata(comments=(b"short",))


@pytest.mark.parametrize("text", [b"ImageJ=1.54\nimages=3\n", b'{"shape": [24, 32]}', b'<?xml version="1.0"?><OME>'])
def test_a_description_of_the_stored_data_is_told_and_one_of_the_picture_kept(text):
    result = opened(encoded(picture(), "TIFF", tiffinfo={270: text}))
    assert 270 not in (result.metadata.exif or Exif()).main
    assert result.losses == ("its ImageDescription, which is about the stored data (ImageJ, OME), is left out.",)
    assert opened(encoded(picture(), "TIFF", tiffinfo={270: "a boat"})).metadata.exif.main[270].data == b"a boat\0"


def test_metadata_of_jpeg_2000_are_read():
    ids = {xmp(): "be7acfcb97a942e89c71999491e3afac", b"\x1c\2\x78\0\6a boat": "33c7a4d2b81d4723a0baf1a3e097ad38"}
    ids[EXIF.to_bytes()] = b"JpgTiffExif->JP2".hex()
    boxes = [struct.pack(">I", 24 + len(data)) + b"uuid" + bytes.fromhex(name) + data for data, name in ids.items()]
    metadata = opened(encoded(picture(), "JPEG2000") + b"".join(boxes)).metadata
    assert (metadata.xmp, metadata.iptc) == (xmp(), b"\x1c\2\x78\0\6a boat")
    assert same(metadata.exif, EXIF)


@pytest.mark.parametrize(
    ("name", "head", "bits"),
    [
        ("AVIF", b"av1C\x81\4\x4c\0", 10),
        ("AVIF", b"av1C\x81\4\x6c\0", 12),
        ("AVIF", b"av1C\x81\4\x0c\0", 8),
        ("HEIF", b"hvcC" + b"\0" * 17 + b"\xfa", 10),
        ("JPEG2000", b"\xff\x4f\xff\x51" + b"\0" * 38 + b"\x0b", 12),
        ("JPEG2000", b"\xff\x4f", 8),
        ("GIF", b"av1C\x81\4\x4c\0", 8),
    ],
)
def test_colour_of_more_bits_is_told(name, head, bits):
    image = picture()
    image.format = name
    _, _, losses = read_other_metadata(image, b"...." + head)
    assert losses == ((f"its {bits}-bit colour becomes 8-bit.",) if bits > 8 else ())


@pytest.mark.parametrize("field", ["xmp", "iptc"])
def test_more_than_a_jpeg_segment_holds_is_told(tmp_path, field):
    metadata = Metadata(**{field: b"<x>" + b"a" * 70_000})
    losses = plan_saving(OpenedImage(picture(), metadata), ".jpg").losses
    assert losses == (f"a .jpg cannot hold its {'XMP' if field == 'xmp' else 'IPTC data'}: left out.",)
    assert saved(tmp_path, metadata, "JPEG").metadata == Metadata()
    assert saved(tmp_path, metadata, "PNG").metadata == metadata


# Colour


@pytest.mark.parametrize(
    ("mode", "profile", "suffix", "is_kept"),
    [
        ("RGB", SRGB, ".png", True),
        ("RGB", SRGB, ".webp", True),
        ("L", GREY_PROFILE, ".jpg", True),
        ("L", GREY_PROFILE, ".webp", False),  # which is RGB
        ("L", SRGB, ".png", False),
        ("RGB", GREY_PROFILE, ".png", False),
        ("RGB", SRGB, ".bmp", False),
    ],
)
def test_a_profile_is_kept_where_it_describes_the_pixels_and_told_elsewhere(tmp_path, mode, profile, suffix, is_kept):
    source = OpenedImage(picture().convert(mode), Metadata(icc_profile=profile))
    plan = plan_saving(source, suffix)
    assert (plan.metadata.icc_profile == profile) == is_kept
    assert len(plan.losses) == (0 if is_kept else 1)
    assert "colour profile" in "".join((*plan.losses, "colour profile"))
    save_image(source.image, tmp_path / f"a{suffix}", metadata=source.metadata)
    assert open_image(tmp_path / f"a{suffix}").metadata.icc_profile == (profile if is_kept else None)


def test_damaged_and_huge_profiles_cost_themselves_only():
    source = encoded(picture(), "PNG")
    damaged = with_chunks(source, (b"iCCP", b"name\0\0" + zlib.compress(SRGB)[:50]))
    nonsense = with_chunks(source, (b"iCCP", b"name\0\0" + zlib.compress(b"x" * 500)))
    bomb = with_chunks(source, (b"iCCP", b"name\0\0" + zlib.compress(bytes(100 * 2**20))))
    for data in (damaged, nonsense, bomb):
        result = opened(data)
        assert result.losses == ("its colour profile is damaged and is left out.",)
        assert result.image.size == (32, 24)
    large = SRGB + bytes(3 * 2**20)  # more than Pillow takes
    assert opened(with_chunks(source, (b"iCCP", b"name\0\0" + zlib.compress(large)))).metadata.icc_profile == large


def test_parts_of_a_profile_in_a_jpeg_are_put_in_order(tmp_path):
    profile = SRGB + np.random.default_rng(0).bytes(150_000)
    assert saved(tmp_path, Metadata(icc_profile=profile), "JPEG").metadata.icc_profile == profile
    parts = [(0xE2, b"ICC_PROFILE\0" + bytes([number, 2]) + part) for number, part in ((2, SRGB[99:]), (1, SRGB[:99]))]
    assert opened(with_segments(encoded(picture(), "JPEG"), *parts)).metadata.icc_profile == SRGB
    lacking = opened(with_segments(encoded(picture(), "JPEG"), parts[0]))
    assert lacking.losses == ("its colour profile is damaged and is left out.",)


@pytest.mark.parametrize(
    ("chunks", "meaning"),
    [
        ({b"gAMA": struct.pack(">I", 45455)}, None),
        ({b"gAMA": struct.pack(">I", 100_000), b"sRGB": b"\0"}, None),
        ({b"cICP": b"\1\x0d\0\1"}, None),
        ({b"gAMA": struct.pack(">I", 100_000)}, "a gamma of 1 (gAMA)"),
        ({b"cHRM": struct.pack(">8I", *[30_000] * 8)}, "their own primaries (cHRM)"),
        ({b"cICP": b"\1\x0d\0\0"}, "the primaries 1 and the transfer function 13 of cICP (in a narrow range)"),
        ({b"cICP": b"\x09\x10\0\1"}, "the primaries 9 and the transfer function 16 of cICP"),
    ],
)
def test_chunks_that_mean_another_space_than_srgb_are_told(chunks, meaning):
    data = with_chunks(encoded(picture(), "PNG"), *chunks.items())
    assert opened(data).metadata.color_chunks == chunks
    assert plan_saving(opened(data), ".png").losses == ()
    losses = plan_saving(opened(data), ".jpg").losses
    expected = f"its colours need {meaning}, which a .jpg cannot store."
    assert losses == (() if meaning is None else (expected,))


def test_marks_of_adobe_rgb_go_where_exif_goes_and_are_told_elsewhere():
    source = OpenedImage(picture(), Metadata(exif=EXIF))
    assert plan_saving(source, ".webp").metadata.exif.interoperability[1].data == b"R03\0"
    told = ("a .bmp cannot hold its EXIF data (with their mark of Adobe RGB): left out.",)
    assert plan_saving(source, ".bmp").losses == told
    number = Exif("<", {}, exposure={0xA001: Entry(3, 1, b"\2\0")})  # ColorSpace 2, as some cameras have it
    assert plan_saving(OpenedImage(picture(), Metadata(exif=number)), ".bmp").losses == told


def test_a_bitmap_with_a_gamma_and_primaries_of_its_own_keeps_their_meaning():
    adobe = [0.5767, 0.2973, 0.0270, 0.1856, 0.6274, 0.0707, 0.1882, 0.0753, 0.9911]  # X, Y, Z of red, green, blue
    numbers = [round(value * 2**30) for value in adobe] + [round(2.2 * 65536)] * 3
    header = struct.pack("<IiiHHIIiiII", 108, 4, 4, 1, 24, 0, 48, 0, 0, 0, 0) + b"\0" * 16
    header += bytes(4) + struct.pack("<12I", *numbers)
    bitmap = b"BM" + struct.pack("<IHHI", 14 + 108 + 48, 0, 0, 122) + header + bytes(48)
    chunks = opened(bitmap).metadata.color_chunks
    assert struct.unpack(">I", chunks[b"gAMA"]) == (45455,)
    wanted = [31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000]
    assert struct.unpack(">8I", chunks[b"cHRM"]) == pytest.approx(wanted, abs=20)
    assert "their own primaries (cHRM)" in plan_saving(opened(bitmap), ".jpg").losses[0]
    ordinary = bitmap[:70] + b"BGRs" + bitmap[74:]  # "sRGB"
    assert opened(ordinary).metadata.color_chunks is None


def test_a_curve_of_brightness_is_told():
    values = np.zeros((2, 2, 3), np.uint8)
    told = opened(tiff(values, photometric=2, t301=list(range(256)))).losses
    assert told == ("its curve of brightness (TransferFunction) is left out.",)


# Texts


def test_texts_of_all_three_chunks_are_kept_as_they_are(tmp_path):
    chunks = (
        (b"tEXt", b"Comment\0first"),
        (b"tEXt", b"Comment\0second"),
        (b"zTXt", b"prompt\0\0" + zlib.compress(b'{"3": {}}')),
        (b"iTXt", b"Title\0\1\0de\0Titel\0" + zlib.compress("Schön".encode())),
    )
    source = opened(with_chunks(encoded(picture(), "PNG"), *chunks))
    assert source.metadata.texts == chunks
    assert saved(tmp_path, source.metadata, "PNG").metadata.texts == chunks
    losses = plan_saving(source, ".jpg").losses
    assert losses == ("a .jpg cannot hold its PNG text (Comment, prompt, Title): left out.",)


def test_long_texts_are_kept_so_that_every_reader_takes_them(tmp_path):
    text = b"node " * 300_000
    packed = zlib.compress(text)
    for chunk in ((b"zTXt", b"workflow\0\0" + packed), (b"iTXt", b"workflow\0\1\0\0\0" + packed)):
        source = opened(with_chunks(encoded(picture(), "PNG"), chunk))
        assert source.losses == ()
        save_image(source.image, tmp_path / "a.png", metadata=source.metadata, overwrite=True)
        with Image.open(tmp_path / "a.png") as image:
            image.load()
            assert image.text["workflow"] == text.decode()


def test_texts_without_end_and_damaged_ones_are_told_by_name():
    bomb = (b"zTXt", b"bomb\0\0" + zlib.compress(bytes(100 * 2**20)))
    cut = (b"zTXt", b"cut\x1b[31m\0\0" + zlib.compress(b"a boat")[:-3])
    short = (b"iTXt", b"short\0\0")
    result = opened(with_chunks(encoded(picture(), "PNG"), bomb, cut, short))
    assert result.metadata == Metadata()
    names = ("bomb", "cut?[31m", "short")
    assert result.losses == tuple(f"its text `{name}` is damaged and is left out." for name in names)
    many = [(b"tEXt", b"many\0" + bytes([97]) * 12 * 2**20)] * 3
    result = opened(with_chunks(encoded(picture(), "PNG"), *many))
    assert len(result.metadata.texts) == 2
    assert result.losses == ("its text `many` is too long and is left out.",)


def test_profiles_in_the_texts_of_imagemagick_are_the_kinds_that_they_hold():
    def raw(kind, content):
        return b"zTXt", f"Raw profile type {kind}\0\0".encode() + zlib.compress(
            f"\n{kind}\n{len(content):8}\n{content.hex()}\n".encode()
        )

    turned = Exif(">", {**EXIF.main, 0x0112: Entry(3, 1, b"\0\6")}, EXIF.exposure, EXIF.place, EXIF.interoperability)
    chunks = (
        raw("exif", b"Exif\0\0" + turned.to_bytes()),
        raw("xmp", xmp('tiff:Orientation="6"')),
        raw("iptc", photoshop_block({0x0404: b"\x1c\x02\x78\0\6a boat"})),
        raw("icc", SRGB),
    )
    result = opened(with_chunks(encoded(picture(), "PNG"), *chunks))
    assert result.image.size == (24, 32)
    metadata = result.metadata
    assert same(metadata.exif, EXIF)
    assert (metadata.iptc, metadata.icc_profile, metadata.texts) == (b"\x1c\x02\x78\0\6a boat", SRGB, ())
    assert b"Orientation" not in metadata.xmp


# XMP


def test_xmp_loses_what_is_no_longer_true_and_nothing_else():
    prefixes = (
        'xmlns:hdr="http://ns.adobe.com/hdr-gain-map/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/" '
        'xmlns:exif="http://ns.adobe.com/exif/1.0/" xmlns:GCamera="http://ns.google.com/photos/1.0/camera/"'
    )
    attributes = (
        'tiff:Orientation="6" exif:PixelXDimension = \'100\' hdr:Version="1.0" tiff:Make="Acme" '
        'GCamera:MotionPhoto="1" dc:format="image/jpeg"'
    )
    elements = (
        "<tiff:Orientation>6</tiff:Orientation><xmp:Thumbnails><rdf:Alt>x</rdf:Alt></xmp:Thumbnails>"
        "<dc:subject><rdf:Bag><rdf:li>harbour</rdf:li></rdf:Bag></dc:subject><hdr:GainMapMin/>"
    )
    packet, told = clean_xmp(xmp(attributes, elements, prefixes))
    for gone in (b"Orientation", b"PixelXDimension", b"Thumbnails", b"hdr:Version", b"GainMapMin", b"MotionPhoto"):
        assert gone not in packet
    for kept in (b'xmp:Rating="4"', b'tiff:Make="Acme"', b"harbour", b'dc:format="image/jpeg"', b"<?xpacket end"):
        assert kept in packet
    assert told == ["gain map (HDR)", "motion picture"]
    assert clean_xmp(xmp()) == (xmp(), [])
    utf16 = xmp('tiff:Orientation="6"').decode().encode("utf-16")
    assert b"Rating" in clean_xmp(utf16)[0]
    assert b"Orientation" not in clean_xmp(utf16)[0]


def test_regions_of_faces_are_kept_unless_the_image_is_turned():
    prefixes = 'xmlns:mwg-rs="http://www.metadataworkinggroup.com/schemas/regions/"'
    regions = '<mwg-rs:Regions><mwg-rs:AppliedToDimensions a="1"/><mwg-rs:Name>Ann</mwg-rs:Name></mwg-rs:Regions>'
    packet = xmp("", regions, prefixes)
    kept, turned = (
        opened(encoded(picture(), "JPEG", xmp=packet, exif=camera_exif(orientation))) for orientation in (1, 6)
    )
    assert b"Ann" in kept.metadata.xmp
    assert b"AppliedToDimensions" not in kept.metadata.xmp
    assert kept.losses == ()
    assert b"Ann" not in turned.metadata.xmp
    assert turned.losses == ("its list of face regions, which turning moves, is left out.",)


@pytest.mark.parametrize("piece", [b"<tiff:Orientation>", b' tiff:Orientation="', b"<tiff:Orientation ", b' tiff:O="'])
def test_xmp_that_never_ends_is_no_trap(piece):
    packet = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/"' + piece * 50_000
    assert len(clean_xmp(packet)[0]) <= len(packet)


def test_other_pictures_credentials_and_videos_are_told():
    video = encoded(picture(), "JPEG") + b"\0\0\0\x18ftypmp42" + b"\0" * 50
    assert opened(video).losses == ("the video appended to the image is left out.",)
    credentials = with_segments(encoded(picture(), "JPEG"), (0xEB, b"JP\0\1\0\0\0\1"))
    assert "C2PA" in opened(credentials).losses[0]
    extended = with_segments(encoded(picture(), "JPEG"), (0xE1, b"http://ns.adobe.com/xmp/extension/\0" + b"x" * 40))
    assert opened(extended).losses == ("its extended XMP is left out.",)


# Resolution


def test_resolution_that_is_none_is_left_out():
    for dpi in (0, 10**9):
        meter = round(dpi / 0.0254)
        data = with_chunks(encoded(picture(), "PNG"), (b"pHYs", struct.pack(">IIB", min(meter, 2**32 - 1), 0, 1)))
        assert opened(data).metadata.dpi is None


def test_pixels_that_are_not_square_are_told():
    jpeg = encoded(picture(), "JPEG")
    at = jpeg.index(b"JFIF\0") + 7
    for x, y in ((4, 3), (1, 1)):
        aspect = with_chunks(encoded(picture(), "PNG"), (b"pHYs", struct.pack(">IIB", x, y, 0)))
        for data in (aspect, jpeg[:at] + struct.pack(">BHH", 0, x, y) + jpeg[at + 5 :]):
            told = (f"its pixels are not square (density {x}:{y}), which is left out.",)
            assert opened(data).metadata.dpi is None
            assert opened(data).losses == (told if x != y else ())


def test_metadata_of_other_formats_are_read():
    assert opened(encoded(picture(), "GIF", comment=b"a boat")).metadata.comments == (b"a boat",)
    assert opened(encoded(picture(), "BMP", dpi=(300, 300))).metadata.dpi == pytest.approx((300, 300), abs=0.1)
    palette = png(np.zeros((2, 2), int), depth=8, color_type=3, chunks=[(b"PLTE", b"\1\2\3")])
    assert np.asarray(opened(palette).image)[0, 0].tolist() == [1, 2, 3]
    header = struct.pack("<IiiHHIIiiII", 124, 4, 4, 1, 24, 0, 48, 0, 0, 0, 0) + b"\0" * 16 + b"DEBM" + b"\0" * 48
    header += struct.pack("<IIII", 4, 124 + 48, len(SRGB), 0)
    bitmap = b"BM" + struct.pack("<IHHI", 14 + 124 + 48 + len(SRGB), 0, 0, 138) + header + bytes(48) + SRGB
    assert opened(bitmap).metadata.icc_profile == SRGB


def test_the_page_on_files_has_the_table():
    page = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
    formats = list(dict.fromkeys(OUTPUT_FORMATS.values()))
    for kind, places in KEPT.items():
        row = f"| {kind} | " + " | ".join(places.get(name, "reported") for name in formats) + " |"
        assert row in page, row
