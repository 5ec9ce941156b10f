"""
Custom-pipeline entry file of [`UPLiFTLatentUpscalePipeline`].

    DiffusionPipeline.from_pretrained(MODEL, custom_pipeline="pipelines/latent_upscale.py", trust_remote_code=True)
"""

from uplift_diffusers.pipelines.latent_upscale import UPLiFTLatentUpscalePipeline  # noqa: F401
