"""
Linear probes on frozen features, and their scores.

The protocol is that of Couairon et al. 2025 with two errors corrected: the cosine schedule runs once over all steps
(theirs restarted after as many steps as there are epochs), and the backbone always gets normalised
images (theirs did not for depth).
"""

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from uplift_diffusers.evaluation.predictive.datasets import IGNORED
from uplift_diffusers.evaluation.predictive.peers.interface import FeatureUpsampler
from uplift_diffusers.evaluation.statistics import BOOTSTRAP_BLOCK, BOOTSTRAP_DRAWS, LEVEL, Estimate
from uplift_diffusers.scale import size_of

DEPTH_BINS = 256
NEAREST_DEPTH, FARTHEST_DEPTH = 1e-3, 10.0
DELTA_1 = 1.25
_EPSILON = 1e-3
_GRADIENT_STRIDES = (1, 2, 4, 8)

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """
    Training settings of a probe.

    Args:
        epochs: passes over the training split.
        learning_rate: initial value of the cosine schedule, which ends at 0.
        batch_size: images per batch.
        seed: seed of weights, order and flips.
        num_workers: processes that read images.
    """

    epochs: int = 20
    learning_rate: float = 5e-4
    batch_size: int = 2
    seed: int = 0
    num_workers: int = 0


class FeatureSource:
    """
    Features of images at the size of their labels.

    Args:
        backbone: a `FeatureBackbone`.
        upsampler: None for the backbone's features at their resolution.
        device: device of both.
        with_cls: append the CLS token, normalised to length 1, to the features of every position, if there is one.
    """

    def __init__(
        self,
        backbone,
        upsampler: FeatureUpsampler | None,
        *,
        device: torch.device | str = "cpu",
        with_cls: bool = False,
    ):
        self.backbone, self.upsampler, self.device = backbone, upsampler, torch.device(device)
        self.with_cls = with_cls

    @torch.no_grad()
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D, H, W), or (B, D, h, w) without an upsampler; D is C, or 2 C with CLS."""
        image = image.to(self.device)
        tokens, cls_token = (
            self.backbone.encode_with_cls(image) if self.with_cls else (self.backbone.encode(image), None)
        )
        features = tokens
        if self.upsampler is not None:
            features = self.upsampler.upsample(tokens, image, size_of(image))
        if cls_token is None:
            return features
        cls_token = F.normalize(cls_token, dim=1)[:, :, None, None]
        return torch.cat([features, cls_token.expand(-1, -1, *features.shape[2:])], dim=1)


class SegmentationProbe(nn.Conv2d):
    """A 1x1 convolution from features to logits of classes."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__(channels, num_classes, 1)


class DepthProbe(nn.Module):
    """
    A 1x1 convolution to the probabilities of 256 depths; the result is their mean.

    Source: Bhat et al. 2021 (AdaBins), with the linear normalisation of Oquab et al. 2024 (DINOv2).
    """

    bins: torch.Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, DEPTH_BINS, 1)
        self.register_buffer("bins", torch.linspace(NEAREST_DEPTH, FARTHEST_DEPTH, DEPTH_BINS))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, H, W) depths."""
        weights = self.conv(features).relu() + 0.1
        return torch.einsum("bkhw,k->bhw", weights / weights.sum(dim=1, keepdim=True), self.bins)


def segmentation_loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of (B, K, h, w) logits, interpolated to the (B, H, W) label, without ignored pixels."""
    logits = at_size(logits, label)
    if (label == IGNORED).all():
        return logits.sum() * 0
    return F.cross_entropy(logits, label, ignore_index=IGNORED)


def has_depth(target: torch.Tensor) -> torch.Tensor:
    """Where a pixel has a depth that counts."""
    return (target > NEAREST_DEPTH) & (target < FARTHEST_DEPTH)


