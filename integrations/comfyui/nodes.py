"""
The nodes.

LATENT samples are raw latents: ComfyUI scales them inside its samplers, so nothing is scaled here. Those of FLUX.2 are
the exception: its VAE packs and normalizes them itself, see `packed_space`. IMAGE is (B, H, W, C) float32 in [0, 1],
C 3 or 4. Inside these functions images are (B, C, H, W).
"""

import comfy.utils
import torch
import torch.nn.functional as F
from comfy_api.latest import ComfyExtension, io

from uplift_diffusers.arguments import read_number
from uplift_diffusers.images.convert import fill_transparent, missing_detail, pad_to_multiple, resize
from uplift_diffusers.latent_space import KNOWN_SPACES, PACKING, Flux2LatentSpace
from uplift_diffusers.pipelines.upscale_stage import Progress, read_tile_size, upscale_raw_latents
from uplift_diffusers.scale import MAX_SCALE, num_steps_for_scale, read_scale, scaled_size
from uplift_diffusers.tiling import split_into_tiles

from .models import DTYPES, EMBEDDED, PipelineVAE, Upsampler, list_upsamplers, load_upsampler

CATEGORY = "UPLiFT"
MAX_SEED = 2**64 - 1
AUTOMATIC = "automatic"
SPACES_OF_FORMATS = {
    "SD15": "sd15-vae",
    "SDXL": "sdxl-vae",
    "SDXL_Playground_2_5": "sdxl-vae",
    "SD3": "sd3-vae",
    "Flux": "flux-vae",
    "Flux2": "flux2-vae",
    "Wan21": "wan21-vae",
}
"""Latent spaces by the class of ComfyUI's `latent_format`. Z-Image has that of FLUX.1, Qwen-Image that of Wan 2.1."""

UpscaleModel = io.Custom("LATENT_UPSCALE_MODEL")


def settings_inputs() -> list[io.Input]:
    """The inputs common to both upscaling nodes."""
    return [
        io.Float.Input(
            "scale",
            default=2.0,
            min=1.0,
            max=float(MAX_SCALE),
            step=0.05,
            tooltip="Between powers of two, the result is upscaled to the next power of two and downsampled.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=MAX_SEED,
            control_after_generate=True,
            tooltip="Seed of the first image; the next ones count up from it. The embedded bundle uses no noise.",
        ),
        io.Int.Input(
            "tile_size",
            default=768,
            min=64,
            max=16384,
            step=8,
            tooltip="Edge of a tile in pixels of the image. Bounds memory; does not change the result.",
        ),
        io.Combo.Input(
            "latent_space",
            options=[AUTOMATIC, *KNOWN_SPACES],
            default=AUTOMATIC,
            tooltip="The model that the latents belong to. VAEs look alike: choose, or connect `model`.",
        ),
    ]


class LoadUPLiFT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadUPLiFT",
            display_name="Load UPLiFT",
            category=CATEGORY,
            description="Loads an upsampler for latents: the embedded bundle, which needs no download; a folder or a "
            "published checkpoint in models/latent_upscale_models; or a published one from the hub.",
            inputs=[
                io.Combo.Input("name", options=list_upsamplers(), default=EMBEDDED),
                io.Combo.Input("dtype", options=list(DTYPES), default="float32"),
            ],
            outputs=[UpscaleModel.Output(display_name="upscale_model")],
        )

    @classmethod
    def execute(cls, name: str, dtype: str) -> io.NodeOutput:
        check_choice("name", name, list_upsamplers())
        check_choice("dtype", dtype, list(DTYPES))
        return io.NodeOutput(load_upsampler(name, DTYPES[dtype]))


class EmbeddedVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UPLiFTEmbeddedVAE",
            display_name="Embedded VAE (UPLiFT)",
            category=CATEGORY,
            description="The VAE of the embedded bundle. Encodes images to latents for its upsampler.",
            inputs=[],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_upsampler(EMBEDDED, torch.float32).vae)


class UpscaleImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UPLiFTUpscaleImage",
            display_name="Upscale Image (UPLiFT)",
            category=CATEGORY,
            description="Encodes images of any size, upsamples their latents, and decodes. Alpha is kept.",
            inputs=[
                UpscaleModel.Input("upscale_model"),
                io.Image.Input("image"),
                *settings_inputs(),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Not needed if the upsampler includes one, as the embedded bundle does.",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="The model of the VAE, which determines the latent space."
                ),
                io.Float.Input(
                    "consistency",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="How closely the downsampled result matches the image. Lower it for compressed images.",
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(
        cls, upscale_model, image, scale, seed, tile_size, latent_space, vae=None, model=None, consistency=1.0
    ) -> io.NodeOutput:
        # 1. Check inputs
        upsampler = check_upsampler(upscale_model)
        num_steps, scale = num_steps_for_scale(scale), read_scale(scale)
        read_tile_size(tile_size)
        consistency = read_number("consistency", consistency, minimum=0, maximum=1)
        vae = upsampler.vae if vae is None else vae
        if vae is None:
            raise ValueError("`vae` must be connected: the upsampler was saved without one.")
        check_space(upsampler, vae, latent_space, model)
        image = image.movedim(-1, 1)  # (B, C, H, W)
        if image.shape[1] not in (3, 4):
            raise ValueError(f"`image` must have 3 channels, or 4 with alpha, got {image.shape[1]}.")
        if num_steps == 0:
            return io.NodeOutput(image.movedim(1, -1))
        color, alpha = image[:, :3], image[:, 3:]
        if alpha.shape[1]:
            color = torch.stack([fill_transparent(*pair) for pair in zip(color, alpha, strict=True)])
        made, wanted = (scaled_size(tuple(image.shape[2:]), factor) for factor in (2**num_steps, scale))

        # 2. Encode
        guide = pad_to_multiple(color, vae.spacial_compression_decode())
        raw_latents = encode(vae, guide)  # (B, c, h, w)

        # 3. Upsample
        progress = start_progress(upsampler, raw_latents, num_steps, tile_size, num_decoded=len(image))
        raw_latents = upsample(upsampler, raw_latents, guide, num_steps, seed, tile_size, progress)

        # 4. Decode, cut what was padded, reduce to the exact size
        result = image.new_empty(len(image), image.shape[1], *wanted)
        for index, latents in enumerate(raw_latents.split(1)):
            enlarged = decode(vae, latents)[:, :3, : made[0], : made[1]]
            small = color[index : index + 1].to(enlarged)
            enlarged = (enlarged + consistency * missing_detail(small, enlarged)).clamp_(
                0, 1
            )  # as the pipeline has it
            result[index, :3] = resize(enlarged, wanted)[0]
            progress.advance()
        if alpha.shape[1]:
            result[:, 3:] = F.interpolate(alpha, size=wanted, mode="bilinear")
        return io.NodeOutput(result.movedim(1, -1))


class UpscaleLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UPLiFTUpscaleLatent",
            display_name="Upscale Latent (UPLiFT)",
            category=CATEGORY,
            description="Upsamples latents with their image as guide. At a scale that is not a power of two, they are "
            "upsampled to the next one, decoded, downsampled in pixels and encoded again.",
            inputs=[
                UpscaleModel.Input("upscale_model"),
                io.Latent.Input("samples"),
                io.Vae.Input("vae"),
                *settings_inputs(),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The image of the latents, which guides the upsampling; by default decoded from them.",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="The model of the latents, which determines their space."
                ),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(
        cls, upscale_model, samples, vae, scale, seed, tile_size, latent_space, image=None, model=None
    ) -> io.NodeOutput:
        # 1. Check inputs
        upsampler = check_upsampler(upscale_model)
        num_steps, scale = num_steps_for_scale(scale), read_scale(scale)
        read_tile_size(tile_size)
        check_space(upsampler, vae, latent_space, model)
        raw_latents = read_samples(samples["samples"], upsampler, vae)  # (B, c, h, w)
        guide = None if image is None else read_guide(image, raw_latents, upsampler)
        if num_steps == 0:
            return io.NodeOutput(samples.copy())
        factor = vae.spacial_compression_decode()
        wanted = scaled_size(tuple(samples["samples"].shape[-2:]), scale)
        is_exact = scale == 2**num_steps

        # 2. Complete the pair of latents and guide image
        if guide is None:
            guide = decode(vae, raw_latents)[:, :3]

        # 3. Upsample
        num_decoded = 0 if is_exact else len(raw_latents)
        progress = start_progress(upsampler, raw_latents, num_steps, tile_size, num_decoded=num_decoded)
        raw_latents = upsample(upsampler, raw_latents, guide, num_steps, seed, tile_size, progress)

        # 4. Latents exist at powers of two, and interpolating them destroys them: reduce their image
        if not is_exact:
            reduced = []
            for latents in raw_latents.split(1):
                large = decode(vae, latents)
                reduced.append(encode(vae, resize(large, (wanted[0] * factor, wanted[1] * factor))))
                progress.advance()
            raw_latents = torch.cat(reduced)
        return io.NodeOutput(replace_samples(samples, raw_latents, vae))


def upsample(
    upsampler: Upsampler,
    raw_latents: torch.Tensor,
    guide: torch.Tensor,
    num_steps: int,
    seed: int,
    tile_size: int,
    progress: Progress,
) -> torch.Tensor:
    """(B, c, h, w) and their images (B, 3, H, W) -> (B, c, h * 2**num_steps, w * 2**num_steps), one by one."""
    device = upsampler.move_to_device(min(tile_size**2, guide.shape[2] * guide.shape[3]), num_steps)
    upsampled = [
        upscale_raw_latents(
            latents.to(device),
            image=image,
            upsampler=upsampler.model,
            num_steps=num_steps,
            generator=torch.Generator().manual_seed((seed + index) % (MAX_SEED + 1)),
            tile_size=tile_size,
            progress=progress,
        ).to(raw_latents)
        for index, (latents, image) in enumerate(zip(raw_latents.split(1), guide.split(1), strict=True))
    ]
    return torch.cat(upsampled)


def start_progress(
    upsampler: Upsampler, raw_latents: torch.Tensor, num_steps: int, tile_size: int, *, num_decoded: int
) -> Progress:
    """The node's progress bar: a part for every 2x step of every tile, and for every decoded image."""
    edge = tile_size // upsampler.model.config.spatial_factor
    num_tiles = sum(map(len, split_into_tiles(tuple(raw_latents.shape[2:]), edge)))
    bar = comfy.utils.ProgressBar(len(raw_latents) * num_tiles * num_steps + num_decoded)
    return Progress(bar.update_absolute, bar.total)


def packed_space(vae) -> Flux2LatentSpace | None:
    """
    The latent space of a VAE that packs and normalizes its latents itself; None for all others.

    ComfyUI's VAE of FLUX.2 does: its latents are (B, 4C, h/2, w/2), a position for every 2x2 patch, normalized by the
    statistics of a batch norm that it holds.
    """
    norm = getattr(vae.first_stage_model, "bn", None)
    if norm is None:
        return None
    deviation = (norm.running_var.float() + norm.eps).sqrt()
    return Flux2LatentSpace(
        "flux2-vae",
        channels=vae.latent_channels // PACKING**2,
        spatial_factor=vae.spacial_compression_decode() // PACKING,
        scaling_factor=1.0,
        patch_mean=tuple(norm.running_mean.tolist()),
        patch_std=tuple(deviation.tolist()),
    )


def unpack(latents: torch.Tensor, vae) -> torch.Tensor:
    """A VAE's own latents -> raw latents (B, c, h, w)."""
    latents = latents.squeeze(2) if latents.ndim == 5 else latents
    space = packed_space(vae)
    return latents if space is None else space.denormalize(F.pixel_shuffle(latents, PACKING))


def pack(raw_latents: torch.Tensor, vae) -> torch.Tensor:
    """Raw latents (B, c, h, w) -> the VAE's own, without a time axis."""
    space = packed_space(vae)
    return raw_latents if space is None else F.pixel_unshuffle(space.normalize(raw_latents), PACKING)


def encode(vae, image: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> raw latents (B, c, h, w)."""
    # One by one: video VAEs take a batch for the frames of a video, and give (B, c, 1, h, w) for single images.
    return unpack(torch.cat([vae.encode(pixels.movedim(1, -1)) for pixels in image.split(1)]), vae)


def decode(vae, raw_latents: torch.Tensor) -> torch.Tensor:
    """Raw latents (B, c, h, w) -> (B, C, H, W); some VAEs give four channels."""
    latents = pack(raw_latents, vae)
    pixels = vae.decode(latents.unsqueeze(2) if vae.latent_dim == 3 else latents)
    return pixels.reshape(-1, *pixels.shape[-3:]).movedim(-1, 1)


def read_samples(samples: torch.Tensor, upsampler: Upsampler, vae) -> torch.Tensor:
    """The samples of a LATENT as raw latents (B, c, h, w). Raises ValueError for a video's or another model's."""
    config = upsampler.model.config
    channels = config.latent_channels * (1 if packed_space(vae) is None else PACKING**2)
    if samples.ndim == 5 and samples.shape[2] != 1:
        raise ValueError(f"`samples` must be latents of images, got a video's, {tuple(samples.shape)}.")
    if samples.ndim not in (4, 5) or samples.shape[1] != channels:
        raise ValueError(
            f"`samples` must have {channels} channels, as the latents that the upsampler was trained for "
            f"({config.latent_space!r}), got {tuple(samples.shape)}. Load an upsampler for your model's latents."
        )
    if not torch.isfinite(samples).all():
        raise ValueError("`samples` must be finite, got NaN or infinity. The model before may have overflowed.")
    return unpack(samples, vae)


def read_guide(image: torch.Tensor, raw_latents: torch.Tensor, upsampler: Upsampler) -> torch.Tensor:
    """The guide as (B, 3, H, W). Raises ValueError unless it is the image of the latents by its size."""
    factor = upsampler.model.config.spatial_factor
    wanted = (len(raw_latents), raw_latents.shape[2] * factor, raw_latents.shape[3] * factor)
    if tuple(image.shape[:3]) != wanted or image.shape[3] not in (3, 4):
        raise ValueError(
            f"`image` must be the image of `samples`, {wanted[0]} of {wanted[1:]} (height, width) pixels, got "
            f"{len(image)} of {tuple(image.shape[1:3])}. Leave it out to have it decoded."
        )
    return image[..., :3].movedim(-1, 1)


def replace_samples(latent: dict, raw_latents: torch.Tensor, vae) -> dict:
    """A copy of `latent` with larger samples, with a time axis if it had one, and its noise mask resized alike."""
    samples, large = latent["samples"], pack(raw_latents, vae)
    result = latent.copy()  # other nodes may hold the same one
    result["samples"] = large.unsqueeze(2) if samples.ndim == 5 else large
    mask = latent.get("noise_mask")
    if mask is not None:
        ratios = [after / before for after, before in zip(large.shape[2:], samples.shape[-2:])]
        size = tuple(round(length * ratio) for length, ratio in zip(mask.shape[-2:], ratios))
        grown = F.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]), size=size, mode="bilinear")
        result["noise_mask"] = grown.reshape(*mask.shape[:-2], *size)
    return result


def check_upsampler(upscale_model: object) -> Upsampler:
    """`upscale_model`. Raises TypeError if another node than *Load UPLiFT* has made it."""
    if not isinstance(upscale_model, Upsampler):
        raise TypeError(f"`upscale_model` must come from Load UPLiFT, got {type(upscale_model).__name__}.")
    return upscale_model


def check_space(upsampler: Upsampler, vae, choice: str, model) -> None:
    """
    Raise ValueError unless the VAE's latents are those that the upsampler was trained for.

    The VAEs of SD1.5 and SDXL, and those of SD3 and FLUX.1, have the same layers, so the VAE alone does not tell.

    Args:
        vae: a `PipelineVAE` or a `comfy.sd.VAE`.
        choice: "automatic" or the name of a latent space.
        model: a `ModelPatcher`, or None.
    """
    check_choice("latent_space", choice, [AUTOMATIC, *KNOWN_SPACES])
    config = upsampler.model.config
    packed = packed_space(vae)
    shape = (vae.latent_channels, vae.spacial_compression_decode()) if packed is None else packed.shape
    wanted = (config.latent_channels, config.spatial_factor)
    if shape != wanted:
        raise ValueError(
            f"`vae` must make the latents that the upsampler was trained for, {config.latent_space!r} ({wanted[0]} "
            f"channels, {wanted[1]} pixels a latent), got {shape[0]} channels and {shape[1]} pixels a latent."
        )
    names = {}
    if isinstance(vae, PipelineVAE):
        names["vae"] = vae.codec.space.name
    elif packed is not None:
        names["vae"] = packed.name
    if choice != AUTOMATIC:
        names["latent_space"] = choice
    if model is not None:
        latent_format = type(model.get_model_object("latent_format")).__name__
        names["model"] = SPACES_OF_FORMATS.get(latent_format, latent_format)
    if not names:
        raise ValueError(
            "`latent_space` must be chosen, or `model` connected: VAEs of different models look alike, and the "
            f"upsampler was trained for {config.latent_space!r} only."
        )
    for source, name in names.items():
        if name != config.latent_space:
            raise ValueError(
                f"`{source}` must be of the latents that the upsampler was trained for, {config.latent_space!r}, got "
                f"{name!r}."
            )


def check_choice(name: str, value: str, options: list[str]) -> None:
    """Raise ValueError unless `value` is one of `options`, which ComfyUI itself does not check in every version."""
    if value not in options:
        raise ValueError(f"`{name}` must be one of {options}, got {value!r}.")


class UPLiFTExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadUPLiFT, UpscaleImage, UpscaleLatent, EmbeddedVAE]


async def comfy_entrypoint() -> UPLiFTExtension:
    return UPLiFTExtension()
