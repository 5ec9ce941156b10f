"""UPLiFTLatentUpscalePipeline: latents or an image in, larger latents or a larger image out."""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor

from uplift_diffusers.arguments import read_number
from uplift_diffusers.images.convert import ImageInput, read_batch, resize
from uplift_diffusers.latent_space import PACKING, Autoencoder, LatentCodec, LatentSpace
from uplift_diffusers.models.upsampler import UPLiFTModel
from uplift_diffusers.pipelines.upscale_stage import (
    Progress,
    check_generator,
    check_request,
    count_parts,
    decode_to_scale,
    upscale_raw_latents,
)
from uplift_diffusers.scale import scaled_size


class UPLiFTLatentUpscalePipeline(DiffusionPipeline):
    r"""
    Upscales the latents of any diffusers pipeline, as a stage between its last denoising step and its VAE.

    Args:
        vae ([`AutoencoderKL`], [`AutoencoderKLFlux2`], [`AutoencoderTiny`], [`AutoencoderDC`], [`AutoencoderLocal`],
            [`AutoencoderKLQwenImage`] or [`AutoencoderKLWan`]): encodes and decodes.
        upsampler ([`UPLiFTModel`]): trained for the VAE's latents.
        latent_space (`str`, *optional*): declares which latent space the VAE's latents belong to, where its config
            does not say (see [`LatentSpace`]).
    Raises:
        TypeError: a VAE of another kind.
        ValueError: `upsampler` was trained for other latents than those of `vae`.

    Example:
        ```py
        >>> import torch
        >>> from diffusers import StableDiffusionPipeline
        >>> from uplift_diffusers import UPLiFTLatentUpscalePipeline, UPLiFTModel

        >>> sd = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> upsampler = UPLiFTModel.from_pretrained("UPLiFT-upsampler/uplift_sd1.5vae")
        >>> upscale = UPLiFTLatentUpscalePipeline(vae=sd.vae, upsampler=upsampler)

        >>> latents = sd("a lighthouse on a cliff", output_type="latent").images
        >>> upscale(latents=latents, scale=2, generator=torch.Generator().manual_seed(0)).images[0].save("large.png")
        ```
    """

    model_cpu_offload_seq = "vae->upsampler"

    def __init__(
        self,
        vae: Autoencoder,
        upsampler: UPLiFTModel,
        latent_space: str | None = None,
    ):
        super().__init__()
        LatentSpace.of(vae, latent_space).check_upsampler(upsampler)
        self.register_modules(vae=vae, upsampler=upsampler)
        self.register_to_config(latent_space=latent_space)
        self.image_processor = VaeImageProcessor(do_normalize=False)

    @property
    def latent_space(self) -> LatentSpace:
        """The latent space of the VAE that the pipeline has now."""
        return LatentSpace.of(self.vae, self.config.latent_space)

    @torch.no_grad()
    def __call__(
        self,
        latents: torch.Tensor | None = None,
        image: ImageInput | None = None,
        scale: float = 2,
        generator: torch.Generator | list[torch.Generator] | None = None,
        adain_factor: float = 0.0,
        consistency: float = 0.0,
        tile_size: int | str | None = "auto",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_progress: Callable[[int, int], None] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Upscale latents.

        Args:
            latents (`torch.Tensor`, *optional*): what a diffusers pipeline returned with `output_type="latent"`:
                scaled, (B, C, h, w), one frame (B, C, 1, h, w), or packed (B, h/2 * w/2, 4C), as FLUX and Qwen-Image
                return them. Latents (B, C, h, w) of FLUX.2 are raw, as FLUX.2 klein returns them. Encoded from `image`
                if not given.
            image (*optional*): the image of these latents, which guides the upsampling: PIL, array or tensor, or a
                list of one size, f*h by f*w pixels. Decoded from `latents` if not given.
            scale (`float`): from 1 to 16. Between powers of two the image is made with the next larger one and
                reduced; for `output_type="latent"` it is then encoded again.
            generator: one, or one for each item, which makes an item's result the same alone and in a batch.
            adain_factor (`float`): from 0 to 1: how far to move mean and standard deviation of every channel of the
                upscaled latents towards those of the given ones, against a shift of colour or contrast. See
                [`~uplift_diffusers.models.local_attention.match_channel_statistics`].
            consistency (`float`): from 0 to 1: how much of what the guide image has and the result, reduced, lacks is
                added to the result; see [`~uplift_diffusers.pipelines.upscale_stage.make_consistent`]. Latents at a
                power of two stay as they are.
            tile_size (`int`, *optional*): edge in pixels of the tiles of the image that is upsampled, which bounds
                the memory and does not change the result; `"auto"`, 768, or None, no tiles. The VAE has its own
                `vae.enable_tiling()`, which is exact only for an [`AutoencoderLocal`].
            output_type (`str`): `"pil"`; `"np"`, float32 (B, H, W, 3) in [0, 1]; `"pt"`, float32 (B, 3, H, W) in
                [0, 1]; or `"latent"`, the large latents, in the layout and dtype of `latents`; or else (B, C, h, w),
                in the dtype of the VAE.
            return_dict (`bool`): return an [`ImagePipelineOutput`] instead of a tuple.
            callback_on_progress: called with the number of parts of the work that are done and of all parts, after
                every 2x step of every tile and every decoded strip. What it raises ends the call.
            height (`int`, *optional*): of the image of `latents` in pixels, as the pipeline that made them was called.
                Only packed latents need it.
            width (`int`, *optional*): likewise.
        Returns:
            `.images`, of round(scale * f*h) by round(scale * f*w) pixels, or latents, round(scale * h) by
            round(scale * w) of them; packed ones count in 2x2 patches, h/2 by w/2.
        Raises:
            TypeError, ValueError: an argument that is not as above, before any work is done.
        """
        # 1. Check inputs
        codec, device = LatentCodec(self.vae, self.config.latent_space), self._execution_device
        space = codec.space
        space.check_upsampler(self.upsampler)
        num_steps = check_request(scale=scale, adain_factor=adain_factor, output_type=output_type, tile_size=tile_size)
        consistency = read_number("consistency", consistency, minimum=0, maximum=1)
        guide = None if image is None else read_batch(image)
        size = self._check_inputs(latents, guide, generator, height=height, width=width)
        latent_size = (size[0] // space.spatial_factor, size[1] // space.spatial_factor)
        ndim = 4 if latents is None else latents.ndim
        parts = count_parts(codec, size, num_steps=num_steps, tile_size=tile_size)
        progress = Progress(callback_on_progress, parts)

        try:
            # 2. Complete the pair of latents and guide image
            if latents is None:
                guide = guide.to(device)
                raw_latents = codec.encode(guide)  # (B, C, h, w)
            else:
                raw_latents = space.read(latents.to(device, torch.float32), size=latent_size)
                if guide is None and num_steps > 0:
                    guide = codec.decode(raw_latents)  # (B, 3, f*h, f*w)

            # 3. Upsample
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

            # 4. Decode; latents only at scales between powers of two, where their image is reduced and encoded again
            decoding = {
                "codec": codec,
                "size": size,
                "num_steps": num_steps,
                "image": guide,
                "consistency": consistency,
                "progress": progress,
            }
            if output_type == "latent":
                patch = PACKING if ndim == 3 else 1
                rows, columns = scaled_size((latent_size[0] // patch, latent_size[1] // patch), scale)
                wanted = (rows * patch, columns * patch)
                if wanted != tuple(raw_latents.shape[2:]):
                    large = decode_to_scale(raw_latents, scale=2**num_steps, **decoding)
                    raw_latents = codec.encode(resize(large, tuple(space.spatial_factor * n for n in wanted)))
                images = space.write(raw_latents, ndim=ndim).to(self.vae.dtype if latents is None else latents.dtype)
            else:
                images = decode_to_scale(raw_latents, scale=scale, **decoding)
                images = self.image_processor.postprocess(images, output_type=output_type)
        finally:
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_inputs(
        self,
        latents: torch.Tensor | None,
        guide: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        *,
        height: int | None,
        width: int | None,
    ) -> tuple[int, int]:
        """(height, width) in pixels of the image of the latents."""
        space = self.latent_space
        factor = space.spatial_factor
        if latents is None and guide is None:
            raise ValueError("Either `latents` or `image` must be given, got neither.")
        if latents is not None:
            latent_size = space.check_layout(latents, height=height, width=width)
            size = (latent_size[0] * factor, latent_size[1] * factor)
        else:
            if height is not None or width is not None:
                raise ValueError(
                    f"`height` and `width` must be left out without `latents`, got {height} and {width}. They are "
                    "those of the image; `scale` says how large the result is."
                )
            size = (guide.shape[2], guide.shape[3])
            if size[0] % factor or size[1] % factor:
                raise ValueError(
                    f"`image` must have a height and width that are multiples of {factor}, got {size}. "
                    "UPLiFTSuperResolutionPipeline takes any size."
                )
        if latents is not None and guide is not None and guide.shape != (len(latents), 3, *size):
            raise ValueError(
                f"`image` must be {len(latents)} images of {size} (height, width) pixels for `latents` of "
                f"{tuple(latents.shape)}, got {len(guide)} of {tuple(guide.shape[2:])}."
            )
        check_generator(generator, len(guide if latents is None else latents))
        return size
