"""
Custom-pipeline entry file of [`UPLiFTTextToImagePipeline`].

    DiffusionPipeline.from_pretrained(MODEL, custom_pipeline="pipelines/text_to_image.py", trust_remote_code=True)
"""

from uplift_diffusers.pipelines.text_to_image import UPLiFTTextToImagePipeline  # noqa: F401
