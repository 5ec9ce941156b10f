"""`--stage pixels`: the stem learns to enlarge, resumes exactly, and is what the second stage starts from."""

import inspect
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.components import seeded, smooth_images
from tests.training_runs import RESULT, logged, make_photographs, make_vae
from uplift_diffusers import UPLiFTModel
from uplift_diffusers.data.dataset import Crop, Photographs, first_crops
from uplift_diffusers.data.pyramid import image_pyramid
from uplift_diffusers.data.sources import FolderSource
from uplift_diffusers.latent_space import LatentSpace
from uplift_diffusers.training.pixel_stage import PixelObjective, PixelStageModel, PixelValidation
from uplift_diffusers.training.recipes import RECIPES
from uplift_diffusers.training.train import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("photographs"))


def make_model(**settings):
    torch.manual_seed(0)
    return PixelStageModel(**{"stem_channels": 8, "stem_layers": 1, **settings})


def bicubic_psnr(small, large):
    enlarged = F.interpolate(small, size=large.shape[2:], mode="bicubic").clamp(0, 1)
    mse = ((enlarged * 255).round() / 255 - large).square().mean(dim=(1, 2, 3))
    return (-10 * mse.log10()).mean().item()


def run_command(photographs, output_dir, **flags):
    flags = {
        "recipe": "embedded",
        "stage": "pixels",
        "train_data_dir": photographs,
        "output_dir": output_dir,
        "resolution": 64,
        "train_batch_size": 3,
        "batch_4x": 1,
        "stem_channels": 8,
        "stem_layers": 1,
        "max_train_steps": 6,
        "lr_warmup_steps": 1,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 9,
        "logging_steps": 1,
        "mixed_precision": "no",
        **flags,
    }
    return main([str(part) for name, value in flags.items() for part in (f"--{name}", value)])


@torch.no_grad()
@pytest.mark.parametrize("scale", [2, 4])
def test_a_new_model_enlarges_bicubically(scale):
    image = smooth_images(2, 12, 20)
    enlarged = make_model()(image, scale=scale, denoise=torch.zeros(2))
    torch.testing.assert_close(enlarged, F.interpolate(image, scale_factor=scale, mode="bicubic"))


@torch.no_grad()
def test_the_stem_sees_the_normalised_image_and_how_much_there_is_to_clean():
    model, seen = make_model(), []
    model.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = smooth_images(2, 8, 8)
    model(image, scale=2, denoise=torch.tensor([0.25, 1.0]))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0][:, :3], (image - mean[:, None, None]) / std[:, None, None])
    assert torch.equal(seen[0][:, 3].amin(dim=(1, 2)), torch.tensor([0.25, 1.0]))
    assert torch.equal(seen[0][:, 3].amax(dim=(1, 2)), torch.tensor([0.25, 1.0]))


@torch.no_grad()
def test_a_batch_is_split_into_inputs_of_one_size_for_both_scales():
    model, calls = make_model(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args[0], kwargs["scale"])), with_kwargs=True
    )
    images = smooth_images(5, 64, 64)
    losses = PixelObjective(model, batch_4x=2, degraded_probability=0.0)(images, generator=seeded())
    assert [(tuple(image.shape), scale) for image, scale in calls] == [((3, 3, 16, 16), 2), ((2, 3, 16, 16), 4)]
    assert losses["loss"] == losses["l1_2x"] + losses["l1_4x"]
    # The pictures are smooth, so a turned one enlarged is compared with itself turned.
    large = images[3:]
    expected = (F.interpolate(image_pyramid(large, 2)[2], scale_factor=4, mode="bicubic") - large).abs().mean()
    assert losses["l1_4x"].item() == pytest.approx(expected.item(), rel=0.05)


@torch.no_grad()
def test_pictures_are_turned_all_four_ways():
    model, inputs = make_model(), []
    model.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    image = torch.zeros(1, 3, 32, 32)
    image[..., :16, :16] = 1
    PixelObjective(model, batch_4x=23, degraded_probability=0.0)(image.expand(24, -1, -1, -1), generator=seeded())
    bright = {tuple(torch.nonzero(small.mean(dim=0) > 0.5).float().mean(dim=0).tolist()) for small in inputs[1]}
    assert bright == {(1.5, 1.5), (1.5, 5.5), (5.5, 1.5), (5.5, 5.5)}


@torch.no_grad()
def test_degraded_inputs_come_with_their_strength():
    model, calls = make_model(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs["denoise"]), with_kwargs=True)
    PixelObjective(model, batch_4x=20, degraded_probability=0.5)(smooth_images(40, 32, 32), generator=seeded())
    strengths = torch.cat(calls)
    assert 10 <= (strengths > 0).sum() <= 30
    assert strengths.max() > 0.8


@torch.no_grad()
def test_validation_is_the_psnr_of_what_the_model_makes(photographs):
    validation = PixelValidation(make_model(), photographs, jpeg_qualities=(75,))
    figures, pictures = validation()
    for scale, small in zip((2, 4), image_pyramid(validation.images, 2)[1:]):
        assert figures[f"val_psnr_{scale}x"] == pytest.approx(bicubic_psnr(small, validation.images), abs=1e-3)
        assert figures[f"val_psnr_{scale}x_jpeg75"] < figures[f"val_psnr_{scale}x"]
    assert pictures["input-bicubic-prediction-target"].size == (4 * 256, 4 * 256)


