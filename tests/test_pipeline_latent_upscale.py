import inspect

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from tests import components
from tests.components import VAES, count_calls, random_latents, seeded, smooth_images, state_of
from uplift_diffusers import LatentSpace, UPLiFTLatentUpscalePipeline, UPLiFTTextToImagePipeline
from uplift_diffusers.images.convert import resize
from uplift_diffusers.latent_space import LatentCodec
from uplift_diffusers.pipelines.upscale_stage import match_channel_statistics
from uplift_diffusers.runtime import dtype_option
from uplift_diffusers.scale import num_steps_for_scale


def make_pipeline(vae=None):
    vae = components.make_vae() if vae is None else vae
    space = LatentSpace.of(vae)
    upsampler = components.make_upsampler(space.name, space.channels, space.spatial_factor)
    return UPLiFTLatentUpscalePipeline(vae=vae, upsampler=upsampler)


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture(scope="module", params=VAES)
def any_pipe(request):
    return make_pipeline(VAES[request.param]())


def call(pipe, output_type="pt", seed=0, **arguments):
    if "latents" not in arguments and "image" not in arguments:
        arguments["latents"] = random_latents(pipe)
    arguments.setdefault("generator", seeded(seed))
    return pipe(output_type=output_type, **arguments).images


@pytest.mark.parametrize("scale", [1, 1.5, 2, 4])
def test_latents_of_any_vae_become_an_image_of_exactly_scale_times_the_size(any_pipe, scale):
    factor = any_pipe.latent_space.spatial_factor
    image = call(any_pipe, scale=scale)
    assert image.shape == (1, 3, round(scale * 4 * factor), round(scale * 6 * factor))
    assert image.dtype == torch.float32
    assert image.min() >= 0
    assert image.max() <= 1
    assert image.std() > 1e-4


def test_a_saved_pipeline_gives_the_same_image(any_pipe, tmp_path):
    any_pipe.save_pretrained(tmp_path)
    loaded = UPLiFTLatentUpscalePipeline.from_pretrained(tmp_path)
    assert torch.equal(call(loaded), call(any_pipe))


def test_the_declared_latent_space_is_saved(tmp_path):
    tiny = components.make_tiny_vae()
    pipe = UPLiFTLatentUpscalePipeline(tiny, components.make_upsampler("sd15-vae"), latent_space="sd15-vae")
    pipe.save_pretrained(tmp_path)
    assert UPLiFTLatentUpscalePipeline.from_pretrained(tmp_path).latent_space == pipe.latent_space
    assert pipe.latent_space.scaling_factor == 0.18215


