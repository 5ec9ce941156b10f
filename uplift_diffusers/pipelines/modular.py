"""The upscale stage as a block of diffusers' modular pipelines, between denoising and decoding."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.modular_pipelines import (
    ComponentSpec,
    ConfigSpec,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
)

from uplift_diffusers.models.upsampler import UPLiFTModel
from uplift_diffusers.pipelines.latent_upscale import UPLiFTLatentUpscalePipeline


class UPLiFTLatentUpscaleStep(ModularPipelineBlocks):
    r"""
    Replaces `latents` with upscaled ones, by calling [`UPLiFTLatentUpscalePipeline`].

    Example:
        ```py
        >>> import torch
        >>> from diffusers import ModularPipeline
        >>> from uplift_diffusers import UPLiFTLatentUpscaleStep, UPLiFTModel

        >>> blocks = ModularPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0").blocks
        >>> blocks.sub_blocks.insert("upscale", UPLiFTLatentUpscaleStep(), len(blocks.sub_blocks) - 1)
        >>> pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
        >>> pipe.load_components(dtype=torch.bfloat16)
        >>> pipe.update_components(upsampler=UPLiFTModel.from_pretrained("./uplift-sdxl", dtype=torch.bfloat16))
        >>> image = pipe(prompt="a lighthouse on a cliff", scale=2, output="images")[0]
        ```
    """

    @property
    def description(self) -> str:
        return "Upsamples the denoised latents, guided by the image that they decode to."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("vae", AutoencoderKL), ComponentSpec("upsampler", UPLiFTModel)]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec("latent_space", None, "which latent space the VAE's latents belong to; see LatentSpace")]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam(
                "latents", type_hint=torch.Tensor, required=True, description="(B, C, h, w), scaled, denoised."
            ),
            InputParam("scale", type_hint=float, default=2, description="From 1 to 16."),
            InputParam("generator", description="One torch.Generator, or one for each item."),
            InputParam("adain_factor", type_hint=float, default=0.0, description="Colour correction, from 0 to 1."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", type_hint=torch.Tensor, description="Upscaled, in the layout of the input.")]

    @torch.no_grad()
    def __call__(self, components, state: PipelineState) -> tuple:
        block_state: Any = self.get_block_state(state)
        stage = UPLiFTLatentUpscalePipeline(
            vae=components.vae, upsampler=components.upsampler, latent_space=components.config.latent_space
        )
        block_state.latents = stage(
            latents=block_state.latents,
            scale=block_state.scale,
            generator=block_state.generator,
            adain_factor=block_state.adain_factor,
            output_type="latent",
            return_dict=False,
        )[0]
        self.set_block_state(state, block_state)
        return components, state
