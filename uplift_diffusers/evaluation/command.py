"""What `eval_generative.py` does, from its options to the report on disk."""

import io
import json
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import DiffusionPipeline

from uplift_diffusers.evaluation.evaluate import Evaluation, Protocol
from uplift_diffusers.evaluation.inception import HOW_TO_GET_WEIGHTS, downloaded_weights, load_inception
from uplift_diffusers.evaluation.metrics import IMAGE_METRICS, SET_METRICS, Metrics, load_lpips
from uplift_diffusers.evaluation.plots import make_contact_sheet, make_plots
from uplift_diffusers.evaluation.prompts import read_prompts
from uplift_diffusers.evaluation.real_images import Photographs
from uplift_diffusers.evaluation.records import write_whole
from uplift_diffusers.evaluation.report import describe_run, report_csv, report_json, report_markdown
from uplift_diffusers.evaluation.results import Results, compute_results, rows_to_show
from uplift_diffusers.evaluation.selection import check_model, for_latents, load_pipeline, make_methods, parse_methods
from uplift_diffusers.evaluation.super_resolution import SuperResolution
from uplift_diffusers.evaluation.text_to_image import TextToImage
from uplift_diffusers.images.files import save_image
from uplift_diffusers.saving import make_writable_folder


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of the command line, which documents them, and the line itself."""

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
    image_column: str = "image"
    crop: int = 512
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


def run(request: Request) -> None:
    """
    Measure, in as many processes as were launched, print the tables and write the report.

    Raises:
        OSError, ValueError, TypeError: sentences on what a person can put right.
    """
    # Where there are only CPUs, accelerate finds the other processes if it is told so.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # A process that is done waits for the others, which may have hours of a large model before them.
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
    if request.output_dir is None and state.num_processes > 1:
        raise ValueError("`output_dir` must be given for several processes, which meet there.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = request.output_dir or Path(temporary)
        make_writable_folder(folder)
        evaluation = _prepare(request, folder, state)
        evaluation.run(rank=state.process_index, world_size=state.num_processes)
        state.wait_for_everyone()
        if state.is_main_process:
            _report(evaluation, request, processes=state.num_processes)
    state.destroy_process_group()


def _prepare(request: Request, folder: Path, state: PartialState) -> Evaluation:
    """Check everything, what is cheap first, and load."""
    specs = parse_methods(request.methods or ["bicubic", "bilinear", "uplift", *["vae"] * request.of_photographs])
    _check_metrics(request)
    prepare = _prepare_photographs if request.of_photographs else _prepare_prompts
    protocol, pipeline = prepare(request, folder, state.device)
    for scale in request.scales:
        _edges_to_time(request, protocol, scale)
    names = request.metrics or default_metrics(request, protocol, announce=state.is_main_process)
    metrics = Metrics(
        names=tuple(names),
        inception=load_inception(request.inception_weights).to(state.device) if {*SET_METRICS} & {*names} else None,
        lpips=load_lpips().to(state.device) if "lpips" in names else None,
        patch_size=request.patch_size or protocol.output_edge(min(request.scales)) // 2,
        patches=request.patches,
        seed=request.seed,
    )
    methods = make_methods(
        specs,
        pipeline=pipeline,
        seed=request.seed,
        samples=protocol.outline(),
        of_latents=not protocol.paired,
        device=state.device,
    )
    for note in filter(None, (method.note for method in methods)):
        _announce(note, state.is_main_process)
    return Evaluation(protocol, methods, metrics, folder / "records", device=state.device)


def _check_metrics(request: Request) -> None:
    without_truth = {*(request.metrics or [])} & {*IMAGE_METRICS}
    if without_truth and not request.of_photographs:
        raise ValueError(
            f"`metrics` must be of {', '.join(SET_METRICS)} for prompts, got {min(without_truth)!r}, which compares "
            "with a photograph."
        )


def default_metrics(request: Request, protocol: Protocol, *, announce: bool) -> tuple[str, ...]:
    """What is measured where nothing is named: what can be had."""
    if not request.of_photographs:
        statistics = protocol.statistics
        served = [name for name in ("fid", "kid") if statistics is None or statistics.serves(name)]
        if "kid" not in served:
            _announce("KID is left out: the real images' statistics have no features.", announce)
        return tuple(served)
    plain = ("psnr", "ssim", "color_shift")
    if request.inception_weights or downloaded_weights():
        return (*SET_METRICS, *plain)
    _announce(f"FID, patch-FID and KID are left out. {HOW_TO_GET_WEIGHTS}", announce)
    return plain


def _announce(sentence: str, here: bool) -> None:
    if here:
        print(sentence, file=sys.stderr)


def _prepare_photographs(
    request: Request, folder: Path, device: torch.device
) -> tuple[SuperResolution, DiffusionPipeline]:
    """The protocol, and the pipeline of the method uplift."""
    photographs = Photographs(
        request.data_dir, dataset_name=request.dataset_name, image_column=request.image_column, limit=request.limit
    )
    pipeline = load_pipeline(request.model, vae=None)
    check_model(pipeline)
    protocol = SuperResolution(
        photographs,
        scales=tuple(request.scales),
        crop=request.crop,
        multiple=pipeline.latent_space.spatial_factor,
        allow_greyscale=request.allow_greyscale,
    )
    return protocol, pipeline.to(device)


def _prepare_prompts(request: Request, folder: Path, device: torch.device) -> tuple[TextToImage, DiffusionPipeline]:
    """The protocol, and the pipeline of the method uplift for the protocol's latents."""
    prompts = read_prompts(request.prompts, limit=request.limit)
    for name in ("stable_diffusion", "real_images"):
        if getattr(request, name) is None:
            raise ValueError(f"`{name}` must be given with --prompts, got nothing.")
    protocol = TextToImage(
        prompts,
        pipeline=load_pipeline(request.stable_diffusion, vae=None).to(device),
        folder=folder / "latents",
        real_images=request.real_images,
        scales=tuple(request.scales),
        seed=request.seed,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
    )
    pipeline = load_pipeline(request.model, vae=protocol.pipeline.vae, latent_space=protocol.space.name)
    check_model(pipeline)
    return protocol, for_latents(pipeline, protocol.space).to(device)


