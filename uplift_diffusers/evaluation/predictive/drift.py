"""
Do upsampled features stay in the backbone's feature space?

One probe is fitted on the backbone's features and frozen. It is applied after every 2x step of every upsampler,
and the result is pooled back to the tokens and compared with them. This quantifies the central claim of Walmer et al.
2026: a probe trained on the backbone's features performs worse on features that have drifted.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from uplift_diffusers.evaluation.predictive.peers.interface import FeatureUpsampler
from uplift_diffusers.evaluation.predictive.probes import at_size, count_pixels


@dataclass(frozen=True)
class StepDrift:
    """
    The results of one upsampler for every image after a number of 2x steps.

    Args:
        cosine: (n,), mean over the tokens of the cosine between the token and the mean of the positions in its cell.
        relative_error: (n,), norm of their difference over the norm of the tokens.
        counts: (n, 3, K), counts of the frozen probe, see `count_pixels`.
    """

    cosine: np.ndarray
    relative_error: np.ndarray
    counts: np.ndarray


def compare_pooled(tokens: torch.Tensor, features: torch.Tensor) -> tuple[float, float]:
    """
    Cosine and relative error between tokens and the pooled result.

    Args:
        tokens: (1, C, h, w).
        features: (1, C, c h, c w) for an integer c.
    """
    pooled = F.avg_pool2d(features, (features.shape[2] // tokens.shape[2], features.shape[3] // tokens.shape[3]))
    cosine = F.cosine_similarity(pooled, tokens, dim=1).mean()
    return cosine.item(), ((pooled - tokens).norm() / tokens.norm()).item()


@torch.no_grad()
def measure_drift(
    backbone,
    upsampler: FeatureUpsampler,
    probe: nn.Module,
    data: Dataset,
    *,
    num_steps: int,
    num_classes: int,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    title: str = "",
) -> list[StepDrift]:
    """
    The drift after 0 (the tokens themselves), 1, …, `num_steps` 2x steps.

    Args:
        backbone: a `FeatureBackbone`.
        upsampler: called for 2, 4, … times the tokens' size.
        probe: from (B, C, H, W) features to (B, K, H, W) logits, fitted on the backbone's features.
        data: (image, label) pairs.
        num_steps: number of 2x steps.
        num_classes: K.
        device: device of backbone, upsampler and probe.
    """
    rows: list[list[tuple[float, float, np.ndarray]]] = [[] for _ in range(num_steps + 1)]
    loader = DataLoader(data, 1, num_workers=num_workers)
    for image, label in tqdm(loader, desc=title, unit="image", disable=None, dynamic_ncols=True):
        image = image.to(device)
        tokens = backbone.encode(image)
        height, width = tokens.shape[2:]
        for step in range(num_steps + 1):
            size = (height << step, width << step)
            features = upsampler.upsample(tokens, image, size) if step else tokens
            predicted = at_size(probe(features), label).argmax(dim=1).cpu()
            counts = count_pixels(predicted, label, num_classes)
            rows[step].append((*compare_pooled(tokens, features), counts))
    return [StepDrift(*(np.array(column) for column in zip(*step_rows))) for step_rows in rows]
