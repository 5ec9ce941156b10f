"""
The compared methods, behind one interface, so all of them get the same pixels or latents.

Command-line arguments, such as `cfm20=runs/cfm:num_inference_steps=20`, become `MethodSpec`s (`parse_methods`), and
these become methods with loaded weights (`make_methods`).
"""

import inspect
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from uplift_diffusers.cfm import euler_scheduler
from uplift_diffusers.evaluation.metrics import to_bytes, to_tensor
from uplift_diffusers.evaluation.protocols import Sample
from uplift_diffusers.evaluation.records import digest, digest_bytes, digest_configs, digest_weights
from uplift_diffusers.images.convert import resize
from uplift_diffusers.images.files import find_image_files, open_image
from uplift_diffusers.latent_space import Autoencoder, LatentCodec, LatentSpace
from uplift_diffusers.loading import read_config
from uplift_diffusers.models.interpolation import interpolate_latents
from uplift_diffusers.models.upsampler import UPLiFTModel
from uplift_diffusers.pipelines.cfm_latent_upscale import CFMLatentUpscalePipeline
from uplift_diffusers.pipelines.latent_upscale import UPLiFTLatentUpscalePipeline
from uplift_diffusers.pipelines.super_resolution import UPLiFTSuperResolutionPipeline
from uplift_diffusers.runtime import dtype_option

BUILT_IN = ("bicubic", "bilinear", "uplift", "vae")
"""Methods without a path; "uplift" is the pipeline that the others are compared with."""

LATENT_PIPELINES = (UPLiFTLatentUpscalePipeline, CFMLatentUpscalePipeline)
"""Pipelines with `latents` as the input to upscale; in diffusers' pipelines, `latents` are the initial noise."""

VAES = ("vae", "vae_of_latents")
"""VAE classes: their encoding and decoding is timed separately, and their parameters are not counted."""

NAMED_MISSING = 5
"""At most this many missing images of a folder are named."""

_WORD = re.compile(r"(?P<name>[\w.-]+)(=(?P<path>.+?)(:(?P<options>[A-Za-z_]\w*=.*))?)?")


