"""Command line of `eval_generative.py`."""

import argparse
import shlex
import sys
from pathlib import Path

from uplift_diffusers.embedded import embedded_bundle

_EPILOG = """\
Methods (--methods NAME or NAME=PATH or NAME=PATH:OPTION=VALUE,OPTION=VALUE):
  bicubic    interpolates the pixels
  bilinear   interpolates the latents and decodes them
  uplift     the pipeline of --model
  vae        encodes and decodes the photograph itself: the ceiling of what goes through the VAE
  NAME=PATH  a directory or hub id of any saved pipeline that takes an image, of an UPLiFTModel (a LiFT is one), or of
             the U-Net of train_latent.py --method cfm; options are arguments of its call. Or a folder of images that
             other software has made: PATH/2x/ has one for each photograph, of its name, size and place.

Examples:
  python eval_generative.py --data_dir photos/val
  python eval_generative.py --data_dir photos/val --inception_weights inception.safetensors --output_dir report \\
      --methods bicubic bilinear lift=runs/lift cfm20=runs/cfm:num_inference_steps=20 uplift vae
  python eval_generative.py --prompts captions_val2017.json --real_images val2017 --limit 5000 --scales 2 \\
      --stable_diffusion stable-diffusion-v1-5/stable-diffusion-v1-5 --model runs/uplift --output_dir report
  accelerate launch --multi_gpu --num_processes 4 eval_generative.py ... --output_dir report

The same command goes on where it was stopped: what lies in OUTPUT_DIR/records is not measured again.
"""

_OF_PROMPTS = ("stable_diffusion", "real_images", "num_inference_steps", "guidance_scale")
_WITHOUT_EFFECT = {
    "data_dir": (*_OF_PROMPTS, "image_column"),
    "dataset_name": _OF_PROMPTS,
    "prompts": ("image_column", "crop", "allow_greyscale"),
}
"""By the source of what is enlarged, the options that are for other sources."""


def main(arguments: list[str] | None = None) -> int:
    """Measure; exit code 1 and one line on stderr for what a person can put right."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = vars(_build_parser().parse_args(arguments))
    try:
        # Not above: --help has to answer at once, and without what the extra installs.
        from uplift_diffusers.evaluation.command import Request, run
    except ImportError as error:
        print(f'Evaluation needs {error.name}: pip install "uplift-diffusers[eval]"', file=sys.stderr)
        return 1
    try:
        _check_options(options)
        run(Request(**options, command=shlex.join(["eval_generative.py", *arguments])))
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure upscalers on photographs, reduced and enlarged again, or on what Stable Diffusion makes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    given = {"default": argparse.SUPPRESS}
    source.add_argument("--data_dir", **given, help="super-resolution: folder of photographs, or .tar shards")
    source.add_argument("--dataset_name", **given, help="super-resolution: dataset on the hub, or a folder of one")
    source.add_argument("--prompts", **given, help="text to image: COCO captions (.json), or a text file, one a line")
    parser.add_argument(
        "--model", default=str(embedded_bundle()), help="pipeline of the method uplift (default: that of the package)"
    )
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="see below (default: all that need no PATH)")
    parser.add_argument("--scales", type=int, nargs="+", default=[2, 4], choices=range(2, 17), metavar="N")
    parser.add_argument("--limit", type=_positive, help="only so many photographs or prompts, the first ones")
    parser.add_argument("--seed", type=int, default=0, help="of noise, patches and intervals (default: 0)")
    parser.add_argument("--output_dir", type=Path, help="where the report goes and measurements are kept")

    photographs = parser.add_argument_group("photographs", argument_default=argparse.SUPPRESS)
    photographs.add_argument("--image_column", help="of the dataset (default: image)")
    photographs.add_argument("--crop", type=_positive, help="edge of the centre crops (default: 512 px)")
    photographs.add_argument("--allow_greyscale", action="store_true", help="measure greyscale photographs as RGB")

    text = parser.add_argument_group("text to image", argument_default=argparse.SUPPRESS)
    text.add_argument("--stable_diffusion", metavar="DIR_OR_HUB_ID", help="makes the latents of the prompts")
    text.add_argument("--real_images", help="folder of photographs, or .npz or .safetensors of their statistics")
    text.add_argument("--num_inference_steps", type=_positive, help="of the denoising (default: 50)")
    text.add_argument("--guidance_scale", type=float, help="of the denoising (default: 7.5)")

    metrics = parser.add_argument_group("metrics")
    metrics.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="fid patch_fid kid psnr ssim lpips color_shift (default for photographs: psnr ssim color_shift, and fid "
        "patch_fid kid where the Inception weights are given or downloaded already; for prompts: fid kid)",
    )
    metrics.add_argument("--inception_weights", metavar="PATH", help="instead of torch-fidelity's download")
    metrics.add_argument("--patch_size", type=_positive, help="of patch-FID (default: half the smallest output)")
    metrics.add_argument("--patches", type=_positive, default=4, help="crops of an image for patch-FID (default: 4)")

    time = parser.add_argument_group("time and memory")
    time.add_argument("--latency_repeats", type=_count, default=3, help="calls after a warm-up; 0: none (default: 3)")
    time.add_argument(
        "--latency_sizes",
        type=_positive,
        nargs="+",
        help="edges of outputs to time (default: a quarter, half and the whole of the outputs measured)",
    )
    return parser


def _check_options(options: dict) -> None:
    """Raise ValueError where an option would have no effect."""
    source = next(name for name in _WITHOUT_EFFECT if name in options)
    for name in _WITHOUT_EFFECT[source]:
        if name in options:
            raise ValueError(f"`{name}` must not be given with --{source}, where it has no effect.")


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)
