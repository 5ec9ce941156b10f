"""uplift-diffusers: upscale images in latent space with UPLiFT, alone or after any diffusers pipeline."""

import importlib
from typing import TYPE_CHECKING

from uplift_diffusers._version import __version__

if TYPE_CHECKING:
    from uplift_diffusers.embedded import embedded_bundle
    from uplift_diffusers.feature_space import FeatureBackbone, FeatureSpace
    from uplift_diffusers.latent_space import LatentSpace
    from uplift_diffusers.models.autoencoder_local import AutoencoderLocal
    from uplift_diffusers.models.upsampler import UPLiFTModel
    from uplift_diffusers.pipelines.cfm_latent_upscale import CFMLatentUpscalePipeline
    from uplift_diffusers.pipelines.features import UPLiFTFeaturePipeline
    from uplift_diffusers.pipelines.latent_upscale import UPLiFTLatentUpscalePipeline
    from uplift_diffusers.pipelines.modular import UPLiFTLatentUpscaleStep
    from uplift_diffusers.pipelines.super_resolution import UPLiFTSuperResolutionPipeline
    from uplift_diffusers.pipelines.text_to_image import UPLiFTTextToImagePipeline
    from uplift_diffusers.pipelines.text_to_image_xl import UPLiFTTextToImageXLPipeline

_EXPORTS = {
    "AutoencoderLocal": "uplift_diffusers.models.autoencoder_local",
    "CFMLatentUpscalePipeline": "uplift_diffusers.pipelines.cfm_latent_upscale",
    "FeatureBackbone": "uplift_diffusers.feature_space",
    "FeatureSpace": "uplift_diffusers.feature_space",
    "LatentSpace": "uplift_diffusers.latent_space",
    "UPLiFTFeaturePipeline": "uplift_diffusers.pipelines.features",
    "UPLiFTLatentUpscalePipeline": "uplift_diffusers.pipelines.latent_upscale",
    "UPLiFTLatentUpscaleStep": "uplift_diffusers.pipelines.modular",
    "UPLiFTModel": "uplift_diffusers.models.upsampler",
    "UPLiFTSuperResolutionPipeline": "uplift_diffusers.pipelines.super_resolution",
    "UPLiFTTextToImagePipeline": "uplift_diffusers.pipelines.text_to_image",
    "UPLiFTTextToImageXLPipeline": "uplift_diffusers.pipelines.text_to_image_xl",
    "embedded_bundle": "uplift_diffusers.embedded",
}

__all__ = [
    "AutoencoderLocal",
    "CFMLatentUpscalePipeline",
    "FeatureBackbone",
    "FeatureSpace",
    "LatentSpace",
    "UPLiFTFeaturePipeline",
    "UPLiFTLatentUpscalePipeline",
    "UPLiFTLatentUpscaleStep",
    "UPLiFTModel",
    "UPLiFTSuperResolutionPipeline",
    "UPLiFTTextToImagePipeline",
    "UPLiFTTextToImageXLPipeline",
    "__version__",
    "embedded_bundle",
]


def __getattr__(name: str):
    """Import public names on first use, to keep `import uplift_diffusers` fast."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__():
    return sorted(__all__)
