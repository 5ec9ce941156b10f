"""The four tasks of `eval_predictive.py`: the measurements and their records."""

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
import transformers
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from uplift_diffusers._version import __version__
from uplift_diffusers.evaluation.predictive.datasets import (
    IMAGE_SIZE,
    Classes,
    DepthImages,
    LabelledImages,
    find_photographs,
    open_dataset,
    pair_folders,
)
from uplift_diffusers.evaluation.predictive.depth_targets import PredictedDepths
from uplift_diffusers.evaluation.predictive.drift import measure_drift
from uplift_diffusers.evaluation.predictive.peers.interface import FeatureUpsampler
from uplift_diffusers.evaluation.predictive.probes import (
    DepthProbe,
    FeatureSource,
    Schedule,
    SegmentationProbe,
    count_segmentation,
    depth_loss,
    fit,
    has_depth,
    measure_depth,
    segmentation_loss,
)
from uplift_diffusers.evaluation.predictive.scaling import (
    Limits,
    Measured,
    Workload,
    available_bytes,
    known_methods,
    measure_costs,
    measure_in_process,
    sides_of,
)
from uplift_diffusers.evaluation.predictive.tables import (
    write_cost_report,
    write_depth_report,
    write_drift_report,
    write_segmentation_report,
)
from uplift_diffusers.evaluation.predictive.upsamplers import UpsamplerSpec, load_upsampler
from uplift_diffusers.evaluation.records import Entry, Record, RecordStore, digest_weights
from uplift_diffusers.runtime import device_name

SCHEDULES = {
    "segmentation": Schedule(),
    "drift": Schedule(),
    "depth": Schedule(epochs=5, learning_rate=5e-3),
}
"""Default training settings of the probes, by task."""

_FOLDERS = ("train_images", "train_targets", "val_images", "val_targets")

