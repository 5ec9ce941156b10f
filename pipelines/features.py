"""
Custom-pipeline entry file of [`UPLiFTFeaturePipeline`].

    DiffusionPipeline.from_pretrained(MODEL, custom_pipeline="pipelines/features.py", trust_remote_code=True)
"""

from uplift_diffusers.pipelines.features import UPLiFTFeaturePipeline  # noqa: F401
