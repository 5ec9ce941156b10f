"""Conversion of published checkpoints to UPLiFTModel, with strict names and shapes."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

_DINO = {
    "latent_channels": 384,
    "encoder_block_out_channels": (16, 32, 64, 128, 128),
    "encoder_layers_per_block": 1,
    "encoder_spatial_factor": 16,
    "image_normalization": "imagenet",
    "decoder_channels": 64,
    "decoder_layers": (1, 1),
    "refiner_layers": 0,
    "noise_channels": 0,
    "decoder_convs_per_block": 2,
    "norm_type": "batch_norm",
}

CONFIGS: dict[str, dict] = {
    "sd15-vae": {},  # the defaults of UPLiFTModel
    "dinov2-s14": {**_DINO, "latent_space": "dinov2-s14", "spatial_factor": 14},
    "dinov3-splus16": {**_DINO, "latent_space": "dinov3-splus16", "spatial_factor": 16},
}
"""Constructor arguments of the published networks, by their name in `from_single_file(config=...)`."""


class Published(NamedTuple):
    """
    A repository published by the authors of the paper.

    Args:
        filename: name of the weights file.
        config: name of the network in `CONFIGS`.
    """

    filename: str
    config: str


PUBLISHED = {
    "UPLiFT-upsampler/uplift_sd1.5vae": Published("uplift_sd1.5vae.safetensors", "sd15-vae"),
    "UPLiFT-upsampler/uplift_dinov2-s14": Published("uplift_dinov2-s14.safetensors", "dinov2-s14"),
    "UPLiFT-upsampler/uplift_dinov3-splus16": Published("uplift_dinov3-splus16.safetensors", "dinov3-splus16"),
}
"""Published checkpoints by repository on the hub."""

_BLOCKS = (
    (r"encoder\.block_(\d+)\.blocks\.(\d+)\.conv", r"encoder.blocks.\1.layers.\2"),
    (r"decoder\.block_0\.blocks\.(\d+)\.conv", r"decoder.coarse.layers.\1"),
    (r"decoder\.block_1\.blocks\.(\d+)\.conv", r"decoder.fine.layers.\1"),
    (r"refiner\.blocks\.(\d+)\.conv", r"refiner.blocks.layers.\1"),
)
_LAYERS = (
    (r"decoder\.up_1\.up", "decoder.upsample"),
    (r"attender\.conv1", "attender.conv"),
    (r"ref_outc", "refiner.conv_out"),
)


def config_from_filename(path: str | os.PathLike) -> str:
    """
    The name in `CONFIGS` of the network published under this file name.

    Raises:
        ValueError: no network was published under this name.
    """
    for published in PUBLISHED.values():
        if Path(path).name == published.filename:
            return published.config
    raise ValueError(
        f"`config` must be given for `{Path(path).name}`, which is not the name of a published checkpoint. "
        f"Pass one of {tuple(CONFIGS)}."
    )


def load_safetensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    Read a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not safetensors (pickle checkpoints are never opened), or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`{path}` is not a file.")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"`{path.name}` must be a .safetensors file. Pickle checkpoints can run code when they are opened; "
            "convert it to safetensors first."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"`{path}` is not a complete safetensors file ({error}). "
            "Download it again; `force_download=True` replaces a file in the hub's cache."
        ) from error


def convert_state_dict(reference: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Rename the published parameters to ours.

    A block of the reference is one sequence: convolution, norm and ReLU for each 3x3 convolution, so entries 0, 1, 3,
    4, ..., then the 1x1 convolution, which is the last entry and the only convolution with a bias.

    Raises:
        ValueError: a name occurs in no published checkpoint.
    """
    return {_convert_name(name, reference): tensor for name, tensor in reference.items()}


def _convert_name(name: str, reference: dict[str, torch.Tensor]) -> str:
    for pattern, replacement in _LAYERS:
        if match := re.fullmatch(rf"{pattern}\.(weight|bias)", name):
            return f"{replacement}.{match[1]}"
    for pattern, replacement in _BLOCKS:
        if match := re.fullmatch(rf"(?P<block>{pattern})\.(?P<position>\d+)\.(?P<parameter>\w+)", name):
            block, position = re.sub(pattern, replacement, match["block"]), int(match["position"])
            conv, kind = divmod(position, 3)
            if kind == 1:
                return f"{block}.norms.{conv}.{match['parameter']}"
            if kind == 0 and f"{match['block']}.{position}.bias" in reference:
                return f"{block}.proj.{match['parameter']}"
            if kind == 0:
                return f"{block}.convs.{conv}.{match['parameter']}"
    raise ValueError(f"`{name}` is not a parameter of a published UPLiFT checkpoint.")


def check_state_dict(converted: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless names and shapes are exactly `expected`; the message names the first differences."""
    if problems := name_differences(converted, expected):
        raise ValueError(f"The checkpoint does not fit `config`: {problems}.")


def name_differences(converted: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
    """The first three differences in names and shapes of tensors, and the number of further ones; empty for none."""
    shapes = {name: tuple(tensor.shape) for name, tensor in converted.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    problems = [f"no {name}" for name in wanted if name not in shapes]
    problems += [f"unknown {name}" for name in shapes if name not in wanted]
    problems += [
        f"{name} is {shapes[name]}, not {wanted[name]}"
        for name in wanted
        if shapes.get(name, wanted[name]) != wanted[name]
    ]
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
