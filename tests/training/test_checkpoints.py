"""A checkpoint that is not exactly what was written is named and passed over."""

import json
import shutil

import pytest
import torch

from tests.training_runs import logged, make_photographs, run_training
from uplift_diffusers.training.checkpoints import CHECKSUMS, find_checkpoint, list_checkpoints

FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", CHECKSUMS)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def finished(photographs, tmp_path_factory):
    """A run of six steps with all of its checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    run_training(photographs, folder, checkpoints_total_limit=9)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARMS = {
    **{f"a byte of {name}": lambda path, name=name: change_a_byte(path / name) for name in FILES},
    **{f"no {name}": lambda path, name=name: (path / name).unlink() for name in FILES},
    "a list of checksums": lambda path: (path / CHECKSUMS).write_text("[]"),
    "no JSON": lambda path: (path / CHECKSUMS).write_bytes(b"\xff\x00"),
    "a checksum of nothing": lambda path: (path / CHECKSUMS).write_text('{"model.safetensors": null}'),
    "empty": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_named_and_the_checkpoint_before_is_taken(run, harm):
    older, newest = list_checkpoints(run)[-2:]
    HARMS[harm](newest)
    found, problems = find_checkpoint(run, "latest")
    assert found == older
    assert len(problems) == 1
    assert str(newest) in problems[0]
    with pytest.raises(FileNotFoundError, match=r"`resume_from_checkpoint`: .*checkpoint-6"):
        find_checkpoint(run, str(newest))


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(run):
    (run / "checkpoint-6").rename(run / "checkpoint-9")
    found, problems = find_checkpoint(run, "latest")
    assert found.name == "checkpoint-4"
    assert problems == [f"`{run / 'checkpoint-9'}` is damaged: it holds step 6."]


def test_a_run_goes_on_from_the_last_whole_checkpoint(photographs, run, finished, caplog):
    change_a_byte(run / "checkpoint-6" / "model.safetensors")
    run_training(photographs, run, resume_from_checkpoint="latest", checkpoints_total_limit=9)
    assert "Skipped: " in caplog.text
    assert logged(run) == logged(finished)
    assert find_checkpoint(run, "latest") == (run / "checkpoint-6", [])
    again, before = (path / "checkpoint-6" / "model.safetensors" for path in (run, finished))
    assert again.read_bytes() == before.read_bytes()


def test_where_every_checkpoint_is_damaged_each_is_named(run):
    for path in list_checkpoints(run):
        change_a_byte(path / "state.json")
    with pytest.raises(FileNotFoundError, match=r"no usable checkpoint.*checkpoint-6.*checkpoint-4.*checkpoint-2"):
        find_checkpoint(run, "latest")
    assert len(find_checkpoint(run, "if-any")[1]) == 3


def test_what_killed_processes_left_is_removed(photographs, run):
    (run / ".checkpoint-8.partial").mkdir()
    (run / ".checkpoint-8.partial" / "model.safetensors").write_bytes(b"half")
    (run / ".uplift-1-0.partial").write_bytes(b"half")
    run_training(photographs, run, resume_from_checkpoint="latest")
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("settings", [{"refiner_layers": 2}, {"decoder_channels": 24}], ids=str)
def test_a_checkpoint_of_another_model_is_refused_in_one_sentence(photographs, run, settings):
    with pytest.raises(ValueError, match=r"checkpoint-6` was written for another model: .*Resume with the settings"):
        run_training(photographs, run, model=settings, resume_from_checkpoint="latest")


def test_other_trained_parameters_are_refused(photographs, run, monkeypatch):
    from tests import training_runs

    make_model = training_runs.make_model

    def frozen(**settings):
        model = make_model(**settings)
        model.encoder.requires_grad_(False)
        return model

    monkeypatch.setattr(training_runs, "make_model", frozen)
    with pytest.raises(ValueError, match="Adam's averages belong to other parameters"):
        run_training(photographs, run, resume_from_checkpoint="latest", max_train_steps=8)


def test_a_run_without_an_average_does_not_go_on_with_one(photographs, tmp_path):
    run_training(photographs, tmp_path, use_ema=False, max_train_steps=2)
    with pytest.raises(ValueError, match="holds no moving average"):
        run_training(photographs, tmp_path, resume_from_checkpoint="latest")


def test_settings_are_those_that_the_run_had(run):
    settings = json.loads((run / "checkpoint-6" / "state.json").read_text())["settings"]
    assert (settings["mixed_precision"], settings["num_processes"], settings["num_photographs"]) == ("no", 1, 5)
    assert "hub_token" not in settings
    assert torch.tensor(settings["depths"]).tolist() == [1, 2]
