"""Files that appear whole or not at all."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from uplift_diffusers import saving
from uplift_diffusers.saving import (
    check_output_path,
    folder_when_whole,
    make_writable_folder,
    remove_unfinished,
    replaced_when_whole,
)

ROOT = Path(saving.__file__).parent.parent


@pytest.fixture(autouse=True)
def _no_folder_was_seen_before():
    saving._remove_unfinished.cache_clear()


def write(path, content, **options):
    with replaced_when_whole(path, **options) as file:
        file.write(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path):
    with replaced_when_whole(tmp_path / "a") as file:
        file.write(b"new")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_what_breaks_off_leaves_everything_as_it_was(tmp_path, error):
    (tmp_path / "a").write_bytes(b"precious")

    def break_off(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)) as raised, replaced_when_whole(tmp_path / "a") as file:
        break_off(file)
    assert (tmp_path / "a").read_bytes() == b"precious"
    assert names(tmp_path) == ["a"]
    if isinstance(error, OSError):
        assert raised.value.filename == str(tmp_path / "a")


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch, has_links):
    if not has_links:

        def refuse(*arguments):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    check = saving.check_output_path
    monkeypatch.setattr(saving, "check_output_path", lambda *arguments, **options: None)  # it is the system's refusal
    with (
        pytest.raises(FileExistsError, match="has appeared in the meantime and is not replaced"),
        replaced_when_whole(tmp_path / "a", overwrite=False),
    ):
        (tmp_path / "a").write_bytes(b"precious")
    assert (tmp_path / "a").read_bytes() == b"precious"
    assert names(tmp_path) == ["a"]
    monkeypatch.setattr(saving, "check_output_path", check)
    write(tmp_path / "b", b"new", overwrite=False)
    assert (tmp_path / "b").read_bytes() == b"new"
    assert names(tmp_path) == ["a", "b"]


def test_of_many_that_write_one_file_one_wins(tmp_path):
    start, results = threading.Barrier(8), []

    def attempt(number):
        start.wait()
        try:
            write(tmp_path / "a", bytes([number]) * 1000, overwrite=False)
            results.append(number)
        except FileExistsError:
            results.append(None)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [number for number in results if number is not None]
    assert (tmp_path / "a").read_bytes() == bytes([winner]) * 1000
    assert names(tmp_path) == ["a"]


@pytest.mark.skipif(os.name == "nt", reason="of POSIX")
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_no_file_is_never_replaced(tmp_path, monkeypatch, overwrite):
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    server = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    server.bind("socket")
    before = names(tmp_path)
    kinds = {"link": "symbolic link", "dangling": "symbolic link", "pipe": "named pipe", "socket": "socket"}
    for name, kind in {**kinds, "folder": "folder"}.items():
        with pytest.raises(FileExistsError, match=f"a {kind} of this name exists and is not replaced"):
            write(tmp_path / name, b"new", overwrite=overwrite)
    server.close()
    assert names(tmp_path) == before
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(FileExistsError, match="a device"):
        check_output_path("/dev/null", overwrite=overwrite)


def test_a_name_that_is_too_long_is_found_beforehand(tmp_path):
    with pytest.raises(OSError, match="File name too long") as raised:
        check_output_path(tmp_path / ("a" * 300))
    assert raised.value.filename == str(tmp_path / ("a" * 300))
    check_output_path(tmp_path / ("a" * 200))
    check_output_path(tmp_path / "none" / "a")


def test_folders_appear_when_they_are_whole(tmp_path):
    with folder_when_whole(tmp_path / "new") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_bytes(b"a")
        assert names(tmp_path) == [folder.name]
    assert (tmp_path / "new" / "sub" / "a").read_bytes() == b"a"
    with pytest.raises(ZeroDivisionError), folder_when_whole(tmp_path / "other") as folder:
        (folder / "a").write_bytes(bytes(1 // 0))
    with pytest.raises(FileExistsError, match="a folder of this name exists"), folder_when_whole(tmp_path / "new"):
        pass
    assert names(tmp_path) == ["new"]


def test_a_folder_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").touch()
    with pytest.raises(ZeroDivisionError), folder_when_whole(tmp_path / "there", overwrite=True) as folder:
        (folder / "new").write_bytes(bytes(1 // 0))
    assert names(tmp_path / "there") == ["old"]
    with folder_when_whole(tmp_path / "there", overwrite=True) as folder:
        (folder / "new").touch()
        assert names(tmp_path / "there") == ["old"]
    assert names(tmp_path / "there") == ["new"]
    assert names(tmp_path) == ["there"]


@pytest.mark.skipif(os.name == "nt", reason="of POSIX")
def test_leftovers_of_a_killed_process_are_removed_and_those_of_a_living_one_stay(tmp_path):
    script = (
        "import sys, time; from uplift_diffusers.saving import replaced_when_whole\n"
        "with replaced_when_whole(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); print('begun', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "a"], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ROOT}
    )
    assert process.stdout.readline() == b"begun\n"
    (unfinished,) = names(tmp_path)
    remove_unfinished(tmp_path)
    assert names(tmp_path) == [unfinished]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (tmp_path / ".uplift-notes.partial").touch()  # not ours
    elsewhere = unfinished.replace(saving._HOST, "00000000")
    (tmp_path / elsewhere).touch()  # of another machine, where the number may be that of a living process
    (tmp_path / f"{unfinished.removesuffix('.partial')}0.partial").mkdir()
    saving._remove_unfinished.cache_clear()
    with replaced_when_whole(tmp_path / "b") as file:
        file.write(b"b")
        assert len(names(tmp_path)) == 3  # what this process is writing stays
    assert names(tmp_path) == sorted([".uplift-notes.partial", elsewhere, "b"])


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    make_writable_folder(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError):  # noqa: PT011
        make_writable_folder(tmp_path / "file" / "b")
