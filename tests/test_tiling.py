import pytest
import torch
import torch.nn.functional as F

from uplift_diffusers import AutoencoderLocal, UPLiFTModel
from uplift_diffusers.models.blocks import interpolate_2x
from uplift_diffusers.tiling import Span, Window, iterate_tiles, split_into_tiles, step_halos, upsample_tiled

TOLERANCE = 1e-5
"""For float32 rounding, relative to the largest output."""

EXACT = 1e-12
"""For float64 rounding. What comes through many layers from the edge of a halo is small, but far above it."""

SMALL = {
    "latent_channels": 5,
    "latent_space": "test",
    "encoder_block_out_channels": (6, 8, 12),
    "encoder_layers_per_block": 1,
    "encoder_patch_size": 4,
    "decoder_channels": 18,
    "refiner_channels": 10,
    "refiner_layers": 3,
    "noise_channels": 2,
}

FAMILIES = {
    "default": {},
    "pixels": {"encoder_patch_size": 1},
    "patches of a latent": {"encoder_patch_size": 8, "encoder_layers_per_block": 2},
    "stem": {"encoder_stem_layers": 2, "encoder_stem_channels": 7, "encoder_convs_per_block": 2},
    "stem, LiFT": {"encoder_stem_layers": 1, "neighborhood": None, "reencode_image": True, "encoder_patch_size": 8},
    "batch norm, two convolutions": {
        "norm_type": "batch_norm",
        "decoder_convs_per_block": 2,
        "encoder_convs_per_block": 2,
        "refiner_layers": 0,
        "noise_channels": 0,
    },
    "refiner residual": {"refiner_residual": True, "neighborhood": 25, "refiner_layers": 2},
    "image residual": {"image_residual": True, "norm_type": "bias", "noise_channels": 0},
    "image residual, stem": {
        "image_residual": True,
        "encoder_stem_layers": 2,
        "encoder_stem_channels": 7,
        "denoise_channel": True,
        "attender_residual": False,
    },
    "neighborhood 5": {"neighborhood": 5, "refiner_layers": 0},
    "neighborhood 9": {"neighborhood": 9, "noise_channels": 0, "decoder_layers": (2, 1)},
    "neighborhood 13": {"neighborhood": 13, "refiner_layers": 1, "decoder_layers": (1, 1)},
    "no attender": {"neighborhood": None},
    "LiFT": {"neighborhood": None, "reencode_image": True, "refiner_layers": 0, "noise_channels": 0},
    "LiFT on patches": {"neighborhood": None, "reencode_image": True, "encoder_patch_size": 8},
    "three positions for a latent": {"spatial_factor": 6, "encoder_patch_size": 2},
    "patch 14": {"spatial_factor": 14, "encoder_spatial_factor": 16, "image_normalization": "imagenet"},
    "patch 14, LiFT": {"spatial_factor": 14, "encoder_spatial_factor": 16, "reencode_image": True},
    "reduced image": {"spatial_factor": 16, "encoder_spatial_factor": 8},
}


def make_model(**settings):
    torch.manual_seed(0)
    model = UPLiFTModel(**{**SMALL, **settings}).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    if model.config.image_residual:
        model.refiner.conv_out.reset_parameters()  # it starts at zero
    return model


def make_inputs(model, size, batch=1):
    generator = torch.Generator().manual_seed(1)
    factor = model.config.spatial_factor
    latents = torch.randn(batch, model.config.latent_channels, *size, generator=generator)
    image = torch.rand(batch, 3, size[0] * factor, size[1] * factor, generator=generator)
    return latents.to(model.dtype), image.to(model.dtype)


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def relative_difference(actual, expected):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def tiling_difference(model, size, *, num_steps, tile, batch=1):
    """Between tiled and untiled output, for tiles of `tile` latents."""
    latents, image = make_inputs(model, size, batch)
    expected = model(latents, image=image, num_steps=num_steps, generator=seeds(*range(batch))).sample
    tile_size = tile * model.config.spatial_factor
    actual = upsample_tiled(
        model, latents, image=image, num_steps=num_steps, generator=seeds(*range(batch)), tile_size=tile_size
    )
    assert actual.is_contiguous()
    return relative_difference(actual, expected)


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_tiled_output_equals_untiled_for_every_kind_of_model(family, num_steps):
    model = make_model(**FAMILIES[family])
    assert tiling_difference(model, (19, 11), num_steps=num_steps, tile=7) <= TOLERANCE


@pytest.mark.parametrize(
    ("size", "num_steps", "tile", "batch"),
    [
        ((7, 3), 1, 1, 1),
        ((7, 3), 2, 2, 2),
        ((1, 9), 3, 4, 1),
        ((37, 53), 1, 9, 2),
        ((37, 53), 2, 16, 1),
        ((37, 53), 1, 52, 1),
        ((13, 13), 2, 100, 3),
    ],
)
def test_tiled_output_equals_untiled_for_odd_sizes_batches_and_tiles(size, num_steps, tile, batch):
    model = make_model(encoder_patch_size=8)
    assert tiling_difference(model, size, num_steps=num_steps, tile=tile, batch=batch) <= TOLERANCE


