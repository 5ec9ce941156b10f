"""Seconds and memory of a call are those of the device that it runs on."""

import torch

from uplift_diffusers.evaluation.meters import peak_of, seconds_of


def test_another_gpu_than_the_current_one_is_asked_for_its_own_memory_and_waited_for(monkeypatch):
    device, asked = torch.device("cuda", 1), []
    for name, answer in (
        ("synchronize", None),
        ("reset_peak_memory_stats", None),
        ("memory_allocated", 100),
        ("max_memory_allocated", 350),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device=None, answer=answer: asked.append(device) or answer)
    assert peak_of(lambda: None, device) == 250
    seconds_of(lambda: None, device)
    assert asked == [device] * 5


def test_the_peak_of_a_call_on_the_cpu_is_what_it_allocates():
    peak = peak_of(lambda: torch.ones(2**24), torch.device("cpu"))
    assert peak is None or 0.9 * 2**26 < peak < 1.5 * 2**26
