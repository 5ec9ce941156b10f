"""Loading a VAE, an upscaling or a feature pipeline by folder or hub name, with one-sentence errors."""

import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import ModelMixin
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from torch.nn.modules.module import register_module_module_registration_hook

from uplift_diffusers.latent_space import Autoencoder
from uplift_diffusers.models.autoencoder_local import AutoencoderLocal
from uplift_diffusers.models.upsampler import UPLiFTModel
from uplift_diffusers.pipelines.super_resolution import UPLiFTSuperResolutionPipeline
from uplift_diffusers.wording import reason

# transformers is imported where a backbone is loaded.
if TYPE_CHECKING:
    from uplift_diffusers.pipelines.features import UPLiFTFeaturePipeline

MAX_CONFIG_NUMBER = 1_000_000
"""Largest number accepted in a network's configuration; larger ones are damage or an attack."""

MAX_CONFIG_BYTES = 2**24
"""Largest JSON file accepted; larger ones take seconds to parse."""

MAX_LAYERS = 20_000
"""Most modules accepted in a network. More would take minutes to construct, before the weights are checked."""


class LoadingError(OSError):
    """A model cannot be loaded. The message is one sentence that names it and says why."""


def load_pipeline(
    model: str | os.PathLike,
    *,
    vae: str | os.PathLike | None = None,
    latent_space: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> UPLiFTSuperResolutionPipeline:
    """
    Load an upscaling pipeline from local folders or the hub. Weights are read from safetensors only.

    Args:
        model: a saved UPLiFTSuperResolutionPipeline, or a UPLiFTModel, which needs `vae` too.
        vae: a VAE, or a pipeline with a folder `vae`, instead of the model's own.
        latent_space: the latent space that the VAE belongs to, if its configuration does not determine it.
        dtype: dtype of the weights.
    Returns:
        The pipeline, on the CPU.
    Raises:
        LoadingError: a part is missing, damaged, of another kind or cannot be reached.
    """
    index = read_config(model, "model_index.json")
    subfolder = None
    if index is None and vae is None:
        raise LoadingError(f"{model} is not a pipeline. If it is a UPLiFTModel, name a --vae.")
    if index is not None:
        subfolder = "upsampler"
        for part in ("upsampler",) if vae is not None else ("upsampler", "vae"):
            _check_part(model, index, part, kind="UPLiFTSuperResolutionPipeline")
        latent_space = index.get("latent_space") if latent_space is None else latent_space
    upsampler = load_upsampler(model, subfolder=subfolder, dtype=dtype)
    autoencoder = load_vae(model if vae is None else vae, dtype=dtype)
    try:
        return UPLiFTSuperResolutionPipeline(vae=autoencoder, upsampler=upsampler, latent_space=latent_space)
    except (TypeError, ValueError) as error:
        raise LoadingError(f"{model} cannot be used: {reason(error)}") from error


def load_feature_pipeline(
    model: str | os.PathLike | None = None,
    *,
    backbone: str | os.PathLike | None = None,
    upsampler: str | os.PathLike | None = None,
    feature_space: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> "UPLiFTFeaturePipeline":
    """
    Load a feature pipeline from local folders or the hub. Weights are read from safetensors only.

    Args:
        model: a saved UPLiFTFeaturePipeline; if None, `backbone` and `upsampler` are loaded instead.
        backbone: a vision transformer supported by [`FeatureBackbone`].
        upsampler: a UPLiFTModel for its features.
        feature_space: name of the feature space, if the backbone's configuration does not determine it.
        dtype: dtype of the weights.
    Returns:
        The pipeline, on the CPU.
    Raises:
        LoadingError: a part is missing, damaged, of another class, or cannot be reached.
        ImportError: transformers is not installed.
    """
    from uplift_diffusers.pipelines.features import UPLiFTFeaturePipeline

    places: dict[str, tuple[Any, str | None]] = {"backbone": (backbone, None), "upsampler": (upsampler, None)}
    normalization = None
    if model is not None:
        index = read_config(model, "model_index.json")
        if index is None:
            raise LoadingError(f"{model} is not a pipeline.")
        for part in places:
            _check_part(model, index, part, kind="UPLiFTFeaturePipeline")
        places = {part: (model, part) for part in places}
        feature_space = index.get("feature_space") if feature_space is None else feature_space
        normalization = index.get("image_normalization")
    network = _load_backbone(*places["backbone"], dtype)
    place, subfolder = places["upsampler"]
    trained = load_upsampler(place, subfolder=subfolder, dtype=dtype)
    with _errors_told(place):
        return UPLiFTFeaturePipeline(network, trained, feature_space=feature_space, image_normalization=normalization)


def load_vae(path: str | os.PathLike, *, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """
    Load a VAE of any class of diffusers or of this package, from a local folder or the hub.

    Args:
        path: a VAE, or a diffusers pipeline, whose folder `vae` is then loaded.
        dtype: dtype of the weights.
    Raises:
        LoadingError: there is no VAE, it is damaged, or it cannot be reached.
    """
    config, subfolder = read_config(path, "config.json"), None
    if config is None:
        config, subfolder = read_config(path, "config.json", "vae"), "vae"
    if config is None:
        raise LoadingError(f"{path} must be a VAE or hold one in a folder vae, got neither.")
    name = config.get("_class_name")
    kind = AutoencoderLocal if name == AutoencoderLocal.__name__ else None
    if kind is None and isinstance(name, str) and name.startswith("Autoencoder"):
        kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise LoadingError(f"{path} must be a VAE, got the class {name!r}.")
    return _load_model(kind, path, subfolder, config, dtype)


def load_upsampler(
    path: str | os.PathLike, *, subfolder: str | None = None, dtype: torch.dtype = torch.float32
) -> UPLiFTModel:
    """
    Load an upsampler, from a local folder or the hub.

    Args:
        path: a UPLiFTModel, or a checkpoint published by the authors of the paper.
        subfolder: subfolder of the model in it.
        dtype: dtype of the weights.
    Raises:
        LoadingError: there is no model, it is damaged, or it cannot be reached.
    """
    config = read_config(path, "config.json", subfolder)
    if config is not None:
        if config.get("_class_name", UPLiFTModel.__name__) != UPLiFTModel.__name__:
            raise LoadingError(f"{path} must be a UPLiFTModel, got the class {config['_class_name']!r}.")
        return _load_model(UPLiFTModel, path, subfolder, config, dtype)
    if subfolder is not None:
        raise LoadingError(f"{path} must have a file {subfolder}/config.json, got none.")
    with _errors_told(path):  # a checkpoint that the authors published, which has no configuration
        return UPLiFTModel.from_pretrained(path, dtype=dtype)


def _load_model(
    kind: type[ModelMixin], path: str | os.PathLike, subfolder: str | None, config: dict, dtype: torch.dtype
) -> Any:
    place = _check_files(path, subfolder, config)
    where = {} if subfolder is None else {"subfolder": subfolder}
    with _errors_told(place), _layers_counted():
        loaded: Any = kind.from_pretrained(path, use_safetensors=True, output_loading_info=True, **where)
        model, told = loaded
        for keys, fault in (("missing_keys", "lack"), ("unexpected_keys", "have, and the network has not,")):
            if names := sorted(told[keys]):
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ValueError(f"its weights {fault} the tensor {names[0]}{more}.")
        return model.to(dtype)


def _load_backbone(path: str | os.PathLike, subfolder: str | None, dtype: torch.dtype) -> Any:
    from transformers.utils import logging as transformers_logging

    from uplift_diffusers.feature_space import FeatureBackbone

    config = read_config(path, "config.json", subfolder)
    if config is None:
        raise LoadingError(f"{path} must have a file {subfolder + '/' if subfolder else ''}config.json, got none.")
    place = _check_files(path, subfolder, config)
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with _errors_told(place), _layers_counted():
            return FeatureBackbone.from_pretrained(path, subfolder=subfolder or "", dtype=dtype).model
    finally:
        if shows_bars:
            transformers_logging.enable_progress_bar()


def _check_files(path: str | os.PathLike, subfolder: str | None, config: dict) -> str:
    """The name of a network's folder. Raises LoadingError if its configuration or its weights must not be loaded."""
    place = f"{path}/{subfolder}" if subfolder else f"{path}"
    if (too_large := _largest_number(config)) > MAX_CONFIG_NUMBER:
        raise LoadingError(f"{place} cannot be loaded: its configuration has the implausible number {too_large:.6g}.")
    folder = Path(path, subfolder or "")
    pickles = [file.name for file in folder.glob("*") if file.suffix in (".bin", ".ckpt", ".pt", ".pth")]
    if pickles and not any(folder.glob("*.safetensors*")):
        raise LoadingError(
            f"{place} has no safetensors, got {pickles[0]}, a pickle, which can run code and is never loaded. "
            "Save it with safe_serialization=True."
        )
    return place


def read_config(path: str | os.PathLike, name: str, subfolder: str | None = None) -> dict | None:
    """The JSON object in a file of a folder or repository; None if there is no such file."""
    if not os.path.exists(path):
        file = _fetch(path, name, subfolder)
    elif os.path.isdir(path):
        file = Path(path, subfolder or "", name)
    elif Path(path).suffix == ".safetensors":
        return None
    else:
        raise LoadingError(f"{path} must be a folder or a name on the hub, got a file.")
    if file is None or not file.is_file():
        return None
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("it is too long")
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadingError(f"{path} cannot be loaded: its {name} is damaged ({reason(error).rstrip('.')}).") from error
    if not isinstance(content, dict):
        raise LoadingError(f"{path} cannot be loaded: its {name} must hold an object, got {type(content).__name__}.")
    return content


def _fetch(repository: str | os.PathLike, name: str, subfolder: str | None) -> Path | None:
    """A file of a repository, downloaded if needed; None if the repository has no such file."""
    if str(repository).count("/") != 1:
        raise LoadingError(f"{repository} must be a folder or a name on the hub (owner/name), got neither.")
    try:
        return Path(hf_hub_download(str(repository), name, subfolder=subfolder))
    except Exception as error:
        if isinstance(error, LocalEntryNotFoundError):  # offline: what the cache holds may know that there is none
            known = try_to_load_from_cache(str(repository), f"{subfolder}/{name}" if subfolder else name)
            if known is not None and not isinstance(known, str):
                return None
        elif isinstance(error, EntryNotFoundError):
            return None
        raise LoadingError(f"{repository} cannot be loaded: {_why(error)}") from error


@contextmanager
def _errors_told(place: str | os.PathLike) -> Iterator[None]:
    """Turn every exception in the block into a LoadingError, and silence the loggers of the libraries."""
    levels = {name: logging.getLogger(name).level for name in ("diffusers", "transformers")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:  # what a loader raises depends on the damage
        raise LoadingError(f"{place} cannot be loaded: {_why(error)}") from error
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _layers_counted() -> Iterator[None]:
    """Raise ValueError if this thread creates more than `MAX_LAYERS` modules in the block."""
    thread, count = threading.get_ident(), 0

    def on_module(*_) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > MAX_LAYERS:
                raise ValueError(f"its configuration asks for more than {MAX_LAYERS} layers.")

    hook = register_module_module_registration_hook(on_module)
    try:
        yield
    finally:
        hook.remove()


def _why(error: BaseException) -> str:
    """One sentence on the first error in the chain of causes that the user can act on."""
    for cause in _causes(error):
        if isinstance(cause, GatedRepoError):
            return "the hub requires a login with access to it."
        if isinstance(cause, RepositoryNotFoundError):
            return f"it is not a local folder, and {constants.ENDPOINT} has no such repository that you can read."
        if isinstance(cause, HFValidationError):
            return "it is neither a local folder nor a repository name (owner/name)."
        if isinstance(cause, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
            if constants.HF_HUB_OFFLINE:
                return "it is not a local folder and not in the cache, and HF_HUB_OFFLINE is set."
            return f"it is not a local folder and not in the cache, and {constants.ENDPOINT} cannot be reached."
    return reason(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _check_part(path: str | os.PathLike, index: dict, part: str, *, kind: str) -> None:
    """Raise LoadingError unless the index of a pipeline, which should be a `kind`, names a class for `part`."""
    if part not in index:
        raise LoadingError(f"{path} must be a {kind}, got {index.get('_class_name')} without {part}.")
    entry = index[part]
    if entry == [None, None]:
        raise LoadingError(f"{path} was saved without its {part}. Name a --{part}.")
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) for name in entry)):
        raise LoadingError(f"{path} cannot be loaded: {part} in its model_index.json must be two names, got {entry}.")


def _largest_number(config: object) -> float:
    if isinstance(config, dict):
        config = list(config.values())
    if isinstance(config, list):
        return max(map(_largest_number, config), default=0)
    return abs(config) if isinstance(config, int) else 0
