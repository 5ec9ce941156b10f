"""
Custom-pipeline entry file of [`UPLiFTTextToImageXLPipeline`].

    DiffusionPipeline.from_pretrained(MODEL, custom_pipeline="pipelines/text_to_image_xl.py", trust_remote_code=True)
"""

from uplift_diffusers.pipelines.text_to_image_xl import UPLiFTTextToImageXLPipeline  # noqa: F401
