"""The command line, on real files, with a small pipeline that is saved first."""

import errno
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

import uplift_diffusers
from tests.hub_server import HubServer, point_at
from uplift_diffusers import AutoencoderLocal, UPLiFTModel, UPLiFTSuperResolutionPipeline, __version__, loading, saving
from uplift_diffusers.cli import upscale as upscale_module
from uplift_diffusers.cli.main import DELEGATES, Interrupts, main

UPSAMPLER = {
    "encoder_patch_size": 4,
    "encoder_block_out_channels": (8, 8),
    "decoder_channels": 8,
    "refiner_layers": 0,  # leaves an average of neighbouring latents, so that the output shows the input
    "noise_channels": 2,
}

ROOT = Path(uplift_diffusers.__file__).parent.parent
ORIENTATION = ExifTags.Base.Orientation


def make_vae():
    torch.manual_seed(0)
    vae = AutoencoderLocal(
        latent_channels=8,
        block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
    )
    vae.fit_linear_code(F.interpolate(torch.rand(400, 3, 2, 2) * 2 - 1, size=(8, 8), mode="bilinear"))
    return vae


def make_upsampler(**config):
    torch.manual_seed(1)
    return UPLiFTModel(**{**UPSAMPLER, "latent_channels": 8, "latent_space": "uplift-embedded", **config})


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of a saved pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    UPLiFTSuperResolutionPipeline(vae=make_vae(), upsampler=make_upsampler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(model):
    """The pipeline of `model`, loaded once."""
    return loading.load_pipeline(model)


@pytest.fixture
def upscale(model, loaded, monkeypatch):
    """Run the command in this process; returns its exit code. The pipeline of `model` is not loaded again."""
    load = loading.load_pipeline

    def load_once(path, *, vae, latent_space, dtype):
        if (path, vae, latent_space, dtype) == (str(model), None, None, torch.float32):
            return loaded
        return load(path, vae=vae, latent_space=latent_space, dtype=dtype)

    monkeypatch.setattr(loading, "load_pipeline", load_once)

    def run(*arguments, model=model):
        return main(["upscale", *map(str, arguments), "--model", str(model), "--device", "cpu"])

    return run


def picture(width=32, height=24, seed=0):
    """A smooth RGB image with one dark edge, at the left, so that turning and mirroring it can be told."""
    noise = np.random.default_rng(seed).integers(60, 256, (3, 4, 3), dtype=np.uint8)
    array = np.array(Image.fromarray(noise).resize((width, height), Image.BICUBIC))
    array[:, : width // 4] //= 8
    return Image.fromarray(array)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def load(path):
    with Image.open(path) as image:
        image.load()
        return image


def difference(image, other):
    """Mean absolute difference of two images of one size and mode, in 8-bit levels."""
    assert (image.size, image.mode) == (other.size, other.mode)
    return np.abs(np.asarray(image, dtype=float) - np.asarray(other, dtype=float)).mean()


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def error_line(capsys):
    """The one line that the command wrote to stderr, which is no traceback."""
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def error_of_output(capsys):
    return capsys.readouterr().err


# One file


@pytest.mark.parametrize("scale", ["1", "1.3", "2", "2.5", "4"])
def test_output_has_round_scale_times_the_pixels(upscale, tmp_path, capsys, scale):
    source = save(picture(37, 21), tmp_path / "photo.png")
    assert upscale(source, "--output", tmp_path / "large.png", "--scale", scale) == 0
    assert load(tmp_path / "large.png").size == (round(37 * float(scale)), round(21 * float(scale)))
    output = capsys.readouterr()
    assert output.out == "1 written\n"
    assert output.err == ""


def test_scale_is_two_by_default(upscale, tmp_path):
    upscale(save(picture(10, 20), tmp_path / "photo.png"), "--output", tmp_path / "large.png")
    assert load(tmp_path / "large.png").size == (20, 40)


def test_output_shows_the_input(upscale, tmp_path):
    source = save(picture(256, 192), tmp_path / "photo.png")
    upscale(source, "--output", tmp_path / "large.png")
    expected = load(source).resize((512, 384), Image.BICUBIC)
    large = load(tmp_path / "large.png")
    assert difference(large, expected) < 25
    # Not any other way round.
    for turn in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180):
        assert difference(large, expected.transpose(turn)) > 60


def test_output_may_be_a_folder_that_exists_or_ends_in_a_separator(upscale, tmp_path):
    source = save(picture(), tmp_path / "photo.jpg")
    (tmp_path / "there").mkdir()
    assert upscale(source, "--output", tmp_path / "there") == 0
    assert upscale(source, "--output", f"{tmp_path}/new/below/") == 0
    assert load(tmp_path / "there" / "photo.jpg").size == (64, 48)
    assert load(tmp_path / "new" / "below" / "photo.jpg").size == (64, 48)


@pytest.mark.parametrize("name", ["large", "large.gif", "large.heic"])
def test_output_of_no_known_format_is_refused(upscale, tmp_path, capsys, name):
    source = save(picture(), tmp_path / "photo.png")
    assert upscale(source, "--output", tmp_path / name) == 2
    line = error_line(capsys)
    assert ".png, .jpg" in line
    assert f"{tmp_path / name}/ for a new folder" in line
    assert files_below(tmp_path) == ["photo.png"]


def test_existing_output_of_a_single_file_is_kept_unless_told(upscale, tmp_path, capsys):
    source = save(picture(), tmp_path / "photo.png")
    target = tmp_path / "large.png"
    target.write_bytes(b"precious")
    assert upscale(source, "--output", target) == 2
    assert error_line(capsys) == (f"uplift-diffusers upscale: error: {target} exists. Pass --overwrite to replace it.")
    assert target.read_bytes() == b"precious"
    assert upscale(source, "--output", target, "--overwrite") == 0
    assert load(target).size == (64, 48)


# Folders


def test_folder_is_mirrored_and_bad_files_are_named_and_skipped(upscale, tmp_path, capsys):
    photos, large = tmp_path / "photos", tmp_path / "large"
    save(picture(16, 16), photos / "first.png")
    save(picture(24, 16), photos / "deep" / "er" / "second.jpg")
    save(picture(16, 24), photos / "deep" / "third.gif")
    (photos / "deep" / "text.png").write_text("not pixels at all")
    (photos / "empty.webp").touch()
    whole = save(picture(200, 200), photos / "cut.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    whole = save(picture(200, 200), photos / "cut.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "notes.txt").write_text("no image, and not called one")

    assert upscale(photos, "--output", large) == 1
    assert files_below(large) == ["deep/er/second.jpg", "deep/third.png", "first.png"]
    assert load(large / "first.png").size == (32, 32)
    assert load(large / "deep" / "er" / "second.jpg").size == (48, 32)
    assert load(large / "deep" / "third.png").size == (32, 48)

    output = capsys.readouterr()
    assert output.out == "3 written, 4 skipped\n"
    *lines, last = output.err.splitlines()
    assert last == "Skipped, not images: 1 .txt."
    reasons = dict(line.split(": ", 1) for line in lines)
    damaged = reasons.pop(str(photos / "cut.jpg")), reasons.pop(str(photos / "cut.png"))
    assert all(reason.startswith("the image is damaged or cut off (") for reason in damaged)
    assert "rows are missing" in damaged[0]
    assert reasons == {
        str(photos / "deep" / "text.png"): "not an image, or an unsupported format.",
        str(photos / "empty.webp"): "the file is empty.",
    }


def test_a_single_bad_file_is_exit_code_1(upscale, tmp_path, capsys):
    (tmp_path / "photo.png").write_text("not pixels at all")
    assert upscale(tmp_path / "photo.png", "--output", tmp_path / "large.png") == 1
    output = capsys.readouterr()
    assert output.out == "0 written, 1 skipped\n"
    assert output.err.startswith(f"{tmp_path / 'photo.png'}: not an image")
    assert files_below(tmp_path) == ["photo.png"]


def test_interrupted_folder_is_taken_up_again(upscale, tmp_path, capsys):
    photos, large = tmp_path / "photos", tmp_path / "large"
    for name in ("a.png", "b.png", "c.png"):
        save(picture(), photos / name)
    large.mkdir()
    (large / "b.png").write_bytes(b"precious")
    assert upscale(photos, "--output", large) == 0
    assert capsys.readouterr().out == "2 written, 1 already there\n"
    assert (large / "b.png").read_bytes() == b"precious"
    assert upscale(photos, "--output", large, "--overwrite") == 0
    assert capsys.readouterr().out == "3 written\n"
    assert load(large / "b.png").size == (64, 48)


def test_a_finished_folder_needs_no_model(upscale, tmp_path, capsys):
    save(picture(), tmp_path / "photos" / "a.png")
    save(picture(), tmp_path / "large" / "a.png")
    assert upscale(tmp_path / "photos", "--output", tmp_path / "large", model=tmp_path / "none") == 0
    assert capsys.readouterr().out == "0 written, 1 already there\n"


def test_output_folder_below_the_input_folder_is_no_input(upscale, tmp_path, capsys):
    save(picture(), tmp_path / "a.png")
    for written in (1, 0):
        assert upscale(tmp_path, "--output", tmp_path / "large") == 0
        assert capsys.readouterr().out.startswith(f"{written} written")
    assert files_below(tmp_path) == ["a.png", "large/a.png"]


def test_hidden_files_are_left_out(upscale, tmp_path, capsys):
    save(picture(), tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "._a.png").write_bytes(b"what macOS leaves on other disks")
    save(picture(), tmp_path / "photos" / ".trash" / "b.png")
    assert upscale(tmp_path / "photos", "--output", tmp_path / "large") == 0
    assert files_below(tmp_path / "large") == ["a.png"]
    assert capsys.readouterr().err == ""


def test_several_inputs_go_into_one_folder(upscale, tmp_path, capsys):
    first = save(picture(), tmp_path / "a.png")
    save(picture(), tmp_path / "folder" / "deep" / "b.bmp")
    # A file that is named twice is enlarged once.
    assert upscale(first, tmp_path / "folder", first, "--output", tmp_path / "new" / "large") == 0
    assert files_below(tmp_path / "new") == ["large/a.png", "large/deep/b.bmp"]
    assert capsys.readouterr().out == "2 written\n"


def test_a_folder_without_images_is_an_error(upscale, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    assert upscale(tmp_path / "photos", "--output", tmp_path / "large") == 2
    assert f"{tmp_path / 'photos'}: no images in this folder" in error_line(capsys)


def test_a_missing_input_is_an_error(upscale, tmp_path, capsys):
    source = save(picture(), tmp_path / "a.png")
    assert upscale(source, tmp_path / "none.png", "--output", tmp_path / "large") == 2
    assert f"{tmp_path / 'none.png'}: no such file or folder." in error_line(capsys)
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize("existing", [True, False])
def test_one_output_file_for_several_inputs_is_refused(upscale, tmp_path, capsys, existing):
    sources = [save(picture(), tmp_path / name) for name in ("a.png", "b.png")]
    if existing:
        (tmp_path / "large.png").write_bytes(b"precious")
    assert upscale(*sources, "--output", tmp_path / "large.png", "--overwrite") == 2
    assert "--output must be a folder" in error_line(capsys)
    assert (tmp_path / "large.png").exists() == existing


def test_inputs_of_one_name_are_named_and_the_others_are_made(upscale, tmp_path, capsys):
    sources = [save(picture(), tmp_path / name) for name in ("one/a.png", "one/b.png", "two/a.png")]
    assert upscale(*sources, "--output", tmp_path / "large") == 1
    output = capsys.readouterr()
    assert output.out == "1 written, 2 skipped\n"
    assert output.err.splitlines() == [
        f"{sources[0]}: would become the same file as {sources[2]}. Upscale them one by one.",
        f"{sources[2]}: would become the same file as {sources[0]}. Upscale them one by one.",
    ]
    assert files_below(tmp_path / "large") == ["b.png"]


def test_inputs_that_differ_in_a_suffix_that_becomes_png_keep_it_in_their_outputs(upscale, tmp_path, capsys):
    for name, width in (("a.gif", 20), ("a.png", 30), ("a.tga", 40), ("b.gif", 10)):
        save(picture(width), tmp_path / "photos" / name)
    assert upscale(tmp_path / "photos", "--output", tmp_path / "large") == 0
    assert files_below(tmp_path / "large") == ["a.gif.png", "a.png", "a.tga.png", "b.png"]
    assert load(tmp_path / "large" / "a.gif.png").width == 40
    assert load(tmp_path / "large" / "a.tga.png").width == 80


def test_nothing_below_a_folder_is_passed_over_in_silence(upscale, tmp_path, capsys, monkeypatch):
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    save(picture(), photos / "a.png")
    save(picture(), elsewhere / "b.png")
    (photos / "closed").mkdir()
    (photos / "folder").symlink_to(elsewhere)
    (photos / "dangling.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(photos / "pipe.png")
    for name in ("notes.txt", "more.txt", "README"):
        (photos / name).touch()
    scandir = os.scandir

    def scan(path):  # permissions mean nothing to root, who may run this
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scan)
        assert upscale(photos, "--output", tmp_path / "large") == 1
    output = capsys.readouterr()
    assert output.out == "1 written, 4 skipped\n"
    *lines, last = output.err.splitlines()
    told = dict(line.split(": ", 1) for line in lines)
    assert told.keys() == {str(photos / name) for name in ("closed", "folder", "dangling.png", "pipe.png")}
    assert told[str(photos / "closed")] == "Permission denied."
    assert last == "Skipped, not images: 2 .txt, 1 no suffix."


def test_control_characters_of_names_never_reach_the_terminal(upscale, tmp_path, capsys):
    name = "a\x1b[31m\nb\u202e.png"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / name).write_text("not pixels at all")
    assert upscale(tmp_path / "photos", "--output", tmp_path / "large") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.removesuffix("\n").isprintable()
    assert r"a\x1b[31m\nb\u202e.png: not an image" in error


@pytest.mark.slow
def test_a_launched_job_is_split_over_its_processes_and_summed_up_once(upscale, model, tmp_path, capsys):
    photos = tmp_path / "photos"
    for seed, name in enumerate(("a.png", "b.png", "d.jpg", "e.png")):
        save(picture(40, 40, seed), photos / name)
    (photos / "c.png").write_text("not pixels at all")
    save(picture(), tmp_path / "both" / "e.png")

    assert upscale(photos, "--output", tmp_path / "alone") == 1
    capsys.readouterr()
    # On a machine without GPUs, this is how accelerate starts two processes.
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "uplift_diffusers")
    arguments = ("upscale", photos, "--output", tmp_path / "both", "--model", model, "--device", "cpu")
    result = subprocess.run(
        [sys.executable, *launch, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 1, result.stderr
    # Not all of stdout: Gloo of torch 2.8 prints its connections to it.
    assert result.stdout.count("3 written, 1 already there, 1 skipped\n") == 1
    assert result.stdout.count("written") == 1
    assert result.stderr.count(f"{photos / 'c.png'}: not an image") == 1
    assert files_below(tmp_path / "both") == ["a.png", "b.png", "d.jpg", "e.png"]
    for name in ("a.png", "b.png", "d.jpg"):
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


# Nothing is lost


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
@pytest.mark.parametrize("way", ["file", "folder", "same name in another folder's place", "hard link"])
def test_an_input_is_never_replaced(upscale, tmp_path, capsys, way, flags):
    source = save(picture(), tmp_path / "photos" / "a.png")
    content = source.read_bytes()
    arguments = {
        "file": (source, "--output", source),
        "folder": (tmp_path / "photos", "--output", tmp_path / "photos"),
        "same name in another folder's place": (source, "--output", tmp_path / "photos" / ".." / "photos"),
        "hard link": (source, "--output", tmp_path / "link.png"),
    }[way]
    if way == "hard link":
        os.link(source, tmp_path / "link.png")
    assert upscale(*arguments, *flags) == 2
    assert "is an input and would be replaced" in error_line(capsys)
    assert source.read_bytes() == content


@pytest.mark.parametrize("kind", ["folder", "link", "FIFO", "socket"])
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_what_is_no_file_is_never_replaced_and_keeps_no_other_output(upscale, tmp_path, capsys, kind, flags):
    photos, target = tmp_path / "photos", tmp_path / "large" / "a.png"
    for name in ("a.png", "b.png"):
        save(picture(), photos / name)
    (tmp_path / "large").mkdir()
    (tmp_path / "precious.png").write_bytes(b"precious")
    with socket.socket(socket.AF_UNIX) as server:
        make = {
            "folder": target.mkdir,
            "link": lambda: target.symlink_to(tmp_path / "precious.png"),
            "FIFO": lambda: os.mkfifo(target),
            "socket": lambda: server.bind(os.path.relpath(target)),
        }
        make[kind]()
    kind_before = os.lstat(target).st_mode
    assert upscale(photos, "--output", tmp_path / "large", *flags) == 1
    output = capsys.readouterr()
    assert output.out == "1 written, 1 skipped\n"
    assert output.err.startswith(f"{photos / 'a.png'}: the output {target} cannot be written")
    assert os.lstat(target).st_mode == kind_before
    assert (tmp_path / "precious.png").read_bytes() == b"precious"
    if kind != "folder":  # into which the picture would go
        assert upscale(photos / "a.png", "--output", target, *flags) == 2
        assert f"the output {target} cannot be written" in error_line(capsys)


def test_a_file_that_appears_during_the_work_stays(upscale, tmp_path, capsys, monkeypatch):
    source, target = save(picture(), tmp_path / "photo.png"), tmp_path / "large.png"
    run = UPLiFTSuperResolutionPipeline.__call__

    def appear(self, *args, **options):
        target.write_bytes(b"precious")
        return run(self, *args, **options)

    monkeypatch.setattr(UPLiFTSuperResolutionPipeline, "__call__", appear)
    assert upscale(source, "--output", target) == 1
    output = capsys.readouterr()
    assert output.out == "0 written, 1 skipped\n"
    assert output.err.startswith(f"{target}: cannot be written: a file of this name exists")
    assert target.read_bytes() == b"precious"
    assert files_below(tmp_path) == ["large.png", "photo.png"]


def fail_half_way(monkeypatch, error):
    """Let every image that is saved break off after some bytes, as it does on a full disk."""

    def write_half(self, file, *args, **options):
        file.write(b"half an image")
        raise error

    monkeypatch.setattr(Image.Image, "save", write_half)


@pytest.mark.parametrize(
    ("error", "code"), [(OSError(errno.ENOSPC, "No space left on device"), 1), (KeyboardInterrupt(), 130)]
)
@pytest.mark.parametrize("existing", [True, False])
def test_a_save_that_fails_leaves_no_half_file_and_keeps_the_old_one(
    upscale, tmp_path, capsys, monkeypatch, error, code, existing
):
    source = save(picture(), tmp_path / "photo.png")
    target = tmp_path / "large" / "photo.png"
    target.parent.mkdir()
    if existing:
        target.write_bytes(b"precious")
    fail_half_way(monkeypatch, error)
    assert upscale(source, "--output", target, "--overwrite") == code
    assert files_below(target.parent) == (["photo.png"] if existing else [])
    assert not existing or target.read_bytes() == b"precious"
    expected = f"{target}: cannot be written: No space left on device." if code == 1 else "Interrupted."
    assert capsys.readouterr().err.startswith(expected)


def test_a_folder_job_ends_where_nothing_can_be_stored_any_more(upscale, tmp_path, capsys, monkeypatch):
    for name in ("a.png", "b.png", "c.png"):
        save(picture(), tmp_path / "photos" / name)
    fail_half_way(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    assert upscale(tmp_path / "photos", "--output", tmp_path / "large") == 1
    output = capsys.readouterr()
    assert output.out == "0 written, 3 skipped\n"
    assert output.err.splitlines() == [
        f"{tmp_path / 'large' / 'a.png'}: cannot be written: No space left on device.",
        "2 more were not started, because they could not be written either.",
    ]


def test_a_full_disk_is_found_before_the_model_is_loaded(upscale, tmp_path, capsys, monkeypatch):
    source = save(picture(), tmp_path / "photo.png")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    assert upscale(source, "--output", tmp_path / "large.png", model=tmp_path / "no-model") == 2
    assert error_line(capsys).endswith(f"cannot write into the folder {tmp_path}: No space left on device.")


def test_an_output_name_that_is_too_long_is_found_before_any_work(upscale, tmp_path, capsys):
    source, name = save(picture(), tmp_path / "photo.png"), "x" * 252 + ".png"
    for output in (tmp_path / name, tmp_path / "new" / name):
        assert upscale(source, "--output", output, model=tmp_path / "no-model") == 2
        assert "the output's name is too long: 255 bytes are allowed" in error_line(capsys)
    # In a folder, the others are made. The name of a gif is as long as it can be, and .gif.png longer.
    for name in ("y" * 251 + ".gif", "y" * 251 + ".png"):
        save(picture(), tmp_path / "photos" / name)
    assert upscale(tmp_path / "photos", "--output", tmp_path / "large") == 1
    output = capsys.readouterr()
    assert output.out == "1 written, 1 skipped\n"
    assert "the output's name is too long" in output.err


def test_an_empty_output_is_an_error(upscale, tmp_path, capsys):
    source = save(picture(), tmp_path / "photo.png")
    assert upscale(source, "--output", "") == 2
    assert "--output must be a file or a folder, got an empty name." in error_line(capsys)


def test_output_that_cannot_be_written_is_found_before_the_model_is_loaded(upscale, tmp_path, capsys):
    source = save(picture(), tmp_path / "photo.png")
    (tmp_path / "file").write_text("a regular file")
    for output in (tmp_path / "file" / "large.png", f"{tmp_path}/file/below/"):
        assert upscale(source, "--output", output, model=tmp_path / "no-model") == 2
        line = error_line(capsys)
        assert "--output: cannot write into the folder" in line
        assert str(tmp_path / "file") in line
    assert upscale(tmp_path, "--output", tmp_path / "file", model=tmp_path / "no-model") == 2
    assert "--output must be a folder, got the file" in error_line(capsys)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_what_a_killed_process_left_is_removed_where_nothing_is_to_be_written_too(upscale, tmp_path, capsys):
    for name in ("a.png", "deep/b.png"):
        save(picture(), tmp_path / "photos" / name)
        save(picture(), tmp_path / "large" / name)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = f".uplift-{saving._HOST}-{os.getppid()}-00.partial"  # of a process that is there
    for name in (f".uplift-{saving._HOST}-{gone.pid}-00.partial", mine):
        (tmp_path / "large" / "deep" / name).write_bytes(b"half")
    assert upscale(tmp_path / "photos", "--output", tmp_path / "large") == 0
    assert capsys.readouterr().out == "0 written, 2 already there\n"
    assert files_below(tmp_path / "large") == ["a.png", f"deep/{mine}", "deep/b.png"]


def test_an_interrupt_in_the_midst_of_cleaning_up_leaves_nothing(upscale, tmp_path, capsys, monkeypatch):
    remove, calls = saving._remove_partial, []

    def interrupted_once(path):
        calls.append(path)
        if len(calls) == 2:  # the first one is of the probe
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(saving, "_remove_partial", interrupted_once)
    source = save(picture(), tmp_path / "photos" / "a.png")
    assert upscale(source, "--output", f"{tmp_path}/large/") == 130
    assert error_line(capsys) == "Interrupted. The outputs written so far are complete."
    assert files_below(tmp_path / "large") == ["a.png"]


def test_outputs_have_the_permissions_of_any_new_file(upscale, tmp_path):
    source = save(picture(), tmp_path / "photo.png")
    (tmp_path / "ordinary").touch()
    upscale(source, "--output", tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_between_files_keeps_what_is_written(upscale, tmp_path, capsys, monkeypatch, number, code):
    for name in ("a.png", "b.png", "c.png"):
        save(picture(), tmp_path / "photos" / name)
    run, calls = UPLiFTSuperResolutionPipeline.__call__, []
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def interrupted(self, *args, **options):
        calls.append(options)
        if len(calls) == 2:
            signal.raise_signal(number)
        return run(self, *args, **options)

    monkeypatch.setattr(UPLiFTSuperResolutionPipeline, "__call__", interrupted)
    # pytest may have been started with SIGINT or SIGHUP ignored, as shells and nohup do it for the background.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert upscale(tmp_path / "photos", "--output", tmp_path / "large") == code
    finally:
        signal.signal(signal.SIGINT, previous[0])
        signal.signal(signal.SIGHUP, previous[1])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert error_line(capsys) == "Interrupted. The outputs written so far are complete."
    assert files_below(tmp_path / "large") == ["a.png"]
    assert load(tmp_path / "large" / "a.png").size == (64, 48)
    assert upscale(tmp_path / "photos", "--output", tmp_path / "large") == 0
    assert capsys.readouterr().out == "2 written, 1 already there\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGTERM to one process")
def test_a_process_that_is_terminated_leaves_only_whole_files(model, tmp_path):
    first = save(picture(128, 96), tmp_path / "photos" / "000.png")
    for number in range(1, 300):
        os.link(first, tmp_path / "photos" / f"{number:03}.png")
    large = tmp_path / "large"
    process = subprocess.Popen(
        command("upscale", tmp_path / "photos", "--output", large, "--model", model, "--device", "cpu"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not list(large.glob("*.png")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, errors
    assert errors == "Interrupted. The outputs written so far are complete.\n"
    assert output == ""
    written = sorted(large.iterdir())
    assert 1 <= len(written) < 300
    assert all(path.suffix == ".png" and load(path).size == (256, 192) for path in written)


# What becomes of a picture


def test_orientation_of_a_compressed_tiff_is_applied_once(upscale, tmp_path):
    tags = {ORIENTATION: 3, ExifTags.Base.Make: "Camera works"}
    source = save(picture(), tmp_path / "photo.tif", compression="tiff_lzw", tiffinfo=tags)
    assert upscale(source, "--output", tmp_path / "large.tif", "--scale", "1") == 0
    large = load(tmp_path / "large.tif")
    assert difference(large, picture().transpose(Image.Transpose.ROTATE_180)) == 0
    assert large.getexif().get(ORIENTATION, 1) == 1
    assert large.getexif()[ExifTags.Base.Make] == "Camera works"


@pytest.mark.parametrize(
    ("size", "scale", "name", "reason"),
    [
        ((5_001, 5_000), "2", "a.png", "would be upscaled to 10002 x 10000, more than the limit of 100 megapixels"),
        ((2_501, 2_500), "3", "a.png", "would be upscaled to 10004 x 10000, more than the limit of 100 megapixels"),
        ((9_000, 1), "2", "a.webp", "the output of 18000 x 2 pixels has an edge over the 16383 of a .webp"),
        ((33_000, 1), "2", "a.jpg", "the output of 66000 x 2 pixels has an edge over the 65500 of a .jpg"),
    ],
)
def test_outputs_that_are_too_large_are_refused(upscale, tmp_path, capsys, size, scale, name, reason):
    source = save(Image.new("1", size), tmp_path / "photo.png")
    assert upscale(source, "--output", tmp_path / name, "--scale", scale) == 1
    assert reason in error_of_output(capsys)
    assert files_below(tmp_path) == ["photo.png"]


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        (("--size", "100x"), (100, 75)),
        (("--size", "x60"), (80, 60)),
        (("--size", "100x60"), (80, 60)),
        (("--long_side", "96"), (96, 72)),
        (("--megapixels", "0.003"), (63, 47)),  # sqrt(3000 * 4 / 3) = 63.2
    ],
)
def test_the_output_has_the_size_that_is_asked_for(upscale, tmp_path, flags, size):
    source = save(picture(32, 24), tmp_path / "photo.png")
    assert upscale(source, "--output", tmp_path / "large.png", *flags) == 0
    assert load(tmp_path / "large.png").size == size


def test_a_picture_that_is_larger_than_asked_for_is_named_and_the_others_are_made(upscale, tmp_path, capsys):
    save(picture(32, 24), tmp_path / "photos" / "small.png")
    save(picture(64, 24), tmp_path / "photos" / "wide.png")
    assert upscale(tmp_path / "photos", "--output", tmp_path / "large", "--size", "48x") == 1
    assert files_below(tmp_path / "large") == ["small.png"]
    assert f"{tmp_path / 'photos' / 'wide.png'}: a width of 48 pixels" in error_of_output(capsys)


def test_what_a_file_loses_is_told_with_its_name_before_the_work(upscale, tmp_path, capsys, monkeypatch):
    frames = [picture(seed=seed).convert("P") for seed in (0, 1)]
    source = save(frames[0], tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert upscale(source, "--output", f"{tmp_path}/large/", "--scale", "1") == 0
    lines = error_of_output(capsys).splitlines()
    assert lines
    assert all(line.startswith(f"{source}: ") for line in lines)
    said = []
    monkeypatch.setattr(
        UPLiFTSuperResolutionPipeline, "__call__", lambda *_, **__: said.append(error_of_output(capsys)) or 1 // 0
    )
    with pytest.raises(ZeroDivisionError):
        upscale(source, "--output", f"{tmp_path}/again/")
    assert said[0].splitlines() == lines


# Seeds


def test_a_file_has_the_same_bytes_alone_and_in_a_folder(upscale, tmp_path):
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        save(picture(40, 40, seed), tmp_path / "photos" / name)
    assert upscale(tmp_path / "photos", "--output", tmp_path / "large", "--seed", "7") == 0
    for name in ("a.png", "b.png", "c.png"):
        assert upscale(tmp_path / "photos" / name, "--output", tmp_path / name, "--seed", "7") == 0
        assert (tmp_path / name).read_bytes() == (tmp_path / "large" / name).read_bytes()


def test_seed_is_0_by_default_and_another_one_gives_another_image(upscale, tmp_path):
    source = save(picture(40, 40), tmp_path / "photo.png")
    for name, flags in (("none", ()), ("again", ()), ("0", ("--seed", "0")), ("1", ("--seed", "1"))):
        assert upscale(source, "--output", tmp_path / f"{name}.png", *flags) == 0
    content = {name: (tmp_path / f"{name}.png").read_bytes() for name in ("none", "again", "0", "1")}
    assert content["none"] == content["again"] == content["0"] != content["1"]


# Errors of single files


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nGPU 0 has ..."), "out of memory."),
        (MemoryError(), "out of memory."),
        (RuntimeError("something in\nseveral lines"), "something in."),
    ],
)
def test_a_file_that_fails_is_told_and_the_others_go_on(upscale, tmp_path, capsys, monkeypatch, error, reason):
    for name in ("a.png", "b.png", "c.png"):
        save(picture(33 if name == "b.png" else 32), tmp_path / "photos" / name)
    run = UPLiFTSuperResolutionPipeline.__call__

    def fail_at_width_33(self, image, **options):
        if image.width == 33:
            raise error
        return run(self, image, **options)

    monkeypatch.setattr(UPLiFTSuperResolutionPipeline, "__call__", fail_at_width_33)
    assert upscale(tmp_path / "photos", "--output", tmp_path / "large") == 1
    output = capsys.readouterr()
    assert output.out == "2 written, 1 skipped\n"
    assert output.err == f"{tmp_path / 'photos' / 'b.png'}: {reason}\n"
    assert files_below(tmp_path / "large") == ["a.png", "c.png"]


def test_a_programming_error_is_not_hidden(upscale, tmp_path, monkeypatch):
    def fail(self, image, **options):
        raise AttributeError("a bug")

    monkeypatch.setattr(UPLiFTSuperResolutionPipeline, "__call__", fail)
    with pytest.raises(AttributeError, match="a bug"):
        upscale(save(picture(), tmp_path / "photo.png"), "--output", tmp_path / "large.png")


# Models and devices


def test_upsampler_and_vae_can_be_given_apart(upscale, model, tmp_path):
    source = save(picture(), tmp_path / "photo.png")
    assert upscale(source, "--output", tmp_path / "whole.png") == 0
    expected = (tmp_path / "whole.png").read_bytes()
    # A folder that is the VAE, and a pipeline that has one.
    for number, vae in enumerate((model / "vae", model)):
        target = tmp_path / f"{number}.png"
        assert upscale(source, "--output", target, "--vae", vae, model=model / "upsampler") == 0
        assert target.read_bytes() == expected


def test_computation_in_bfloat16_gives_nearly_the_same_image(upscale, model, tmp_path, capsys):
    source = save(picture(), tmp_path / "photo.png")
    for name, flags in (("whole", ()), ("half", ("--dtype", "bfloat16"))):
        assert upscale(source, "--output", tmp_path / f"{name}.png", *flags) == 0
    arguments = ("--vae", model, "--dtype", "bfloat16")
    assert upscale(source, "--output", tmp_path / "apart.png", *arguments, model=model / "upsampler") == 0
    assert 0 < difference(load(tmp_path / "half.png"), load(tmp_path / "whole.png")) < 1
    assert (tmp_path / "apart.png").read_bytes() == (tmp_path / "half.png").read_bytes()
    assert error_of_output(capsys) == ""


def test_vae_replaces_that_of_a_pipeline(upscale, model, tmp_path):
    vae = make_vae()
    torch.nn.init.zeros_(vae.linear_decoder.weight)
    torch.nn.init.constant_(vae.linear_decoder.bias, 0.5)
    vae.save_pretrained(tmp_path / "vae")
    source = save(picture(), tmp_path / "photo.png")
    flags = ("--vae", tmp_path / "vae", "--consistency", 0)
    assert upscale(source, "--output", tmp_path / "large.png", *flags) == 0
    assert np.unique(np.asarray(load(tmp_path / "large.png"))).tolist() == [191]  # (0.5 + 1) / 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "{model}/upsampler"), "If it is a UPLiFTModel, name a --vae."),
        (("--model", "{model}", "--vae", "nowhere"), "nowhere must be a folder or a name on the hub (owner/name)"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(model, tmp_path, capfd, flags, message):
    source = save(picture(), tmp_path / "photo.png")
    flags = [flag.format(model=model) for flag in flags]
    assert main(["upscale", str(source), "--output", str(tmp_path / "large.png"), *flags]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("uplift-diffusers upscale: error: ")
    assert message in errors[0]
    assert not (tmp_path / "large.png").exists()


def test_embedded_bundle_is_the_default_model(model, tmp_path, capsys, monkeypatch):
    source = save(picture(), tmp_path / "photo.png")
    monkeypatch.setattr(upscale_module, "embedded_bundle", lambda: model)
    assert main(["upscale", str(source), "--output", str(tmp_path / "large.png")]) == 0
    assert load(tmp_path / "large.png").size == (64, 48)
    capsys.readouterr()

    monkeypatch.setattr(upscale_module, "embedded_bundle", lambda: tmp_path / "not installed")
    assert main(["upscale", str(source), "--output", str(tmp_path / "larger.png")]) == 2
    assert "Name another one with --model." in error_line(capsys)


@pytest.mark.parametrize("device", ["quantum", "meta", "cuda:4096", "auto:1", "", "hpu", "privateuseone"])
def test_a_device_that_is_not_there_is_an_error(model, tmp_path, capsys, device):
    source = save(picture(), tmp_path / "photo.png")
    code = main(
        ["upscale", str(source), "--output", str(tmp_path / "a.png"), "--model", str(model), "--device", device]
    )
    assert code == 2
    assert f"got {device!r}." in error_line(capsys)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE must be a whole number of at least 1, got 'x'."),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number of at least 1, got '0'."),
        ({"WORLD_SIZE": "-3"}, "WORLD_SIZE must be a whole number of at least 1, got '-3'."),
        ({"WORLD_SIZE": "9" * 5000}, f"WORLD_SIZE must be a whole number of at least 1, got '{'9' * 39}. Unset it."),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE must come with RANK and MASTER_ADDR and MASTER_PORT, got 2 without them."),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK must be below WORLD_SIZE, which is 2, got 2."),
        ({"RANK": "first"}, "RANK must be a whole number of at least 0, got 'first'."),
    ],
)
def test_an_environment_of_no_launcher_is_told_before_the_work(
    upscale, tmp_path, capsys, monkeypatch, variables, sentence
):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert upscale(save(picture(), tmp_path / "photo.png"), "--output", tmp_path / "large.png") == 2
    assert sentence in error_line(capsys)


def test_hub_ids_are_fetched(model, tmp_path, capsys, monkeypatch):
    source = save(picture(), tmp_path / "photo.png")
    with HubServer(tmp_path / "hub") as hub:
        point_at(monkeypatch, hub.url, tmp_path / "cache")
        shutil.copytree(model / "upsampler", hub.folder("someone/upsampler"), dirs_exist_ok=True)
        shutil.copytree(model, hub.folder("someone/pipeline"), dirs_exist_ok=True)
        arguments = ("--model", "someone/upsampler", "--vae", "someone/pipeline", "--device", "cpu")
        assert main(["upscale", str(source), "--output", str(tmp_path / "large.png"), *arguments]) == 0
    assert load(tmp_path / "large.png").size == (64, 48)


# Arguments


def command(*arguments):
    return [sys.executable, "-m", "uplift_diffusers", *map(str, arguments)]


@pytest.mark.parametrize("scale", ["nan", "inf", "0", "0.99", "-1", "16.01", "17", "abc", ""])
def test_scales_out_of_range_are_refused(upscale, tmp_path, capsys, scale):
    source = save(picture(), tmp_path / "photo.png")
    assert upscale(source, "--output", tmp_path / "large.png", "--scale", scale) == 2
    assert error_line(capsys) == (
        f"uplift-diffusers upscale: error: argument --scale: must be a number from 1 to 16, got {scale!r}"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("enlarge",), "invalid choice: 'enlarge'"),
        (("upscale", "a.png"), "the following arguments are required: --output"),
        (("upscale", "--output", "b.png"), "the following arguments are required: INPUT"),
        (("upscale", "a.png", "--output", "b.png", "--seed", "-1"), "argument --seed: must be a whole number"),
        (("upscale", "a.png", "--output", "b.png", "--seed", "1.5"), "argument --seed: must be a whole number"),
        (("upscale", "a.png", "--output", "b.png", "--seed", str(2**63)), "argument --seed: must be a whole number"),
        (("upscale", "a.png", "--output", "b.png", "--over"), "unrecognized arguments: --over"),
        (("upscale", "a.png", "--output", "b.png", "--scale=--"), "argument --scale: expected a value, got '--'"),
        (("upscale", "a.png", "--output", "b\0.png"), "an argument must not hold a null character"),
        (("upscale", "a\x1b.png", "--output", "b.png"), r"a\x1b.png: no such file or folder."),
        (("upscale", "a.png", "--output", "b.png", "--size", "x"), "argument --size: must be WIDTHxHEIGHT"),
        (("upscale", "a.png", "--output", "b.png", "--size", "0x9"), "argument --size: must be WIDTHxHEIGHT"),
        (("upscale", "a.png", "--output", "b.png", "--megapixels", "nan"), "argument --megapixels: must be a number"),
        (("upscale", "a.png", "--output", "b.png", "--scale", "2", "--size", "9x"), "not allowed with argument"),
    ],
)
def test_arguments_that_are_wrong_are_named_in_one_line(capsys, arguments, message):
    assert main(list(arguments)) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--recipe", "x"], "argument --recipe: invalid choice: 'x'"),
        (["train", "--train_data_dir", "a\0b"], "an argument must not hold a null character, got 'a\\x00b'"),
        (["train", "--output_dir=--"], "argument --output_dir: expected a value, got '--'"),
        (["train", "--config", "odd\x1b[31m.yaml"], "odd"),
        (["train-features", "--depths", "x"], "argument --depths: invalid int value: 'x'"),
        (["evaluate", "--scales", "x"], "argument --scales: invalid"),
        (["evaluate-features", "--task", "x" * 5000], "argument --task: invalid choice: 'xxx"),
    ],
)
def test_every_command_tells_a_mistake_in_one_line_that_a_terminal_can_show(capsys, arguments, message):
    assert main(arguments) in (1, 2)
    line = error_line(capsys)
    assert message in line
    assert line.isprintable()
    assert len(line) < 1100


