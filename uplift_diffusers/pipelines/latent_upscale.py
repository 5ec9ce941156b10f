"""UPLiFTLatentUpscalePipeline: latents or an image in, larger latents or a larger image out."""

from collections.abc import Callable
from typing import Any

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
from uplift_diffusers.scale import scaled_size, size_of


class UPLiFTLatentUpscalePipeline(DiffusionPipeline):
    r"""
    Upscales the latents of any diffusers pipeline, as a stage between its last denoising step and its VAE.

    Args:
        vae ([`AutoencoderKL`], [`AutoencoderKLFlux2`], [`AutoencoderTiny`], [`AutoencoderDC`], [`AutoencoderLocal`],
            [`AutoencoderKLQwenImage`] or [`AutoencoderKLWan`]): encodes and decodes.
        upsampler ([`UPLiFTModel`]): trained for the VAE's latents.
        latent_space (`str`, *optional*): which latent space the VAE's latents belong to, if its config
            does not determine it (see [`LatentSpace`]).
    Raises:
        TypeError: `vae` is of another class.
        ValueError: `upsampler` was not trained for the latents of `vae`.

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

    config: Any  # diffusers' FrozenDict: its entries are attributes, too

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
        """The latent space of the pipeline's current VAE."""
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
            latents (`torch.Tensor`, *optional*): output of a diffusers pipeline with `output_type="latent"`:
                scaled, (B, C, h, w), one frame (B, C, 1, h, w), or packed (B, h/2 * w/2, 4C), as from FLUX and
                Qwen-Image. Latents (B, C, h, w) of FLUX.2 are raw, as from FLUX.2 klein. Encoded from `image`
                if not given.
            image (*optional*): the image of these latents, which guides the upsampling: PIL, array or tensor, or a
                list of images of one size, f*h by f*w pixels. Decoded from `latents` if not given.
            scale (`float`): from 1 to 16. Between powers of two, the image is upscaled to the next power of two and
                downsampled; for `output_type="latent"` it is then encoded again.
            generator: one, or one for each item; then an item's result does not depend on its batch.
            adain_factor (`float`): from 0 to 1: how far to move mean and standard deviation of every channel of the
                upscaled latents towards those of the input latents, to correct a shift of colour or contrast. See
                [`~uplift_diffusers.pipelines.upscale_stage.match_channel_statistics`].
            consistency (`float`): from 0 to 1: the strength of a correction that makes the downsampled result match
                the guide image; see [`~uplift_diffusers.pipelines.upscale_stage.make_consistent`]. Latents at
                a power of two are not changed.
            tile_size (`int`, *optional*): edge of the tiles in pixels of the image, which bounds memory and does not
                change the result; `"auto"` is 768, None disables tiling. The VAE has a separate
                `vae.enable_tiling()`, which is exact only for an [`AutoencoderLocal`].
            output_type (`str`): `"pil"`; `"np"`, float32 (B, H, W, 3) in [0, 1]; `"pt"`, float32 (B, 3, H, W) in
                [0, 1]; or `"latent"`, the large latents, in the layout and dtype of `latents`; without `latents`
                (B, C, h, w), in the dtype of the VAE.
            return_dict (`bool`): return an [`ImagePipelineOutput`] instead of a tuple.
            callback_on_progress: called with the number of parts done and the total, after
                every 2x step of every tile and every decoded strip. An exception raised in it ends the call.
            height (`int`, *optional*): height in pixels of the image of `latents`, as passed to the pipeline that made
                them. Only needed for packed latents.
            width (`int`, *optional*): the corresponding width.
        Returns:
            `.images`, of round(scale * f*h) by round(scale * f*w) pixels, or round(scale * h) by
            round(scale * w) latents; packed latents are rounded in 2x2 patches, h/2 by w/2.
        Raises:
            TypeError, ValueError: an argument is invalid; raised before any work is done.
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
        patch = PACKING if ndim == 3 else 1
        rows, columns = scaled_size((latent_size[0] // patch, latent_size[1] // patch), scale)
        wanted = (rows * patch, columns * patch)  # of the result, in latents
        decodes = output_type != "latent" or wanted != scaled_size(latent_size, 2**num_steps)
        parts = count_parts(codec, size, num_steps=num_steps, tile_size=tile_size, decodes=decodes)
        progress = Progress(callback_on_progress, parts)

        try:
            # 2. Complete the pair of latents and guide image
            if latents is None:
                assert guide is not None
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
                if decodes:
                    large = decode_to_scale(raw_latents, scale=2**num_steps, **decoding)
                    size_px = (wanted[0] * space.spatial_factor, wanted[1] * space.spatial_factor)
                    raw_latents = codec.encode(resize(large, size_px))
                dtype = self.vae.dtype if latents is None else latents.dtype
                images: Any = space.write(raw_latents, ndim=ndim).to(dtype)
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
        """(height, width) of the latents' image in pixels."""
        space = self.latent_space
        factor = space.spatial_factor
        if latents is not None:
            latent_size = space.check_layout(latents, height=height, width=width)
            size, count = (latent_size[0] * factor, latent_size[1] * factor), len(latents)
        elif guide is not None:
            if height is not None or width is not None:
                raise ValueError(
                    f"`height` and `width` must be left out without `latents`, got {height} and {width}. They are "
                    "those of the image; `scale` says how large the result is."
                )
            size, count = size_of(guide), len(guide)
            if size[0] % factor or size[1] % factor:
                raise ValueError(
                    f"`image` must have a height and width that are multiples of {factor}, got {size}. "
                    "UPLiFTSuperResolutionPipeline takes any size."
                )
        else:
            raise ValueError("Either `latents` or `image` must be given, got neither.")
        if latents is not None and guide is not None and guide.shape != (len(latents), 3, *size):
            raise ValueError(
                f"`image` must be {len(latents)} images of {size} (height, width) pixels for `latents` of "
                f"{tuple(latents.shape)}, got {len(guide)} of {tuple(guide.shape[2:])}."
            )
        check_generator(generator, count)
        return size