def test_tiled_output_equals_untiled_far_from_the_origin():
    # Rounded to float32, source coordinates of the bilinear interpolation are 1e-4 off at a thousand positions.
    model = make_model(encoder_patch_size=8, refiner_layers=0)
    assert tiling_difference(model, (3, 1400), num_steps=1, tile=200) <= TOLERANCE


def test_tiled_output_equals_untiled_for_the_published_architecture():
    torch.manual_seed(0)
    model = UPLiFTModel().eval()
    assert tiling_difference(model, (2, 8), num_steps=1, tile=4) <= TOLERANCE


def test_a_tile_size_between_latents_is_rounded_down_to_whole_ones():
    model = make_model(noise_channels=0)
    latents, image = make_inputs(model, (6, 6))
    heights = []
    model.encoder.register_forward_pre_hook(lambda module, args: heights.append(args[0].shape[2]))
    upsample_tiled(model, latents, image=image, tile_size=23)
    assert len(heights) == 9


@torch.no_grad()
def test_noise_is_drawn_as_the_untiled_model_draws_it():
    model = make_model()
    latents, image = make_inputs(model, (9, 8))
    outputs, next_draws = [], []
    for run in (
        lambda: model(latents, image=image, num_steps=2).sample,
        lambda: upsample_tiled(model, latents, image=image, num_steps=2, tile_size=32),
    ):
        torch.manual_seed(5)
        outputs.append(run())
        next_draws.append(torch.rand(()))
    assert relative_difference(outputs[1], outputs[0]) <= TOLERANCE
    assert torch.equal(*next_draws)


# Halos


def dependence(output, inputs):
    """Rows and columns of `inputs` on which `output` depends."""
    gradient = torch.autograd.grad((output * torch.rand_like(output)).sum(), inputs)[0].abs().sum(dim=(0, 1))
    rows, columns = gradient.sum(dim=1).nonzero()[:, 0], gradient.sum(dim=0).nonzero()[:, 0]
    return (rows[0].item(), rows[-1].item() + 1), (columns[0].item(), columns[-1].item() + 1)


