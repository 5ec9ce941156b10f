"""Weights, inputs and outputs with which the published upsamplers were run: all but the outputs follow from names."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent.parent / "fixtures" / "peers"
CASES = json.loads((FIXTURES / "golden.json").read_text())
SHAPES = json.loads((FIXTURES / "state_dicts.json").read_text())
OUTPUTS = load_file(FIXTURES / "golden.safetensors")


def cases_of(*names: str) -> list[str]:
    return [case for case in CASES if CASES[case]["method"] in names]


def state_dict(case: str) -> dict[str, torch.Tensor]:
    """The published names, each tensor a function of its name."""
    settings = CASES[case]
    shapes = SHAPES[settings["method"]]
    if not settings.get("layer_norm", True):
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("model.1.norm")}
    tensors = {name: _tensor(name, shape) for name, shape in shapes.items()}
    for name, value in settings.get("overrides", {}).items():
        tensors[name] = (
            _frequencies() + 0.1 * _normal(name, shapes[name]) if name == "rope.freqs" else torch.tensor(value)
        )
    return tensors


def image(case: str) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1]: noise of every pixel, and of squares of 8 pixels."""
    height, width = CASES[case]["image"]
    batch, rng = CASES[case].get("batch", 1), _rng(f"{case}.image")
    fine = rng.random((batch, 3, height, width), np.float32)
    coarse = rng.random((batch, 3, math.ceil(height / 8), math.ceil(width / 8)), np.float32)
    return torch.from_numpy(0.5 * fine + 0.5 * coarse.repeat(8, 2).repeat(8, 3)[:, :, :height, :width])


def features(case: str) -> torch.Tensor:
    """(B, C, h, w), standard normal."""
    settings = CASES[case]
    return _normal(f"{case}.features", [settings.get("batch", 1), settings.get("channels", 384), *settings["tokens"]])


def output(case: str, part: str) -> tuple[torch.Tensor, slice]:
    """What the published network gave, and which channels of it that is."""
    return OUTPUTS[f"{case}.{part}"], slice(None, None, CASES[case]["channel_strides"][part])


def _tensor(name: str, shape: list[int]) -> torch.Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if name.endswith("range_temp"):
        return torch.tensor(0.0)
    if name.endswith("sigma_spatial"):
        return torch.tensor(1.0)
    if name == "rope.freqs":
        return _frequencies()
    if name == "image_encoder.rope.periods":
        return 100 ** (torch.arange(16) / 16)
    values = _normal(name, shape)
    if name == "key_features_encoder.0.basis":
        return 256 * values  # with smaller ones the softmax is flat
    if name.endswith("running_var"):
        return 0.5 + values.abs()
    if name.endswith("running_mean"):
        return 0.1 * values
    if len(shape) == 1:
        return 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
    return values / math.sqrt(math.prod(shape[1:]))


def _frequencies() -> torch.Tensor:
    half = 2 * math.pi * 100 ** -torch.linspace(0, 1, 32)
    zeros = torch.zeros(64)
    return torch.stack([torch.cat([half, half, zeros]), torch.cat([zeros, half, half])])


def _normal(name: str, shape: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.asarray(_rng(name).standard_normal(shape, dtype=np.float32)))


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))