Upsamplers = dict[str, FeatureUpsampler]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of `eval_predictive.py`."""

    task: str
    command: str
    output_dir: Path
    upsamplers: Sequence[str] | None = None
    device: str = "cpu"
    query_chunk: int | None = None
    backbone: str | None = None
    feature_space: str | None = None
    dataset: str | None = None
    data_dir: str | None = None
    train_images: str | None = None
    train_targets: str | None = None
    val_images: str | None = None
    val_targets: str | None = None
    num_classes: int | None = None
    depth_model: str | None = None
    units_per_metre: float | None = None
    image_size: int = IMAGE_SIZE
    limit: int | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    batch_size: int = 2
    num_workers: int = 0
    seed: int = 0
    fresh: bool = False
    num_steps: int = 4
    tokens: Sequence[int] = (64, 256, 576, 1024, 1521, 2601)
    channels: int = 384
    patch_size: int = 16
    repeats: int = 3
    threads: int = 1
    memory_limit: float | None = None
    time_limit: float = 300.0

    @property
    def schedule(self) -> Schedule:
        given = {"epochs": self.epochs, "learning_rate": self.learning_rate}
        changes = {name: value for name, value in given.items() if value is not None}
        common = {"batch_size": self.batch_size, "seed": self.seed, "num_workers": self.num_workers}
        return replace(SCHEDULES[self.task], **changes, **common)


def run(request: Request) -> None:
    """
    Measure and write the report.

    Raises:
        ValueError, FileNotFoundError: the request is invalid; raised before anything is measured.
    """
    if request.task == "cost":
        run_cost(request)
        return
    specs = [UpsamplerSpec.parse(text) for text in request.upsamplers or ("nearest", "bilinear")]
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(f"`upsamplers` must have different names, got {names}.")
    if request.backbone is None:
        raise ValueError(f"`backbone` must be given for --task {request.task}, got None. Name a folder or a hub id.")
    # Data first, so an error in a folder shows before networks are loaded.
    train, val = open_depths(request) if request.task == "depth" else open_labels(request)
    backbone = _load_backbone(request)
    upsamplers = {
        spec.name: load_upsampler(spec, backbone.space, query_chunk=request.query_chunk).to(request.device)
        for spec in specs
    }
    tasks = {"segmentation": run_segmentation, "depth": run_depth, "drift": run_drift}
    tasks[request.task](request, backbone, upsamplers, train, val)


def open_labels(request: Request) -> tuple[LabelledImages, LabelledImages]:
    """The training and the validation split of a named data set, or of two pairs of folders."""
    size = request.image_size
    if request.dataset is not None:
        if request.data_dir is None:
            raise ValueError(f"`data_dir` must be given for {request.dataset}, got None. Say where it was unpacked.")
        _refuse(request, (*_FOLDERS, "num_classes"), f"for the data set {request.dataset}")
        parts = [open_dataset(request.dataset, request.data_dir, split, size=size) for split in ("train", "val")]
    else:
        _check_folders(request, with_targets=True)
        if request.num_classes is None or not 1 <= request.num_classes <= 255:
            raise ValueError(f"`num_classes` must be from 1 to 255 for a pair of folders, got {request.num_classes}.")
        classes = Classes.in_order(request.num_classes)
        parts = [LabelledImages(pairs, classes, size=size) for pairs in _folder_pairs(request, (".png",))]
    for part in parts:
        part.pairs = part.pairs[: request.limit]
        for _ in _read_targets(part, request):
            pass
    return parts[0], parts[1]


def open_depths(request: Request) -> tuple[Dataset, Dataset]:
    """The training and the validation split, with depths from files or from a model, which are not predicted yet."""
    size = request.image_size
    if request.depth_model is None:
        _check_folders(request, with_targets=True)
        pairs = [part[: request.limit] for part in _folder_pairs(request, (".npy", ".png"))]
        units = 1.0 if request.units_per_metre is None else request.units_per_metre
        train, val = (DepthImages(part, units_per_metre=units, size=size) for part in pairs)
        for name, part in (("train_targets", train), ("val_targets", val)):
            known = [bool(has_depth(target).any()) for target in _read_targets(part, request)]  # of every file
            if not any(known):
                raise ValueError(
                    f"`{name}` must have depths between 1 mm and 10 m, got none in any file for {units:g} units per "
                    "metre. Pass another units_per_metre, such as 1000 for millimetres."
                )
        return train, val
    _refuse(request, ("train_targets", "val_targets", "units_per_metre"), "for depths of a model")
    _check_folders(request, with_targets=False)
    parts = []
    for name, folder in (("train", request.train_images), ("val", request.val_images)):
        assert folder is not None
        images = find_photographs(folder)[: request.limit]
        place = f"{Path(request.depth_model).name}-{name}-{size}"
        kept = request.output_dir / "depths" / place
        parts.append(PredictedDepths(images, request.depth_model, kept, size=size, device=request.device))
    return parts[0], parts[1]


def _read_targets(part: Dataset, request: Request) -> Iterator[torch.Tensor]:
    """
    Read all files of a split, so that a wrong one is found before a probe is trained for hours.

    Raises:
        ValueError, OSError: a photograph or its target cannot be read, or they do not fit each other.
    """
    loader = DataLoader(part, batch_size=None, num_workers=request.num_workers)
    for _, target in tqdm(loader, desc="Files", unit="file", disable=None, dynamic_ncols=True):
        yield target


def run_segmentation(
    request: Request, backbone, upsamplers: Upsamplers, train: LabelledImages, val: LabelledImages
) -> None:
    """One probe for each upsampler, trained on its features at the label's size; mIoU and accuracy."""
    num_classes = train.classes.count

    def measure(name: str) -> Record:
        source = FeatureSource(backbone, upsamplers[name], device=request.device)
        probe = _seeded(request, lambda: SegmentationProbe(backbone.space.channels, num_classes))
        fit(probe, train, source, segmentation_loss, request.schedule, title=name)
        workers = request.num_workers
        counts = count_segmentation(probe, val, source, num_classes=num_classes, num_workers=workers, title=name)
        return {"counts": torch.from_numpy(counts)}

    records = _measure_all(request, backbone, upsamplers, (train, val), measure)
    counts = {name: record["counts"].numpy() for name, record in records.items()}
    write_segmentation_report(counts, describe_run(request, backbone, upsamplers, train, val), request.output_dir)


