import math

import numpy as np
import pytest
import torch
from PIL import Image

from uplift_diffusers import AutoencoderLocal, UPLiFTModel, UPLiFTSuperResolutionPipeline
from uplift_diffusers.images.convert import Picture, resize
from uplift_diffusers.latent_space import LatentCodec
from uplift_diffusers.pipelines.upscale_stage import decode_strips_to_scale
from uplift_diffusers.scale import num_steps_for_scale, scaled_size


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    vae = AutoencoderLocal(
        latent_channels=48,
        block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        latent_space="test",
    )
    vae.fit_linear_code(smooth_images(16, 64).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
    upsampler = UPLiFTModel(
        latent_channels=48,
        latent_space="test",
        encoder_block_out_channels=(8, 8),
        encoder_patch_size=4,
        decoder_channels=24,
        refiner_channels=8,
        refiner_layers=1,
        refiner_residual=True,
        noise_channels=2,
    )
    pipeline = UPLiFTSuperResolutionPipeline(vae=vae, upsampler=upsampler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def smooth_images(count, edge):
    """(count, 3, edge, edge) in [-1, 1]."""
    noise = torch.rand(count, 3, edge // 8, edge // 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return torch.nn.functional.interpolate(noise, size=(edge, edge), mode="bicubic").clamp(-1, 1)


def photograph(width=45, height=30, mode="RGB"):
    image = Image.fromarray(((smooth_images(1, 64)[0].permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8))
    return image.resize((width, height)).convert(mode)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (8, 8), (301, 17)])
@pytest.mark.parametrize("scale", [1, 1.37, 2, 3, 16])
def test_output_is_exactly_scale_times_the_size(pipe, size, scale):
    image = pipe(image=photograph(*size), scale=scale).images[0]
    assert image.size == (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))


def test_scale_one_returns_the_image_itself(pipe):
    image = photograph()
    assert (np.asarray(pipe(image=image, scale=1).images[0]) == np.asarray(image)).all()


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_the_mode_is_kept(pipe, mode):
    image = photograph(mode=mode)
    output = pipe(image=image, scale=2).images[0]
    assert output.mode == mode
    assert output.size == (90, 60)


def test_sixteen_bit_greyscale_stays_so(pipe):
    array = np.asarray(photograph(mode="L")).astype(np.uint16) * 257
    output = pipe(image=Image.fromarray(array), scale=2).images[0]
    assert output.mode == "I;16"
    assert np.asarray(output).max() > 255


def test_alpha_is_enlarged_beside_the_color(pipe):
    image = photograph(mode="RGBA")
    alpha = np.zeros((30, 45), np.uint8)
    alpha[:, 20:] = 255
    image.putalpha(Image.fromarray(alpha))
    output = np.asarray(pipe(image=image, scale=2).images[0])[..., 3]
    assert (output[:, :36] == 0).all()
    assert (output[:, 46:] == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_colours_that_cannot_be_seen_do_not_show(pipe, mode):
    alpha = np.full((30, 45), 255, np.uint8)
    alpha[:, 20:] = 0
    enlarged = []
    for hidden in (0, 255):
        image = photograph(mode=mode.removesuffix("A"))
        image.paste(hidden if mode == "LA" else (0, hidden, 0), (20, 0, 45, 30))
        image.putalpha(Image.fromarray(alpha))
        enlarged.append(np.asarray(pipe(image=image, generator=seeded()).images[0]))
    assert (enlarged[0] == enlarged[1]).all()
    assert 0 < enlarged[0][0, 39:41, -1].min() < 255  # an edge that is seen in part


def test_alpha_does_not_overshoot(pipe):
    alpha = np.full((30, 45), 64, np.uint8)
    alpha[:, 20:] = 192
    image = photograph()
    image.putalpha(Image.fromarray(alpha))
    large = np.asarray(pipe(image=image, scale=3).images[0])[..., 3]
    assert (large.min(), large.max()) == (64, 192)


def test_output_types_agree(pipe):
    image = photograph()
    arguments = {"image": image, "scale": 3}
    array = pipe(**arguments, generator=seeded(), output_type="np").images
    tensor = pipe(**arguments, generator=seeded(), output_type="pt").images
    pil = pipe(**arguments, generator=seeded()).images[0]
    assert array.shape == (1, 90, 135, 3)
    assert tensor.shape == (1, 3, 90, 135)
    assert array.dtype == np.float32
    assert (tensor.permute(0, 2, 3, 1).numpy() == array).all()
    assert (np.asarray(pil) == np.rint(array[0] * 255)).all()
    assert 0 <= array.min() < array.max() <= 1


def test_input_types_agree(pipe):
    image = photograph()
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1) / 255
    outputs = [
        pipe(image=i, generator=seeded(), output_type="pt").images for i in (image, array, tensor, tensor[None])
    ]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=1e-6)


