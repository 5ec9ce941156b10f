"""The report: report.json with every figure, report.md with the tables, figures.csv with a row for each output."""

import csv
import dataclasses
import io
import json
import math
import platform

import numpy as np
import torch

from uplift_diffusers._version import __version__
from uplift_diffusers.evaluation.digests import digest
from uplift_diffusers.evaluation.evaluate import Evaluation
from uplift_diffusers.evaluation.results import COMPARED, Results, ScaleResults, gap_closed
from uplift_diffusers.evaluation.statistics import FEW_SAMPLES, KID_SUBSETS, Estimate
from uplift_diffusers.runtime import device_name

COLUMNS = {
    "fid": ("FID", "↓", "{:.2f}"),
    "patch_fid": ("patch-FID", "↓", "{:.2f}"),
    "kid": ("KID", "↓", "{:.4f}"),
    "psnr": ("PSNR (dB)", "↑", "{:.2f}"),
    "ssim": ("SSIM", "↑", "{:.4f}"),
    "lpips": ("LPIPS", "↓", "{:.4f}"),
    "color_shift": ("colour shift", "↓", "{:.2f}"),
}
"""Name, direction of what is better, and format of every metric, in the order of the table."""


def heading(metric: str, estimate: Estimate) -> str:
    """Name, direction and number of samples of a metric."""
    return f"{COLUMNS[metric][0]} {COLUMNS[metric][1]} (n = {estimate.samples})"


def describe_run(evaluation: Evaluation, *, command: str, seed: int, processes: int) -> dict:
    """What the figures come from, as JSON values: data, settings, weights, seeds, versions, hardware."""
    protocol, metrics = evaluation.protocol, evaluation.metrics
    return {
        "command": command,
        "protocol": protocol.identity,
        "scales": list(protocol.scales),
        "data": {"count": len(protocol.items), "digest": digest([item.digest for item in protocol.items])},
        "real_images": {
            "count": protocol.real_count,
            "digest": protocol.real_digest,
        },
        "metrics": metrics.identity,
        "methods": {
            method.name: {**method.identity, "parameters": method.parameters, "note": method.note}
            for method in evaluation.methods
        },
        "seed": seed,
        "processes": processes,
        "versions": {
            "uplift_diffusers": __version__,
            **evaluation.software,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "hardware": f"{device_name(evaluation.device)}, {torch.get_num_threads()} threads",
    }


def report_json(results: Results, run: dict) -> dict:
    """Everything, as JSON values; an infinite PSNR is the string "inf"."""
    scales = {
        scale: {
            "output_edge": found.output_edge,
            "scores": found.scores,
            f"{COMPARED}_minus": found.differences,
            "costs": found.costs,
        }
        for scale, found in results.items()
    }
    return _as_json({**run, "results": scales, "warnings": warnings_of(results, run)})


def report_csv(results: Results, names: list[str]) -> str:
    """One row for each item (by its name), scale and method with the figures of that output."""
    text = io.StringIO()
    metrics = list(next(iter(_first(results).values.values())))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["item", "scale", "method", *metrics])
    for index, item in enumerate(names):
        for scale, found in results.items():
            for method, values in found.values.items():
                writer.writerow([item, scale, method, *(repr(float(values[metric][index])) for metric in metrics)])
    return text.getvalue()


def report_markdown(results: Results, run: dict) -> str:
    """The tables and what they come from."""
    lines = []
    for scale, found in results.items():
        lines += [f"## {scale}x", "", *_score_table(found, run), ""]
        if found.differences:
            lines += [*_difference_table(found), ""]
        measured = {"bilinear", COMPARED, "vae"} <= found.scores.keys() and "psnr" in found.scores["vae"]
        if measured and (share := gap_closed(found.scores)) is not None:
            lines += [f"{scale}x: UPLiFT closes {share:.1%} of the PSNR gap from bilinear to vae.", ""]
    lines += [f"**{warning}**\n" for warning in warnings_of(results, run)]
    return "\n".join([*lines, *_notes(results, run), ""])


