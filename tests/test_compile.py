"""The model goes through `torch.compile` in one piece."""

import pytest
import torch

from tests.components import seeded
from uplift_diffusers import UPLiFTModel
from uplift_diffusers.pipelines.upscale_stage import upscale_raw_latents


@pytest.fixture
def model():
    torch.manual_seed(0)
    return UPLiFTModel(
        encoder_block_out_channels=(4, 8),
        encoder_layers_per_block=1,
        encoder_patch_size=2,
        decoder_channels=20,
        refiner_channels=8,
        refiner_layers=1,
        noise_channels=2,
    ).eval()


@torch.no_grad()
def test_a_compiled_model_is_one_graph_for_one_size_and_computes_the_same(model):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    latents, image = torch.randn(1, 4, 3, 4, generator=seeded()), torch.rand(1, 3, 24, 32, generator=seeded())
    outputs = []
    for network in (model, compiled, compiled):
        outputs.append(upscale_raw_latents(latents, image=image, upsampler=network, num_steps=2, generator=seeded(1)))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=1e-5)
    assert len(graphs) == 1
