"""`benchmarks.feature_comparison` at a small size."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks import feature_comparison
from tests.components import smooth_images
from tests.feature_parts import WIDTH, make_dinov3


def write_pictures(folder, count, *, labels=None, seed=0):
    folder.mkdir(parents=True)
    for index, image in enumerate(smooth_images(count, 40, 48)):
        pixels = np.roll((image.permute(1, 2, 0) * 255).byte().numpy(), seed, axis=1)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        if labels is not None:
            labels.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels[..., 0] > pixels[..., 0].mean()).astype(np.uint8)).save(labels / f"{index}.png")
    return folder


@pytest.mark.slow
def test_every_upsampler_is_trained_and_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_comparison, "TRAINING_PX", 128)
    monkeypatch.setattr(feature_comparison, "TEST_PX", 32)
    monkeypatch.setattr(feature_comparison, "PROBES", dataclasses.replace(feature_comparison.PROBES, epochs=1))
    make_dinov3().save_pretrained(tmp_path / "backbone")
    torch.manual_seed(0)
    save_file({"weight": torch.randn(6, WIDTH, 1, 1), "bias": torch.zeros(6)}, tmp_path / "head.safetensors")
    write_pictures(tmp_path / "photographs", 6)
    for seed, part in enumerate(("train", "test")):
        write_pictures(tmp_path / "camvid" / part, 3, labels=tmp_path / "camvid" / f"{part}annot", seed=9 * seed)
    arguments = ["--backbone", "backbone", "--head", "head.safetensors", "--photographs", "photographs"]
    arguments += ["--data_dir", "camvid", "--output_dir", "report", "--steps", "4", "--drift_steps", "2"]
    monkeypatch.chdir(tmp_path)
    feature_comparison.main([*arguments, "--seeds", "0", "1"])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    figures = report["figures"]["equal steps"]
    assert list(figures) == ["image at 2x", "bilinear", *feature_comparison.TRAINED]
    for name in feature_comparison.TRAINED:
        assert figures[name]["steps"] == [4, 4]
        assert figures[name]["cosine, 1x"] == pytest.approx([1, 1])
        assert figures[name]["cosine, 4x"][0] != figures[name]["cosine, 4x"][1]  # two seeds
        assert 50_000 < figures[name]["parameters"][0] < 110_000
        assert report["figures"]["equal time"][name]["steps"][0] <= 4
    assert figures["bilinear"]["cosine, 4x"][0] == figures["bilinear"]["cosine, 4x"][1] > 0.5
    assert "| uplift |" in (tmp_path / "report" / "report.md").read_text()

    monkeypatch.setattr(feature_comparison, "train", None)  # calling it again would fail
    monkeypatch.setattr(feature_comparison, "fit_probe", None)
    photograph = str(tmp_path / "photographs" / "0.png")
    monkeypatch.setattr(feature_comparison, "PICTURE_PX", 64)
    feature_comparison.main([*arguments, "--seeds", "0", "1", "--pictures", photograph])
    assert json.loads((tmp_path / "report" / "report.json").read_text())["figures"] == report["figures"]
    assert Image.open(tmp_path / "report" / "features.png").size == (5 * 64, 64)
