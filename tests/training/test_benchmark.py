"""The benchmark of training compares like with like and counts memory right."""

import pytest
import torch

from benchmarks import training


def test_all_steps_of_the_benchmark_begin_with_the_same_loss(capsys):
    training.main(["--tiny", "--resolution", "128", "--rounds", "2"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    losses = {name.strip("| "): float(loss.strip("| ")) for name, *_, loss in rows[2:]}
    assert list(losses) == ["plain", "uplift", "uplift, cached"]
    assert losses["uplift"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["uplift, cached"] == losses["uplift"]


def test_memory_is_what_lives_at_once():
    with training.LiveMemory() as memory:
        first = torch.zeros(1000)
        second = first + 1
        view = second[:10]
        assert memory.live == 8000
        del first, second
        assert memory.live == 4000  # held by the view
        del view
    assert (memory.live, memory.peak) == (0, 8000)


@pytest.mark.slow
def test_memory_counted_without_data_is_that_of_real_tensors(monkeypatch):
    monkeypatch.setattr(training, "DEPTHS", (1,))
    settings = {"tiny": True, "bf16": False}
    counted, real = (
        training.count_memory(64, checkpointing=False, measured=measured, **settings) for measured in (False, True)
    )
    assert counted["step"] == pytest.approx(real["step"], rel=0.02)
    assert training.count_memory(64, checkpointing=True, measured=False, **settings)["step"] < 0.9 * real["step"]
