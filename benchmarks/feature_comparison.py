"""
Train UPLiFT, LiFT, JAFAR and AnyUp for the same features, and measure drift and the accuracy of probes.

    python -m benchmarks.feature_comparison --backbone effnet16 --head scale_head.safetensors \\
        --photographs photos/train CamVid/train --data_dir CamVid --output_dir report
    python -m benchmarks.feature_comparison ... --seeds 1 --drift_steps 3 --no_report    # part of the work

`--backbone` is what `FeatureBackbone.from_pretrained` takes, `--head` a fixed 1x1 convolution of its features, for a
backbone whose own channels change too much with the size of the image.

All four networks have about the same number of parameters and are trained with the losses of `train_features.py`, in
the schedule of its `small` recipe, on the same squashed photographs in the same order. The features of the photographs
are computed once, so the time of a training is that of the network only: processor seconds. Equal steps: all make
STEPS. Equal time: all get the time that the quickest of them needs for STEPS, with a schedule of that length.

Measured on CamVid's test part: drift and one frozen probe, as in `eval_predictive.py --task drift`, and a probe fitted
again on each upsampler's features. The same command goes on where it was stopped: what lies in OUTPUT_DIR/records is
not computed again.
"""

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset
from transformers import PreTrainedModel

from benchmarks.measure import environment
from uplift_diffusers import FeatureBackbone
from uplift_diffusers.data.dataset import Photographs
from uplift_diffusers.data.sources import FolderSource
from uplift_diffusers.evaluation.predictive.datasets import (
    LabelledImages,
    open_dataset,
    read_image,
    square,
)
from uplift_diffusers.evaluation.predictive.drift import compare_pooled
from uplift_diffusers.evaluation.predictive.peers import JAFAR, AnyUp, FeatureUpsampler, load_peer
from uplift_diffusers.evaluation.predictive.probes import (
    Schedule,
    SegmentationProbe,
    at_size,
    count_pixels,
    fit,
    intersection_over_union,
    score_counts,
    segmentation_loss,
)
from uplift_diffusers.evaluation.predictive.upsamplers import UPLiFT
from uplift_diffusers.evaluation.records import (
    Entry,
    Record,
    RecordStore,
    digest,
    digest_weights,
    versions,
    write_whole,
)
from uplift_diffusers.feature_space import EncodedImage, resize_bilinear
from uplift_diffusers.images.files import save_image
from uplift_diffusers.pipelines.features import principal_components
from uplift_diffusers.training.features import (
    METHODS,
    SmallFeatureTrainingConfig,
    Squash,
    TrainedPeer,
    add_peer,
    image_pyramid,
)

TRAINING_PX, TEST_PX, PICTURE_PX = 192, 128, 256
REFIT_STEPS = 2
"""2x steps after which a probe is fitted again: as many as training knows."""
PROBES = Schedule(epochs=10)
BUDGETS = ("equal steps", "equal time")
TRAINED = ("uplift", "lift", "jafar", "anyup")
LARGER = "image at 2x"
"""In the place of an upsampler: what the backbone says of the image at twice the size."""
AT_ONCE = 8
"""Images that the backbone sees at a time."""

add_peer("jafar", lambda space: JAFAR(space.channels, width=48))
add_peer("anyup", lambda space: AnyUp(width=40))


class ProjectedBackbone(FeatureBackbone):
    """
    A backbone whose features are a fixed 1x1 convolution of those of `model`.

    Args:
        model: as for [`FeatureBackbone`].
        head: `weight` (C, channels of `model`, 1, 1) and `bias` (C,).
    """

    def __init__(self, model: PreTrainedModel, head: dict[str, torch.Tensor]):
        super().__init__(model)
        self.head = head
        name = f"{self.space.name}-projected"
        self.space = dataclasses.replace(self.space, name=name, channels=len(head["weight"]))

    def encode_with_cls(self, image: torch.Tensor) -> EncodedImage:
        features = super().encode_with_cls(image).features
        return EncodedImage(F.conv2d(features, self.head["weight"], self.head["bias"]), None)


