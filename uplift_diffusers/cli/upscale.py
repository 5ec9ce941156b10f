"""`uplift-diffusers upscale`: upscale image files and folders."""

import argparse
import errno
import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uplift_diffusers.cli.arguments import (
    parse_denoise,
    parse_megapixels,
    parse_scale,
    parse_share,
    parse_size,
)
from uplift_diffusers.console import CommandError, as_flags, parse_count, parse_seed, say, tell
from uplift_diffusers.embedded import embedded_bundle
from uplift_diffusers.runtime import choose_device, process_share, sum_over_processes
from uplift_diffusers.saving import remove_unfinished
from uplift_diffusers.scale import MAX_SCALE, check_output_size, resolve_scale, scaled_size
from uplift_diffusers.wording import reason

# torch, diffusers and Pillow are imported where they are needed: --help and a mistyped flag have to answer at once.
if TYPE_CHECKING:
    from PIL import Image

    from uplift_diffusers.cli.tasks import Task
    from uplift_diffusers.images.metadata import Metadata
    from uplift_diffusers.pipelines.super_resolution import UPLiFTSuperResolutionPipeline

MAX_OUTPUT_PIXELS = 100_000_000
"""Pixels of the largest output, which is held in memory as a Pillow image with four bytes per pixel."""

NAME = "upscale"
PURPOSE = "upscale image files and folders"
EPILOG = f"""\
INPUT and --output:
  A single file is written to a file, with the format of its suffix, or into a folder that exists or ends in a /.
  Several inputs, or a folder, which is searched recursively, are written into a folder, which is created. File names
  and the tree below an input folder are kept. Outputs have the format of their input if it is png, jpg, jpeg, webp,
  tif, tiff or bmp, and are png otherwise. If two outputs would get the same name, as for a.png and a.gif, the second
  is called a.gif.png.

  In a folder, hidden files (.name) and the --output folder are skipped. Other folders with outputs of an earlier run
  count as inputs: keep them elsewhere. The number of files that are not images is reported at the end. Unreadable
  folders, links to folders and broken links are reported.

Output size:
  --scale S, or one of --size, --megapixels and --long_side, which set the scale of each image separately.
  --size 3840x fits the width, x2160 the height, and 3840x2160 both, keeping the aspect ratio. An image that is
  already larger, or would have to grow more than {MAX_SCALE} times, is reported and skipped.

Image contents:
  Every output has round(scale * width) by round(scale * height) pixels. Greyscale, alpha and 16-bit greyscale (png,
  tiff) are kept; 16-bit colour becomes 8-bit. If the output has no alpha (jpg, bmp), the image is composited on white.
  jpg is saved with quality 95 without chroma subsampling, webp with quality 95; the others are lossless. Colour
  profile and EXIF data are kept, but the orientation is applied and its tag removed. Of an animation or a document
  with several pages, the first one is used. Compression artefacts of a jpg are removed according to its
  quality; --denoise overrides this.

  Inputs over 100 megapixels are rejected, and so are outputs over {MAX_OUTPUT_PIXELS / 1e6:g}. An image is upscaled
  to the next power of two of the scale and then downsampled; the limit applies before the downsampling.

Existing outputs:
  Inputs are never replaced. Existing outputs are kept: for a single file this is an error; with a folder or several
  files, the missing ones are written. So the same command continues an interrupted job. Files are written atomically.
  --overwrite replaces files, but never a link, a FIFO, a socket or a device.
  With the same seed, model, device type and versions, a file gives the same output alone and in a folder.

Several devices or machines:
  accelerate launch -m uplift_diffusers upscale ... splits the files between the processes that it starts, one per
  GPU, and reports their total at the end. Outputs are the same.

Exit code:
  0    every output is written, or existed already
  1    some inputs could not be upscaled; each is reported on stderr, the others are done
  2    nothing was started: an argument is wrong, the output exists or cannot be written, the model does not load
  130  interrupted by Ctrl-C; 143 and 129 by SIGTERM and SIGHUP

Examples:
  uplift-diffusers upscale photo.jpg --output large.png
  uplift-diffusers upscale photo.jpg --output large/ --scale 3.5
  uplift-diffusers upscale holiday/ --output holiday_4x --scale 4
  uplift-diffusers upscale photo.jpg --output wallpaper.png --size 3840x
  uplift-diffusers upscale photo.jpg --output large.jpg --model UPLiFT-upsampler/uplift_sd1.5vae \\
      --vae stable-diffusion-v1-5/stable-diffusion-v1-5
"""

