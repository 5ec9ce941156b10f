"""The demo's models: found on this machine, downloaded on a click, and loaded when first needed."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uplift_diffusers.demo.jobs import Job
from uplift_diffusers.embedded import embedded_bundle
from uplift_diffusers.runtime import choose_device

if TYPE_CHECKING:
    import torch

    from uplift_diffusers.pipelines.super_resolution import UPLiFTSuperResolutionPipeline
    from uplift_diffusers.pipelines.text_to_image import UPLiFTTextToImagePipeline

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
UPSAMPLER = "UPLiFT-upsampler/uplift_sd1.5vae"

_PATTERNS = (
    "model_index.json",
    "*/*.json",
    "*/*.txt",
    "*/model.safetensors",
    "*/diffusion_pytorch_model.safetensors",
)
"""Files to load from a pipeline's repository: no pickles, no variants, no single-file checkpoints."""


@dataclass(frozen=True)
class Missing:
    """
    The missing files of a repository.

    Args:
        repository: its name on the hub.
        files: size in bytes of every file that is not on this machine, by name.
    """

    repository: str
    files: dict[str, int]

    @property
    def size_bytes(self) -> int:
        return sum(self.files.values())


@dataclass(frozen=True)
class Source:
    """
    A Stable Diffusion 1.x and the upsampler for its latents.

    Args:
        model: a local diffusers folder or a repository on the hub; the published weights by default.
        upsampler: likewise; ignored if `model` is a saved [`UPLiFTTextToImagePipeline`], which includes one.
    """

    model: str = STABLE_DIFFUSION
    upsampler: str = UPSAMPLER

    def find(self) -> Path | None:
        """
        The folder of the model, or None if a part has to be downloaded. Never uses the network.

        Raises:
            ValueError: the folder is not a Stable Diffusion 1.x in safetensors.
        """
        folder = Path(self.model) if os.path.isdir(self.model) else _cached_folder(self.model)
        if folder is None:
            return None
        if not _is_complete(folder):
            if os.path.isdir(self.model):
                raise ValueError(f"{self.model} is not a diffusers folder of Stable Diffusion 1.x in safetensors.")
            return None
        return folder if _has_upsampler(folder) or _is_here(self.upsampler) else None

    def missing(self) -> list[Missing]:
        """
        What has to be downloaded.

        Raises:
            ValueError: neither a folder nor the name of a repository.
            ConnectionError: the hub does not answer or has no such repository.
        """
        found = [] if os.path.isdir(self.model) else [_missing_of(self.model, _PATTERNS)]
        if not _is_here(self.upsampler):
            found.append(_missing_of(self.upsampler, ("*.safetensors",)))
        return [missing for missing in found if missing.files]

    def download(self, job: Job) -> None:
        """Download missing files. Raises ConnectionError, and StoppedError, after which it can be continued."""
        from huggingface_hub import hf_hub_download

        parts = self.missing()
        total = sum(missing.size_bytes for missing in parts)
        stage = f"Downloading {in_words(total)}"
        job.plan({stage: 1})
        done = 0
        for missing in parts:
            for name, size_bytes in missing.files.items():

                def arrived(count: int, begin: int = done, most: int = size_bytes) -> None:
                    job.advance(stage, (begin + min(count, most)) / total)

                with _hub_errors_told(missing.repository):
                    hf_hub_download(missing.repository, name, tqdm_class=_reporting_to(arrived))
                done += size_bytes
                job.advance(stage, done / total)

    def load(self) -> "UPLiFTTextToImagePipeline":
        """The pipeline, on the CPU. Raises FileNotFoundError if a part is missing, or a loading error."""
        from uplift_diffusers.models.upsampler import UPLiFTModel
        from uplift_diffusers.pipelines.text_to_image import UPLiFTTextToImagePipeline

        folder = self.find()
        if folder is None:
            raise FileNotFoundError(f"{self.model} is not on this machine yet. Download it first.")
        parts = (
            {}
            if _has_upsampler(folder)
            else {"upsampler": UPLiFTModel.from_pretrained(self.upsampler, use_safetensors=True)}
        )
        pipeline = UPLiFTTextToImagePipeline.from_pretrained(folder, use_safetensors=True, **parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


@dataclass(frozen=True)
class Model:
    """
    The source of a super-resolution pipeline, as for `uplift-diffusers upscale`.

    Args:
        location: a folder or a name on the hub; None for the embedded bundle.
        vae, latent_space: see `uplift-diffusers upscale --help`.
    """

    location: str | None = None
    vae: str | None = None
    latent_space: str | None = None


@dataclass
class Models:
    """
    The pipelines, on one device. Use it from one thread.

    Args:
        device: device name, as for `--device`.
        super_resolution: models to offer, by displayed name.
    """

    device: str
    super_resolution: dict[str, Model]
    _enlargers: "dict[str, UPLiFTSuperResolutionPipeline]" = field(default_factory=dict)
    _creators: "dict[Source, UPLiFTTextToImagePipeline]" = field(default_factory=dict)

    def enlarger(self, name: str) -> "UPLiFTSuperResolutionPipeline":
        """The super-resolution pipeline of that name. Raises LoadingError if it cannot be loaded."""
        from uplift_diffusers.loading import load_pipeline

        if name not in self._enlargers:
            device = choose_device(self.device)
            model = self.super_resolution[name]
            pipeline = load_pipeline(
                model.location or embedded_bundle(), vae=model.vae, latent_space=model.latent_space
            )
            pipeline.set_progress_bar_config(disable=True)
            self._enlargers[name] = pipeline.to(device)
        return self._enlargers[name]

    def creator(self, source: Source) -> "UPLiFTTextToImagePipeline":
        """The text-to-image pipeline of `source`; a previously loaded one is released."""
        if source not in self._creators:
            self._creators.clear()
            device = choose_device(self.device)
            self._creators[source] = source.load().to(device, dtype=_dtype(device))
        return self._creators[source]


def _dtype(device: "torch.device") -> "torch.dtype":
    import torch

    return torch.float16 if device.type == "cuda" else torch.float32


def in_words(size_bytes: int) -> str:
    """A size in MB or GB."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{max(size_bytes / 1e6, 0.1):.1f} MB"


def _missing_of(repository: str, patterns: tuple[str, ...]) -> Missing:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import filter_repo_objects

    with _hub_errors_told(repository):
        listed = list(HfApi().list_repo_tree(repository, recursive=True))
    sizes = {entry.path: entry.size for entry in listed if isinstance(entry, RepoFile)}
    names = filter_repo_objects(sizes, allow_patterns=list(patterns))
    return Missing(
        repository,
        {name: sizes[name] for name in names if not isinstance(try_to_load_from_cache(repository, name), str)},
    )


@contextmanager
def _hub_errors_told(repository: str) -> Iterator[None]:
    """Turn errors of the hub's library into one sentence."""
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repository} is neither a folder on this machine nor the name of a repository.") from error
    except (HTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        raise ConnectionError(
            f"{repository} is not on this machine and cannot be downloaded: "
            "connect to the network, or name a folder on this machine."
        ) from error


def _reporting_to(arrived: Callable[[int], None]) -> type:
    """A progress bar that shows nothing and reports how many bytes of a file have arrived."""
    from tqdm import tqdm

    class Reporter(tqdm):
        def __init__(self, *args, initial=0, **kwargs):
            super().__init__(disable=True)
            self.arrived = initial

        def update(self, n: Any = 1):
            self.arrived += n
            arrived(self.arrived)

    return Reporter


def _cached_folder(repository: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(repository, "model_index.json")
    except HFValidationError:
        return None
    return Path(index).parent if isinstance(index, str) else None


def _is_complete(folder: Path) -> bool:
    """Whether all models of a Stable Diffusion pipeline are present."""
    index = _read_index(folder)
    if index.get("_class_name") not in ("StableDiffusionPipeline", "UPLiFTTextToImagePipeline"):
        return False
    parts = [name for name, kind in index.items() if isinstance(kind, list) and len(kind) == 2 and kind[1] is not None]
    return all(_is_loadable(folder / name) for name in parts)


def _is_loadable(part: Path) -> bool:
    is_model = (part / "config.json").is_file()
    return any(part.glob("*.safetensors")) if is_model else any(part.glob("*.json"))


def _has_upsampler(folder: Path) -> bool:
    return "upsampler" in _read_index(folder)


def _read_index(folder: Path) -> dict:
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return index if isinstance(index, dict) else {}


def _is_here(upsampler: str) -> bool:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if os.path.exists(upsampler):
        return True
    try:
        return any(Path(snapshot_download(upsampler, local_files_only=True)).glob("*.safetensors"))
    except (HFValidationError, LocalEntryNotFoundError):
        return False
