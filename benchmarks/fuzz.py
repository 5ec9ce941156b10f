"""
Fuzzing with hostile input: python -m benchmarks.fuzz --part files --count 20000 --seconds 300 --seed 0

- files: images of every supported format, with some bytes changed, moved, repeated or cut off. Each is opened, and if
  that succeeds, a small part is saved. Expected: an image, or an OSError or ValueError with a one-line message.
- models: damaged folders of saved pipelines, see `fuzz_models`. Expected: a pipeline, or one sentence.
- commands: command lines of `uplift-diffusers`, see `fuzz_commands`. Expected: an exit code listed in `--help`, and
  one line on stderr if nothing was started. `processes` runs each in a separate process with an unusual environment,
  which takes ten times as long.

Each case depends only on its seed: `--seed N --count 1` repeats one. Other exceptions, more than ten seconds of work,
executed code, started processes and crashes of the interpreter are counted, and their seeds printed.
"""

import argparse
import faulthandler
import io
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from uplift_diffusers.images.files import INPUT_FORMATS, OUTPUT_FORMATS, open_image, plan_saving, save_image

MAX_SECONDS = 10
"""Of work on one case, in processor time."""

MAX_WAITING_S = 400
"""Of one case in all, after which its process is ended."""

MAX_MEMORY_BYTES = 16 * 2**30
"""Of address space, so that a case that asks for more gets an error instead of the machine."""

PARTS = ("files", "models", "commands", "processes")

