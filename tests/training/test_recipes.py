"""Everything that `train_latent.py --method` trains, from the command to what it leaves behind."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import UNet2DModel

from tests.components import make_flow_unet, make_upsampler, smooth_images
from tests.training_runs import SPACE, logged, make_photographs, make_vae
from uplift_diffusers import CFMLatentUpscalePipeline, UPLiFTModel, UPLiFTSuperResolutionPipeline
from uplift_diffusers.cfm import UNETS, FlowMatchingObjective, enlarge, euler_scheduler, make_unet, noise_context
from uplift_diffusers.data.pyramid import image_pyramid
from uplift_diffusers.latent_space import LatentCodec, LatentSpace
from uplift_diffusers.training import monitoring
from uplift_diffusers.training.recipes import RECIPES, EmbeddedCFMTrainingConfig, parse_recipe
from uplift_diffusers.training.train import main, train

CASES = [(recipe, method) for recipe, methods in RECIPES.items() for method in methods]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def make_config(recipe, method, **settings):
    return RECIPES[recipe][method](train_data_dir="photographs", output_dir="run", vae="vae", **settings)


@pytest.fixture(autouse=True)
def small_validations(monkeypatch):
    monkeypatch.setattr(monitoring, "VALIDATION_RESOLUTION", 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs and a VAE."""
    folder = tmp_path_factory.mktemp("folder")
    make_photographs(folder / "photographs")
    make_vae().save_pretrained(folder / "vae")
    return folder


def run_command(folder, output_dir, method, **flags):
    flags = {
        "recipe": "embedded",
        "method": method,
        "vae": folder / "vae",
        "train_data_dir": folder / "photographs",
        "output_dir": output_dir,
        "resolution": 64,
        "train_batch_size": 1,
        "max_train_steps": 2,
        "logging_steps": 1,
        "mixed_precision": "no",
        **flags,
    }
    return main([str(part) for name, value in flags.items() for part in (f"--{name}", value)])


@pytest.mark.parametrize("method", ["uplift", "lift"])
def test_an_upsampler_comes_out_that_enlarges_and_was_measured(folder, tmp_path, method):
    assert run_command(folder, tmp_path, method, validation_data_dir=folder / "photographs") == 0
    model = UPLiFTModel.from_pretrained(tmp_path)
    assert (model.attender is None, model.config.reencode_image) == ((method == "lift"),) * 2
    assert logged(tmp_path, "val_psnr_2x")[-1] > 5
    assert logged(tmp_path, "val_psnr_4x")[-1] > 5
    pipe = UPLiFTSuperResolutionPipeline(make_vae(), model)
    assert pipe(image=smooth_images(1, 16, 24), scale=4, output_type="pt").images.shape == (1, 3, 64, 96)