def test_an_image_of_a_list_equals_the_image_alone(pipe):
    images = [photograph(40, 24), photograph(17, 33), photograph(40, 24)]
    together = pipe(image=images, scale=4, generator=[seeded(index) for index in range(3)]).images
    for index, image in enumerate(images):
        (alone,) = pipe(image=image, scale=4, generator=seeded(index)).images
        assert (np.asarray(alone) == np.asarray(together[index])).all()
    assert (np.asarray(together[0]) != np.asarray(together[2])).any()


def test_arrays_of_different_sizes_come_as_a_list(pipe):
    images = pipe(image=[photograph(40, 24), photograph(17, 33)], output_type="np").images
    assert [image.shape for image in images] == [(48, 80, 3), (66, 34, 3)]


def test_tuple_equals_dataclass(pipe):
    image = photograph()
    (images,) = pipe(image=image, generator=seeded(), output_type="np", return_dict=False)
    assert (images == pipe(image=image, generator=seeded(), output_type="np").images).all()


def test_save_and_load_give_the_same_image(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = UPLiFTSuperResolutionPipeline.from_pretrained(tmp_path)
    image = photograph()
    expected = pipe(image=image, scale=4, generator=seeded(), output_type="np").images
    assert (loaded(image=image, scale=4, generator=seeded(), output_type="np").images == expected).all()


def test_padding_does_not_reach_the_output(pipe):
    # 45 x 30 is padded to 48 x 32; where the picture already is of that size, its inside must not differ.
    padded = np.pad(np.asarray(photograph()), ((0, 2), (0, 3), (0, 0)), mode="edge")
    settings = {"consistency": 0, "output_type": "np"}  # an interpolation ends where the picture ends
    expected = pipe(image=padded, generator=seeded(), **settings).images[:, :60, :90]
    actual = pipe(image=photograph(), generator=seeded(), **settings).images
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


def test_tiles_do_not_change_the_image(pipe):
    image = photograph(300, 170)
    expected = pipe(image=image, scale=3, generator=seeded(), tile_size=None, output_type="np").images
    for tile_size in (64, 100, 1000):
        tiled = pipe(image=image, scale=3, generator=seeded(), tile_size=tile_size, output_type="np").images
        np.testing.assert_allclose(tiled, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [2, 2.6, 3])
def test_strips_put_together_are_the_image_resized_at_once(pipe, scale):
    size, num_steps = (165, 302), num_steps_for_scale(scale)
    latents = torch.randn(1, 48, 21 * 2**num_steps, 38 * 2**num_steps, generator=seeded())
    codec = LatentCodec(pipe.vae)
    codec.vae.enable_tiling(96)
    strips = list(decode_strips_to_scale(latents, codec=codec, size=size, num_steps=num_steps, scale=scale))
    codec.vae.enable_tiling()
    assert len(strips) == (4 if scale == 2 else 1)
    made = codec.decode(latents)[..., : size[0] * 2**num_steps, : size[1] * 2**num_steps]
    expected = resize(made, scaled_size(size, scale))
    torch.testing.assert_close(torch.cat(strips, dim=2), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "I;16"])
