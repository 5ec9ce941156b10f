"""Wrappers that let ComfyUI's memory manager load, move and unload diffusers upsamplers and VAEs."""

from pathlib import Path

import comfy.model_management as memory
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from diffusers import ModelMixin

from uplift_diffusers import AutoencoderLocal, UPLiFTModel, UPLiFTSuperResolutionPipeline, embedded_bundle
from uplift_diffusers.latent_space import LatentCodec
from uplift_diffusers.models.conversion import PUBLISHED

EMBEDDED = "embedded bundle"
PUBLISHED_FOR_IMAGES = ("UPLiFT-upsampler/uplift_sd1.5vae",)
"""Repositories on the hub; the other published ones are for vision-transformer features."""

FOLDER = "latent_upscale_models"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Older ComfyUI versions do not have this folder; in newer ones this changes nothing.
folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


class PlainModule(torch.nn.Module):
    """Holds a diffusers model. `ModelPatcher` assigns `device` to managed models, which `ModelMixin` forbids."""

    def __init__(self, inner: ModelMixin):
        super().__init__()
        self.inner = inner


def manage(model: ModelMixin, load_device: torch.device, offload_device: torch.device) -> ModelPatcher:
    """Hand `model` to ComfyUI's memory manager. It then also stops when the user cancels."""
    for module in model.modules():
        # A tile can take many seconds on a CPU; a layer takes well below one.
        module.register_forward_pre_hook(_stop_if_cancelled)
    return ModelPatcher(PlainModule(model), load_device=load_device, offload_device=offload_device)


def _stop_if_cancelled(_module: torch.nn.Module, _inputs: tuple) -> None:
    memory.throw_exception_if_processing_interrupted()


def move_to_device(patcher: ModelPatcher, memory_required: float) -> torch.device:
    """
    Load a managed model completely, after unloading other models if memory is short.

    Args:
        memory_required: bytes needed in addition to the weights.
    Returns:
        The device.
    """
    memory.load_models_gpu([patcher], memory_required=memory_required, force_full_load=True)
    patcher.model.to(patcher.load_device)  # under --novram only a part has been moved
    return patcher.load_device


class Upsampler:
    """
    The output of *Load UPLiFT*.

    Args:
        model: the upsampler, in evaluation mode.
        vae: the VAE that it was saved with, or None.
    """

    def __init__(self, model: UPLiFTModel, vae: "PipelineVAE | None" = None):
        self.patcher = manage(model, memory.get_torch_device(), memory.unet_offload_device())
        self.model, self.vae = model, vae

    def get_ram_usage(self) -> int:
        """Bytes; ComfyUI asks it of what it caches."""
        return self.patcher.model_size()

    def move_to_device(self, pixels: int, num_steps: int) -> torch.device:
        """Load it, with room for a tile of `pixels` pixels of the image and its `num_steps` 2x steps."""
        config = self.model.config
        # Channels for each pixel of the image, of the widest layer of the encoder and of the last step.
        stem = config.encoder_stem_channels if config.encoder_stem_layers else 0
        encoder = max(stem, max(config.encoder_block_out_channels) / config.encoder_patch_size**2)
        decoder = max(config.decoder_channels, config.refiner_channels) * 4**num_steps / config.spatial_factor**2
        # How many such activations are alive at once was measured on a CPU, with the bundle and the published model.
        activations = pixels * max(4 * encoder, 10 * decoder)
        return move_to_device(self.patcher, activations * self.model.dtype.itemsize)


