"""Depths of a named model: made once, relative ones of median 1, and used by the depth task."""

import json
import shutil

import pytest
import torch
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

from tests.predictive.parts import TinyBackbone, write_scenes
from uplift_diffusers.evaluation.predictive import tasks
from uplift_diffusers.evaluation.predictive.depth_targets import PredictedDepths
from uplift_diffusers.evaluation.predictive.evaluate import main


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=3, val=2)


@pytest.fixture(scope="module", params=["relative", "metric"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=56,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[4, 8, 16, 16],
        fusion_hidden_size=8,
        head_hidden_size=4,
        depth_estimation_type=request.param,
        max_depth=8 if request.param == "metric" else 1,
    )
    network = DepthAnythingForDepthEstimation(config)
    torch.nn.init.constant_(network.head.conv3.bias, 2.0)  # so that the last ReLU does not give zeros
    network.save_pretrained(folder)
    DPTImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder)
    return folder


def test_depths_are_predicted_once_and_relative_ones_have_median_1(scenes, model, tmp_path):
    images = sorted((scenes / "train" / "images").iterdir())
    data = PredictedDepths(images, str(model), tmp_path, size=48)
    assert data.is_metric == model.name.startswith("metric")
    data.predict()
    image, depth = data[1]
    assert image.shape == (3, 48, 48)
    assert depth.shape == (48, 48)
    assert depth.std() > 0
    assert (depth.median().item() == pytest.approx(1)) == (not data.is_metric)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(written) == 3
    data.predict()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written


def test_depths_of_another_model_or_photograph_are_not_taken(scenes, model, tmp_path):
    photograph, kept, trained = tmp_path / "scene.png", tmp_path / "kept", tmp_path / "trained"
    shutil.copy(scenes / "train" / "images" / "scene0.png", photograph)
    PredictedDepths([photograph], str(model), kept, size=48).predict()
    shutil.copy(scenes / "train" / "images" / "scene1.png", photograph)
    data = PredictedDepths([photograph], str(model), kept, size=48)
    data.predict()
    assert len(list(kept.iterdir())) == 2
    data.model.head.conv3.bias.data += 1
    for part in (data.model, data.processor):
        part.save_pretrained(trained)
    PredictedDepths([photograph], str(trained), kept, size=48).predict()
    assert len(list(kept.iterdir())) == 3


def test_the_depth_task_says_how_its_targets_were_scored(scenes, model, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_load_backbone", lambda request: TinyBackbone())
    options = ["--task", "depth", "--backbone", "tiny", "--depth_model", str(model), "--image_size", "48"]
    for part in ("train", "val"):
        options += [f"--{part}_images", str(scenes / part / "images")]
    assert main([*options, "--epochs", "1", "--output_dir", str(tmp_path)]) == 0
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["aligned"] == model.name.startswith("relative")
    assert ("Targets are relative" in (tmp_path / "report.md").read_text()) == values["aligned"]
    assert list(values["scores"]) == ["nearest", "bilinear"]
