"""The latent stage behind diffusers' pipelines of today, which return their latents in layouts of their own."""

import pytest
import torch
from diffusers import FluxPipeline, QwenImageEditPipeline

from tests import components, transformer_pipelines
from tests.components import seeded, smooth_images
from tests.transformer_pipelines import CASES, HEIGHT, WIDTH, run
from uplift_diffusers import LatentSpace, UPLiFTLatentUpscalePipeline
from uplift_diffusers.latent_space import KNOWN_SPACES, LatentCodec


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def pipeline(case):
    return case.make()


@pytest.fixture(scope="module")
def latents(pipeline, case):
    return run(pipeline, case, "latent")


@pytest.fixture(scope="module")
def stage(pipeline, case):
    upsampler = components.make_upsampler(case.space, *KNOWN_SPACES[case.space].shape)
    return UPLiFTLatentUpscalePipeline(pipeline.vae, upsampler)


def size_of(latents):
    """Packed latents do not say what size they are of."""
    return {"height": HEIGHT, "width": WIDTH} if latents.ndim == 3 else {}


def test_the_vae_is_known_by_its_config(pipeline, case):
    assert LatentSpace.of(pipeline.vae).name == case.space


def test_what_the_pipeline_returns_decodes_to_the_image_of_the_pipeline(pipeline, case, latents, stage):
    assert tuple(latents.shape) == case.latents
    image = stage(latents=latents, scale=1, output_type="pt", **size_of(latents)).images
    expected = run(pipeline, case, "pt")
    assert expected.std() > 1e-3
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.5, 2])
def test_the_image_of_latents_is_upscaled(latents, stage, scale):
    image = stage(latents=latents, scale=scale, output_type="pt", generator=seeded(), **size_of(latents)).images
    assert image.shape == (1, 3, scale * HEIGHT, scale * WIDTH)
    assert image.std() > 1e-3


@pytest.mark.parametrize("scale", [1.5, 2])
def test_latents_come_back_in_the_layout_they_were_given_in(latents, stage, scale):
    larger = stage(latents=latents, scale=scale, output_type="latent", generator=seeded(), **size_of(latents)).images
    if latents.ndim == 3:
        assert larger.shape == (1, round(latents.shape[1] * scale**2), latents.shape[2])
    else:
        factor = stage.latent_space.spatial_factor
        expected = (round(HEIGHT // factor * scale), round(WIDTH // factor * scale))
        assert larger.shape == (*latents.shape[:-2], *expected)
    if scale == 2:
        decoded = stage(latents=larger, scale=1, output_type="pt", **scaled_size_of(larger, scale)).images
        expected = stage(latents=latents, scale=2, output_type="pt", generator=seeded(), **size_of(latents)).images
        torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)


def scaled_size_of(latents, scale):
    return {name: int(length * scale) for name, length in size_of(latents).items()}


def test_latents_are_written_as_they_were_read(pipeline, case):
    space = LatentSpace.of(pipeline.vae)
    values = torch.randn(2, *case.latents[1:], generator=seeded())
    size = space.check_layout(values, **size_of(values))
    raw = space.read(values, size=size)
    assert raw.shape == (2, space.channels, HEIGHT // space.spatial_factor, WIDTH // space.spatial_factor)
    torch.testing.assert_close(space.write(raw, ndim=values.ndim), values, rtol=0, atol=2e-6)


def test_an_upsampler_of_other_latents_is_refused(pipeline, case):
    other = "sd15-vae" if case.space != "sd15-vae" else "sdxl-vae"
    upsampler = components.make_upsampler(other, *KNOWN_SPACES[case.space].shape)
    with pytest.raises(ValueError, match=rf"trained for '{other}'.*got '{case.space}'"):
        UPLiFTLatentUpscalePipeline(pipeline.vae, upsampler)


def test_images_are_encoded_and_packed_as_flux2_does():
    vae, image = transformer_pipelines.make_flux2_vae(), smooth_images(1, HEIGHT, WIDTH)
    pipeline, codec = transformer_pipelines.make_flux2(), LatentCodec(vae)
    with torch.no_grad():
        expected = pipeline._pack_latents(pipeline._encode_vae_image(image * 2 - 1, generator=seeded()))
        assert torch.equal(codec.space.write(codec.encode(image), ndim=3), expected)


def test_images_are_encoded_and_packed_as_qwen_image_does():
    vae, image = transformer_pipelines.make_qwen_vae(), smooth_images(1, HEIGHT, WIDTH)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "processor", "transformer", "scheduler"))
    pipeline, codec = QwenImageEditPipeline(vae=vae, **parts), LatentCodec(vae)
    with torch.no_grad():
        latents = pipeline._encode_vae_image((image * 2 - 1).unsqueeze(2), generator=seeded())
        expected = pipeline._pack_latents(latents, 1, 16, HEIGHT // 8, WIDTH // 8)
        packed = codec.space.write(codec.encode(image), ndim=3)
    # Pipelines of this family divide by the deviations or multiply by their inverses.
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-6)


