"""UPLiFTSuperResolutionPipeline: an image in, a larger image out."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput

from uplift_diffusers.arguments import read_number
from uplift_diffusers.images.compression import consistency_for_denoise, denoise_for_quality
from uplift_diffusers.images.convert import (
    ImageInput,
    Picture,
    assemble_pil,
    fill_transparent,
    pad_to_multiple,
    read_pictures,
)
from uplift_diffusers.latent_space import Autoencoder, LatentCodec, LatentSpace
from uplift_diffusers.models.upsampler import UPLiFTModel
from uplift_diffusers.pipelines.upscale_stage import (
    Progress,
    TileSize,
    check_generator,
    count_parts,
    decode_strips_to_scale,
    read_tile_size,
    upscale_raw_latents,
)
from uplift_diffusers.scale import num_steps_for_scale, read_scale, scaled_size


class UPLiFTSuperResolutionPipeline(DiffusionPipeline):
    r"""
    Upscales images: encodes, upsamples the latents 2x per step with the image as guide, decodes.

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
        >>> from uplift_diffusers import UPLiFTSuperResolutionPipeline, embedded_bundle
        >>> from PIL import Image

        >>> pipe = UPLiFTSuperResolutionPipeline.from_pretrained(embedded_bundle())
        >>> pipe(image=Image.open("photo.jpg"), scale=4).images[0].save("larger.png")
        ```
    """

    config: Any  # diffusers' FrozenDict: its entries are attributes, too
    progress_bar: Callable[..., Any]  # a decorator of diffusers hides what it takes

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

    @property
    def latent_space(self) -> LatentSpace:
        """The latent space of the pipeline's current VAE."""
        return LatentSpace.of(self.vae, self.config.latent_space)

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        scale: float = 2,
        generator: torch.Generator | list[torch.Generator] | None = None,
        consistency: float = 1.0,
        denoise: float | str = "auto",
        tile_size: int | str | None = "auto",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_progress: Callable[[int, int], None] | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Upscale one or several images of any width and height.

        Args:
            image: a PIL image of any mode, an array (H, W[, C]) or (B, H, W, C), a tensor ([B,] C, H, W), or a list
                of these, whose sizes may differ. Floats are in [0, 1]. Alpha is kept.
            scale (`float`): from 1 to 16. Between powers of two, the image is upscaled to the next power of two and
                downsampled; at 1 it is returned unchanged.
            generator: one, used for all images in turn, or one for each image, which makes an image's result the
                same alone and in a list.
            consistency (`float`): from 0 to 1: the strength of a correction that makes the downsampled result match
                the image; see [`~uplift_diffusers.pipelines.upscale_stage.make_consistent`].
            denoise (`float` or `str`): from 0 (none) to 1: how much of the image's compression artefacts and noise to
                remove; needs an upsampler that was trained for it. `"auto"` derives it from the JPEG quality of PIL
                images that were opened from a JPEG file: 0 for a quality of 100, 1 for 30; every other input counts as
                clean. `consistency` is multiplied by 1 - 10 * denoise, at least 0.
            tile_size (`int`, *optional*): edge of the tiles in pixels of the image, which bounds memory and does not
                change the result; `"auto"` is 768, None disables tiling. The VAE has a separate
                `vae.enable_tiling()`, which is exact only for an [`AutoencoderLocal`].
            output_type (`str`): `"pil"`; `"np"`, float32 (B, H, W, C) in [0, 1]; or `"pt"`, float32 (B, C, H, W) in
                [0, 1]. Images of different sizes are returned as a list of arrays or tensors.
            return_dict (`bool`): return an [`ImagePipelineOutput`] instead of a tuple.
            callback_on_progress: called with the number of parts done and the total, after
                every 2x step of every tile and every decoded strip. An exception raised in it ends the call.
        Returns:
            `.images`, each of exactly round(scale * height) by round(scale * width) pixels. PIL images keep their mode
            if it is greyscale or RGB, with or without alpha, or 16-bit greyscale.
        Raises:
            TypeError, ValueError: an argument is invalid; raised before any work is done.
        """
        # 1. Check inputs
        codec = LatentCodec(self.vae, self.config.latent_space)
        codec.space.check_upsampler(self.upsampler)
        scale, num_steps = read_scale(scale), num_steps_for_scale(scale)
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"`output_type` must be 'pil', 'np' or 'pt', got {output_type!r}.")
        read_tile_size(tile_size)
        consistency = read_number("consistency", consistency, minimum=0, maximum=1)
        pictures = read_pictures(image)
        strengths = [self._read_denoise(denoise, picture) for picture in pictures]
        check_generator(generator, len(pictures), noun="images")
        generators = generator if isinstance(generator, list) else [generator] * len(pictures)
        parts = [
            count_parts(codec, _padded_size(picture, codec), num_steps=num_steps, tile_size=tile_size)
            for picture in pictures
        ]
        progress = Progress(callback_on_progress, sum(parts) if scale != 1 else 0)

        # 2. Upscale one image at a time: sizes differ, and a result must not depend on the other images
        images: Any = []
        try:
            for picture, strength, picture_generator in zip(
                self.progress_bar(pictures), strengths, generators, strict=True
            ):
                strips, alpha = [picture.color], picture.alpha
                size = scaled_size((picture.height, picture.width), scale)
                if scale != 1:
                    if alpha is not None:
                        picture = replace(picture, color=fill_transparent(picture.color, alpha))
                    strips = self._enlarge(
                        picture,
                        codec=codec,
                        scale=scale,
                        num_steps=num_steps,
                        generator=picture_generator,
                        consistency=consistency * consistency_for_denoise(strength),
                        denoise=strength,
                        tile_size=tile_size,
                        progress=progress,
                    )
                    if alpha is not None:
                        # Bilinear: any overshoot would draw lines along the edges.
                        alpha = F.interpolate(alpha[None], size=size, mode="bilinear")[0]
                if output_type == "pil":
                    images.append(assemble_pil(strips, size, alpha=alpha, mode=picture.mode))
                else:
                    images.append(Picture(torch.cat(list(strips), dim=1), alpha).to_tensor())
        finally:
            self.maybe_free_model_hooks()

        # 3. Convert to the requested output type
        if output_type == "np":
            images = [tensor.permute(1, 2, 0).numpy() for tensor in images]
        if output_type != "pil" and len({image.shape for image in images}) == 1:
            images = (np if output_type == "np" else torch).stack(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _read_denoise(self, denoise: float | str, picture: Picture) -> float:
        """The strength for one image."""
        has_channel = self.upsampler.config.denoise_channel
        if isinstance(denoise, str) and denoise == "auto":
            return denoise_for_quality(picture.jpeg_quality) if has_channel else 0.0
        strength = read_number("denoise", denoise, minimum=0, maximum=1)
        if strength and not has_channel:
            raise ValueError(
                f"`denoise` must be 0 or 'auto' for an upsampler without `denoise_channel`, got {denoise}. "
                "It was not trained to remove artefacts."
            )
        return strength

    def _enlarge(
        self,
        picture: Picture,
        *,
        codec: LatentCodec,
        scale: float,
        num_steps: int,
        generator: torch.Generator | None,
        consistency: float,
        denoise: float,
        tile_size: TileSize,
        progress: Progress,
    ) -> Iterator[torch.Tensor]:
        """The upscaled colour from top to bottom, in strips (3, rows, round(scale * width)) on the CPU."""
        guide = pad_to_multiple(picture.color[None].to(self._execution_device), codec.space.spatial_factor)
        raw_latents = upscale_raw_latents(
            codec.encode(guide),  # (1, C, h, w)
            image=guide,  # (1, 3, f*h, f*w)
            upsampler=self.upsampler,
            num_steps=num_steps,
            generator=generator,
            denoise=denoise,
            tile_size=tile_size,
            progress=progress,
        )  # (1, C, 2**n * h, 2**n * w)
        strips = decode_strips_to_scale(
            raw_latents,
            codec=codec,
            size=(picture.height, picture.width),
            num_steps=num_steps,
            scale=scale,
            image=guide[..., : picture.height, : picture.width],
            consistency=consistency,
            progress=progress,
        )  # (1, 3, rows, round(scale * width)) each
        return map(_first_on_cpu, strips)  # `map` holds no strip while the next one is decoded


def _padded_size(picture: Picture, codec: LatentCodec) -> tuple[int, int]:
    """(height, width) in whole latents, in pixels."""
    factor = codec.space.spatial_factor
    return -(-picture.height // factor) * factor, -(-picture.width // factor) * factor


def _first_on_cpu(strip: torch.Tensor) -> torch.Tensor:
    return strip[0].cpu()