@dataclass(frozen=True)
class Method:
    """
    An upscaling method.

    Args:
        name: name in the report.
        upscale: a sample -> (1, 3, height, width) in [0, 1].
        settings: a description of what it does, as JSON values.
        components: networks, schedulers and other parts by name, as in a pipeline.
        timed: False if a call only returns an existing output.
        note: a remark for readers of the report.
    """

    name: str
    upscale: Callable[[Sample], torch.Tensor]
    settings: dict
    components: dict[str, object] = field(default_factory=dict)
    timed: bool = True
    note: str = ""

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """Its networks."""
        return {name: part for name, part in self.components.items() if isinstance(part, torch.nn.Module)}

    @property
    def vaes(self) -> list[torch.nn.Module]:
        """Its networks of the classes `VAES`."""
        return [module for name, module in self.modules.items() if name in VAES]

    @cached_property
    def identity(self) -> dict:
        """Everything that its outputs depend on besides the sample, as JSON values."""
        weights, configurations = digest_weights(self.modules.values()), digest_configs(self.components)
        return {**self.settings, "weights": weights, "configurations": configurations}

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Number of parameters of each network, without the `VAES`."""
        networks = {name: module for name, module in self.modules.items() if name not in VAES}
        return {name: sum(p.numel() for p in module.parameters()) for name, module in networks.items()}

    def __call__(self, sample: Sample) -> torch.Tensor:
        """The output for `sample`. Raises ValueError if its size is wrong."""
        with torch.no_grad():
            output = self.upscale(sample)
        if tuple(output.shape) != (1, 3, *sample.size):
            raise ValueError(
                f"`{self.name}` must give {sample.size[1]} x {sample.size[0]} pixels at {sample.scale}x, got "
                f"{output.shape[3]} x {output.shape[2]}."
            )
        return output


def bicubic(vae: Autoencoder, space: LatentSpace) -> Method:
    """Bicubic interpolation of the pixels, or of the decoded latents."""

    def upscale(sample: Sample) -> torch.Tensor:
        if sample.latents is None:
            assert sample.image is not None
            return resize(to_tensor(sample.image), sample.size)
        return resize(_decode(sample.latents, vae, space), sample.size)

    return Method("bicubic", upscale, _settings("bicubic interpolation of the pixels", space), {"vae": vae})


def bilinear(vae: Autoencoder, space: LatentSpace) -> Method:
    """Bilinear interpolation of the latents, decoded: the baseline for latent upsamplers."""

    def upscale(sample: Sample) -> torch.Tensor:
        if sample.latents is None:
            assert sample.image is not None
            raw_latents = LatentCodec(vae, space).encode(to_tensor(sample.image).to(vae.device))
        else:
            raw_latents = space.denormalize(sample.latents.to(vae.device))
        return LatentCodec(vae, space).decode(interpolate_latents(raw_latents, scale=sample.scale))

    return Method("bilinear", upscale, _settings("bilinear interpolation of the latents", space), {"vae": vae})


def vae_round_trip(vae: Autoencoder, space: LatentSpace) -> Method:
    """The photograph itself, encoded and decoded: the upper bound for methods that use the VAE."""

    def upscale(sample: Sample) -> torch.Tensor:
        assert sample.truth is not None
        return LatentCodec(vae, space).decode(LatentCodec(vae, space).encode(sample.truth.to(vae.device)))

    return Method("vae", upscale, _settings("encoded and decoded", space), {"vae": vae})


def pipeline_method(
    name: str,
    pipeline: DiffusionPipeline,
    *,
    seed: int,
    options: dict | None = None,
    vae_of_latents: Autoencoder | None = None,
) -> Method:
    """
    A pipeline that takes an `image` and returns a larger one, called with and returning PIL images.

    Args:
        name: name in the report.
        pipeline: called with `image`, `options`, and, if it accepts them, `scale`, `generator` and `output_type`.
            `LATENT_PIPELINES` get latents unchanged; other pipelines get the decoded image.
        seed: every image gets a generator seeded by this and the image's name, the same for all methods.
        options: further arguments of the call.
        vae_of_latents: decodes the latents of samples for pipelines that take images; None if samples are images.
    Raises:
        ValueError: the pipeline does not accept an option.
    """
    options, takes_latents = options or {}, isinstance(pipeline, LATENT_PIPELINES)
    accepted = inspect.signature(pipeline.__call__).parameters
    for option in ("image", *options):
        if option not in accepted:
            raise ValueError(
                f"`{name}` must be a pipeline that takes {option!r}, got a {type(pipeline).__name__}, which takes "
                f"{', '.join(accepted)}."
            )
    pipeline.set_progress_bar_config(disable=True)  # the evaluation has one of its own
    enlarge: Any = pipeline  # what all pipelines have in common is not callable

    def upscale(sample: Sample) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed_of(seed, sample.name))
        arguments = {"scale": sample.scale, "generator": generator, "output_type": "pil"}
        arguments = {key: value for key, value in {**arguments, **options}.items() if key in accepted}
        if sample.latents is None:
            arguments["image"] = sample.image
        elif takes_latents:
            arguments["latents"] = sample.latents
        else:
            assert vae_of_latents is not None
            image = _decode(sample.latents, vae_of_latents, LatentSpace.of(vae_of_latents))
            arguments["image"] = to_pil_image(to_bytes(image)[0])
        return to_tensor(enlarge(**arguments).images[0])

    components = {"pipeline": pipeline, **pipeline.components}
    if not takes_latents and vae_of_latents is not None and vae_of_latents is not components.get("vae"):
        components["vae_of_latents"] = vae_of_latents
    return Method(name, upscale, {"method": type(pipeline).__name__, "seed": seed, **options}, components)


def folder_method(name: str, folder: Path, *, samples: list[Sample]) -> Method:
    """
    Outputs of other software for the downsampled crops, as image files.

    Args:
        name: name in the report.
        folder: has a folder 2x, 4x, ... for each scale with one image for each photograph, with the same relative path
            except for the suffix. With a single scale, the images may be in `folder` itself.
        samples: the samples, for their names, scales and sizes. Other images in the folder are ignored.
    Raises:
        ValueError: images are missing or have another size, or two names differ only in their suffix.
    """
    scales = {sample.scale for sample in samples}
    found = {}
    for scale in sorted(scales):
        root = _image_root(folder, scale, scales)
        _add_named(found, scale, {path.relative_to(root): path for path in find_image_files(root).files})
    wanted = {}
    for scale in sorted(scales):
        _add_named(wanted, scale, {Path(sample.name): sample for sample in samples if sample.scale == scale})
    if missing := sorted(f"{scale}x/{stem}" for scale, stem in wanted.keys() - found.keys()):
        more = f" and {len(missing) - NAMED_MISSING} more" if len(missing) > NAMED_MISSING else ""
        raise ValueError(
            f"`{name}` must have an image for each photograph and scale in {folder}, {len(wanted)} in all, got "
            f"{len(wanted) - len(missing)}. Missing: {', '.join(missing[:NAMED_MISSING])}{more}."
        )
    for key, sample in wanted.items():
        with Image.open(found[key]) as file:
            if file.size != sample.size[::-1]:
                raise ValueError(
                    f"`{name}` must have images of {sample.size[1]} x {sample.size[0]} pixels, the size of the crops, "
                    f"got {file.width} x {file.height} for {found[key]}."
                )

    def upscale(sample: Sample) -> torch.Tensor:
        return to_tensor(open_image(found[sample.scale, Path(sample.name).with_suffix("")]).image)

    files = digest([digest_bytes(found[key].read_bytes()) for key in sorted(wanted)])
    return Method(name, upscale, {"method": "images from a folder", "files": files}, timed=False)


def seed_of(seed: int, name: str) -> int:
    """The seed of one image's noise."""
    return int(digest([seed, name]), 16)