_PROCESS_EVENTS = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn")
_FINE = ("opened", "refused")
_FAULTS = ("traceback", "hang", "code", "process", "crash")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 1 if anything happened that should not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="files", help="(default: files)")
    parser.add_argument("--count", type=int, default=2000, help="cases (default: 2000)")
    parser.add_argument("--seconds", type=float, default=300, help="after which it ends (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case (default: 0)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return _work(options.part, options.seed, options.count, options.seconds)

    begun, seed, counts = time.monotonic(), options.seed, Counter()
    end = options.seed + options.count
    while seed < end and (left := options.seconds - (time.monotonic() - begun)) > 0:
        command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", "--part", options.part, "--seed", str(seed)]
        command += ["--count", str(end - seed), "--seconds", str(left)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # names of repositories are asked for nowhere
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as worker:
            current = seed
            for line in worker.stdout:
                kind, number, *rest = line.rstrip("\n").split("\t")
                current = int(number)
                if kind != "begin":
                    counts[kind] += 1
                if kind in _FAULTS:
                    print(f"seed {current}: {kind} {' '.join(rest)}", flush=True)
        if worker.returncode == 0:
            break
        counts["crash"] += 1
        print(f"seed {current}: the interpreter ended with {worker.returncode}", flush=True)
        seed = current + 1
    tried = sum(counts[kind] for kind in (*_FINE, "traceback", "code"))
    found = ", ".join(f"{counts[kind]} {kind}" for kind in (*_FINE, *_FAULTS))
    print(f"{tried} {options.part} from seed {options.seed} on in {time.monotonic() - begun:.0f} s: {found}")
    return int(any(counts[kind] for kind in _FAULTS))


def _work(part: str, first_seed: int, count: int, seconds: float) -> int:
    """Try `count` cases and print what happened, a line each."""
    with suppress(ImportError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    state = {"seed": first_seed}
    output = sys.stdout  # which a case may put something else in the place of

    def note(kind: str, *details: object) -> None:
        print(kind, state["seed"], *details, sep="\t", file=output, flush=True)

    def on_event(event: str, details: tuple) -> None:
        if event in _PROCESS_EVENTS:
            note("process", event)

    with tempfile.TemporaryDirectory() as folder:
        attempt = _prepare(part, Path(folder))
        if part in ("files", "models"):  # commands start some, such as workers that load data
            sys.addaudithook(on_event)
        begun = time.monotonic()
        for seed in range(first_seed, first_seed + count):
            if time.monotonic() - begun > seconds:
                break
            state["seed"] = seed
            note("begin")
            faulthandler.dump_traceback_later(MAX_WAITING_S, exit=True)
            started = time.process_time()
            try:
                outcome, what = attempt(seed)
            except Exception as error:
                outcome, what = "traceback", repr(error).replace("\n", " ")
                traceback.print_exception(error, file=sys.__stderr__)
            faulthandler.cancel_dump_traceback_later()
            note(outcome, what)
            if (spent := time.process_time() - started) > MAX_SECONDS:
                note("hang", what, f"{spent:.1f} s")
    return 0


def _prepare(part: str, folder: Path) -> Callable[[int], tuple[str, str]]:
    """The function that tries the case of a seed: what happened, and the case in words."""
    if part == "files":
        return _prepare_files(folder)
    # Not above: the process that starts the workers needs neither torch nor models.
    from benchmarks import fuzz_commands, fuzz_models

    if part == "models":
        return fuzz_models.prepare(folder)
    return fuzz_commands.prepare(folder, in_process=part == "processes")


def _prepare_files(folder: Path) -> Callable[[int], tuple[str, str]]:
    sources = make_sources()

    def attempt(seed: int) -> tuple[str, str]:
        name, data = damaged(sources, seed)
        try:
            _open_and_save(data, folder, seed)
        except (OSError, ValueError) as error:
            return "refused" if len(str(error).splitlines()) <= 1 else "traceback", name
        return "opened", name

    return attempt


def _open_and_save(data: bytes, folder: Path, seed: int) -> None:
    opened = open_image(io.BytesIO(data))
    suffix = sorted(OUTPUT_FORMATS)[seed % len(OUTPUT_FORMATS)]
    plan = plan_saving(opened, suffix)
    path = folder / f"a{suffix}"
    save_image(plan.image.crop((0, 0, 16, 16)), path, metadata=plan.metadata, overwrite=True)
    open_image(path)


def damaged(sources: dict[str, bytes], seed: int) -> tuple[str, bytes]:
    """The name of a source and a damaged copy of it."""
    rng = np.random.default_rng(seed)
    name = sorted(sources)[int(rng.integers(len(sources)))]
    data = bytearray(sources[name])
    for _ in range(int(rng.integers(1, 6))):
        _DAMAGES[int(rng.integers(len(_DAMAGES)))](data, rng)
    return name, bytes(data)


def _place(data: bytearray, rng: np.random.Generator) -> int:
    """Mostly near the beginning, where headers are."""
    highest = max(1, len(data))
    return int(rng.integers(min(highest, 400) if rng.random() < 0.6 else highest))


def _flip(data: bytearray, rng: np.random.Generator) -> None:
    if data:
        data[_place(data, rng) % len(data)] ^= 1 << int(rng.integers(8))


def _overwrite(data: bytearray, rng: np.random.Generator) -> None:
    at, length = _place(data, rng), int(rng.choice([1, 2, 4, 4, 16]))
    fill = [b"\0", b"\xff", b"\x7f", bytes([int(rng.integers(256))])][int(rng.integers(4))]
    data[at : at + length] = fill * len(data[at : at + length])


def _cut(data: bytearray, rng: np.random.Generator) -> None:
    del data[int(rng.integers(len(data) + 1)) :]


def _remove(data: bytearray, rng: np.random.Generator) -> None:
    at = _place(data, rng)
    del data[at : at + int(rng.integers(1, 64))]


def _repeat(data: bytearray, rng: np.random.Generator) -> None:
    at = _place(data, rng)
    piece = data[at : at + int(rng.integers(1, 64))]
    data[at:at] = piece * int(rng.integers(1, 20))


def _swap(data: bytearray, rng: np.random.Generator) -> None:
    first, second = sorted((_place(data, rng), _place(data, rng)))
    data[first : first + 8], data[second : second + 8] = data[second : second + 8], data[first : first + 8]


_DAMAGES: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (
    *(_flip, _flip, _overwrite, _overwrite, _cut, _remove, _repeat, _swap),
)


def make_sources() -> dict[str, bytes]:
    """Whole files of every format that Pillow writes and reads here, with metadata and in several modes."""
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((40, 32))
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Acme", 6
    exif[0x8769] = {0x9003: "2020:01:02 03:04:05", 0x9286: b"ASCII\0\0\0a boat"}
    exif[0x8825] = {1: "N", 2: (52.0, 30.0, 1.0)}
    packet = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a boat", zip=True)
    text.add_itxt("XML:com.adobe.xmp", packet.decode())
    text.add(b"gAMA", b"\0\1\x86\xa0")
    full = {"exif": exif.tobytes(), "icc_profile": profile, "dpi": (300, 300)}
    options = {
        "PNG": {**full, "pnginfo": text},
        "JPEG": {**full, "xmp": packet, "comment": b"a boat"},
        "TIFF": {"exif": exif.tobytes(), "icc_profile": profile, "tiffinfo": {700: packet}},
        "WEBP": {"exif": exif.tobytes(), "icc_profile": profile, "xmp": packet},
        "AVIF": {"exif": exif.tobytes(), "icc_profile": profile, "xmp": packet, "quality": 40, "speed": 10},
        "GIF": {"comment": b"a boat"},
    }
    modes = {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "JPEG": ("L", "RGB", "CMYK"),
        "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "F", "I"),
        "MSP": ("1",),
        "XBM": ("1",),
        "SGI": ("L", "RGB", "RGBA"),
        "TGA": ("L", "P", "RGB", "RGBA"),
        "GIF": ("P",),
        "PPM": ("1", "L", "RGB", "I;16"),
    }
    sources = {}
    Image.init()
    for file_format in INPUT_FORMATS:
        if file_format not in Image.SAVE:
            continue
        for mode in modes.get(file_format, ("RGB", "RGBA")):
            image = color.convert("L").convert("I") if mode in ("I", "I;16", "F") else color
            image = image.convert("LAB") if mode == "LAB" else image.convert(mode)
            buffer = io.BytesIO()
            try:
                image.save(buffer, file_format, **options.get(file_format, {}))
            except (OSError, ValueError, KeyError):
                continue  # a mode that the format does not have
            sources[f"{file_format} {mode}"] = buffer.getvalue()
    for compression in ("tiff_lzw", "packbits", "tiff_adobe_deflate", "jpeg"):
        buffer = io.BytesIO()
        color.save(buffer, "TIFF", compression=compression)
        sources[f"TIFF {compression}"] = buffer.getvalue()
    progressive, moving, pages = io.BytesIO(), io.BytesIO(), io.BytesIO()
    color.save(progressive, "JPEG", progressive=True, **options["JPEG"])
    color.save(moving, "WEBP", save_all=True, append_images=[color.rotate(90)])
    color.save(pages, "MPO", save_all=True, append_images=[color.rotate(90)])
    sources |= {"JPEG progressive": progressive.getvalue(), "WEBP moving": moving.getvalue(), "MPO": pages.getvalue()}
    sources["QOI"] = b"qoif" + bytes([0, 0, 0, 31, 0, 0, 0, 2, 3, 0, 254, 10, 20, 30, 252]) + b"\0" * 7 + b"\1"
    sources["XPM"] = (
        b'/* XPM */\nstatic char *a[] = {\n"4 2 2 1",\n". c #ff0000",\n"# c #0000ff",\n"..##",\n"##..",\n};\n'
    )
    sources["PSD"] = (
        b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\4\0\0\0\6\0\x08\0\3" + bytes(4)
        + b"\0\0\0\x1c8BIM\x03\xed\0\0\0\0\0\x10\1\x2c\0\0\0\1\0\1\1\x2c\0\0\0\1\0\1"
        + bytes(6) + bytes(range(72))
    )  # fmt: skip
    return sources


if __name__ == "__main__":
    sys.exit(main())
