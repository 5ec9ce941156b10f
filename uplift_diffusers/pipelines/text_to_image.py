"""UPLiFTTextToImagePipeline: Stable Diffusion with an upscale stage; a prompt in, a large image out."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput, StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from uplift_diffusers.images.convert import resize
from uplift_diffusers.latent_space import LatentCodec, LatentSpace
from uplift_diffusers.models.upsampler import UPLiFTModel
from uplift_diffusers.pipelines.denoising import (
    check_refine_strength,
    check_tensors,
    count_images,
    refine,
    resolve_size,
)
from uplift_diffusers.pipelines.upscale_stage import (
    Progress,
    check_generator,
    check_guide_vae,
    check_request,
    count_parts,
    decode_to_scale,
    require_components,
    upscale_raw_latents,
)
from uplift_diffusers.scale import scaled_size


class UPLiFTTextToImagePipeline(StableDiffusionPipeline):
    r"""
    [`StableDiffusionPipeline`] with an upscale stage between the last denoising step and the VAE.

    It denoises at the size that the U-Net was trained for, upsamples the latents by `scale` without further denoising
    and decodes the large image. Everything else works as in [`StableDiffusionPipeline`], including the loaders of
    LoRA, textual inversion and IP-Adapter.

    Args:
        vae ([`AutoencoderKL`] or [`AutoencoderTiny`]): decodes the large image, and the guide without `guide_vae`.
        text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder,
            requires_safety_checker: as for [`StableDiffusionPipeline`].
        upsampler ([`UPLiFTModel`]): trained for the VAE's latents. Like the other components, it may be None in a
            pipeline that only encodes prompts.
        guide_vae ([`AutoencoderTiny`], *optional*): decodes the small guide image faster.
        latent_space (`str`, *optional*): which latent space the VAE's latents belong to, if its config
            does not determine it (see [`LatentSpace`]).
    Raises:
        TypeError: `vae` is of another class.
        ValueError: `upsampler` or `guide_vae` is not for the latents of `vae`.

    Example:
        ```py
        >>> import torch
        >>> from uplift_diffusers import UPLiFTModel, UPLiFTTextToImagePipeline

        >>> upsampler = UPLiFTModel.from_pretrained("UPLiFT-upsampler/uplift_sd1.5vae", dtype=torch.float16)
        >>> pipe = UPLiFTTextToImagePipeline.from_pretrained(
        ...     "stable-diffusion-v1-5/stable-diffusion-v1-5", upsampler=upsampler, dtype=torch.float16
        ... ).to("cuda")
        >>> image = pipe("a lighthouse on a cliff", scale=2, generator=torch.Generator().manual_seed(0)).images[0]
        ```
    """

    config: Any  # diffusers' FrozenDict: its entries are attributes, too

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->guide_vae->upsampler->vae"
    _optional_components = [*StableDiffusionPipeline._optional_components, "guide_vae"]  # noqa: RUF012 - a list, as diffusers has it

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        upsampler: UPLiFTModel,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        guide_vae: AutoencoderTiny | None = None,
        requires_safety_checker: bool = True,
        latent_space: str | None = None,
    ):
        if vae is not None and upsampler is not None:  # without, it only encodes prompts
            space = LatentSpace.of(vae, latent_space)
            space.check_upsampler(upsampler)
            check_guide_vae(space, guide_vae)
        components: dict[str, Any] = {  # more kinds of them than the types of the class that takes them know
            "vae": vae,
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
            "unet": unet,
            "scheduler": scheduler,
            "safety_checker": safety_checker,
            "feature_extractor": feature_extractor,
            "image_encoder": image_encoder,
            "requires_safety_checker": requires_safety_checker,
        }
        super().__init__(**components)
        self.register_modules(upsampler=upsampler, guide_vae=guide_vae)
        self.register_to_config(latent_space=latent_space)

    @property
    def latent_space(self) -> LatentSpace:
        """The latent space of the pipeline's current VAE."""
        return LatentSpace.of(self.vae, self.config.latent_space)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - as the class it builds on
        *,
        scale: float = 2,
        refine_strength: float = 0.0,
        adain_factor: float = 0.0,
        tile_size: int | str | None = "auto",
        callback_on_progress: Callable[[int, int], None] | None = None,
    ) -> StableDiffusionPipelineOutput | tuple:
        r"""
        Generate an image from a prompt and upscale it.

        Args:
            prompt, num_inference_steps, timesteps, sigmas, guidance_scale, negative_prompt, num_images_per_prompt,
                eta, prompt_embeds, negative_prompt_embeds, ip_adapter_image, ip_adapter_image_embeds,
                cross_attention_kwargs, guidance_rescale, clip_skip: as for [`StableDiffusionPipeline`].
            height (`int`, *optional*): height of the denoised image in pixels; the result is `scale` times as high.
            width (`int`, *optional*): its width. Both default to the size of `latents`, else to the U-Net's size.
            generator: one, or one for each image; then an image does not depend on its batch. Denoising,
                upsampler and refinement draw from it in this order.
            latents (`torch.Tensor`, *optional*): (images, C, h, w), the initial noise.
            output_type (`str`): `"pil"`; `"np"`, float32 (B, H, W, 3) in [0, 1]; `"pt"`, float32 (B, 3, H, W) in
                [0, 1]; or `"latent"`, the large latents, scaled.
            return_dict (`bool`): return a [`StableDiffusionPipelineOutput`] instead of a tuple.
            callback_on_step_end: called after each step of the denoising and of the refinement. During refinement, the
                step index starts at 0 again, and the pipeline is the [`StableDiffusionImg2ImgPipeline`] that refines.
                After an interruption, the current latents are upscaled and not refined.
            callback_on_step_end_tensor_inputs (`list[str]`): names of the tensors passed to the callback.
            scale (`float`): from 1 to 16. Between powers of two, the image is upscaled to the next power of two and
                downsampled; for refinement or `output_type="latent"` it is then encoded again.
            refine_strength (`float`): from 0 to 1. Above 0, noise is added to the upscaled latents, and they are
                denoised with this last share of the schedule, at the output size, with the same U-Net and with the
                conditioning of the first denoising except `guidance_rescale`.
            adain_factor (`float`): from 0 to 1: how far to move mean and standard deviation of every channel of the
                upscaled latents towards those of the denoised ones, to correct a shift of colour or contrast. See
                [`~uplift_diffusers.pipelines.upscale_stage.match_channel_statistics`].
            tile_size (`int`, *optional*): edge of the tiles in pixels of the denoised image, which
                bounds memory and does not change the result; `"auto"` is 768, None disables tiling.
            callback_on_progress: called with the number of parts done and the total, after
                every 2x step of every tile and every decoded strip. An exception raised in it ends the call.
        Returns:
            `.images`, of round(scale * height) by round(scale * width) pixels, or latents, and
            `.nsfw_content_detected`, the safety checker's result for each large image.
        Raises:
            TypeError, ValueError: an argument is invalid; raised before the denoising begins.
        """
        # 1. Check inputs
        require_components(vae=self.vae, upsampler=self.upsampler)
        codec = LatentCodec(self.vae, self.config.latent_space)
        space = codec.space
        space.check_upsampler(self.upsampler)
        check_guide_vae(space, self.guide_vae)
        num_steps = check_request(scale=scale, adain_factor=adain_factor, output_type=output_type, tile_size=tile_size)
        count = count_images(prompt, prompt_embeds, num_images_per_prompt)
        check_generator(generator, count, noun="images")
        factor = space.spatial_factor
        size = resolve_size(height, width, latents=latents, unet=self.unet, spatial_factor=factor)
        check_tensors(
            unet=self.unet,
            count=count,
            size=size,
            spatial_factor=factor,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        decodes = output_type != "latent"
        parts = count_parts(codec, size, num_steps=num_steps, tile_size=tile_size, decodes=decodes)
        progress = Progress(callback_on_progress, parts)
        num_denoising_steps = len(timesteps or sigmas or []) or num_inference_steps
        check_refine_strength(refine_strength, num_inference_steps=num_denoising_steps, channels=space.channels)

        # 2. Denoise
        conditioning = {
            "prompt": prompt,
            "num_inference_steps": num_inference_steps,
            "timesteps": timesteps,
            "sigmas": sigmas,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "num_images_per_prompt": num_images_per_prompt,
            "eta": eta,
            "generator": generator,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "ip_adapter_image": ip_adapter_image,
            "ip_adapter_image_embeds": ip_adapter_image_embeds,
            "cross_attention_kwargs": cross_attention_kwargs,
            "clip_skip": clip_skip,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
        }
        output: Any = super().__call__(
            height=size[0],
            width=size[1],
            latents=latents,
            guidance_rescale=guidance_rescale,
            output_type="latent",
            **conditioning,
        )
        denoised: torch.Tensor = output.images  # (B, C, h, w)

        # 3. Upsample
        space.check_latents(denoised)
        raw_latents = space.denormalize(denoised.float())
        guide_codec = codec if self.guide_vae is None else LatentCodec(self.guide_vae, space)
        guide = guide_codec.decode(raw_latents) if num_steps > 0 else None  # (B, 3, f*h, f*w)
        raw_latents = upscale_raw_latents(
            raw_latents,
            image=guide,
            upsampler=self.upsampler,
            num_steps=num_steps,
            generator=generator,
            adain_factor=adain_factor,
            tile_size=tile_size,
            progress=progress,
        )  # (B, C, 2**n * h, 2**n * w)

        # 4. Reduce to the size that was asked for, where latents go on
        made_size, made_steps, reduction = size, num_steps, scale
        if refine_strength or output_type == "latent":
            latent_size = scaled_size((size[0] // factor, size[1] // factor), scale)
            raw_latents = codec.resize(raw_latents, latent_size)
            made_size, made_steps, reduction = (latent_size[0] * factor, latent_size[1] * factor), 0, 1

        # 5. Refine
        if refine_strength and not self.interrupt:
            denoised = refine(
                space.normalize(raw_latents),
                pipeline=self,
                refiner=self._refiner(),
                strength=refine_strength,
                **conditioning,
            )
            raw_latents = space.denormalize(denoised.float())

        # 6. Decode
        if output_type == "latent":
            images: Any = space.normalize(raw_latents).to(denoised.dtype)
            has_nsfw_concept = None
        else:
            images = decode_to_scale(
                raw_latents,
                codec=codec,
                size=made_size,
                num_steps=made_steps,
                scale=reduction,
                progress=progress,
            )
            images = resize(images, scaled_size(size, scale))  # refined latents are whole, pixels need not be
            # The safety checker and the image processor of the class want [-1, 1].
            images, has_nsfw_concept = self.run_safety_checker(images * 2 - 1, self._execution_device, self.unet.dtype)
            do_denormalize = [not has_nsfw for has_nsfw in has_nsfw_concept or [False] * len(images)]
            images = self.image_processor.postprocess(images, output_type=output_type, do_denormalize=do_denormalize)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, has_nsfw_concept
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=has_nsfw_concept)

    def _refiner(self) -> StableDiffusionImg2ImgPipeline:
        """Image-to-image with this pipeline's current components, without safety checker, as it returns latents."""
        components: dict[str, Any] = {
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            "unet": self.unet,
            "scheduler": self.scheduler,
            "safety_checker": None,
            "feature_extractor": self.feature_extractor,
            "image_encoder": self.image_encoder,
            "requires_safety_checker": False,
        }
        return StableDiffusionImg2ImgPipeline(**components)
