"""Sources of photographs: a folder, WebDataset tar shards or a Hugging Face dataset, each an indexed list of files."""

import glob
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Protocol

from uplift_diffusers.images.files import INPUT_SUFFIXES, check_image_header, find_image_files


class Source(Protocol):
    """
    An indexed list of image files.

    Attributes:
        unreadable: a message for every file that was skipped.
    """

    unreadable: list[str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The file's path or identifier, for messages."""
        ...

    def read(self, index: int) -> bytes:
        """The whole file. Raises OSError if it cannot be read."""
        ...


def open_source(
    train_data_dir: str | Path | None = None,
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    image_column: str = "image",
) -> Source:
    """
    The photographs of a folder, of tar shards or of a dataset.

    Args:
        train_data_dir: a folder, searched recursively; a .tar file; or a pattern of them, such as `shards/*.tar`.
        dataset_name: instead of `train_data_dir`, a dataset on the hub, or a folder that `datasets` can load.
        dataset_config_name: its configuration, if it has several.
        image_column: its column with images.
    Raises:
        FileNotFoundError: there are no files.
        ValueError: none of the files can be read, a shard is damaged, or the dataset has no images.
    """
    if dataset_name is not None:
        dataset = load_dataset(dataset_name, dataset_config_name, image_column=image_column, streaming=False)
        return DatasetSource(dataset, dataset_name, image_column)
    if str(train_data_dir).endswith(".tar"):
        return TarSource(str(train_data_dir))
    assert train_data_dir is not None  # one of the two is given
    return FolderSource(train_data_dir)


def find_images(folder: str | Path) -> list[Path]:
    """Image files below `folder`, sorted by path. Raises FileNotFoundError if there is no folder or no image in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"`{folder}` is not a folder.")
    paths = list(find_image_files(folder).files)
    if not paths:
        raise FileNotFoundError(f"No images below `{folder}`. Suffixes: {', '.join(sorted(INPUT_SUFFIXES))}.")
    return paths


class FolderSource:
    """The image files below a folder, sorted by path; files without an image header are skipped."""

    def __init__(self, folder: str | Path):
        self.paths, self.unreadable = [], []
        for path in find_images(folder):
            if problem := _header_problem(str(path), path):
                self.unreadable.append(problem)
            else:
                self.paths.append(path)
        if not self.paths:
            raise ValueError(f"None of the files below `{folder}` can be read. The first: {self.unreadable[0]}")

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def read(self, index: int) -> bytes:
        return self.paths[index].read_bytes()


class _Member(NamedTuple):
    shard: str
    name: str
    offset: int
    size: int


class TarSource:
    """
    The image files in uncompressed tar shards, sorted by their path inside, like a folder with the same files.

    The shards are indexed once and then accessed at random, without a shuffle buffer.

    Args:
        pattern: a .tar file, or a pattern with `*`, `?` and `[...]`.
    """

    def __init__(self, pattern: str):
        shards = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        if not shards:
            raise FileNotFoundError(f"No tar files match `{pattern}`.")
        self.members, self.unreadable = [], []
        for shard in shards:
            try:
                with tarfile.open(shard, "r:") as archive:
                    self._index(shard, archive)
            except tarfile.TarError as error:
                raise ValueError(f"`{shard}` must be a whole, uncompressed tar file ({error}).") from error
        if not self.members:
            first = f" The first: {self.unreadable[0]}" if self.unreadable else ""
            raise ValueError(f"No images that can be read in `{pattern}`.{first}")
        self.members.sort(key=lambda member: (PurePosixPath(member.name).parts, member.shard))

    def _index(self, shard: str, archive: tarfile.TarFile) -> None:
        for info in archive:
            path = PurePosixPath(info.name)
            if not info.isfile() or path.suffix.lower() not in INPUT_SUFFIXES:
                continue
            if any(part.startswith(".") for part in path.parts):  # hidden, as in a folder
                continue
            file = archive.extractfile(info)
            assert file is not None  # as it is only for what is no file
            if problem := _header_problem(f"{shard}/{path}", file):
                self.unreadable.append(problem)
            else:
                self.members.append(_Member(shard, str(path), info.offset_data, info.size))

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        member = self.members[index]
        return f"{member.shard}/{member.name}"

    def read(self, index: int) -> bytes:
        member = self.members[index]
        with open(member.shard, "rb") as file:  # anew each time: worker processes would share its position
            file.seek(member.offset)
            return file.read(member.size)


class DatasetSource:
    """
    The images of a map-style Hugging Face dataset, accessed at random in its Arrow files, as the original bytes.

    Headers are not checked first, because that would mean reading the whole dataset.
    """

    def __init__(self, dataset: Any, name: str, image_column: str):
        self.dataset, self.dataset_name, self.image_column = dataset, name, image_column
        self.unreadable: list[str] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{self.dataset_name}[{index}]"

    def read(self, index: int) -> bytes:
        return record_bytes(self.dataset[index][self.image_column])


def load_dataset(name: str, config_name: str | None = None, *, image_column: str, streaming: bool) -> Any:
    """
    The training split of a Hugging Face dataset, with undecoded images.

    Args:
        name: name on the hub, or a folder: with files that `datasets` supports, or written by `save_to_disk`.
        config_name: its configuration, if it has several.
        image_column: see `open_source`.
        streaming: return an `IterableDataset` that downloads while it is read, instead of a `Dataset` on disk.
    Raises:
        ImportError: the library `datasets` is not installed.
        FileNotFoundError: there is no such dataset.
        ValueError: it has no such configuration or column, or no training split.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ImportError("`dataset_name` needs `datasets`: pip install 'uplift-diffusers[train]'.") from error

    if Path(name, "dataset_info.json").exists() or Path(name, "dataset_dict.json").exists():
        splits = datasets.load_from_disk(name)
        if isinstance(splits, datasets.Dataset):
            splits = {"train": splits}
        if streaming:
            splits = {split: dataset.to_iterable_dataset() for split, dataset in splits.items()}
    else:
        try:
            splits = datasets.load_dataset(name, config_name, streaming=streaming)
        except DatasetsError as error:
            raise ValueError(f"`dataset_name`: {name} cannot be loaded: {' '.join(str(error).split())}") from error
    if "train" not in splits and len(splits) != 1:
        raise ValueError(f"`dataset_name` must have a split `train`, got {name} with {', '.join(map(str, splits))}.")
    dataset = splits["train"] if "train" in splits else next(iter(splits.values()))

    features = dataset.features or dataset.info.features
    if features is None or image_column not in features:
        known = "none that are known beforehand" if features is None else ", ".join(features)
        raise ValueError(f"`image_column` must be a column of {name}, got {image_column!r}. It has {known}.")
    if not isinstance(features[image_column], datasets.Image):
        raise ValueError(
            f"`image_column` must hold images, got {image_column!r} of {name}, which holds {features[image_column]}."
        )
    return dataset.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))


def record_bytes(record: dict[str, Any]) -> bytes:
    """The bytes of an undecoded image of a dataset, which are in the record or at its path."""
    if record["bytes"] is not None:
        return record["bytes"]
    import fsspec  # of `datasets`; for what is streamed the path may be one on the hub

    opened: Any = fsspec.open(record["path"], "rb")
    with opened as file:
        return file.read()


def _header_problem(name: str, file: Path | IO[bytes]) -> str | None:
    """A message if the header shows that a file cannot be read as an image, else None."""
    try:
        check_image_header(file)
    except (OSError, ValueError) as error:
        return f"{name}: {error}"
    return None