_NOTHING_FITS_ANY_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""System errors after which the next file would fail as well."""


class OutputError(Exception):
    """An output cannot be stored. The message is one sentence that names it."""

    def __init__(self, target: Path, error: OSError):
        super().__init__(f"{target}: cannot be written: {reason(error)}")
        self.is_final = error.errno in _NOTHING_FITS_ANY_MORE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=upscale)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image file, or folder of image files")
    parser.add_argument("--output", required=True, metavar="PATH", help="file or folder to write")
    how_large = parser.add_mutually_exclusive_group()
    how_large.add_argument("--scale", type=parse_scale, help=f"any number from 1 to {MAX_SCALE} (default: 2)")
    how_large.add_argument(
        "--size", type=parse_size, metavar="WxH", help="pixels of the output: 3840x, x2160, or a box to fit, 3840x2160"
    )
    how_large.add_argument("--megapixels", type=parse_megapixels, metavar="N", help="millions of pixels of the output")
    how_large.add_argument("--long_side", type=parse_count, metavar="N", help="pixels of the output's longer edge")
    parser.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        help="a saved UPLiFTSuperResolutionPipeline, or a UPLiFTModel, which needs --vae too (default: the embedded "
        "model)",
    )
    parser.add_argument(
        "--vae", metavar="DIR_OR_HUB_ID", help="a VAE, or a pipeline with a folder vae, instead of the model's VAE"
    )
    parser.add_argument(
        "--latent_space",
        metavar="NAME",
        help="which latent space the VAE belongs to, such as sd15-vae, if its configuration does not determine it",
    )
    parser.add_argument(
        "--seed", type=parse_seed, default=0, metavar="N", help="seed of every image's noise (default: 0)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda:1, mps, ... (default: auto)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of the computation; bfloat16 takes about half the time with AVX512_BF16 (default: float32)",
    )
    parser.add_argument(
        "--denoise",
        type=parse_denoise,
        default="auto",
        metavar="X",
        help="how much of the compression artefacts and noise to remove, from 0 (none) to 1, or auto: according to "
        "the quality of a jpg, and 0 for other formats (default: auto)",
    )
    parser.add_argument(
        "--consistency",
        type=parse_share,
        default=1.0,
        metavar="X",
        help="from 0 to 1: how closely the downsampled output matches the input (default: 1)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")


def upscale(options: argparse.Namespace) -> int:
    """Run the command, as specified in its `--help`."""
    from uplift_diffusers.cli.tasks import is_batch, plan_tasks

    # 1. Everything that can be wrong is looked at before torch is imported, which takes seconds
    try:
        index, count = process_share()
    except ValueError as error:
        raise CommandError(str(error)) from error
    plan = plan_tasks(options.inputs, options.output)
    batch = is_batch(options.inputs)
    # A share of all tasks and not of those that wait, which become fewer while other processes write.
    tasks = plan.tasks[index::count]
    waiting = tasks if options.overwrite else [task for task in tasks if not os.path.lexists(task.target)]
    num_there = len(tasks) - len(waiting)
    if num_there and not batch:
        raise CommandError(f"{tasks[0].target} exists. Pass --overwrite to replace it.")
    for folder in {task.target.parent for task in tasks}:  # also where all is there and nothing will be written
        remove_unfinished(folder)
    for problem in plan.problems if index == 0 else ():
        tell(problem)
    written = 0
    if waiting:
        _check_writable(Path(options.output) if batch else waiting[0].target.parent)

        # 2. Load
        pipeline = _load(options)

        # 3. Enlarge, one file at a time
        written = _upscale_files(waiting, pipeline, options, show_progress=index == 0)

    # 4. Say what was done, once for all processes
    num_skipped = len(waiting) - written + (len(plan.problems) if index == 0 else 0)
    if index == 0 and plan.left_out:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(plan.left_out.items()))
        tell(f"Skipped, not images: {kinds}.")
    try:
        written, num_there, num_skipped = sum_over_processes(written, num_there, num_skipped)
    except (RuntimeError, ValueError, OSError) as error:
        mine = _summary(written, num_there, num_skipped)
        tell(f"{mine} by this process; the others do not respond: {reason(error)}")
        return 1
    said = index != 0 or say(_summary(written, num_there, num_skipped))
    return 0 if said and num_skipped == 0 else 1


def _load(options: argparse.Namespace) -> "UPLiFTSuperResolutionPipeline":
    model = options.model if options.model is not None else embedded_bundle()
    if options.model is None and not os.path.isdir(model):
        raise CommandError("the embedded model is not installed. Name another one with --model.")
    try:
        device = choose_device(options.device)
    except ValueError as error:
        raise CommandError(as_flags(error)) from error

    import torch

    from uplift_diffusers.loading import LoadingError, load_pipeline

    try:
        pipeline = load_pipeline(
            model, vae=options.vae, latent_space=options.latent_space, dtype=getattr(torch, options.dtype)
        )
        pipeline.to(device)
    except (LoadingError, RuntimeError) as error:  # the second one: the device's memory is too small
        raise CommandError(as_flags(error)) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_writable(folder: Path) -> None:
    from uplift_diffusers.saving import make_writable_folder

    try:
        make_writable_folder(folder)
        _check_space(folder, 1)
    except OSError as error:
        raise CommandError(f"--output: cannot write into the folder {folder}: {reason(error)}") from error


def _check_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError if there is not enough space left."""
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < num_bytes:  # some file systems of networks say 0 of 0
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _upscale_files(
    tasks: "list[Task]",
    pipeline: "UPLiFTSuperResolutionPipeline",
    options: argparse.Namespace,
    *,
    show_progress: bool,
) -> int:
    """Upscale all `tasks`, report those that fail, and return the number written."""
    from tqdm import tqdm

    written = 0
    hidden = None if show_progress and sys.stderr is not None else True  # None: only in a terminal
    with tqdm(tasks, unit="file", disable=hidden, dynamic_ncols=True) as progress:
        for number, task in enumerate(progress, 1):
            remarks, is_final = [], False
            try:
                _upscale_file(task, pipeline, options)
            except OutputError as error:
                remarks, is_final = [str(error)], error.is_final
            except (OSError, ValueError, RuntimeError, MemoryError) as error:
                remarks = [f"{task.source}: {reason(error)}"]
            else:
                written += 1
            if is_final and number < len(tasks):
                remarks.append(
                    f"{len(tasks) - number} more were not started, because they could not be written either."
                )
            _tell_above_progress(remarks)
            if is_final:
                break
    return written


