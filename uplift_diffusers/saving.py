"""Atomic writing of files and folders: under a temporary name in the same folder, then renamed."""

import errno
import functools
import os
import platform
import re
import secrets
import shutil
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from io import BufferedRandom
from pathlib import Path

# A process id means something on one machine only, and a folder may be shared by several.
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_PARTIAL = re.compile(rf"\.uplift-{_HOST}-(\d+)-[0-9a-f]+\.partial")
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}
_SPECIAL = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}

_in_progress: set[Path] = set()


@contextmanager
def replaced_when_whole(path: str | Path, *, overwrite: bool = True) -> Iterator[BufferedRandom]:
    """
    A file to write to, which is renamed to `path` at the end of the block, or removed if the block fails.

    Partial files that dead processes left in the same folder are removed.

    Args:
        path: a path in an existing folder.
        overwrite: replace an existing file. If False, the check is atomic: a file that appears during the block is
            kept.
    Raises:
        FileExistsError: the file exists and `overwrite` is False; or `path` is something that is never
            replaced: a link, a named pipe, a socket, a device or a folder.
        OSError: `path`, which the error names, cannot be written. An existing file is unchanged.
    """
    path = Path(path)
    with _naming(path):
        check_output_path(path, overwrite=overwrite)
        remove_unfinished(path.parent)
        with _partial(path.parent) as partial:
            with partial.open("x+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            check_output_path(path, overwrite=overwrite)
            if overwrite:
                os.replace(partial, path)
            else:
                _take_name(partial, path)
        sync(path.parent)


@contextmanager
def folder_when_whole(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """
    A new folder to fill, which is renamed to `path` at the end of the block, or removed if the block fails.

    Args:
        path: a path in an existing folder.
        overwrite: replace an existing folder, once the new one is complete.
    Raises:
        FileExistsError: `path` exists and is not to be replaced.
        OSError: `path` cannot be written.
    """
    path = Path(path)
    with _naming(path):
        replaces = overwrite and path.is_dir() and not path.is_symlink()
        if not replaces:
            check_output_path(path)
        remove_unfinished(path.parent)
        with _partial(path.parent) as partial:
            partial.mkdir()
            yield partial
            for place, _, names in os.walk(partial):
                for name in (*names, "."):
                    sync(Path(place, name))
            with _partial(path.parent) as previous:  # removed once the new one is in its place
                if replaces:
                    os.rename(path, previous)
                check_output_path(path)
                os.rename(partial, path)
        sync(path.parent)


def check_output_path(path: str | Path, *, overwrite: bool = False) -> None:
    """
    Raise FileExistsError if `path` exists and must not be replaced, or OSError if the file system does not accept the
    name, for example because it is too long.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    special = _SPECIAL.get(stat.S_IFMT(mode))
    if special is not None:
        raise FileExistsError(errno.EEXIST, f"{special} of this name exists and is not replaced", str(path))
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "a file of this name exists and is not replaced", str(path))


def make_writable_folder(folder: str | Path) -> None:
    """Create `folder` if needed and check that files can be written there. Raises OSError if not."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    with _partial(folder) as probe:
        probe.touch(exist_ok=False)


def remove_unfinished(folder: str | Path) -> None:
    """Remove the partial files that dead processes left in `folder`; done once per folder and process."""
    _remove_unfinished(os.path.abspath(folder))


def remove_own_unfinished() -> None:
    """
    Remove what this process has not finished writing. To be called after an interrupt, which may have come between
    the end of the writing and its cleaning up; not while another thread writes.
    """
    for path in list(_in_progress):
        _remove_partial(path)


@functools.cache
def _remove_unfinished(folder: str) -> None:
    with suppress(OSError):
        for path in Path(folder).iterdir():
            found = _PARTIAL.fullmatch(path.name)
            if found and path not in _in_progress and not _is_running(int(found[1])):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False  # in a restarted container, the one before it had the same number
    if os.name == "nt":
        return True  # there, os.kill would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """A free name in `folder`. Whatever has this name at the end of the block is removed."""
    path = Path(os.path.abspath(folder), f".uplift-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.partial")
    _in_progress.add(path)
    try:
        yield path
    finally:
        _remove_partial(path)


def _remove_partial(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    _in_progress.discard(path)


def _take_name(partial: Path, path: Path) -> None:
    """Rename a file to a free name, atomically. Raises FileExistsError if the name is taken."""
    try:
        try:
            os.link(partial, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # On a file system without links, an empty file reserves the name and is then replaced.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.replace(partial, path)
    except FileExistsError:
        raise FileExistsError(
            errno.EEXIST, "a file of this name has appeared in the meantime and is not replaced", str(path)
        ) from None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let OSErrors in the block name `path` instead of the temporary name or none."""
    try:
        yield
    except OSError as error:
        is_ours = error.filename is None or str(error.filename).endswith(".partial")
        if error.errno is not None and is_ours:
            error.filename, error.filename2 = str(path), None
        raise


def sync(path: Path) -> None:
    """Sync a file, or the renames in a folder if the system supports that, to disk."""
    is_folder = path.is_dir()
    with suppress(OSError) if is_folder else nullcontext():
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
