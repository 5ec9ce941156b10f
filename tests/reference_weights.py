"""The deterministic weights with which the reference network computed the golden outputs."""

import functools
import json
import zlib
from pathlib import Path

import numpy as np
import torch

REFERENCE = Path(__file__).parent / "fixtures" / "reference"


@functools.cache
def reference_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Parameter and buffer names of the published checkpoint, with shapes. `name`: "sd15", "dinov2" or "dinov3"."""
    shapes = json.loads((REFERENCE / f"{name}_state_dict.json").read_text())
    return {key: tuple(shape) for key, shape in shapes.items()}


def reference_state_dict(name: str) -> dict[str, torch.Tensor]:
    """State dict under the published names: each tensor is a function of its own name and shape."""
    return {key: _tensor(key, shape) for key, shape in reference_shapes(name).items()}


def _tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    values = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, dtype=np.float32)
    if key.endswith("running_var"):
        values = 0.5 + np.abs(values)
    elif key.endswith("running_mean"):
        values = 0.1 * values
    elif len(shape) == 1 and key.endswith("weight"):
        values = 1 + 0.1 * values
    elif len(shape) == 1:
        values = 0.1 * values
    else:
        values = values / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))
