"""The diffusers pipelines. Importing this package lets `DiffusionPipeline.from_pretrained` find them by name."""

import diffusers
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES
from diffusers.utils import is_transformers_available

from uplift_diffusers.pipelines.cfm_latent_upscale import CFMLatentUpscalePipeline
from uplift_diffusers.pipelines.latent_upscale import UPLiFTLatentUpscalePipeline
from uplift_diffusers.pipelines.super_resolution import UPLiFTSuperResolutionPipeline

PIPELINES = [CFMLatentUpscalePipeline, UPLiFTLatentUpscalePipeline, UPLiFTSuperResolutionPipeline]

if is_transformers_available():
    from uplift_diffusers.pipelines.features import UPLiFTFeaturePipeline
    from uplift_diffusers.pipelines.text_to_image import UPLiFTTextToImagePipeline
    from uplift_diffusers.pipelines.text_to_image_xl import UPLiFTTextToImageXLPipeline

    PIPELINES += [UPLiFTFeaturePipeline, UPLiFTTextToImagePipeline, UPLiFTTextToImageXLPipeline]

# diffusers looks a pipeline's class up among its own attributes, and a component's class in the libraries of this
# table, which save it as ["uplift_diffusers", "UPLiFTModel"] in model_index.json.
for pipeline in PIPELINES:
    setattr(diffusers, pipeline.__name__, pipeline)
LOADABLE_CLASSES["uplift_diffusers"] = {
    "AutoencoderLocal": ["save_pretrained", "from_pretrained"],
    "UPLiFTModel": ["save_pretrained", "from_pretrained"],
}
ALL_IMPORTABLE_CLASSES.update(LOADABLE_CLASSES["uplift_diffusers"])
