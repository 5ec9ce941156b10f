"""Measurements on disk: one safetensors file each, written whole, named after everything that it depends on."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from uplift_diffusers.evaluation.digests import digest
from uplift_diffusers.saving import replaced_when_whole

Record = dict[str, torch.Tensor]
"""What was measured, by name: figures as float64 scalars (which hold infinity, as JSON does not), features, pixels."""


@dataclass(frozen=True)
class Entry:
    """
    The place of a record.

    Args:
        group: the folder, for people who look: a scale and a method.
        name: of the photograph or prompt, for people too.
        identity: everything that the record depends on, as JSON values. It alone decides whether a record is reused.
    """

    group: str
    name: str
    identity: dict

    @property
    def path(self) -> Path:
        return Path(_file_name(self.group), f"{_file_name(self.name)}-{digest(self.identity)}.safetensors")


class RecordStore:
    """The records below a folder. Several processes may write there at once, different records or the same one."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def holds(self, entry: Entry) -> bool:
        return (self.folder / entry.path).is_file()

    def read(self, entry: Entry) -> Record:
        return load_file(self.folder / entry.path)

    def write(self, entry: Entry, record: Record) -> None:
        path = self.folder / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in record.items()}
        write_whole(path, save(tensors, metadata={"identity": json.dumps(entry.identity, sort_keys=True)}))


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name and rename it."""
    with replaced_when_whole(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def _file_name(text: str) -> str:
    """`text` as part of a file name: letters, digits, dots, hyphens and underscores, 60 of them at most."""
    return re.sub(r"[^\w.-]+", "_", text)[-60:].lstrip(".")
