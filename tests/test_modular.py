import pytest
import torch
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep

from tests import components
from tests.components import seeded
from uplift_diffusers import UPLiFTLatentUpscalePipeline, UPLiFTLatentUpscaleStep


def make_modular(blocks, upsampler=None):
    pipe = blocks.init_pipeline()
    pipe.update_components(
        vae=components.make_vae(scaling_factor=0.13025), upsampler=upsampler or components.make_upsampler("sdxl-vae")
    )
    return pipe


def test_the_block_gives_what_the_pipeline_gives():
    pipe = make_modular(UPLiFTLatentUpscaleStep())
    latents = torch.randn(1, 4, 4, 6, generator=seeded(1))
    arguments = {"latents": latents, "scale": 4, "adain_factor": 0.5}
    stage = UPLiFTLatentUpscalePipeline(pipe.vae, pipe.upsampler)
    expected = stage(**arguments, generator=seeded(), output_type="latent").images
    assert torch.equal(pipe(**arguments, generator=seeded(), output="latents"), expected)


def test_the_block_stands_before_the_decoding_of_diffusers():
    blocks = SequentialPipelineBlocks.from_blocks_dict(
        {"upscale": UPLiFTLatentUpscaleStep(), "decode": StableDiffusionXLDecodeStep()}
    )
    pipe = make_modular(blocks)
    latents = torch.randn(1, 4, 4, 6, generator=seeded(1))
    stage = UPLiFTLatentUpscalePipeline(pipe.vae, pipe.upsampler)
    expected = stage(latents=latents, generator=seeded(), output_type="pt").images
    image = pipe(latents=latents, generator=seeded(), output_type="pt", output="images")
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


def test_an_upsampler_of_other_latents_is_refused():
    pipe = make_modular(UPLiFTLatentUpscaleStep(), components.make_upsampler("sd15-vae"))
    with pytest.raises(ValueError, match="trained for 'sd15-vae'"):
        pipe(latents=torch.zeros(1, 4, 4, 4))
