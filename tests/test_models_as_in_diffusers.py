"""What every diffusers model promises, for UPLiFTModel and AutoencoderLocal."""

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers.hooks.group_offloading import ModuleGroup

from tests import components
from tests.components import seeded, smooth_images
from uplift_diffusers.latent_space import LatentCodec
from uplift_diffusers.tiling import upsample_tiled


def run_upsampler(model):
    latents = torch.randn(1, 4, 4, 6, generator=seeded())
    with torch.no_grad():
        return model(latents, image=smooth_images(1, 32, 48), num_steps=2, generator=seeded()).sample


def run_autoencoder(model):
    with torch.no_grad():
        return model(smooth_images(1, 32, 48) * 2 - 1).sample


CASES = {
    "upsampler": (components.make_upsampler, run_upsampler),
    "autoencoder": (components.make_local_vae, run_autoencoder),
}
both = pytest.mark.parametrize("name", CASES)


@both
def test_device_map_auto_places_the_whole_model(name, tmp_path):
    make, run = CASES[name]
    model = make()
    model.save_pretrained(tmp_path)
    mapped = type(model).from_pretrained(tmp_path, device_map="auto")
    torch.testing.assert_close(run(mapped).cpu(), run(model), rtol=0, atol=1e-5)


@both
def test_repeated_blocks_can_be_compiled(name):
    make, run = CASES[name]
    model = make()
    expected = run(model)
    model.compile_repeated_blocks(backend="eager")
    assert sum(module._compiled_call_impl is not None for module in model.modules()) > 1
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)


@both
def test_group_offloading_changes_nothing(name):
    make, run = CASES[name]
    model = make()
    expected = run(model)
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)


# What the pipelines call, which does not go through `forward`.
PIECEWISE = {
    "upsampler": lambda model, device: upsample_tiled(
        model, torch.zeros(1, 4, 16, 8, device=device), image=torch.zeros(1, 3, 128, 64, device=device), tile_size=64
    ),
    "autoencoder": lambda model, device: list(model.decode_strips(torch.zeros(1, 12, 4, 6, device=device))),
}


@both
def test_a_model_that_is_offloaded_is_moved_to_its_device_for_tiles_and_strips(name):
    model = CASES[name][0]()
    cpu_offload_with_hook(model, execution_device="meta")  # any device but the CPU
    assert model.device.type == "cpu"
    PIECEWISE[name](model, "meta")
    assert model.device.type == "meta"


@both
def test_a_model_that_is_offloaded_in_blocks_has_every_weight_for_tiles_and_strips(name, monkeypatch):
    model, loaded = CASES[name][0](), set()
    load = ModuleGroup.onload_

    def watched(group):
        loaded.update(*(module.parameters() for module in group.modules), group.parameters)
        load(group)

    monkeypatch.setattr(ModuleGroup, "onload_", watched)
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    PIECEWISE[name](model, "cpu")
    if name == "autoencoder":
        with torch.no_grad():
            model.encode(torch.zeros(1, 3, 32, 48))
    assert loaded == set(model.parameters())


def test_a_float16_vae_that_overflows_while_it_is_offloaded_in_groups_is_refused():
    vae = components.make_vae()
    vae.decoder.conv_in.weight.data *= 1e5 / vae.decoder.conv_in.weight.abs().max() / 4
    vae.half().enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with torch.no_grad(), pytest.raises(ValueError, match=r"offloaded layer by layer.*dtype=torch.bfloat16"):
        LatentCodec(vae).decode(torch.randn(1, 4, 4, 4, generator=seeded()))


class CountingBackend:
    """A backend of torch.compile that runs graphs as they are and counts them."""

    def __init__(self):
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def test_a_compiled_model_is_traced_twice_and_for_no_further_size():
    model, backend, counts = components.make_upsampler(), CountingBackend(), []
    compiled = torch.compile(model, backend=backend)
    for size in ((3, 4), (4, 5), (5, 7), (6, 4)):
        latents, image = torch.randn(1, 4, *size, generator=seeded()), smooth_images(1, 8 * size[0], 8 * size[1])
        noise = list(model.draw_noise(latents, 2, seeded()))
        with torch.no_grad():
            expected = model(latents, image=image, num_steps=2, noise=noise).sample
            actual = compiled(latents, image=image, num_steps=2, noise=noise).sample
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        counts.append(backend.graphs)
    assert counts == [1, 2, 2, 2]


def test_the_second_tile_of_a_compiled_model_traces_nothing():
    model, backend, counts = components.make_upsampler(), CountingBackend(), []
    latents, image = torch.randn(1, 4, 52, 52, generator=seeded()), smooth_images(1, 416, 416)
    settings = {"image": image, "num_steps": 2, "tile_size": 208}
    expected = upsample_tiled(model, latents, **settings, generator=seeded())
    actual = upsample_tiled(
        torch.compile(model, backend=backend),
        latents,
        **settings,
        generator=seeded(),
        callback_on_step=lambda: counts.append(backend.graphs),
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert counts[-1] == counts[1]  # as many as after the first tile's two steps
