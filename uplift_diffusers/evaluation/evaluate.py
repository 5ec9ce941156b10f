"""
The command that evaluates upscalers: `eval_generative.py` and `uplift-diffusers evaluate`.

`main` reads the command line, `_prepare` checks everything and loads, `run` measures and writes the report.
"""

import argparse
import importlib.util
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uplift_diffusers import runtime
from uplift_diffusers.console import Parser, in_one_line, parse_count, parse_count_or_zero, parse_seed, say, tell
from uplift_diffusers.embedded import embedded_bundle

# Imported where it is needed: --help has to answer at once, and without what the extra installs.
if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from diffusers import DiffusionPipeline

    from uplift_diffusers.evaluation.measure import Evaluation, Protocol

DTYPES = ("float32", "bfloat16", "float16")

EXTRA_PACKAGES = ("accelerate", "matplotlib", "torch_fidelity", "torchmetrics", "torchvision")
"""Packages of the extra `eval` that are imported here."""

_EPILOG = """\
Methods (--methods NAME or NAME=PATH or NAME=PATH:OPTION=VALUE,OPTION=VALUE):
  bicubic    interpolates the pixels
  bilinear   interpolates the latents and decodes them
  uplift     the pipeline of --model
  vae        encodes and decodes the photograph itself: the upper bound for methods that use the VAE
  NAME=PATH  a folder or hub id of any saved pipeline that takes an image, of a UPLiFTModel (a LiFT is one), or of
             the U-Net of train_latent.py --method cfm; options are arguments of its call. Or a folder with images
             from other software: PATH/2x/ has one for each photograph, with the same relative path and the crop's
             size. With a single scale, they may be in PATH itself.

Examples:
  {prog} --data_dir photos/val
  {prog} --data_dir photos/val --jpeg_quality 75 --methods bicubic uplift span=outputs/span
  {prog} --data_dir photos/val --inception_weights inception.safetensors --output_dir report \\
      --methods bicubic bilinear lift=runs/lift cfm20=runs/cfm:num_inference_steps=20 uplift vae
  {prog} --prompts captions_val2017.json --real_images val2017 --limit 5000 --scales 2 \\
      --stable_diffusion stable-diffusion-v1-5/stable-diffusion-v1-5 --model runs/uplift \\
      --inception_weights inception.safetensors --output_dir report
  accelerate launch --multi_gpu --num_processes 4 eval_generative.py ... --output_dir report

The same command continues an interrupted run: what is in OUTPUT_DIR/records is not measured again.
"""

_OF_PROMPTS = ("stable_diffusion", "real_images", "num_inference_steps", "guidance_scale")
_WITHOUT_EFFECT = {
    "data_dir": (*_OF_PROMPTS, "image_column"),
    "dataset_name": _OF_PROMPTS,
    "prompts": ("image_column", "crop", "jpeg_quality", "allow_greyscale"),
}
"""Options that do not apply, by source of the inputs."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The command-line options, documented in `--help`, and the command line itself."""

    command: str
    data_dir: str | None = None
    dataset_name: str | None = None
    prompts: str | None = None
    model: str
    methods: list[str] | None
    scales: list[int]
    limit: int | None
    seed: int
    output_dir: Path | None
    fresh: bool
    device: str
    dtype: str
    trust_remote_code: bool
    image_column: str = "image"
    crop: int = 512
    jpeg_quality: int | None = None
    allow_greyscale: bool = False
    stable_diffusion: str | None = None
    real_images: str | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    metrics: list[str] | None
    inception_weights: str | None
    patch_size: int | None
    patches: int
    latency_repeats: int
    latency_sizes: list[int] | None

    @property
    def of_photographs(self) -> bool:
        return self.prompts is None


