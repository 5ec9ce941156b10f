"""The enlarged picture, reduced, is its input; strips give what the whole gives; JPEGs are told by their tables."""

import io
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

from tests import components
from tests.components import seeded, smooth_images
from uplift_diffusers import UPLiFTSuperResolutionPipeline
from uplift_diffusers.images.compression import consistency_for_denoise, denoise_for_quality, jpeg_quality
from uplift_diffusers.images.convert import interpolate, read_pictures
from uplift_diffusers.images.files import open_image, plan_saving
from uplift_diffusers.pipelines.upscale_stage import make_consistent


def turned_exif():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("cuts", ["whole", "rows", "uneven"])
def test_strips_give_what_the_whole_picture_gives(factor, cuts):
    image, enlarged = torch.rand(1, 3, 37, 23, generator=seeded()), torch.rand(1, 3, 37 * factor, 23 * factor)
    missing = F.interpolate(image - interpolate(enlarged, (37, 23)), scale_factor=factor, mode="bicubic")
    expected = (enlarged + 0.7 * missing).clamp(0, 1)
    heights = {"whole": [37], "rows": [1] * 37, "uneven": [8, 8, 3, 18]}[cuts]
    strips = enlarged.split([factor * height for height in heights], dim=2)
    actual = torch.cat(list(make_consistent(iter(strips), image, factor, 0.7)), dim=2)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_a_picture_that_reduces_to_its_input_already_stays_as_it_is():
    image = torch.full((1, 3, 9, 9), 0.4)
    enlarged = torch.full((1, 3, 18, 18), 0.4)
    (actual,) = make_consistent(iter([enlarged]), image, 2, 1.0)
    torch.testing.assert_close(actual, enlarged, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def pipe():
    vae = components.make_local_vae()
    upsampler = components.make_upsampler(vae.config.latent_space, vae.config.latent_channels)
    pipe = UPLiFTSuperResolutionPipeline(vae=vae, upsampler=upsampler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scale", [2, 4])
def test_the_enlarged_picture_reduced_is_the_input(pipe, scale):
    # The small random network's pictures are far from their input before.
    image = smooth_images(1, 40, 56) * 0.5 + 0.25
    settings = {"image": image, "scale": scale, "generator": seeded(), "output_type": "pt"}
    distances = []
    for consistency in (0.0, 1.0):
        settings["generator"] = seeded()
        enlarged = pipe(**settings, consistency=consistency).images
        distances.append((interpolate(enlarged, (40, 56)) - image).abs().mean().item())
    assert distances[1] < 0.3 * distances[0]


def test_tiles_do_not_change_a_consistent_picture(pipe):
    image = smooth_images(1, 136, 72)
    whole = pipe(image=image, generator=seeded(), tile_size=None, output_type="np").images
    pipe.vae.enable_tiling(48)
    tiled = pipe(image=image, generator=seeded(), tile_size=64, output_type="np").images
    pipe.vae.enable_tiling()
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.5, 2])
@pytest.mark.parametrize("consistency", [0.0, 1.0])
def test_a_strip_has_left_memory_when_the_next_one_is_decoded(pipe, monkeypatch, consistency, scale):
    decoded, kept = [], []

    def decode_strips(latents):
        for rows in latents.split(5, dim=2):
            kept.append(sum(memory() is not None for memory in decoded))
            array = np.zeros((1, 3, 8 * rows.shape[2], 8 * rows.shape[3]), np.float32)
            decoded.append(weakref.ref(array))  # a tensor's memory holds its array until nothing uses it
            strip = torch.from_numpy(array)
            del array
            yield strip
            del strip

    monkeypatch.setattr(pipe.vae, "decode_strips", decode_strips)
    monkeypatch.setattr("uplift_diffusers.latent_space._to_image", lambda strip: strip)
    pipe(smooth_images(1, 160, 24), scale=scale, consistency=consistency, generator=seeded(), output_type="pil")
    assert kept == [0] * 8


@pytest.mark.parametrize("quality", [30, 49, 50, 51, 75, 90, 95, 100])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_quality_of_a_jpeg_is_read_off_its_tables(quality, mode):
    file = io.BytesIO()
    Image.new(mode, (16, 16)).save(file, "JPEG", quality=quality)
    assert jpeg_quality(Image.open(file)) == quality


def test_an_opened_jpeg_tells_its_quality_to_whatever_enlarges_it(tmp_path):
    Image.new("RGB", (16, 24)).save(tmp_path / "photo.jpg", quality=75, exif=turned_exif())
    opened = plan_saving(open_image(tmp_path / "photo.jpg"), ".png").image
    assert opened.size == (24, 16)
    assert read_pictures(opened)[0].jpeg_quality == 75


def test_pictures_of_other_formats_have_no_quality():
    assert jpeg_quality(Image.new("RGB", (8, 8))) is None


@pytest.mark.parametrize(("quality", "strength"), [(None, 0), (100, 0), (65, 0.5), (30, 1), (5, 1)])
def test_denoising_is_linear_in_the_quality(quality, strength):
    assert denoise_for_quality(quality) == strength


@pytest.mark.parametrize(("strength", "left"), [(0, 1), (0.05, 0.5), (0.1, 0), (1, 0)])
def test_consistency_gives_way_to_denoising(strength, left):
    assert consistency_for_denoise(strength) == left


def test_an_upsampler_that_was_not_trained_to_denoise_is_not_asked_to(pipe):
    with pytest.raises(ValueError, match="`denoise` must be 0 or 'auto' for an upsampler without `denoise_channel`"):
        pipe(image=smooth_images(1, 16, 16), denoise=0.5)


@pytest.mark.parametrize("name", ["consistency", "denoise"])
@pytest.mark.parametrize(("value", "error"), [(1.5, ValueError), (-0.1, ValueError), ("much", TypeError)])
def test_strengths_out_of_range_are_refused(pipe, name, value, error):
    with pytest.raises(error, match=f"`{name}` must be"):
        pipe(image=smooth_images(1, 16, 16), **{name: value})
