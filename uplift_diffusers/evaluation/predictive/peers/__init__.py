"""
The published upsamplers of features, each in one file, behind one interface.

    upsampler = load_peer("jafar", channels=384, weights="jafar_dinov2_s14.safetensors")
    features = upsampler.upsample(tokens, image, (448, 448))  # (B, 384, 448, 448)

The networks are written from their descriptions and match the published ones to 1e-5. Weights are not included.
Most are published as pickles, which are never opened here; PyTorch converts them without running code:

    tensors = torch.load("vit_small_patch14_dinov2.lvd142m.pth", weights_only=True)["jafar"]
    safetensors.torch.save_file(tensors, "jafar_dinov2_s14.safetensors")
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from uplift_diffusers.evaluation.predictive.peers.anyup import AnyUp
from uplift_diffusers.evaluation.predictive.peers.featup import FeatUp
from uplift_diffusers.evaluation.predictive.peers.interface import FeatureUpsampler
from uplift_diffusers.evaluation.predictive.peers.interpolation import Bilinear, Nearest
from uplift_diffusers.evaluation.predictive.peers.jafar import JAFAR
from uplift_diffusers.evaluation.predictive.peers.lift import LiFT
from uplift_diffusers.evaluation.predictive.peers.loftup import LoftUp
from uplift_diffusers.evaluation.predictive.peers.naf import NAF
from uplift_diffusers.models.conversion import load_safetensors, name_differences

StateDict = dict[str, torch.Tensor]

__all__ = ["PEERS", "FeatureUpsampler", "Peer", "load_peer"]


@dataclass(frozen=True)
class Peer:
    """
    Args:
        cls: class of the network.
        takes_channels: whether it is built for a fixed number of channels.
        licence: licence of code and weights.
        weights: where the authors publish the weights, and under which key of the file.
        prefix: prefix of all names in a published checkpoint.
        left_out: prefixes of names that do not belong to the upsampler.
        arguments: constructor arguments derived from the tensors.
        chunks: whether it takes `query_chunk`.
    """

    cls: type[FeatureUpsampler]
    takes_channels: bool = False
    licence: str = ""
    weights: str = ""
    prefix: str = ""
    left_out: tuple[str, ...] = ()
    arguments: Callable[[StateDict], dict] = lambda tensors: {}
    chunks: bool = False


PEERS: dict[str, Peer] = {
    "nearest": Peer(Nearest),
    "bilinear": Peer(Bilinear),
    "lift": Peer(
        LiFT,
        takes_channels=True,
        licence="MIT",
        weights="a folder on a file-sharing site, linked by github.com/saksham-s/lift: lift_dino_vits16.pth, …",
        prefix="module.",
        arguments=lambda tensors: {"guide_channels": len(tensors["image_convs_1.0.weight"])},
    ),
    "featup": Peer(
        FeatUp,
        takes_channels=True,
        licence="MIT",
        weights='torch.hub mhamilton723/FeatUp: <backbone>_jbu_stack_cocostuff.ckpt, under "state_dict"',
        left_out=("model.0.", "downsampler.", "scale_net."),
        arguments=lambda tensors: {"layer_norm": "model.1.norm.weight" in tensors},
    ),
    "loftup": Peer(
        LoftUp,
        takes_channels=True,
        licence="MIT",
        weights="haiwen/loftup-dinov2s and others on the Hugging Face hub: pytorch_model.bin",
        chunks=True,
    ),
    "jafar": Peer(
        JAFAR,
        takes_channels=True,
        licence="Apache-2.0",
        weights='release "Weights" of github.com/PaulCouairon/JAFAR: <backbone>.pth, under "jafar"',
        arguments=lambda tensors: {"width": len(tensors["image_encoder.0.weight"])},
        chunks=True,
    ),
    "anyup": Peer(
        AnyUp,
        licence="CC-BY-4.0",
        weights='releases of github.com/wimmerth/anyup: anyup_paper.pth, anyup_multi_backbone.pth; torch.hub "anyup"',
        arguments=lambda tensors: {"width": len(tensors["image_encoder.0.weight"])},
        chunks=True,
    ),
    "naf": Peer(
        NAF,
        licence="Apache-2.0",
        weights='release "model" of github.com/valeoai/NAF: naf_release.pth; torch.hub "naf"',
        arguments=lambda tensors: {"width": 2 * len(tensors["image_encoder.encoder.0.weight"])},
    ),
}
"""Peers by name on the command line."""


def load_peer(
    name: str, *, channels: int, weights: str | Path | None = None, query_chunk: int | None = None
) -> FeatureUpsampler:
    """
    Make a published upsampler, in evaluation mode.

    Args:
        name: one of `PEERS`.
        channels: C, the channels of the backbone's features.
        weights: a .safetensors file with its tensors under the published names, or a folder with exactly one. None:
            random weights, only useful for measuring costs; nearest and bilinear have no weights.
        query_chunk: number of positions per attention chunk, to save memory; see `JAFAR`.
    Raises:
        ValueError: the name is unknown, the method has no weights, or the tensors do not match.
        FileNotFoundError: there is no such file, or not exactly one .safetensors file in the folder.
    """
    if name not in PEERS:
        raise ValueError(f"`name` must be one of {tuple(PEERS)}, got {name!r}.")
    peer = PEERS[name]
    options: dict = {"channels": channels} if peer.takes_channels else {}
    if peer.chunks:
        options["query_chunk"] = query_chunk
    if weights is None:
        return peer.cls(**options).eval()
    if not peer.licence:
        raise ValueError(f"`weights` must not be given for {name}, which has none, got {weights}.")
    tensors = _published_tensors(peer, _one_file(Path(weights)))
    try:
        options |= peer.arguments(tensors)
    except KeyError as error:
        raise ValueError(f"`weights` must hold the tensors of {name}, got no {error} in {weights}.") from None
    model = peer.cls(**options)
    if problems := name_differences(tensors, model.state_dict()):
        raise ValueError(f"`weights` must hold the tensors of {name} for this backbone, got {weights}: {problems}.")
    model.load_state_dict(tensors)
    return model.eval()


def _one_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise FileNotFoundError(f"`weights` must be a file or a folder with one .safetensors file, got {path}.")
    return files[0]


def _published_tensors(peer: Peer, path: Path) -> StateDict:
    tensors = {name.removeprefix(peer.prefix): tensor for name, tensor in load_safetensors(path).items()}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(peer.left_out or ("\0",))}
