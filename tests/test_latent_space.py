import pytest
import torch

from tests import components
from tests.components import seeded, smooth_images
from uplift_diffusers import LatentSpace
from uplift_diffusers.latent_space import LatentCodec


def overflowing_vae(**config):
    """A float16 VAE whose decoder and encoder exceed float16's range, and which is well in float32."""
    vae = components.make_vae(**config)
    for conv in (vae.decoder.conv_in, vae.encoder.conv_in):
        conv.weight.data *= 1e5 / conv.weight.abs().max() / 4  # within the range itself: sums of products are not
    return vae.half()


def dtypes(module):
    return {name: tensor.dtype for name, tensor in module.state_dict().items()}


def run_dtypes(module):
    """The dtypes that `module` is run in from now on."""
    seen = []
    module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    return seen


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"scaling_factor": 0.18215}, "sd15-vae"),
        ({"scaling_factor": 0.13025}, "sdxl-vae"),
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609, "latent_channels": 16}, "sd3-vae"),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159, "latent_channels": 16}, "flux-vae"),
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, "AutoencoderKL-c4-f8-scale0.5-shift0.25"),
    ],
)
def test_a_vae_is_named_by_its_numbers(config, name):
    assert LatentSpace.of(components.make_vae(**config)).name == name


def test_a_declared_name_stands_for_a_vae_whose_config_says_nothing():
    tiny = components.make_tiny_vae()
    assert LatentSpace.of(tiny).name == "AutoencoderTiny-c4-f8-scale1"
    assert LatentSpace.of(tiny, "sd15-vae") == LatentSpace("sd15-vae", 4, 8, 0.18215, 0.0)


def test_scaling_is_that_of_diffusers_and_is_undone():
    space = LatentSpace("any", 2, 8, scaling_factor=0.5, shift_factor=3.0)
    raw = torch.tensor([1.0, 3.0, 7.0])
    assert space.normalize(raw).tolist() == [-1.0, 0.0, 2.0]
    assert space.denormalize(space.normalize(raw)).tolist() == raw.tolist()


def test_other_models_are_refused():
    with pytest.raises(TypeError, match=r"`vae` must be an AutoencoderKL, .*got UNet2DConditionModel"):
        LatentSpace.of(components.make_unet())


def test_a_declaration_that_the_vae_contradicts_is_refused():
    with pytest.raises(ValueError, match=r"'flux-vae' has 16 channels .*got a VAE with 4 channels"):
        LatentSpace.of(components.make_vae(), "flux-vae")


def test_latents_normalized_by_channel_are_refused():
    with pytest.raises(ValueError, match=r"one factor.*latents_mean"):
        LatentSpace.of(components.make_vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4))


@pytest.mark.parametrize("latents", [torch.zeros(1, 3, 8, 8), torch.zeros(4, 8, 8)])
def test_latents_of_another_shape_are_refused(latents):
    with pytest.raises(ValueError, match=r"`latents` must be \(B, 4, h, w\) for the latent space 'sd15-vae', got"):
        LatentSpace.of(components.make_vae()).check_latents(latents)


def test_latents_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="`latents` must be finite"):
        LatentSpace.of(components.make_vae()).check_latents(torch.full((1, 4, 2, 2), float("nan")))


def test_an_upsampler_of_other_latents_is_refused_with_the_way_out():
    space = LatentSpace.of(components.make_vae(scaling_factor=0.13025))
    with pytest.raises(ValueError, match=r"trained for 'sd15-vae'.*got 'sdxl-vae'.*pass latent_space='sd15-vae'"):
        space.check_upsampler(components.make_upsampler("sd15-vae"))


def test_encoding_gives_the_unscaled_mode_of_the_posterior():
    vae, image = components.make_vae(), smooth_images(1, 32, 48)
    with torch.no_grad():
        expected = vae.encode(image * 2 - 1).latent_dist.mode()
        raw = LatentCodec(vae).encode(image)
    assert raw.shape == (1, 4, 4, 6)
    torch.testing.assert_close(raw, expected, rtol=0, atol=0)


