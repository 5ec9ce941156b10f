"""`load_pipeline` and `load_vae`: what can be named, and one sentence on whatever is wrong with it."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.components import make_local_vae, make_tiny_vae, make_upsampler
from tests.feature_parts import make_feature_pipeline
from tests.hub_server import HubServer, point_at, set_offline
from uplift_diffusers import AutoencoderLocal, UPLiFTSuperResolutionPipeline
from uplift_diffusers.loading import LoadingError, load_feature_pipeline, load_pipeline, load_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a pipeline, which nobody changes."""
    folder = tmp_path_factory.mktemp("saved")
    upsampler = make_upsampler("test-local", latent_channels=12)
    UPLiFTSuperResolutionPipeline(vae=make_local_vae(), upsampler=upsampler).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path):
    """A copy of that folder to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer(tmp_path / "hub") as server:
        point_at(monkeypatch, server.url, tmp_path / "cache")
        yield server


def sentence_of(model, **options):
    """The one line that says why `model` cannot be loaded."""
    with pytest.raises(LoadingError) as caught:
        load_pipeline(model, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    return str(caught.value)


def test_a_saved_pipeline_is_loaded_as_from_pretrained_loads_it(saved):
    loaded, expected = load_pipeline(saved), UPLiFTSuperResolutionPipeline.from_pretrained(saved)
    for part in ("vae", "upsampler"):
        state, wanted = getattr(loaded, part).state_dict(), getattr(expected, part).state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert loaded.latent_space == expected.latent_space


def test_parts_that_are_named_one_by_one_make_the_same_pipeline(saved):
    for vae in (saved / "vae", saved):  # a VAE, and a pipeline that has one
        pipeline = load_pipeline(saved / "upsampler", vae=vae, dtype=torch.bfloat16)
        assert isinstance(pipeline.vae, AutoencoderLocal)
        assert pipeline.upsampler.dtype == pipeline.vae.dtype == torch.bfloat16


def test_a_vae_of_diffusers_is_loaded_by_its_class_and_its_space_declared(tmp_path):
    make_tiny_vae().save_pretrained(tmp_path / "tiny")
    make_upsampler().save_pretrained(tmp_path / "upsampler")
    assert "latent_space='sd15-vae'" in sentence_of(tmp_path / "upsampler", vae=tmp_path / "tiny")
    pipeline = load_pipeline(tmp_path / "upsampler", vae=tmp_path / "tiny", latent_space="sd15-vae")
    assert pipeline.latent_space.name == "sd15-vae"


def test_the_space_that_a_pipeline_was_saved_with_is_kept(tmp_path):
    pipeline = UPLiFTSuperResolutionPipeline(make_tiny_vae(), make_upsampler(), latent_space="sd15-vae")
    pipeline.save_pretrained(tmp_path)
    assert load_pipeline(tmp_path).latent_space.name == "sd15-vae"


def test_loading_changes_nothing_of_the_process(model):
    from diffusers.utils import logging as diffusers_logging

    logger, bars = logging.getLogger("diffusers"), diffusers_logging.is_progress_bar_enabled()
    level = logger.level
    load_pipeline(model)
    (model / "vae" / WEIGHTS).write_bytes(b"")
    sentence_of(model)
    assert (logger.level, diffusers_logging.is_progress_bar_enabled()) == (level, bars)


@pytest.mark.parametrize("content", ["[]", '"x"', "7", "null", "{", "", "[" * 100_000, "\0\xff", "NaN"])
@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json", "upsampler/config.json"])
def test_json_of_any_shape_is_told(model, name, content):
    (model / name).write_text(content, "latin-1")
    sentence = sentence_of(model)
    assert str(model) in sentence
    assert name.rpartition("/")[2] in sentence


@pytest.mark.parametrize("entry", [{}, [], "x", None, [None], ["diffusers"], [1, 2], ["diffusers", None]])
def test_an_index_that_names_no_class_is_told(model, entry):
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "vae": entry}))
    assert "vae in its model_index.json must be two names" in sentence_of(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_out_channels": 10**9}, "has the implausible number 1e+09"),
        ({"block_out_channels": [8, 8.5]}, "cannot be loaded"),
        ({"encoder_layers_per_block": [1, 10**6]}, "asks for more than 20000 layers"),
        ({"more": "x" * 2**24}, "config.json is damaged (it is too long)"),
        ({"latent_channels": "twelve"}, "cannot be loaded"),
        ({"latent_channels": None}, "cannot be loaded"),
        ({"latent_channels": 13}, "cannot be loaded"),
        ({"latent_channels": -1}, "cannot be loaded"),
        ({"_class_name": "UNet2DModel"}, "must be a VAE, got the class 'UNet2DModel'"),
        ({"_class_name": ["AutoencoderKL"]}, "must be a VAE, got the class ['AutoencoderKL']"),
        ({"_class_name": "AutoencoderMixin"}, "must be a VAE"),
    ],
)
def test_a_configuration_that_makes_no_network_is_told(model, change, words):
    config = json.loads((model / "vae" / "config.json").read_text())
    (model / "vae" / "config.json").write_text(json.dumps({**config, **change}))
    assert words in sentence_of(model)


@pytest.mark.parametrize("part", ["vae", "upsampler"])
def test_weights_that_lack_or_add_a_tensor_are_told_with_its_name(model, part):
    path = model / part / WEIGHTS
    weights = load_file(path)
    name = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != name}, path)
    assert f"{model}/{part} cannot be loaded: its weights lack the tensor {name}." == sentence_of(model)
    save_file({**weights, "more": torch.zeros(1)}, path)
    assert "its weights have, and the network has not, the tensor more." in sentence_of(model)
    save_file({}, path)
    assert f"and {len(weights) - 1} more." in sentence_of(model)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_weights_are_told(model, damage):
    path = model / "upsampler" / WEIGHTS
    path.write_bytes({"cut": path.read_bytes()[:1000], "empty": b"", "text": b"not weights at all"}[damage])
    assert f"{model}/upsampler cannot be loaded: " in sentence_of(model)


def test_pickles_are_never_loaded(model):
    (model / "vae" / WEIGHTS).unlink()
    assert "safetensors" in sentence_of(model)

    class Evil:
        def __reduce__(self):
            return (open, (str(model / "was-run"), "w"))

    torch.save({"x": Evil()}, model / "vae" / "diffusion_pytorch_model.bin")
    assert "has no safetensors, got diffusion_pytorch_model.bin, a pickle" in sentence_of(model)
    assert not (model / "was-run").exists()


@pytest.mark.parametrize(
    ("name", "vae", "words"),
    [
        ("upsampler", None, "If it is a UPLiFTModel, name a --vae."),
        ("empty", None, "If it is a UPLiFTModel, name a --vae."),
        ("model_index.json", None, "must be a folder or a name on the hub, got a file."),
        ("nowhere", None, "must be a folder or a name on the hub (owner/name), got neither."),
        ("upsampler", "upsampler", "must be a VAE, got the class 'UPLiFTModel'."),
        ("vae", "vae", "must be a UPLiFTModel, got the class 'AutoencoderLocal'."),
        ("upsampler", "empty", "must be a VAE or hold one in a folder vae, got neither."),
    ],
)
def test_a_place_of_another_kind_is_told(model, name, vae, words):
    (model / "empty").mkdir()
    assert words in sentence_of(model / name, vae=vae and model / vae)


def test_a_pipeline_of_another_kind_or_without_its_vae_is_told(model):
    (model / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))
    assert "must be a UPLiFTSuperResolutionPipeline, got OtherPipeline without upsampler." in sentence_of(model)
    entries = {"upsampler": ["uplift_diffusers", "UPLiFTModel"], "vae": [None, None]}
    (model / "model_index.json").write_text(json.dumps(entries))
    assert "was saved without its vae. Name a --vae." in sentence_of(model)
    assert load_pipeline(model, vae=model / "vae").latent_space.name == "test-local"


# Pipelines of features


@pytest.fixture(scope="module")
def saved_features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved_features")
    make_feature_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def features(saved_features, tmp_path):
    """A copy of that folder to be damaged."""
    return shutil.copytree(saved_features, tmp_path / "features")


def sentence_of_features(*arguments, **options):
    with pytest.raises(LoadingError) as caught:
        load_feature_pipeline(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_pipeline_of_features_is_loaded_whole_or_by_its_parts_and_nothing_is_said(saved_features, capfd):
    expected = make_feature_pipeline()
    parts = {"backbone": saved_features / "backbone", "upsampler": saved_features / "upsampler"}
    for loaded in (load_feature_pipeline(saved_features), load_feature_pipeline(**parts)):
        assert loaded.feature_backbone.space == expected.feature_backbone.space
        for part in parts:
            state, wanted = getattr(loaded, part).state_dict(), getattr(expected, part).state_dict()
            assert state.keys() == wanted.keys()
            assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("content", ["[]", "7", "{", "", "[" * 100_000])
@pytest.mark.parametrize("name", ["model_index.json", "backbone/config.json", "upsampler/config.json"])
def test_json_of_any_shape_in_a_pipeline_of_features_is_told(features, name, content):
    (features / name).write_text(content)
    assert name.rpartition("/")[2] in sentence_of_features(features)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 10**9}, "has the implausible number 1e+09"),
        ({"hidden_act": "none-such"}, "cannot be loaded"),
        ({"model_type": "vit"}, "must hold a model of type dinov2"),
        ({"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}, "cannot be loaded"),
        ({"hidden_size": 48}, "must be"),
        ({"num_hidden_layers": 10**6}, "asks for more than 20000 layers"),
    ],
)
def test_a_configuration_that_makes_no_backbone_is_told(features, change, words):
    (features / "backbone" / "evil.py").write_text(f"open({str(features / 'was-run')!r}, 'w')")
    config = json.loads((features / "backbone" / "config.json").read_text())
    (features / "backbone" / "config.json").write_text(json.dumps({**config, **change}))
    assert words in sentence_of_features(features)
    assert not (features / "was-run").exists()


def test_weights_of_a_backbone_that_lack_a_tensor_or_are_a_pickle_are_told(features):
    path = features / "backbone" / "model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[-1]
    save_file({key: value for key, value in weights.items() if key != name}, path, metadata={"format": "pt"})
    assert "must have all tensors of the network, got no " in sentence_of_features(features)
    torch.save(weights, path.with_name("pytorch_model.bin"))
    path.unlink()
    assert "has no safetensors, got pytorch_model.bin, a pickle" in sentence_of_features(features)
    assert "without backbone" in sentence_of_features(_without(features, "backbone"))


def _without(model, part):
    index = json.loads((model / "model_index.json").read_text())
    del index[part]
    (model / "model_index.json").write_text(json.dumps(index))
    return model


# The hub


def test_repositories_are_fetched_and_found_again_offline(saved, hub, monkeypatch):
    shutil.copytree(saved, hub.folder("someone/pipeline"), dirs_exist_ok=True)
    pipeline = load_pipeline("someone/pipeline")
    assert pipeline.latent_space.name == "test-local"
    set_offline(monkeypatch, True)
    assert load_pipeline("someone/pipeline").latent_space.name == "test-local"


def test_repositories_out_of_reach_are_told_why(hub, monkeypatch):
    assert "has no such repository that you can read" in sentence_of("someone/nothing")
    hub.folder("someone/gated")
    hub.gated.add("someone/gated")
    assert "requires a login with access to it" in sentence_of("someone/gated")
    assert "neither a local folder nor a repository name" in sentence_of("some one/no thing")
    set_offline(monkeypatch, True)
    assert "not in the cache, and HF_HUB_OFFLINE is set" in sentence_of("someone/nothing")
    with pytest.raises(LoadingError, match="HF_HUB_OFFLINE is set"):
        load_vae("someone/nothing")


@pytest.mark.slow  # the hub's library tries again and again
def test_a_hub_that_does_not_answer_is_called_that(hub):
    hub.broken = True
    assert f"not in the cache, and {hub.url} cannot be reached" in sentence_of("someone/nothing")
