import numpy as np
import pytest
import torch

from uplift_diffusers import UPLiFTModel

SMALL = {
    "latent_channels": 6,
    "latent_space": "test",
    "encoder_block_out_channels": (8, 12, 16),
    "encoder_layers_per_block": 1,
    "decoder_channels": 20,
    "refiner_channels": 12,
    "refiner_layers": 2,
    "noise_channels": 3,
}


def make_model(**settings):
    torch.manual_seed(0)
    return UPLiFTModel(**{**SMALL, **settings}).eval()


def make_inputs(batch=1, size=(3, 4), factor=8, channels=6):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, channels, *size, generator=generator)
    image = torch.rand(batch, 3, size[0] * factor, size[1] * factor, generator=generator)
    return latents, image


def run(model, latents, image, **kwargs):
    with torch.no_grad():
        return model(latents, image=image, **kwargs).sample


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm_type": "batch_norm", "decoder_convs_per_block": 2, "encoder_convs_per_block": 2},
        {"refiner_layers": 0, "noise_channels": 0},
        {"refiner_residual": True, "neighborhood": 25},
        {"neighborhood": None, "reencode_image": True},
        {"encoder_patch_size": 4},
        {"encoder_patch_size": 4, "encoder_stem_layers": 2},
        {"image_normalization": "imagenet"},
    ],
)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_output_is_two_to_the_steps_as_large(settings, num_steps):
    latents, image = make_inputs(size=(1, 2))
    sample = run(make_model(**settings), latents, image, num_steps=num_steps)
    assert sample.shape == (1, 6, 2**num_steps, 2 * 2**num_steps)
    assert sample.is_contiguous()
    assert torch.isfinite(sample).all()


def test_steps_are_the_results_of_shorter_runs():
    model = make_model(noise_channels=0)
    latents, image = make_inputs()
    with torch.no_grad():
        output = model(latents, image=image, num_steps=3, return_steps=True)
    assert [tuple(step.shape[2:]) for step in output.steps] == [(6, 8), (12, 16), (24, 32)]
    for num_steps, step in enumerate(output.steps, start=1):
        torch.testing.assert_close(run(model, latents, image, num_steps=num_steps), step, rtol=0, atol=1e-5)


def test_tuple_equals_dataclass():
    model = make_model()
    latents, image = make_inputs()
    with torch.no_grad():
        sample, steps = model(
            latents, image=image, num_steps=2, generator=generator(0), return_steps=True, return_dict=False
        )
        output = model(latents, image=image, num_steps=2, generator=generator(0), return_steps=True)
    assert torch.equal(sample, output.sample)
    assert all(torch.equal(a, b) for a, b in zip(steps, output.steps, strict=True))


def test_same_seed_same_output_and_another_seed_another():
    model = make_model()
    latents, image = make_inputs()
    first, again, other = (run(model, latents, image, num_steps=2, generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3


def test_an_item_of_a_batch_equals_the_item_alone():
    model = make_model()
    latents, image = make_inputs(batch=3)
    batch = run(model, latents, image, num_steps=2, generator=[generator(seed) for seed in range(3)])
    for index in range(3):
        single = run(model, latents[index, None], image[index, None], num_steps=2, generator=[generator(index)])
        torch.testing.assert_close(batch[index, None], single, rtol=0, atol=1e-5)


def test_encoder_runs_once_and_lift_encodes_every_step():
    latents, image = make_inputs()
    for settings, expected in (({}, [24]), ({"neighborhood": None, "reencode_image": True}, [24, 48, 96])):
        model = make_model(**settings)
        heights = []
        model.encoder.register_forward_pre_hook(lambda module, args, heights=heights: heights.append(args[0].shape[2]))
        run(model, latents, image, num_steps=3)
        assert heights == expected


def test_sampled_encoder_equals_the_full_one():
    model = make_model(encoder_layers_per_block=2)
    image = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        full = model.encoder(image, 1)
        for stride in (2, 4, 8):
            for sampled, whole in zip(model.encoder(image, stride), full, strict=True):
                torch.testing.assert_close(sampled, whole[..., ::stride, ::stride], rtol=0, atol=1e-5)


def test_output_depends_on_a_bounded_neighborhood_only():
    model = make_model(noise_channels=0, encoder_patch_size=8)
    latents, image = make_inputs(size=(1, 64))
    changed_latents, changed_image = latents.clone(), image.clone()
    changed_latents[..., -1] += 1
    changed_image[..., -8:] = 1 - changed_image[..., -8:]
    difference = (run(model, latents, image) - run(model, changed_latents, changed_image)).abs().amax(dim=(0, 1, 2))
    assert difference[:64].max() == 0
    assert difference[-4:].min() > 1e-4


def test_patch_14_image_is_resized_for_the_encoder():
    model = make_model(spatial_factor=14, encoder_spatial_factor=16)
    latents, image = make_inputs(factor=14)
    sizes = []
    model.encoder.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[2:])))
    assert run(model, latents, image).shape == (1, 6, 6, 8)
    assert sizes == [(48, 64)]


