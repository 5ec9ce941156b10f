"""
The upscale stage as a block of diffusers' modular pipelines.

    ModularPipeline.from_pretrained("pipelines/modular", trust_remote_code=True)
"""

from uplift_diffusers.pipelines.modular import UPLiFTLatentUpscaleStep  # noqa: F401
