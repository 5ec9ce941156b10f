import numpy as np
import pytest
import torch
from PIL import Image

from uplift_diffusers.images import pad_to_multiple, read_pictures, resize

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
        (np.zeros((4, 4, 5), np.uint8), ValueError, "1, 3 or 4 channels"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "at least one pixel"),
        (np.full((4, 4, 3), 200.0), ValueError, r"in \[0, 1\], got 200 to 200"),
        (np.full((4, 4, 3), np.nan), ValueError, "finite"),
        (-np.ones((4, 4, 3)), ValueError, r"in \[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), ValueError, "uint8, uint16 or float, got int64"),
        (torch.zeros(4, 4), ValueError, r"\(C, H, W\) or \(B, C, H, W\)"),
        (Image.new("F", (3, 3)), ValueError, "mode F"),
        (Image.fromarray(np.full((3, 3), 70000, np.int32)), ValueError, "16-bit values, got 70000 to 70000"),
    ],
)
def test_what_is_no_image_is_refused(image, error, message):
    with pytest.raises(error, match=message):
        read_pictures(image)


def test_padding_repeats_the_last_pixels():
    image = torch.rand(1, 3, 5, 7)
    padded = pad_to_multiple(image, 8)
    assert padded.shape == (1, 3, 8, 8)
    assert torch.equal(padded[..., :5, :7], image)
    assert torch.equal(padded[..., 5:, :7], image[..., -1:, :].expand(1, 3, 3, 7))
    assert pad_to_multiple(padded, 8) is not None
    assert pad_to_multiple(padded, 8).shape == padded.shape


def test_resizing_agrees_with_pillow():
    image = torch.rand(1, 1, 40, 56)
    expected = Image.fromarray(image[0, 0].numpy()).resize((20, 14), Image.BICUBIC)
    actual = resize(image, (14, 20))[0, 0]
    torch.testing.assert_close(actual, torch.from_numpy(np.array(expected)).clamp(0, 1), rtol=0, atol=1e-4)