def test_a_flow_matching_network_comes_out_that_enlarges_and_was_measured(folder, tmp_path):
    settings = {"unet": "same-parameters", "validation_data_dir": folder / "photographs"}
    assert run_command(folder, tmp_path, "cfm", **settings) == 0
    assert logged(tmp_path, "val_psnr_2x")[-1] > 5
    assert logged(tmp_path, "val_psnr_4x")[-1] > 5
    unet = UNet2DModel.from_pretrained(tmp_path)
    pipe = CFMLatentUpscalePipeline(make_vae(), unet, euler_scheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(image=smooth_images(1, 16, 24), scale=4, num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 64, 96)
    with pytest.raises(ValueError, match="trained for 'test', got 'other'"):
        CFMLatentUpscalePipeline(make_vae(), unet, euler_scheduler(), latent_space="other")


@pytest.mark.parametrize("options", [*({"method": method} for method in RECIPES["embedded"]), {"stage": "pixels"}])
def test_a_task_has_its_model_on_the_device_that_it_is_opened_for(folder, options):
    flags = {"recipe": "embedded", "train_data_dir": folder / "photographs", "output_dir": "run", **options}
    flags |= {"resolution": 64} | ({} if "stage" in options else {"vae": folder / "vae"})
    config, _ = parse_recipe([str(part) for name, value in flags.items() for part in (f"--{name}", value)])
    with config.open_task(torch.device("meta")) as task:  # any device but the CPU
        assert {parameter.device.type for parameter in task.model.parameters()} == {"meta"}


def test_training_lowers_the_loss_of_flow_matching(folder, tmp_path):
    config = EmbeddedCFMTrainingConfig(
        train_data_dir=str(folder / "photographs"),
        output_dir=str(tmp_path),
        vae="unused",
        resolution=64,
        max_train_steps=40,
        learning_rate=3e-3,
        lr_warmup_steps=2,
        logging_steps=1,
        mixed_precision="no",
    )
    model = make_flow_unet(SPACE)
    objective = FlowMatchingObjective(model, make_vae(), SPACE, depths=(1, 2))
    train(model, objective, config, accelerator=Accelerator(cpu=True))
    losses = logged(tmp_path)
    assert sum(losses[-10:]) / 10 < 0.85 * sum(losses[:3]) / 3


def test_the_flow_matching_loss_is_the_squared_distance_to_the_straight_paths_velocity():
    model = make_flow_unet(SPACE)
    torch.nn.init.zeros_(model.conv_out.weight)
    torch.nn.init.zeros_(model.conv_out.bias)
    objective, images = FlowMatchingObjective(model, make_vae(), SPACE, depths=(2,)), torch.rand(2, 3, 64, 64)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        loss = objective(images, generator=seeded(3))["loss"]
        large = LatentCodec(objective.vae, SPACE).encode(images)
        context = LatentCodec(objective.vae, SPACE).encode(enlarge(image_pyramid(images, 2)[2], (64, 64)))
    sample, timestep = seen[0]
    time = timestep[:, None, None, None] / 1000
    torch.testing.assert_close(sample[:, 8:], context)
    source = (sample[:, :8] - time * large) / (1 - time)
    torch.testing.assert_close(loss, (large - source).square().mean(), rtol=1e-4, atol=0)
    noise = (source - noise_context(context, torch.zeros_like(context))) / noise_context(
        torch.zeros_like(context), torch.ones_like(context)
    )
    assert noise.std() == pytest.approx(1, abs=0.1)  # 1,024 values


def test_the_factor_of_a_batch_is_drawn_from_the_depths():
    objective, images = FlowMatchingObjective(make_flow_unet(SPACE), make_vae(), SPACE, depths=(1, 3)), None
    images = torch.rand(1, 3, 64, 64, generator=seeded())
    contexts = []
    encode = objective.vae.encode
    objective.vae.encode = lambda image: contexts.append(image) or encode(image)
    for seed in range(12):
        objective(images, generator=seeded(seed))
    enlarged = {depth: enlarge(image_pyramid(images, depth)[depth], (64, 64)) * 2 - 1 for depth in (1, 2, 3)}
    drawn = {depth for context in contexts[1::2] for depth, image in enlarged.items() if torch.equal(context, image)}
    assert drawn == {1, 3}


def test_a_validation_of_lift_takes_its_one_step_twice_for_four_times_the_size(folder):
    config = make_config("embedded", "lift", resolution=64, validation_data_dir=folder / "photographs")
    torch.manual_seed(0)
    task = config.make_task(make_vae(), SPACE)
    image = smooth_images(1, 16, 16)
    with torch.no_grad():
        once = task.model(LatentCodec(make_vae(), SPACE).encode(image), image=image).sample
        magnified = torch.nn.functional.interpolate(image, scale_factor=2, mode="bilinear")
        twice = task.model(once, image=magnified).sample
        torch.testing.assert_close(
            task.validate.upsample(image, 2, torch.zeros(1), seeded()), twice, rtol=0, atol=1e-4
        )


def test_lift_is_the_uplift_of_its_recipe_but_for_what_the_paper_names():
    for recipe in RECIPES:
        uplift, lift = (make_config(recipe, method) for method in ("uplift", "lift"))
        differences = {"neighborhood": None, "reencode_image": True, "image_residual": False}
        if uplift.model_settings.get("image_residual"):
            differences["refiner_residual"] = True  # in its place
        assert lift.model_settings == {**uplift.model_settings, **differences}
        assert dataclasses.asdict(lift) == {**dataclasses.asdict(uplift), "depths": (1,)}


def test_the_published_network_has_the_published_shape():
    with torch.device("meta"):
        unet = make_unet("published", 4)
    # 306 M of the authors, and 25 M because diffusers' eight attentions are as wide as their 1,024 channels, not 256.
    widening = 8 * 4 * 1024 * (1024 - 256)
    assert (count_parameters(unet) - widening) / 1e6 == pytest.approx(306, abs=1)
    assert [type(block).__name__ for block in unet.down_blocks] == ["DownBlock2D"] * 3 + ["AttnDownBlock2D"]
    assert (unet.config.in_channels, unet.config.out_channels) == (8, 4)


def test_a_small_network_is_as_large_as_the_embedded_upsampler():
    settings = make_config("embedded", "uplift").model_settings
    with torch.device("meta"):
        upsampler = UPLiFTModel(**settings, latent_channels=40)
        unet = make_unet("same-parameters", 40)
    assert count_parameters(unet) == pytest.approx(count_parameters(upsampler), rel=0.1)


@pytest.mark.parametrize("size", UNETS)
def test_a_new_network_starts_with_no_velocity(size):
    if size != "published":  # it takes seconds to fill
        sample = torch.randn(1, 16, 8, 8)
        assert make_unet(size, 8)(sample, 500).sample.abs().max() == 0


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("uplift", {"resolution": 80}, "`resolution` must be a multiple of 32 for depth 2, got 80."),
        ("lift", {"resolution": 72}, "`resolution` must be a multiple of 16 for depth 1, got 72."),
        (
            "cfm",
            {"resolution": 80, "unet": "same-parameters"},
            "`resolution` must be a multiple of 32 for the U-Net 'same-parameters', got 80.",
        ),
    ],
)
def test_crops_that_do_not_suit_the_model_are_refused_in_one_sentence(
    folder, tmp_path, capsys, method, flags, message
):
    assert run_command(folder, tmp_path, method, **flags) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == message


