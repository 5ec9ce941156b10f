"""The measurement itself: every image of a protocol through every method, once."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from uplift_diffusers.evaluation.cost import Cost, measure_cost
from uplift_diffusers.evaluation.digests import digest_code, versions
from uplift_diffusers.evaluation.methods import Method
from uplift_diffusers.evaluation.metrics import Metrics
from uplift_diffusers.evaluation.real_images import Item
from uplift_diffusers.evaluation.records import Entry, Record, RecordStore
from uplift_diffusers.evaluation.super_resolution import SuperResolution
from uplift_diffusers.evaluation.text_to_image import TextToImage

Protocol = SuperResolution | TextToImage

LEAST_IMAGES = {"fid": 2, "patch_fid": 2, "kid": 4}
"""On each side: a covariance needs two, KID two disjoint subsets of two."""


class Evaluation:
    """
    A protocol, methods and metrics, and the folder where the measurements are kept.

    Every measurement of one output is a file, written whole and named after all that it depends on. So a run that
    was killed goes on where it was, processes share the items without talking to each other, and the figures are
    computed from the files in the order of the items, whoever has written them: bit by bit the same.

    Args:
        protocol: what is enlarged.
        methods: what enlarges.
        metrics: what is measured.
        folder: of the records.
        device: where the methods' networks are.
    Raises:
        ValueError: too few images for the metrics, or too small ones, or no features where the metrics need them.
    """

    def __init__(
        self,
        protocol: Protocol,
        methods: Sequence[Method],
        metrics: Metrics,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
    ):
        self.protocol, self.methods, self.metrics = protocol, list(methods), metrics
        self.store, self.device = RecordStore(folder), torch.device(device)
        self.software = {"code": digest_code(), **versions()}
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
                    f"`metrics` must not have {name!r} where of the real images only statistics are known. Give a "
                    "folder of them or name other metrics."
                )

    def run(self, *, rank: int = 0, world_size: int = 1) -> None:
        """Make the measurements of this process's share of the items, as far as they are not there."""
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
        """What was measured on the output of `method` for `item` at `scale`."""
        return self.store.read(self._entry(item, scale, method))

    def real_record(self, item: Item) -> Record:
        """The features of the real image `item`."""
        return self.store.read(self._real_entry(item))

    def measure_costs(self, *, edges: dict[int, Sequence[int]], repeats: int) -> dict[int, dict[str, list[Cost]]]:
        """By scale and timed method, the cost of outputs of `edges[scale]` pixels, medians of `repeats` calls."""
        methods = [method for method in self.methods if method.timed]
        costs = {scale: {method.name: [] for method in methods} for scale in edges}
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
        of_run = {"device": self.device.type, "software": self.software}
        return {**identity, **self.metrics.identity, **of_run, "item": item.digest}
