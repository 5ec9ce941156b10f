"""Reports of the predictive tasks: tables with intervals, all figures as JSON, and a plot, written atomically."""

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from uplift_diffusers.evaluation.predictive.probes import accuracy, intersection_over_union, score_counts
from uplift_diffusers.evaluation.predictive.scaling import (
    ENOUGH_SECONDS,
    REFERENCE,
    CostPoint,
    find_crossing,
    fit_exponent,
)
from uplift_diffusers.evaluation.records import write_whole
from uplift_diffusers.evaluation.statistics import Estimate, bootstrap_mean, paired_difference

PANEL_INCHES = (4.8, 3.6)
QUANTITIES = (
    ("seconds", "seconds", 1.0, "{:.3g}"),
    ("peak_bytes", "peak memory (GiB)", 2**-30, "{:.3g}"),
    ("flop", "GFLOP", 1e-9, "{:.1f}"),
)
"""Columns of a cost table: field, heading, factor to its unit, and format."""


def write_segmentation_report(counts: dict[str, np.ndarray], run: dict, folder: Path) -> None:
    """
    Args:
        counts: by upsampler, (n, 3, K), see `count_pixels`.
        run: of `describe_run`.
        folder: of the report.
    """
    metrics = {"mIoU (%) ↑": intersection_over_union, "accuracy (%) ↑": accuracy}
    seed = run["seed"]
    scores = {
        name: {metric: score_counts(values, score, seed=seed) for metric, score in metrics.items()}
        for name, values in counts.items()
    }
    differences = {
        name: {
            metric: score_counts(counts[REFERENCE], score, seed=seed, other=values)
            for metric, score in metrics.items()
        }
        for name, values in counts.items()
        if REFERENCE in counts and name != REFERENCE
    }
    notes = "One 1x1 convolution for each upsampler, trained on its features at the size of the labels."
    _write(folder, run, _two_tables(scores, differences, run), notes, scores=scores, differences=differences)


def write_depth_report(scores: dict[str, dict[str, np.ndarray]], run: dict, folder: Path) -> None:
    """
    Args:
        scores: by upsampler, "delta1" and "rmse" of every image.
        run: of `describe_run`, and whether predictions were "aligned".
        folder: of the report.
    """
    headings = {"delta1": "δ1 (%) ↑", "rmse": "RMSE ↓"}
    seed = run["seed"]
    found = {
        name: {heading: bootstrap_mean(values[key], seed=seed) for key, heading in headings.items()}
        for name, values in scores.items()
    }
    differences = {
        name: {
            heading: paired_difference(scores[REFERENCE][key], values[key], seed=seed)
            for key, heading in headings.items()
        }
        for name, values in scores.items()
        if REFERENCE in scores and name != REFERENCE
    }
    notes = (
        "Targets are relative: each image's were divided by their median, and predictions were aligned to them by "
        "scale and shift before scoring. The figures are not those of relative depths that are scored as metres."
        if run["aligned"]
        else "Targets are metres, and predictions were scored as they are."
    )
    notes += " The backbone was given normalised images."
    _write(folder, run, _two_tables(found, differences, run), notes, scores=found, differences=differences)


