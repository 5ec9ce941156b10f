"""
The report: tables, all figures as JSON, a CSV row for each output, plots, and crops side by side.

`write_report` writes all of it; the other functions make the parts.
"""

import csv
import dataclasses
import io
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image

from uplift_diffusers.evaluation.measure import COMPARED, Evaluation, Results, ScaleResults, gap_closed, rows_to_show
from uplift_diffusers.evaluation.records import digest, write_whole
from uplift_diffusers.evaluation.statistics import FEW_SAMPLES, KID_SUBSETS, Estimate
from uplift_diffusers.images.files import save_image
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
"""Name, better direction, and format of every metric, in the order of the table."""

PANEL_INCHES = (4.8, 3.6)
MARGIN_PX = 4
HEADING_PX = 16


def heading(metric: str, estimate: Estimate) -> str:
    """Name, direction and number of samples of a metric."""
    return f"{COLUMNS[metric][0]} {COLUMNS[metric][1]} (n = {estimate.samples})"


def write_report(evaluation: Evaluation, results: Results, run: dict, folder: Path) -> None:
    """
    Write report.json, report.md, figures.csv, plots/*.png and contact_sheet_*.png, each atomically.

    Args:
        evaluation: the evaluation.
        results: from `compute_results`.
        run: from `describe_run`.
        folder: an existing folder.
    """
    values = json.dumps(report_json(results, run), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(folder / "report.json", values + "\n")
    write_whole(folder / "report.md", report_markdown(results, run))
    write_whole(folder / "figures.csv", report_csv(results, [item.name for item in evaluation.protocol.items]))
    (folder / "plots").mkdir(exist_ok=True)
    for name, figure in make_plots(results).items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        write_whole(folder / "plots" / f"{name}.png", picture.getvalue())
    truths = evaluation.protocol.previews(rows_to_show(len(evaluation.protocol.items)))
    for scale, found in results.items():
        save_image(make_contact_sheet(found.previews, truths), folder / f"contact_sheet_{scale}x.png", overwrite=True)


def describe_run(evaluation: Evaluation, *, command: str, seed: int, processes: int, dtype: str = "float32") -> dict:
    """The provenance of the figures, as JSON values: data, settings, weights, seeds, versions, hardware."""
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
        "versions": {**evaluation.versions, "numpy": np.__version__, "python": platform.python_version()},
        "hardware": f"{device_name(evaluation.device)}, {torch.get_num_threads()} threads",
        "dtype": dtype,
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
    """The tables and their provenance."""
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
    """Warnings for readers of the figures."""
    warnings = [method["note"] for method in run["methods"].values() if method["note"]]
    scores = next(iter(_first(results).scores.values()))
    if run["real_images"]["count"] is None and "fid" in scores:
        warnings.append("The number of real images is unknown: the statistics do not include it.")
    counts = [scores[name].samples for name in ("fid", "patch_fid") if name in scores]
    if few := [str(count) for count in counts if count < FEW_SAMPLES]:
        warnings.append(
            f"FID from {' and '.join(few)} samples: below {FEW_SAMPLES} it is strongly biased. Compare methods within "
            "this report, not with published figures."
        )
    return warnings


def make_plots(results: Results) -> dict[str, Figure]:
    """Plots by file name without suffix, if there are measurements for them."""
    first = next(iter(results.values()))
    measured = next(iter(first.scores.values())).keys()
    plots = {}
    if bars := [metric for metric in ("fid", "ssim") if metric in measured]:
        plots["scores"] = _grid(results, bars, _bars)
    points = [metric for metric in ("psnr", "ssim", "fid") if metric in measured]
    if first.costs and points:
        plots["quality_against_time"] = _grid(results, points, _points)
    if any(len(costs) > 1 for costs in first.costs.values()):
        plots["time_against_size"] = _grid(results, ["seconds"], _lines)
    return plots


def make_contact_sheet(previews: dict[str, list[torch.Tensor]], truths: list[torch.Tensor] | None) -> Image.Image:
    """
    Crops side by side, a column for each method.

    Args:
        previews: by method, (3, h, w) uint8 for each row.
        truths: the same crops of the photographs, or None.
    """
    columns = previews if truths is None else {"photograph": truths, **previews}
    first = next(iter(columns.values()))
    height, width = first[0].shape[1:]
    size = (len(columns) * (width + MARGIN_PX), HEADING_PX + len(first) * (height + MARGIN_PX))
    sheet = Image.new("RGB", size, "white")
    for column, (name, crops) in enumerate(columns.items()):
        left = column * (width + MARGIN_PX)
        ImageDraw.Draw(sheet).text((left, 2), name, fill="black")
        for row, crop in enumerate(crops):
            sheet.paste(to_pil_image(crop), (left, HEADING_PX + row * (height + MARGIN_PX)))
    return sheet


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
            "Seconds are medians after a warm-up, one output at a time, in one process. Peak memory is that of a "
            "call beyond the weights and everything else in memory before it."
        )
    settings = json.dumps({**run["protocol"], **run["metrics"], "seed": run["seed"]})
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    notes.append(f"`{settings}`; data {run['data']['digest']}; {versions}; {run['hardware']}, {run['dtype']}.")
    notes.append(f"Made with `{run['command']}`.")
    return "\n\n".join(notes).split("\n")


