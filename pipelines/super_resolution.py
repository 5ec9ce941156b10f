"""
Custom-pipeline entry file of [`UPLiFTSuperResolutionPipeline`].

    DiffusionPipeline.from_pretrained(MODEL, custom_pipeline="pipelines/super_resolution.py", trust_remote_code=True)
"""

from uplift_diffusers.pipelines.super_resolution import UPLiFTSuperResolutionPipeline  # noqa: F401
