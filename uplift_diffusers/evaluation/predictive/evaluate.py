"""The command `eval_predictive.py`: quality and cost of upsampled features."""

import argparse
import shlex
import sys
from pathlib import Path

from uplift_diffusers.console import Parser, in_one_line, parse_count, parse_count_or_zero, tell

_EPILOG = """\
Upsamplers (--upsamplers NAME or NAME=PATH):
  nearest, bilinear                         need no weights
  lift, featup, loftup, jafar, anyup, naf   .safetensors of the published tensors, or a folder with one such file
  any other name, such as uplift            a folder or hub id of a UPLiFTModel for the backbone's features
  For --task cost: uplift and the names above, without a path, because costs do not depend on weights.

Examples:
  python eval_predictive.py --task segmentation --backbone facebook/dinov2-small --dataset voc --data_dir VOCdevkit \\
      --upsamplers bilinear uplift=tiny-uplift/dinov2-s14 jafar=jafar.safetensors --output_dir report
  python eval_predictive.py --task depth --backbone facebook/dinov2-small --train_images train2017 \\
      --val_images val2017 --depth_model depth-anything/Depth-Anything-V2-Small-hf --output_dir report
  python eval_predictive.py --task drift --backbone facebook/dinov2-small --dataset camvid --data_dir CamVid \\
      --upsamplers bilinear uplift=runs/uplift our_lift=runs/lift --output_dir report
  python eval_predictive.py --task cost --tokens 64 256 1024 2601 --output_dir report

The same command continues an interrupted run: what is in OUTPUT_DIR/records is not measured again.
"""

_OF_LABELS = ("dataset", "data_dir", "num_classes")
_OF_DEPTHS = ("depth_model", "units_per_metre")
_OF_DRIFT = ("num_steps",)
_OF_COST = ("tokens", "channels", "patch_size", "repeats", "threads", "memory_limit", "time_limit")
_OF_PROBES = (
    *("backbone", "feature_space", "train_images", "train_targets", "val_images", "val_targets", "image_size"),
    *("limit", "epochs", "learning_rate", "batch_size", "num_workers"),
)
_WITHOUT_EFFECT = {
    "segmentation": (*_OF_DEPTHS, *_OF_DRIFT, *_OF_COST),
    "drift": (*_OF_DEPTHS, *_OF_COST),
    "depth": (*_OF_LABELS, *_OF_DRIFT, *_OF_COST),
    "cost": (*_OF_LABELS, *_OF_DEPTHS, *_OF_DRIFT, *_OF_PROBES),
}
"""Options that do not apply, by task."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command. The exit code is 1, with one line on stderr, for an error that the user can fix."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = vars(_build_parser().parse_args(arguments))
    try:
        # Not above: --help has to answer at once, and without what the extra installs.
        from uplift_diffusers.evaluation.predictive.tasks import Request, run
    except ImportError as error:
        tell(f'Evaluation needs {error.name}: pip install "uplift-diffusers[eval]"')
        return 1
    try:
        for name in _WITHOUT_EFFECT[options["task"]]:
            if name in options:
                raise ValueError(f"`{name}` must not be given with --task {options['task']}, where it has no effect.")
        run(Request(**options, command=shlex.join(["eval_predictive.py", *arguments])))
    except (OSError, ValueError, TypeError, ImportError) as error:
        tell(_sentence(error))
        return 1
    return 0


def _sentence(error: Exception) -> str:
    """The message of `error`, without the traceback that PyTorch adds to errors of data-loading processes."""
    text = str(error).strip()
    return text.splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else in_one_line(error)


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Evaluate upsamplers of a vision transformer's features.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--task", required=True, choices=tuple(_WITHOUT_EFFECT))
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for the report and the records")
    parser.add_argument("--upsamplers", nargs="+", metavar="UPSAMPLER", help="see below (default: those without PATH)")
    parser.add_argument("--query_chunk", type=parse_count, help="positions per chunk in attention to all tokens")
    parser.add_argument("--device", help="default: cpu")
    parser.add_argument("--fresh", action="store_true", help="ignore existing records")
    parser.add_argument("--seed", type=parse_count_or_zero, help="seed of probes and intervals (default: 0)")

    probes = parser.add_argument_group("segmentation, depth and drift")
    probes.add_argument("--backbone", metavar="DIR_OR_HUB_ID", help="the frozen backbone")
    probes.add_argument("--feature_space", help="the feature space, if the backbone's config does not determine it")
    probes.add_argument("--dataset", choices=("voc", "ade20k", "cityscapes", "cocostuff27", "camvid"))
    probes.add_argument("--data_dir", help="the unpacked data set")
    probes.add_argument("--train_images", metavar="DIR", help="or folders of photographs,")
    probes.add_argument("--train_targets", metavar="DIR", help="of labels (.png) or depths (.npy, 16-bit .png),")
    probes.add_argument("--val_images", metavar="DIR", help="and the same for validation")
    probes.add_argument("--val_targets", metavar="DIR")
    probes.add_argument("--num_classes", type=parse_count, help="number of classes of labels in folders")
    probes.add_argument("--depth_model", metavar="DIR_OR_HUB_ID", help="depths from a model instead of files")
    probes.add_argument("--units_per_metre", type=float, help="unit of depth files (default: 1)")
    probes.add_argument("--image_size", type=parse_count, help="edge of the centre crops in pixels (default: 448)")
    probes.add_argument("--limit", type=parse_count, help="use only the first N images of each split")
    probes.add_argument("--epochs", type=parse_count, help="default: 20, depth 5")
    probes.add_argument("--learning_rate", type=float, help="default: 5e-4, depth 5e-3")
    probes.add_argument("--batch_size", type=parse_count, help="default: 2")
    probes.add_argument("--num_workers", type=parse_count_or_zero, help="processes that read images (default: 0)")
    probes.add_argument("--num_steps", type=parse_count, help="2x steps of --task drift (default: 4)")

    cost = parser.add_argument_group("cost")
    cost.add_argument(
        "--tokens", type=parse_count, nargs="+", help="square numbers (default: 64 256 576 1024 1521 2601)"
    )
    cost.add_argument("--channels", type=parse_count, help="channels of the features (default: 384)")
    cost.add_argument("--patch_size", type=parse_count, help="default: 16")
    cost.add_argument("--repeats", type=parse_count, help="maximum number of timed calls (default: 3)")
    cost.add_argument("--threads", type=parse_count, help="default: 1")
    cost.add_argument("--memory_limit", type=float, help="GiB per call (default: 70 %% of free memory)")
    cost.add_argument("--time_limit", type=float, help="seconds per call (default: 300)")
    return parser
