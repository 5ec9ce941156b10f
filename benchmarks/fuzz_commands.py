"""The parts `commands` and `processes` of `benchmarks.fuzz`: odd arguments and environments of `uplift-diffusers`."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.fuzz_models import save_models
from uplift_diffusers.cli.main import main

MAX_WAITING_S = 300
"""Of a process."""

_ODD = (
    *("", " ", "x", "-1", "0", "1", "2", "2.5", "nan", "inf"),
    *("1e999", "-0.0", "9" * 30, "9" * 5000, "0x10", "1_000", "٣"),
    *("--", "-", "--output", "\x1b[31mred", "a\nb", "a\0b", "\udcff"),
    *("é", "x" * 300, "x" * 70_000, "a/" * 3000, "~", "*"),
    *("..", ".", "/", "/dev/null", "/dev/full", "/proc/self/mem", "/nowhere/x.png", "x.png", "x.heic", "x.gif", "x/"),
    *("None", "null", "True", "[]", "{}", "auto", "cpu", "hpu"),
    *("cuda:99", "meta", "privateuseone", "mps", "cpu:-1", "a:b"),
    *("owner/name", "owner/na me", "a/b/c", "http://127.0.0.1:9/x", "file:///etc/passwd", "1x1", "x", "3840x", "0x0"),
)
_MODELS = ("local", "tiny", "kl", "embedded", "features", "local/upsampler", "local/vae", "nowhere", "photo.png")
_PHOTOS = (
    *("photo.png", "photo.png", "b.jpg", "c.gif", "photos", "photos"),
    *("empty", "broken.png", "dangling.png", "pipe.png"),
    *("odd\x1b[31m\n.png", "model_index.json", "text.txt", "nowhere.png"),
    *("loop", "x" * 300 + ".png", "", "\udcff.png"),
)
_OUTPUTS = (
    *("large.png", "large.jpg", "large", "large/", "deep/er/large.webp"),
    *("photo.png", "photos", "photos/below", "there.png"),
    *("there.png/x.png", "pipe.png", "dangling.png", "large.gif", "x" * 300 + ".png", "", ".", "..", "/dev/null"),
    *("/dev/full", "/proc/x.png", "large.safetensors", "odd\x1b\n.png"),
    *("\udcff.png", "large.PNG", ".png", "large.tiff"),
)
_ENVIRONMENTS = (
    *({}, {}, {}, {}, {}, {"WORLD_SIZE": "x"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-3"}, {"WORLD_SIZE": "2"}),
    *({"RANK": "x"}, {"RANK": "7"}, {"RANK": "1", "WORLD_SIZE": "1"}, {"LOCAL_RANK": "x"}, {"LOCAL_RANK": "99"}),
    *({"WORLD_SIZE": "9" * 5000}, {"WORLD_SIZE": "٣"}, {"WORLD_SIZE": ""}),
    *({"COLUMNS": "x"}, {"COLUMNS": "1"}, {"HOME": ""}),
)
_ENVIRONMENTS_OF_PROCESSES = (
    *({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {"TMPDIR": "/nowhere"}, {"HOME": "/nowhere"}),
    *({"HF_HOME": "/dev/null"}, {"HF_HUB_OFFLINE": "0"}, {"CUDA_VISIBLE_DEVICES": "x"}),
    *({"COLUMNS": "-5"}, {"PYTHONWARNINGS": "default"}, {"TERM": "x"}, {"HF_ENDPOINT": "x", "HF_HUB_OFFLINE": "0"}),
)
_FLAGS = {
    "upscale": {
        **{"--scale": "1 1.5 2 4 16 17", "--size": "40x x30 40x30 9999999x", "--megapixels": "0.001 0.01 1e9"},
        **{"--long_side": "40 64 99999", "--model": None},
        **{"--vae": None, "--latent_space": "sd15-vae uplift-embedded x"},
        **{"--seed": "0 1 9223372036854775807 9223372036854775808", "--device": "cpu auto cuda mps hpu meta cpu:0"},
        **{"--dtype": "float32 bfloat16 float16 float64"},
        **{"--denoise": "auto 0 0.5 1 2", "--consistency": "0 0.5 1 1.5"},
        **{"--overwrite": "", "--output": None, "--help": "", "--unknown": "x", "--scal": "2"},
    },
    "features": {
        **{"--model": None, "--backbone": None, "--upsampler": None, "--feature_space": "dinov2-s14 x", "--help": ""},
        **{"--size": "40x30 1x1 0x1 999999x999999 x", "--num_steps": "1 2 99 0"},
        **{"--device": "cpu hpu", "--overwrite": ""},
        **{"--dtype": "float32 bfloat16 x", "--output": None},
    },
    "fetch": {
        **{"--dataset": None, "--output": None, "--size": "64 0 x", "--jobs": "1 0 x", "--sha256": "x " + "0" * 64},
        **{"unsplash-lite": "", "--help": ""},
    },
    "train": {
        **{"--recipe": "sd15 embedded x", "--method": "uplift lift cfm x"},
        **{"--stage": "pixels upsampler x", "--vae": None},
        **{"--train_data_dir": None, "--dataset_name": None, "--output_dir": None},
        **{"--config": None, "--seed": "0 x -1"},
        **{"--depths": "1 9 x 0", "--mixed_precision": "no bf16 x"},
        **{"--report_to": "none wandb x", "--lr_scheduler": "x"},
        **{"--resume_from_checkpoint": "latest if-any nowhere", "--latent_cache_dir": None, "--initial_stem": None},
        **{"--learning_rate": "0 nan x 1e-3", "--latent_noise": "-1 nan x", "--streaming": "", "--help": ""},
    },
    "evaluate": {
        **{"--data_dir": None, "--dataset_name": None, "--prompts": None, "--model": None, "--output_dir": None},
        **{"--methods": "bicubic uplift x x=y bicubic=3 =", "--scales": "2 3 0 x 64"},
        **{"--limit": "1 0 x", "--seed": "x"},
        **{"--metrics": "psnr fid x", "--inception_weights": None, "--crop": "32 0 x", "--jpeg_quality": "75 0 101 x"},
        **{"--device": "cpu hpu x", "--dtype": "x", "--real_images": None, "--stable_diffusion": None, "--help": ""},
    },
    "train-features": {
        **{"--recipe": "x", "--backbone": None, "--train_data_dir": None, "--output_dir": None, "--config": None},
        **{"--feature_space": "x dinov2-s14", "--method": "x lift"},
        **{"--depths": "1 9 x", "--image_normalization": "x half"},
        **{"--help": ""},
    },
    "evaluate-features": {
        **{"--task": "segmentation drift depth x", "--output_dir": None},
        **{"--upsamplers": "bilinear x x=y =", "--seed": "x"},
        **{"--backbone": None, "--dataset": "voc camvid x", "--data_dir": None},
        **{"--limit": "1 0 x", "--device": "hpu x cpu"},
        **{"--train_images": None, "--train_targets": None, "--num_classes": "2 0 x"},
        **{"--depth_model": None, "--help": ""},
    },
    "demo": {
        **{"--model": None, "--vae": None, "--latent_space": "x", "--text_to_image": None, "--upsampler": None},
        **{"--device": "hpu x meta", "--max_pixels": "0 -1 x", "--port": "0 99999 x -1"},
        **{"--auth": "x : :x x:", "--help": ""},
    },
}
"""Every command's flags, and words of which one is the value; None: the name of a file, a folder or a model."""