@dataclass(frozen=True)
class MethodSpec:
    """
    The specification of a method on the command line.

    Args:
        name: name in the report.
        path: path of its weights or images, or a hub id; None for `BUILT_IN` methods.
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
            ValueError: the syntax is wrong, or a name without a path is not built in.
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
        pairs = [pair.partition("=") for pair in text.split(",")] if text else []
        return cls(name, path, {key: _value(value) for key, _, value in pairs})


def parse_methods(words: Iterable[str]) -> list[MethodSpec]:
    """Parse all words. Raises ValueError if one is invalid, or if two have the same name."""
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
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> list[Method]:
    """
    Load methods.

    Args:
        specs: the specifications.
        pipeline: the method "uplift", on `device`. Methods without a VAE or latent space use those of this pipeline.
        seed: seed of every image's noise.
        samples: all samples, for their names, scales and sizes.
        of_latents: whether the samples are latents of `pipeline.latent_space` and not images.
        device, dtype: device and dtype of the loaded networks.
        trust_remote_code: as in [`load_pipeline`].
    Raises:
        OSError, ValueError, TypeError: a path does not hold an upscaler, or it does not match.
    """
    vae, space = pipeline.vae, pipeline.latent_space
    if of_latents and "vae" in (spec.name for spec in specs if spec.path is None):
        raise ValueError("`methods` must not have 'vae' for text-to-image: there is no photograph to encode.")
    built_in = {"bicubic": bicubic, "bilinear": bilinear, "vae": vae_round_trip}
    methods: list[Method] = []
    loaded: dict[str | None, DiffusionPipeline] = {None: pipeline}
    for spec in specs:
        if spec.path is None and spec.name in built_in:
            methods.append(built_in[spec.name](vae, space))
            continue
        if spec.path is not None and _is_folder_of_images(Path(spec.path), samples):
            if spec.options:
                raise ValueError(f"`{spec.name}` must have no options, because its images already exist.")
            methods.append(folder_method(spec.name, Path(spec.path), samples=samples))
            continue
        if spec.path is not None and spec.path not in loaded:
            found = load_pipeline(
                spec.path, vae=vae, latent_space=space.name, dtype=dtype, trust_remote_code=trust_remote_code
            )
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


def load_pipeline(
    path: str,
    *,
    vae: Autoencoder | None,
    latent_space: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> DiffusionPipeline:
    """
    Load a saved pipeline, or make one from a saved network and `vae`.

    Args:
        path: folder or hub id of a pipeline of any kind, or of a UPLiFTModel (a LiFT is one), or of a UNet2DModel
            trained by `train_latent.py --method cfm`.
        vae: the VAE for a network, or None.
        latent_space: name of the latent space that `vae` belongs to.
        dtype: dtype of the weights.
        trust_remote_code: whether code in the folder of a pipeline with a custom class may run.
    Raises:
        OSError, ValueError, TypeError: there is neither, or the network was trained for other latents.
    """
    options = {"use_safetensors": True, **dtype_option(dtype)}
    if read_config(path, DiffusionPipeline.config_name) is not None:
        return _load_saved_pipeline(path, trust_remote_code=trust_remote_code, **options)
    if vae is None:
        raise ValueError(f"{path!r} must be a pipeline with a VAE, got a network or something else.")
    config = read_config(path, UNet2DModel.config_name) or {}
    if config.get("_class_name") == UNet2DModel.__name__:
        unet = UNet2DModel.from_pretrained(path, **options)
        return CFMLatentUpscalePipeline(vae, unet, euler_scheduler(), latent_space=latent_space)
    upsampler = UPLiFTModel.from_pretrained(path, **options)
    return UPLiFTSuperResolutionPipeline(vae, upsampler, latent_space=latent_space)


def _load_saved_pipeline(path: str, *, trust_remote_code: bool, **options: bool | torch.dtype) -> DiffusionPipeline:
    try:
        return DiffusionPipeline.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    except AttributeError as error:  # diffusers asks its own module for the class
        raise ValueError(
            f"{path!r} must be a pipeline of a class that diffusers finds, got another one ({error}). Put the file of "
            f'the class next to {DiffusionPipeline.config_name} and name both there: "_class_name": ["file", "Class"].'
        ) from error
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{path!r} must be a pipeline without custom code, got one with custom code. If you trust it, pass "
            "--trust_remote_code to run it."
        ) from error


def for_latents(pipeline: DiffusionPipeline, space: LatentSpace) -> DiffusionPipeline:
    """
    The latent pipeline with the components of `pipeline`, if there is one for latents of `space`.

    Raises:
        ValueError: `pipeline` is for other latents.
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
    """Raise TypeError unless `pipeline` has a latent space, which all other methods share."""
    if not hasattr(pipeline, "latent_space"):
        raise TypeError(
            "`model` must be a pipeline of this package, such as a UPLiFTSuperResolutionPipeline, got a "
            f"{type(pipeline).__name__}. Compare it as a method: --methods NAME=PATH."
        )


