"""The measurement of every method on every item of a protocol, and the resulting figures."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from uplift_diffusers.evaluation.cost import Cost, measure_cost
from uplift_diffusers.evaluation.methods import Method
from uplift_diffusers.evaluation.metrics import IMAGE_METRICS, Metrics
from uplift_diffusers.evaluation.protocols import Item, SuperResolution, TextToImage
from uplift_diffusers.evaluation.records import Entry, Record, RecordStore, versions
from uplift_diffusers.evaluation.statistics import (
    Estimate,
    FeatureStatistics,
    bootstrap_mean,
    frechet_distance,
    frechet_distance_to_moments,
    kernel_distance,
    paired_difference,
)

Protocol = SuperResolution | TextToImage

LEAST_IMAGES = {"fid": 2, "patch_fid": 2, "kid": 4}
"""Fewest images in each set: a covariance needs two, KID two disjoint subsets of two."""

Scores = dict[str, Estimate]
"""By metric."""

COMPARED = "uplift"
"""The method that the others are compared with, image by image."""

SHOWN_ITEMS = 6
"""Rows of the contact sheet."""


class Evaluation:
    """
    A protocol, methods and metrics, and the records of their measurements.

    The measurement of each output is a separate record. So a killed run can be continued, several processes share the
    items without communication, and the figures are computed from the records in the order of the items, bit-identical
    for any number of processes.

    Args:
        protocol: provides the inputs.
        methods: the methods to compare.
        metrics: the metrics to compute.
        store: the records, or their folder.
        device: device of the methods' networks.
    Raises:
        ValueError: there are too few or too small images for the metrics, or features are missing.
    """

    def __init__(
        self,
        protocol: Protocol,
        methods: Sequence[Method],
        metrics: Metrics,
        store: RecordStore | str | Path,
        *,
        device: torch.device | str = "cpu",
    ):
        self.protocol, self.methods, self.metrics = protocol, list(methods), metrics
        self.store = store if isinstance(store, RecordStore) else RecordStore(store)
        self.device, self.versions = torch.device(device), versions()
        for edge in (protocol.real_edge, *map(protocol.output_edge, protocol.scales)):
            if edge is not None:
                metrics.check_edge(edge)
        counts = [count for count in (len(protocol.items), protocol.real_count) if count is not None]
        for name in metrics.sets:
            if min(counts) < LEAST_IMAGES[name]:
                raise ValueError(
                    f"`metrics` must not have {name!r} for fewer than {LEAST_IMAGES[name]} images, got {min(counts)}. "
                    "Take more images or name other metrics."
                )
            if protocol.statistics and not protocol.statistics.serves(name):
                raise ValueError(
                    f"`metrics` must not have {name!r} if only statistics of the real images are given. Pass a "
                    "folder of images or other metrics."
                )

    def run(self, *, rank: int = 0, world_size: int = 1) -> None:
        """Measure this process's share of the items, except for existing records."""
        items = self.protocol.items[rank::world_size]
        real_items = self.protocol.real_items[rank::world_size] if self.metrics.sets else []
        total = len(real_items) + len(items) * len(self.protocol.scales) * len(self.methods)
        with tqdm(total=total, unit="image", disable=None if rank == 0 else True, dynamic_ncols=True) as progress:
            for item in real_items:
                self._describe_real(item)
                progress.update()
            self.protocol.prepare(rank=rank, world_size=world_size)  # hours, so after a damaged photograph is found
            for item in items:
                for scale in self.protocol.scales:
                    self._measure(item, scale, progress)

    def record(self, item: Item, scale: int, method: Method) -> Record:
        """The measurements on the output of `method` for `item` at `scale`."""
        return self.store.read(self._entry(item, scale, method))

    def real_record(self, item: Item) -> Record:
        """The features of the real image `item`."""
        return self.store.read(self._real_entry(item))

    def measure_costs(self, *, edges: Mapping[int, Sequence[int]], repeats: int) -> dict[int, dict[str, list[Cost]]]:
        """The cost of outputs of `edges[scale]` pixels, by scale and timed method; medians of `repeats` calls."""
        methods = [method for method in self.methods if method.timed]
        costs: dict[int, dict[str, list[Cost]]] = {scale: {method.name: [] for method in methods} for scale in edges}
        jobs = [(scale, edge, method) for scale in edges for edge in edges[scale] for method in methods]
        for scale, edge, method in tqdm(jobs, unit="method", desc="Time and memory", disable=None, dynamic_ncols=True):
            sample = self.protocol.timing_sample(scale=scale, edge=edge)
            costs[scale][method.name].append(measure_cost(method, sample, repeats=repeats, device=self.device))
        return costs

    def _describe_real(self, item: Item) -> None:
        entry = self._real_entry(item)
        if not self.store.holds(entry):
            self.store.write(entry, self.metrics.describe(self.protocol.real_pixels(item), digest=item.digest))

    def _measure(self, item: Item, scale: int, progress: tqdm) -> None:
        waiting = [method for method in self.methods if not self.store.holds(self._entry(item, scale, method))]
        progress.update(len(self.methods) - len(waiting))
        if not waiting:
            return
        sample = self.protocol.sample(item, scale)
        for method in waiting:
            record = self.metrics.measure(method(sample), sample.truth, digest=item.digest)
            self.store.write(self._entry(item, scale, method), record)
            progress.update()

    def _entry(self, item: Item, scale: int, method: Method) -> Entry:
        identity = {**self.protocol.identity, "scale": scale, "method": method.identity}
        return Entry(f"{scale}x-{method.name}", item.name, self._identity(item, identity))

    def _real_entry(self, item: Item) -> Entry:
        return Entry("real", item.name, self._identity(item, self.protocol.real_identity))

    def _identity(self, item: Item, identity: dict) -> dict:
        of_run = {"device": self.device.type, "versions": self.versions}
        return {**identity, **self.metrics.identity, **of_run, "item": item.digest}