def main(arguments: list[str] | None = None, *, program: str = "uplift-diffusers evaluate") -> int:
    """
    Run the command.

    Args:
        arguments: arguments without the program's name; by default those of the process.
        program: name of the command in help, errors and the report.
    Returns:
        The exit code: 0; 1, with one line on stderr, for an error that the user can fix; 2 for a wrong option; 130
        when interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = vars(_build_parser(program).parse_args(arguments))
    except SystemExit as stop:  # after --help and errors in the arguments
        return stop.code if isinstance(stop.code, int) else 0
    try:
        _check_installed()
        _check_options(options)
        printed = run(EvaluationOptions(**options, command=f"{program} {shlex.join(arguments)}"))
    except (OSError, ValueError, TypeError, ImportError) as error:
        tell(in_one_line(error))
        return 1
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        tell("Out of memory. Try smaller crops (--crop), another --dtype or other --methods.")
        return 1
    except KeyboardInterrupt:
        tell("Interrupted. The measurements in --output_dir are kept for the next run.")
        return 130
    return 0 if printed else 1


def run(options: EvaluationOptions) -> bool:
    """
    Measure, in as many processes as were launched, write the report and print the tables.

    Returns:
        Whether the tables could be printed.
    Raises:
        OSError, ValueError, TypeError: an error that the user can fix.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from uplift_diffusers.evaluation.measure import compute_results
    from uplift_diffusers.evaluation.report import describe_run, report_markdown, write_report
    from uplift_diffusers.runtime import PATIENCE
    from uplift_diffusers.saving import make_writable_folder

    # Where there are only CPUs, accelerate finds the other processes only if it is told so.
    on_cpu = options.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=on_cpu or not torch.accelerator.is_available(), timeout=PATIENCE)
    if options.output_dir is None and state.num_processes > 1:
        raise ValueError("`output_dir` must be given for several processes, which exchange their results there.")
    printed = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output_dir or Path(temporary)
        make_writable_folder(folder)
        evaluation = _prepare(options, folder, state)
        evaluation.run(rank=state.process_index, world_size=state.num_processes)
        state.wait_for_everyone()
        if state.is_main_process:
            costs = None
            if options.latency_repeats:
                edges = {scale: _edges_to_time(options, evaluation.protocol, scale) for scale in options.scales}
                costs = evaluation.measure_costs(edges=edges, repeats=options.latency_repeats)
            results = compute_results(evaluation, seed=options.seed, costs=costs)
            description = describe_run(
                evaluation,
                command=options.command,
                seed=options.seed,
                processes=state.num_processes,
                dtype=options.dtype,
            )
            if options.output_dir is not None:
                write_report(evaluation, results, description, folder)
            printed = say(report_markdown(results, description))
    state.destroy_process_group()
    return printed


def _prepare(options: EvaluationOptions, folder: Path, state: "PartialState") -> "Evaluation":
    """Check everything, cheap checks first, and load."""
    import torch

    from uplift_diffusers.evaluation.measure import Evaluation
    from uplift_diffusers.evaluation.methods import make_methods, parse_methods
    from uplift_diffusers.evaluation.metrics import IMAGE_METRICS, SET_METRICS, Metrics, load_inception, load_lpips
    from uplift_diffusers.evaluation.records import RecordStore

    default_methods = ["bicubic", "bilinear", "uplift", *["vae"] * options.of_photographs]
    specs = parse_methods(options.methods or default_methods)
    without_truth = {*(options.metrics or [])} & {*IMAGE_METRICS}
    if without_truth and not options.of_photographs:
        raise ValueError(
            f"`metrics` must be of {', '.join(SET_METRICS)} for prompts, got {min(without_truth)!r}, which compares "
            "with a photograph."
        )
    device, dtype = choose_device(options.device, state), getattr(torch, options.dtype)
    notes = []
    if options.of_photographs:
        protocol, pipeline = _prepare_photographs(options, device, dtype)
    else:
        protocol, pipeline = _prepare_prompts(options, folder, device, dtype)
    for scale in options.scales:
        _edges_to_time(options, protocol, scale)
    names = options.metrics
    if names is None:
        names, note = default_metrics(protocol, inception_weights=options.inception_weights)
        notes.append(note)
    metrics = Metrics(
        names=tuple(names),
        inception=load_inception(options.inception_weights).to(device) if {*SET_METRICS} & {*names} else None,
        lpips=load_lpips().to(device) if "lpips" in names else None,
        patch_size=options.patch_size or protocol.output_edge(min(options.scales)) // 2,
        patches=options.patches,
        seed=options.seed,
    )
    methods = make_methods(
        specs,
        pipeline=pipeline,
        seed=options.seed,
        samples=protocol.outline(),
        of_latents=not protocol.paired,
        device=device,
        dtype=dtype,
        trust_remote_code=options.trust_remote_code,
    )
    for note in filter(None, [*notes, *(method.note for method in methods)]):
        if state.is_main_process:
            tell(note)
    return Evaluation(protocol, methods, metrics, RecordStore(folder / "records", fresh=options.fresh), device=device)


