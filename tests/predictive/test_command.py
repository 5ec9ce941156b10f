"""The command: reports of every task, nothing measured twice, and one sentence for what a person can put right."""

import json
import re

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.predictive.parts import CHANNELS, TinyBackbone, tiny_uplift, write_scenes
from uplift_diffusers.evaluation.predictive import tasks
from uplift_diffusers.evaluation.predictive.evaluate import main
from uplift_diffusers.evaluation.predictive.peers import PEERS, load_peer
from uplift_diffusers.evaluation.predictive.scaling import count_flop


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def backbone(monkeypatch):
    """In place of a FeatureBackbone; counts its calls."""
    backbone = TinyBackbone()
    monkeypatch.setattr(tasks, "_load_backbone", lambda request: backbone)
    return backbone


@pytest.fixture(scope="module")
def uplift(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uplift")
    tiny_uplift().save_pretrained(folder)
    return folder


def folders(scenes, targets="labels"):
    options = []
    for part in ("train", "val"):
        options += [f"--{part}_images", scenes / part / "images", f"--{part}_targets", scenes / part / targets]
    return options


def call(task, output, *options):
    return main([str(option) for option in ("--task", task, "--output_dir", output, *options)])


def report(folder):
    return json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()


COMMON = ("--backbone", "tiny", "--image_size", 48, "--epochs", 2, "--learning_rate", 1e-2)


def test_the_help_names_no_trained_upliftmodel_like_a_peer(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    names = re.findall(r"(\w+)=runs/", capsys.readouterr().out)
    assert len(names) > 1
    assert not PEERS.keys() & set(names)  # whose published tensors would be looked for in its folder


@pytest.mark.parametrize("task", ["segmentation", "drift", "depth"])
def test_every_task_reports_every_upsampler(task, scenes, uplift, backbone, tmp_path):
    options = [*COMMON, *folders(scenes, "depths" if task == "depth" else "labels")]
    options += ["--upsamplers", "nearest", "bilinear", f"uplift={uplift}"]
    options += {"segmentation": ["--num_classes", 3], "drift": ["--num_classes", 3, "--num_steps", 2], "depth": []}[
        task
    ]
    assert call(task, tmp_path, *options) == 0
    values, text = report(tmp_path)
    assert list(values["scores"]) == ["nearest", "bilinear", "uplift"]
    assert all(f"| {name} |" in text for name in values["scores"])
    if task == "drift":
        assert len(values["scores"]["uplift"]) == 3
        assert values["scores"]["nearest"][2]["cosine"]["value"] == pytest.approx(1)
        assert (tmp_path / "drift.png").stat().st_size > 10_000
    else:
        assert list(values["differences"]) == ["nearest", "bilinear"]
        assert "uplift minus" in text
        assert f"{sum(p.numel() for p in tiny_uplift().parameters()) / 1e6:.2f} M" in text


def test_an_upsampler_is_not_measured_again(scenes, backbone, tmp_path):
    options = [*COMMON, *folders(scenes), "--num_classes", 3]
    assert call("segmentation", tmp_path, *options, "--upsamplers", "nearest") == 0
    once, first = len(backbone.seen), report(tmp_path)[0]["scores"]["nearest"]
    assert call("segmentation", tmp_path, *options, "--upsamplers", "nearest") == 0
    assert len(backbone.seen) == once
    assert report(tmp_path)[0]["scores"]["nearest"] == first
    for changed in (["--fresh"], ["--seed", 1], ["--limit", 2]):
        before = len(backbone.seen)
        assert call("segmentation", tmp_path, *options, "--upsamplers", "nearest", *changed) == 0
        assert len(backbone.seen) > before


def test_costs_are_reported_with_what_was_computed_marked(tmp_path, monkeypatch):
    calls = []

    def measure(workload, limits, device):
        calls.append(workload.tokens)
        return count_flop(workload) / 1e11, 1e6 * workload.tokens

    monkeypatch.setattr(tasks, "measure_in_process", measure)
    options = ["--upsamplers", "uplift", "jafar", "--tokens", 64, 256, 1024, "--time_limit", 4]
    assert call("cost", tmp_path, *options) == 0
    values, text = report(tmp_path)
    assert [point["measured"] for point in values["points"]["jafar"]] == [True, True, False]
    assert 256 < values["crossings"]["jafar"]["flop"] < 576
    assert values["exponents"]["uplift"]["seconds"][0] == pytest.approx(1, abs=0.01)
    assert ": time)" in text
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    assert calls == [64, 256, 1024, 64, 256]
    assert call("cost", tmp_path, *options) == 0
    assert len(calls) == 5  # nothing is measured twice


@pytest.mark.parametrize(
    ("task", "options", "sentence"),
    [
        ("segmentation", [], "`backbone` must be given"),
        ("segmentation", ["--backbone", "x"], "`train_images` must be given"),
        ("segmentation", ["--backbone", "x", "--dataset", "voc"], "`data_dir` must be given"),
        (
            "segmentation",
            ["--backbone", "x", "--dataset", "voc", "--data_dir", "nowhere"],
            "`data_dir` must be a folder",
        ),
        (
            "drift",
            ["--backbone", "x", "--dataset", "voc", "--data_dir", ".", "--num_classes", "3"],
            "`num_classes` must not be given for the data set voc",
        ),
        (
            "depth",
            ["--backbone", "x", "--depth_model", "y", "--val_targets", "."],
            "must not be given for depths of a",
        ),
        ("segmentation", ["--tokens", "64"], "`tokens` must not be given with --task segmentation"),
        ("cost", ["--epochs", "3"], "`epochs` must not be given with --task cost"),
        ("cost", ["--tokens", "60"], "`tokens` must be squares"),
        ("cost", ["--upsamplers", "esrgan"], "`upsamplers` must be among"),
        ("depth", ["--backbone", "x", "--upsamplers", "a=1", "a=2"], "different names"),
        ("drift", ["--backbone", "x", "--upsamplers", "jafar="], "must be NAME or NAME=PATH"),
    ],
)
def test_wrong_requests_end_with_one_sentence(task, options, sentence, tmp_path, capsys):
    assert call(task, tmp_path / "report", *options) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_wrong_data_and_upsamplers_end_with_one_sentence(scenes, backbone, tmp_path, capsys):
    for options, sentence in (
        (["--num_classes", 2], "labels of the 2 classes, got the value 2"),
        ([], "`num_classes` must be from 1 to 255"),
        (["--num_classes", 3, "--upsamplers", "jafar"], "`upsamplers` must give weights for jafar"),
        (["--num_classes", 3, "--upsamplers", "bilinear=file"], "`weights` must not be given for bilinear"),
    ):
        assert call("segmentation", tmp_path / "report", *COMMON, *folders(scenes), *options) == 1
        *progress, error = capsys.readouterr().err.splitlines()
        assert sentence in error
        assert error.startswith("`")
        assert "Traceback" not in "".join(progress)


def test_a_wrong_label_is_found_before_a_probe_is_trained(backbone, tmp_path, capsys):
    scenes = write_scenes(tmp_path / "scenes")
    label = sorted((scenes / "val" / "labels").iterdir())[-1]
    Image.fromarray(np.full_like(np.array(Image.open(label)), 9)).save(label)
    assert call("segmentation", tmp_path / "report", *COMMON, *folders(scenes), "--num_classes", 3) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("must have labels of the 3 classes, got the value 9.")
    assert backbone.seen == []


def test_a_label_of_another_size_is_found_before_a_probe_is_trained(backbone, tmp_path, capsys):
    scenes = write_scenes(tmp_path / "scenes")
    label = sorted((scenes / "val" / "labels").iterdir())[-1]
    Image.open(label).crop((0, 0, 20, 20)).save(label)
    assert call("segmentation", tmp_path / "report", *COMMON, *folders(scenes), "--num_classes", 3) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"`{label}` must have the size of its photograph, ")
    assert backbone.seen == []


def test_depths_in_another_unit_are_found_before_a_probe_is_trained(backbone, tmp_path, capsys):
    scenes = write_scenes(tmp_path / "scenes")
    for file in (scenes / "val" / "depths").iterdir():
        np.save(file, 1000 * np.load(file))
    assert call("depth", tmp_path / "report", *COMMON, *folders(scenes, "depths")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("`val_targets` must have depths between 1 mm and 10 m, got none in any file for 1 units")
    assert backbone.seen == []


@pytest.mark.parametrize("content", [b"", b"no array"])
def test_a_damaged_depth_is_named(content, backbone, tmp_path, capsys):
    scenes = write_scenes(tmp_path / "scenes")
    file = sorted((scenes / "val" / "depths").iterdir())[-1]
    file.write_bytes(content)
    assert call("depth", tmp_path / "report", *COMMON, *folders(scenes, "depths")) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"`{file}` must be a file that can be read, got: ")


def test_too_few_tokens_for_one_upsampler_are_found_before_the_first_is_measured(
    scenes, backbone, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tasks, "fit", None)  # calling it would fail
    safetensors.torch.save_file(load_peer("naf", channels=CHANNELS).state_dict(), tmp_path / "naf.safetensors")
    options = [*COMMON, *folders(scenes), "--num_classes", 3, "--upsamplers", "nearest", f"naf={tmp_path}"]
    assert call("segmentation", tmp_path / "report", *options) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("`features` must have at least 9 tokens a side")


def test_a_seed_that_intervals_do_not_take_is_refused_at_once(tmp_path, capsys):
    with pytest.raises(SystemExit):
        call("cost", tmp_path / "report", "--seed", -1)
    assert "--seed: must be a whole number of at least 0, got '-1'" in capsys.readouterr().err


def test_what_a_reading_process_finds_wrong_is_one_sentence(backbone, tmp_path, capsys):
    scenes = write_scenes(tmp_path / "scenes")
    label = sorted((scenes / "train" / "labels").iterdir())[0]
    Image.open(label).crop((0, 0, 20, 20)).save(label)
    options = [*COMMON, *folders(scenes), "--num_classes", 3, "--num_workers", 1]
    assert call("segmentation", tmp_path / "report", *options) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"`{label}` must have the size of its photograph, ")
    assert "Traceback" not in error


def test_a_dino_backbone_is_measured_end_to_end(scenes, tmp_path):
    feature_space = pytest.importorskip("uplift_diffusers.feature_space")
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    space = feature_space.FeatureBackbone.from_pretrained(tmp_path / "dino").space
    model = tiny_uplift(latent_channels=32, spatial_factor=14, encoder_spatial_factor=16, latent_space=space.name)
    model.save_pretrained(tmp_path / "uplift")
    options = ["--backbone", tmp_path / "dino", "--image_size", 56, "--epochs", 1, "--limit", 2, "--num_classes", 3]
    options += [*folders(scenes), "--num_steps", 2, "--upsamplers", "bilinear", f"uplift={tmp_path / 'uplift'}"]
    assert call("drift", tmp_path / "report", *options) == 0
    assert report(tmp_path / "report")[0]["backbone"] == space.name
