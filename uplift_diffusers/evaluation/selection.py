"""Which methods to compare: words like `cfm20=runs/cfm:num_inference_steps=20` become methods with loaded weights."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.utils.logging import disable_progress_bar

from uplift_diffusers.evaluation.digests import digest_weights
from uplift_diffusers.evaluation.methods import (
    Method,
    Sample,
    bicubic,
    bilinear,
    folder_method,
    pipeline_method,
    vae_round_trip,
)
from uplift_diffusers.flow_matching import euler_scheduler
from uplift_diffusers.images.files import find_image_files
from uplift_diffusers.latent_space import Autoencoder, LatentSpace
from uplift_diffusers.models.upsampler import UPLiFTModel
from uplift_diffusers.pipelines.cfm_latent_upscale import CFMLatentUpscalePipeline
from uplift_diffusers.pipelines.latent_upscale import UPLiFTLatentUpscalePipeline
from uplift_diffusers.pipelines.super_resolution import UPLiFTSuperResolutionPipeline

BUILT_IN = ("bicubic", "bilinear", "uplift", "vae")
"""Methods that need no path; "uplift" is the pipeline that the others are compared with."""

_WORD = re.compile(r"(?P<name>[\w.-]+)(=(?P<path>.+?)(:(?P<options>[A-Za-z_]\w*=.*))?)?")


@dataclass(frozen=True)
class MethodSpec:
    """
    A method as it was asked for.

    Args:
        name: in the report.
        path: of its weights or images, or a hub id; None for `BUILT_IN` methods.
        options: arguments of the pipeline's call.
    """

    name: str
    path: str | None = None
    options: dict = field(default_factory=dict)

    @classmethod
    def parse(cls, word: str) -> "MethodSpec":
        """
        Read `name` or `name=path` or `name=path:option=value,option=value`. Values are JSON, or else text.

        Raises:
            ValueError: it is neither, or a name without a path that is not built in.
        """
        match = _WORD.fullmatch(word)
        if match is None:
            raise ValueError(f"`methods` must be name, name=path or name=path:option=value,..., got {word!r}.")
        name, path, text = match["name"], match["path"], match["options"]
        if path is None and name not in BUILT_IN:
            raise ValueError(
                f"`methods` must be of {', '.join(BUILT_IN)}, or say where the weights are, got {word!r}. "
                f"For example: {name}=runs/{name}"
            )
        options = dict(pair.split("=", 1) if "=" in pair else (pair, "") for pair in text.split(",")) if text else {}
        return cls(name, path, {key: _value(value) for key, value in options.items()})


def parse_methods(words: Iterable[str]) -> list[MethodSpec]:
    """Every word as a `MethodSpec`. Raises ValueError where one cannot be read, or two have one name."""
    specs = [MethodSpec.parse(word) for word in words]
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`methods` must have different names, got {twice!r} twice.")
    return specs


def make_methods(
    specs: list[MethodSpec],
    *,
    pipeline: DiffusionPipeline,
    seed: int,
    samples: list[Sample],
    of_latents: bool,
    device: torch.device,
) -> list[Method]:
    """
    Load what is asked for.

    Args:
        specs: what is asked for.
        pipeline: the method "uplift"; its VAE and latent space are those of the methods that have none of their own.
        seed: of every image's noise.
        samples: all that the methods will be given; names, scales and sizes of them are looked at.
        of_latents: whether the samples are latents of `pipeline.latent_space` and not images.
        device: where the networks go.
    Raises:
        OSError, ValueError, TypeError: a path holds nothing that enlarges images, or what does not fit.
    """
    vae, space = pipeline.vae, pipeline.latent_space
    if of_latents and "vae" in (spec.name for spec in specs if spec.path is None):
        raise ValueError("`methods` must not have 'vae' for text-to-image: there is no photograph to encode.")
    built_in = {"bicubic": bicubic, "bilinear": bilinear, "vae": vae_round_trip}
    methods, loaded = [], {None: pipeline}
    for spec in specs:
        if spec.path is None and spec.name in built_in:
            methods.append(built_in[spec.name](vae, space))
            continue
        if spec.path is not None and _is_folder_of_images(Path(spec.path), samples):
            methods.append(folder_method(spec.name, Path(spec.path), samples=samples))
            continue
        if spec.path not in loaded:
            found = load_pipeline(spec.path, vae=vae, latent_space=space.name)
            loaded[spec.path] = (for_latents(found, space) if of_latents else found).to(device)
        method = pipeline_method(
            spec.name,
            loaded[spec.path],
            seed=seed,
            options=spec.options,
            vae_of_latents=vae if of_latents else None,
        )
        methods.append(replace(method, note=_note_on_vae(method, vae)))
    return methods


def load_pipeline(path: str, *, vae: Autoencoder | None, latent_space: str | None = None) -> DiffusionPipeline:
    """
    Load a saved pipeline, or make one of a saved network and `vae`.

    Args:
        path: directory or hub id of a pipeline of any kind, or of a UPLiFTModel (a LiFT is one), or of a UNet2DModel
            that `train_latent.py --method cfm` has trained.
        vae: for the networks; None where there is none.
        latent_space: whose latents `vae` speaks.
    Raises:
        OSError, ValueError, TypeError: there is neither, or the network was trained for other latents.
    """
    disable_progress_bar()
    if Path(path, DiffusionPipeline.config_name).is_file():
        return DiffusionPipeline.from_pretrained(path)
    if not Path(path).exists():
        try:
            return DiffusionPipeline.from_pretrained(path)
        except OSError as error:
            raise FileNotFoundError(
                f"{path!r} must be a directory or a repository of the hub within reach, got neither."
            ) from error
    if vae is None:
        raise ValueError(f"{path!r} must be a pipeline, which has a VAE, got a network or something else.")
    config = Path(path, "config.json")
    if config.is_file() and json.loads(config.read_text()).get("_class_name") == UNet2DModel.__name__:
        unet = UNet2DModel.from_pretrained(path)
        return CFMLatentUpscalePipeline(vae, unet, euler_scheduler(), latent_space=latent_space)
    return UPLiFTSuperResolutionPipeline(vae, UPLiFTModel.from_pretrained(path), latent_space=latent_space)


def for_latents(pipeline: DiffusionPipeline, space: LatentSpace) -> DiffusionPipeline:
    """
    The pipeline that does to latents of `space` what `pipeline` does to images, where there is one.

    Raises:
        ValueError: it is for other latents.
    """
    if isinstance(pipeline, UPLiFTSuperResolutionPipeline):
        pipeline = UPLiFTLatentUpscalePipeline(**pipeline.components, latent_space=pipeline.latent_space.name)
    if hasattr(pipeline, "latent_space") and pipeline.latent_space != space:
        raise ValueError(
            f"`methods` must be for the latents of the Stable Diffusion, {space.name!r}, got a "
            f"{type(pipeline).__name__} for {pipeline.latent_space.name!r}."
        )
    return pipeline


def check_model(pipeline: DiffusionPipeline) -> None:
    """Raise TypeError unless `pipeline` says which latents its VAE speaks, which all other methods then go by."""
    if not hasattr(pipeline, "latent_space"):
        raise TypeError(
            "`model` must be a pipeline of this package, such as a UPLiFTSuperResolutionPipeline, got a "
            f"{type(pipeline).__name__}. Compare it as a method: --methods NAME=PATH."
        )


def _note_on_vae(method: Method, vae: Autoencoder) -> str:
    own = method.modules.get("vae")
    if own is None or own is vae or digest_weights([own]) == digest_weights([vae]):
        return ""
    return f"`{method.name}` goes through a VAE of its own, not through that of the other methods."


def _is_folder_of_images(path: Path, samples: list[Sample]) -> bool:
    return any(find_image_files(path / f"{scale}x").files for scale in {sample.scale for sample in samples})


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