_BASES = {
    "upscale": ["photo.png", "--output", "large.png", "--model", "local", "--device", "cpu"],
    "features": ["photo.png", "--output", "large.png", "--model", "features", "--device", "cpu"],
    "fetch": ["unsplash-lite", "--dataset", "photos", "--output", "large"],
    "train": [
        *("--recipe", "embedded", "--vae", "local/vae", "--train_data_dir", "photos", "--output_dir", "run"),
        *("--max_train_steps", "1", "--resolution", "64", "--train_batch_size", "1", "--mixed_precision", "no"),
    ],
    "evaluate": [
        *("--data_dir", "photos", "--methods", "bicubic", "--scales", "2", "--crop", "32", "--limit", "1"),
        *("--latency_repeats", "0", "--output_dir", "report", "--device", "cpu"),
    ],
    "train-features": [
        *("--backbone", "features/backbone", "--train_data_dir", "photos", "--output_dir", "run"),
        *("--max_train_steps", "1", "--resolution", "32", "--train_batch_size", "1"),
    ],
    "evaluate-features": [
        "--task",
        "drift",
        "--output_dir",
        "report",
        "--backbone",
        "features/backbone",
        "--limit",
        "1",
    ],
    "demo": ["--port", "0"],
}
_COMMANDS = (*("upscale",) * 12, *("features",) * 3, *("train",) * 3, *("evaluate",) * 2, *_BASES)
_MUST_BE_WRONG = ("demo",)
"""Commands that would go on for ever if nothing were wrong: their base is wrong and stays."""