def _first(results: Results) -> ScaleResults:
    return next(iter(results.values()))


def _cell(estimate: Estimate | None, layout: str) -> str:
    if estimate is None:
        return "–"
    text = _number(estimate.value, layout)
    if estimate.low is None or estimate.high is None or math.isinf(estimate.value):
        return text
    return f"{text} [{_number(estimate.low, layout)}, {_number(estimate.high, layout)}]"


def _number(value: float, layout: str) -> str:
    if math.isnan(value):
        return "not a number"
    return layout.format(value) if math.isfinite(value) else layout.format(value).replace("inf", "∞")


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _as_json({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _grid(results: Results, metrics: list[str], draw: Callable[[Axes, ScaleResults, str], None]) -> Figure:
    """A row of panels for each scale, a column for each metric."""
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * len(metrics), height * len(results)), layout="constrained")
    panels = figure.subplots(len(results), len(metrics), squeeze=False)
    for row, (scale, found) in zip(panels, results.items(), strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            draw(axes, found, metric)
            axes.set_title(f"{scale}x", loc="left", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
    return figure


def _bars(axes: Axes, found: ScaleResults, metric: str) -> None:
    estimates = [scores[metric] for scores in found.scores.values()]
    for position, estimate in enumerate(estimates):
        axes.bar(position, estimate.value, color=f"C{position}", width=0.7)
        if estimate.low is not None and estimate.high is not None:
            axes.vlines(position, estimate.low, estimate.high, color="black")
    axes.set_xticks(range(len(estimates)), found.scores, rotation=30, ha="right")
    axes.set_ylabel(heading(metric, estimates[0]))


def _points(axes: Axes, found: ScaleResults, metric: str) -> None:
    for position, (name, scores) in enumerate(found.scores.items()):
        cost, value = found.cost(name), scores[metric].value
        if cost is not None and math.isfinite(value):
            place = (cost.seconds, value)
            axes.plot(*place, "o", color=f"C{position}")
            axes.annotate(name, place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.margins(0.15)
    axes.set_xlabel("seconds an image")
    axes.set_ylabel(heading(metric, next(iter(found.scores.values()))[metric]))


def _lines(axes: Axes, found: ScaleResults, metric: str) -> None:
    for name, costs in found.costs.items():
        axes.plot([cost.edge for cost in costs], [getattr(cost, metric) for cost in costs], "o-", label=name)
    edges = [cost.edge for cost in next(iter(found.costs.values()))]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(edges, [str(edge) for edge in edges])
    axes.set_xlabel("edge of the output (px)")
    axes.set_ylabel("seconds an image")
    axes.legend(fontsize=7)
