"""Loading from a hub: published checkpoints, ordinary repositories, the cache, and every way in which it fails."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from huggingface_hub import constants, hf_api, hf_hub_download, snapshot_download
from safetensors.torch import load_file, save_file

from tests.hub_server import HubServer
from tests.reference_weights import REFERENCE, reference_state_dict
from uplift_diffusers.models.conversion import load_safetensors
from uplift_diffusers.models.upsampler import UPLiFTModel

DINOV2, DINOV3 = "UPLiFT-upsampler/uplift_dinov2-s14", "UPLiFT-upsampler/uplift_dinov3-splus16"
SD15 = "UPLiFT-upsampler/uplift_sd1.5vae"

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

SMALL = {
    "encoder_block_out_channels": (8, 8),
    "encoder_layers_per_block": 1,
    "decoder_channels": 24,
    "refiner_channels": 8,
    "refiner_layers": 1,
}


def point_at(monkeypatch, url):
    """What HF_ENDPOINT sets when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", url)


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer(tmp_path / "hub") as server:
        point_at(monkeypatch, server.url)
        yield server


@pytest.fixture
def unreachable(monkeypatch):
    """Call it to take the network away."""

    def take_away():
        url = f"http://127.0.0.1:{closed_port()}"
        point_at(monkeypatch, url)
        return url

    return take_away


@pytest.fixture
def no_waiting(monkeypatch):
    """The pauses between huggingface_hub's attempts, recorded in place of waited for."""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


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
    def publish(repo, name=None, *, subfolder="", revision="main"):
        folder = hub.folder(repo, revision) / subfolder
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(dino_file, folder / (name or f"{repo.split('/')[1]}.safetensors"))
        return folder

    return publish


def small_model():
    torch.manual_seed(0)
    return UPLiFTModel(**SMALL)


def assert_computes_the_reference(model, golden):
    latents, image = golden["dinov2.square1.latent"], golden["dinov2.square1.image"] * IMAGENET_STD + IMAGENET_MEAN
    if model.config.spatial_factor == 16:
        image = F.interpolate(image, size=(64, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        sample = model(latents, image=image).sample
    assert (sample - golden["dinov2.square1.step0"]).abs().max() <= 1e-4


def assert_same_weights(model, expected):
    expected = expected.state_dict()
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}")


# Published checkpoints


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
def test_from_pretrained_recognises_a_published_repository_by_its_name(
    publish, golden, repo, latent_space, spatial_factor
):
    publish(repo)
    model = UPLiFTModel.from_pretrained(repo)
    assert (model.config.latent_space, model.config.spatial_factor) == (latent_space, spatial_factor)
    assert model.config._name_or_path == repo
    assert not model.training
    assert model.dtype == torch.float32
    assert_computes_the_reference(model, golden)


def test_from_single_file_takes_a_repository_of_any_name_with_a_variant(publish, golden):
    publish("someone/anything", "weights.safetensors")
    model = UPLiFTModel.from_single_file("someone/anything", variant="dinov2-s14")
    assert_computes_the_reference(model, golden)


def test_a_file_of_the_authors_name_is_recognised_in_a_repository_of_another(publish, golden):
    publish("someone/mirror", "uplift_dinov2-s14.safetensors")
    assert_computes_the_reference(UPLiFTModel.from_pretrained("someone/mirror"), golden)


def test_a_published_checkpoint_saved_by_save_pretrained_loads_as_an_ordinary_model(publish, golden, tmp_path):
    publish(DINOV2)
    model = UPLiFTModel.from_pretrained(DINOV2)
    model.save_pretrained(tmp_path / "saved")
    loaded = UPLiFTModel.from_pretrained(tmp_path / "saved")
    assert loaded.config.latent_space == "dinov2-s14"
    assert_same_weights(loaded, model)
    assert_computes_the_reference(loaded, golden)


def test_loaded_weights_can_be_trained_without_touching_the_file(dino_file):
    before = dino_file.read_bytes()
    model = UPLiFTModel.from_single_file(dino_file, variant="dinov2-s14")
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert dino_file.read_bytes() == before


@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
def test_dtype_casts_weights_and_leaves_counters_alone(publish, option):
    publish(DINOV2)
    model = UPLiFTModel.from_pretrained(DINOV2, **{option: torch.float16})
    full = UPLiFTModel.from_pretrained(DINOV2)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float16), name
        assert torch.equal(tensor, full.state_dict()[name].to(tensor.dtype)), name