def test_an_unknown_size_of_the_network_is_refused(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_command(folder, tmp_path, "cfm", unet="huge")
    assert "`unet` must be one of ('published', 'same-parameters', 'same-time'), got 'huge'" in capsys.readouterr().err


def test_every_recipe_and_method_has_a_configuration_of_its_own():
    assert len({RECIPES[recipe][method] for recipe, method in CASES}) == len(CASES)


def test_the_image_residual_is_fitted_before_the_training(folder):
    vae = make_vae()
    space = LatentSpace.of(vae)
    config = make_config("embedded", "uplift", validation_data_dir=folder / "photographs")
    task, again = (config.make_task(vae, space) for _ in range(2))
    large = smooth_images(8, 64, 64)
    task.fit(large)
    small = image_pyramid(large, 1)[1]
    target = LatentCodec(vae, space).encode(large)
    bilinear = F.interpolate(LatentCodec(vae, space).encode(small), scale_factor=2, mode="bilinear")
    estimate = task.validate.upsample(small, 1, torch.zeros(8), seeded())
    assert F.mse_loss(estimate, target) < 0.5 * F.mse_loss(bilinear, target)
    again.model.stem.load_state_dict(task.model.stem.state_dict())
    again.fit(large)
    fitted, expected = again.model.estimator.state_dict(), task.model.estimator.state_dict()
    assert all(torch.equal(fitted[name], expected[name]) for name in expected)


def test_training_goes_on_from_a_trained_upsampler_with_its_own_settings(folder, tmp_path):
    assert run_command(folder, tmp_path / "first", "lift") == 0
    first = UPLiFTModel.from_pretrained(tmp_path / "first")
    vae = make_vae()
    config = make_config("embedded", "uplift", resolution=64, pretrained_model=str(tmp_path / "first"))
    task = config.make_task(vae, LatentSpace.of(vae))
    assert task.model.config.reencode_image  # the LiFT's, not the recipe's
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in task.model.state_dict().items())
    assert task.fit is None


def test_an_upsampler_of_other_latents_is_not_trained_on(folder, tmp_path, capsys):
    make_upsampler().save_pretrained(tmp_path / "other")
    assert run_command(folder, tmp_path / "run", "uplift", pretrained_model=tmp_path / "other") == 1
    assert "`upsampler` must have been trained for the VAE's latents" in capsys.readouterr().err


def test_a_stem_is_not_given_to_a_trained_upsampler():
    with pytest.raises(ValueError, match="`initial_stem` must not be given with `pretrained_model`"):
        make_config("embedded", "uplift", pretrained_model="first", initial_stem="stem")
