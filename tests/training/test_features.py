"""Training on features: the losses, runs of a few steps, and what is refused."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tests.components import smooth_images
from tests.feature_parts import WIDTH, make_dinov2, make_dinov3, make_feature_upsampler
from tests.training_runs import make_photographs
from uplift_diffusers import FeatureBackbone, UPLiFTFeaturePipeline, UPLiFTModel
from uplift_diffusers.evaluation.predictive.peers import JAFAR
from uplift_diffusers.feature_space import FeatureSpace
from uplift_diffusers.training import features
from uplift_diffusers.training.features import (
    RECIPES,
    EveryStepObjective,
    FeatureTrainingConfig,
    FinalSizeObjective,
    SmallFeatureTrainingConfig,
    Squash,
    main,
)

RESULT = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with photographs and one with a backbone."""
    folder = tmp_path_factory.mktemp("features")
    make_dinov2().save_pretrained(folder / "backbone")
    return make_photographs(folder / "photographs"), folder / "backbone"


def flags(folders, output_dir, **settings):
    photographs, backbone = folders
    settings = {
        "recipe": "small",
        "train_data_dir": photographs,
        "backbone": backbone,
        "output_dir": output_dir,
        "resolution": 56,
        "train_batch_size": 2,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "logging_steps": 1,
    } | settings
    return [f"--{name}={value}" for name, value in settings.items()]


def run(folders, output_dir, *switches, **settings):
    assert main([*flags(folders, output_dir, **settings), *switches]) == 0
    return load_file(output_dir / RESULT)


def test_every_step_is_compared_with_the_features_of_the_image_at_its_size():
    backbone, model = FeatureBackbone(make_dinov2()), make_feature_upsampler().train()
    images = smooth_images(2, 112, 112)
    losses = EveryStepObjective(model, backbone, depths=(1, 2, 3))(images, generator=None)

    model.load_state_dict(make_feature_upsampler().state_dict())
    levels = [F.interpolate(images, size=(size, size), mode="bilinear", antialias=True) for size in (112, 56, 28, 14)]
    tokens = [backbone.encode(level) for level in levels]
    total = 0
    for depth in (1, 2, 3):
        result, expected = tokens[depth], 0
        guide, steps = levels[depth], []
        steps = model(result, image=guide, num_steps=depth, return_steps=True).steps
        for index, step in enumerate(steps):
            assert step.shape[2] == 8 >> (depth - 1 - index)
            expected += (step - tokens[depth - 1 - index]).square().mean()
        assert losses[f"loss_d{depth}"].item() == pytest.approx(expected.item(), rel=1e-5)
        total += expected
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-5)


def test_only_the_upsampler_gets_a_gradient():
    backbone, model = FeatureBackbone(make_dinov2()), make_feature_upsampler().train()
    objective = EveryStepObjective(model, backbone, depths=(1,))
    objective(smooth_images(2, 56, 56), generator=None)["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    assert [name for name, _ in objective.named_parameters()] == [
        f"model.{name}" for name, _ in model.named_parameters()
    ]


@pytest.mark.parametrize(("factor", "cosine_part"), [(1.0, 0.0), (1.5, 0.0), (-1.0, 2.0)])
def test_the_peers_loss_is_cosine_and_error_relative_to_the_range_of_the_target(factor, cosine_part):
    backbone, images = FeatureBackbone(make_dinov2()), smooth_images(1, 56, 56)
    target = backbone.encode(images)

    class Scaled(nn.Module):
        def forward(self, tokens, image, size):
            assert tokens.shape == (1, WIDTH, 2, 2)
            assert image.shape == (1, 3, 28, 28)
            assert size == (4, 4)
            return factor * target

    loss = FinalSizeObjective(Scaled(), backbone, depths=(1,))(images, generator=None)["loss"].item()
    values = target.numpy()
    spread = values.max(axis=1, keepdims=True) - values.min(axis=1, keepdims=True)
    expected = cosine_part + np.mean(((factor - 1) * values / spread) ** 2)
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_run_ends_with_an_upsampler_that_belongs_to_the_backbone(folders, tmp_path):
    run(folders, tmp_path / "run", validation_data_dir=folders[0], validation_steps=4)
    model = UPLiFTModel.from_pretrained(tmp_path / "run")
    pipe = UPLiFTFeaturePipeline(make_dinov2(), model)
    assert pipe(smooth_images(1, 40, 50)).features.shape == (1, WIDTH, 40, 50)

    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record for record in records if "loss" in record]
    assert [record["step"] for record in losses] == [1, 2, 3, 4]
    assert losses[0]["loss"] == pytest.approx(losses[0]["loss_d1"] + losses[0]["loss_d2"], rel=1e-5)
    measured = records[-1]
    for scale in (2, 4):
        assert -1 <= measured[f"val_cosine_{scale}x"] <= 1
        assert measured[f"val_mse_bilinear_{scale}x"] > 0
    with Image.open(tmp_path / "run" / "validation" / "bilinear-prediction-target-000004.png") as picture:
        assert picture.size == (8 * 3 * 4, 8 * 4 * 4)  # three maps of 4 x 4 tokens, four photographs
    card = (tmp_path / "run" / "README.md").read_text()
    assert "accelerate launch train_features.py --recipe small" in card