def test_half_precision_files_load_as_float32_by_default(tmp_path):
    state_dict = reference_state_dict("dinov2")
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state_dict.items()}
    save_file(half, tmp_path / "uplift_dinov2-s14.safetensors")
    model = UPLiFTModel.from_single_file(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.attender.conv.bias, half["attender.conv1.bias"].float())


def test_revision_selects_the_branch(hub, publish):
    publish(DINOV2, "other.bin")
    publish(DINOV2, revision="fixed")
    model = UPLiFTModel.from_pretrained(DINOV2, revision="fixed")
    assert model.config.latent_space == "dinov2-s14"
    assert ("GET", f"/{DINOV2}/resolve/fixed/uplift_dinov2-s14.safetensors") in hub.requests


def test_subfolder_selects_the_folder(publish, golden):
    publish("someone/collection", subfolder="uplift_dinov3-splus16")
    publish("someone/collection", subfolder="uplift_dinov2-s14")
    model = UPLiFTModel.from_pretrained("someone/collection", subfolder="uplift_dinov2-s14")
    assert model.config.latent_space == "dinov2-s14"
    assert_computes_the_reference(model, golden)


def test_cache_dir_is_where_the_checkpoint_goes(publish, tmp_path):
    publish(DINOV2)
    UPLiFTModel.from_pretrained(DINOV2, cache_dir=tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").rglob("*.safetensors"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    UPLiFTModel.from_pretrained(DINOV2, cache_dir=tmp_path / "elsewhere", local_files_only=True)


@pytest.mark.parametrize("load", [UPLiFTModel.from_pretrained, UPLiFTModel.from_single_file])
def test_token_opens_a_private_repository(hub, publish, load):
    publish(DINOV2)
    hub.tokens[DINOV2] = "hf_secret"
    with raises(FileNotFoundError, f"`{DINOV2}` must be a local path or a repository on {hub.url}, got neither. "):
        load(DINOV2)
    assert load(DINOV2, token="hf_secret").config.latent_space == "dinov2-s14"


def test_force_download_replaces_a_damaged_copy_in_the_cache(publish, golden, tmp_path):
    publish(DINOV2)
    UPLiFTModel.from_pretrained(DINOV2)
    (cached,) = (tmp_path / "cache").rglob("*.safetensors")
    cached.resolve().write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"not a whole safetensors file.*`force_download=True`"):
        UPLiFTModel.from_pretrained(DINOV2)
    assert_computes_the_reference(UPLiFTModel.from_pretrained(DINOV2, force_download=True), golden)


def test_a_repository_that_gets_a_configuration_later_is_loaded_by_it(hub, publish):
    folder = publish(DINOV2)
    assert UPLiFTModel.from_pretrained(DINOV2).config.latent_space == "dinov2-s14"
    expected = small_model()
    expected.save_pretrained(folder)
    assert_same_weights(UPLiFTModel.from_pretrained(DINOV2), expected)


# Without the network


def offline_by_variable(monkeypatch, unreachable):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return {}


def offline_by_argument(monkeypatch, unreachable):
    return {"local_files_only": True}


def offline_by_accident(monkeypatch, unreachable):
    unreachable()
    return {}


OFFLINE = pytest.mark.parametrize("offline", [offline_by_variable, offline_by_argument, offline_by_accident])


@OFFLINE
@pytest.mark.parametrize("first", [UPLiFTModel.from_pretrained, UPLiFTModel.from_single_file])
@pytest.mark.parametrize("second", [UPLiFTModel.from_pretrained, UPLiFTModel.from_single_file])
def test_a_cached_checkpoint_loads_offline(
    hub, publish, golden, monkeypatch, unreachable, no_waiting, first, second, offline
):
    publish(DINOV2)
    first(DINOV2)
    hub.forget()
    assert_computes_the_reference(second(DINOV2, **offline(monkeypatch, unreachable)), golden)
    assert hub.requests == []


