"""Small stand-ins: a backbone with the interface of FeatureBackbone, photographs with labels, an UPLiFT for both."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from uplift_diffusers.models.upsampler import UPLiFTModel

PATCH = 8
CHANNELS = 12


class Encoded(NamedTuple):
    features: torch.Tensor
    cls_token: torch.Tensor | None


class TinyBackbone:
    """Mean colours of a patch, mixed into more channels."""

    def __init__(self, *, has_cls_token=True):
        torch.manual_seed(5)
        self.model = torch.nn.Conv2d(3, CHANNELS, 1).requires_grad_(False)
        self.space = SimpleNamespace(
            name="tiny", channels=CHANNELS, patch_size=PATCH, check_upsampler=lambda model: None
        )
        self.has_cls_token = has_cls_token
        self.seen = []

    def encode(self, image):
        return self.encode_with_cls(image).features

    def encode_with_cls(self, image):
        self.seen.append(image)
        features = self.model(F.avg_pool2d(2 * image - 1, PATCH))
        return Encoded(features, features.mean((2, 3)) if self.has_cls_token else None)


def tiny_uplift(**changes):
    """Random weights, the Local Attender's made large enough that its weights are far from equal."""
    torch.manual_seed(7)
    config = {
        "latent_channels": CHANNELS,
        "spatial_factor": PATCH,
        "latent_space": "tiny",
        "encoder_block_out_channels": (8, 8, 8),
        "encoder_layers_per_block": 1,
        "image_normalization": "imagenet",
        "decoder_channels": 8,
        "decoder_layers": (1, 1),
        "refiner_layers": 0,
        "noise_channels": 0,
        "norm_type": "batch_norm",
    }
    model = UPLiFTModel(**{**config, **changes}).eval()
    if model.attender is not None:
        with torch.no_grad():
            model.attender.conv.weight *= 30
    return model


def write_scene(folder, name, *, seed, size=(48, 64)):
    """A photograph of three coloured areas with noise, its labels 0 to 2, and its depths of 1, 2 and 4 m."""
    rng = np.random.default_rng(seed)
    label = np.zeros(size, np.uint8)
    top, left = rng.integers(8, 24, 2)
    label[top:, :] = 1
    label[: top + 8, left : left + 24] = 2
    colours = np.array([[40, 60, 220], [60, 200, 50], [220, 50, 40]])
    pixels = (colours[label] + rng.normal(0, 12, (*size, 3))).clip(0, 255).astype(np.uint8)
    for part in ("images", "labels", "depths"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
    Image.fromarray(label).save(folder / "labels" / f"{name}.png")
    np.save(folder / "depths" / f"{name}.npy", np.array([1.0, 2.0, 4.0], np.float32)[label])


def write_scenes(folder, *, train=6, val=4):
    for part, count, first in (("train", train, 0), ("val", val, 100)):
        for index in range(count):
            write_scene(folder / part, f"scene{index}", seed=first + index)
    return folder