def run_depth(request: Request, backbone, upsamplers: Upsamplers, train: Dataset, val: Dataset) -> None:
    """One probe for each upsampler, trained on its features and the CLS token; delta1 and RMSE."""
    aligned = isinstance(val, PredictedDepths) and not val.is_metric
    for part in (train, val):
        if isinstance(part, PredictedDepths):
            part.predict()
    channels = FeatureSource(backbone, None, device=request.device, with_cls=True)(train[0][0][None]).shape[1]

    def measure(name: str) -> Record:
        source = FeatureSource(backbone, upsamplers[name], device=request.device, with_cls=True)
        probe = _seeded(request, lambda: DepthProbe(channels))
        fit(probe, train, source, depth_loss, request.schedule, title=name)
        scores = measure_depth(probe, val, source, aligned=aligned, num_workers=request.num_workers, title=name)
        return {metric: torch.from_numpy(values) for metric, values in scores.items()}

    records = _measure_all(request, backbone, upsamplers, (train, val), measure)
    scores = {name: {metric: values.numpy() for metric, values in record.items()} for name, record in records.items()}
    run_facts = {**describe_run(request, backbone, upsamplers, train, val), "aligned": aligned}
    write_depth_report(scores, run_facts, request.output_dir)


def run_drift(request: Request, backbone, upsamplers: Upsamplers, train: LabelledImages, val: LabelledImages) -> None:
    """One probe for all, fitted on the backbone's features and frozen."""
    num_classes = train.classes.count
    probe = _seeded(request, lambda: SegmentationProbe(backbone.space.channels, num_classes))

    def fit_probe(_: str) -> Record:
        source = FeatureSource(backbone, None, device=request.device)
        fit(probe, train, source, segmentation_loss, request.schedule, title="probe of the tokens")
        return {name: tensor.cpu() for name, tensor in probe.state_dict().items()}

    probe.load_state_dict(_measure_all(request, backbone, {"probe": None}, (train, val), fit_probe)["probe"])
    probe.requires_grad_(False).eval()

    def measure(name: str) -> Record:
        steps = measure_drift(
            backbone,
            upsamplers[name],
            probe,
            val,
            num_steps=request.num_steps,
            num_classes=num_classes,
            device=request.device,
            num_workers=request.num_workers,
            title=name,
        )
        columns = ("cosine", "relative_error", "counts")
        return {column: torch.from_numpy(np.stack([getattr(step, column) for step in steps])) for column in columns}

    records = _measure_all(request, backbone, upsamplers, (train, val), measure)
    values = {name: {column: tensor.numpy() for column, tensor in record.items()} for name, record in records.items()}
    write_drift_report(values, describe_run(request, backbone, upsamplers, train, val), request.output_dir)


def run_cost(request: Request) -> None:
    """Seconds, memory and operations of every upsampler against the number of tokens."""
    methods = tuple(request.upsamplers or known_methods())
    unknown = [method for method in methods if method not in known_methods()]
    if unknown:
        raise ValueError(f"`upsamplers` must be among {known_methods()} for --task cost, got {unknown[0]!r}.")
    memory = 0.7 * available_bytes(request.device) if request.memory_limit is None else request.memory_limit * 2**30
    limits = Limits(memory, request.time_limit, repeats=request.repeats, threads=request.threads)
    clock = "processor" if limits.clock(request.device) is time.process_time else "wall-clock"
    store = RecordStore(request.output_dir / "records")

    def remember(workload: Workload, limits: Limits, device: str) -> Measured | str:
        settings = {
            "repeats": limits.repeats,
            "threads": limits.threads,
            "clock": clock,
            "device": device_name(device),
        }
        identity = {**asdict(workload), **settings, "versions": _versions()}
        entry = Entry("cost", f"{workload.method}-{workload.tokens}", identity)
        if request.fresh or not store.holds(entry):
            measured = measure_in_process(workload, limits, device)
            if isinstance(measured, str):
                return measured
            seconds, peak_bytes = measured
            numbers = (seconds, math.nan if peak_bytes is None else peak_bytes)
            store.write(entry, {"seconds_and_bytes": torch.tensor(numbers, dtype=torch.float64)})
        seconds, peak_bytes = store.read(entry)["seconds_and_bytes"].tolist()
        return seconds, None if math.isnan(peak_bytes) else peak_bytes

    points = measure_costs(
        methods,
        sides_of(request.tokens),
        measure=remember,
        limits=limits,
        channels=request.channels,
        patch_size=request.patch_size,
        query_chunk=request.query_chunk,
        device=request.device,
    )
    facts = {
        "channels": request.channels,
        "patch_size": request.patch_size,
        "query_chunk": request.query_chunk,
        "limits": asdict(limits),
        "clock": clock,
        **_facts(request),
        "hardware": f"{device_name(request.device)}, {request.threads} threads",
    }
    write_cost_report(points, facts, request.output_dir)