def test_a_cached_checkpoint_loads_at_once_when_the_hub_is_out_of_reach(publish, unreachable, no_waiting):
    publish(DINOV2)
    UPLiFTModel.from_pretrained(DINOV2)
    unreachable()
    UPLiFTModel.from_pretrained(DINOV2)
    assert no_waiting == []


@pytest.mark.parametrize(
    ("options", "asked", "revision"),
    [({}, "", "main"), ({"revision": "fixed"}, "/revision/fixed", "fixed"), ({"cache_dir": "elsewhere"}, "", "main")],
)
def test_a_cached_checkpoint_is_checked_but_not_downloaded_again(
    hub, publish, monkeypatch, tmp_path, options, asked, revision
):
    monkeypatch.chdir(tmp_path)
    publish(DINOV2)
    publish(DINOV2, revision="fixed")
    hub.folder(DINOV2, "fixed").joinpath("README.md").write_text("Another commit.")
    UPLiFTModel.from_pretrained(DINOV2, **options)
    hub.forget()
    UPLiFTModel.from_pretrained(DINOV2, **options)
    assert hub.requests == [
        ("GET", f"/api/models/{DINOV2}{asked}"),
        ("HEAD", f"/{DINOV2}/resolve/{revision}/uplift_dinov2-s14.safetensors"),
    ]


@OFFLINE
def test_an_ordinary_cached_model_loads_offline(hub, monkeypatch, unreachable, no_waiting, offline):
    expected = small_model()
    expected.save_pretrained(hub.folder("someone/model"))
    UPLiFTModel.from_pretrained("someone/model")
    hub.forget()
    assert_same_weights(UPLiFTModel.from_pretrained("someone/model", **offline(monkeypatch, unreachable)), expected)
    assert hub.requests == []


@pytest.mark.parametrize("load", [UPLiFTModel.from_pretrained, UPLiFTModel.from_single_file])
@pytest.mark.parametrize("offline", [offline_by_variable, offline_by_argument])
def test_offline_without_a_cached_copy_says_so(hub, publish, monkeypatch, unreachable, no_waiting, load, offline):
    publish(DINOV2)
    options = offline(monkeypatch, unreachable)
    message = f"`{DINOV2}` must be in the cache while offline (HF_HUB_OFFLINE or `local_files_only`), got no copy"
    with raises(FileNotFoundError, message):
        load(DINOV2, **options)
    assert hub.requests == []


@pytest.mark.parametrize("load", [UPLiFTModel.from_pretrained, UPLiFTModel.from_single_file])
@pytest.mark.parametrize("offline", [offline_by_variable, offline_by_argument])
def test_offline_with_other_files_in_the_cache_says_what_is_missing(
    hub, publish, monkeypatch, unreachable, load, offline
):
    (publish(DINOV2) / "old.ckpt").write_bytes(b"")
    hf_hub_download(DINOV2, "old.ckpt")
    options = offline(monkeypatch, unreachable)
    with raises(
        FileNotFoundError, f"`{DINOV2}` must be in the cache while offline (HF_HUB_OFFLINE or `local_files_on"
    ):
        load(DINOV2, **options)


def test_a_cached_checkpoint_loads_offline_from_a_snapshot_that_lacks_other_files(hub, publish, golden):
    (publish(DINOV2) / "README.md").write_text("A model.")
    snapshot_download(DINOV2, allow_patterns=["*.safetensors"])
    assert_computes_the_reference(UPLiFTModel.from_single_file(DINOV2, local_files_only=True), golden)


@OFFLINE
def test_an_ordinary_model_whose_weights_are_not_cached_fails_as_in_diffusers(
    hub, monkeypatch, unreachable, no_waiting, offline
):
    small_model().save_pretrained(hub.folder("someone/model"))
    hf_hub_download("someone/model", "config.json")
    options = offline(monkeypatch, unreachable)
    with pytest.raises(OSError, match="does not appear to have a file named diffusion_pytorch_model"):
        UPLiFTModel.from_pretrained("someone/model", **options)


@pytest.mark.parametrize("load", [UPLiFTModel.from_pretrained, UPLiFTModel.from_single_file])
def test_a_hub_out_of_reach_is_named(hub, unreachable, no_waiting, load):
    url = unreachable()
    message = f"`{DINOV2}` must be in the cache or on a hub within reach, got ConnectError from {url}. Check the conn"
    with raises(ConnectionError, message):
        load(DINOV2)