def inner_window(size):
    """An odd rectangle around the middle of a grid of `size`."""
    return Window(*(Span(length // 2 - 1, length // 2 + 2, length) for length in size))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_planned_halo_is_what_the_output_depends_on_and_no_more(family, num_steps):
    model = make_model(**{**FAMILIES[family], "noise_channels": 0}).double()
    latents, image = make_inputs(model, (27, 26))
    latents.requires_grad_()
    tile = inner_window((27, 26))
    seen = tile.grow(step_halos(model, num_steps)[0])
    output = model(latents, image=image, num_steps=num_steps).sample
    target = tile.finer(2**num_steps)
    rows, columns = dependence(Window.whole((27 * 2**num_steps, 26 * 2**num_steps)).crop(output, target), latents)
    assert (rows, columns) == (tuple(seen.rows[:2]), tuple(seen.columns[:2]))


def shorten(monkeypatch, part):
    """Let `part` of a network say that it reaches one position less than it does."""
    kind = type(part)

    class Short(kind):
        reach = property(lambda self: kind.reach.fget(self) - 1)

    monkeypatch.setattr(part, "__class__", Short)


@pytest.mark.parametrize("refiner_layers", [2, 3])
def test_a_halo_of_latents_that_is_one_smaller_is_wrong(monkeypatch, refiner_layers):
    model = make_model(encoder_patch_size=8, refiner_layers=refiner_layers).double()
    assert tiling_difference(model, (30, 30), num_steps=1, tile=10) <= EXACT
    reach = model.step_reach(0)
    monkeypatch.setattr(model, "step_reach", lambda output_reach: reach - 1)
    assert tiling_difference(model, (30, 30), num_steps=1, tile=10) > 1000 * EXACT


@pytest.mark.parametrize("part", ["encoder.blocks.0", "stem"])
def test_a_halo_of_the_image_that_is_one_smaller_is_wrong(monkeypatch, part):
    settings = {"encoder_stem_layers": 1} if part == "stem" else {}
    model = make_model(encoder_patch_size=8, **settings).double()
    assert tiling_difference(model, (30, 30), num_steps=1, tile=10) <= EXACT
    shorten(monkeypatch, model.get_submodule(part))
    assert tiling_difference(model, (30, 30), num_steps=1, tile=10) > 1000 * EXACT


@pytest.mark.parametrize("size", [(1, 2), (2, 5), (37, 53), (3, 1500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interpolated_parts_equal_the_interpolated_whole(size, dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, *size, generator=generator, dtype=dtype)
    expected = F.interpolate(values, scale_factor=2, mode="bilinear", align_corners=True)
    assert torch.equal(interpolate_2x(values), expected)
    whole = Window.whole(size)
    for tile in (tile for row in split_into_tiles(size, max(2, max(size) // 3)) for tile in row):
        seen = tile.grow(1)
        place = torch.tensor([seen.rows.start, seen.columns.start, *size])
        actual = interpolate_2x(whole.crop(values, seen), place)
        torch.testing.assert_close(
            seen.finer(2).crop(actual, tile.finer(2)),
            whole.finer(2).crop(expected, tile.finer(2)),
            rtol=0,
            atol=1e-6 if dtype == torch.float32 else 1e-12,
        )


# Memory


def largest_feature_map(run, channels):
    """Elements of the largest tensor of at least `channels` channels that `run` makes."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.ndim == 4 and tensor.shape[1] >= channels:
                    sizes.append(tensor.numel())
            return result

    with Watch(), torch.no_grad():
        run()
    return max(sizes)


@pytest.mark.parametrize("settings", [{"noise_channels": 0}, {"reencode_image": True, "refiner_layers": 0}])
def test_feature_maps_do_not_grow_with_the_picture(settings):
    model = make_model(**{"encoder_patch_size": 8, "refiner_layers": 1, "decoder_layers": (1, 1), **settings})

    def largest(size, tile):
        latents, image = make_inputs(model, size)
        if tile is None:
            return largest_feature_map(lambda: model(latents, image=image, num_steps=2), channels=6)
        tile_size = tile * model.config.spatial_factor
        return largest_feature_map(
            lambda: upsample_tiled(model, latents, image=image, num_steps=2, tile_size=tile_size), channels=6
        )

    assert largest((24, 24), 8) == largest((24, 40), 8) == largest((40, 24), 8)
    assert largest((24, 24), 8) < largest((24, 24), None) < largest((24, 40), None)


# Autoencoder


def make_vae(**settings):
    torch.manual_seed(0)
    vae = AutoencoderLocal(latent_channels=5, block_out_channels=(6, 8), **settings).eval()
    for convolution in (vae.encoder.conv_out, vae.decoder.conv_out):
        torch.nn.init.normal_(convolution.weight, std=0.1)  # they start at zero
    return vae


VAES = [
    {},
    {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 3)},
    {"encoder_layers_per_block": (0, 2), "decoder_layers_per_block": (0, 0)},
    {"encoder_layers_per_block": (3, 0), "decoder_layers_per_block": (3, 1)},
]


@torch.no_grad()
def encode_difference(vae, size, tile_size):
    sample = (torch.rand(2, 3, *size, generator=seeds(0)[0]) * 2 - 1).to(vae.dtype)
    vae.disable_tiling()
    expected = vae.encode(sample).latent
    vae.enable_tiling(tile_size)
    return relative_difference(vae.encode(sample).latent, expected)


@torch.no_grad()
def decode_difference(vae, size, tile_size):
    latents = torch.randn(2, 5, *size, generator=seeds(0)[0]).to(vae.dtype)
    vae.disable_tiling()
    expected = vae.decode(latents).sample
    vae.enable_tiling(tile_size)
    return relative_difference(vae.decode(latents).sample, expected)


@pytest.mark.parametrize("settings", VAES)
@pytest.mark.parametrize(("size", "tile"), [((3, 7), 1), ((37, 53), 9), ((37, 53), 52), ((1, 30), 4)])
def test_tiled_autoencoder_equals_untiled(settings, size, tile):
    vae = make_vae(**settings)
    assert encode_difference(vae, (8 * size[0], 8 * size[1]), 8 * tile) <= TOLERANCE
    assert decode_difference(vae, size, 8 * tile) <= TOLERANCE


@pytest.mark.parametrize("settings", VAES)
def test_autoencoder_reaches_as_far_as_it_says(settings):
    vae = make_vae(**settings).double()
    tile, size = inner_window((37, 37)), (37, 37)

    sample = (torch.rand(1, 3, 8 * 37, 8 * 37, dtype=torch.float64) * 2 - 1).requires_grad_()
    rows, columns = dependence(Window.whole(size).crop(vae.encode(sample).latent, tile), sample)
    seen = tile.grow(vae.encoder_reach)
    for (start, stop), span in zip((rows, columns), seen, strict=True):
        assert (start // 8, -(-stop // 8)) == tuple(span[:2])

    latents = torch.randn(1, 5, 37, 37, dtype=torch.float64, requires_grad=True)
    pixels = Window.whole(size).finer(8)
    rows, columns = dependence(pixels.crop(vae.decode(latents).sample, tile.finer(8)), latents)
    assert (rows, columns) == tuple(tuple(span[:2]) for span in tile.grow(vae.decoder_reach))


@pytest.mark.parametrize(("part", "difference"), [("encoder", encode_difference), ("decoder", decode_difference)])
def test_an_autoencoder_halo_that_is_one_smaller_is_wrong(monkeypatch, part, difference):
    vae = make_vae().double()
    size = (160, 240) if part == "encoder" else (20, 30)
    assert difference(vae, size, 80) <= EXACT
    shorten(monkeypatch, vae.get_submodule(part))
    assert difference(vae, size, 80) > 1000 * EXACT


@torch.no_grad()
def test_strips_put_one_below_the_other_are_the_picture():
    vae = make_vae()
    latents = torch.randn(1, 5, 21, 6)
    expected = vae.decode(latents).sample
    vae.enable_tiling(40)
    strips = list(vae.decode_strips(latents))
    assert len(strips) == vae.count_strips((21, 6)) == 5
    assert max(strip.shape[2] for strip in strips) == 40
    assert relative_difference(torch.cat(strips, dim=2), expected) <= TOLERANCE


def test_strips_are_decoded_one_at_a_time_and_without_gradient():
    vae = make_vae()
    vae.enable_tiling(80)
    calls = []
    vae.decoder.register_forward_hook(lambda module, inputs, output: calls.append(inputs))
    strips = vae.decode_strips(torch.randn(1, 5, 20, 20))
    assert len(calls) == 0
    strip = next(strips)
    assert (len(calls), strip.requires_grad, torch.is_grad_enabled()) == (2, False, True)


def test_an_autoencoder_that_is_trained_sees_the_whole_picture():
    vae = make_vae()
    vae.enable_tiling(16)
    sample = torch.rand(1, 3, 32, 32, requires_grad=True)
    vae(sample).sample.sum().backward()
    assert sample.grad.abs().sum() > 0


def test_autoencoder_feature_maps_do_not_grow_with_the_picture():
    vae = make_vae()

    def largest(function, values, tile_size):
        vae.enable_tiling(tile_size)
        return largest_feature_map(lambda: function(values), channels=6)

    def decode(height, tile_size):
        return largest(vae.decode, torch.randn(1, 5, height, 40), tile_size)

    def encode(height, tile_size):
        return largest(vae.encode, torch.rand(1, 3, 8 * height, 320), tile_size)

    for function in (decode, encode):
        assert function(40, 64) == function(64, 64) < function(40, 320)


# Refusals


@pytest.mark.parametrize(
    ("tile_size", "error", "message"),
    [
        (7, ValueError, "`tile_size` must be a whole number of at least 8, got 7"),
        (-64, ValueError, "at least 8"),
        (64.0, TypeError, "`tile_size` must be a whole number, got 64.0"),
        (True, TypeError, "whole number, got True"),
    ],
)
def test_bad_tile_sizes_are_refused(tile_size, error, message):
    model, vae = make_model(), make_vae()
    latents, image = make_inputs(model, (2, 2))
    with pytest.raises(error, match=message):
        iterate_tiles(model, latents, image=image, tile_size=tile_size)
    with pytest.raises(error, match=message):
        vae.enable_tiling(tile_size)


def test_models_that_see_the_whole_picture_are_refused():
    model = make_model(norm_type="batch_norm").train()
    latents, image = make_inputs(model, (2, 2))
    with pytest.raises(ValueError, match=r"`model` must be in evaluation mode.*`model.eval\(\)`"):
        upsample_tiled(model, latents, image=image, tile_size=64)


def test_resizing_by_a_ratio_that_is_not_exact_in_binary_is_refused():
    model = make_model(spatial_factor=14, encoder_spatial_factor=12)
    latents, image = make_inputs(model, (2, 2))
    with pytest.raises(ValueError, match="as 16/14, got 12/14"):
        upsample_tiled(model, latents, image=image, tile_size=64)


def test_inputs_that_contradict_each_other_are_refused():
    model, vae = make_model(), make_vae()
    latents, image = make_inputs(model, (2, 2))
    with pytest.raises(ValueError, match="One latent position covers 8 x 8 pixels"):
        iterate_tiles(model, latents, image=image[..., 1:], tile_size=64)
    with pytest.raises(ValueError, match="`sample` must be"):
        vae.encode(image[..., 1:])
    with pytest.raises(ValueError, match="`latents` must be"):
        vae.decode_strips(latents[:, 1:])


def test_every_step_of_every_tile_is_told_and_can_end_the_work():
    model = make_model()
    latents, image = make_inputs(model, (8, 8))
    calls = []
    upsample_tiled(model, latents, image=image, num_steps=2, tile_size=32, callback_on_step=lambda: calls.append(1))
    assert len(calls) == 8

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        upsample_tiled(model, latents, image=image, num_steps=2, tile_size=32, callback_on_step=stop)
