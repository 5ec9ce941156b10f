"""
Custom-pipeline entry file of [`CFMLatentUpscalePipeline`].

    DiffusionPipeline.from_pretrained(MODEL, custom_pipeline="pipelines/cfm_latent_upscale.py", trust_remote_code=True)
"""

from uplift_diffusers.pipelines.cfm_latent_upscale import CFMLatentUpscalePipeline  # noqa: F401