def test_a_hub_that_is_down_is_named_with_its_status(hub, publish, no_waiting):
    publish(DINOV2)
    hub.broken = True
    with raises(ConnectionError, f"`{DINOV2}` must be in the cache or on a hub within reach, got HTTP 503 from"):
        UPLiFTModel.from_single_file(DINOV2)


def test_force_download_is_refused_offline(hub, publish, monkeypatch):
    publish(DINOV2)
    UPLiFTModel.from_pretrained(DINOV2)
    with raises(ValueError, "`force_download` must be False with `local_files_only`, got True"):
        UPLiFTModel.from_single_file(DINOV2, force_download=True, local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with raises(ConnectionError, "`force_download` must be False while offline, got True"):
        UPLiFTModel.from_single_file(DINOV2, force_download=True)


def test_a_download_that_breaks_off_is_resumed(hub, publish, golden, no_waiting):
    publish(DINOV2)
    hub.cut_after["uplift_dinov2-s14.safetensors"] = [100_000, 200_000]
    assert_computes_the_reference(UPLiFTModel.from_single_file(DINOV2), golden)
    assert hub.cut_after["uplift_dinov2-s14.safetensors"] == []


def test_a_download_that_never_completes_fails_and_leaves_nothing(hub, publish, golden, no_waiting, tmp_path):
    publish(DINOV2)
    hub.cut_after["uplift_dinov2-s14.safetensors"] = [100_000] + [0] * 20
    with raises(ConnectionError, f"`uplift_dinov2-s14.safetensors` of `{DINOV2}` must be downloaded whole, got a"):
        UPLiFTModel.from_single_file(DINOV2)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1000]
    hub.cut_after.clear()
    assert_computes_the_reference(UPLiFTModel.from_single_file(DINOV2), golden)


def test_an_error_of_the_disk_is_not_blamed_on_the_network(publish, tmp_path):
    publish(DINOV2)
    (tmp_path / "file").write_text("")
    with pytest.raises((FileExistsError, NotADirectoryError), match=r"file"):
        UPLiFTModel.from_single_file(DINOV2, cache_dir=tmp_path / "file")


# Ordinary repositories


@pytest.mark.parametrize("options", [{}, {"subfolder": "uplift"}, {"variant": "fp16"}, {"revision": "other"}])
def test_an_ordinary_repository_is_asked_exactly_what_diffusers_asks(hub, tmp_path, options):
    expected = small_model()
    folder = hub.folder("someone/model", options.get("revision", "main")) / options.get("subfolder", "")
    hub.folder("someone/model")
    expected.save_pretrained(folder, variant=options.get("variant"))

    plain = ModelMixin.from_pretrained.__func__(UPLiFTModel, "someone/model", cache_dir=tmp_path / "plain", **options)
    asked_by_diffusers = list(hub.requests)
    assert len(asked_by_diffusers) >= 4
    hub.forget()
    model = UPLiFTModel.from_pretrained("someone/model", cache_dir=tmp_path / "ours", **options)
    assert hub.requests == asked_by_diffusers
    assert_same_weights(model, expected)
    assert_same_weights(plain, expected)
    assert model.config == plain.config
    assert not model.training


def test_an_ordinary_repository_with_a_second_weight_file_is_left_to_diffusers(hub, publish):
    expected = small_model()
    expected.save_pretrained(publish(DINOV2))
    assert_same_weights(UPLiFTModel.from_pretrained(DINOV2), expected)


def test_a_configuration_without_weights_fails_as_in_diffusers(hub):
    folder = hub.folder("someone/model")
    small_model().save_config(folder)
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        UPLiFTModel.from_pretrained("someone/model")


# Local paths


def test_a_local_file_loads(tmp_path, dino_file, golden):
    path = tmp_path / "uplift_dinov2-s14.safetensors"
    shutil.copy(dino_file, path)
    assert_computes_the_reference(UPLiFTModel.from_single_file(path), golden)
    assert_computes_the_reference(UPLiFTModel.from_single_file(str(path)), golden)


