import numpy as np
import pytest
import torch
from PIL import Image

from tests.images.making import png
from uplift_diffusers.images.convert import (
    assemble_pil,
    fill_transparent,
    pad_to_multiple,
    read_batch,
    read_pictures,
    resize,
)

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)


def only(image):
    (picture,) = read_pictures(image)
    return picture


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_pil_images_come_back_as_they_went_in(mode):
    image = Image.fromarray(np.dstack([RGB, GREY]), "RGBA").convert(mode)
    picture = only(image)
    back = picture.to_pil()
    assert back.mode == mode
    assert (np.asarray(back) == np.asarray(image)).all()
    assert (picture.alpha is not None) == mode.endswith("A")
    assert picture.color.shape == (3, 5, 7)


def test_sixteen_bit_greyscale_keeps_its_sixteen_bits():
    back = only(Image.fromarray(GREY16)).to_pil()
    assert back.mode == "I;16"
    assert (np.asarray(back) == GREY16).all()


def test_thirty_two_bit_mode_holds_sixteen_bit_values():
    image = Image.fromarray(GREY16.astype(np.int32))
    assert image.mode == "I"
    assert (np.asarray(only(image).to_pil()) == GREY16).all()


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        picture = only(image)
    assert (np.asarray(picture.to_pil()) == np.rot90(RGB, k=-1)).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_turn_nothing():
    image = Image.fromarray(RGB)
    image.info["exif"] = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00"
    assert (np.asarray(only(image).to_pil()) == RGB).all()


def test_palette_and_its_transparency_are_resolved():
    opaque = Image.fromarray(RGB).quantize(16)
    assert only(opaque).mode == "RGB"
    assert (np.asarray(only(opaque).to_pil()) == np.asarray(opaque.convert("RGB"))).all()
    transparent = opaque.copy()
    transparent.info["transparency"] = 0
    assert only(transparent).mode == "RGBA"
    assert (np.asarray(only(transparent).to_pil()) == np.asarray(transparent.convert("RGBA"))).all()


def test_greyscale_transparency_is_resolved():
    image = Image.fromarray(GREY)
    image.info["transparency"] = int(GREY[2, 3])
    picture = only(image)
    assert picture.mode == "LA"
    assert picture.alpha[0, 2, 3] == 0
    assert (np.asarray(picture.to_pil())[..., 0] == GREY).all()


@pytest.mark.parametrize("mode", ["1", "CMYK", "YCbCr", "HSV", "LAB", "P", "RGBX", "RGBa", "La", "PA"])
def test_every_other_mode_is_read(mode):
    via = {"La": "LA", "PA": "P", "LAB": "RGB", "RGBa": "RGBA"}.get(mode)
    image = Image.fromarray(RGB)
    if mode == "LAB":
        image = Image.frombytes("LAB", (7, 5), RGB.tobytes())
    else:
        image = image.convert(via).convert(mode) if via else image.convert(mode)
    picture = only(image)
    assert picture.color.shape == (3, 5, 7)
    assert picture.mode == {"1": "L", "La": "LA", "RGBa": "RGBA", "PA": "RGBA"}.get(mode, "RGB")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64, np.float16])
def test_arrays_span_the_range_of_their_type(dtype):
    highest = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    array = np.zeros((2, 4, 6, 3), dtype=dtype)
    array[1] = highest
    black, white = read_pictures(array)
    assert black.color.max() == 0
    assert white.color.min() == 1


def test_tensors_arrays_and_pil_agree():
    tensor = torch.from_numpy(RGB).permute(2, 0, 1)
    expected = only(Image.fromarray(RGB)).color
    for image in (tensor, tensor[None], tensor.float() / 255, RGB, RGB[None], RGB / 255.0, [tensor], [RGB]):
        torch.testing.assert_close(only(image).color, expected, rtol=0, atol=1e-6)