def _tell_above_progress(remarks: list[str]) -> None:
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        for remark in remarks:
            tell(remark)


def _upscale_file(task: "Task", pipeline: "UPLiFTSuperResolutionPipeline", options: argparse.Namespace) -> None:
    """Upscale one file, and report what is lost beforehand."""
    import torch

    from uplift_diffusers.images.files import MAX_EDGES, OUTPUT_FORMATS, open_image, plan_saving

    # 1. Open, and refuse what would be too large or could not be stored
    opened = plan_saving(open_image(task.source), task.target.suffix)
    size = (opened.image.height, opened.image.width)
    scale = _scale_of(options, size)
    suffix = task.target.suffix.lower()
    file_format = OUTPUT_FORMATS[suffix]
    check_output_size(size, scale, max_pixels=MAX_OUTPUT_PIXELS, max_edge=MAX_EDGES.get(file_format), kind=suffix)
    try:
        task.target.parent.mkdir(parents=True, exist_ok=True)
        is_uncompressed = file_format in ("BMP", "TIFF")
        _check_space(task.target.parent, math.prod(scaled_size(size, scale)) if is_uncompressed else 1)
    except OSError as error:
        raise OutputError(task.target, error) from error
    _tell_above_progress([f"{task.source}: {loss}" for loss in opened.losses])

    # 2. Enlarge
    generator = torch.Generator().manual_seed(options.seed)  # on the CPU: the same noise on every device
    settings = {"denoise": options.denoise, "consistency": options.consistency}
    output: Any = pipeline(image=opened.image, scale=scale, generator=generator, **settings)

    # 3. Save
    _save(output.images[0], task.target, metadata=opened.metadata, overwrite=options.overwrite)


def _save(image: "Image.Image", target: Path, *, metadata: "Metadata", overwrite: bool) -> None:
    from uplift_diffusers.images.files import save_image

    try:
        save_image(image, target, metadata=metadata, overwrite=overwrite)
    except OSError as error:  # FileExistsError too: without --overwrite what appears during the work stays
        raise OutputError(target, error) from error


def _scale_of(options: argparse.Namespace, size: tuple[int, int]) -> float:
    """The scale for one image of `size` (height, width)."""
    if options.size is None and options.megapixels is None and options.long_side is None:
        return 2.0 if options.scale is None else options.scale
    return resolve_scale(size, megapixels=options.megapixels, long_side=options.long_side, **(options.size or {}))


def _summary(written: int, there: int, skipped: int) -> str:
    counts = ((written, "written"), (there, "already there"), (skipped, "skipped"))
    return ", ".join(f"{count} {what}" for count, what in counts if count or what == "written")