def test_gradients_reach_every_parameter():
    model = make_model().train()
    latents, image = make_inputs()
    model(latents, image=image, num_steps=2).sample.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_save_and_load_round_trip(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = UPLiFTModel.from_pretrained(tmp_path)
    latents, image = make_inputs()
    assert torch.equal(
        run(loaded, latents, image, generator=generator(3)), run(model, latents, image, generator=generator(3))
    )
    assert loaded.config.latent_space == "test"


def test_half_precision_follows_single_precision():
    model = make_model()
    latents, image = make_inputs()
    expected = run(model, latents, image, num_steps=2, generator=generator(0))
    model.to(torch.bfloat16)
    actual = run(model, latents.bfloat16(), image, num_steps=2, generator=generator(0))
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_layerwise_casting_reaches_every_layer():
    model = make_model()
    latents, image = make_inputs()
    expected = run(model, latents, image, generator=generator(0))
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert {module.weight.dtype for module in model.modules() if isinstance(module, torch.nn.Conv2d)} == {
        torch.bfloat16
    }
    actual = run(model, latents, image, generator=generator(0))
    assert 0 < (actual - expected).abs().mean() < 0.03 * expected.abs().mean()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neighborhood": 7}, r"`neighborhood` must be one of \(5, 9, 13, 17, 25, None\), got 7"),
        ({"norm_type": "group_norm"}, "`norm_type` must be one of"),
        ({"image_normalization": "clip"}, "`image_normalization` must be one of"),
        ({"encoder_block_out_channels": (8,)}, "at least two entries"),
        ({"decoder_layers": (1, 0)}, "`decoder_layers` must be two numbers of at least 1"),
        ({"encoder_patch_size": 3}, "must divide the 8 pixels"),
        ({"encoder_stem_layers": -1}, "`encoder_stem_layers` must be at least 0"),
        ({"latent_channels": 0}, "`latent_channels` must be at least 1"),
        ({"refiner_layers": -1}, "`refiner_layers` must be at least 0"),
    ],
)
def test_bad_configurations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_model(**settings)


def test_a_misspelt_setting_is_refused():
    with pytest.raises(TypeError, match="neighbourhood"):
        make_model(neighbourhood=17)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(1, 4, 3, 4)}, r"`raw_latents` must be \(B, 6, h, w\)"),
        ({"latents": torch.zeros(6, 3, 4)}, r"`raw_latents` must be \(B, 6, h, w\)"),
        ({"image": torch.zeros(1, 3, 24, 33)}, "One latent position covers 8 x 8 pixels"),
        ({"image": torch.zeros(2, 3, 24, 32)}, "`image` must be"),
        ({"num_steps": 0}, "`num_steps` must be a whole number of at least 1"),
        ({"generator": [generator(0), generator(1)]}, "one entry for each of the 1 items, got 2"),
    ],
)
def test_inputs_that_contradict_each_other_are_refused(change, message):
    latents, image = make_inputs()
    arguments = {"latents": latents, "image": image, **change}
    with pytest.raises(ValueError, match=message):
        run(make_model(), **arguments)


@pytest.mark.parametrize("num_steps", [1.5, True, "2"])
def test_a_number_of_steps_that_is_no_whole_number_is_refused(num_steps):
    latents, image = make_inputs()
    with pytest.raises(TypeError, match="`num_steps` must be a whole number"):
        run(make_model(), latents, image, num_steps=num_steps)


def test_numpy_numbers_of_steps_are_taken():
    latents, image = make_inputs()
    assert run(make_model(), latents, image, num_steps=np.int64(2)).shape == (1, 6, 12, 16)
