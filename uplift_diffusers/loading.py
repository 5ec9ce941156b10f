"""Loading what a person names: a VAE, or a pipeline that enlarges."""

import os

import torch
from diffusers import AutoModel

from uplift_diffusers.latent_space import Autoencoder
from uplift_diffusers.models.autoencoder_local import AutoencoderLocal


def load_vae(path: str | os.PathLike, *, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """
    Load a VAE of any class that `LatentSpace` knows, from a local folder or the hub.

    Args:
        path: a VAE, or a diffusers pipeline, whose folder `vae` is then loaded.
        dtype: of the weights.
    Raises:
        OSError: there is neither.
    """
    try:
        config, subfolder = AutoencoderLocal.load_config(path), None
    except OSError:
        config, subfolder = AutoencoderLocal.load_config(path, subfolder="vae"), "vae"
    kind = AutoencoderLocal if config.get("_class_name") == AutoencoderLocal.__name__ else AutoModel
    return kind.from_pretrained(path, subfolder=subfolder, dtype=dtype)
