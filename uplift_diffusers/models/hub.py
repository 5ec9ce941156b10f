"""Where a published checkpoint lies: a file, a folder or a repository on the hub. Found here, and fetched."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from huggingface_hub import (
    _CACHED_NO_EXIST,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)

# HTTPError is the base of what the hub's HTTP library raises, whichever library that is in the installed version.
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


@dataclass(frozen=True)
class _Listing:
    files: frozenset[str]
    folder: Path | None  # where they lie on this machine; None for those that are still to be downloaded
    unanswered: Exception | None = None  # why the hub could not be asked, so that there may be other files too


class CheckpointSource:
    """
    A place that may hold a published checkpoint, listed at most once.

    Args:
        location: a file, a folder or a repository's "owner/name".
        subfolder: folder to look in, inside a folder or repository.
        revision: branch, tag or commit of a repository; its main branch by default.
        cache_dir: the hub's cache, if not the usual one.
        token: access token, or True for the stored one; by default the stored one, if there is one.
        local_files_only: use what the cache holds and stay off the network.
        force_download: download even what the cache holds.
    Raises:
        TypeError: `location` is not a string or path.
        ValueError: `force_download` and `local_files_only` together.
    """

    def __init__(
        self,
        location: str | os.PathLike,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool | None = False,
        force_download: bool | None = False,
    ):
        if not isinstance(location, str | os.PathLike):
            raise TypeError(f"`location` must be a path or the name of a repository, got {location!r}.")
        if force_download and local_files_only:
            raise ValueError("`force_download` must be False with `local_files_only`, got True. Drop one of the two.")
        self.location = os.fspath(location)
        self.subfolder = subfolder or ""
        self.revision = revision
        self.cache_dir = cache_dir
        self.token = token
        self.local_files_only = bool(local_files_only)
        self.force_download = bool(force_download)

    def holds(self, name: str) -> bool:
        """Whether a file of that name is there, as far as can be told. Raises as `checkpoint_name` does."""
        return name in self._listing.files

    def is_known_to_lack(self, name: str) -> bool:
        """Whether the hub's cache remembers that the repository had no such file. Never uses the network."""
        if not self._is_repository:
            return False
        path = f"{self.subfolder}/{name}" if self.subfolder else name
        found = try_to_load_from_cache(self.location, path, cache_dir=self.cache_dir, revision=self.revision)
        return found is _CACHED_NO_EXIST

    def checkpoint_name(self) -> str:
        """
        Name of the one .safetensors file there.

        Raises:
            FileNotFoundError: no such place, offline and not in the cache, or no .safetensors file in it.
            ValueError: several .safetensors files, or only pickle files.
            PermissionError: a gated repository.
            ConnectionError: the hub does not answer and the cache has no copy.
        """
        checkpoints = sorted(name for name in self._listing.files if name.endswith(".safetensors"))
        pickles = sorted(name for name in self._listing.files if name.endswith(_PICKLE_SUFFIXES))
        if len(checkpoints) > 1:
            raise ValueError(
                f"`{self._place}` must hold exactly one .safetensors file, got {len(checkpoints)} "
                f"({', '.join(checkpoints[:3])}{', ...' if len(checkpoints) > 3 else ''}). "
                "Pass the path of the one that you mean."
            )
        if not checkpoints and self._listing.unanswered is not None:
            raise self._explain(self._listing.unanswered) from self._listing.unanswered
        if pickles and not checkpoints:
            raise ValueError(
                f"`{self._place}` must be safetensors, got pickle ({', '.join(pickles[:3])}). "
                "Pickle checkpoints can run code when they are opened; convert it to safetensors first."
            )
        if not checkpoints:
            raise FileNotFoundError(
                f"`{self._place}` must be a .safetensors file or hold one, got none. "
                "Name the folder that holds it with `subfolder`, or pass the path of a file."
            )
        return checkpoints[0]

    def possible_names(self) -> tuple[str, ...]:
        """What the checkpoint goes by, the most specific first: its file, its folder, its repository."""
        name, path = self.checkpoint_name(), Path(self.location)
        return (name,) if path.is_file() else (name, Path(self.subfolder).name, path.absolute().name)

    def fetch(self) -> Path:
        """
        Path of the checkpoint on this machine, downloaded where that is needed.

        Raises:
            ConnectionError: the download broke off. Nothing of it stays behind.
            OSError: the file system refused.
            And as `checkpoint_name` does.
        """
        name = self.checkpoint_name()
        if self._listing.folder is not None:
            return self._listing.folder / name
        try:
            path = hf_hub_download(
                self.location,
                name,
                subfolder=self.subfolder,
                revision=self.revision,
                cache_dir=self.cache_dir,
                token=self.token,
                force_download=self.force_download,
            )
        except (HTTPError, OSError) as error:
            if getattr(error, "errno", None) is not None:  # the disk's error, not the network's
                raise
            raise ConnectionError(
                f"`{name}` of `{self.location}` must be downloaded whole, got a transfer that broke off "
                f"({_in_brief(error)}). Check the connection and load it again."
            ) from error
        return Path(path)

    @property
    def _place(self) -> str:
        return f"{self.location.rstrip('/')}/{self.subfolder}" if self.subfolder else self.location

    @property
    def _is_repository(self) -> bool:
        if Path(self.location).exists() or self.location.count("/") != 1:
            return False
        if self.location.endswith((".safetensors", *_PICKLE_SUFFIXES)):
            return False
        try:
            validate_repo_id(self.location)
        except HFValidationError:
            return False
        return True

    @cached_property
    def _listing(self) -> _Listing:
        path = Path(self.location)
        if path.is_file():
            return _Listing(frozenset([path.name]), path.parent)
        if path.is_dir():
            return _Listing(_files_in(path / self.subfolder), path / self.subfolder)
        if self._is_repository:
            return self._list_repository()
        raise FileNotFoundError(
            f"`{self.location}` must be a .safetensors file, a folder that holds one or a repository (owner/name), "
            "got nothing of that name. Check the spelling."
        )

    def _list_repository(self) -> _Listing:
        if self.local_files_only:
            return self._list_cache(OfflineModeIsEnabled())
        try:
            siblings = (
                HfApi(token=self.token)
                .model_info(self.location, revision=self.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
                .siblings
            )
        except RevisionNotFoundError as error:
            raise FileNotFoundError(
                f"`revision` must be a branch, tag or commit of `{self.location}`, got {str(self.revision)!r}."
            ) from error
        except (HTTPError, OfflineModeIsEnabled) as error:
            return self._list_cache(error)
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        paths = [sibling.rfilename for sibling in siblings or [] if sibling.rfilename.startswith(prefix)]
        files = [path.removeprefix(prefix) for path in paths]
        return _Listing(frozenset(name for name in files if "/" not in name), folder=None)

    def _list_cache(self, unanswered: Exception) -> _Listing:
        """What the cache holds of the repository. Nothing of it will do if it is to be downloaded anew."""
        if self.force_download:
            raise self._explain(unanswered) from unanswered
        try:
            snapshot = snapshot_download(
                self.location, revision=self.revision, cache_dir=self.cache_dir, local_files_only=True
            )
        except LocalEntryNotFoundError as error:
            # A snapshot that lacks other files will do, if it has the checkpoint.
            snapshot = getattr(error, "snapshot_path", None)
        if snapshot is None:
            return _Listing(frozenset(), None, unanswered)
        folder = Path(snapshot, self.subfolder)
        return _Listing(_files_in(folder), folder, unanswered)

    def _explain(self, reason: Exception) -> OSError:
        if isinstance(reason, OfflineModeIsEnabled):
            if self.force_download:
                return ConnectionError(
                    f"`force_download` must be False while offline, got True for `{self._place}`. "
                    "Drop it, or unset HF_HUB_OFFLINE."
                )
            return FileNotFoundError(
                f"`{self._place}` must be in the cache while offline (HF_HUB_OFFLINE or `local_files_only`), "
                "got no copy there. Load it once with a connection."
            )
        if isinstance(reason, GatedRepoError):
            return PermissionError(
                f"`{self.location}` must be open to you, got a gated repository. "
                f"Ask for access at {constants.ENDPOINT}/{self.location} and pass `token`."
            )
        if isinstance(reason, RepositoryNotFoundError):
            return FileNotFoundError(
                f"`{self.location}` must be a local path or a repository on {constants.ENDPOINT}, got neither. "
                "Check the spelling; a private repository needs `token`."
            )
        return ConnectionError(
            f"`{self.location}` must be in the cache or on a hub within reach, got {_in_brief(reason)} from "
            f"{constants.ENDPOINT}. Check the connection, or pass the path of a file."
        )


def _files_in(folder: Path) -> frozenset[str]:
    return frozenset(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else frozenset()


def _in_brief(error: Exception) -> str:
    return f"HTTP {error.response.status_code}" if isinstance(error, HfHubHTTPError) else type(error).__name__