def _prepare_photographs(
    options: EvaluationOptions, device: "torch.device", dtype: "torch.dtype"
) -> tuple["Protocol", "DiffusionPipeline"]:
    """The protocol, and the pipeline of the method uplift."""
    from uplift_diffusers.evaluation.methods import check_model, load_pipeline
    from uplift_diffusers.evaluation.protocols import PhotographFiles, SuperResolution

    photographs = PhotographFiles(
        options.data_dir, dataset_name=options.dataset_name, image_column=options.image_column, limit=options.limit
    )
    pipeline = load_pipeline(options.model, vae=None, dtype=dtype, trust_remote_code=options.trust_remote_code)
    check_model(pipeline)
    protocol = SuperResolution(
        photographs,
        scales=tuple(options.scales),
        crop=options.crop,
        multiple=pipeline.latent_space.spatial_factor,
        jpeg_quality=options.jpeg_quality,
        allow_greyscale=options.allow_greyscale,
    )
    return protocol, pipeline.to(device)


def _prepare_prompts(
    options: EvaluationOptions, folder: Path, device: "torch.device", dtype: "torch.dtype"
) -> tuple["Protocol", "DiffusionPipeline"]:
    """The protocol, and the pipeline of the method uplift for the protocol's latents."""
    from uplift_diffusers.evaluation.methods import check_model, for_latents, load_pipeline
    from uplift_diffusers.evaluation.protocols import TextToImage, read_prompts
    from uplift_diffusers.evaluation.records import RecordStore

    loading = {"dtype": dtype, "trust_remote_code": options.trust_remote_code}
    assert options.prompts is not None  # whose protocol this is
    prompts = read_prompts(options.prompts, limit=options.limit)
    if options.stable_diffusion is None or options.real_images is None:
        name = "stable_diffusion" if options.stable_diffusion is None else "real_images"
        raise ValueError(f"`{name}` must be given with --prompts, got nothing.")
    protocol = TextToImage(
        prompts,
        pipeline=load_pipeline(options.stable_diffusion, vae=None, **loading).to(device),
        store=RecordStore(folder, fresh=options.fresh),
        real_images=options.real_images,
        scales=tuple(options.scales),
        seed=options.seed,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
    )
    pipeline = load_pipeline(options.model, vae=protocol.pipeline.vae, latent_space=protocol.space.name, **loading)
    check_model(pipeline)
    return protocol, for_latents(pipeline, protocol.space).to(device)


def choose_device(name: str, state: "PartialState") -> "torch.device":
    """
    The device of this process.

    Args:
        name: auto, cpu, cuda, mps, or a device with an index, such as cuda:1.
        state: state of the processes; `auto` is its device.
    Raises:
        ValueError: PyTorch does not find the device, or several processes would share one accelerator.
    """
    own: Any = state.device
    if name == "auto":
        return own
    device = runtime.choose_device(name)
    if device.index is None and device.type == own.type:
        return own
    if device.type != "cpu" and state.num_processes > 1:
        raise ValueError(f"`device` must be auto for several processes, which use one device each, got {name!r}.")
    return device


def default_metrics(protocol: "Protocol", *, inception_weights: str | None) -> tuple[tuple[str, ...], str]:
    """The default metrics, and a message on those that are skipped."""
    from uplift_diffusers.evaluation.metrics import HOW_TO_GET_WEIGHTS, SET_METRICS

    if not protocol.paired:
        statistics = protocol.statistics
        if statistics is None or statistics.serves("kid"):
            return ("fid", "kid"), ""
        return ("fid",), "KID is left out: the real images' statistics have no features."
    plain = ("psnr", "ssim", "color_shift")
    if inception_weights:
        return (*SET_METRICS, *plain), ""
    return plain, f"FID, patch-FID and KID are left out. {HOW_TO_GET_WEIGHTS}"


