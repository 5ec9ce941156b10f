"""A run that is interrupted, shared by processes or out of space ends as one that was left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.training_runs import (
    RESULT,
    logged,
    make_config,
    make_model,
    make_objective,
    make_photographs,
    run_training,
    start_distributed_training,
    start_training,
)
from uplift_diffusers.training.checkpoints import find_checkpoint, list_checkpoints
from uplift_diffusers.training.monitoring import read_metrics
from uplift_diffusers.training.train import train


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("photographs"))


def assert_same_end(actual, expected):
    """The result, and all of the last checkpoint, to the bit; the losses on the way."""
    assert (actual / RESULT).read_bytes() == (expected / RESULT).read_bytes()
    last_actual, last_expected = list_checkpoints(actual)[-1], list_checkpoints(expected)[-1]
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert (last_actual / name).read_bytes() == (last_expected / name).read_bytes(), name
    states = [json.loads((path / "state.json").read_text()) for path in (last_actual, last_expected)]
    for state in states:
        del state["settings"]
    assert states[0] == states[1]
    for name in ("step", "loss", "loss_d1", "pixel", "lr"):
        assert logged(actual, name) == logged(expected, name), name


def remove_checkpoints(output_dir, *, after):
    for path in list_checkpoints(output_dir):
        if int(path.name.removeprefix("checkpoint-")) > after:
            shutil.rmtree(path)


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_no_trace(photographs, tmp_path):
    settings = {
        "max_train_steps": 50,
        "checkpointing_steps": 3,
        "logging_steps": 2,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 1,
        "resolution": 32,
        "resume_from_checkpoint": "if-any",
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start_training(photographs, whole, **settings)
    moments = random.Random(0)
    for kill in range(10):
        process = start_training(photographs, killed, **settings)
        if kill % 3 == 0:
            time.sleep(moments.uniform(0, 0.5))  # while it starts or reads a checkpoint
        else:
            while not (killed / "metrics.jsonl").exists() or logged(killed, "step")[-1:] < [3 * kill]:
                assert process.is_alive()
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert not (killed / RESULT).exists()
    for process in (start_training(photographs, killed, **settings), undisturbed):
        process.join()
        assert process.exitcode == 0
    assert_same_end(killed, whole)


@pytest.mark.parametrize(("logging_steps", "use_ema"), [(1, True), (4, False)])
def test_a_line_of_the_log_may_span_the_interruption(photographs, tmp_path, logging_steps, use_ema):
    settings = {"logging_steps": logging_steps, "checkpointing_steps": 1, "checkpoints_total_limit": 9}
    expected = run_training(photographs, tmp_path / "whole", use_ema=use_ema, **settings)
    run_training(photographs, tmp_path / "parts", use_ema=use_ema, **settings)
    remove_checkpoints(tmp_path / "parts", after=3)
    (tmp_path / "parts" / RESULT).unlink()
    actual = run_training(
        photographs, tmp_path / "parts", use_ema=use_ema, resume_from_checkpoint="latest", **settings
    )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


def test_the_gradient_scaler_of_fp16_goes_on_where_it_was(photographs, tmp_path):
    def run(output_dir, **settings):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=4)
        model = make_model()
        config = make_config(photographs, output_dir, checkpoints_total_limit=9, **settings)
        train(model, make_objective(model), config, accelerator=accelerator)

    run(tmp_path / "whole")
    run(tmp_path / "parts")
    remove_checkpoints(tmp_path / "parts", after=2)
    run(tmp_path / "parts", resume_from_checkpoint="latest")
    assert_same_end(tmp_path / "parts", tmp_path / "whole")
    state = json.loads((tmp_path / "parts" / "checkpoint-6" / "state.json").read_text())
    # Doubled after the fourth step, of which two were before the interruption.
    assert (state["scaler"]["scale"], state["scaler"]["_growth_tracker"]) == (4.0, 2)


def test_a_truncated_checkpoint_is_named_and_skipped(photographs, tmp_path):
    run_training(photographs, tmp_path, max_train_steps=4)
    older, newest = list_checkpoints(tmp_path)
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    found, problems = find_checkpoint(tmp_path, "latest")
    assert found == older
    assert len(problems) == 1
    assert "checkpoint-4/model.safetensors` is damaged: its SHA-256" in problems[0]


def test_latest_without_a_checkpoint_is_an_error_and_if_any_is_not(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no usable checkpoint"):
        find_checkpoint(tmp_path, "latest")
    assert find_checkpoint(tmp_path, "if-any") == (None, [])
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-7"))


def test_two_processes_average_to_the_gradients_of_one_with_twice_the_batch(photographs, tmp_path):
    # No noise, which every process draws for itself.
    settings = {
        "model": {"noise_channels": 0},
        "objective": {"latent_noise": 0.0, "pixel_weight": 0.0},
        "max_train_steps": 3,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 9,
        "max_grad_norm": 1e9,
    }
    processes = start_distributed_training(2, photographs, tmp_path / "two", train_batch_size=1, **settings)
    run_training(photographs, tmp_path / "one", train_batch_size=2, **settings)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    one, two = (load_file(tmp_path / name / "checkpoint-1" / "optimizer.safetensors") for name in ("one", "two"))
    gradients = [name for name in one if name.endswith("exp_avg")]  # a tenth of the gradient after the first step
    assert max(one[name].abs().max() for name in gradients) > 1e-2
    for name in gradients:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-4)


def test_two_processes_log_each_loss_under_its_own_name(photographs, tmp_path):
    # Every process draws the depth that it decodes, and so comes to its losses in an order of its own.
    processes = start_distributed_training(2, photographs, tmp_path, train_batch_size=1, max_train_steps=4)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record["loss"] == pytest.approx(record["loss_d1"] + record["loss_d2"] + record["pixel"], rel=1e-5)
        assert record["pixel"] < 0.6 * record["loss_d2"]  # equal where they were mixed


def test_two_processes_train_a_model_with_weights_that_no_loss_depends_on(photographs, tmp_path):
    settings = {
        "model": {"image_residual": True, "noise_channels": 0},  # fitted for steps that are not trained, too
        "objective": {"latent_noise": 0.0, "pixel_weight": 0.0},
        "max_train_steps": 3,
        "gradient_accumulation_steps": 2,
    }
    processes = start_distributed_training(2, photographs, tmp_path / "two", train_batch_size=1, **settings)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    two, new = load_file(tmp_path / "two" / RESULT), make_model(**settings["model"]).state_dict()
    unused = "estimator.convs.1px.weight"
    assert torch.equal(two[unused], new[unused])
    assert not torch.equal(two["estimator.convs.2px.weight"], new["estimator.convs.2px.weight"])


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a disk of so many bytes at a folder and returns it."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk takes root")
    mounted = []

    def make(size):
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        options = f"size={size}" if not mounted else f"remount,size={size}"
        result = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
        if result.returncode:
            pytest.skip(f"mounting is not allowed here: {result.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield make
    if mounted:
        subprocess.run(["umount", mounted[0]], check=True)


def test_a_disk_that_fills_leaves_the_last_good_checkpoint(photographs, tmp_path, small_disk):
    expected = run_training(photographs, tmp_path / "whole")
    needed = sum(path.stat().st_size for path in list_checkpoints(tmp_path / "whole")[0].iterdir())
    disk = small_disk(int(1.5 * needed))
    with pytest.raises(
        OSError, match=r"checkpoint-4` cannot be written: .*No space.* The last good one is checkpoint-2"
    ):
        run_training(photographs, disk / "run")
    assert sorted(path.name for path in (disk / "run").iterdir()) == ["checkpoint-2", "metrics.jsonl"]
    small_disk(10 * needed)
    actual = run_training(photographs, disk / "run", resume_from_checkpoint="latest")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
