"""
Kills at random moments: python -m benchmarks.kills --folders 75 --trainings 25 --seconds 1800 --seed 0

A folder job or a training is started in a separate process and gets a signal (SIGKILL, SIGTERM, SIGHUP, SIGINT) at a
random moment: during start-up, at any time, or just after a file has appeared. The same command is run again, with
several kills per job, and finally runs to the end. Counted after every kill: outputs that are neither complete nor
unchanged (`half`), and files left behind by a process that could have cleaned up (`left`). Counted at the end: outputs
that differ from those of an uninterrupted run (`wrong`), and unexpected files (`left`).
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from uplift_diffusers import AutoencoderLocal, embedded_bundle
from uplift_diffusers.cli.main import main as uplift_diffusers
from uplift_diffusers.loading import load_pipeline
from uplift_diffusers.training import train  # noqa: F401  once, before the processes are copied

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
KILLS_OF_A_JOB = 5
SUFFIXES = (".png", ".jpg", ".webp", ".tif")
NUM_PICTURES = 8
STEPS, STEPS_OF_CHECKPOINT = 12, 2
MAX_WAITING_S = 300
"""After which a job is one that hangs."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 1 if anything happened that should not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", type=int, default=75, help="kills of folder jobs (default: 75)")
    parser.add_argument("--trainings", type=int, default=25, help="kills of trainings (default: 25)")
    parser.add_argument(
        "--seconds", type=float, default=1800, help="after which no further job is begun (default: 1800)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of moments and signals (default: 0)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # threads do not survive the copying of a process
    end = time.monotonic() + options.seconds
    faults = Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for kind, job, count in (
            ("folder jobs", FolderJob, options.folders),
            ("trainings", Training, options.trainings),
        ):
            if count:
                (root / kind).mkdir()
                faults += _kill(kind, job(root / kind), count, options.seed, end)
    return int(bool(faults))


class FolderJob:
    """`uplift-diffusers upscale FOLDER` with the embedded bundle, every other time over files that are there."""

    def __init__(self, root: Path):
        self.root = root
        rng = np.random.default_rng(0)
        for number in range(NUM_PICTURES):
            path = root / "photos" / f"{number % 3}" / f"{number}{SUFFIXES[number % len(SUFFIXES)]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).save(path)
        load_pipeline(embedded_bundle())(Image.new("RGB", (16, 16)))  # what it imports is imported here
        self.seconds = _run(self.arguments(root / "whole"))
        self.whole = _digests(root / "whole")
        if len(self.whole) != NUM_PICTURES:
            raise RuntimeError(f"An undisturbed job must write {NUM_PICTURES} files, got {len(self.whole)}.")

    def prepare(self, output: Path, number: int) -> None:
        """Before the first run of a job."""
        self.before = {}
        if number % 2:
            for name in self.whole:
                (output / name).parent.mkdir(parents=True, exist_ok=True)
                (output / name).write_bytes(b"precious")
            self.before = _digests(output)
        self.overwrites = bool(number % 2)

    def arguments(self, output: Path) -> list[str]:
        overwrite = ["--overwrite"] if getattr(self, "overwrites", False) else []
        return ["upscale", str(self.root / "photos"), "--output", str(output), "--device", "cpu", *overwrite]

    def half(self, output: Path) -> list[str]:
        """Outputs that are neither whole nor what was there."""
        found = {name: digest for name, digest in _digests(output).items() if not _is_partial(name)}
        lost = self.before.keys() - found.keys()
        return sorted(lost) + [
            name for name, digest in found.items() if digest not in (self.whole.get(name), self.before.get(name))
        ]

    def wrong(self, output: Path) -> list[str]:
        """Outputs that differ from those of an undisturbed run, after the last one."""
        found = _digests(output)
        return [name for name, digest in self.whole.items() if found.get(name) != digest]

    def left(self, output: Path) -> list[str]:
        """Files that nobody asked for, after the last run."""
        return sorted(_digests(output).keys() - self.whole.keys())


class Training:
    """`uplift-diffusers train` of a few steps, with a small VAE."""

    def __init__(self, root: Path):
        self.root = root
        torch.manual_seed(0)
        blocks = {"block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
        AutoencoderLocal(latent_channels=8, latent_space="kills", **blocks).save_pretrained(root / "vae")
        rng = np.random.default_rng(0)
        (root / "photos").mkdir()
        for number in range(5):
            Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)).save(root / "photos" / f"{number}.png")
        self.seconds = _run(self.arguments(root / "whole"))
        self.whole = self.read(root / "whole")
        self.files = set(_digests(root / "whole"))

    def prepare(self, output: Path, number: int) -> None:
        """Before the first run of a job."""

    def arguments(self, output: Path) -> list[str]:
        return [
            *("train", "--recipe", "embedded", "--vae", str(self.root / "vae"), "--output_dir", str(output)),
            *("--train_data_dir", str(self.root / "photos"), "--resolution", "64", "--train_batch_size", "1"),
            *("--max_train_steps", str(STEPS), "--checkpointing_steps", str(STEPS_OF_CHECKPOINT), "--depths", "1"),
            *("--logging_steps", "1", "--mixed_precision", "no", "--resume_from_checkpoint", "if-any"),
        ]

    def half(self, output: Path) -> list[str]:
        """Checkpoints that lack a file or have another one than they say, and a result that is not whole."""
        found = []
        for checkpoint in output.glob("checkpoint-*"):
            checksums = json.loads((checkpoint / "checksums.json").read_text())
            found += [f"{checkpoint.name}/{name}" for name in _broken(checkpoint, checksums)]
        result = "diffusion_pytorch_model.safetensors"
        if (output / result).exists() and _digest(output / result) != self.whole[result]:
            found.append(result)
        return found

    def wrong(self, output: Path) -> list[str]:
        """What differs in the result, the last checkpoint or the log from those of an undisturbed run."""
        found = self.read(output)
        return [name for name, value in self.whole.items() if found.get(name) != value]

    def left(self, output: Path) -> list[str]:
        """Files that nobody asked for, after the last run."""
        return sorted(set(_digests(output)) - self.files)

    @staticmethod
    def read(output: Path) -> dict[str, object]:
        """The result and the last checkpoint, by their digests, and what was logged of every step."""
        last = output / f"checkpoint-{STEPS}"
        tensors = [output / "diffusion_pytorch_model.safetensors", *sorted(last.glob("*.safetensors"))]
        found: dict[str, object] = {str(path.relative_to(output)): _digest(path) for path in tensors if path.exists()}
        for line in (output / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            losses = {key: value for key, value in record.items() if key not in ("images_per_s", "time")}
            found[f"line of step {record['step']}"] = losses
        found["lines"] = len((output / "metrics.jsonl").read_text().splitlines())
        return found


def _kill(kind: str, job: FolderJob | Training, count: int, seed: int, end: float) -> Counter[str]:
    """Kill `count` runs of `job`, tell what went wrong, and return how often."""
    faults, signals, rng = Counter(), Counter(), np.random.default_rng(seed)
    begun, kills, number = time.monotonic(), 0, 0

    def note(fault: str, names: list[str]) -> None:
        faults[fault] += len(names)
        for name in names:
            print(f"{kind}, seed {seed}, job {number}, after {kills} kills: {fault} {name}", flush=True)

    while kills < count and time.monotonic() < end:
        output = job.root / f"job {number}"
        job.prepare(output, number)
        for _ in range(min(KILLS_OF_A_JOB, count - kills)):
            sent = SIGNALS[int(rng.integers(len(SIGNALS)))]
            code = _run_and_kill(job.arguments(output), output, sent, _moment(rng, output, job.seconds))
            if code is None:  # it was done before
                break
            kills += 1
            signals[sent.name] += 1
            note("half", job.half(output))
            if sent != signal.SIGKILL and code > 0:
                note("left", [name for name in _digests(output) if _is_partial(name)])
            if code not in (-sent, 128 + sent, 0):
                note("exit code", [str(code)])
        _run(job.arguments(output))
        note("wrong", job.wrong(output))
        note("left", job.left(output))
        number += 1
    by_signal = ", ".join(f"{name} {times}" for name, times in sorted(signals.items()))
    found = ", ".join(f"{faults[name]} {name}" for name in ("half", "wrong", "left", "exit code"))
    print(f"{kills} kills ({by_signal}) of {number} {kind} in {time.monotonic() - begun:.0f} s: {found}", flush=True)
    return +faults


def _moment(rng: np.random.Generator, output: Path, seconds: float) -> Iterator[None]:
    """Ends when the signal is to be sent: after a random time, or shortly after a random number of new files."""
    wait, count = rng.uniform(0, 1.1 * seconds), _count(output) + int(rng.integers(1, NUM_PICTURES))
    begun, soon = time.monotonic(), float(rng.uniform(0, 0.05))
    if rng.random() < 0.5:
        while time.monotonic() - begun < wait:
            yield
        return
    while _count(output) < count:
        yield
    begun = time.monotonic()
    while time.monotonic() - begun < soon:
        yield


def _run_and_kill(arguments: list[str], output: Path, sent: int, moment: Iterator[None]) -> int | None:
    """The exit code of a run that got a signal at `moment`; None if it was done before."""
    process = _start(arguments)
    for _ in moment:
        if not process.is_alive():
            process.join()
            if process.exitcode:
                raise RuntimeError(f"{arguments} failed with {process.exitcode}.")
            return None
        time.sleep(0.01)
    os.kill(process.pid, sent)
    process.join(MAX_WAITING_S)
    if process.exitcode is None:
        process.kill()
        raise RuntimeError(f"{arguments} did not end after {signal.Signals(sent).name}.")
    return process.exitcode


def _run(arguments: list[str]) -> float:
    """Run a command to the end; returns its duration in seconds."""
    begun, process = time.monotonic(), _start(arguments)
    process.join(MAX_WAITING_S)
    if process.exitcode != 0:
        process.kill()
        raise RuntimeError(f"{arguments} failed with {process.exitcode}.")
    return time.monotonic() - begun


def _start(arguments: list[str]) -> multiprocessing.Process:
    """A command in a process of its own, a copy of this one, so that torch is imported once for all of them."""
    process = multiprocessing.get_context("fork").Process(target=_command, args=(arguments,))
    process.start()
    return process


def _command(arguments: list[str]) -> None:
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        os._exit(uplift_diffusers(arguments))


def _is_partial(name: str) -> bool:
    return ".uplift-" in name


def _count(folder: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below `folder`, by its path there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        try:
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = _digest(path)
        except FileNotFoundError:  # a partial one, which the process has renamed meanwhile
            pass
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _broken(checkpoint: Path, checksums: dict[str, str]) -> list[str]:
    return [name for name, digest in checksums.items() if _digest(checkpoint / name) != digest]


if __name__ == "__main__":
    sys.exit(main())