def test_an_interrupted_training_says_so_in_one_line(capsys, monkeypatch):
    from uplift_diffusers.training import train

    monkeypatch.setattr(train, "main", lambda arguments: signal.raise_signal(signal.SIGTERM))
    assert main(["train"]) == 143
    assert error_line(capsys) == "Interrupted. The outputs written so far are complete."


def test_an_interrupt_that_a_library_turned_into_an_error_is_an_interrupt(capsys, monkeypatch):
    from uplift_diffusers.training import train

    def fail(arguments):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        return 2

    monkeypatch.setattr(train, "main", fail)
    assert main(["train"]) == 143
    assert error_line(capsys) == "Interrupted. The outputs written so far are complete."


def test_an_interrupt_after_the_work_does_nothing():
    interrupts = Interrupts()
    with interrupts.caught():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        interrupts.is_running = False
        signal.raise_signal(signal.SIGTERM)
    assert interrupts.received == [signal.SIGTERM, signal.SIGTERM]


def test_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"uplift-diffusers {__version__}\n"


def test_help_and_mistakes_do_not_import_torch():
    script = (
        "import sys; from uplift_diffusers.cli.main import main\n"
        "wrong = ['upscale', 'a.png', '--output', 'b.png']\n"
        "tried = (['--help'], ['upscale', '--help'], [*wrong, '--scale', '17'], wrong)\n"
        "codes = [main(arguments) for arguments in tried]\n"
        "assert codes == [0, 0, 2, 2], codes\n"
        "slow = {'torch', 'diffusers', 'transformers'} & set(sys.modules); assert not slow, slow"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full is needed")
@pytest.mark.parametrize("arguments", [("--version",), ("upscale", "{source}", "--output", "{target}")])
def test_a_stdout_that_cannot_be_written_is_told_in_one_line(upscale, tmp_path, capsys, monkeypatch, arguments):
    source, target = save(picture(), tmp_path / "photo.png"), tmp_path / "large.png"
    arguments = [argument.format(source=source, target=target) for argument in arguments]
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert (main(arguments) if arguments[0].startswith("-") else upscale(*arguments[1:])) == 1
        monkeypatch.undo()
    assert error_line(capsys) == "uplift-diffusers: standard output cannot be written: No space left on device."
    assert target.exists() == (arguments[0] == "upscale")


@pytest.mark.parametrize("name", DELEGATES)
def test_every_command_of_its_own_answers_help(name, capsys):
    assert main([name, "--help"]) == 0
    assert "--" in capsys.readouterr().out


def test_a_command_whose_packages_are_missing_names_what_to_install(capsys, monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert main(["train"]) == 2
    line = error_line(capsys)
    assert line == "uplift-diffusers train: error: tensorboard is missing: pip install 'uplift-diffusers[train]'"


def test_help_states_the_limits_and_the_exit_codes(capsys):
    from uplift_diffusers.images.files import MAX_INPUT_PIXELS, OUTPUT_FORMATS

    assert main(["upscale", "--help"]) == 0
    text = capsys.readouterr().out
    assert f"over {MAX_INPUT_PIXELS / 1e6:g} megapixels" in text
    assert f"over {upscale_module.MAX_OUTPUT_PIXELS / 1e6:g}." in text
    assert all(f"\n  {code:<5}" in text for code in (0, 1, 2, 130))
    assert all(suffix.removeprefix(".") in text for suffix in OUTPUT_FORMATS)
    assert max(len(line) for line in text.split("INPUT and --output:")[1].splitlines()) <= 119