def test_training_beats_bicubic():
    photographs = Photographs(FolderSource(EXAMPLES), Crop(resolution=64))
    images = first_crops(photographs, 8).float() / 255
    model = make_model()
    objective = PixelObjective(model, batch_4x=4, degraded_probability=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(80):
        losses.append(objective(images, generator=seeded()))
        losses[-1]["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    for name in ("l1_2x", "l1_4x"):
        assert losses[-1][name] < 0.97 * losses[0][name]


def test_a_killed_run_ends_as_one_that_was_left_alone(photographs, tmp_path):
    for name in ("whole", "parts"):
        assert run_command(photographs, tmp_path / name) == 0
    for step in (4, 6):
        shutil.rmtree(tmp_path / "parts" / f"checkpoint-{step}")
    (tmp_path / "parts" / RESULT).unlink()
    assert run_command(photographs, tmp_path / "parts", resume_from_checkpoint="latest") == 0
    assert (tmp_path / "parts" / RESULT).read_bytes() == (tmp_path / "whole" / RESULT).read_bytes()
    assert logged(tmp_path / "parts", "l1_4x") == logged(tmp_path / "whole", "l1_4x")
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "train_latent.py --recipe embedded --method uplift --stage pixels" in card
    assert "from uplift_diffusers.training.pixel_stage import PixelStageModel" in card


def make_second_stage(folder, vae):
    config = RECIPES["embedded"]["uplift"](
        train_data_dir="photographs", output_dir="run", vae="vae", resolution=64, initial_stem=str(folder)
    )
    return config.make_task(vae, LatentSpace.of(vae)).model


@pytest.mark.parametrize("denoise_channel", [False, True])
def test_the_second_stage_starts_from_the_stem(tmp_path, denoise_channel):
    if denoise_channel and "denoise_channel" not in inspect.signature(UPLiFTModel.__init__).parameters:
        pytest.skip("the upsampler has no such channel")
    stage = make_model(stem_channels=12, stem_layers=3, denoise_channel=denoise_channel)
    stage.save_pretrained(tmp_path)
    model = make_second_stage(tmp_path, make_vae())
    assert (model.config.encoder_stem_channels, model.config.encoder_stem_layers) == (12, 3)
    expected = stage.stem.state_dict()
    assert len(expected) == 3 * (2 + 2 + 2)  # convolutions, biases after them, and a projection with its bias
    for name, value in model.stem.state_dict().items():
        assert torch.equal(value, expected[name])


def test_the_second_stage_starts_from_the_stem_of_an_upsampler_for_other_latents(tmp_path):
    settings = {"encoder_stem_channels": 12, "encoder_stem_layers": 3, "encoder_convs_per_block": 2}
    settings |= {"norm_type": "bias", "image_normalization": "imagenet", "denoise_channel": True}
    other = UPLiFTModel(latent_channels=7, encoder_block_out_channels=(8, 8), **settings)
    other.save_pretrained(tmp_path)
    model = make_second_stage(tmp_path, make_vae())
    assert model.config.latent_channels != 7
    for name, value in other.stem.state_dict().items():
        assert torch.equal(value, model.stem.state_dict()[name])


def test_a_stem_that_does_not_fit_is_refused(tmp_path):
    make_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"must be a folder that --stage pixels made, or .* with a AutoencoderLocal"):
        make_second_stage(tmp_path / "vae", make_vae())
    UPLiFTModel(encoder_block_out_channels=(8, 8)).save_pretrained(tmp_path / "upsampler")
    with pytest.raises(ValueError, match=r"or an upsampler with a stem, got .* with a UPLiFTModel"):
        make_second_stage(tmp_path / "upsampler", make_vae())
    make_model(convs_per_block=1, denoise_channel=False).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="`initial_stem` must have convs_per_block=2 for this recipe, got 1"):
        make_second_stage(tmp_path / "other", make_vae())


def test_only_the_embedded_uplift_has_a_pixel_stage(capsys):
    for flags in (["--recipe", "sd15"], ["--recipe", "embedded", "--method", "cfm"]):
        assert main([*flags, "--stage", "pixels", "--train_data_dir", "a", "--output_dir", "b"]) == 1
        assert "`stage` must be upsampler unless" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_4x": 3}, "`batch_4x` must be at least 1 and below `train_batch_size`, got 3 and 3."),
        ({"resolution": 66}, "`resolution` must be a multiple of 4, got 66."),
        ({"degraded_probability": 2}, "`degraded_probability` must be in [0, 1], got 2.0."),
        ({"stem_layers": 0}, "`stem_layers` must be at least 1, got 0."),
    ],
)
def test_settings_that_make_no_sense_end_with_one_sentence(photographs, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        run_command(photographs, tmp_path, **flags)
    assert message in capsys.readouterr().err
