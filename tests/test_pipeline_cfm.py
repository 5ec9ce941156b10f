import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from tests import components
from tests.components import VAES, count_calls, random_latents, seeded, smooth_images, state_of
from uplift_diffusers import CFMLatentUpscalePipeline, LatentSpace
from uplift_diffusers.cfm import euler_scheduler
from uplift_diffusers.latent_space import LatentCodec


def make_pipeline(vae=None):
    vae = components.make_vae() if vae is None else vae
    pipe = CFMLatentUpscalePipeline(vae, components.make_flow_unet(LatentSpace.of(vae)), euler_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture(scope="module", params=VAES)
def any_pipe(request):
    return make_pipeline(VAES[request.param]())


def call(pipe, output_type="pt", seed=0, **arguments):
    if "latents" not in arguments and "image" not in arguments:
        arguments["image"] = smooth_images(1, 16, 24)
    arguments.setdefault("generator", seeded(seed))
    arguments.setdefault("num_inference_steps", 2)
    return pipe(output_type=output_type, **arguments).images


def encode(vae, image):
    return vae.encode(image * 2 - 1).latent_dist.mode() * 0.18215


@pytest.mark.parametrize("num_steps", [1, 4])
def test_latents_are_those_of_a_hand_written_euler_loop(pipe, num_steps):
    image = smooth_images(2, 16, 32)
    with torch.no_grad():
        context = encode(pipe.vae, F.interpolate(image, size=(32, 64), mode="bilinear"))
        noise = torch.randn(context.shape, generator=seeded(7))
        kept = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod[400]
        point = kept.sqrt() * context + (1 - kept).sqrt() * noise
        for step in range(num_steps):
            seen = torch.cat([point, context], dim=1)
            point = point + pipe.unet(seen, torch.tensor(1000 * step / num_steps)).sample / num_steps
    actual = call(pipe, "latent", image=image, num_inference_steps=num_steps, seed=7)
    torch.testing.assert_close(actual, point, rtol=0, atol=1e-5)
    with torch.no_grad():
        decoded = (pipe.vae.decode(point / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(
        call(pipe, image=image, num_inference_steps=num_steps, seed=7), decoded, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("num_steps", [1, 5])
def test_the_exact_velocity_recovers_the_latents_of_the_large_image(monkeypatch, num_steps):
    pipe = make_pipeline()
    large = smooth_images(1, 64, 32)
    with torch.no_grad():
        target = encode(pipe.vae, large)
    sources = []

    def exact(sample, timestep):
        if timestep == 0:
            sources.append(sample[:, :4])
        return UNet2DOutput(sample=target - sources[0])

    monkeypatch.setattr(pipe.unet, "forward", exact)
    small = F.interpolate(large, size=(32, 16), mode="bicubic", antialias=True).clamp(0, 1)
    latents = call(pipe, "latent", image=small, num_inference_steps=num_steps)
    torch.testing.assert_close(latents, target, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("scale", "size"), [(1, (13, 22)), (1.5, (20, 33)), (2, (26, 44)), (4, (52, 88))])
def test_images_of_any_size_become_exactly_scale_times_as_large(any_pipe, scale, size):
    image = call(any_pipe, image=smooth_images(1, 13, 22), scale=scale)
    assert image.shape == (1, 3, *size)
    assert image.dtype == torch.float32
    assert image.min() >= 0
    assert image.max() <= 1
    assert image.std() > 1e-4


def test_latents_stand_for_the_image_they_decode_to(any_pipe):
    latents = random_latents(any_pipe)
    with torch.no_grad():
        image = LatentCodec(any_pipe.vae, any_pipe.latent_space).decode(any_pipe.latent_space.denormalize(latents))
    torch.testing.assert_close(call(any_pipe, latents=latents), call(any_pipe, image=image), rtol=0, atol=1e-5)


def test_latents_come_in_the_size_and_dtype_of_what_was_asked_for(pipe):
    latents = random_latents(pipe, height=3, width=5)  # odd: the network's own size is even
    assert call(pipe, "latent", latents=latents).shape == (1, 4, 6, 10)
    assert call(pipe, "latent", latents=latents, scale=3).shape == (1, 4, 9, 15)
    assert call(pipe, "latent", latents=latents.half()).dtype == torch.float16


def test_a_saved_pipeline_gives_the_same_image(any_pipe, tmp_path):
    any_pipe.save_pretrained(tmp_path)
    loaded = CFMLatentUpscalePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(call(loaded), call(any_pipe))


def test_pil_array_and_tensor_are_one_as_input_and_as_output(pipe):
    array = (smooth_images(1, 16, 24)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    expected = call(pipe, image=Image.fromarray(array))
    assert torch.equal(call(pipe, image=array), expected)
    assert torch.equal(call(pipe, image=[torch.from_numpy(array).permute(2, 0, 1).float() / 255]), expected)
    tensor, numpy, image = (call(pipe, kind) for kind in ("pt", "np", "pil"))
    np.testing.assert_array_equal(numpy, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(np.asarray(image[0]) / 255, numpy[0], atol=0.5 / 255 + 1e-6)
    (tuple_images,) = pipe(
        image=smooth_images(1, 16, 24),
        num_inference_steps=2,
        generator=seeded(),
        output_type="pt",
        return_dict=False,
    )
    assert torch.equal(tuple_images, tensor)


def test_a_seed_gives_the_same_image_and_another_seed_another(pipe):
    assert torch.equal(call(pipe, seed=3), call(pipe, seed=3))
    assert (call(pipe, seed=3) - call(pipe, seed=4)).abs().max() > 1e-4


def test_an_item_is_the_same_alone_and_in_a_batch(any_pipe):
    images = smooth_images(3, 16, 24)
    batch = call(any_pipe, image=images, generator=[seeded(seed) for seed in range(3)])
    for index in range(3):
        alone = call(any_pipe, image=images[index : index + 1], generator=[seeded(index)])
        torch.testing.assert_close(batch[index : index + 1], alone, rtol=0, atol=2e-5)


def test_every_step_is_one_run_of_the_network(pipe, monkeypatch):
    calls = count_calls(pipe.unet, monkeypatch)
    call(pipe, num_inference_steps=5)
    assert [timestep.item() for _, timestep in calls] == pytest.approx([0, 200, 400, 600, 800], abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_float32(dtype):
    pipe = make_pipeline()
    expected = call(pipe)
    image = call(pipe.to(dtype))
    assert image.dtype == torch.float32
    assert (image - expected).abs().mean() < 0.01


@pytest.mark.parametrize(("offload", "options"), components.OFFLOADS)
def test_offloading_gives_the_same_image(offload, options):
    expected = call(make_pipeline().to(components.DEVICE))
    pipe = make_pipeline()
    getattr(pipe, offload)(**options)
    torch.testing.assert_close(call(pipe), expected, rtol=0, atol=1e-3)


def test_components_are_not_changed_by_a_call(pipe):
    before, config = state_of(pipe), dict(pipe.config)
    call(pipe)
    assert all(torch.equal(value, before[name]) for name, value in state_of(pipe).items())
    assert dict(pipe.config) == config


def test_a_network_of_other_latents_is_refused_when_given_and_when_put_in_later():
    vae = components.make_vae()
    other = components.make_flow_unet(LatentSpace("sdxl-vae", 4, 8, 0.13025))
    with pytest.raises(ValueError, match=r"trained for 'sdxl-vae', got 'sd15-vae'"):
        CFMLatentUpscalePipeline(vae, other, euler_scheduler())
    CFMLatentUpscalePipeline(vae, other, euler_scheduler(), latent_space="sdxl-vae")
    pipe = make_pipeline()
    pipe.unet = other
    with pytest.raises(ValueError, match=r"trained for 'sdxl-vae', got 'sd15-vae'"):
        call(pipe)


def test_the_declared_latent_space_is_saved(tmp_path):
    tiny = components.make_tiny_vae()
    unet = components.make_flow_unet(LatentSpace.of(components.make_vae()))
    pipe = CFMLatentUpscalePipeline(tiny, unet, euler_scheduler(), latent_space="sd15-vae")
    pipe.save_pretrained(tmp_path)
    assert CFMLatentUpscalePipeline.from_pretrained(tmp_path).latent_space.name == "sd15-vae"


def test_a_network_that_does_not_say_its_latents_is_taken_at_its_shape():
    named = components.make_flow_unet(LatentSpace("other", 4, 8, 1.0))
    unnamed = UNet2DModel.from_config({name: v for name, v in named.config.items() if name != "_latent_space"})
    CFMLatentUpscalePipeline(components.make_vae(), unnamed, euler_scheduler())
    with pytest.raises(ValueError, match="trained for 'other'"):
        CFMLatentUpscalePipeline(components.make_vae(), named, euler_scheduler())


def test_a_scheduler_that_goes_the_other_way_is_refused():
    pipe = make_pipeline()
    with pytest.raises(ValueError, match="`scheduler` must have invert_sigmas=True, got False"):
        CFMLatentUpscalePipeline(pipe.vae, pipe.unet, FlowMatchEulerDiscreteScheduler())
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="`scheduler` must have invert_sigmas=True, got False"):
        call(pipe)


def test_a_network_that_overflows_is_named():
    pipe = make_pipeline()
    pipe.unet.conv_out.bias.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="`unet` must give finite velocities"):
        call(pipe)


def test_an_unknown_keyword_is_refused(pipe):
    assert not any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(pipe.__call__).parameters.values()
    )
    with pytest.raises(TypeError, match="sclae"):
        pipe(image=smooth_images(1, 16, 16), sclae=2)


IMAGE, LATENTS = smooth_images(1, 16, 16), torch.zeros(1, 4, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "Either `image` or `latents` must be given, got neither"),
        ({"image": IMAGE, "latents": LATENTS}, ValueError, "Either `image` or `latents` must be given, got both"),
        ({"image": "a.png"}, TypeError, "`image` must be a PIL image"),
        ({"image": [IMAGE[0], IMAGE[0, :, :8]]}, ValueError, "`image` must hold images of one size"),
        ({"latents": np.zeros((1, 4, 4, 4))}, TypeError, "`latents` must be a tensor, got ndarray"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, ValueError, r"`latents` must be \(B, 4, h, w\)"),
        ({"latents": torch.full((1, 4, 4, 4), torch.inf)}, ValueError, "`latents` must be finite"),
        ({"image": IMAGE, "scale": 17}, ValueError, "`scale` must be from 1 to 16, got 17"),
        ({"image": IMAGE, "scale": "2"}, TypeError, "`scale` must be a number, got str"),
        ({"image": IMAGE, "scale": 1.7, "output_type": "latent"}, ValueError, "multiples of 8 for latents.*got 1.7"),
        (
            {"image": IMAGE, "num_inference_steps": 0},
            ValueError,
            "`num_inference_steps` must be a whole number of at least 1, got 0",
        ),
        ({"image": IMAGE, "num_inference_steps": 2.0}, TypeError, "`num_inference_steps` must be a whole number"),
        ({"image": IMAGE, "output_type": "jpeg"}, ValueError, "`output_type` must be .*'jpeg'"),
        ({"image": IMAGE, "generator": [seeded()] * 2}, ValueError, "each of the 1 items, got 2"),
        ({"image": IMAGE, "generator": 0}, TypeError, "`generator` must be a torch.Generator"),
    ],
)
def test_a_bad_argument_is_refused_before_any_work(pipe, monkeypatch, arguments, error, message):
    work = [count_calls(module, monkeypatch) for module in (pipe.unet, pipe.vae.encoder, pipe.vae.decoder)]
    with pytest.raises(error, match=message):
        pipe(**arguments)
    assert work == [[], [], []]
