"""The checkpoints that the authors of the paper published: from their repositories and from files."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.hub_server import HubServer, point_at
from tests.reference_weights import REFERENCE, reference_state_dict
from uplift_diffusers.models.conversion import CONFIGS
from uplift_diffusers.models.upsampler import UPLiFTModel

DINOV2, DINOV3 = "UPLiFT-upsampler/uplift_dinov2-s14", "UPLiFT-upsampler/uplift_dinov3-splus16"
SD15 = "UPLiFT-upsampler/uplift_sd1.5vae"

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer(tmp_path / "hub") as server:
        point_at(monkeypatch, server.url, tmp_path / "cache")
        yield server


@pytest.fixture(scope="session")
def golden():
    return load_file(REFERENCE / "golden.safetensors")


@pytest.fixture(scope="session")
def dino_file(tmp_path_factory):
    """Weights of both DINO variants, whose parameters have the same names and shapes."""
    path = tmp_path_factory.mktemp("published") / "dino.safetensors"
    save_file(reference_state_dict("dinov2"), path)
    return path


@pytest.fixture
def publish(hub, dino_file):
    def publish(repo, revision="main"):
        shutil.copy(dino_file, hub.folder(repo, revision) / f"{repo.split('/')[1]}.safetensors")

    return publish


def assert_computes_the_reference(model, golden):
    latents, image = golden["dinov2.square1.latent"], golden["dinov2.square1.image"] * IMAGENET_STD + IMAGENET_MEAN
    if model.config.spatial_factor == 16:
        image = F.interpolate(image, size=(64, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        sample = model(latents, image=image).sample
    assert (sample - golden["dinov2.square1.step0"]).abs().max() <= 1e-4


LOAD_IN_A_PROCESS = """
import json, sys
import torch
from safetensors.torch import load_file
from tests.reference_weights import REFERENCE
from uplift_diffusers.models.upsampler import UPLiFTModel

golden = load_file(REFERENCE / "golden.safetensors")
model = UPLiFTModel.from_pretrained(sys.argv[1])
with torch.no_grad():
    sample = model(
        golden["sd15.square1.latent"],
        image=golden["sd15.square1.image"],
        generator=torch.Generator().manual_seed(1234),
    ).sample
