"""`uplift-diffusers features`: the features of an image at pixel resolution, as an image or as tensors."""

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uplift_diffusers.console import CommandError, as_flags, parse_count, say, tell
from uplift_diffusers.images.files import OUTPUT_FORMATS, open_image, save_image
from uplift_diffusers.runtime import choose_device
from uplift_diffusers.saving import make_writable_folder, replaced_when_whole
from uplift_diffusers.wording import reason

# torch and diffusers are imported where they are needed: --help and a mistyped flag have to answer at once.
if TYPE_CHECKING:
    from PIL import Image

    from uplift_diffusers.pipelines.features import UPLiFTFeatureOutput, UPLiFTFeaturePipeline

NAME = "features"
PURPOSE = "compute the features of an image at pixel resolution"
EPILOG = """\
--output:
  An image file (png, jpg, webp, tif, bmp) shows the first three principal components as colours: the backbone's
  features on the left, the upsampled ones on the right. A .safetensors file holds `features` (channels, height,
  width), `backbone_features` (channels, rows, columns) and `cls_token` (channels), in the dtype of the computation.

The input image must be at least one patch (14 or 16 pixels) in size. Existing outputs are kept unless --overwrite is
given. Files are written atomically.

Exit code:
  0    the output is written
  1    the image cannot be read, or its features cannot be computed or written
  2    nothing was started: an argument is wrong, the output exists, a model does not load, or the models do not match

Examples:
  uplift-diffusers features photo.jpg --output features.png
  uplift-diffusers features photo.jpg --output features.safetensors --size 448x448
  uplift-diffusers features photo.jpg --output features.png --backbone timm/vit_small_plus_patch16_dinov3.lvd1689m \\
      --upsampler UPLiFT-upsampler/uplift_dinov3-splus16
"""

BACKBONE = "facebook/dinov2-small"
UPSAMPLER = "UPLiFT-upsampler/uplift_dinov2-s14"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("input", metavar="PHOTO", help="image file")
    parser.add_argument("--output", required=True, metavar="FILE", help="image or .safetensors file to write")
    parser.add_argument(
        "--model", metavar="DIR_OR_HUB_ID", help="a saved UPLiFTFeaturePipeline, which includes both models"
    )
    parser.add_argument(
        "--backbone", metavar="DIR_OR_HUB_ID", help=f"DINOv2, DINOv3 or a timm model (default: {BACKBONE})"
    )
    parser.add_argument(
        "--upsampler", metavar="DIR_OR_HUB_ID", help=f"a UPLiFTModel for its features (default: {UPSAMPLER})"
    )
    parser.add_argument(
        "--feature_space",
        metavar="NAME",
        help="the backbone's feature space, if its configuration does not determine it",
    )
    parser.add_argument(
        "--size", type=_parse_size, metavar="WxH", help="size of the features (default: that of the image)"
    )
    parser.add_argument(
        "--num_steps", type=parse_count, metavar="N", help="number of 2x steps (default: as many as the size needs)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda:1, mps, ... (default: auto)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(default: float32)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")


def run(options: argparse.Namespace) -> int:
    """Run the command, as specified in its `--help`."""
    # 1. Everything that can be wrong is looked at before torch is imported, which takes seconds
    source, target = Path(options.input), Path(options.output)
    suffix = target.suffix.lower()
    if suffix != ".safetensors" and suffix not in OUTPUT_FORMATS:
        raise CommandError(f"--output must end in .safetensors, {', '.join(OUTPUT_FORMATS)}, got {target}.")
    if options.model is not None and (options.backbone is not None or options.upsampler is not None):
        raise CommandError("--model must be left out with --backbone or --upsampler: it has both.")
    if not source.is_file():
        raise CommandError(f"{source}: no such file.")
    if os.path.lexists(target) and not options.overwrite:
        raise CommandError(f"{target} exists. Pass --overwrite to replace it.")
    try:
        make_writable_folder(target.parent)
    except OSError as error:
        raise CommandError(f"--output: cannot write into the folder {target.parent}: {reason(error)}") from error

    # 2. Load
    pipeline = _load(options)

    # 3. Compute and save
    try:
        output: Any = pipeline(
            open_image(source).image,
            output_size=options.size or "pixels",
            num_steps=options.num_steps,
            output_type="pt" if suffix == ".safetensors" else "pil",
        )
        if suffix == ".safetensors":
            _save_tensors(
                output, target, feature_space=pipeline.feature_backbone.space.name, overwrite=options.overwrite
            )
        else:
            save_image(_beside_each_other(output), target, overwrite=options.overwrite)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        tell(f"{source}: {reason(error)}")
        return 1
    return 0 if say(f"{target} written.") else 1


def _load(options: argparse.Namespace) -> "UPLiFTFeaturePipeline":
    try:
        device = choose_device(options.device)
    except ValueError as error:
        raise CommandError(as_flags(error)) from error

    import torch

    from uplift_diffusers.loading import LoadingError, load_feature_pipeline

    try:
        pipeline = load_feature_pipeline(
            options.model,
            backbone=options.backbone or BACKBONE,
            upsampler=options.upsampler or UPSAMPLER,
            feature_space=options.feature_space,
            dtype=getattr(torch, options.dtype),
        )
        pipeline.to(device)
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is missing: pip install 'uplift-diffusers[features]'") from error
    except (LoadingError, RuntimeError) as error:  # the second one: the device's memory is too small
        raise CommandError(as_flags(error)) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _beside_each_other(output: "UPLiFTFeatureOutput") -> "Image.Image":
    """The image of the backbone's features (left) and that of the upsampled ones (right), side by side."""
    from PIL import Image

    left: Any = output.backbone_features[0]
    right: Any = output.features[0]
    picture = Image.new("RGB", (left.width + right.width, right.height))
    picture.paste(left, (0, 0))
    picture.paste(right, (left.width, 0))
    return picture


def _save_tensors(output: "UPLiFTFeatureOutput", target: Path, *, feature_space: str, overwrite: bool) -> None:
    from safetensors.torch import save

    tensors = {
        "features": output.features,
        "backbone_features": output.backbone_features,
        "cls_token": output.cls_token,
    }
    tensors = {name: tensor[0].contiguous().cpu() for name, tensor in tensors.items() if tensor is not None}
    with replaced_when_whole(target, overwrite=overwrite) as file:
        file.write(save(tensors, metadata={"feature_space": feature_space}))


def _parse_size(text: str) -> tuple[int, int]:
    """`640x480`, width and height -> (height, width)."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in positions, got {text!r}")
    return int(match[2]), int(match[1])