def warnings_of(results: Results, run: dict) -> list[str]:
    """What a reader must know before believing the figures."""
    warnings = [method["note"] for method in run["methods"].values() if method["note"]]
    scores = next(iter(_first(results).scores.values()))
    if run["real_images"]["count"] is None and "fid" in scores:
        warnings.append("How many real images there were is not known: the statistics do not say.")
    counts = [scores[name].samples for name in ("fid", "patch_fid") if name in scores]
    if few := [str(count) for count in counts if count < FEW_SAMPLES]:
        warnings.append(
            f"FID from {' and '.join(few)} samples: below {FEW_SAMPLES} it is far too large. Compare methods within "
            "this report, not with published figures."
        )
    return warnings


def _score_table(found: ScaleResults, run: dict) -> list[str]:
    first = next(iter(found.scores.values()))
    metrics = [name for name in COLUMNS if name in first]
    headings = ["method", "parameters", *(heading(name, first[name]) for name in metrics)]
    headings += ["s/image", "encode + upsample + decode", "peak memory"] if found.costs else []
    rows = []
    for name, scores in found.scores.items():
        parameters = sum(run["methods"][name]["parameters"].values())
        cells = [name, f"{parameters / 1e6:.2f} M" if parameters else "–"]
        cells += [_cell(scores[metric], COLUMNS[metric][2]) for metric in metrics]
        cost = found.cost(name)
        if found.costs and cost is None:
            cells += ["–"] * 3
        elif cost is not None:
            stages = " + ".join(f"{value:.3f}" for value in (cost.encode, cost.upsample, cost.decode))
            memory = "–" if cost.peak_bytes is None else f"{cost.peak_bytes / 1e6:.0f} MB"
            cells += [f"{cost.seconds:.3f}", stages, memory]
        rows.append(cells)
    return _table(headings, rows)


def _difference_table(found: ScaleResults) -> list[str]:
    metrics = [name for name in COLUMNS if name in next(iter(found.differences.values()))]
    rows = [
        [name, *(_cell(by_metric[metric], COLUMNS[metric][2].replace(":", ":+")) for metric in metrics)]
        for name, by_metric in found.differences.items()
    ]
    return _table([f"{COMPARED} minus", *(COLUMNS[name][0] for name in metrics)], rows)


def _table(headings: list[str], rows: list[list[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _notes(results: Results, run: dict) -> list[str]:
    first = _first(results)
    noun = "prompts" if run["protocol"]["protocol"] == "text-to-image" else "photographs"
    notes = [
        f"{run['data']['count']} {noun}; n: images, or patches of images, that a figure comes from. In brackets "
        f"intervals of 95 %: by bootstrap over images, and of {KID_SUBSETS} random subsets for KID. Colour shift is "
        "the mean difference of the channels' means, in steps of 8 bits. Parameters are without those of the VAE."
    ]
    if first.costs:
        notes.append(
            "Seconds are medians after a warm-up, one output at a time, in one process. Peak memory is what a call "
            "took beyond the weights and all else that was in memory before it."
        )
    settings = json.dumps({**run["protocol"], **run["metrics"], "seed": run["seed"]})
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    notes.append(f"`{settings}`; data {run['data']['digest']}; {versions}; {run['hardware']}.")
    notes.append(f"Made with `{run['command']}`.")
    return "\n\n".join(notes).split("\n")


def _first(results: Results) -> ScaleResults:
    return next(iter(results.values()))


def _cell(estimate: Estimate | None, layout: str) -> str:
    if estimate is None:
        return "–"
    text = _number(estimate.value, layout)
    if estimate.low is None or math.isinf(estimate.value):
        return text
    return f"{text} [{_number(estimate.low, layout)}, {_number(estimate.high, layout)}]"


def _number(value: float, layout: str) -> str:
    if math.isnan(value):
        return "not a number"
    return layout.format(value) if math.isfinite(value) else layout.format(value).replace("inf", "∞")


def _as_json(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return _as_json({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