def test_flux_latents_are_packed_as_flux_packs_them():
    values = torch.randn(2, 16, 4, 8, generator=seeded())
    space = LatentSpace("unscaled", 16, 8, 1.0)
    packed = FluxPipeline._pack_latents(values, 2, 16, 4, 8)
    assert torch.equal(space.write(values, ndim=3), packed)
    assert torch.equal(space.read(packed, size=(4, 8)), values)


PACKED = torch.zeros(1, 8, 64)


@pytest.mark.parametrize(
    ("latents", "size", "error", "message"),
    [
        (PACKED, {}, ValueError, "`height` and `width` must both be given for packed latents"),
        (PACKED, {"height": 32}, ValueError, "`height` and `width` must both be given .* got 32 and None"),
        (PACKED, {"height": 32, "width": 32}, ValueError, "must be those of the image of `latents`, got 32 and 32"),
        (PACKED, {"height": 32.0, "width": 64}, TypeError, "`height` must be a whole number"),
        (torch.zeros(1, 16, 4, 8), {"height": 32, "width": 32}, ValueError, "must be those of the image of `latents`"),
        (torch.zeros(1, 8, 48), {"height": 32, "width": 64}, ValueError, r"packed \(B, h/2 \* w/2, 64\)"),
        (torch.zeros(1, 16, 5, 4, 8), {}, ValueError, r"one frame \(B, 16, 1, h, w\)"),
        (PACKED + torch.nan, {"height": 32, "width": 64}, ValueError, "`latents` must be finite"),
    ],
)
def test_latents_that_do_not_fit_are_refused(latents, size, error, message):
    with pytest.raises(error, match=message):
        LatentSpace.of(transformer_pipelines.make_flux_vae()).check_layout(latents, **size)


def test_sizes_are_rounded_down_to_whole_patches_as_the_pipelines_do():
    assert LatentSpace.of(transformer_pipelines.make_flux_vae()).check_layout(PACKED, height=47, width=79) == (4, 8)


def test_a_tiny_autoencoder_of_flux2_reads_raw_latents_only():
    tiny = components.make_tiny_vae(latent_channels=32)
    space, raw = LatentSpace.of(tiny, "flux2-vae"), torch.randn(1, 32, 4, 8, generator=seeded())
    assert torch.equal(space.read(raw, size=space.check_layout(raw)), raw)
    with torch.no_grad():
        image = LatentCodec(tiny, "flux2-vae").decode(raw)
        torch.testing.assert_close(image, (tiny.decode(raw).sample / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"without the batch-norm statistics of FLUX\.2"):
        space.check_layout(torch.zeros(1, 8, 128), height=HEIGHT, width=WIDTH)


def test_vaes_with_other_statistics_have_names_of_their_own():
    vae = transformer_pipelines.make_wan_vae()
    vae.register_to_config(latents_mean=[0.0] * 16)
    name = LatentSpace.of(vae).name
    assert name.startswith("AutoencoderKLWan-c16-f8-statistics")
    vae.register_to_config(latents_mean=[1.0] * 16)
    assert LatentSpace.of(vae).name not in (name, "wan21-vae")


def test_a_vae_of_layers_with_transparency_is_refused():
    vae = transformer_pipelines.make_qwen_vae()
    vae.register_to_config(input_channels=4)
    with pytest.raises(ValueError, match="`vae` must encode RGB images, got one of 4 channels"):
        LatentSpace.of(vae)
