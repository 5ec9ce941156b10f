"""uplift-diffusers: make images larger in latent space, with UPLiFT, beside any diffusers pipeline."""

import importlib
from pathlib import Path

from uplift_diffusers._version import __version__
from uplift_diffusers.registration import register_with_diffusers

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and str(_ROOT) not in __path__:
    # Used straight from a checkout, pipelines/ stands beside this package rather than inside it.
    __path__.append(str(_ROOT))

_EXPORTS = {
    "AutoencoderLocal": "uplift_diffusers.models.autoencoder",
    "CFMLatentUpscalePipeline": "uplift_diffusers.pipelines.cfm_latent_upscale",
    "LatentSpace": "uplift_diffusers.latent_space",
    "UPLiFTLatentUpscalePipeline": "uplift_diffusers.pipelines.latent_upscale",
    "UPLiFTLatentUpscaleStep": "uplift_diffusers.modular",
    "UPLiFTModel": "uplift_diffusers.models.uplift",
    "UPLiFTSuperResolutionPipeline": "uplift_diffusers.pipelines.super_resolution",
    "UPLiFTTextToImagePipeline": "uplift_diffusers.pipelines.text_to_image",
    "UPLiFTTextToImageXLPipeline": "uplift_diffusers.pipelines.text_to_image_xl",
    "embedded_bundle": "uplift_diffusers.embedded",
}

__all__ = ["__version__", *_EXPORTS]

register_with_diffusers(
    __name__,
    pipelines=tuple(name for name in _EXPORTS if name.endswith("Pipeline")),
    models=("AutoencoderLocal", "UPLiFTModel"),
)


def __getattr__(name: str):
    """Import public names on first use, so that `import uplift_diffusers` costs nothing."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__():
    return sorted(__all__)
