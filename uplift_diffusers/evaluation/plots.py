"""Pictures for the report: quality against time, bars with intervals, time against size, and crops side by side."""

import math
from collections.abc import Callable

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image

from uplift_diffusers.evaluation.report import heading
from uplift_diffusers.evaluation.results import Results, ScaleResults

PANEL_INCHES = (4.8, 3.6)
MARGIN_PX = 4
HEADING_PX = 16


def make_plots(results: Results) -> dict[str, Figure]:
    """By file name without suffix; those for which something was measured."""
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
        truths: the same crops of the photographs; None where there are none.
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
        if estimate.low is not None:
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
