"""The figures of an evaluation, computed from its records in the order of its items."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from uplift_diffusers.evaluation.cost import Cost
from uplift_diffusers.evaluation.evaluate import Evaluation, Protocol
from uplift_diffusers.evaluation.methods import Method
from uplift_diffusers.evaluation.metrics import IMAGE_METRICS, Metrics
from uplift_diffusers.evaluation.real_images import FeatureStatistics
from uplift_diffusers.evaluation.records import Record
from uplift_diffusers.evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    frechet_distance,
    frechet_distance_to_moments,
    kernel_distance,
    paired_difference,
)

Scores = dict[str, Estimate]
"""By metric."""

COMPARED = "uplift"
"""The method that the others are compared with, image by image."""

SHOWN_ITEMS = 6
"""Rows of the contact sheet."""


@dataclass(frozen=True)
class ScaleResults:
    """
    What was found at one scale.

    Args:
        output_edge: pixels of the outputs.
        scores: by method and metric.
        differences: by other method and metric, "uplift" minus the other; None where one PSNR is infinite.
        values: by method and metric, (n,) figures of the single outputs.
        previews: by method, (3, h, w) uint8 for each of the `rows_to_show`, the centres of the outputs.
        costs: by timed method, one for each size of the output.
    """

    output_edge: int
    scores: dict[str, Scores]
    differences: dict[str, dict[str, Estimate | None]]
    values: dict[str, dict[str, np.ndarray]]
    previews: dict[str, list[torch.Tensor]]
    costs: dict[str, list[Cost]] = field(default_factory=dict)

    def cost(self, method: str) -> Cost | None:
        """That of the outputs that were measured; None for a method that was not timed."""
        return next((cost for cost in self.costs.get(method, []) if cost.edge == self.output_edge), None)


Results = dict[int, ScaleResults]
"""By scale."""


def compute_results(
    evaluation: Evaluation, *, seed: int, costs: dict[int, dict[str, list[Cost]]] | None = None
) -> Results:
    """
    The figures of all measurements, which must all be there.

    Args:
        evaluation: that has run, in all its processes.
        seed: of the bootstrap and of KID's subsets.
        costs: of `Evaluation.measure_costs`.
    """
    real = real_features(evaluation)
    return {
        scale: _compute_scale(evaluation, scale, real, seed=seed, costs=(costs or {}).get(scale, {}))
        for scale in evaluation.protocol.scales
    }


def evaluate(protocol: Protocol, methods: Sequence[Method], metrics: Metrics, *, seed: int = 0) -> Results:
    """Run an evaluation in this process and keep nothing of it but the figures."""
    with tempfile.TemporaryDirectory() as folder:
        evaluation = Evaluation(protocol, methods, metrics, folder)
        evaluation.run()
        return compute_results(evaluation, seed=seed)


def rows_to_show(count: int) -> list[int]:
    """Indices of up to `SHOWN_ITEMS` of `count` items, evenly spaced."""
    shown = min(count, SHOWN_ITEMS)
    return [index * count // shown for index in range(shown)]


def gap_closed(scores: dict[str, Scores]) -> float | None:
    """The share of the PSNR gap from bilinear to the VAE's round trip that UPLiFT closes; None without a gap."""
    low, ours, high = (scores[name]["psnr"].value for name in ("bilinear", COMPARED, "vae"))
    return (ours - low) / (high - low) if low < high < math.inf else None


def real_features(evaluation: Evaluation) -> FeatureStatistics:
    """Of the real images; empty where no metric needs them."""
    protocol = evaluation.protocol
    if protocol.statistics is not None:
        return protocol.statistics
    if not evaluation.metrics.sets:
        return FeatureStatistics()
    return FeatureStatistics(**_stacked([evaluation.real_record(item) for item in protocol.real_items]))


def _compute_scale(
    evaluation: Evaluation, scale: int, real: FeatureStatistics, *, seed: int, costs: dict[str, list[Cost]]
) -> ScaleResults:
    scores, values, previews = {}, {}, {}
    for method in evaluation.methods:
        name = method.name
        records = [evaluation.record(item, scale, method) for item in evaluation.protocol.items]
        values[name] = {
            metric: np.array([record[metric].item() for record in records])
            for metric in IMAGE_METRICS
            if metric in records[0]
        }
        previews[name] = [records[row]["preview"] for row in rows_to_show(len(records))]
        scores[name] = {metric: bootstrap_mean(figures, seed=seed) for metric, figures in values[name].items()}
        fake = FeatureStatistics(**_stacked(records))
        for metric in evaluation.metrics.sets:
            scores[name][metric] = _set_score(metric, real, fake, seed=seed, paired=evaluation.protocol.paired)
    ours = values.get(COMPARED, {})
    differences = {
        name: {metric: paired_difference(ours[metric], figures[metric], seed=seed) for metric in ours}
        for name, figures in values.items()
        if name != COMPARED and ours
    }
    edge = evaluation.protocol.output_edge(scale)
    return ScaleResults(edge, scores, differences, values, previews, costs)


def _set_score(metric: str, real: FeatureStatistics, fake: FeatureStatistics, *, seed: int, paired: bool) -> Estimate:
    if metric == "kid":
        return kernel_distance(real.features, fake.features, seed=seed, paired=paired)
    if metric == "patch_fid":
        return frechet_distance(real.patch_features, fake.patch_features)
    if real.features is None:
        return frechet_distance_to_moments(real.mean, real.covariance, fake.features)
    return frechet_distance(real.features, fake.features)


def _stacked(records: list[Record]) -> Record:
    """Features of all records, (n, 2048), and of all their patches."""
    stacked = {}
    if "features" in records[0]:
        stacked["features"] = torch.stack([record["features"] for record in records])
    if "patch_features" in records[0]:
        stacked["patch_features"] = torch.cat([record["patch_features"] for record in records])
    return stacked