def test_lists_may_mix_sizes():
    assert [p.width for p in read_pictures([Image.new("RGB", (3, 2)), Image.new("L", (9, 4))])] == [3, 9]


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("photo.jpg", TypeError, "must be a PIL image, an array, a tensor or a list of these, got str"),
        ([], ValueError, "empty list"),
        ([[RGB]], TypeError, "got list in a list"),
        (np.zeros((4, 4, 5), np.uint8), ValueError, "1, 2, 3 or 4 channels"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "at least one pixel"),
        (np.zeros((0, 8, 8, 3), np.float32), ValueError, "at least one pixel"),
        (np.zeros(4), ValueError, r"got \(4,\)"),
        (np.zeros(()), ValueError, r"got \(\)"),
        (np.zeros((1, 1, 4, 4, 3)), ValueError, "channels"),
        (np.zeros((3, 40, 50)), ValueError, r"come first: pass np.moveaxis\(image, 0, -1\)"),
        (np.zeros((2, 3, 40, 50)), ValueError, r"come first: pass np.moveaxis\(image, 1, -1\)"),
        (np.full((4, 4, 3), 200.0), ValueError, r"in \[0, 1\], got 200 to 200. Divide"),
        (np.full((4, 4, 3), 1e300), ValueError, r"in \[0, 1\], got inf"),
        (np.full((4, 4, 3), np.nan), ValueError, "finite"),
        (-np.ones((4, 4, 3)), ValueError, r"in \[0, 1\], got -1 to -1. Shift"),
        (np.zeros((4, 4, 3), np.int64), TypeError, "got int64. Pass 8-bit values as uint8"),
        (np.zeros((4, 4), bool), TypeError, "got bool. Multiply by 255"),
        (np.zeros((4, 4), complex), TypeError, "got complex128. Pass its real part"),
        (np.zeros((4, 4), object), TypeError, "got object"),
        (np.zeros((4, 4), [("a", "u1")]), TypeError, "uint8, uint16 or float"),
        (np.ma.masked_array(RGB), TypeError, r"image.filled\(0\)"),
        (torch.zeros(4, 4), ValueError, r"\(C, H, W\) or \(B, C, H, W\), got \(4, 4\). Pass image\[None\]"),
        (torch.zeros(40, 50, 3), ValueError, r"come last: pass image.permute\(2, 0, 1\)"),
        (torch.zeros(2, 40, 50, 3), ValueError, r"come last: pass image.permute\(0, 3, 1, 2\)"),
        (torch.zeros(0, 3, 8, 8), ValueError, "at least one pixel"),
        (torch.zeros(3, 8, 8, device="meta"), TypeError, "meta"),
        (torch.zeros(3, 8, 8).to_sparse(), TypeError, r"image.to_dense\(\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), TypeError, "got int32"),
        (torch.zeros(3, 8, 8, dtype=torch.bool), TypeError, "got bool"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), TypeError, "got complex64"),
        (torch.zeros(3, 8, 8).to(torch.float8_e4m3fn), TypeError, "got float8_e4m3fn"),
        (Image.new("F", (3, 3)), ValueError, "mode F"),
        (Image.new("RGB", (0, 3)), ValueError, "at least one pixel"),
        (Image.fromarray(np.full((3, 3), 70000, np.int32)), ValueError, "16-bit values, got 70000 to 70000"),
        (Image.fromarray(np.full((3, 3), -1, np.int32)), ValueError, "16-bit values, got -1 to -1"),
    ],
)
def test_what_is_no_image_is_refused(image, error, message):
    with pytest.raises(error, match=message):
        read_pictures(image)


def test_a_list_that_holds_itself_is_refused():
    image = []
    image.append(image)
    with pytest.raises(TypeError, match="got list in a list"):
        read_pictures(image)


@pytest.mark.parametrize("dtype", [">u2", ">f4", "<f8"])
def test_byte_order_of_an_array_does_not_matter(dtype):
    array = (RGB / 255 * (65535 if "u" in dtype else 1)).astype(dtype)
    torch.testing.assert_close(only(array).color, only(RGB).color, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_matrix_and_a_view_with_the_negative_bit_are_read_as_they_look():
    assert (np.asarray(only(np.matrix(GREY)).to_pil()) == GREY).all()
    turned = torch._neg_view(-torch.ones(3, 4, 4))
    assert turned.is_neg()
    assert only(turned).color.min() == 1


def test_a_file_that_breaks_off_is_a_value_error(tmp_path):
    Image.fromarray(RGB).resize((200, 200)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:1000])
    with Image.open(tmp_path / "a.jpg") as image, pytest.raises(ValueError, match="one that does not: image file is"):
        read_pictures(image)


def test_orientation_that_is_in_xmp_only_turns_nothing(tmp_path):
    packet = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    Image.fromarray(RGB).save(tmp_path / "a.webp", xmp=packet, lossless=True)
    with Image.open(tmp_path / "a.webp") as image:
        assert image.getexif()[0x0112] == 6  # so Pillow says
        assert (np.asarray(only(image).to_pil()) == RGB).all()