@pytest.mark.parametrize("load", [UPLiFTModel.from_pretrained, UPLiFTModel.from_single_file])
def test_a_local_folder_is_recognised_by_its_name(tmp_path, dino_file, golden, load, monkeypatch):
    folder = tmp_path / "uplift_dinov2-s14"
    folder.mkdir()
    shutil.copy(dino_file, folder / "model.safetensors")
    assert_computes_the_reference(load(folder), golden)
    assert_computes_the_reference(load(f"{folder}/"), golden)
    assert_computes_the_reference(load(tmp_path, subfolder="uplift_dinov2-s14"), golden)
    monkeypatch.chdir(folder)
    assert_computes_the_reference(load("."), golden)


def test_a_local_folder_with_a_configuration_is_left_to_diffusers(tmp_path):
    expected = small_model()
    expected.save_pretrained(tmp_path / "uplift_dinov2-s14")
    assert_same_weights(UPLiFTModel.from_pretrained(tmp_path / "uplift_dinov2-s14"), expected)


def test_local_paths_never_reach_for_the_network(hub, tmp_path, dino_file):
    UPLiFTModel.from_single_file(dino_file, variant="dinov2-s14")
    UPLiFTModel.from_single_file(dino_file.parent, variant="dinov2-s14")
    with raises(FileNotFoundError, f"`{tmp_path / 'none'}` must be a .safetensors file, a folder that holds one or a"):
        UPLiFTModel.from_single_file(tmp_path / "none")
    with raises(FileNotFoundError, "`missing/file.safetensors` must be a .safetensors file, a folder that holds one"):
        UPLiFTModel.from_single_file("missing/file.safetensors")
    assert hub.requests == []


# Failures

BOTH = pytest.mark.parametrize("load", [UPLiFTModel.from_pretrained, UPLiFTModel.from_single_file])


@BOTH
def test_a_repository_that_does_not_exist_is_named(hub, no_waiting, load):
    message = (
        f"`someone/nothing` must be a local path or a repository on {hub.url}, got neither. "
        "Check the spelling; a private repository needs `token`."
    )
    with raises(FileNotFoundError, message):
        load("someone/nothing")


@BOTH
def test_a_gated_repository_says_where_to_ask(hub, publish, load):
    publish(DINOV2)
    hub.gated.add(DINOV2)
    message = f"`{DINOV2}` must be open to you, got a gated repository. Ask for access at {hub.url}/{DINOV2} and"
    with raises(PermissionError, message):
        load(DINOV2)


@BOTH
def test_a_revision_that_does_not_exist_is_named(publish, load):
    publish(DINOV2)
    with raises(FileNotFoundError, f"`revision` must be a branch, tag or commit of `{DINOV2}`, got 'nowhere'."):
        load(DINOV2, revision="nowhere")


@BOTH
def test_a_repository_without_a_safetensors_file_is_refused(hub, publish, load):
    (hub.folder(DINOV2) / "README.md").write_text("Nothing yet.")
    publish(DINOV2, subfolder="deeper")
    with raises(FileNotFoundError, f"`{DINOV2}` must be a .safetensors file or hold one, got none. Name the folder"):
        load(DINOV2)
    with raises(FileNotFoundError, f"`{DINOV2}/elsewhere` must be a .safetensors file or hold one, got none."):
        load(DINOV2, subfolder="elsewhere")


@BOTH
def test_several_safetensors_files_are_not_chosen_between(hub, publish, load):
    publish(DINOV2, "b.safetensors")
    publish(DINOV2, "a.safetensors")
    with raises(ValueError, f"`{DINOV2}` must hold exactly one .safetensors file, got 2 (a.safetensors, b.sa"):
        load(DINOV2)
    assert not [path for method, path in hub.requests if method == "GET" and path.endswith(".safetensors")]


@BOTH
@pytest.mark.parametrize("name", ["uplift_dinov2-s14.ckpt", "uplift_dinov2-s14.pth", "pytorch_model.bin"])
def test_pickle_is_refused_unopened(hub, tmp_path, load, name):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save(Trap(), hub.folder(DINOV2) / name)
    message = f"must be safetensors, got pickle ({name}). Pickle checkpoints can run code when they are opened"
    with raises(ValueError, f"`{DINOV2}` {message}"):
        load(DINOV2)
    with raises(ValueError, f"`{hub.folder(DINOV2)}` {message}"):
        load(hub.folder(DINOV2))
    assert not (tmp_path / "sprung").exists()
    assert not [path for method, path in hub.requests if path.endswith(name)]


