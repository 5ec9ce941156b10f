"""
Measurements on disk: one safetensors file each, keyed by everything that they depend on.

These are settings, weights, data and versions. Source code is not included: after changing a method's code,
measure again (`fresh`).
"""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import get_logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from uplift_diffusers._version import __version__
from uplift_diffusers.saving import replaced_when_whole

logger = get_logger(__name__)

Record = dict[str, torch.Tensor]
"""Measurements by name: figures as float64 scalars (which, unlike JSON, allow infinity), features, pixels."""

LIBRARIES = ("torch", "torchvision", "torchmetrics", "diffusers", "transformers", "pillow")
"""Libraries that may affect an output or its measurement."""


@dataclass(frozen=True)
class Entry:
    """
    The key of a record.

    Args:
        group: folder for human readers: a scale and a method.
        name: photograph or prompt, also for human readers.
        identity: everything that the record depends on, as JSON values. Only this decides whether a record is reused.
    """

    group: str
    name: str
    identity: dict

    @property
    def path(self) -> Path:
        """Path relative to the folder of the records."""
        return Path(_file_name(self.group), f"{_file_name(self.name)}-{digest(self.identity)}.safetensors")


class RecordStore:
    """
    The records below a folder. Several processes may write at the same time, even the same record.

    Args:
        folder: created when the first record is written.
        fresh: ignore existing records, so everything is measured again.
    """

    def __init__(self, folder: str | Path, *, fresh: bool = False):
        self.folder, self.fresh = Path(folder), fresh

    def holds(self, entry: Entry) -> bool:
        """Whether the record exists and is intact. A damaged record is logged and counts as missing."""
        if self.fresh or not (self.folder / entry.path).is_file():
            return False
        try:
            self.read(entry)
        except (OSError, ValueError) as error:
            logger.warning(f"{error} It is measured again.")
            return False
        return True

    def read(self, entry: Entry) -> Record:
        """
        Read a record and compare it with its checksum.

        Raises:
            OSError: the record does not exist or cannot be read.
            ValueError: the record is damaged.
        """
        path = self.folder / entry.path
        try:
            with safe_open(path, "pt") as file:
                checksum = (file.metadata() or {}).get("sha256")
                record = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"The record {path} is damaged ({error}).") from error
        if checksum != _checksum(entry, record):
            raise ValueError(f"The record {path} is damaged (its checksum differs).")
        return record

    def write(self, entry: Entry, record: Record) -> None:
        """Write a record atomically, replacing an existing one."""
        path = self.folder / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in record.items()}
        write_whole(path, save(tensors, metadata={"sha256": _checksum(entry, tensors)}))


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name and rename it."""
    with replaced_when_whole(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def digest(value: object) -> str:
    """A digest of 16 hexadecimal digits of values as JSON, or as text if they are not JSON values."""
    return digest_bytes(_json(value).encode())


def digest_bytes(content: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the content of a file."""
    return hashlib.sha256(content).hexdigest()[:16]


def digest_weights(modules: Iterable[torch.nn.Module]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of names, types, shapes and values of all tensors."""
    total = hashlib.sha256()
    for module in modules:
        _add_tensors(total, module.state_dict())
    return total.hexdigest()[:16]


def digest_configs(components: dict[str, object]) -> str:
    """A digest of the classes and settings of a pipeline's parts: networks, schedulers, tokenizers."""
    return digest({name: _settings(part) for name, part in components.items() if part is not None})


def versions() -> dict[str, str]:
    """Versions of this package and of the `LIBRARIES` that are installed."""
    found = {"uplift_diffusers": __version__}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _checksum(entry: Entry, record: Record) -> str:
    total = hashlib.sha256(_json(entry.identity).encode())
    _add_tensors(total, dict(sorted(record.items())))
    return total.hexdigest()


def _add_tensors(total: "hashlib._Hash", tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _settings(part: Any) -> dict:
    if hasattr(part, "get_vocab"):  # a tokenizer
        values = {"vocabulary": part.get_vocab(), "length": part.model_max_length, "special": part.special_tokens_map}
    else:
        config = getattr(part, "config", part)
        values = config.to_dict() if hasattr(config, "to_dict") else config
        values = values if isinstance(values, dict) else {}
    return {"class": type(part).__name__, **{key: value for key, value in values.items() if not key.startswith("_")}}


def _file_name(text: str) -> str:
    """`text` as part of a file name: letters, digits, dots, hyphens and underscores, 60 of them at most."""
    return re.sub(r"[^\w.-]+", "_", text)[-60:].lstrip(".")