def prepare(folder: Path, *, in_process: bool = False) -> Callable[[int], tuple[str, str]]:
    """
    Save models and photographs below `folder`, which the command lines name.

    Args:
        in_process: run every case in a process of its own, where the environment is odd before Python begins; else
            all of them in this one.
    Returns:
        The function that tries the case of a seed: what happened (`opened` for exit code 0, `refused` for another
        that is as it should be, or `traceback`), and the command line with what it said.
    """
    world, place = folder / "world", folder / "place"
    save_models(world)
    _make_files(world)

    def attempt(seed: int) -> tuple[str, str]:
        rng = np.random.default_rng(seed)
        command, arguments = _command_line(rng)
        environment = dict(_pick(rng, _ENVIRONMENTS if command in ("upscale", "features") else ({},)))
        streams = _pick(rng, ("open", "open", "open", "open", "none", "full", "closed"))
        if in_process:
            environment |= _pick(rng, _ENVIRONMENTS_OF_PROCESSES)
        run = _run_in_process if in_process else _run_here
        shutil.copytree(world, place, symlinks=True, copy_function=_copy)
        try:
            code, told = run(arguments, place, environment, streams)
        finally:
            shutil.rmtree(place)
        words = f"{environment!s:.300} {streams} {arguments!r:.600}: {code} {told!r:.600}"
        return _judge(command, code, told), words

    return attempt


def _judge(command: str | None, code: object, told: str) -> str:
    lines = told.splitlines()
    is_told = len(lines) == 1 if code == 2 else len(lines) >= 1 or code in (0, None)
    has_raw = any(character < " " and character not in "\n\r" for character in told)
    is_fine = code in (0, 1, 2, 130) and "Traceback" not in told and is_told and not has_raw
    return ("opened" if code == 0 else "refused") if is_fine else "traceback"


def _command_line(rng: np.random.Generator) -> tuple[str | None, list[str]]:
    """A command and its arguments, beginning as ones that are right, with one to four changes."""
    command = _pick(rng, _COMMANDS)
    if rng.random() < 0.04:
        return None, [str(_pick(rng, _ODD)) for _ in range(int(rng.integers(3)))]
    arguments, flags = list(_BASES[command]), _FLAGS[command]
    kept = len(arguments) if command in _MUST_BE_WRONG else 0
    for _ in range(int(rng.integers(1, 5))):
        kind = int(rng.integers(6))
        at = int(rng.integers(kept, len(arguments) + 1))
        if kind == 0 and at < len(arguments):
            del arguments[at]
        elif kind == 1 and at < len(arguments):
            if _is_costly(arguments, at):
                continue
            arguments[at] = _value(rng, arguments[at - 1] if at else "", flags)
        elif kind == 2:
            arguments.insert(at, _pick(rng, _ODD))
        else:
            flag = _pick(rng, sorted(flags))
            value = [] if flags[flag] == "" else [_value(rng, flag, flags)]
            if value and rng.random() < 0.2:
                flag, value = f"{flag}={value[0]}", []
            arguments += [flag, *value]
    if command in _MUST_BE_WRONG and "--port" not in arguments[:1]:
        arguments[:0] = _BASES[command]
    return command, [command, *arguments]


