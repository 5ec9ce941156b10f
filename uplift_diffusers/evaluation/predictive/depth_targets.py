"""
Depths predicted by a model, if there is no ground truth.

Most such models give relative inverse depths with unknown scale and shift. Here each is divided by its median,
and predictions are aligned to it before they are scored (Ranftl et al. 2022, section 5). Scoring them as
metres, as was published, makes the figures depend on the unknown scale.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

from uplift_diffusers.evaluation.predictive.datasets import IMAGE_SIZE, Squares
from uplift_diffusers.evaluation.records import digest, digest_weights


class PredictedDepths(Dataset):
    """
    Squares of photographs with depths predicted by a model.

    Predictions are made on first use and stored in `folder`, under names that depend on the model's weights, the
    photograph's name and length, and the size.

    Args:
        images: photographs.
        model: a depth-estimation model of transformers: a folder or a hub id.
        folder: folder for the predictions, one .npy for each photograph.
        size: edge in pixels.
        device: device of the model.
    """

    def __init__(
        self,
        images: Sequence[Path],
        model: str,
        folder: str | Path,
        *,
        size: int = IMAGE_SIZE,
        device: torch.device | str = "cpu",
    ):
        self.squares, self.folder, self.device = Squares(images, size=size), Path(folder), device
        self.processor = AutoImageProcessor.from_pretrained(model)
        self.model = AutoModelForDepthEstimation.from_pretrained(model, use_safetensors=True).eval().to(device)
        made_of = [digest_weights([self.model]), size]
        names = [f"{path.stem}-{digest([*made_of, path.name, path.stat().st_size])}.npy" for path in images]
        self.files = [self.folder / f"{index:06d}-{name}" for index, name in enumerate(names)]

    @property
    def is_metric(self) -> bool:
        """Whether the model predicts metres."""
        return getattr(self.model.config, "depth_estimation_type", "relative") == "metric"

    def __len__(self) -> int:
        return len(self.squares)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The image, (3, size, size) float in [0, 1], and its depths, (size, size) float32."""
        image = self.squares[index]
        return image, torch.from_numpy(np.load(self.files[index]))

    def predict(self) -> None:
        """Make the missing predictions."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for index in tqdm(range(len(self)), desc="Depths", unit="image", disable=None, dynamic_ncols=True):
            file = self.files[index]
            if not file.is_file():
                temporary = file.with_suffix(".part.npy")
                np.save(temporary, self._predict(self.squares[index]).numpy())
                os.replace(temporary, file)

    @torch.no_grad()
    def _predict(self, image: torch.Tensor) -> torch.Tensor:
        inputs = self.processor(images=image, do_rescale=False, return_tensors="pt").to(self.device)
        depth = self.model(**inputs).predicted_depth[:, None]  # (1, 1, h, w)
        depth = F.interpolate(depth, size=image.shape[1:], mode="bilinear")[0, 0].float().cpu()
        return depth if self.is_metric else depth / depth.median().clamp_min(1e-6)