print(json.dumps({
    "difference": (sample - golden["sd15.square1.step0"]).abs().max().item(),
    "parameters": sum(parameter.numel() for parameter in model.parameters()),
    "training": model.training,
}))
"""


def load_in_a_process(tmp_path, url, **environment):
    root = Path(__file__).parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path / "home"),
        **environment,
    }
    for name in {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"} & environment.keys():
        del environment[name]
    result = subprocess.run(
        [sys.executable, "-c", LOAD_IN_A_PROCESS, SD15],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_sd15_checkpoint_loads_in_a_fresh_process_and_again_without_the_hub(tmp_path):
    with HubServer(tmp_path / "hub") as server:
        save_file(reference_state_dict("sd15"), server.folder(SD15) / "uplift_sd1.5vae.safetensors")
        online = load_in_a_process(tmp_path, server.url, HF_HUB_OFFLINE="0")
        assert ("GET", f"/{SD15}/resolve/main/uplift_sd1.5vae.safetensors") in server.requests
        server.forget()
        offline = load_in_a_process(tmp_path, server.url, HF_HUB_OFFLINE="1")
        assert server.requests == []
    assert online["difference"] <= 1e-4
    assert (online["parameters"], online["training"]) == (53_487_445, False)
    assert offline == online


@pytest.mark.parametrize(
    ("repo", "latent_space", "spatial_factor"), [(DINOV2, "dinov2-s14", 14), (DINOV3, "dinov3-splus16", 16)]
)
def test_from_pretrained_knows_the_published_repositories(publish, golden, repo, latent_space, spatial_factor):
    publish(repo)
    model = UPLiFTModel.from_pretrained(repo)
    assert (model.config.latent_space, model.config.spatial_factor) == (latent_space, spatial_factor)
    assert (model.training, model.dtype) == (False, torch.float32)
    assert_computes_the_reference(model, golden)


def test_a_published_checkpoint_saved_by_save_pretrained_loads_as_an_ordinary_model(publish, golden, tmp_path):
    publish(DINOV2)
    UPLiFTModel.from_pretrained(DINOV2).save_pretrained(tmp_path / "saved")
    loaded = UPLiFTModel.from_pretrained(tmp_path / "saved")
    assert loaded.config.latent_space == "dinov2-s14"
    assert_computes_the_reference(loaded, golden)


@pytest.mark.parametrize("config", ["dinov2-s14", CONFIGS["dinov2-s14"], "folder"])
def test_a_file_of_any_name_loads_with_a_configuration(dino_file, golden, tmp_path, config):
    if config == "folder":
        UPLiFTModel(**CONFIGS["dinov2-s14"]).save_config(tmp_path / "config")
        config = tmp_path / "config"
    model = UPLiFTModel.from_single_file(dino_file, config=config)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_computes_the_reference(model, golden)


def test_a_file_of_the_authors_name_needs_no_configuration(dino_file, golden, tmp_path):
    path = shutil.copy(dino_file, tmp_path / "uplift_dinov2-s14.safetensors")
    assert_computes_the_reference(UPLiFTModel.from_single_file(path), golden)


def test_loaded_weights_can_be_changed_without_touching_the_file(dino_file):
    before = dino_file.read_bytes()
    model = UPLiFTModel.from_single_file(dino_file, config="dinov2-s14")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert dino_file.read_bytes() == before


@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
def test_dtype_casts_weights_and_leaves_counters_as_they_are(publish, dino_file, option):
    publish(DINOV2)
    full = UPLiFTModel.from_single_file(dino_file, config="dinov2-s14").state_dict()
    model = UPLiFTModel.from_pretrained(DINOV2, **{option: torch.float16})
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float16), name
        assert torch.equal(tensor, full[name].to(tensor.dtype)), name


def test_options_of_the_hub_reach_it(hub, publish, tmp_path):
    publish(DINOV2)
    publish(DINOV2, revision="fixed")
    hub.tokens[DINOV2] = "hf_secret"
    options = {"revision": "fixed", "token": "hf_secret", "cache_dir": tmp_path / "elsewhere", "variant": None}
    UPLiFTModel.from_pretrained(DINOV2, **options)
    assert ("GET", f"/{DINOV2}/resolve/fixed/uplift_dinov2-s14.safetensors") in hub.requests
    hub.forget()
    UPLiFTModel.from_pretrained(DINOV2, **options, local_files_only=True)
    assert hub.requests == []


def test_force_download_replaces_a_damaged_copy_in_the_cache(publish, golden, tmp_path):
    publish(DINOV2)
    UPLiFTModel.from_pretrained(DINOV2)
    (cached,) = (tmp_path / "cache").rglob("*.safetensors")
    cached.resolve().write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"not a complete safetensors file.*`force_download=True`"):
        UPLiFTModel.from_pretrained(DINOV2)
    assert_computes_the_reference(UPLiFTModel.from_pretrained(DINOV2, force_download=True), golden)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, ValueError, "`config` must be given for `dino.safetensors`"),
        ({"variant": "dinov2-s14"}, ValueError, "Name the network by `config='dinov2-s14'`"),
        ({"config": "sd15-vae"}, ValueError, "The checkpoint does not fit `config`: no encoder"),
        ({"config": "dinov2-s14", "dtype": "float16"}, TypeError, "`dtype` must be a floating-point torch.dtype"),
        ({"config": "dinov2-s14", "dtype": torch.int8}, TypeError, "`dtype` must be a floating-point torch.dtype"),
    ],
)
def test_a_file_that_cannot_be_loaded_so_is_refused(dino_file, options, kind, message):
    with pytest.raises(kind, match=message):
        UPLiFTModel.from_single_file(dino_file, **options)


def test_pickle_damaged_and_missing_files_are_refused(tmp_path):
    for name in ("weights.ckpt", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
    for name, kind, message in (
        ("weights.ckpt", ValueError, "must be a .safetensors file. Pickle checkpoints can run code"),
        ("cut.safetensors", ValueError, "not a complete safetensors file"),
        ("none.safetensors", FileNotFoundError, "is not a file"),
    ):
        with pytest.raises(kind, match=message):
            UPLiFTModel.from_single_file(tmp_path / name, config="dinov2-s14")


def test_a_published_checkpoint_has_no_variants(publish):
    publish(DINOV2)
    with pytest.raises(ValueError, match=r"`variant` must be left out.*`dtype=torch.float16`"):
        UPLiFTModel.from_pretrained(DINOV2, variant="fp16")
