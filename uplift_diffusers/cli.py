"""Command line of the package: `uplift-diffusers upscale`."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uplift_diffusers._version import __version__
from uplift_diffusers.embedded import embedded_bundle
from uplift_diffusers.runtime import local_device_index, process_share, sum_over_processes
from uplift_diffusers.scale import MAX_SCALE, num_steps_for_scale, scaled_size

# torch, diffusers and Pillow are imported where they are needed: --help and a mistyped flag have to answer at once.
if TYPE_CHECKING:
    import torch

    from uplift_diffusers.pipelines.super_resolution import UPLiFTSuperResolutionPipeline

MAX_OUTPUT_PIXELS = 100_000_000
"""Pixels of the largest image that is made, which lies in memory as a Pillow image with four bytes for each."""

MAX_SEED = 2**63 - 1

_UPSCALE_EPILOG = f"""\
INPUT and --output:
  One file goes to a file, whose suffix picks the format, or into a folder that exists or is written with a / at the
  end. Several inputs, or a folder with all that is below it, go into a folder, which is created. File names and the
  tree below an input folder are kept; what is hidden (.name) is left out. Outputs have the format of their input
  where that is png, jpg, jpeg, webp, tif, tiff or bmp, and are png where it is gif or another one.

What becomes of a picture:
  Every output has round(scale * width) by round(scale * height) pixels. Greyscale, alpha and 16-bit greyscale (png,
  tiff) are kept; 16-bit colour becomes 8-bit. Where the output has no alpha (jpg, bmp) the picture is laid on white.
  jpg has quality 95 without chroma subsampling, webp quality 95, the others are lossless. The colour profile and what
  EXIF says of the picture are kept, but the orientation is applied and its tag left out. Of an animation or a
  document of several pages the first one is taken.

  Inputs over 100 megapixels are refused, and so are outputs over {MAX_OUTPUT_PIXELS / 1e6:g}. A picture is made
  at the next power of two of the scale and then reduced; it is the size that it is made at that counts.

Running it again:
  Inputs are never replaced. Existing outputs are kept: for a single file that is an error, of a folder or several
  files the others are made. So the same command takes an interrupted job up again. Nothing is ever half-written.
  The same input, seed, model, kind of device and versions give the same output, alone or in a folder.

Several devices or machines:
  accelerate launch -m uplift_diffusers upscale ... splits the files over the processes that it starts, one for each
  GPU, and says at the end what all of them did. Outputs are the same.

Exit code:
  0    every output is written, or was there already
  1    some inputs could not be enlarged; each is named on stderr, the other ones are done
  2    nothing was begun: an argument is wrong, the output exists or cannot be written, the model does not load
  130  interrupted by Ctrl-C

Examples:
  uplift-diffusers upscale photo.jpg --output large.png
  uplift-diffusers upscale photo.jpg --output large/ --scale 3.5
  uplift-diffusers upscale holiday/ --output holiday_4x --scale 4
  uplift-diffusers upscale photo.jpg --output large.jpg --model UPLiFT-upsampler/uplift_sd1.5vae \\
      --vae stable-diffusion-v1-5/stable-diffusion-v1-5
"""


_FETCH_EPILOG = """\
Unsplash-Lite:
  Unsplash lets you use the photographs of its Lite dataset internally, to train machine-learning models. You must not
  publish them or pass them on. By downloading them you accept its terms: https://unsplash.com/data-terms

  Its archive, which https://github.com/unsplash/datasets links to, holds the addresses of 25,000 photographs. They
  are fetched at --size as JPEG of quality 95, to DIR/<photo_id>.jpg.

  Every file appears whole, after its image was decoded. What is there already is left alone, so the same command
  takes an interrupted one up again. What cannot be had is listed in DIR/unavailable.tsv: `gone` for addresses that
  lead nowhere any more, `failed` for what may be there the next time.

Exit code:
  0    every photograph is there, or gone
  1    some photographs failed, or the connection did; run the same command again
  2    nothing was begun: an argument is wrong, or the dataset is damaged
  130  interrupted by Ctrl-C

Example:
  uplift-diffusers fetch unsplash-lite --dataset unsplash-lite-1.4.1.zip --output photos \\
      --sha256 aa0fcb859040ed64e93817d1d878d0c6f861763283261ba1a6aa5d8d4af6aec6
