"""Loading of upsamplers by name or path, with UPLiFT behind the interface of its peers."""

from dataclasses import dataclass

import torch

from uplift_diffusers.evaluation.predictive.peers import PEERS, load_peer
from uplift_diffusers.evaluation.predictive.peers.interface import FeatureUpsampler, doublings, resize
from uplift_diffusers.models.upsampler import UPLiFTModel


class UPLiFT(FeatureUpsampler):
    """
    The fewest 2x steps that reach the requested size, then antialiased downsampling if they exceed it.

    Args:
        model: trained for the backbone's features; a LiFT twin (`neighborhood=None`) is one as well.
    Source: Walmer et al. 2026, section 3.1.
    """

    def __init__(self, model: UPLiFTModel):
        super().__init__()
        self.model = model

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        return image  # the model normalises it

    def forward(self, features: torch.Tensor, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        height, width = features.shape[2:]
        num_steps = doublings((height, width), size)
        if not num_steps:
            return features
        factor = self.model.config.spatial_factor
        image = resize(image, (height * factor, width * factor))
        return resize(self.model(features, image=image, num_steps=num_steps).sample, size)


@dataclass(frozen=True)
class UpsamplerSpec:
    """
    The specification of an upsampler on the command line.

    Args:
        name: name in the report; one of `PEERS`, or any name for a UPLiFTModel.
        path: path of its weights.
    """

    name: str
    path: str | None = None

    @classmethod
    def parse(cls, text: str) -> "UpsamplerSpec":
        """
        "NAME" or "NAME=PATH".

        Raises:
            ValueError: the name is missing, or it needs a path and has none.
        """
        name, _, path = text.partition("=")
        if not name or ("=" in text and not path):
            raise ValueError(f"`upsamplers` must be NAME or NAME=PATH, got {text!r}.")
        return cls(name, path or None)

    @property
    def has_weights(self) -> bool:
        """Whether it has trainable weights."""
        return self.name not in PEERS or bool(PEERS[self.name].licence)


def load_upsampler(spec: UpsamplerSpec, space, *, query_chunk: int | None = None) -> FeatureUpsampler:
    """
    Load an upsampler with its weights, in evaluation mode.

    Args:
        spec: the specification.
        space: the `FeatureSpace` of the backbone.
        query_chunk: see `load_peer`.
    Raises:
        ValueError: the path is missing, or the upsampler is for other features.
    """
    if spec.path is None and spec.has_weights:
        where = f"; they are published: {PEERS[spec.name].weights}" if spec.name in PEERS else ""
        raise ValueError(
            f"`upsamplers` must give weights for {spec.name}, got no path. Write {spec.name}=PATH{where}."
        )
    if spec.name in PEERS:
        return load_peer(spec.name, channels=space.channels, weights=spec.path, query_chunk=query_chunk)
    assert spec.path is not None  # all but peers have weights
    model = UPLiFTModel.from_pretrained(spec.path, use_safetensors=True)
    space.check_upsampler(model)
    return UPLiFT(model.eval())