def test_guides_are_laid_on_white():
    array = np.dstack([RGB, np.zeros((5, 7), np.uint8)])
    array[0, 0, 3] = 255
    batch = read_batch(Image.fromarray(array))
    assert (batch[0, :, 0, 0] * 255).round().tolist() == RGB[0, 0].tolist()
    assert batch[0, :, 1:].min() == 1
    with pytest.raises(ValueError, match="one size"):
        read_batch([RGB, RGB[:3]])


@pytest.mark.parametrize("hidden", [(0, 0, 0), (1, 1, 1), (0, 1, 0)])
def test_hidden_colours_are_replaced_by_those_that_are_seen(hidden):
    y, x = torch.meshgrid(torch.arange(61), torch.arange(45), indexing="ij")
    left, right = (x < 12).expand(61, 45), (x > 30) & (y > 20)
    color = torch.tensor(hidden, dtype=torch.float32)[:, None, None].repeat(1, 61, 45)
    color[:, left] = torch.tensor([1, 0.6, 0])[:, None]
    color[:, right] = torch.tensor([0, 0.2, 0.8])[:, None]
    alpha = (left | right).float()[None]
    filled = fill_transparent(color, alpha)
    assert torch.equal(filled[:, left | right], color[:, left | right])
    torch.testing.assert_close(filled[:, 50, 12:14].T, color[:, 50, 11].expand(2, 3), rtol=0, atol=0.02)
    torch.testing.assert_close(filled[:, 50, 29:31].T, color[:, 50, 31].expand(2, 3), rtol=0, atol=0.02)
    assert filled[1].max() <= 0.6 + 1e-6  # neither white nor green shows anywhere
    assert filled.sum(dim=0).min() > 0.9


def test_what_is_all_seen_or_all_hidden_stays():
    color = torch.rand(3, 5, 7)
    for alpha in (torch.ones(1, 5, 7), torch.full((1, 5, 7), 0.01), torch.zeros(1, 5, 7)):
        assert torch.equal(fill_transparent(color, alpha), color)


@pytest.mark.parametrize(("depth", "levels"), [("L;2", 3), ("L;4", 15)])
def test_transparent_grey_of_a_file_is_found_in_the_levels_of_its_pixels(tmp_path, depth, levels):
    values = np.arange(8).reshape(1, 8) % (levels + 1)
    (tmp_path / "a.png").write_bytes(
        png(values, depth=2 if levels == 3 else 4, color_type=0, chunks=[(b"tRNS", b"\0\2")])
    )
    with Image.open(tmp_path / "a.png") as image:
        alpha = only(image).alpha
    assert torch.equal(alpha[0].bool(), torch.from_numpy(values != 2))


def test_strips_are_put_together_from_top_to_bottom():
    color, alpha = torch.rand(3, 600, 4), torch.rand(1, 600, 4)
    whole = assemble_pil([color], (600, 4), alpha=alpha, mode="RGBA")
    strips = assemble_pil(color.split([100, 500], dim=1), (600, 4), alpha=alpha, mode="RGBA")
    assert (np.asarray(whole) == np.asarray(strips)).all()
    assert abs(np.asarray(whole)[599, 3, 3] / 255 - alpha[0, 599, 3]) < 1 / 255


def test_padding_repeats_the_last_pixels():
    image = torch.rand(1, 3, 5, 7)
    padded = pad_to_multiple(image, 8)
    assert padded.shape == (1, 3, 8, 8)
    assert torch.equal(padded[..., :5, :7], image)
    assert torch.equal(padded[..., 5:, :7], image[..., -1:, :].expand(1, 3, 3, 7))
    assert pad_to_multiple(padded, 8) is not None
    assert pad_to_multiple(padded, 8).shape == padded.shape


@pytest.mark.parametrize("size", [(14, 20), (14, 1), (1, 20), (1, 1), (80, 1)])
def test_resizing_agrees_with_pillow(size):
    image = torch.rand(1, 1, 40, 56)
    expected = Image.fromarray(image[0, 0].numpy()).resize(size[::-1], Image.BICUBIC)
    actual = resize(image, size)[0, 0]
    torch.testing.assert_close(actual, torch.from_numpy(np.array(expected)).clamp(0, 1), rtol=0, atol=1e-4)