"""


class CommandError(Exception):
    """What keeps a command from beginning and a person can put right: one line and the exit code 2."""


@dataclass(frozen=True)
class Task:
    """One image file to enlarge."""

    source: Path
    target: Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments`, by default those of the process, and return its exit code."""
    parser = _build_parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # after --help, --version and errors in the arguments
        return stop.code or 0
    try:
        return options.run(options)
    except CommandError as error:
        print(f"{parser.prog} {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The outputs written so far are whole.", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="uplift-diffusers",
        description="Make images larger in latent space.",
        epilog="uplift-diffusers COMMAND --help says more.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"uplift-diffusers {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_upscale(commands)
    _add_fetch(commands)
    return parser


def _add_command(
    commands: argparse._SubParsersAction, run: Callable[[argparse.Namespace], int], purpose: str, *, epilog: str
) -> argparse.ArgumentParser:
    """The parser of a command named after the function that it runs."""
    parser = commands.add_parser(
        run.__name__,
        help=purpose,
        description=f"{purpose.capitalize()}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _add_upscale(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(commands, upscale, "enlarge image files and folders of them", epilog=_UPSCALE_EPILOG)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image file, or folder of them")
    parser.add_argument("--output", required=True, metavar="PATH", help="file or folder to write")
    parser.add_argument(
        "--scale", type=_parse_scale, default=2.0, help=f"any number from 1 to {MAX_SCALE} (default: 2)"
    )
    parser.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        help="a saved UPLiFTSuperResolutionPipeline, or a UPLiFTModel, which needs --vae too (default: the small one "
        "that comes with the package)",
    )
    parser.add_argument(
        "--vae", metavar="DIR_OR_HUB_ID", help="a VAE, or a pipeline with a folder vae, instead of the model's own"
    )
    parser.add_argument(
        "--latent_space",
        metavar="NAME",
        help="declares whose latents the VAE speaks, such as sd15-vae, where its configuration does not say so",
    )
    parser.add_argument(
        "--seed", type=_parse_seed, default=0, metavar="N", help="seed of every image's noise (default: 0)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps, ... (default: auto)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the computation: bfloat16 takes about half the time on CPUs with AVX512_BF16 (default: float32)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")


def _add_fetch(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(commands, fetch, "download the photographs that a dataset lists", epilog=_FETCH_EPILOG)
    parser.add_argument("name", choices=("unsplash-lite",), metavar="NAME", help="unsplash-lite")
    parser.add_argument(
        "--dataset", required=True, metavar="PATH", help="the dataset as published: its archive, or the folder of it"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the photographs")
    parser.add_argument(
        "--size",
        type=_parse_count,
        default=1024,
        help="pixels of the short side, or as many as there are (default: 1024)",
    )
    parser.add_argument("--jobs", type=_parse_count, default=8, metavar="N", help="downloads at a time (default: 8)")
    parser.add_argument(
        "--sha256", metavar="HEX", help="what the SHA-256 of PATH must be; of a folder, of its photos.tsv000"
    )


def _parse_count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _parse_scale(text: str) -> float:
    try:
        scale = float(text)
        num_steps_for_scale(scale)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {MAX_SCALE}, got {text!r}") from None
    return scale


def _parse_seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= MAX_SEED):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {MAX_SEED}, got {text!r}")
    return int(text)


def upscale(options: argparse.Namespace) -> int:
    """The command `upscale`; its `--help` is its contract."""
    # 1. Everything that can be wrong is looked at before torch is imported, which takes seconds
    index, count = process_share()
    # A share of all tasks and not of those that wait, which become fewer while other processes write.
    tasks = plan_tasks(options.inputs, options.output)[index::count]
    waiting = tasks if options.overwrite else [task for task in tasks if not os.path.lexists(task.target)]
    num_there = len(tasks) - len(waiting)
    if num_there and not _is_batch(options.inputs):
        raise CommandError(f"{tasks[0].target} exists. Pass --overwrite to replace it.")
    written = 0
    if waiting:
        _check_writable(waiting[0].target.parent if not _is_batch(options.inputs) else Path(options.output))

        # 2. Load
        device = choose_device(options.device)
        pipeline = load_pipeline(options.model, options.vae, options.latent_space, dtype=options.dtype)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)

        # 3. Enlarge, one file at a time
        written = _upscale_files(
            waiting, pipeline, scale=options.scale, seed=options.seed, overwrite=options.overwrite
        )

    # 4. Say what was done, once for all processes
    written, num_there, num_skipped = sum_over_processes(written, num_there, len(waiting) - written)
    if index == 0:
        print(_summary(written=written, there=num_there, skipped=num_skipped))
    return 0 if num_skipped == 0 else 1


def fetch(options: argparse.Namespace) -> int:
    """The command `fetch`; its `--help` is its contract."""
    try:
        from uplift_diffusers.data.unsplash import TERMS, check_folder, fetch_photos, read_photos
    except ImportError as error:
        raise CommandError("fetch needs httpx: pip install 'uplift-diffusers[train]'.") from error

    try:
        photos = read_photos(options.dataset, sha256=options.sha256)
    except (OSError, ValueError) as error:
        raise CommandError(f"--dataset: {error}") from error
    try:
        check_folder(Path(options.output), options.size)
    except (OSError, ValueError) as error:
        raise CommandError(f"--output: {error}") from error
    print(TERMS)
    try:
        summary = fetch_photos(photos, options.output, size=options.size, jobs=options.jobs)
    except OSError as error:
        print(f"{options.output}: {reason(error)}", file=sys.stderr)
        return 1
    counts = {"fetched": summary.fetched, "there": summary.there, "gone": summary.gone, "failed": summary.failed}
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    return 1 if summary.failed else 0


def plan_tasks(inputs: list[str], output: str) -> list[Task]:
    """
    Which file goes where.

    Args:
        inputs: files and folders.
        output: a file or a folder, as `upscale --help` says.
    Raises:
        CommandError: an input is missing, `output` is not of the right kind, two inputs would go to one output or an
            output would replace an input.
    """
    from uplift_diffusers.images.files import INPUT_SUFFIXES, OUTPUT_FORMATS

    for source in inputs:
        if not os.path.exists(source):
            raise CommandError(f"{source}: no such file or folder.")
    known = ", ".join(OUTPUT_FORMATS)
    target = Path(output)
    is_folder = os.path.isdir(target) or output.endswith(("/", os.sep))
    if not _is_batch(inputs) and not is_folder:
        if target.suffix.lower() not in OUTPUT_FORMATS:
            raise CommandError(
                f"--output must end in {known} or be a folder, got {output}. Write {output}/ for a new folder."
            )
        tasks = [Task(Path(inputs[0]), target)]
    else:
        if not os.path.isdir(target) and os.path.lexists(target):
            raise CommandError(f"--output must be a folder, got the file {output}.")
        if not is_folder and target.suffix.lower() in INPUT_SUFFIXES:
            raise CommandError(
                f"--output must be a folder for several inputs or a folder, got {output}. "
                f"Write {output}/ if a folder of that name is meant."
            )
        tasks = [task for source in inputs for task in _tasks_below(Path(source), target)]
    _check_conflicts(tasks)
    return list(dict.fromkeys(tasks))  # an input that was named twice


def _tasks_below(source: Path, folder: Path) -> list[Task]:
    from uplift_diffusers.images.files import INPUT_SUFFIXES, OUTPUT_FORMATS, find_image_files

    if not os.path.isdir(source):
        files, root = [source], source.parent
    else:
        inside_itself = folder.resolve() != source.resolve()  # an output folder below its input is no input
        files, root = list(find_image_files(source, leave_out=folder if inside_itself else None).files), source
        if not files:
            raise CommandError(f"{source}: no images in this folder. Known are {', '.join(sorted(INPUT_SUFFIXES))}.")
    targets = [folder / file.relative_to(root) for file in files]
    return [
        Task(file, target if target.suffix.lower() in OUTPUT_FORMATS else target.with_suffix(".png"))
        for file, target in zip(files, targets, strict=True)
    ]


def _check_conflicts(tasks: list[Task]) -> None:
    source_of = {}
    for task in tasks:
        other = source_of.setdefault(os.path.normcase(os.path.abspath(task.target)), task.source)
        if other != task.source:
            raise CommandError(f"{other} and {task.source} would both become {task.target}. Enlarge them one by one.")
    inputs = {_identity(task.source) for task in tasks}
    for task in tasks:
        if os.path.isdir(task.target):
            raise CommandError(f"{task.target} is a folder where an output would go. Name another --output.")
        if os.path.exists(task.target) and _identity(task.target) in inputs:
            raise CommandError(f"{task.target} is an input and would be replaced. Name another --output.")


def _identity(path: Path) -> tuple[int, int]:
    """The same for every name of a file: links to it, and capital letters where they do not matter."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def _is_batch(inputs: list[str]) -> bool:
    return len(inputs) > 1 or os.path.isdir(inputs[0])


def _check_writable(folder: Path) -> None:
    from uplift_diffusers.saving import make_writable_folder

    try:
        make_writable_folder(folder)
    except OSError as error:
        raise CommandError(f"--output: cannot write into the folder {folder}: {reason(error)}") from error


def choose_device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        index = local_device_index()
        cuda = "cuda" if index is None else f"cuda:{index}"
        available = ((cuda, torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
        name = next((kind for kind, is_there in available if is_there), "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" is a device, but nothing can be computed there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"--device must be auto, cpu or a device that PyTorch finds here, got {name!r}.") from error
    return device


def load_pipeline(
    model: str | None, vae: str | None, latent_space: str | None, *, dtype: str = "float32"
) -> "UPLiFTSuperResolutionPipeline":
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar
    from huggingface_hub.errors import HTTPError  # of the HTTP library, whichever it is

    from uplift_diffusers.loading import load_vae
    from uplift_diffusers.models.upsampler import UPLiFTModel
    from uplift_diffusers.pipelines.super_resolution import UPLiFTSuperResolutionPipeline

    expected = (OSError, ValueError, TypeError, RuntimeError, ImportError, HTTPError)
    disable_progress_bar()
    kind = {"dtype": getattr(torch, dtype)}
    if model is None:
        model = str(embedded_bundle())
        if not os.path.isdir(model):
            raise CommandError("the model that comes with the package is not installed. Name one with --model.")

    try:
        components = {"vae": load_vae(vae, **kind)} if vae is not None else {}
    except expected as error:
        raise CommandError(f"--vae {vae} cannot be loaded: {reason(error)}") from error
    try:
        config = DiffusionPipeline.load_config(model)
    except expected as error:
        if vae is None and not os.path.exists(model):
            raise CommandError(
                f"--model {model} cannot be loaded as a pipeline: {reason(error)} A UPLiFTModel needs --vae."
            ) from error
        if vae is None:
            raise CommandError(f"--model {model} is not a pipeline. If it is a UPLiFTModel, name a --vae.") from error
        config = None
    if config is not None and not {"vae", "upsampler"} <= config.keys():
        raise CommandError(f"--model must be a UPLiFTSuperResolutionPipeline, got a {config.get('_class_name')}.")
    try:
        if config is None:
            upsampler = UPLiFTModel.from_pretrained(model, **kind)
            return UPLiFTSuperResolutionPipeline(**components, upsampler=upsampler, latent_space=latent_space)
        if latent_space is not None:
            components["latent_space"] = latent_space
        return UPLiFTSuperResolutionPipeline.from_pretrained(model, **components, **kind)
    except expected as error:
        raise CommandError(f"--model {model} cannot be loaded: {reason(error)}") from error


def _upscale_files(
    tasks: list[Task], pipeline: "UPLiFTSuperResolutionPipeline", *, scale: float, seed: int, overwrite: bool
) -> int:
    """Work through `tasks`, tell of each that fails, and return how many are written."""
    from tqdm import tqdm

    written = 0
    hidden = None if process_share()[0] == 0 else True  # None: only in a terminal
    with tqdm(tasks, unit="file", disable=hidden, dynamic_ncols=True) as progress:
        for task in progress:
            try:
                losses = _upscale_file(task, pipeline, scale=scale, seed=seed, overwrite=overwrite)
            except (OSError, ValueError, RuntimeError, MemoryError) as error:
                tqdm.write(f"{task.source}: {reason(error)}", file=sys.stderr)
                continue
            written += 1
            for loss in losses:
                tqdm.write(f"{task.source}: {loss}", file=sys.stderr)
    return written


def _upscale_file(
    task: Task, pipeline: "UPLiFTSuperResolutionPipeline", *, scale: float, seed: int, overwrite: bool
) -> tuple[str, ...]:
    """Enlarge one file and return what it lost on the way, in sentences."""
    import torch

    from uplift_diffusers.images.files import open_image, plan_saving, save_image

    opened = plan_saving(open_image(task.source), task.target.suffix)
    check_output_size(opened.image.size, scale, task.target.suffix)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every device
    enlarged = pipeline(image=opened.image, scale=scale, generator=generator).images[0]
    task.target.parent.mkdir(parents=True, exist_ok=True)
    save_image(enlarged, task.target, metadata=opened.metadata, overwrite=overwrite)
    return opened.losses


def check_output_size(
    size: tuple[int, int], scale: float, suffix: str, *, max_pixels: int = MAX_OUTPUT_PIXELS
) -> None:
    from uplift_diffusers.images.files import MAX_EDGES, OUTPUT_FORMATS

    num_steps = num_steps_for_scale(scale)
    width, height = (edge * 2**num_steps for edge in size)
    if num_steps and width * height > max_pixels:
        raise ValueError(
            f"{size[0]} x {size[1]} pixels would be enlarged to {width} x {height}, "
            f"more than the limit of {max_pixels / 1e6:g} megapixels."
        )
    width, height = scaled_size(size, scale)
    max_edge = MAX_EDGES.get(OUTPUT_FORMATS[suffix.lower()], max(width, height))
    if max(width, height) > max_edge:
        raise ValueError(f"the output of {width} x {height} pixels has an edge over the {max_edge} of a {suffix}.")


def reason(error: Exception) -> str:
    """One sentence on what went wrong."""
    text = (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).strip()
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return "out of memory."
    line = text.splitlines()[0].strip() if text else type(error).__name__
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _summary(*, written: int, there: int, skipped: int) -> str:
    counts = ((written, "written"), (there, "already there"), (skipped, "skipped"))
    return ", ".join(f"{count} {what}" for count, what in counts if count or what == "written")
