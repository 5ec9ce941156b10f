"""Figures from measurements: means with intervals, FID and KID from features."""

import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

NUM_FEATURES = 2048
"""Inception features per image."""

LEVEL = 0.95
"""Confidence level of all intervals."""

BOOTSTRAP_DRAWS = 2000
BOOTSTRAP_BLOCK = 100
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
FEW_SAMPLES = 2048
"""With fewer samples, the covariance of 2048 features does not have full rank, and FID is strongly biased."""

_IN_ONE_PROCESS: dict[str, Any] = {"sync_on_compute": False}
"""One process computes the figures, from the records of all: torchmetrics must not wait for the others."""


@dataclass(frozen=True)
class Estimate:
    """
    A figure.

    Args:
        value: the figure itself; PSNR may be infinite.
        samples: number of images or patches; for two sets, that of the smaller one.
        low, high: its 95 % interval, or None.
    """

    value: float
    samples: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class FeatureStatistics:
    """
    The features of a set of images, or their mean and covariance.

    Args:
        features: (n, 2048), or None.
        patch_features: (n * patches, 2048), or None.
        mean, covariance: (2048,) and (2048, 2048), or None.
    """

    features: torch.Tensor | None = None
    patch_features: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    covariance: torch.Tensor | None = None

    @property
    def count(self) -> int | None:
        """Number of images, or None if it is unknown."""
        return None if self.features is None else len(self.features)

    def serves(self, metric: str) -> bool:
        """Whether "fid", "patch_fid" or "kid" can be computed from it."""
        if metric == "fid":
            return self.features is not None or self.mean is not None
        return (self.patch_features if metric == "patch_fid" else self.features) is not None


def load_statistics(path: Path) -> FeatureStatistics:
    """
    Read statistics of real images.

    Args:
        path: .safetensors or .npz (as written by pytorch-fid) with `mu` and `sigma`, or with `features`.
    Raises:
        ValueError: the file holds something else.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {
                    name: torch.from_numpy(file[name]) for name in file.files if name in ("features", "mu", "sigma")
                }
        else:
            arrays = load_file(path)
    except (SafetensorError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"`real_images` must be a .safetensors or .npz file of statistics, got {path}.") from error
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if shapes.get("features", ())[1:] == (NUM_FEATURES,):
        return FeatureStatistics(features=arrays["features"])
    if shapes.get("mu") == (NUM_FEATURES,) and shapes.get("sigma") == (NUM_FEATURES, NUM_FEATURES):
        return FeatureStatistics(mean=arrays["mu"], covariance=arrays["sigma"])
    raise ValueError(
        f"`real_images` must have features (n, {NUM_FEATURES}), or mu ({NUM_FEATURES},) and sigma ({NUM_FEATURES}, "
        f"{NUM_FEATURES}), got {shapes or 'nothing'} in {path}."
    )


def bootstrap_mean(values: np.ndarray, *, seed: int) -> Estimate:
    """
    The mean of (n,) values, with the percentile interval of the means of samples drawn from them with replacement.

    Source: Efron and Tibshirani 1993, section 13.3.
    """
    value, count = float(np.mean(values)), len(values)
    if count < 2:
        return Estimate(value, count)
    rng = np.random.default_rng(seed)
    blocks = range(BOOTSTRAP_DRAWS // BOOTSTRAP_BLOCK)  # together they would take gigabytes for many images
    means = [values[rng.integers(0, count, (BOOTSTRAP_BLOCK, count))].mean(axis=1) for _ in blocks]
    return Estimate(value, count, *_interval(np.concatenate(means)))


def paired_difference(values: np.ndarray, others: np.ndarray, *, seed: int) -> Estimate | None:
    """The mean of `values - others`, paired by image, with its bootstrap interval; None if a value is infinite."""
    if not (np.isfinite(values).all() and np.isfinite(others).all()):
        return None
    return bootstrap_mean(values - others, seed=seed)


def frechet_distance(real: torch.Tensor, fake: torch.Tensor) -> Estimate:
    """
    FID, by torchmetrics in float64.

    If there are fewer images than features, they span a subspace that contains both Gaussians. FID is computed in
    coordinates of this subspace: the same distance, without products and roots of large singular matrices.

    Args:
        real, fake: (n, 2048) and (m, 2048), n and m at least 2.
    """
    real, fake = real.double(), fake.double()
    together = torch.cat([real, fake])
    if len(together) < together.shape[1]:
        basis = torch.linalg.qr(together.T).Q  # (2048, n + m), orthonormal
        real, fake = real @ basis, fake @ basis
    metric = _frechet_metric(real.shape[1])
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return Estimate(metric.compute().item(), min(len(real), len(fake)))


def frechet_distance_to_moments(mean: torch.Tensor, covariance: torch.Tensor, fake: torch.Tensor) -> Estimate:
    """
    FID to real images given by their statistics.

    Args:
        mean, covariance: (2048,) and (2048, 2048), of the features of the real images.
        fake: (m, 2048), m at least 2.
    """
    metric = _frechet_metric(len(mean))
    metric.update(fake.double(), real=False)
    # Sums over two images that have these moments: the metric takes mean and covariance from them, and no more.
    mean = mean.double()
    metric.real_features_num_samples += 2
    metric.real_features_sum += 2 * mean
    metric.real_features_cov_sum += covariance.double() + 2 * torch.outer(mean, mean)
    return Estimate(metric.compute().item(), len(fake))


def kernel_distance(real: torch.Tensor, fake: torch.Tensor, *, seed: int, paired: bool) -> Estimate:
    """
    KID, by torchmetrics in float64: the mean over random subsets, with the interval that contains 95 % of them.

    A subset has 1000 images, or half of them if there are fewer than 2000, so the interval is that of a smaller
    sample and therefore conservative.

    Args:
        real, fake: (n, 2048) and (m, 2048), n and m at least 4.
        seed: seed of the subsets.
        paired: `fake[i]` was made from `real[i]`. A subset is then compared with other photographs than those it was
            made from: the estimator is unbiased only for independent samples, and falls below 0 for pairs.
    """
    size = min(KID_SUBSET_SIZE, len(real) // 2, len(fake) // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says that it keeps the features, which are here anyway
        metric = KernelInceptionDistance(_Given(real.shape[1]), subsets=1, subset_size=size, **_IN_ONE_PROCESS)
    generator, distances = torch.Generator().manual_seed(seed), []
    for _ in range(KID_SUBSETS):
        order = torch.randperm(len(real), generator=generator)
        others = order[size:] if paired else torch.randperm(len(fake), generator=generator)
        metric.update(real[order[:size]].double(), real=True)
        metric.update(fake[others[:size]].double(), real=False)
        with torch.random.fork_rng(devices=[]):  # it shuffles the subset once more, which changes the rounding
            torch.default_generator.manual_seed(seed)
            distances.append(metric.compute()[0].item())
        metric.reset()
    return Estimate(float(np.mean(distances)), min(len(real), len(fake)), *_interval(np.array(distances)))


def _frechet_metric(num_features: int) -> FrechetInceptionDistance:
    metric = FrechetInceptionDistance(_Given(num_features), **_IN_ONE_PROCESS)
    metric.set_dtype(torch.float64)
    return metric


def _interval(values: np.ndarray) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    # Values that occur, not ones between them: between a number and infinity there is none.
    low, high = np.quantile(values, (tail, 1 - tail), method="inverted_cdf")
    return float(low), float(high)


class _Given(torch.nn.Module):
    """Replaces the network of torchmetrics, because the features are already computed."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features