def _edges_to_time(request: Request, protocol: Protocol, scale: int) -> list[int]:
    """Edges of outputs, in pixels, that of the outputs measured among them."""
    whole, multiple = protocol.output_edge(scale), scale * protocol.multiple
    for edge in request.latency_sizes or []:
        if edge % multiple:
            raise ValueError(f"`latency_sizes` must be multiples of {multiple} for {scale}x, got {edge}.")
    fractions = [edge for edge in (whole // 4, whole // 2) if edge and edge % multiple == 0]
    return sorted({*(request.latency_sizes or fractions), whole})


def _report(evaluation: Evaluation, request: Request, *, processes: int) -> None:
    """Time the methods, compute the figures, print the tables, and write everything down where asked."""
    costs = None
    if request.latency_repeats:
        edges = {scale: _edges_to_time(request, evaluation.protocol, scale) for scale in request.scales}
        costs = evaluation.measure_costs(edges=edges, repeats=request.latency_repeats)
    results = compute_results(evaluation, seed=request.seed, costs=costs)
    description = describe_run(evaluation, command=request.command, seed=request.seed, processes=processes)
    text = report_markdown(results, description)
    print(text)
    folder = request.output_dir
    if folder is None:
        return
    values = report_json(results, description)
    write_whole(folder / "report.json", json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(folder / "report.md", text)
    write_whole(folder / "figures.csv", report_csv(results, [item.name for item in evaluation.protocol.items]))
    _write_pictures(evaluation, results, folder)


def _write_pictures(evaluation: Evaluation, results: Results, folder: Path) -> None:
    (folder / "plots").mkdir(exist_ok=True)
    for name, figure in make_plots(results).items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        write_whole(folder / "plots" / f"{name}.png", picture.getvalue())
    truths = evaluation.protocol.previews(rows_to_show(len(evaluation.protocol.items)))
    for scale, found in results.items():
        save_image(make_contact_sheet(found.previews, truths), folder / f"contact_sheet_{scale}x.png", overwrite=True)
