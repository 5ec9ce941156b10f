"""`mixed_precision`: what is chosen, said and kept."""

import json
import logging

import pytest
import torch

from tests.training_runs import make_config, make_photographs, make_vae, run_training
from uplift_diffusers.training import train as training

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("photographs"))


def test_auto_is_what_the_device_prefers_and_is_said_in_one_line(photographs, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    config = make_config(photographs, tmp_path, mixed_precision="auto")
    for dtype, precision in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "no")):
        monkeypatch.setattr(training, "preferred_dtype", lambda device, dtype=dtype: dtype)
        caplog.clear()
        assert training._choose_precision(config, CPU) == precision
        (message,) = caplog.messages
        assert message.startswith(f"mixed_precision: {precision}, the fastest on ")


def test_a_resumed_run_keeps_its_precision_unless_told(photographs, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(training, "preferred_dtype", lambda device: torch.bfloat16)
    run_training(photographs, tmp_path, max_train_steps=2)

    def choose(precision, resume):
        config = make_config(photographs, tmp_path, mixed_precision=precision, resume_from_checkpoint=resume)
        return training._choose_precision(config, CPU)

    assert choose("auto", "latest") == "no"
    assert "which checkpoint-2 was trained in" in caplog.text
    assert choose("bf16", "latest") == "bf16"
    assert choose("auto", None) == "bf16"


def test_the_command_says_what_it_chose_and_the_run_remembers(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "preferred_dtype", lambda device: torch.float32)
    make_vae().save_pretrained(tmp_path / "vae")
    flags = {
        "recipe": "embedded",
        "vae": tmp_path / "vae",
        "train_data_dir": photographs,
        "output_dir": tmp_path / "run",
        "resolution": 32,
        "train_batch_size": 1,
        "max_train_steps": 1,
    }
    assert training.main([str(part) for name, value in flags.items() for part in (f"--{name}", value)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "mixed_precision" in line]
    assert len(lines) == 1
    assert lines[0].startswith("mixed_precision: no, the fastest on ")
    state = json.loads((tmp_path / "run" / "checkpoint-1" / "state.json").read_text())
    assert state["settings"]["mixed_precision"] == "no"
    assert "| mixed_precision | no |" in (tmp_path / "run" / "README.md").read_text()
