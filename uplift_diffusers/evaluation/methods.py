"""The methods that are compared, behind one interface, so that all of them see the same pixels or latents."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from uplift_diffusers.evaluation.digests import digest, digest_bytes, digest_configs, digest_weights
from uplift_diffusers.evaluation.metrics import to_bytes
from uplift_diffusers.images.convert import resize
from uplift_diffusers.images.files import find_image_files, open_image
from uplift_diffusers.latent_space import Autoencoder, LatentSpace
from uplift_diffusers.pipelines.cfm_latent_upscale import CFMLatentUpscalePipeline
from uplift_diffusers.pipelines.latent_upscale import UPLiFTLatentUpscalePipeline

LATENT_PIPELINES = (UPLiFTLatentUpscalePipeline, CFMLatentUpscalePipeline)
"""Their `latents` are what is to be enlarged; those of diffusers' pipelines are the noise to begin with."""

VAES = ("vae", "vae_of_latents")
"""Components whose encoding and decoding is timed apart, and whose parameters are not the method's."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """
    What a method is given: an image or the latents of one.

    Args:
        name: path of the photograph below its folder, or number of the prompt.
        scale: whole factor.
        size: (height, width) in pixels of the output.
        image: RGB, `size` reduced by `scale`, where the photographs are reduced.
        latents: (1, C, h, w), scaled, where Stable Diffusion made them.
        truth: (1, 3, height, width) in [0, 1], the photograph that `image` was; for `vae_round_trip` alone.
    """

    name: str
    scale: int
    size: tuple[int, int]
    image: Image.Image | None = None
    latents: torch.Tensor | None = None
    truth: torch.Tensor | None = None


@dataclass(frozen=True)
class Method:
    """
    A way to enlarge.

    Args:
        name: in the report.
        upscale: a sample -> (1, 3, height, width) in [0, 1].
        settings: what it does, as JSON values.
        components: networks, schedulers and all else that it consists of, by name, as a pipeline has them.
        timed: whether a call enlarges; False where it only hands out what has been enlarged before.
        note: a sentence that readers of its figures must know.
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
        """Those of its networks that are `VAES`."""
        return [module for name, module in self.modules.items() if name in VAES]

    @cached_property
    def identity(self) -> dict:
        """What its outputs depend on, but for the sample."""
        weights, configurations = digest_weights(self.modules.values()), digest_configs(self.components)
        return {**self.settings, "weights": weights, "configurations": configurations}

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Number of parameters of each network but the `VAES`."""
        networks = {name: module for name, module in self.modules.items() if name not in VAES}
        return {name: sum(p.numel() for p in module.parameters()) for name, module in networks.items()}

    def __call__(self, sample: Sample) -> torch.Tensor:
        """The output for `sample`. Raises ValueError where it has another size than was asked for."""
        with torch.no_grad():
            output = self.upscale(sample)
        if tuple(output.shape) != (1, 3, *sample.size):
            raise ValueError(
                f"`{self.name}` must give {sample.size[1]} x {sample.size[0]} pixels at {sample.scale}x, got "
                f"{output.shape[3]} x {output.shape[2]}."
            )
        return output


def bicubic(vae: Autoencoder, space: LatentSpace) -> Method:
    """Bicubic interpolation of the pixels; of latents, after they are decoded."""

    def upscale(sample: Sample) -> torch.Tensor:
        if sample.latents is None:
            return resize(to_tensor(sample.image), sample.size)
        return resize(_decode(sample.latents, vae, space), sample.size)

    return Method("bicubic", upscale, _settings("bicubic interpolation of the pixels", space), {"vae": vae})


def bilinear(vae: Autoencoder, space: LatentSpace) -> Method:
    """Bilinear interpolation of the latents, decoded: what an upsampler of latents has to beat."""

    def upscale(sample: Sample) -> torch.Tensor:
        if sample.latents is None:
            raw_latents = space.encode(vae, to_tensor(sample.image).to(vae.device))
        else:
            raw_latents = space.unscale(sample.latents.to(vae.device))
        raw_latents = F.interpolate(raw_latents.float(), scale_factor=sample.scale, mode="bilinear")
        return space.decode(vae, raw_latents)

    return Method("bilinear", upscale, _settings("bilinear interpolation of the latents", space), {"vae": vae})


def vae_round_trip(vae: Autoencoder, space: LatentSpace) -> Method:
    """The photograph itself, encoded and decoded: the ceiling of everything that goes through the VAE."""

    def upscale(sample: Sample) -> torch.Tensor:
        return space.decode(vae, space.encode(vae, sample.truth.to(vae.device)))

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
    A pipeline that takes an `image` and gives a larger one, called as a person would: PIL in, PIL out.

    Args:
        name: in the report.
        pipeline: called with `image`, `options`, and as far as it takes them `scale`, `generator` and `output_type`.
            Latents go to `LATENT_PIPELINES` as they are; other pipelines get the image that they decode to.
        seed: every image is made with a generator seeded by it and the image's name, so with noise of its own that is
            the same for all methods.
        options: further arguments of the call.
        vae_of_latents: decodes the latents of samples for pipelines that take images; None where there are none.
    Raises:
        ValueError: an option that the pipeline does not take.
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

    def upscale(sample: Sample) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed_of(seed, sample.name))
        arguments = {"scale": sample.scale, "generator": generator, "output_type": "pil"}
        arguments = {key: value for key, value in {**arguments, **options}.items() if key in accepted}
        if sample.latents is None:
            arguments["image"] = sample.image
        elif takes_latents:
            arguments["latents"] = sample.latents
        else:
            image = _decode(sample.latents, vae_of_latents, LatentSpace.of(vae_of_latents))
            arguments["image"] = to_pil_image(to_bytes(image)[0])
        return to_tensor(pipeline(**arguments).images[0])

    components = {"pipeline": pipeline, **pipeline.components}
    if not takes_latents and vae_of_latents is not None and vae_of_latents is not components.get("vae"):
        components["vae_of_latents"] = vae_of_latents
    return Method(name, upscale, {"method": type(pipeline).__name__, "seed": seed, **options}, components)


def folder_method(name: str, folder: Path, *, samples: list[Sample]) -> Method:
    """
    Outputs of any other software: `folder/2x/` and so on hold one image for each photograph, of the same name but for
    its suffix.

    Args:
        name: in the report.
        folder: see above.
        samples: names, scales and sizes of all that is to be found there.
    Raises:
        ValueError: images are missing, there are others, two differ in the suffix alone, or one is of another size.
    """
    found, wanted = {}, {}
    for scale in sorted({sample.scale for sample in samples}):
        root = folder / f"{scale}x"
        for path in find_image_files(root).files:
            _add(found, scale, path.relative_to(root), path)
    for sample in samples:
        _add(wanted, sample.scale, Path(sample.name), sample)
    if found.keys() != wanted.keys():
        scale, stem = min(found.keys() ^ wanted.keys())
        raise ValueError(
            f"`{name}` must have an image for each photograph and scale below {folder}, {len(wanted)} in all, got "
            f"{len(found)}: {scale}x/{stem} is {'one too many' if (scale, stem) in found else 'missing'}."
        )
    for key, path in found.items():
        with Image.open(path) as file:
            size = wanted[key].size
            if file.size != size[::-1]:
                raise ValueError(
                    f"`{name}` must have images of {size[1]} x {size[0]} pixels, the size of the crops, got "
                    f"{file.width} x {file.height} for {path}."
                )

    def upscale(sample: Sample) -> torch.Tensor:
        return to_tensor(open_image(found[sample.scale, Path(sample.name).with_suffix("")]).image)

    files = digest([digest_bytes(found[key].read_bytes()) for key in sorted(found)])
    return Method(name, upscale, {"method": "images from a folder", "files": files}, timed=False)


def seed_of(seed: int, name: str) -> int:
    """The seed of one image's noise."""
    return int(digest([seed, name]), 16)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return pil_to_tensor(image.convert("RGB"))[None].float() / 255


def _decode(latents: torch.Tensor, vae: Autoencoder, space: LatentSpace) -> torch.Tensor:
    return space.decode(vae, space.unscale(latents.to(vae.device, torch.float32)))


def _settings(method: str, space: LatentSpace) -> dict:
    return {"method": method, "latent_space": asdict(space)}


def _add(images: dict, scale: int, name: Path, value: object) -> None:
    key = (scale, name.with_suffix(""))
    if key in images:
        raise ValueError(f"Images must have different names without their suffixes, got {key[1]} twice for {scale}x.")
    images[key] = value
