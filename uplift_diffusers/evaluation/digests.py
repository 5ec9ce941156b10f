"""What figures depend on, in a few hexadecimal digits: files, weights, settings and code; and libraries' versions."""

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import diffusers
import PIL
import torch
import torchmetrics
import torchvision
import transformers

import uplift_diffusers
from uplift_diffusers import pipelines

_NOT_IN_RECORDS = frozenset(
    (
        *("cli.py", "command.py", "cost.py", "plots.py", "report.py", "results.py", "statistics.py"),
        *("demo", "embedded", "training"),
    )
)
"""Files and folders of this package that do not change what is measured on an output."""


def digest(value: object) -> str:
    """16 hexadecimal digits that tell values apart by their JSON, or by their text where they have none."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def digest_bytes(content: bytes) -> str:
    """16 hexadecimal digits of the content of a file."""
    return hashlib.sha256(content).hexdigest()[:16]


def digest_weights(modules: Iterable[torch.nn.Module]) -> str:
    """16 hexadecimal digits of the names, types, shapes and values of all tensors of the modules."""
    total = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def digest_configs(components: dict[str, object]) -> str:
    """16 hexadecimal digits of the kinds and settings of a pipeline's parts: networks, schedulers, tokenizers."""
    return digest({name: _settings(part) for name, part in components.items() if part is not None})


@cache
def digest_code() -> str:
    """16 hexadecimal digits of the code of this package that outputs and what is measured on them come from."""
    folders = [Path(package.__file__).parent for package in (uplift_diffusers, pipelines)]
    paths = {path.resolve(): path.relative_to(folder) for folder in folders for path in folder.rglob("*.py")}
    kept = [path for path, place in paths.items() if not _NOT_IN_RECORDS.intersection(place.parts)]
    return digest(sorted(digest_bytes(path.read_bytes()) for path in kept))


def versions() -> dict[str, str]:
    """Of the libraries that outputs and what is measured on them come from."""
    libraries = (torch, torchvision, diffusers, transformers, torchmetrics, PIL)
    return {library.__name__: library.__version__ for library in libraries}


def _settings(part: object) -> dict:
    if hasattr(part, "get_vocab"):  # a tokenizer
        values = {"vocabulary": part.get_vocab(), "length": part.model_max_length, "special": part.special_tokens_map}
    else:
        config = getattr(part, "config", part)
        values = config.to_dict() if hasattr(config, "to_dict") else config
        values = values if isinstance(values, dict) else {}
    return {"class": type(part).__name__, **{key: value for key, value in values.items() if not key.startswith("_")}}
