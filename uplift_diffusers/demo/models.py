"""The pipelines of the demo, loaded when they are first needed and kept."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from uplift_diffusers.cli import choose_device, load_pipeline
from uplift_diffusers.demo.text_to_image import Source

if TYPE_CHECKING:
    import torch

    from uplift_diffusers.pipelines.super_resolution import UPLiFTSuperResolutionPipeline
    from uplift_diffusers.pipelines.text_to_image import UPLiFTTextToImagePipeline


@dataclass(frozen=True)
class Model:
    """
    Where a super-resolution pipeline is loaded from, as `uplift-diffusers upscale` has it.

    Args:
        location: a folder or a name on the hub; None for the embedded bundle.
        vae, latent_space: see `uplift-diffusers upscale --help`.
    """

    location: str | None = None
    vae: str | None = None
    latent_space: str | None = None


@dataclass
class Models:
    """
    The pipelines, on one device. To be used by one thread.

    Args:
        device: as `--device` names it.
        super_resolution: what to offer, by the name that people choose.
    """

    device: str
    super_resolution: dict[str, Model]
    _enlargers: "dict[str, UPLiFTSuperResolutionPipeline]" = field(default_factory=dict)
    _creators: "dict[Source, UPLiFTTextToImagePipeline]" = field(default_factory=dict)

    def enlarger(self, name: str) -> "UPLiFTSuperResolutionPipeline":
        """The super-resolution pipeline of that name. Raises CommandError if it cannot be loaded."""
        if name not in self._enlargers:
            device = choose_device(self.device)
            model = self.super_resolution[name]
            pipeline = load_pipeline(model.location, model.vae, model.latent_space)
            pipeline.set_progress_bar_config(disable=True)
            self._enlargers[name] = pipeline.to(device)
        return self._enlargers[name]

    def creator(self, source: Source) -> "UPLiFTTextToImagePipeline":
        """The text-to-image pipeline of `source`; another one that was there before makes room."""
        if source not in self._creators:
            self._creators.clear()
            device = choose_device(self.device)
            self._creators[source] = source.load().to(device, dtype=_dtype(device))
        return self._creators[source]


def _dtype(device: "torch.device") -> "torch.dtype":
    import torch

    return torch.float16 if device.type == "cuda" else torch.float32