def test_a_resumed_run_repeats_the_uninterrupted_one(folders, tmp_path):
    constant = {"lr_scheduler": "constant", "lr_warmup_steps": 0}
    expected = run(folders, tmp_path / "whole", **constant)
    run(folders, tmp_path / "parts", **constant, max_train_steps=2)
    actual = run(folders, tmp_path / "parts", **constant, resume_from_checkpoint="latest")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_lift_is_the_twin_without_the_attender_and_learns(folders, tmp_path):
    weights = run(folders, tmp_path, method="lift", max_train_steps=25, learning_rate=3e-3, lr_warmup_steps=0)
    assert not any(name.startswith("attender") for name in weights)
    assert UPLiFTModel.from_pretrained(tmp_path).config.reencode_image
    settings = json.loads((tmp_path / "checkpoint-25" / "state.json").read_text())["settings"]
    assert settings["depths"] == [1]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


class Repeat(nn.Module):
    """A published upsampler in the smallest: nearest neighbours and a learnt factor for each channel."""

    def __init__(self, space: FeatureSpace):
        super().__init__()
        self.factor = nn.Parameter(torch.full((space.channels, 1, 1), 0.5))

    def upsample(self, tokens, image, size):
        assert image.shape[2] == 14 * tokens.shape[2]
        return self.factor * F.interpolate(tokens, size=size, mode="nearest")


def test_a_peer_is_trained_by_its_name_and_saved_under_its_own_tensors(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "METHODS", dict(features.METHODS))
    features.add_peer("repeat", Repeat)
    weights = run(
        folders,
        tmp_path,
        method="repeat",
        lr_warmup_steps=0,
        learning_rate=0.05,
        validation_data_dir=folders[0],
        validation_steps=4,
    )
    assert weights.keys() == {"factor"}
    assert (weights["factor"] - 0.5).abs().mean() > 0.05


def test_a_trained_peer_loads_as_its_card_says(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "METHODS", dict(features.METHODS))
    features.add_peer("jafar", lambda space: JAFAR(space.channels, width=16))
    weights = run(folders, tmp_path / "run", method="jafar", max_train_steps=2)
    code = (tmp_path / "run" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace("the folder of this card", str(tmp_path / "run")), names)
    loaded = names["upsampler"].state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_the_recipes_are_the_papers():
    common = {"train_data_dir": "photographs", "output_dir": "run"}
    dinov2 = RECIPES["dinov2-s14"](**common)
    assert (dinov2.depths, dinov2.resolution, dinov2.train_batch_size) == ((1, 2, 3), 448, 32)
    assert (dinov2.learning_rate, dinov2.lr_scheduler, dinov2.num_train_epochs) == (1e-3, "constant", 1)
    assert (dinov2.use_ema, dinov2.mixed_precision, dinov2.max_train_steps) == (False, "no", None)
    assert RECIPES["dinov3-splus16"](**common).depths == (1, 2)
    assert RECIPES["dinov2-s14"](**common, method="lift").depths == (1,)
    model = UPLiFTModel(
        **dinov2.model_settings,
        latent_channels=384,
        spatial_factor=14,
        latent_space="dinov2-s14",
        encoder_spatial_factor=16,
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == 789_521


def test_photographs_are_squashed_and_not_cut():
    image = Image.fromarray(np.repeat(np.arange(120, dtype=np.uint8)[None, :, None], 40, axis=0).repeat(3, axis=2))
    square = Squash(30)(image, 0, 0)
    assert square.shape == (3, 30, 30)
    assert square[0, 0, 0] <= 3
    assert square[0, 0, -1] >= 116  # both ends of the picture are there


def test_squares_can_be_random_crops(folders, tmp_path):
    run(folders, tmp_path, "--no-squash", "--random_crop", max_train_steps=1)
    assert json.loads((tmp_path / "checkpoint-1" / "state.json").read_text())["settings"]["random_crop"] is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "loftup"}, "`method` must be one of uplift, lift"),
        ({"depths": (0,)}, "`depths` must be different whole numbers of at least 1, got (0,)."),
        ({"depths": (1, 1)}, "`depths` must be different whole numbers of at least 1, got (1, 1)."),
        ({"random_crop": True}, "`squash` must be off with `random_crop` or `augment_flip`. Pass --no-squash."),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        FeatureTrainingConfig(train_data_dir="photographs", output_dir="run", **settings)


def test_squares_that_do_not_suit_the_backbone_are_refused():
    config = SmallFeatureTrainingConfig(train_data_dir="photographs", output_dir="run")
    with pytest.raises(
        ValueError, match=r"^`resolution` must be a multiple of 64 for patches of 16 px and a depth of 2, got 224\.$"
    ):
        config.make_task(FeatureBackbone(make_dinov3()))


def test_an_unknown_recipe_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--recipe", "large"])
    assert stop.value.code == 2
    assert "choose from" in capsys.readouterr().err