@pytest.mark.parametrize("scale", [2, 3])
def test_an_image_made_of_strips_is_the_array_of_floats_rounded(pipe, mode, scale):
    image = photograph(200, 300, "L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image, dtype=np.uint16) * 257)
    settings = {"image": image, "scale": scale, "tile_size": 64}
    actual = pipe(**settings, generator=seeded()).images[0]
    floats = pipe(**settings, generator=seeded(), output_type="pt").images[0]
    expected = Picture(floats[:3], floats[3:] if len(floats) == 4 else None, mode).to_pil()
    assert actual.mode == mode
    assert np.array_equal(np.asarray(actual), np.asarray(expected))


def test_a_large_image_is_never_there_as_floats(pipe):
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point() and result.shape[-3:-2] == (3,):
                sizes.append(result.shape[-2] * result.shape[-1])
            return result

    pipe.vae.enable_tiling(96)
    with Watch():
        large = pipe(image=photograph(300, 300), scale=4, tile_size=64).images[0]
    assert large.size == (1200, 1200)
    pipe.vae.enable_tiling()
    # Two strips of padded tiles, wider than the image itself: consistency needs a part of the one before.
    assert max(sizes) <= 2 * 96 * 1216


def test_large_images_are_enlarged_in_tiles_of_themselves(pipe):
    calls = []
    handle = pipe.upsampler.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    pipe(image=photograph(768, 16))
    assert len(calls) == 1
    pipe(image=photograph(1600, 16))
    assert len(calls) == 1 + 3
    handle.remove()


def test_progress_is_told_and_can_end_the_work(pipe):
    calls = []
    pipe(image=[photograph(90, 60)] * 2, scale=4, tile_size=64, callback_on_progress=lambda *call: calls.append(call))
    assert calls == [(done, 10) for done in range(1, 11)]  # twice: two tiles in two steps, and a strip

    def stop(done, total):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pipe(image=photograph(90, 60), callback_on_progress=stop)


@pytest.mark.parametrize("number", [np.float32, np.int64])
def test_numpy_scales_are_taken(pipe, number):
    assert pipe(image=photograph(45, 30), scale=number(2), tile_size=np.int64(64)).images[0].size == (90, 60)


def test_compiled_components_compute_the_same(pipe):
    image, pieces = photograph(90, 60), {}
    expected = pipe(image=image, generator=seeded(), output_type="np").images
    compiled = UPLiFTSuperResolutionPipeline(
        vae=torch.compile(pipe.vae, backend="eager"), upsampler=torch.compile(pipe.upsampler, backend="eager")
    )
    for tile_size in (None, 64):
        pieces[tile_size] = compiled(image=image, generator=seeded(), tile_size=tile_size, output_type="np").images
        np.testing.assert_allclose(pieces[tile_size], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tile_size", "error"), [(63, ValueError), ("large", TypeError), (512.0, TypeError)])
def test_bad_tile_sizes_are_refused(pipe, tile_size, error):
    with pytest.raises(error, match="`tile_size` must be"):
        pipe(image=photograph(), tile_size=tile_size)


@pytest.mark.parametrize("scale", [0, -1, 17, 0.5, math.nan, math.inf])
def test_scales_out_of_range_are_refused(pipe, scale):
    with pytest.raises(ValueError, match="`scale` must be from 1 to 16, got"):
        pipe(image=photograph(), scale=scale)


@pytest.mark.parametrize("scale", ["2", None, True, (2, 2)])
def test_scales_that_are_no_numbers_are_refused(pipe, scale):
    with pytest.raises(TypeError, match="`scale` must be a number"):
        pipe(image=photograph(), scale=scale)


def test_bad_arguments_are_refused_before_work_begins(pipe):
    with pytest.raises(ValueError, match="`output_type` must be 'pil', 'np' or 'pt', got 'latent'"):
        pipe(image=photograph(), output_type="latent")
    with pytest.raises(ValueError, match="one entry for each of the 1 images, got 2"):
        pipe(image=photograph(), generator=[seeded(), seeded()])
    with pytest.raises(TypeError, match="must be a PIL image"):
        pipe(image="photo.jpg")


def test_an_upsampler_for_other_latents_is_refused(pipe):
    upsampler = UPLiFTModel(**{**pipe.upsampler.config, "latent_space": "another"})
    with pytest.raises(ValueError, match=r"trained for 'another' .* got 'test' .* latent_space='another'"):
        UPLiFTSuperResolutionPipeline(vae=pipe.vae, upsampler=upsampler)
    allowed = UPLiFTSuperResolutionPipeline(vae=pipe.vae, upsampler=upsampler, latent_space="another")
    assert allowed.latent_space.channels == 48


@pytest.mark.parametrize(("scale", "steps"), [(1, 0), (1.01, 1), (2, 1), (2.5, 2), (4, 2), (4.01, 3), (16, 4)])
def test_steps_overshoot_to_the_next_power_of_two(scale, steps):
    assert num_steps_for_scale(scale) == steps


def test_sizes_are_rounded_to_whole_pixels():
    assert scaled_size((3, 7), 1.37) == (4, 10)
    assert scaled_size((1, 1), 1.2) == (1, 1)