def describe_run(request: Request, backbone, upsamplers: Upsamplers, train: Any, val: Any) -> dict:
    """The provenance of the figures, as JSON values."""
    return {
        **_facts(request),
        "backbone": backbone.space.name,
        "parameters": {
            name: sum(parameter.numel() for parameter in upsampler.parameters())
            for name, upsampler in upsamplers.items()
        },
        "data": request.dataset or "folders",
        "images": {"train": len(train), "val": len(val)},
        "image_size": request.image_size,
        "schedule": asdict(request.schedule),
        "hardware": f"{device_name(request.device)}, {torch.get_num_threads()} threads",
    }


def _facts(request: Request) -> dict:
    return {"task": request.task, "command": request.command, "seed": request.seed, "versions": _versions()}


def _versions() -> dict[str, str]:
    return {
        "uplift_diffusers": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _load_backbone(request: Request):
    from uplift_diffusers.feature_space import FeatureBackbone

    assert request.backbone is not None
    backbone = FeatureBackbone.from_pretrained(request.backbone, request.feature_space)
    backbone.model.to(request.device)
    return backbone


def _measure_all(
    request: Request,
    backbone,
    upsamplers: Mapping[str, FeatureUpsampler | None],
    parts: Sequence[Dataset],
    measure: Callable[[str], Record],
) -> dict[str, Record]:
    """The results of `measure` by upsampler, read from a record if there is one with the same key."""
    store = RecordStore(request.output_dir / "records")
    common = {
        "task": request.task,
        "schedule": {key: value for key, value in asdict(request.schedule).items() if key != "num_workers"},
        "image_size": request.image_size,
        "num_steps": request.num_steps if request.task == "drift" else None,
        "backbone": digest_weights([backbone.model]),
        "data": [_data_identity(part) for part in parts],
        "device": torch.device(request.device).type,
        "versions": _versions(),
    }
    entries = {}
    for name, upsampler in upsamplers.items():
        made_of = [type(upsampler).__name__, digest_weights([upsampler])] if upsampler is not None else None
        entries[name] = Entry(request.task, name, {**common, "upsampler": made_of})
    missing = [name for name, entry in entries.items() if request.fresh or not store.holds(entry)]
    for name in missing:  # the last one that cannot take images of this size is found before the first is measured
        image = torch.zeros(1, 3, request.image_size, request.image_size)
        FeatureSource(backbone, upsamplers[name], device=request.device)(image)
    for name in missing:
        store.write(entries[name], measure(name))
    return {name: store.read(entry) for name, entry in entries.items()}


def _data_identity(data: Any) -> list:
    """Names and sizes of the files; those of predicted depths name the photograph and the model, too."""
    if isinstance(data, PredictedDepths):
        return [file.name for file in data.files]
    scale = getattr(data, "units_per_metre", None)
    return [[pair.name, pair.image.stat().st_size, pair.target.stat().st_size, scale] for pair in data.pairs]


def _seeded(request: Request, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A probe with initial weights that depend only on the seed, without using the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        return make().to(request.device)


def _refuse(request: Request, names: Sequence[str], where: str) -> None:
    for name in names:
        if getattr(request, name) is not None:
            raise ValueError(f"`{name}` must not be given {where}, where it has no effect.")


def _check_folders(request: Request, *, with_targets: bool) -> None:
    names = _FOLDERS if with_targets else ("train_images", "val_images")
    missing = [name for name in names if getattr(request, name) is None]
    if missing:
        raise ValueError(
            f"`{missing[0]}` must be given, got None. Name a data set, or give folders of photographs and targets for "
            "training and validation."
        )
    for name in names:
        if not Path(getattr(request, name)).is_dir():
            raise FileNotFoundError(f"`{name}` must be a folder, got {getattr(request, name)}.")


def _folder_pairs(request: Request, suffixes: Sequence[str]) -> list:
    folders: Any = ((request.train_images, request.train_targets), (request.val_images, request.val_targets))
    return [pair_folders(images, targets, suffixes=suffixes) for images, targets in folders]
