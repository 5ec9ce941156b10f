"""What the machine is asked before work is given to it."""

from contextlib import nullcontext

import pytest
import torch

from uplift_diffusers import runtime
from uplift_diffusers.runtime import device_name, preferred_dtype

ZEN4 = "fpu avx2 avx512f avx512_bf16 avx512_vnni"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (ZEN4, torch.bfloat16),
        ("fpu avx2 avx512f amx_bf16 amx_tile", torch.bfloat16),
        ("fpu avx2 avx512f avx512_vnni amx_tile", torch.float32),
        ("fpu avx2", torch.float32),
    ],
)
def test_a_cpu_prefers_bfloat16_only_if_it_has_instructions_for_it(monkeypatch, tmp_path, flags, expected):
    monkeypatch.setattr(runtime, "CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(
        f"processor\t: 0\nmodel name\t: A CPU: fast\nflags\t\t: {flags}\n\nprocessor\t: 1\n"
    )
    assert preferred_dtype("cpu") == expected
    assert device_name("cpu") == "A CPU: fast"


def test_a_cpu_that_says_nothing_of_itself_prefers_float32(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "CPU_INFO", tmp_path / "none")
    assert preferred_dtype("cpu") == torch.float32


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bfloat16_prefers_float16(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert preferred_dtype("cuda:1") == expected


def test_other_devices_prefer_float32():
    assert preferred_dtype("mps") == torch.float32