def test_a_local_pickle_file_is_refused_unopened(tmp_path):
    path = tmp_path / "uplift_dinov2-s14.pt"
    torch.save({}, path)
    with raises(ValueError, f"`{path}` must be safetensors, got pickle (uplift_dinov2-s14.pt)."):
        UPLiFTModel.from_single_file(path)
    with raises(ValueError, "`uplift_dinov2-s14.pt` must be a .safetensors file. Pickle checkpoints can run code"):
        load_safetensors(path)


@BOTH
def test_a_name_that_tells_nothing_asks_for_the_variant_before_the_download(hub, publish, load):
    publish("someone/anything", "weights.safetensors")
    message = (
        "`variant` must be given for `someone/anything`, whose name tells nothing of the network, got None. "
        "Call `UPLiFTModel.from_single_file` with one of ('sd15-vae', 'dinov2-s14', 'dinov3-splus16')."
    )
    with raises(ValueError, message):
        load("someone/anything")
    assert not [path for _, path in hub.requests if path.endswith("weights.safetensors")]


def test_an_unknown_variant_is_refused_before_the_hub_is_asked(hub):
    with raises(ValueError, "`variant` must be one of ('sd15-vae', 'dinov2-s14', 'dinov3-splus16'), got 'sdxl'."):
        UPLiFTModel.from_single_file(DINOV2, variant="sdxl")
    assert hub.requests == []


def test_what_is_no_floating_point_dtype_is_refused(dino_file):
    with raises(TypeError, "`dtype` must be a floating-point torch.dtype, got 'float16'."):
        UPLiFTModel.from_single_file(dino_file, variant="dinov2-s14", dtype="float16")
    with raises(TypeError, "`dtype` must be a floating-point torch.dtype, got torch.int8."):
        UPLiFTModel.from_single_file(dino_file, variant="dinov2-s14", dtype=torch.int8)


@BOTH
def test_another_variants_weights_are_refused_by_name(publish, load):
    publish(SD15)
    with pytest.raises(ValueError, match=r"^The checkpoint is not a 'sd15-vae' UPLiFT: no .* and \d+ more\.$"):
        load(SD15)


@BOTH
def test_another_networks_weights_are_refused_by_name(hub, load):
    save_file({"unet.conv_in.weight": torch.zeros(3)}, hub.folder(DINOV2) / "uplift_dinov2-s14.safetensors")
    with raises(ValueError, "`unet.conv_in.weight` is not a parameter of a published UPLiFT checkpoint."):
        load(DINOV2)


@BOTH
@pytest.mark.parametrize("size", [0, 5, 2000, 1_000_000])
def test_a_truncated_file_is_refused(hub, publish, load, size):
    path = publish(DINOV2) / "uplift_dinov2-s14.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"s14\.safetensors` is not a whole safetensors file \(.*\)\. Download it ag"):
        load(DINOV2)


@pytest.mark.parametrize(
    "options",
    [{"device_map": "cpu"}, {"device_map": 0}, {"variant": "fp16"}, {"use_safetensors": False}, {"neighborhood": 9}],
)
def test_options_that_a_published_checkpoint_cannot_honour_are_refused(hub, publish, options):
    publish(DINOV2)
    ((name, value),) = options.items()
    with raises(ValueError, f"`{name}` must be left out for a published checkpoint, got {value!r}."):
        UPLiFTModel.from_pretrained(DINOV2, **options)
    assert not [path for method, path in hub.requests if path.endswith("s14.safetensors")]


def test_options_without_an_effect_are_taken(publish, golden):
    publish(DINOV2)
    model = UPLiFTModel.from_pretrained(
        DINOV2, low_cpu_mem_usage=False, use_safetensors=True, device_map=None, output_loading_info=False, variant=None
    )
    assert_computes_the_reference(model, golden)


@pytest.mark.parametrize("location", [None, 3])
def test_a_location_that_is_no_path_is_refused(location):
    with raises(TypeError, f"`location` must be a path or the name of a repository, got {location}."):
        UPLiFTModel.from_single_file(location)