@dataclass(frozen=True)
class Study:
    """
    What all measurements share.

    Args:
        backbone: of the features.
        data: `photographs` (n, 3, R, R) uint8, squashed, and their features at R, R/2 and R/4, `level0` and so on; for
            CamVid's parts `train` and `test` images in [0, 1], `labels_…`, and `larger_…`, the features of the images
            at twice the size.
        num_classes: of the labels.
        store: of what was computed.
        identity: what every record depends on.
        steps: of the trainings at equal steps.
        drift_steps: 2x steps up to which the drift is measured.
    """

    backbone: FeatureBackbone
    data: dict[str, torch.Tensor]
    num_classes: int
    store: RecordStore
    identity: dict
    steps: int
    drift_steps: int

    def remember(self, group: str, name: str, compute: Callable[[], Record]) -> Record:
        return _remember(self.store, Entry(group, name, {**self.identity, "name": name}), compute)


def open_study(options: argparse.Namespace) -> Study:
    """Read all pictures and compute what the backbone says of them, or read that from the records."""
    backbone = FeatureBackbone.from_pretrained(options.backbone)
    head = load_file(options.head) if options.head else {}
    if head:
        backbone = ProjectedBackbone(backbone.model, head)
    backbone.model.requires_grad_(False)
    photographs = [Photographs(FolderSource(folder), Squash(TRAINING_PX)) for folder in options.photographs]
    parts = {part: open_dataset("camvid", options.data_dir, split, size=TEST_PX) for part, split in _SPLITS.items()}
    identity = {
        "backbone": digest_weights([backbone.model, nn.ParameterDict(head)]),
        "pictures": [*map(len, photographs), *([pair.name for pair in part.pairs] for part in parts.values())],
        "px": [TRAINING_PX, TEST_PX],
        "versions": versions(),
    }
    identity = {"study": digest(identity), "versions": versions()}
    store = RecordStore(Path(options.output_dir) / "records")
    return Study(
        backbone=backbone,
        data=_remember(store, Entry("data", "all", identity), lambda: _encode_data(backbone, photographs, parts)),
        num_classes=parts["test"].classes.count,
        store=store,
        identity=identity,
        steps=options.steps,
        drift_steps=options.drift_steps,
    )


_SPLITS = {"train": "train", "test": "val"}
"""`open_dataset` calls CamVid's test part "val"."""


def _encode_data(
    backbone: FeatureBackbone, photographs: list[Photographs], parts: dict[str, LabelledImages]
) -> dict[str, torch.Tensor]:
    squashed = torch.stack([source[0, index] for source in photographs for index in range(len(source))])
    levels: list[list[torch.Tensor]] = [[], [], []]
    for images in squashed.split(AT_ONCE):
        for level, image in zip(levels, image_pyramid(images / 255, depth=2), strict=True):
            level.append(backbone.encode(image))
    data = {"photographs": squashed, **{f"level{index}": torch.cat(level) for index, level in enumerate(levels)}}
    for name, part in parts.items():
        images, labels = zip(*(part[index] for index in range(len(part))))
        larger = LabelledImages(part.pairs, part.classes, size=2 * TEST_PX)
        data |= {
            name: torch.stack(images),
            f"labels_{name}": torch.stack(labels),
            f"larger_{name}": torch.cat([backbone.encode(larger[index][0][None]) for index in range(len(part))]),
        }
    return data


def _remember(store: RecordStore, entry: Entry, compute: Callable[[], Record]) -> Record:
    """What `compute` gives, or gave at some time before."""
    if not store.holds(entry):
        print(f"{entry.group}: {entry.name}", file=sys.stderr, flush=True)
        store.write(entry, compute())
    return store.read(entry)