def _is_costly(arguments: list[str], at: int) -> bool:
    """Whether the argument keeps a training short, which a large number would make one of days."""
    return at > 0 and arguments[at - 1] in ("--max_train_steps", "--resolution", "--train_batch_size", "--limit")


def _value(rng: np.random.Generator, flag: str, flags: dict[str, str | None]) -> str:
    if rng.random() < 0.35:
        return _pick(rng, _ODD)
    words = flags.get(flag)
    if words:
        return _pick(rng, words.split(" "))
    if flag.startswith("--output"):
        return _pick(rng, _OUTPUTS)
    return _pick(rng, (*_MODELS, *_PHOTOS) if flag in flags else _PHOTOS)


def _run_here(arguments: list[str], place: Path, environment: dict[str, str], streams: str) -> tuple[object, str]:
    told = io.StringIO()
    with contextlib.chdir(place), _environment(environment), _output(streams) as output:
        before, sys.stdout, sys.stderr = (sys.stdout, sys.stderr), output, told
        try:
            code = main(arguments)
        finally:
            sys.stdout, sys.stderr = before
    return code, told.getvalue()


def _run_in_process(
    arguments: list[str], place: Path, environment: dict[str, str], streams: str
) -> tuple[object, str]:
    root = Path(__file__).parent.parent
    variables = {**os.environ, "PYTHONPATH": str(root), **environment}
    command = [sys.executable, "-m", "uplift_diffusers", *arguments]
    try:
        with _output("open" if streams == "none" else streams) as output:
            shell = ["sh", "-c", 'exec "$@" >&-', "sh"] if streams in ("none", "closed") else []
            result = subprocess.run(
                [*shell, *command],
                cwd=place,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output if streams == "full" else subprocess.PIPE,
                stderr=subprocess.PIPE,
                timeout=MAX_WAITING_S,
            )
    except (ValueError, OSError):  # an argument that no system takes
        return 2, "no process takes this"
    return result.returncode, result.stderr.decode(errors="backslashreplace")


@contextlib.contextmanager
def _output(streams: str) -> Iterator[io.TextIOBase | None]:
    """A standard output: open, none, one that is closed, or one of a full disk."""
    if streams == "none":
        yield None
    elif streams == "full":
        with contextlib.suppress(OSError), open("/dev/full", "w") as file:
            yield file
    else:
        buffer = io.StringIO()
        if streams == "closed":
            buffer.close()
        yield buffer


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _make_files(world: Path) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    for name in ("photo.png", "b.jpg", "c.gif", "there.png", "photos/a.png", "photos/a.gif", "photos/deep/b.webp"):
        (world / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(world / name)
    for name in ("broken.png", "photos/broken.jpg", "text.txt", "photos/notes.txt", "odd\x1b[31m\n.png"):
        (world / name).write_bytes(b"not pixels at all")
    (world / "empty").mkdir()
    (world / "dangling.png").symlink_to("nowhere.png")
    (world / "loop").symlink_to("loop")
    os.mkfifo(world / "pipe.png")
    (world / "model_index.json").write_text("{}")


def _copy(source: str, target: str) -> None:
    """A link in place of a copy, which is what the commands are not allowed to change."""
    if os.path.isfile(source):
        os.link(source, target)
    else:
        os.mkfifo(target)


def _pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]