def _note_on_vae(method: Method, vae: Autoencoder) -> str:
    own = method.modules.get("vae")
    if own is None or own is vae or digest_weights([own]) == digest_weights([vae]):
        return ""
    return f"`{method.name}` uses a different VAE than the other methods."


def _is_folder_of_images(folder: Path, samples: list[Sample]) -> bool:
    if any((folder / config).is_file() for config in (DiffusionPipeline.config_name, "config.json")):
        return False  # of a model, which may have pictures for its card
    scales = {sample.scale for sample in samples}
    return any(find_image_files(_image_root(folder, scale, scales)).files for scale in scales)


def _image_root(folder: Path, scale: int, scales: set[int]) -> Path:
    root = folder / f"{scale}x"
    return folder if len(scales) == 1 and not root.is_dir() else root


def _add_named(images: dict, scale: int, named: dict[Path, object]) -> None:
    """Add `named` to `images` by (scale, name without suffix). Raises ValueError for a duplicate name."""
    for name, value in named.items():
        key = (scale, name.with_suffix(""))
        if key in images:
            raise ValueError(
                f"Images must have different names without their suffixes, got {key[1]} twice for {scale}x."
            )
        images[key] = value


def _decode(latents: torch.Tensor, vae: Autoencoder, space: LatentSpace) -> torch.Tensor:
    return LatentCodec(vae, space).decode(space.denormalize(latents.to(vae.device, torch.float32)))


def _settings(method: str, space: LatentSpace) -> dict:
    return {"method": method, "latent_space": asdict(space)}


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
