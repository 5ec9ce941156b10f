"""Degraded inputs: as strong as the number that the model is given."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.components import seeded, smooth_images
from uplift_diffusers.data import degradation
from uplift_diffusers.data.degradation import degrade, through_jpeg
from uplift_diffusers.images.compression import denoise_for_quality


def pictures(count, size=32):
    """With detail at every scale, in steps of 8 bits."""
    return (
        (smooth_images(count, size, size) + torch.rand(count, 3, size, size, generator=seeded())) * 127.5
    ).round() / 255


def saved_by_pillow(image, **settings):
    file = io.BytesIO()
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", **settings)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255


@pytest.fixture
def compressions(monkeypatch):
    """Quality, chroma and corner of every JPEG that is made."""
    seen, compress = [], degradation._compress

    def recorded(pixels, quality, *, subsampling, corner=(0, 0)):
        seen.append((quality, subsampling, corner))
        return compress(pixels, quality, subsampling=subsampling, corner=corner)

    monkeypatch.setattr(degradation, "_compress", recorded)
    return seen


def test_a_share_is_degraded_and_strengths_belong_to_what_changed():
    images = pictures(300, 16)
    result, strengths = degrade(images, probability=0.3, generator=seeded())
    changed = (result != images).flatten(1).any(dim=1)
    assert 0.22 < (strengths > 0).float().mean() < 0.38
    assert not changed[strengths == 0].any()
    assert changed[strengths > 0.1].all()
    drawn = strengths[strengths > 0]
    assert drawn.max() > 0.9
    assert drawn.mean() == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(result * 255, (result * 255).round(), rtol=0, atol=1e-4)


def test_what_is_drawn_follows_from_the_generator():
    first, again = (degrade(pictures(40), probability=0.8, generator=seeded(3)) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(degrade(pictures(40), probability=0.8, generator=seeded(4))[0], first[0])


def test_kinds_of_damage_have_their_shares(compressions):
    images = pictures(1000, 16)
    _, strengths = degrade(images, probability=1.0, generator=seeded())
    assert len(compressions) == pytest.approx(900, abs=30)  # the others have only noise or blur
    fine = [subsampling for _, subsampling, _ in compressions].count("4:4:4")
    assert fine / len(compressions) == pytest.approx(0.25, abs=0.04)
    corners = {corner for _, _, corner in compressions}
    assert {row for row, _ in corners} == {column for _, column in corners} == set(range(16))
    qualities = sorted(quality for quality, _, _ in compressions)
    assert set(qualities) <= {round(100 - 70 * strength) for strength in strengths.tolist()}
    assert (qualities[0], qualities[-1]) == (30, 100)


@pytest.mark.parametrize(("quality", "strength"), [(100, 0.0), (65, 0.5), (30, 1.0), (10, 1.0)])
def test_the_strength_of_a_quality_is_that_of_the_degraded_inputs(quality, strength):
    assert denoise_for_quality(quality) == strength


def test_a_jpeg_is_that_of_pillow():
    images = pictures(2)
    expected = torch.stack([saved_by_pillow(image, quality=60) for image in images])
    torch.testing.assert_close(through_jpeg(images, quality=60), expected, rtol=0, atol=1e-6)


def test_a_crop_of_a_larger_jpeg_begins_anywhere_on_its_grid():
    """Mirrored beyond its edge, the crop is compressed as it would be there, except in the blocks at its edge."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    large = degradation._compress(pixels, 50, subsampling="4:4:4")
    crop = degradation._compress(pixels[3:, 5:], 50, subsampling="4:4:4", corner=(3, 5))
    assert crop.shape == (61, 59, 3)
    assert np.array_equal(crop[5:, 3:], large[8:, 8:])
    on_the_grid = degradation._compress(pixels[3:, 5:], 50, subsampling="4:4:4")
    assert not np.array_equal(on_the_grid[5:, 3:], large[8:, 8:])


def test_noise_and_blur_grow_with_the_strength():
    grey = np.full((128, 128, 3), 128, dtype=np.uint8)
    noise = degradation._add_noise(grey, 0.5, seeded()).astype(float) - 128
    assert noise.std() == pytest.approx(5.0, rel=0.03)
    line = np.zeros((33, 33, 3), dtype=np.uint8)
    line[:, 16] = 255
    profile = degradation._blur(line, 1.0)[16, :, 0] / 255
    assert profile.sum() == pytest.approx(1.0, abs=0.02)
    variance = (profile * (np.arange(33) - 16) ** 2).sum()
    assert variance**0.5 == pytest.approx(0.8, abs=0.08)
    assert np.array_equal(degradation._blur(line, 0.0), line)
