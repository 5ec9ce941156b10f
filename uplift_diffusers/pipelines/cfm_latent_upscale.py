"""CFMLatentUpscalePipeline: the flow-matching upscaler that UPLiFT is compared with."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    UNet2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from uplift_diffusers.arguments import read_whole_number
from uplift_diffusers.cfm import (
    check_scheduler,
    check_unet,
    enlarge,
    latent_multiple,
    noise_context,
    predict_velocity,
    set_equal_steps,
)
from uplift_diffusers.images.convert import ImageInput, pad_to_multiple, read_batch
from uplift_diffusers.latent_space import Autoencoder, LatentCodec, LatentSpace
from uplift_diffusers.pipelines.upscale_stage import OUTPUT_TYPES, check_generator
from uplift_diffusers.scale import read_scale, scaled_size, size_of


class CFMLatentUpscalePipeline(DiffusionPipeline):
    r"""
    Upscales by Coupling Flow Matching: the image is upsampled in pixels and encoded, noise is added to its latents,
    and a U-Net transports them to the latents of a sharp image in Euler steps.

    There is no tiling, because the U-Net's attention covers the whole image; the attention's memory grows with the
    square of the image's area.

    Args:
        vae ([`AutoencoderKL`], [`AutoencoderKLFlux2`], [`AutoencoderTiny`], [`AutoencoderDC`], [`AutoencoderLocal`],
            [`AutoencoderKLQwenImage`] or [`AutoencoderKLWan`]): encodes and decodes.
        unet ([`UNet2DModel`]): trained for the VAE's latents by `train_latent.py --method cfm`.
        scheduler ([`FlowMatchEulerDiscreteScheduler`]): with `invert_sigmas=True`, so time goes from 0 to 1.
        latent_space (`str`, *optional*): which latent space the VAE's latents belong to, if its config
            does not determine it (see [`LatentSpace`]).
    Raises:
        TypeError: `vae` is of another class.
        ValueError: `unet` was not trained for the latents of `vae`, or `scheduler` goes the other way.
    Source: Schusterbauer et al. 2024 (arXiv 2312.07360).

    Example:
        ```py
        >>> from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
        >>> from uplift_diffusers import AutoencoderLocal, CFMLatentUpscalePipeline, embedded_bundle
        >>> from PIL import Image

        >>> pipe = CFMLatentUpscalePipeline(
        ...     vae=AutoencoderLocal.from_pretrained(embedded_bundle(), subfolder="vae"),
        ...     unet=UNet2DModel.from_pretrained("runs/cfm"),
        ...     scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        ... )
        >>> pipe(image=Image.open("photo.jpg"), scale=2, num_inference_steps=20).images[0].save("larger.png")
        ```
    """

    config: Any  # diffusers' FrozenDict: its entries are attributes, too
    progress_bar: Callable[..., Any]  # a decorator of diffusers hides what it takes

    model_cpu_offload_seq = "vae->unet"

    def __init__(
        self,
        vae: Autoencoder,
        unet: UNet2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        latent_space: str | None = None,
    ):
        super().__init__()
        check_unet(unet, LatentSpace.of(vae, latent_space))
        check_scheduler(scheduler)
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.register_to_config(latent_space=latent_space)
        self.image_processor = VaeImageProcessor(do_normalize=False)

    @property
    def latent_space(self) -> LatentSpace:
        """The latent space of the pipeline's current VAE."""
        return LatentSpace.of(self.vae, self.config.latent_space)

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | None = None,
        latents: torch.Tensor | None = None,
        scale: float = 2,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Upscale images or latents.

        Args:
            image (*optional*): PIL, array or tensor, or a list of images of one size; of any width and height.
            latents (`torch.Tensor`, *optional*): (B, C, h, w), scaled, as diffusers' pipelines return them with
                `output_type="latent"`, instead of `image`, which is then decoded from them.
            scale (`float`): from 1 to 16; the network works best at the scales it was trained for.
            num_inference_steps (`int`): Euler steps, each one run of the U-Net.
            generator: one, or one for each item; then an item's result does not depend on its batch.
            output_type (`str`): `"pil"`; `"np"`, float32 (B, H, W, 3) in [0, 1]; `"pt"`, float32 (B, 3, H, W) in
                [0, 1]; or `"latent"`, the large latents, scaled, in the dtype of `latents`, else of the VAE.
            return_dict (`bool`): return an [`ImagePipelineOutput`] instead of a tuple.
        Returns:
            `.images`, of round(scale * height) by round(scale * width) pixels, or latents.
        Raises:
            TypeError, ValueError: an argument is invalid; raised before any work is done.
        """
        # 1. Check inputs
        codec, device = LatentCodec(self.vae, self.config.latent_space), self._execution_device
        space = codec.space
        check_unet(self.unet, space)
        check_scheduler(self.scheduler)
        small = None if image is None else read_batch(image)
        size = self._check_inputs(small, latents, scale, num_inference_steps, generator, output_type)
        dtype = self.vae.dtype if latents is None else latents.dtype

        # 2. Upsample in pixels and encode: the context
        if small is None:
            assert latents is not None
            small = codec.decode(space.denormalize(latents.to(device, torch.float32)))
        enlarged = enlarge(small.to(device), size)  # (B, 3, H, W)
        enlarged = pad_to_multiple(enlarged, space.spatial_factor * latent_multiple(self.unet))
        context = space.normalize(codec.encode(enlarged).float())  # (B, C, H / f, W / f)

        # 3. Add noise and follow the flow
        noise = randn_tensor(context.shape, generator=generator, device=device, dtype=torch.float32)
        sample = noise_context(context, noise)
        with self.progress_bar(total=num_inference_steps) as progress:
            for timestep in set_equal_steps(self.scheduler, num_inference_steps, device):
                velocity = predict_velocity(self.unet, sample, context, timestep)
                # In float32, whatever the network runs in: many small steps are summed up.
                sample = self.scheduler.step(velocity.float(), timestep, sample, return_dict=False)[0]
                progress.update()
        if not torch.isfinite(sample).all():
            raise ValueError(
                f"`unet` must give finite velocities, got NaN or infinity in {self.unet.dtype}. "
                "Run it in float32 or bfloat16: unet.to(torch.bfloat16)."
            )

        # 4. Decode
        if output_type == "latent":
            height, width = (length // space.spatial_factor for length in size)
            images: Any = sample[..., :height, :width].to(dtype)
        else:
            images = codec.decode(space.denormalize(sample))[..., : size[0], : size[1]]
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_inputs(
        self,
        image: torch.Tensor | None,
        latents: torch.Tensor | None,
        scale: float,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
    ) -> tuple[int, int]:
        """(height, width) of the output in pixels."""
        space = self.latent_space
        scale = read_scale(scale)
        read_whole_number("num_inference_steps", num_inference_steps)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        if image is not None and latents is None:
            size, count = size_of(image), len(image)
        elif latents is not None and image is None:
            space.check_latents(latents)
            size, count = scaled_size(size_of(latents), space.spatial_factor), len(latents)
        else:
            given = "neither" if image is None else "both"
            raise ValueError(f"Either `image` or `latents` must be given, got {given}.")
        check_generator(generator, count)
        size = scaled_size(size, scale)
        if output_type == "latent" and any(length % space.spatial_factor for length in size):
            raise ValueError(
                f"`scale` must lead to a height and width that are multiples of {space.spatial_factor} for latents, "
                f"got {scale}, which leads to {size}. Request an image instead."
            )
        return size