def new_model(study: Study, method: str, seed: int) -> tuple[nn.Module, nn.Module]:
    """The network of a method, and what it minimises."""
    torch.manual_seed(seed)
    config = SmallFeatureTrainingConfig(
        method=method, resolution=TRAINING_PX, train_data_dir="photographs", output_dir="runs"
    )
    model, objective, _ = METHODS[method](config, study.backbone)
    return model, objective


def train(study: Study, method: str, seed: int, steps: int) -> Record:
    """The weights after so many steps, and the `seconds` of processor time that they took."""
    recipe = SmallFeatureTrainingConfig
    model, objective = new_model(study, method, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    scheduler = get_scheduler(recipe.lr_scheduler, optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    photographs, size = study.data["photographs"], recipe.train_batch_size
    epochs = -(-steps * size // len(photographs))
    order = torch.cat([torch.randperm(len(photographs), generator=generator) for _ in range(epochs)])
    begin = time.process_time()
    model.train()
    for batch in order.split(size)[:steps]:
        pyramid = image_pyramid(photographs[batch] / 255, depth=2)
        features = [study.data[f"level{level}"][batch] for level in range(3)]
        loss = sum(objective.depth_loss(depth, pyramid, features, generator) for depth in objective.depths)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        scheduler.step()
    seconds = torch.tensor(time.process_time() - begin, dtype=torch.float64)
    return {**{f"weight.{name}": value for name, value in model.state_dict().items()}, "seconds": seconds}


def trained(study: Study, method: str, seed: int, steps: int) -> tuple[FeatureUpsampler, float]:
    """An upsampler after so many steps, and the processor seconds that they took."""
    record = study.remember("trained", f"{method}-{seed}-{steps}", lambda: train(study, method, seed, steps))
    model, _ = new_model(study, method, seed)
    model.load_state_dict({name.removeprefix("weight."): record[name] for name in record if name != "seconds"})
    model.eval().requires_grad_(False)
    return model.network if isinstance(model, TrainedPeer) else UPLiFT(model), record["seconds"].item()


@dataclass(frozen=True)
class Upsampled:
    """
    Features of one upsampler.

    Args:
        study: of the backbone and the images.
        upsample: as `FeatureUpsampler.upsample`.
    """

    study: Study
    upsample: Callable[[torch.Tensor, torch.Tensor, tuple[int, int]], torch.Tensor]

    @torch.no_grad()
    def __call__(self, part: str, step: int) -> torch.Tensor:
        """Of all images of a part, after so many 2x steps; the backbone's own after 0."""
        results = []
        for image in self.study.data[part].split(AT_ONCE if step <= REFIT_STEPS else 1):
            tokens = self.study.backbone.encode(image)
            height, width = tokens.shape[2:]
            results.append(self.upsample(tokens, image, (height << step, width << step)) if step else tokens)
        return torch.cat(results)


class AsTheyAre:
    """In the place of a `FeatureSource`: the data are features already."""

    device = torch.device("cpu")

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return features


def fit_probe(study: Study, features: torch.Tensor, seed: int) -> SegmentationProbe:
    """A probe fitted on features of the training part, with labels at half the size."""
    torch.manual_seed(seed)
    probe = SegmentationProbe(features.shape[1], study.num_classes)
    labels = F.interpolate(study.data["labels_train"][:, None].float(), scale_factor=0.5, mode="nearest-exact")
    data = TensorDataset(features, labels[:, 0].long())
    fit(probe, data, AsTheyAre(), segmentation_loss, dataclasses.replace(PROBES, seed=seed))
    return probe.requires_grad_(False)


def read_probe(study: Study, probe: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """(n, 3, K) of the test part, see `count_pixels`."""
    labels = study.data["labels_test"]
    counts = [
        count_pixels(at_size(probe(one[None]), label[None]).argmax(dim=1), label[None], study.num_classes)
        for one, label in zip(features, labels, strict=True)
    ]
    return torch.from_numpy(np.stack(counts))


def measure_drift(study: Study, features: torch.Tensor, probe: nn.Module) -> Record:
    """`cosine` and `relative_error` (n,) to the tokens, and the `counts` (n, 3, K) of the frozen probe."""
    tokens = Upsampled(study, _nothing)("test", 0)
    pairs = [compare_pooled(one[None], more[None]) for one, more in zip(tokens, features, strict=True)]
    cosine, relative_error = torch.tensor(pairs, dtype=torch.float64).T
    return {"cosine": cosine, "relative_error": relative_error, "counts": read_probe(study, probe, features)}


def measure_refit(study: Study, upsampled: Upsampled, seed: int) -> Record:
    """
    Returns:
        (n, 3, K) of probes fitted again: `refit`, after `REFIT_STEPS`, and `refit_rgb`, with the image as three more
        channels; and `agreement` (n,), the cosine of the first step and the features of the image at twice the size.
    """
    features = {part: upsampled(part, REFIT_STEPS) for part in _SPLITS}
    with_rgb = {
        part: torch.cat([values, 4 * resize_bilinear(study.data[part], tuple(values.shape[2:])) - 2], dim=1)
        for part, values in features.items()
    }
    agreement = F.cosine_similarity(upsampled("test", 1), study.data["larger_test"], dim=1)
    return {
        "refit": read_probe(study, fit_probe(study, features["train"], seed), features["test"]),
        "refit_rgb": read_probe(study, fit_probe(study, with_rgb["train"], seed), with_rgb["test"]),
        "agreement": agreement.mean(dim=(1, 2)),
    }


def measure_larger(study: Study, probe: nn.Module, seed: int) -> Record:
    """The same of the backbone's features of the image at twice the size."""
    features = study.data["larger_test"]
    refitted = fit_probe(study, study.data["larger_train"], seed)
    return {**measure_drift(study, features, probe), "refit": read_probe(study, refitted, features)}


def _nothing(features: torch.Tensor, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return features


def measure(study: Study, seed: int) -> dict[str, dict[str, dict]]:
    """
    By budget and method: `drift`, a record for each step from 0 on, what `measure_refit` returns, `steps`, `seconds`
    and `parameters`.
    """
    tokens = Upsampled(study, _nothing)("train", 0)
    fitted = study.remember("probe", f"tokens-{seed}", lambda: fit_probe(study, tokens, seed).state_dict())
    probe = SegmentationProbe(tokens.shape[1], study.num_classes).requires_grad_(False)
    probe.load_state_dict(fitted)

    def evaluate(name: str, upsampled: Upsampled) -> dict:
        refit = study.remember("refit", f"{name}-{seed}", lambda: measure_refit(study, upsampled, seed))
        drift = [
            study.remember(
                "drift",
                f"{name if step else 'tokens'}-{seed}-{2**step}x",
                lambda step=step: measure_drift(study, upsampled("test", step), probe),
            )
            for step in range(study.drift_steps + 1)
        ]
        return {**refit, "drift": drift}

    def evaluate_trained(method: str, steps: int) -> dict:
        upsampler, seconds = trained(study, method, seed, steps)
        return {
            **evaluate(f"{method}-{steps}", Upsampled(study, upsampler.upsample)),
            "steps": steps,
            "seconds": seconds,
            "parameters": sum(parameter.numel() for parameter in upsampler.parameters()),
        }

    seconds = {method: trained(study, method, seed, study.steps)[1] for method in TRAINED}
    larger = study.remember("refit", f"larger-{seed}", lambda: measure_larger(study, probe, seed))
    bilinear = load_peer("bilinear", channels=study.backbone.space.channels)
    common = {
        LARGER: {"refit": larger["refit"], "drift": [None, larger]},
        "bilinear": evaluate("bilinear", Upsampled(study, bilinear.upsample)),
    }
    found = {}
    for budget in BUDGETS:
        shares = {method: min(seconds.values()) / seconds[method] for method in TRAINED}
        steps = {
            method: study.steps if budget == "equal steps" else int(study.steps * shares[method]) for method in TRAINED
        }
        found[budget] = {**common, **{method: evaluate_trained(method, steps[method]) for method in TRAINED}}
    return found


def write_report(study: Study, seeds: list[int], command: str, folder: Path) -> None:
    """Tables, and all their figures as JSON."""
    by_seed = [measure(study, seed) for seed in seeds]
    figures, lines = {}, ["# UPLiFT, LiFT, JAFAR and AnyUp trained for the same features", ""]
    for budget in BUDGETS:
        found = {name: [of_seed[budget][name] for of_seed in by_seed] for name in by_seed[0][budget]}
        figures[budget] = {name: _figures(records, study.drift_steps) for name, records in found.items()}
        lines += [f"## {budget.capitalize()}", "", *_tables(figures[budget]), "", *_differences(found), ""]
    facts = {
        "seeds": seeds,
        "backbone": study.backbone.space.name,
        "channels": study.backbone.space.channels,
        "pictures": {name: len(study.data[name]) for name in ("photographs", *_SPLITS)},
        "px": {"training": TRAINING_PX, "test": TEST_PX},
        "probes": dataclasses.asdict(PROBES),
        **environment("cpu"),
        "transformers": versions()["transformers"],
    }
    lines += [
        "Means over the seeds, with the lowest and the highest of them in brackets. Cosine and relative error are "
        "between the backbone's features and the result pooled to their size. The frozen probe was fitted on the "
        f"backbone's features; the refitted one on those of the upsampler at {2**REFIT_STEPS}x, with RGB: on the "
        f"image as well, as three more channels. `{LARGER}` is what the backbone says of the image at twice the size, "
        "which is what training aims at; agreement is the cosine of the first step and it. Differences are those of "
        "all seeds' counts together, with intervals of 95 % by paired bootstrap over the images.",
        "",
        f"`{json.dumps(facts)}`",
        "",
        f"Made with `{command}`.",
    ]
    write_whole(folder / "report.json", json.dumps({**facts, "command": command, "figures": figures}, indent=1) + "\n")
    write_whole(folder / "report.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


@torch.no_grad()
def draw(study: Study, photographs: list[str], path: Path) -> None:
    """
    A row for each photograph: it, the backbone's features, and those at every pixel by bilinear interpolation, UPLiFT
    and LiFT, in the colours of the backbone's three principal components; of the first seed, at equal steps.
    """
    upsamplers = [load_peer("bilinear", channels=study.backbone.space.channels)]
    upsamplers += [trained(study, method, 0, study.steps)[0] for method in ("uplift", "lift")]
    rows = []
    for name in photographs:
        image = square(read_image(Path(name)), PICTURE_PX)[None]
        tokens = study.backbone.encode(image)
        colours = principal_components(tokens)
        size = (PICTURE_PX, PICTURE_PX)
        parts = [image, F.interpolate(colours(tokens), size=size, mode="nearest")]
        parts += [colours(upsampler.upsample(tokens, image, size)) for upsampler in upsamplers]
        rows.append(torch.cat(parts, dim=3))
    picture = torch.cat(rows, dim=2)[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    save_image(Image.fromarray(picture), path, overwrite=True)


def _figures(records: list[dict], drift_steps: int) -> dict[str, list[float]]:
    """By heading, the values of every seed."""
    readings: dict[str, Callable[[dict], float]] = {name: lambda record, name=name: record[name] for name in _FACTS}
    readings["agreement"] = lambda record: record["agreement"].double().mean().item()
    for step in range(drift_steps + 1):
        readings[f"cosine, {2**step}x"] = lambda record, step=step: record["drift"][step]["cosine"].mean().item()
        readings[f"relative error, {2**step}x"] = lambda record, step=step: (
            record["drift"][step]["relative_error"].mean().item()
        )
        readings[f"frozen, {2**step}x"] = lambda record, step=step: _score(record["drift"][step]["counts"])
    readings["refitted"] = lambda record: _score(record["refit"])
    readings["with RGB"] = lambda record: _score(record["refit_rgb"])
    figures = {}
    for heading, read in readings.items():
        try:
            figures[heading] = [read(record) for record in records]
        except (KeyError, IndexError, TypeError):  # not measured of this one
            continue
    return figures


_FACTS = {"parameters": "{:,.0f}", "steps": "{:.0f}", "seconds": "{:.0f}"}


def _score(counts: torch.Tensor) -> float:
    return float(intersection_over_union(counts.sum(dim=0).numpy()))


def _tables(figures: dict[str, dict[str, list[float]]]) -> list[str]:
    def cell(values: list[float] | None, layout: str) -> str:
        if values is None:
            return "–"
        mean, low, high = (layout.format(value) for value in (np.mean(values), min(values), max(values)))
        return mean if low == high else f"{mean} [{low}, {high}]"

    def table(title: str, columns: dict[str, str]) -> list[str]:
        rows = [
            [name, *(cell(of_method.get(column), layout) for column, layout in columns.items())]
            for name, of_method in figures.items()
        ]
        return [*_table([title, *columns], rows), ""]

    headings = list(figures["bilinear"])
    drift = [heading for heading in headings if heading.startswith(("cosine", "relative")) and " 1x" not in heading]
    probes = [heading for heading in headings if heading.startswith(("frozen", "refitted", "with"))]
    return [
        *table("training", {**_FACTS, "agreement": "{:.3f}"}),
        *table("drift", dict.fromkeys(sorted(drift, key=lambda heading: heading.split(",")[0]), "{:.3f}")),
        *table("mIoU (%)", dict.fromkeys(probes, "{:.1f}")),
    ][:-1]


def _differences(found: dict[str, list[dict]]) -> list[str]:
    """UPLiFT minus the others."""
    last = len(found["uplift"][0]["drift"]) - 1
    readings = {
        f"frozen, {2**REFIT_STEPS}x": lambda record: record["drift"][REFIT_STEPS]["counts"],
        f"frozen, {2**last}x": lambda record: record["drift"][last]["counts"],
        "refitted": lambda record: record["refit"],
        "with RGB": lambda record: record["refit_rgb"],
    }
    rows = []
    for name in ("bilinear", *TRAINED[1:]):
        cells = []
        for read in readings.values():
            own, other = (sum(read(record) for record in found[method]).numpy() for method in ("uplift", name))
            estimate = score_counts(own, intersection_over_union, seed=0, other=other)
            cells.append(f"{estimate.value:+.1f} [{estimate.low:+.1f}, {estimate.high:+.1f}]")
        rows.append([name, *cells])
    return _table(["mIoU (%), UPLiFT minus", *readings], rows)


def _table(headings: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0], allow_abbrev=False)
    parser.add_argument("--backbone", required=True, metavar="DIR_OR_HUB_ID")
    parser.add_argument("--head", metavar="FILE", help="fixed 1x1 convolution of the backbone's features")
    parser.add_argument("--photographs", required=True, nargs="+", metavar="DIR", help="to train on")
    parser.add_argument("--data_dir", required=True, help="CamVid")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=300, help="with 4 photographs each, at equal steps")
    parser.add_argument("--drift_steps", type=int, default=4, help="2x steps up to which drift is measured")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pictures", nargs="+", metavar="FILE", help="photographs for features.png in OUTPUT_DIR")
    parser.add_argument("--no_report", action="store_true", help="only compute")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    study = open_study(options)
    if options.no_report:
        for seed in options.seeds:
            measure(study, seed)
        return
    command = shlex.join(["python", "-m", "benchmarks.feature_comparison", *arguments])
    write_report(study, options.seeds, command, Path(options.output_dir))
    if options.pictures:
        draw(study, options.pictures, Path(options.output_dir) / "features.png")


if __name__ == "__main__":
    main()
