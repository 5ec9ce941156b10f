import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from uplift_diffusers import AutoencoderLocal, LatentSpace, UPLiFTModel
from uplift_diffusers.data.image_folder import EpochSampler, ImageFolder, find_images
from uplift_diffusers.embedded.train_autoencoder import AutoencoderTrainingConfig, initial_blocks
from uplift_diffusers.training import cli
from uplift_diffusers.training.checkpoints import find_checkpoint, list_checkpoints
from uplift_diffusers.training.config import parse_config
from uplift_diffusers.training.loop import train
from uplift_diffusers.training.objective import MultiDepthObjective, image_pyramid
from uplift_diffusers.training.recipes import EmbeddedTrainingConfig, UpsamplerTrainingConfig

SPACE = LatentSpace("test", 8, 8, 1.0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for index in range(5):
        blocks = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        (folder / str(index % 2)).mkdir(exist_ok=True)
        blocks.resize((120 + index, 90), Image.BICUBIC).save(folder / str(index % 2) / f"{index}.png")
    return folder


def make_vae():
    torch.manual_seed(0)
    return AutoencoderLocal(
        latent_channels=8,
        block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        latent_space="test",
    )


def make_model(**settings):
    torch.manual_seed(0)
    return UPLiFTModel(
        latent_channels=8,
        latent_space="test",
        encoder_block_out_channels=(8, 8),
        encoder_patch_size=4,
        decoder_channels=20,
        refiner_channels=8,
        refiner_layers=1,
        **{"noise_channels": 2, **settings},
    )


def make_objective(model, **settings):
    return MultiDepthObjective(
        model, make_vae(), SPACE, **{"depths": (1, 2), "latent_noise": 0.5, "pixel_weight": 1.0, **settings}
    )


def make_config(photographs, output_dir, **settings):
    return EmbeddedTrainingConfig(
        train_data_dir=str(photographs),
        output_dir=str(output_dir),
        vae="unused",
        **{
            "resolution": 64,
            "train_batch_size": 2,
            "max_train_steps": 6,
            "checkpointing_steps": 2,
            "logging_steps": 1,
            "lr_warmup_steps": 2,
            "mixed_precision": "no",
            **settings,
        },
    )


def run_training(photographs, output_dir, **settings):
    model = make_model()
    config = make_config(photographs, output_dir, **settings)
    train(model, make_objective(model), config, accelerator=Accelerator(cpu=True))
    return load_file(output_dir / "diffusion_pytorch_model.safetensors")


def logged_losses(output_dir):
    return [json.loads(line)["loss"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def test_loss_is_the_sum_over_depths_and_steps_of_the_papers_terms():
    model = make_model(noise_channels=0).eval()
    objective = make_objective(model, latent_noise=0.0, pixel_weight=0.0)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        losses = objective(images, generator=torch.Generator().manual_seed(0))
        pyramid = image_pyramid(images, 2)
        at_64, at_32, at_16 = (SPACE.encode(objective.vae, level) for level in pyramid)
        once = model(at_32, image=pyramid[1], num_steps=1).sample
        half_way, twice = model(at_16, image=pyramid[2], num_steps=2, return_steps=True).steps
    expected = sum((a - b).square().mean() for a, b in ((once, at_64), (half_way, at_32), (twice, at_64)))
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-5, atol=0)


def test_noise_lands_in_the_starting_latents_and_never_in_targets():
    model = make_model(noise_channels=0).eval()
    starts = []
    model.register_forward_pre_hook(lambda module, args: starts.append(args[0]))
    objective = make_objective(model, latent_noise=3.0, pixel_weight=0.0)
    images = torch.rand(1, 3, 64, 64)
    targets = []
    encode = objective.vae.encode
    objective.vae.encode = lambda image: targets.append(encode(image)) or targets[-1]
    before = [SPACE.encode(make_vae(), level) for level in image_pyramid(images, 2)]
    with torch.no_grad():
        objective(images, generator=torch.Generator().manual_seed(0))
    for target, clean in zip(targets, before, strict=True):
        torch.testing.assert_close(target.latent, clean, rtol=0, atol=1e-6)
    for start, clean in zip(starts, before[1:], strict=True):
        assert 2 < (start - clean).std() < 4


def test_pyramid_levels_are_eight_bit_reductions():
    images = torch.rand(1, 3, 32, 32)
    levels = image_pyramid(images, 2)
    assert [level.shape[-1] for level in levels] == [32, 16, 8]
    torch.testing.assert_close(levels[1] * 255, (levels[1] * 255).round(), rtol=0, atol=1e-4)


def test_training_lowers_the_loss(photographs, tmp_path):
    run_training(photographs, tmp_path, max_train_steps=60, learning_rate=3e-3, checkpointing_steps=100)
    losses = logged_losses(tmp_path)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_resuming_gives_the_weights_and_losses_of_an_uninterrupted_run(photographs, tmp_path):
    expected = run_training(photographs, tmp_path / "whole")
    run_training(photographs, tmp_path / "parts", checkpoints_total_limit=9)
    # As if the process had been killed between the second checkpoint and the third.
    (tmp_path / "parts" / "diffusion_pytorch_model.safetensors").unlink()
    for path in list_checkpoints(tmp_path / "parts")[2:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    actual = run_training(photographs, tmp_path / "parts", resume_from_checkpoint="latest")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert logged_losses(tmp_path / "parts") == logged_losses(tmp_path / "whole")


def test_a_killed_process_resumes_to_the_same_weights(photographs, tmp_path):
    make_vae().save_pretrained(tmp_path / "vae")

    def start(output_dir):
        flags = {
            "recipe": "embedded",
            "vae": tmp_path / "vae",
            "train_data_dir": photographs,
            "output_dir": output_dir,
            "resolution": 32,
            "train_batch_size": 1,
            "max_train_steps": 12,
            "checkpointing_steps": 2,
            "mixed_precision": "no",
            "resume_from_checkpoint": "if-any",
        }
        command = [sys.executable, "-c", "from uplift_diffusers.training.cli import main; raise SystemExit(main())"]
        command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    killed = start(tmp_path / "killed")
    while not list_checkpoints(tmp_path / "killed") and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "diffusion_pytorch_model.safetensors").exists()
    assert start(tmp_path / "killed").wait() == 0
    expected, actual = (
        load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("whole", "killed")
    )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_truncated_checkpoint_is_named_and_skipped(photographs, tmp_path):
    run_training(photographs, tmp_path, max_train_steps=4)
    older, newest = list_checkpoints(tmp_path)
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    found, problems = find_checkpoint(tmp_path, "latest")
    assert found == older
    assert len(problems) == 1
    assert "checkpoint-4/model.safetensors` is damaged: 100 of" in problems[0]


def test_latest_without_a_checkpoint_is_an_error_and_if_any_is_not(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no usable checkpoint"):
        find_checkpoint(tmp_path, "latest")
    assert find_checkpoint(tmp_path, "if-any") == (None, [])
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-7"))


def test_a_used_folder_is_refused_unless_resumed(photographs, tmp_path):
    run_training(photographs, tmp_path, max_train_steps=2)
    with pytest.raises(FileExistsError, match=r"must hold no checkpoints of another run, got .*checkpoint-2"):
        run_training(photographs, tmp_path, max_train_steps=2)


def test_resuming_an_earlier_checkpoint_sets_later_ones_aside(photographs, tmp_path, capsys):
    run_training(photographs, tmp_path)
    run_training(
        photographs, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"), max_train_steps=5, seed=1
    )
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]
    assert (tmp_path / "abandoned-checkpoint-6" / "model.safetensors").exists()
    printed = capsys.readouterr().out
    assert "Changed since then: seed: 0 -> 1" in printed
    assert "Changed since then: max_train_steps: 6 -> 5" in printed


def test_accumulated_micro_steps_give_the_mean_gradient(photographs, tmp_path):
    # One photograph, cropped whole: both micro-steps see the same picture, so their mean is each of them.
    (tmp_path / "one").mkdir()
    Image.open(next(iter(sorted(photographs.rglob("*.png"))))).save(tmp_path / "one" / "only.png")
    norms = []
    for steps in (1, 2):
        model = make_model(noise_channels=0)
        objective = make_objective(model, latent_noise=0.0, depths=(1,), pixel_weight=0.0)
        config = make_config(
            tmp_path / "one",
            tmp_path / str(steps),
            gradient_accumulation_steps=steps,
            train_batch_size=1,
            max_train_steps=1,
            random_crop=False,
            max_grad_norm=1e9,
        )
        accelerator = Accelerator(cpu=True)
        accelerator.clip_grad_norm_ = lambda parameters, limit: norms.append(
            torch.nn.utils.clip_grad_norm_(parameters, limit).item()
        )
        train(model, objective, config, accelerator=accelerator)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_half_a_line_of_the_log_is_dropped(photographs, tmp_path):
    run_training(photographs, tmp_path, max_train_steps=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    run_training(photographs, tmp_path, max_train_steps=4, resume_from_checkpoint="latest")
    assert len(logged_losses(tmp_path)) == 4


def test_a_damaged_photograph_is_named(photographs, tmp_path):
    whole = next(iter(sorted(photographs.rglob("*.png")))).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.png: the image is damaged or cut off"):
        ImageFolder(tmp_path, resolution=32)[0, 0]


def test_the_command_ends_with_one_line_where_there_is_nothing_to_train_on(tmp_path, capsys):
    assert cli.main(["--train_data_dir", str(tmp_path / "none"), "--output_dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.strip().endswith("is not a folder.")


def test_only_the_newest_checkpoints_are_kept(photographs, tmp_path):
    run_training(photographs, tmp_path, checkpoints_total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]


def test_a_loss_that_is_not_finite_ends_the_run(photographs, tmp_path):
    with pytest.raises(FloatingPointError, match="at step"):
        run_training(photographs, tmp_path, learning_rate=1e30, max_grad_norm=1e30, max_train_steps=40)


def test_crops_follow_from_seed_epoch_and_index_alone(photographs):
    def dataset(**settings):
        return ImageFolder(photographs, resolution=32, max_reduction=2.0, **settings)

    assert torch.equal(dataset(seed=1)[2, 3], dataset(seed=1)[2, 3])
    assert not torch.equal(dataset(seed=1)[2, 3], dataset(seed=1)[3, 3])
    assert not torch.equal(dataset(seed=1)[2, 3], dataset(seed=2)[2, 3])
    assert dataset()[0, 0].shape == (3, 32, 32)
    assert dataset()[0, 0].dtype == torch.uint8


def test_crops_may_be_larger_than_the_photographs(photographs):
    assert ImageFolder(photographs, resolution=128)[0, 0].shape == (3, 128, 128)
    assert ImageFolder(photographs, resolution=128, random_crop=False)[0, 0].shape == (3, 128, 128)


def test_an_epoch_shows_every_photograph_once_whatever_the_start_or_the_processes():
    whole = [pair for pair, _ in zip(EpochSampler(5, seed=3), range(15))]
    for epoch in range(3):
        assert sorted(index for e, index in whole if e == epoch) == list(range(5))
    resumed = EpochSampler(5, seed=3, start=7)
    assert [pair for pair, _ in zip(resumed, range(8))] == whole[7:]
    split = [
        [pair for pair, _ in zip(EpochSampler(5, seed=3, rank=rank, world_size=2), range(7))] for rank in range(2)
    ]
    assert [pair for pairs in zip(*split) for pair in pairs] == whole[:14]


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No images below"):
        find_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_images(tmp_path / "missing")


def test_the_linear_code_is_the_principal_components(photographs):
    vae = make_vae()
    blocks = initial_blocks(ImageFolder(photographs, resolution=64), crops=40)
    vae.fit_linear_code(blocks)
    flat = blocks - blocks.mean(dim=(0, 2, 3))[:, None, None]
    _, _, components = torch.linalg.svd(flat.flatten(1).double(), full_matrices=False)
    best = (flat.flatten(1).double() @ components[:8].T @ components[:8]).reshape(flat.shape)
    with torch.no_grad():
        latents = vae.encode(blocks).latent
        error = vae.decode(latents).sample - blocks
    torch.testing.assert_close(error.square().mean(), (best - flat).square().mean().float(), rtol=1e-3, atol=0)
    assert abs(latents.std().item() - 1) < 0.1


def test_flags_are_the_fields_of_the_configuration():
    arguments = ["--train_data_dir", "a", "--output_dir", "b", "--depths", "1", "3", "--no-use_ema", "--seed", "7"]
    config = parse_config(UpsamplerTrainingConfig, arguments)
    assert (config.depths, config.use_ema, config.seed) == ((1, 3), False, 7)
    assert config.resolution == 1024
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolutoin", "64"], "unrecognized arguments: --resolutoin"),
        (["--train_batch_size", "0"], "`train_batch_size` must be at least 1, got 0"),
        (["--mixed_precision", "int8"], "`mixed_precision` must be no, bf16 or fp16"),
        (["--learning_rate", "-1"], "`learning_rate` must be above 0"),
        (["--resolution", "100"], "`resolution` must be a multiple of 8, got 100"),
    ],
)
def test_bad_flags_end_with_one_sentence(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_config(AutoencoderTrainingConfig, ["--train_data_dir", "a", "--output_dir", "b", *flags])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