class PipelineVAE:
    """
    The VAE of a diffusers pipeline, with the parts of `comfy.sd.VAE` that ComfyUI's nodes use.

    An AutoencoderLocal, as in the embedded bundle, always uses exact tiles, so nodes for tiled
    encoding and decoding give the same result as the plain ones.
    """

    latent_dim = 2
    output_channels = 3

    def __init__(self, codec: LatentCodec):
        self.codec = codec
        self.latent_channels = codec.space.channels
        self.downscale_ratio = self.upscale_ratio = codec.space.spatial_factor
        self.patcher = manage(codec.vae, memory.vae_device(), memory.vae_offload_device())
        self.first_stage_model = self.patcher.model

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) in [0, 1], of which the first three channels count -> raw latents (B, c, h, w)."""
        factor = self.downscale_ratio
        height, width = (length // factor * factor for length in pixel_samples.shape[1:3])
        if not height or not width:
            size = tuple(pixel_samples.shape[1:3])
            raise ValueError(f"`pixels` must be at least {factor} x {factor}, got {size} (height, width).")
        # As ComfyUI's own VAEs: what is too much for whole latents is cut off on all sides.
        top, left = (pixel_samples.shape[1] - height) // 2, (pixel_samples.shape[2] - width) // 2
        pixels = pixel_samples[:, top : top + height, left : left + width, :3].movedim(-1, 1)
        device = self._move_to_device(height * width)
        return self.codec.encode(pixels.to(device)).to(memory.intermediate_device(), torch.float32)

    def decode(self, samples_in: torch.Tensor) -> torch.Tensor:
        """Raw latents (B, c, h, w) -> (B, H, W, 3) in [0, 1]."""
        device = self._move_to_device(samples_in.shape[2] * samples_in.shape[3] * self.upscale_ratio**2)
        pixels = self.codec.decode(samples_in.to(device)).to(memory.intermediate_device())
        return pixels.movedim(1, -1)

    def encode_tiled(
        self, pixel_samples: torch.Tensor, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None
    ) -> torch.Tensor:
        return self.encode(pixel_samples)

    def decode_tiled(
        self, samples: torch.Tensor, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None
    ) -> torch.Tensor:
        return self.decode(samples)

    def spacial_compression_encode(self) -> int:
        return self.downscale_ratio

    def spacial_compression_decode(self) -> int:
        return self.upscale_ratio

    def temporal_compression_decode(self) -> None:
        return None

    def throw_exception_if_invalid(self) -> None:
        return None

    def get_sd(self) -> dict[str, torch.Tensor]:
        return self.codec.vae.state_dict()

    def get_ram_usage(self) -> int:
        return self.patcher.model_size()

    def _move_to_device(self, pixels: int) -> torch.device:
        vae = self.codec.vae
        # Bytes for a pixel: of an AutoencoderKL as ComfyUI reckons with them, of an AutoencoderLocal by its widths.
        if isinstance(vae, AutoencoderLocal):
            return move_to_device(self.patcher, 4 * max(vae.config.block_out_channels) * min(pixels, 1024**2))
        return move_to_device(self.patcher, 2178 * pixels * vae.dtype.itemsize)


def list_upsamplers() -> list[str]:
    """The names for `load_upsampler`: the bundle, files in `models/latent_upscale_models`, and repositories."""
    found = {path.name for root in folder_paths.get_folder_paths(FOLDER) for path in _list_saved(Path(root))}
    return [EMBEDDED, *sorted(found), *PUBLISHED_FOR_IMAGES]


def load_upsampler(name: str, dtype: torch.dtype) -> Upsampler:
    """
    Load an upsampler, and the VAE that it was saved with.

    Args:
        name: one of `list_upsamplers`.
        dtype: dtype of the weights.
    Raises:
        FileNotFoundError: there is no upsampler of that name.
        OSError, ValueError: as `UPLiFTModel.from_pretrained`.
    """
    # Nodes run in inference mode, and weights that are made there can never leave it.
    with torch.inference_mode(False):
        if name in PUBLISHED_FOR_IMAGES:
            return Upsampler(UPLiFTModel.from_pretrained(name).to(dtype))
        path = embedded_bundle() if name == EMBEDDED else _find_saved(name)
        if path.is_file():
            return Upsampler(UPLiFTModel.from_single_file(path).to(dtype))
        if not (path / "model_index.json").is_file():
            return Upsampler(UPLiFTModel.from_pretrained(path).to(dtype))
        pipe = UPLiFTSuperResolutionPipeline.from_pretrained(path).to(dtype)
        return Upsampler(pipe.upsampler, PipelineVAE(LatentCodec(pipe.vae, pipe.latent_space)))


def _list_saved(root: Path) -> list[Path]:
    """Folders written by `save_pretrained`, and published checkpoints with their original names."""
    published = {PUBLISHED[name].filename for name in PUBLISHED_FOR_IMAGES}
    return [
        path
        for path in (root.iterdir() if root.is_dir() else [])
        if path.name in published or (path / "model_index.json").is_file() or (path / "config.json").is_file()
    ]


def _find_saved(name: str) -> Path:
    roots = folder_paths.get_folder_paths(FOLDER)
    for path in (path for root in roots for path in _list_saved(Path(root))):
        if path.name == name:
            return path
    raise FileNotFoundError(f"`{name}` is not in {' or '.join(roots)}. Put the saved upsampler's folder there.")
