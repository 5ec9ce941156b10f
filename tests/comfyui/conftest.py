"""One ComfyUI for all tests of its nodes, where `UPLIFT_COMFYUI` names the folder that `fetch.py` has filled."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.comfyui.server import ROOT, ComfyUI, run_comfyui
from uplift_diffusers import UPLiFTModel

TINY = {
    "encoder_block_out_channels": (8, 8),
    "encoder_layers_per_block": 1,
    "encoder_patch_size": 4,
    "decoder_channels": 16,
    "decoder_layers": (1, 1),
    "refiner_channels": 16,
    "refiner_layers": 1,
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's base directory: the node pack, the stand-ins, small upsamplers and photographs."""
    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("custom_nodes", "input", "models/latent_upscale_models"):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes" / "uplift").symlink_to(ROOT / "integrations" / "comfyui")
    shutil.copy(Path(__file__).with_name("stand_ins.py"), base / "custom_nodes")
    torch.manual_seed(0)
    for name, channels in (("flux2-vae", 32), ("sd15-vae", 4), ("wan21-vae", 16)):
        model = UPLiFTModel(latent_channels=channels, latent_space=name, **TINY)
        model.save_pretrained(base / "models" / "latent_upscale_models" / f"tiny {name}")
    with Image.open(ROOT / "examples" / "coffee.jpg") as photo:
        photo.crop((300, 200, 373, 261)).save(base / "input" / "odd.png")
        photo.crop((100, 100, 196, 164)).save(base / "input" / "first.png")
        photo.crop((300, 150, 396, 214)).save(base / "input" / "second.png")
        photo.crop((0, 0, 400, 384)).save(base / "input" / "large.png")
        cut_out = photo.crop((300, 200, 364, 264)).convert("RGBA")
    cut_out.putalpha(Image.linear_gradient("L").resize(cut_out.size))
    cut_out.save(base / "input" / "cut_out.png")
    return base


@pytest.fixture(scope="session")
def comfyui(base: Path) -> ComfyUI:
    folder = os.environ.get("UPLIFT_COMFYUI")
    if folder is None or not Path(folder).is_dir():
        pytest.skip("there is no ComfyUI: run `python -m tests.comfyui.fetch FOLDER` and set UPLIFT_COMFYUI=FOLDER")
    with run_comfyui(Path(folder), base) as server:
        yield server