@dataclass(frozen=True)
class ScaleResults:
    """
    The results at one scale.

    Args:
        output_edge: edge of the outputs in pixels.
        scores: by method and metric.
        differences: by other method and metric, "uplift" minus the other; None if a PSNR is infinite.
        values: by method and metric, (n,) figures of the individual outputs.
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
        """The cost of the measured outputs; None for a method that was not timed."""
        return next((cost for cost in self.costs.get(method, []) if cost.edge == self.output_edge), None)


Results = dict[int, ScaleResults]
"""By scale."""


def compute_results(
    evaluation: Evaluation, *, seed: int, costs: dict[int, dict[str, list[Cost]]] | None = None
) -> Results:
    """
    The figures from all measurements, which must be complete.

    Args:
        evaluation: an evaluation that has run in all its processes.
        seed: seed of the bootstrap and of KID's subsets.
        costs: from `Evaluation.measure_costs`.
    """
    real = real_features(evaluation)
    return {
        scale: _compute_scale(evaluation, scale, real, seed=seed, costs=(costs or {}).get(scale, {}))
        for scale in evaluation.protocol.scales
    }


def evaluate(protocol: Protocol, methods: Sequence[Method], metrics: Metrics, *, seed: int = 0) -> Results:
    """Run an evaluation in this process and return the figures, without keeping records."""
    with tempfile.TemporaryDirectory() as folder:
        evaluation = Evaluation(protocol, methods, metrics, folder)
        evaluation.run()
        return compute_results(evaluation, seed=seed)


def rows_to_show(count: int) -> list[int]:
    """Indices of up to `SHOWN_ITEMS` of `count` items, evenly spaced."""
    shown = min(count, SHOWN_ITEMS)
    return [index * count // shown for index in range(shown)]


def gap_closed(scores: dict[str, Scores]) -> float | None:
    """The share of the PSNR gap between bilinear and the VAE's round trip that UPLiFT closes; None without a gap."""
    low, ours, high = (scores[name]["psnr"].value for name in ("bilinear", COMPARED, "vae"))
    return (ours - low) / (high - low) if low < high < math.inf else None


def real_features(evaluation: Evaluation) -> FeatureStatistics:
    """Features of the real images; empty if no metric needs them."""
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


def _set_score(metric: str, real: Any, fake: Any, *, seed: int, paired: bool) -> Estimate:
    """The figure of two `FeatureStatistics` that have what it is made of."""
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