def write_drift_report(values: dict[str, dict[str, np.ndarray]], run: dict, folder: Path) -> None:
    """
    Args:
        values: by upsampler, "cosine" and "relative_error" (S + 1, n), and "counts" (S + 1, n, 3, K).
        run: of `describe_run`.
        folder: of the report.
    """
    seed = run["seed"]
    found = {
        name: [
            {
                "cosine": bootstrap_mean(record["cosine"][step], seed=seed),
                "relative error": bootstrap_mean(record["relative_error"][step], seed=seed),
                "mIoU (%)": score_counts(record["counts"][step], intersection_over_union, seed=seed),
            }
            for step in range(len(record["cosine"]))
        ]
        for name, record in values.items()
    }
    steps = len(next(iter(found.values())))
    lines = []
    for metric, layout in (("mIoU (%)", "{:.2f}"), ("cosine", "{:.4f}"), ("relative error", "{:.4f}")):
        headings = ["upsampler", *(f"{2**step}x" for step in range(steps))]
        rows = [[name, *(_cell(step[metric], layout) for step in of_steps)] for name, of_steps in found.items()]
        lines += [f"## {metric}", "", *_table(headings, rows), ""]
    figure = Figure(figsize=(2 * PANEL_INCHES[0], PANEL_INCHES[1]), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("cosine", "mIoU (%)")):
        _drift_panel(axes, found, metric)
    notes = (
        "One linear probe, fitted on the backbone's own features and frozen, read every result. Cosine and relative "
        "error compare the tokens with the result pooled back to them; 1x is the tokens themselves."
    )
    _write(folder, run, lines, notes, {"drift": figure}, scores=found)


def write_cost_report(points: dict[str, list[CostPoint]], run: dict, folder: Path) -> None:
    """
    Args:
        points: by method, see `measure_costs`.
        run: limits, sizes, seed, versions, hardware.
        folder: of the report.
    """
    tokens = sorted({point.tokens for of_method in points.values() for point in of_method})
    lines, exponents, crossings = [], {}, {}
    for field, heading, unit, layout in QUANTITIES:
        rows = []
        for name, of_method in points.items():
            by_tokens = {point.tokens: point for point in of_method}
            exponents.setdefault(name, {})[field] = [fit_exponent(of_method, field, last=last) for last in (None, 2)]
            fitted = ["–" if value is None else f"{value:.2f}" for value in exponents[name][field]]
            cells = [_cost_cell(by_tokens.get(count), field, unit, layout) for count in tokens]
            crossing = find_crossing(of_method, points.get(REFERENCE, []), field) if name != REFERENCE else None
            crossings.setdefault(name, {})[field] = crossing
            rows.append([name, *cells, *fitted, "–" if crossing is None else f"{crossing:.0f}"])
        counts = [f"{count:,}" for count in tokens]
        fits = ["exponent", "of the last two", f"passes {REFERENCE} at"]
        lines += [f"## {heading[0].upper()}{heading[1:]}", "", *_table(["tokens", *counts, *fits], rows), ""]
    figure = Figure(figsize=(3 * PANEL_INCHES[0], 1.2 * PANEL_INCHES[1]), layout="constrained")
    for axes, (field, heading, unit, _) in zip(figure.subplots(1, 3), QUANTITIES):
        _cost_panel(axes, points, crossings, field, heading, unit)
    notes = (
        f"Seconds are {run['clock']} seconds of the quickest of {run['limits']['repeats']} calls, fewer if they "
        f"take more than {ENOUGH_SECONDS:.0f} s, each in a separate process. Peak memory is that of a call beyond "
        "weights and inputs, its result included. FLOP are those of convolutions, matrix products, products and sums; "
        "what JAFAR and AnyUp compute and discard in their published code is left out. Figures in brackets did not "
        "fit into the limits and are computed: seconds at the speed of the largest call that was measured, memory as "
        "a T + b T². Exponents are fitted to what was measured."
    )
    if run["query_chunk"]:
        notes += f" Attention to all tokens ran for {run['query_chunk']} positions at a time."
    _write(folder, run, lines, notes, {"cost": figure}, points=points, exponents=exponents, crossings=crossings)


def _two_tables(scores: dict[str, dict], differences: dict[str, dict], run: dict) -> list[str]:
    metrics = list(next(iter(scores.values())))
    number = next(iter(next(iter(scores.values())).values())).samples
    rows = []
    for name, of_metric in scores.items():
        parameters = run["parameters"][name]
        size = f"{parameters / 1e6:.2f} M" if parameters else "–"
        rows.append([name, size, *(_cell(of_metric[metric], "{:.2f}") for metric in metrics)])
    lines = _table(["upsampler", "parameters", *(f"{metric} (n = {number})" for metric in metrics)], rows)
    if differences:
        rows = [
            [name, *(_cell(of_metric[metric], "{:+.2f}") for metric in metrics)]
            for name, of_metric in differences.items()
        ]
        lines += ["", *_table([f"{REFERENCE} minus", *metrics], rows)]
    return lines