def test_decoding_gives_float32_images_from_0_to_1():
    vae, raw = components.make_vae(), 3 * torch.randn(1, 4, 4, 6, generator=seeded())
    with torch.no_grad():
        expected = (vae.decode(raw).sample * 0.5 + 0.5).clamp(0, 1)
        image = LatentCodec(vae).decode(raw)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)


def test_a_tiny_autoencoder_has_the_scaled_latents_of_the_space_it_stands_in_for():
    tiny, raw = components.make_tiny_vae(), torch.randn(1, 4, 4, 4, generator=seeded())
    codec = LatentCodec(tiny, "sd15-vae")
    with torch.no_grad():
        expected = (tiny.decode(raw * 0.18215).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(codec.decode(raw), expected, rtol=0, atol=1e-6)
        image = smooth_images(1, 32, 32)
        encoded = tiny.encode(image * 2 - 1).latents / 0.18215
        torch.testing.assert_close(codec.encode(image), encoded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_a_float16_vae_that_overflows_runs_again_in_float32_with_one_warning(caplog, direction):
    vae = overflowing_vae()
    before, weights = dtypes(vae), {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    parameters = {name: id(parameter) for name, parameter in vae.named_parameters()}
    reference = overflowing_vae().float()
    sample = smooth_images(1, 32, 32) if direction == "encode" else torch.randn(1, 4, 4, 4, generator=seeded())
    with torch.no_grad():
        output = getattr(LatentCodec(vae), direction)(sample)
        expected = getattr(LatentCodec(reference), direction)(sample)
    assert [record.message.startswith("`vae` overflowed in float16") for record in caplog.records] == [True]
    assert torch.isfinite(output).all()
    assert output.std() > 1e-3  # not black, nor any other plain image
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert dtypes(vae) == before
    assert {name: id(parameter) for name, parameter in vae.named_parameters()} == parameters
    assert all(torch.equal(tensor, weights[name]) for name, tensor in vae.state_dict().items())


def test_a_vae_is_float16_again_when_decoding_in_float32_fails():
    vae = overflowing_vae()

    def fail_in_float32(module, inputs):
        if inputs[0].dtype == torch.float32:
            raise RuntimeError("out of memory")

    vae.decoder.register_forward_pre_hook(fail_in_float32)
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        LatentCodec(vae).decode(torch.randn(1, 4, 4, 4, generator=seeded()))
    assert set(dtypes(vae).values()) == {torch.float16}


def test_a_float16_vae_that_does_not_overflow_stays_in_float16(caplog):
    vae = components.make_vae().half()
    assert vae.config.force_upcast  # AutoencoderKL's default, which says nothing about this VAE
    seen = run_dtypes(vae.decoder)
    with torch.no_grad():
        LatentCodec(vae).decode(torch.randn(1, 4, 4, 4, generator=seeded()))
    assert (seen, caplog.records) == ([torch.float16], [])


@pytest.mark.parametrize(("force_upcast", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_the_sdxl_vae_runs_in_float32_at_once_where_its_config_forces_it(caplog, force_upcast, dtype):
    vae = components.make_vae(scaling_factor=0.13025, force_upcast=force_upcast).half()
    seen = run_dtypes(vae.decoder)
    with torch.no_grad():
        LatentCodec(vae).decode(torch.randn(1, 4, 4, 4, generator=seeded()))
    assert (seen, caplog.records) == ([dtype], [])
    assert set(dtypes(vae).values()) == {torch.float16}


def test_output_that_is_not_finite_in_float32_either_is_an_error():
    vae = components.make_vae()
    vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with torch.no_grad(), pytest.raises(ValueError, match=r"`vae` must give finite values.*torch.float32"):
        LatentCodec(vae).decode(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16 that overflows"])
@pytest.mark.parametrize(("switch", "calls"), [("enable_slicing", 2), ("enable_tiling", 9)])
def test_slicing_and_tiling_of_the_vae_are_respected(switch, calls, half):
    vae = overflowing_vae() if half else components.make_vae()
    getattr(vae, switch)()
    seen = run_dtypes(vae.decoder)
    with torch.no_grad():
        LatentCodec(vae).decode(torch.randn(2, 4, 16, 16, generator=seeded()))
    assert seen.count(torch.float32) == calls