def depth_loss(depth: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    The scale-invariant loss plus half the loss of the gradients, both of logarithms, at (B, H, W) pixels with a depth.

    Source: Eigen et al. 2014, equation 4, weighted as in DINOv2: the root of variance + 0.15 mean^2; Li and Snavely
        2018, equation 5, for the gradients.
    """
    valid = has_depth(target)
    if valid.sum() < 2:
        return depth.sum() * 0
    difference = torch.log(depth + _EPSILON) - torch.log(target.clamp_min(0) + _EPSILON)
    variance, mean = torch.var_mean(difference[valid])
    scale_invariant = (variance + 0.15 * mean**2).clamp_min(1e-12).sqrt()
    return scale_invariant + 0.5 * _gradient_loss(difference, valid)


def _gradient_loss(difference: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The mean absolute difference of neighbours, over four resolutions."""
    total = difference.new_zeros(())
    for stride in _GRADIENT_STRIDES:
        coarse, known = difference[:, ::stride, ::stride], valid[:, ::stride, ::stride]
        for dim in (1, 2):
            both = known.narrow(dim, 0, known.shape[dim] - 1) & known.narrow(dim, 1, known.shape[dim] - 1)
            total = total + (coarse.diff(dim=dim).abs() * both).sum() / both.sum().clamp_min(1)
    return total / len(_GRADIENT_STRIDES)


def at_size(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Logits at the label's size. Linear probe and bilinear interpolation commute, so this is equivalent and cheap."""
    if logits.shape[2:] == label.shape[1:]:
        return logits
    return F.interpolate(logits, size=label.shape[1:], mode="bilinear")


def fit(
    probe: nn.Module, data: Dataset, features: FeatureSource, loss: Loss, schedule: Schedule, *, title: str = "Probe"
) -> float:
    """
    Train a probe in place: AdamW, the cosine over all steps, images flipped with probability 0.5.

    Args:
        probe: from (B, C, H, W) features to the first argument of `loss`.
        data: (image, target) pairs.
        features: computes the features of a batch of images.
        loss: loss of the probe's output and the targets.
        schedule: see [`Schedule`].
        title: title of the progress bar.
    Returns:
        The mean loss of the last epoch.
    """
    assert isinstance(data, Sized)
    batches = -(-len(data) // schedule.batch_size)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.999), weight_decay=1e-5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=schedule.epochs * batches)
    order = torch.Generator().manual_seed(schedule.seed)
    loader = DataLoader(data, schedule.batch_size, shuffle=True, generator=order, num_workers=schedule.num_workers)
    flips = torch.Generator().manual_seed(schedule.seed + 1)
    probe.train()
    losses: list[float] = []
    with tqdm(total=schedule.epochs * batches, desc=title, unit="step", disable=None, dynamic_ncols=True) as progress:
        for _ in range(schedule.epochs):
            losses = []
            for image, target in loader:
                flipped = torch.rand(len(image), generator=flips) < 0.5
                image = torch.where(flipped[:, None, None, None], image.flip(-1), image)
                target = torch.where(flipped[:, None, None], target.flip(-1), target)
                value = loss(probe(features(image)), target.to(features.device))
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                cosine.step()
                losses.append(value.item())
                progress.update()
    probe.eval()
    return float(np.mean(losses))


def _each(data: Dataset, num_workers: int, title: str) -> Iterator:
    loader = DataLoader(data, 1, num_workers=num_workers)
    return iter(tqdm(loader, desc=title, unit="image", disable=None, dynamic_ncols=True))


@torch.no_grad()
def count_segmentation(
    probe: nn.Module,
    data: Dataset,
    features: FeatureSource,
    *,
    num_classes: int,
    num_workers: int = 0,
    title: str = "",
) -> np.ndarray:
    """(n, 3, K) int64, `count_pixels` for every image."""
    counts = []
    for image, label in _each(data, num_workers, title):
        predicted = at_size(probe(features(image)), label).argmax(dim=1).cpu()
        counts.append(count_pixels(predicted, label, num_classes))
    return np.stack(counts)


def count_pixels(predicted: torch.Tensor, label: torch.Tensor, num_classes: int) -> np.ndarray:
    """(3, K) int64: correctly predicted, predicted and labelled pixels of each class."""
    valid = label != IGNORED
    predicted, label = predicted[valid], label[valid]
    counts = [torch.bincount(x, minlength=num_classes) for x in (label[predicted == label], predicted, label)]
    return torch.stack(counts).numpy()


def intersection_over_union(counts: np.ndarray) -> np.ndarray:
    """Mean IoU over the classes that occur, from (..., 3, K) sums of `count_pixels`; in percent."""
    found, predicted, labelled = np.moveaxis(np.asarray(counts, dtype=np.float64), -2, 0)
    union = predicted + labelled - found
    occurs = union > 0
    ratios = np.divide(found, union, out=np.zeros_like(union), where=occurs)
    return 100 * ratios.sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1)


def accuracy(counts: np.ndarray) -> np.ndarray:
    """Share of correctly predicted pixels, from (..., 3, K) sums of `count_pixels`; in percent."""
    found, _, labelled = np.moveaxis(np.asarray(counts, dtype=np.float64), -2, 0)
    return 100 * found.sum(axis=-1) / np.maximum(labelled.sum(axis=-1), 1)


def score_counts(
    counts: np.ndarray, score: Callable[[np.ndarray], np.ndarray], *, seed: int, other: np.ndarray | None = None
) -> Estimate:
    """
    A score of all images together, with its bootstrap percentile interval over images.

    Args:
        counts: (n, 3, K), counts of each image.
        score: score of summed counts.
        seed: seed of the bootstrap.
        other: counts of another method on the same images: the result is then the difference, with paired bootstrap
            samples.
    Source: Efron and Tibshirani 1993, section 13.3.
    """
    methods = [counts] if other is None else [counts, other]
    signs = (1, -1)
    value = sum(sign * float(score(method.sum(axis=0))) for sign, method in zip(signs, methods))
    number = len(counts)
    if number < 2:
        return Estimate(value, number)
    rng, draws = np.random.default_rng(seed), []
    for _ in range(BOOTSTRAP_DRAWS // BOOTSTRAP_BLOCK):
        times = rng.multinomial(number, np.full(number, 1 / number), size=BOOTSTRAP_BLOCK).astype(np.float64)
        sums = [(times @ method.reshape(number, -1)).reshape(-1, *method.shape[1:]) for method in methods]
        draws.append(sum(sign * score(total) for sign, total in zip(signs, sums)))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(draws), (tail, 1 - tail))
    return Estimate(value, number, float(low), float(high))


@torch.no_grad()
def measure_depth(
    probe: nn.Module, data: Dataset, features: FeatureSource, *, aligned: bool, num_workers: int = 0, title: str = ""
) -> dict[str, np.ndarray]:
    """For every image with a depth, "delta1" in percent and "rmse": (n,) each; see `score_depth`."""
    rows = []
    for image, target in _each(data, num_workers, title):
        row = score_depth(probe(features(image))[0].cpu(), target[0], aligned=aligned)
        rows += [row] if row else []
    if not rows:
        raise ValueError("`data` must have depths between 1 mm and 10 m, got none in any image.")
    return {name: np.array(column) for name, column in zip(("delta1", "rmse"), zip(*rows))}


def score_depth(depth: torch.Tensor, target: torch.Tensor, *, aligned: bool) -> tuple[float, float] | None:
    """
    Share of pixels whose ratio to the target is below 1.25, in percent, and the root of the mean squared error.

    Args:
        depth, target: (H, W); only pixels with a target between 1e-3 and 10 count.
        aligned: first fit scale and shift of `depth` to the target by least squares, for relative depths.
    Returns:
        None if no pixel counts.
    """
    valid = has_depth(target)
    if not valid.any():
        return None
    depth, target = depth[valid].double(), target[valid].double()
    if aligned:
        columns = torch.stack([depth, torch.ones_like(depth)], dim=1)
        depth = columns @ torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution[:, 0]
    depth = depth.clamp(NEAREST_DEPTH, None)
    ratio = torch.maximum(depth / target, target / depth)
    return 100 * (ratio < DELTA_1).double().mean().item(), (depth - target).square().mean().sqrt().item()