def _cost_cell(point: CostPoint | None, field: str, unit: float, layout: str) -> str:
    if point is None or getattr(point, field) is None:
        return "–"
    text = layout.format(getattr(point, field) * unit)
    return text if point.measured or field == "flop" else f"({text}: {point.reason})"


def _cost_panel(
    axes: Axes, points: dict[str, list[CostPoint]], crossings: dict[str, dict], field: str, heading: str, unit: float
) -> None:
    for index, (name, of_method) in enumerate(points.items()):
        known = [point for point in of_method if getattr(point, field)]
        if not known:
            continue
        colour = f"C{index}"
        x, y = [point.tokens for point in known], [getattr(point, field) * unit for point in known]
        axes.plot(x, y, "-", color=colour, label=name, linewidth=2 if name == REFERENCE else 1)
        filled = [point.measured or field == "flop" for point in known]
        for place, value, measured in zip(x, y, filled):
            axes.plot(place, value, "o", color=colour, markersize=4, fillstyle="full" if measured else "none")
        crossing = crossings[name][field]
        if crossing is not None:
            axes.axvline(crossing, color=colour, linestyle=":", linewidth=1)
            axes.annotate(
                f"{name} {crossing:.0f}",
                (crossing, 0.02),
                xycoords=("data", "axes fraction"),
                rotation=90,
                fontsize=7,
                color=colour,
            )
    ticks = sorted({point.tokens for of_method in points.values() for point in of_method})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("tokens (hollow: computed; dotted: more than " + REFERENCE + " from here on)", fontsize=8)
    axes.set_ylabel(heading)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7)


def _drift_panel(axes: Axes, found: dict[str, list[dict[str, Estimate]]], metric: str) -> None:
    for index, (name, of_steps) in enumerate(found.items()):
        values = [step[metric] for step in of_steps]
        axes.plot(range(len(values)), [value.value for value in values], "o-", color=f"C{index}", label=name)
        if all(value.low is not None for value in values):
            low, high = (np.array([getattr(value, end) for value in values]) for end in ("low", "high"))
            axes.fill_between(range(len(values)), low, high, color=f"C{index}", alpha=0.15, linewidth=0)
    steps = len(next(iter(found.values())))
    axes.set_xticks(range(steps), [f"{2**step}x" for step in range(steps)])
    axes.set_xlabel("size of the result, in tokens")
    axes.set_ylabel(metric)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7)


def _write(
    folder: Path, run: dict, lines: Sequence[str], notes: str, plots: dict[str, Figure] | None = None, **results
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = json.dumps({**run, **results}, indent=1, ensure_ascii=False, default=_as_json)
    write_whole(folder / "report.json", values + "\n")
    settings = {key: value for key, value in run.items() if key not in ("versions", "hardware", "command")}
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    text = [
        f"# {run['task'].capitalize()}",
        "",
        *lines,
        "",
        f"{notes} In brackets [ ] intervals of 95 % by bootstrap over images.\n" if run["task"] != "cost" else notes,
        "",
        f"`{json.dumps(settings, default=_as_json)}`; {versions}; {run['hardware']}.",
        "",
        f"Made with `{run['command']}`.",
    ]
    write_whole(folder / "report.md", "\n".join(text) + "\n")
    for name, figure in (plots or {}).items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150)
        write_whole(folder / f"{name}.png", picture.getvalue())


def _as_json(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON.")


def _table(headings: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]


def _cell(estimate: Estimate | None, layout: str) -> str:
    if estimate is None:
        return "–"
    text = layout.format(estimate.value)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{layout.format(estimate.low)}, {layout.format(estimate.high)}]"
