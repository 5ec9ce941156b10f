import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ModularPipeline
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep

from tests import components
from tests.components import seeded
from tests.hub_server import HubServer, point_at
from uplift_diffusers import UPLiFTLatentUpscalePipeline, UPLiFTLatentUpscaleStep
from uplift_diffusers.models.conversion import PUBLISHED

LAYOUT = Path(__file__).resolve().parent.parent / "pipelines" / "modular"


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


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with HubServer(tmp_path / "hub") as server:
        point_at(monkeypatch, server.url, tmp_path / "cache")
        yield server


def test_a_repository_of_the_layout_loads_as_a_modular_pipeline(hub):
    repository = hub.folder("owner/stage")
    shutil.copytree(LAYOUT, repository, dirs_exist_ok=True)
    parts = {"vae": components.make_vae(), "upsampler": components.make_upsampler()}
    index = json.loads((repository / "modular_model_index.json").read_text())
    for name, part in parts.items():
        part.save_pretrained(repository / name)
        index[name][2] |= {"pretrained_model_name_or_path": "owner/stage", "subfolder": name}
    (repository / "modular_model_index.json").write_text(json.dumps(index))

    pipe = ModularPipeline.from_pretrained("owner/stage", trust_remote_code=True)
    assert type(pipe.blocks) is UPLiFTLatentUpscaleStep
    pipe.load_components()
    latents = torch.randn(1, 4, 4, 6, generator=seeded(1))
    stage = UPLiFTLatentUpscalePipeline(**parts)
    expected = stage(latents=latents, generator=seeded(), output_type="latent").images
    assert torch.equal(pipe(latents=latents, generator=seeded(), output="latents"), expected)


def test_a_repository_of_the_layout_runs_no_code_unasked(hub):
    shutil.copytree(LAYOUT, hub.folder("owner/stage"), dirs_exist_ok=True)
    with pytest.raises(ValueError, match="trust_remote_code"):
        ModularPipeline.from_pretrained("owner/stage", trust_remote_code=False)


def test_the_layout_names_the_published_upsampler_and_its_vae():
    index = json.loads((LAYOUT / "modular_model_index.json").read_text())
    published = PUBLISHED[index["upsampler"][2]["pretrained_model_name_or_path"]]
    assert published.config == "sd15-vae"