def _edges_to_time(options: EvaluationOptions, protocol: "Protocol", scale: int) -> list[int]:
    """Edges of outputs to time, in pixels, including that of the outputs measured."""
    whole, multiple = protocol.output_edge(scale), scale * protocol.multiple
    for edge in options.latency_sizes or []:
        if edge % multiple:
            raise ValueError(f"`latency_sizes` must be multiples of {multiple} for {scale}x, got {edge}.")
    fractions = [edge for edge in (whole // 4, whole // 2) if edge and edge % multiple == 0]
    return sorted({*(options.latency_sizes or fractions), whole})


def _build_parser(program: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=program,
        description="Evaluate upscalers on downsampled photographs, or on latents from Stable Diffusion.",
        epilog=_EPILOG.format(prog=program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    for name, description in (
        ("--data_dir", "super-resolution: folder of photographs, or .tar shards"),
        ("--dataset_name", "super-resolution: dataset on the hub or in a folder"),
        ("--prompts", "text to image: COCO captions (.json), or a text file with one prompt per line"),
    ):
        source.add_argument(name, default=argparse.SUPPRESS, help=description)
    parser.add_argument(
        "--model", default=str(embedded_bundle()), help="pipeline of the method uplift (default: the embedded bundle)"
    )
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="see below (default: all built-in methods)")
    parser.add_argument("--scales", type=int, nargs="+", default=[2, 4], choices=range(2, 17), metavar="N")
    parser.add_argument("--limit", type=parse_count, help="use only the first N photographs or prompts")
    parser.add_argument("--seed", type=parse_seed, default=0, help="seed of noise, patches and intervals (default: 0)")
    parser.add_argument("--output_dir", type=Path, help="folder for the report and the measurements")
    parser.add_argument("--fresh", action="store_true", help="ignore the measurements in OUTPUT_DIR/records")
    parser.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda, mps, cuda:1, ... (default: auto, an accelerator if any)",
    )
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="dtype of the measured networks (default: float32)"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code in the folder of pipelines with custom classes"
    )

    photographs = parser.add_argument_group("photographs", argument_default=argparse.SUPPRESS)
    photographs.add_argument("--image_column", help="column of the dataset with images (default: image)")
    photographs.add_argument("--crop", type=parse_count, help="edge of the centre crops (default: 512 px)")
    photographs.add_argument(
        "--jpeg_quality",
        type=parse_count,
        metavar="Q",
        help="save the downsampled photographs as JPEGs of this quality, 1 to 100 (default: no compression)",
    )
    photographs.add_argument("--allow_greyscale", action="store_true", help="measure greyscale photographs as RGB")

    text = parser.add_argument_group("text to image", argument_default=argparse.SUPPRESS)
    text.add_argument("--stable_diffusion", metavar="DIR_OR_HUB_ID", help="generates the latents of the prompts")
    text.add_argument("--real_images", help="folder of photographs, or .npz or .safetensors of their statistics")
    text.add_argument("--num_inference_steps", type=parse_count, help="denoising steps (default: 50)")
    text.add_argument("--guidance_scale", type=float, help="guidance scale of the denoising (default: 7.5)")

    metrics = parser.add_argument_group("metrics")
    metrics.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="fid patch_fid kid psnr ssim lpips color_shift (default for photographs: psnr ssim color_shift, and fid "
        "patch_fid kid with --inception_weights; for prompts: fid kid)",
    )
    metrics.add_argument("--inception_weights", metavar="PATH", help="output of scripts/convert_inception.py")
    metrics.add_argument(
        "--patch_size",
        type=parse_count,
        help="crop edge for patch-FID (default: half the smallest output)",
    )
    metrics.add_argument("--patches", type=parse_count, default=4, help="crops per image for patch-FID (default: 4)")

    time = parser.add_argument_group("time and memory")
    time.add_argument(
        "--latency_repeats", type=parse_count_or_zero, default=3, help="timed calls; 0: none (default: 3)"
    )
    time.add_argument(
        "--latency_sizes",
        type=parse_count,
        nargs="+",
        help="output edges to time (default: a quarter, half and the whole of the measured outputs)",
    )
    return parser


def _check_installed() -> None:
    for name in EXTRA_PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f'`evaluate` needs {name}, which is not installed: pip install "uplift-diffusers[eval]"')


def _check_options(options: dict) -> None:
    """Raise ValueError if an option would have no effect."""
    source = next(name for name in _WITHOUT_EFFECT if name in options)
    for name in _WITHOUT_EFFECT[source]:
        if name in options:
            raise ValueError(f"`{name}` must not be given with --{source}, where it has no effect.")
    if options["fresh"] and options["output_dir"] is None:
        raise ValueError("`fresh` must not be given without --output_dir, where it has no effect.")