def test_the_image_is_the_decoded_output_of_the_upsampler_under_the_decoded_guide(pipe):
    latents, vae = random_latents(pipe), pipe.vae
    with torch.no_grad():
        guide = (vae.decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1)
        raw = pipe.upsampler(latents / 0.18215, image=guide, num_steps=2, generator=seeded()).sample
        expected = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(call(pipe, latents=latents, scale=4), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(call(pipe, "latent", latents=latents, scale=4), raw * 0.18215, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(call(pipe, latents=latents, image=guide, scale=4), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("scale", "size"), [(1.5, (6, 9)), (2.5, (10, 15)), (1.1, (4, 7))])
def test_latents_between_powers_of_two_are_those_of_the_reduced_image(pipe, scale, size):
    latents = random_latents(pipe)
    large = call(pipe, latents=latents, scale=2 ** num_steps_for_scale(scale))
    with torch.no_grad():
        reduced = resize(large, (8 * size[0], 8 * size[1]))
        expected = 0.18215 * pipe.vae.encode(reduced * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(call(pipe, "latent", latents=latents, scale=scale), expected, rtol=0, atol=1e-5)


def test_the_image_that_latents_between_powers_of_two_are_encoded_from_is_made_consistent(pipe):
    image = smooth_images(1, 32, 48)
    large = call(pipe, image=image, consistency=0.5)
    with torch.no_grad():
        expected = 0.18215 * pipe.vae.encode(resize(large, (48, 72)) * 2 - 1).latent_dist.mode()
    settings = {"image": image, "scale": 1.5}
    torch.testing.assert_close(call(pipe, "latent", consistency=0.5, **settings), expected, rtol=0, atol=1e-5)
    assert (call(pipe, "latent", **settings) - expected).abs().max() > 1e-3


def test_scale_1_decodes_alone(pipe, monkeypatch):
    latents = random_latents(pipe)
    calls = count_calls(pipe.upsampler, monkeypatch)
    with torch.no_grad():
        expected = (pipe.vae.decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(call(pipe, latents=latents, scale=1), expected, rtol=0, atol=1e-6)
    assert calls == []


def test_an_image_alone_is_encoded_and_guides_itself(pipe):
    image = smooth_images(1, 32, 48)
    latents = pipe.latent_space.normalize(LatentCodec(pipe.vae).encode(image)).detach()
    torch.testing.assert_close(call(pipe, image=image), call(pipe, image=image, latents=latents), rtol=0, atol=1e-5)


def test_pil_array_and_tensor_inputs_are_one(pipe):
    array = (smooth_images(1, 32, 48)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    image = Image.fromarray(array)
    tensor = torch.from_numpy(array).permute(2, 0, 1).float() / 255
    expected = call(pipe, image=image)
    assert torch.equal(call(pipe, image=array), expected)
    assert torch.equal(call(pipe, image=tensor), expected)
    assert torch.equal(call(pipe, image=[tensor[None]]), expected)


def test_pil_array_and_tensor_outputs_are_one(pipe):
    tensor, array, image = (call(pipe, kind) for kind in ("pt", "np", "pil"))
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(np.asarray(image[0]) / 255, array[0], atol=0.5 / 255 + 1e-6)


def test_the_tuple_holds_what_the_dataclass_holds(pipe):
    latents = random_latents(pipe)
    (images,) = pipe(latents=latents, generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(images, call(pipe, latents=latents))


def test_a_seed_gives_the_same_image_and_another_seed_another(pipe):
    assert torch.equal(call(pipe, seed=3), call(pipe, seed=3))
    assert (call(pipe, seed=3) - call(pipe, seed=4)).abs().max() > 1e-4


def test_an_item_is_the_same_alone_and_in_a_batch(any_pipe):
    latents = random_latents(any_pipe, count=3)
    batch = call(any_pipe, latents=latents, generator=[seeded(seed) for seed in range(3)])
    for index in range(3):
        alone = call(any_pipe, latents=latents[index : index + 1], generator=[seeded(index)])
        torch.testing.assert_close(batch[index : index + 1], alone, rtol=0, atol=2e-5)


def test_every_item_of_a_batch_has_noise_of_its_own(pipe):
    batch = call(pipe, latents=random_latents(pipe).expand(2, -1, -1, -1))
    assert (batch[0] - batch[1]).abs().max() > 1e-4


def test_adain_moves_the_statistics_to_those_of_the_given_latents(pipe):
    latents = 2 * random_latents(pipe) + 1
    plain, half, full = (call(pipe, "latent", latents=latents, adain_factor=factor) for factor in (0, 0.5, 1))
    torch.testing.assert_close(full.mean((2, 3)), latents.mean((2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(full.std((2, 3), correction=0), latents.std((2, 3), correction=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(half, (plain + full) / 2, rtol=1e-4, atol=1e-5)
    assert (plain - full).abs().max() > 1e-2
    assert torch.equal(plain, call(pipe, "latent", latents=latents))


def test_adain_leaves_a_constant_channel_constant():
    values, reference = torch.full((1, 2, 4, 4), 3.0), torch.randn(1, 2, 2, 2, generator=seeded())
    matched = match_channel_statistics(values, reference, 1.0)
    torch.testing.assert_close(matched, reference.mean((2, 3), keepdim=True).expand(1, 2, 4, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_float32_and_hands_out_float32_images(dtype):
    pipe = make_pipeline()
    expected = call(pipe)
    image = call(pipe.to(dtype))
    assert image.dtype == torch.float32
    assert (image - expected).abs().mean() < 0.01
    assert call(pipe, "latent", latents=torch.randn(1, 4, 4, 4, dtype=dtype)).dtype == dtype
    assert call(pipe, "latent", latents=torch.randn(1, 4, 4, 4)).dtype == torch.float32


def test_components_of_different_dtypes_work_together():
    pipe = make_pipeline()
    expected = call(pipe)
    pipe.upsampler.to(torch.bfloat16)
    assert (call(pipe) - expected).abs().mean() < 0.01


def test_a_float16_variant_is_saved_and_loaded(tmp_path):
    pipe = make_pipeline().to(torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "upsampler" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = UPLiFTLatentUpscalePipeline.from_pretrained(tmp_path, variant="fp16", **dtype_option(torch.float16))
    assert loaded.vae.dtype == loaded.upsampler.dtype == torch.float16
    assert torch.equal(call(loaded), call(pipe))
    assert UPLiFTLatentUpscalePipeline.from_pretrained(tmp_path, variant="fp16").upsampler.dtype == torch.float32


def test_a_float16_vae_that_overflows_gives_the_float32_image_with_one_warning(caplog):
    pipe = make_pipeline()
    pipe.vae.decoder.conv_in.weight.data *= 1e5 / pipe.vae.decoder.conv_in.weight.abs().max() / 4
    pipe.vae.half()
    guide, latents = smooth_images(1, 32, 48), random_latents(pipe)
    image = call(pipe, latents=latents, image=guide)
    assert len([record for record in caplog.records if "overflowed in float16" in record.message]) == 1
    assert pipe.vae.dtype == torch.float16
    pipe.vae.float()
    torch.testing.assert_close(image, call(pipe, latents=latents, image=guide), rtol=0, atol=1e-4)
    assert image.std() > 1e-3


def test_components_are_not_changed_by_a_call(any_pipe):
    before, config = state_of(any_pipe), dict(any_pipe.config)
    call(any_pipe, adain_factor=0.5)
    after = state_of(any_pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert dict(any_pipe.config) == config


def test_arguments_are_not_changed_by_a_call(pipe):
    latents = random_latents(pipe)
    before = latents.clone()
    call(pipe, latents=latents, adain_factor=1.0)
    assert torch.equal(latents, before)


def test_tiling_of_the_vae_is_respected(monkeypatch):
    pipe = make_pipeline()
    decodes = count_calls(pipe.vae.decoder, monkeypatch)
    latents, guide = random_latents(pipe, height=8, width=8), smooth_images(1, 64, 64)
    call(pipe, latents=latents, image=guide)
    assert len(decodes) == 1
    pipe.vae.enable_tiling()
    assert call(pipe, latents=latents, image=guide).shape == (1, 3, 128, 128)
    assert len(decodes) > 1 + 1


def test_it_is_made_from_any_pipeline_with_the_same_vae_and_gives_its_components_back(tmp_path):
    sd = components.make_stable_diffusion(tmp_path)
    pipe = UPLiFTLatentUpscalePipeline.from_pipe(sd, upsampler=components.make_upsampler())
    assert pipe.vae is sd.vae
    whole = UPLiFTTextToImagePipeline.from_pipe(sd, upsampler=pipe.upsampler)
    again = UPLiFTLatentUpscalePipeline.from_pipe(whole)
    assert again.upsampler is pipe.upsampler
    assert torch.equal(call(again), call(pipe))
    assert StableDiffusionPipeline.from_pipe(whole).vae is sd.vae


@pytest.mark.parametrize(
    ("scale", "output_type", "expected"),
    [(2, "pt", 2), (2, "latent", 1), (1.5, "latent", 2), (4, "latent", 2), (1, "latent", 0)],
)
def test_progress_reaches_its_total(pipe, scale, output_type, expected):
    calls = []
    call(pipe, output_type, scale=scale, callback_on_progress=lambda *parts: calls.append(parts))
    assert calls == [(done, expected) for done in range(1, expected + 1)]


@pytest.mark.parametrize(("offload", "options"), components.OFFLOADS)
def test_offloading_gives_the_same_image(offload, options):
    expected = call(make_pipeline().to(components.DEVICE))
    pipe = make_pipeline()
    getattr(pipe, offload)(**options)
    torch.testing.assert_close(call(pipe), expected, rtol=0, atol=1e-3)


def test_an_unknown_keyword_is_refused(pipe):
    assert not any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(pipe.__call__).parameters.values()
    )
    with pytest.raises(TypeError, match="sclae"):
        pipe(latents=random_latents(pipe), sclae=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "Either `latents` or `image` must be given"),
        ({"latents": np.zeros((1, 4, 4, 4))}, TypeError, "`latents` must be a tensor, got ndarray"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, ValueError, r"`latents` must be \(B, 4, h, w\)"),
        ({"latents": torch.full((1, 4, 4, 4), torch.inf)}, ValueError, "`latents` must be finite"),
        (
            {"image": smooth_images(1, 30, 32)},
            ValueError,
            "multiples of 8, got .30, 32.*UPLiFTSuperResolutionPipeline",
        ),
        ({"latents": torch.zeros(1, 4, 4, 4), "image": smooth_images(1, 32, 40)}, ValueError, "`image` must be 1 im"),
        ({"latents": torch.zeros(2, 4, 4, 4), "image": smooth_images(1, 32, 32)}, ValueError, "`image` must be 2 im"),
        ({"image": smooth_images(1, 32, 32), "height": 32, "width": 32}, ValueError, "left out without `latents`"),
        ({"latents": torch.zeros(1, 4, 4, 4), "scale": 17}, ValueError, "`scale` must be from 1 to 16, got 17"),
        ({"latents": torch.zeros(1, 4, 4, 4), "scale": "2"}, TypeError, "`scale` must be a number, got str"),
        ({"latents": torch.zeros(1, 4, 4, 4), "adain_factor": 1.1}, ValueError, "`adain_factor` must be from 0 to 1"),
        ({"latents": torch.zeros(1, 4, 4, 4), "adain_factor": None}, TypeError, "`adain_factor` must be a number"),
        ({"latents": torch.zeros(1, 4, 4, 4), "output_type": "jpeg"}, ValueError, "`output_type` must be .*'jpeg'"),
        ({"latents": torch.zeros(1, 4, 4, 4), "generator": [seeded()] * 2}, ValueError, "each of the 1 items, got 2"),
        ({"latents": torch.zeros(1, 4, 4, 4), "generator": 0}, TypeError, "`generator` must be a torch.Generator"),
    ],
)
def test_a_bad_argument_is_refused_before_any_work(pipe, monkeypatch, arguments, error, message):
    work = [count_calls(module, monkeypatch) for module in (pipe.upsampler, pipe.vae.encoder, pipe.vae.decoder)]
    with pytest.raises(error, match=message):
        pipe(**arguments)
    assert work == [[], [], []]


def test_an_upsampler_of_other_latents_is_refused_when_given_and_when_put_in_later():
    with pytest.raises(ValueError, match=r"trained for 'sdxl-vae'.*got 'sd15-vae'"):
        UPLiFTLatentUpscalePipeline(components.make_vae(), components.make_upsampler("sdxl-vae"))
    pipe = make_pipeline()
    pipe.upsampler = components.make_upsampler("sdxl-vae")
    with pytest.raises(ValueError, match=r"trained for 'sdxl-vae'.*got 'sd15-vae'"):
        call(pipe)


def test_an_upsampler_that_overflows_is_named():
    pipe = make_pipeline()
    pipe.upsampler.refiner.conv_out.bias.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="`upsampler` must give finite latents"):
        call(pipe)


def test_tiles_do_not_change_the_image(pipe):
    latents = torch.randn(1, 4, 20, 12, generator=torch.Generator().manual_seed(0))
    whole, tiled = (
        pipe(latents=latents, tile_size=size, output_type="latent", generator=torch.Generator().manual_seed(0)).images
        for size in (None, 64)
    )
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-4 * whole.abs().max().item())
