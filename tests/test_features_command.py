"""`uplift-diffusers features`."""

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from tests.components import smooth_images
from tests.feature_parts import WIDTH, make_dinov3, make_feature_pipeline
from uplift_diffusers.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A photograph of 60 x 40 pixels, a saved pipeline, and a backbone that does not belong to it."""
    folder = tmp_path_factory.mktemp("features")
    pixels = (smooth_images(1, 40, 60)[0].permute(1, 2, 0) * 255).byte().numpy()
    Image.fromarray(pixels).save(folder / "photo.png")
    make_feature_pipeline().save_pretrained(folder / "model")
    make_dinov3().save_pretrained(folder / "dinov3")
    return folder


@pytest.fixture
def features(folder, monkeypatch):
    """Call it with more arguments of the command; files are below `folder`."""
    monkeypatch.chdir(folder)

    def run(*arguments, model=("--model", "model")):
        return main(["features", "photo.png", *model, "--device", "cpu", *map(str, arguments)])

    return run


def test_a_picture_shows_the_backbones_features_beside_the_upsampled_ones(features, folder, tmp_path):
    assert features("--output", tmp_path / "features.png") == 0
    output = make_feature_pipeline()(Image.open(folder / "photo.png"), output_type="pil")
    with Image.open(tmp_path / "features.png") as picture:
        assert picture.size == (120, 40)
        actual = np.asarray(picture).astype(int)
    for part, expected in ((actual[:, :60], output.backbone_features[0]), (actual[:, 60:], output.features[0])):
        assert np.abs(part - np.asarray(expected)).max() <= 1


def test_a_safetensors_file_holds_the_features(features, folder, tmp_path):
    model = ("--backbone", "model/backbone", "--upsampler", "model/upsampler")
    assert features("--output", tmp_path / "features.safetensors", "--size", "30x20", model=model) == 0
    expected = make_feature_pipeline()(Image.open(folder / "photo.png"), output_size=(20, 30))
    with safe_open(tmp_path / "features.safetensors", "pt") as file:
        assert file.metadata()["feature_space"] == "dinov2-c32-l2-p14"
        assert file.get_tensor("features").shape == (WIDTH, 20, 30)
        for name in ("features", "backbone_features", "cls_token"):
            assert (file.get_tensor(name) - expected[name][0]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "features.txt"], "--output must end in .safetensors, .png, "),
        (["--output", "photo.png"], "photo.png exists. Pass --overwrite to replace it."),
        (["--output", "new.png", "--upsampler", "model/upsampler"], "--model must be left out with --backbone"),
        (["--output", "new.png", "--size", "0x3"], "argument --size: must be WIDTHxHEIGHT in positions, got '0x3'"),
        (["--output", "new.png", "--model", "missing"], "missing"),
    ],
)
def test_what_is_wrong_is_one_line_before_any_work(features, folder, capsys, arguments, message):
    assert features(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("uplift-diffusers features: error: ")
    assert message in lines[0]
    assert not (folder / "new.png").exists()


def test_a_pair_that_does_not_fit_is_one_line(features, capsys):
    model = ("--backbone", "dinov3", "--upsampler", "model/upsampler")
    assert features("--output", "new.png", model=model) == 2
    assert "--upsampler must have been trained for the backbone's features" in capsys.readouterr().err


def test_a_photograph_smaller_than_a_patch_is_one_line(features, folder, capsys):
    Image.new("RGB", (13, 30)).save(folder / "small.png")
    assert main(["features", "small.png", "--model", "model", "--device", "cpu", "--output", "new.png"]) == 1
    assert "must be at least one patch of 14 x 14 pixels, got 30 x 13." in capsys.readouterr().err
    assert not (folder / "new.png").exists()
