"""UPLiFTFeaturePipeline: an image in, the features of a vision transformer at pixel resolution out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import is_compiled_module
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from uplift_diffusers.arguments import read_whole_number
from uplift_diffusers.feature_space import FeatureBackbone, resize_bilinear
from uplift_diffusers.images.convert import ImageInput, read_batch
from uplift_diffusers.models.upsampler import UPLiFTModel
from uplift_diffusers.pipelines.upscale_stage import Progress, TileSize, read_tile_size
from uplift_diffusers.scale import size_of
from uplift_diffusers.tiling import iterate_tiles, split_into_tiles

OUTPUT_TYPES = ("pt", "np", "pil")


@dataclass
class UPLiFTFeatureOutput(BaseOutput):
    """
    Output of [`UPLiFTFeaturePipeline`].

    Args:
        features: upsampled features, or the output of `head`. `"pt"`: (B, C, H, W) tensor in the dtype of the
            upsampler or the head; `"np"`: (B, H, W, C) float32; `"pil"`: a list of images.
        backbone_features: the backbone's features, in the same layout: `"pt"` (B, C, h, w), `"np"` (B, h, w, C),
            `"pil"` a list of images of the same size as `features`, with the same colour mapping.
        cls_token: (B, C), or None if the backbone has none; a tensor, or an array with `"np"`.
    """

    features: torch.Tensor | np.ndarray | list[Image.Image]
    backbone_features: torch.Tensor | np.ndarray | list[Image.Image]
    cls_token: torch.Tensor | np.ndarray | None = None


class AffineMap(NamedTuple):
    """
    An affine function of the features at each position.

    Args:
        weight: (K, C).
        bias: (K,), or None for zeros.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, head: nn.Module, channels: int) -> "AffineMap":
        """
        The function that a probe computes.

        Raises:
            TypeError: `head` is not a Linear or 1x1 Conv2d. Only with these is the result exact when it is computed
                tile by tile and then resized.
            ValueError: `head` takes another number of channels.
        """
        is_spatial = isinstance(head, nn.Conv2d) and (head.kernel_size, head.stride, head.padding, head.groups) != (
            (1, 1),
            (1, 1),
            (0, 0),
            1,
        )
        if is_spatial or not isinstance(head, nn.Linear | nn.Conv2d):
            raise TypeError(
                f"`head` must be a torch.nn.Linear or a 1x1 torch.nn.Conv2d, got {head}. Apply another one to the "
                "features that are returned without `head`."
            )
        if head.weight.shape[1] != channels:
            raise ValueError(f"`head` must take the {channels} channels of the features, got {head.weight.shape[1]}.")
        return cls(head.weight.flatten(1), head.bias)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, K, H, W), dtype of the weight."""
        weight = self.weight[:, :, None, None].to(features.device)
        bias = None if self.bias is None else self.bias.to(features.device)
        return F.conv2d(features.to(weight.dtype), weight, bias)


class UPLiFTFeaturePipeline(DiffusionPipeline):
    r"""
    Upsamples the features of a frozen vision transformer to pixel resolution, with the image as guide.

    Args:
        backbone ([`~transformers.Dinov2Model`], [`~transformers.Dinov2WithRegistersModel`],
            [`~transformers.DINOv3ViTModel`] or [`~transformers.TimmWrapperModel`]): computes the features. A
            Dinov2Model is modified to resample its position embeddings as timm does, see [`FeatureBackbone`].
        upsampler ([`UPLiFTModel`]): trained for the backbone's features.
        feature_space (`str`, *optional*): which feature space the backbone's features belong to, if its
            config does not determine it (see [`FeatureSpace`]).
        image_normalization (`str`, *optional*): normalization of the backbone's input: `"imagenet"`, `"half"` or
            `"sat493m"`; by default that of the backbone.
    Raises:
        TypeError: `backbone` is of another class.
        ValueError: `upsampler` was not trained for the features of `backbone`.

    Example:
        ```py
        >>> from PIL import Image
        >>> from transformers import AutoModel
        >>> from uplift_diffusers import UPLiFTFeaturePipeline, UPLiFTModel

        >>> backbone = AutoModel.from_pretrained("facebook/dinov2-small")
        >>> upsampler = UPLiFTModel.from_pretrained("UPLiFT-upsampler/uplift_dinov2-s14")
        >>> pipe = UPLiFTFeaturePipeline(backbone=backbone, upsampler=upsampler)

        >>> features = pipe(Image.open("photo.jpg")).features  # (1, 384, height, width)
        ```
    """

    config: Any  # diffusers' FrozenDict: its entries are attributes, too

    model_cpu_offload_seq = "backbone->upsampler"

    def __init__(
        self,
        backbone: PreTrainedModel,
        upsampler: UPLiFTModel,
        feature_space: str | None = None,
        image_normalization: str | None = None,
    ):
        super().__init__()
        space = FeatureBackbone(backbone, feature_space, image_normalization=image_normalization).space
        space.check_upsampler(upsampler)
        self.register_modules(backbone=backbone, upsampler=upsampler)
        self.register_to_config(feature_space=feature_space, image_normalization=image_normalization)
        self.image_processor = VaeImageProcessor(do_normalize=False)

    @property
    def feature_backbone(self) -> FeatureBackbone:
        """Runs the pipeline's current backbone."""
        return FeatureBackbone(
            self.backbone, self.config.feature_space, image_normalization=self.config.image_normalization
        )

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        output_size: str | tuple[int, int] | None = "pixels",
        num_steps: int | None = None,
        head: nn.Linear | nn.Conv2d | None = None,
        tile_size: TileSize = "auto",
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_progress: Callable[[int, int], None] | None = None,
    ) -> UPLiFTFeatureOutput | tuple:
        r"""
        Compute features at pixel resolution.

        Args:
            image: PIL, array or tensor, or a list of images of one size; at least one patch. For the backbone, each
                side is resized to the nearest multiple of the patch size.
            output_size: `"pixels"`, the height and width of `image`; a (height, width); or None: the steps' output,
                `2**num_steps` times the backbone's resolution. Otherwise, that output is resized, bilinear and
                antialiased.
            num_steps (`int`, *optional*): number of 2x steps, at least 1. By default the fewest that reach
                `output_size`, at most those that reach pixel resolution: 4 for patches of 14 and 16 pixels.
            head (`torch.nn.Linear` or 1x1 `torch.nn.Conv2d`, *optional*): a probe that is applied to the features,
                tile by tile if there are tiles, to avoid holding all features in memory.
            tile_size (`int`, *optional*): edge of the tiles in pixels of the image, which bounds memory and does
                not change the result; `"auto"` is 768, None disables tiling. The backbone always gets the whole image.
            output_type (`str`): `"pt"`, tensors; `"np"`, arrays with the channels last; `"pil"`, images of the first
                three principal components, fitted on the backbone's features of all images of the call.
            return_dict (`bool`): return a [`UPLiFTFeatureOutput`] instead of a tuple.
            callback_on_progress: called with the number of parts done and the total, after
                every 2x step of every tile. An exception raised in it ends the call.
        Returns:
            The upsampled features, those of the backbone, and its CLS token.
        Raises:
            TypeError, ValueError: an argument is invalid, which is raised before any work is done; or the features are
                not finite.
        """
        # 1. Check inputs
        backbone, device = self.feature_backbone, self._execution_device
        backbone.space.check_upsampler(self.upsampler)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be 'pt', 'np' or 'pil', got {output_type!r}.")
        edge_px = read_tile_size(tile_size)
        project = None if head is None else AffineMap.of(head, backbone.space.channels)
        if project is not None and output_type == "pil":
            raise ValueError("`head` must be None for `output_type` 'pil', which shows the features themselves.")
        image = read_batch(image)
        is_pixels = isinstance(output_size, str) and output_size == "pixels"
        size = size_of(image) if is_pixels else _read_size(output_size)
        image = backbone.resize(image)  # (B, 3, p*h, p*w)
        num_steps = _read_num_steps(num_steps, image, patch_size=backbone.space.patch_size, size=size)

        try:
            # 2. Encode
            image = image.to(device)
            tokens, cls_token = backbone.encode_with_cls(image)  # (B, C, h, w), (B, C)
            if output_type == "pil":
                project = principal_components(tokens)

            # 3. Upsample
            features = _upsample(
                tokens.to(self.upsampler.dtype),
                image=image,
                upsampler=self.upsampler,
                num_steps=num_steps,
                project=project,
                tile_size=edge_px,
                callback=callback_on_progress,
            )  # (B, C or K, 2**n * h, 2**n * w)
            features = features if size is None else resize_bilinear(features, size)  # (B, C or K, H, W)
            if not all(extreme.isfinite() for extreme in features.aminmax()):
                raise ValueError(
                    f"`upsampler` must give finite features, got NaN or infinity in {self.upsampler.dtype}. "
                    "Run backbone and upsampler in float32 or bfloat16: pipe.to(torch.bfloat16)."
                )
        finally:
            self.maybe_free_model_hooks()

        # 4. Convert
        if output_type == "np":
            features, tokens = (
                values.float().movedim(1, -1).contiguous().cpu().numpy() for values in (features, tokens)
            )
            cls_token = None if cls_token is None else cls_token.float().cpu().numpy()
        elif output_type == "pil":
            assert project is not None
            tokens = F.interpolate(project(tokens), size=features.shape[2:], mode="nearest")
            postprocess: Callable[..., Any] = self.image_processor.postprocess
            features, tokens = (
                postprocess(values.float().clamp(0, 1), output_type="pil") for values in (features, tokens)
            )
        if not return_dict:
            return features, tokens, cls_token
        return UPLiFTFeatureOutput(features=features, backbone_features=tokens, cls_token=cls_token)


def principal_components(features: torch.Tensor) -> AffineMap:
    """
    An affine map from features to colours: three principal components, scaled from their 1st and 99th percentiles to
    [0, 1].

    Args:
        features: (B, C, h, w) float.
    Returns:
        A map to 3 channels, float32, on the device of `features`. A constant component is mapped to 0.5.
    """
    samples = features.movedim(1, -1).flatten(0, -2).cpu().double()  # (B * h * w, C); float64 is not on every device
    mean = samples.mean(dim=0)
    _, directions = torch.linalg.eigh((samples - mean).T @ (samples - mean))  # ascending
    directions = directions.flip(1).T[:3]  # (3, C)
    directions = F.pad(directions, (0, 0, 0, 3 - len(directions)))
    # An eigenvector's sign is arbitrary: the largest entry is positive.
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    directions = directions * torch.where(largest < 0, -1.0, 1.0)
    values = (samples - mean) @ directions.T
    low, high = values.quantile(torch.tensor([0.01, 0.99], dtype=values.dtype), dim=0)
    is_flat = high - low <= 1e-6 * samples.abs().max()
    scale = torch.where(is_flat, 0.0, 1 / torch.where(is_flat, 1.0, high - low))
    weight = directions * scale[:, None]
    bias = torch.where(is_flat, 0.5, -low * scale) - weight @ mean
    return AffineMap(weight.float().to(features.device), bias.float().to(features.device))


def _upsample(
    tokens: torch.Tensor,
    *,
    image: torch.Tensor,
    upsampler: UPLiFTModel,
    num_steps: int,
    project: AffineMap | None,
    tile_size: int | None,
    callback: Callable[[int, int], None] | None,
) -> torch.Tensor:
    """(B, C, h, w) -> (B, C, 2**num_steps * h, 2**num_steps * w), or `project` of it, tile by tile."""
    if num_steps == 0:
        return tokens if project is None else project(tokens)
    size = size_of(tokens)
    edge = max(size) if tile_size is None else tile_size // upsampler.config.spatial_factor
    progress = Progress(callback, num_steps * sum(map(len, split_into_tiles(size, edge))))
    if tile_size is None and is_compiled_module(upsampler):  # in one piece, as it was compiled
        features = upsampler(tokens, image=image, num_steps=num_steps).sample
        for _ in range(num_steps):
            progress.advance()
        return features if project is None else project(features)
    output = None
    for tile, features in iterate_tiles(
        upsampler,
        tokens,
        image=image,
        num_steps=num_steps,
        tile_size=tile_size or max(image.shape[2:]),
        callback_on_step=progress.advance,
    ):
        features = features if project is None else project(features)
        if tile.shape == (tile.rows.size, tile.columns.size):
            return features
        if output is None:
            output = features.new_empty(*features.shape[:2], tile.rows.size, tile.columns.size)
        output[..., tile.slices[0], tile.slices[1]] = features
    assert output is not None  # there is at least one tile
    return output


def _read_size(output_size: object) -> tuple[int, int] | None:
    """Check `output_size` unless it is "pixels"."""
    if output_size is None:
        return None
    if not isinstance(output_size, (tuple, list)) or len(output_size) != 2:
        raise ValueError(f"`output_size` must be 'pixels', None or a (height, width), got {output_size!r}.")
    height, width = (read_whole_number("output_size", edge) for edge in output_size)
    return height, width


def _read_num_steps(
    num_steps: int | None, image: torch.Tensor, *, patch_size: int, size: tuple[int, int] | None
) -> int:
    """`num_steps`, checked, or the default for an image of whole patches."""
    if num_steps is not None:
        return read_whole_number("num_steps", num_steps)
    pixel_density = (patch_size - 1).bit_length()  # 2**4 >= 14
    if size is None:
        return pixel_density
    wanted = max(edge * patch_size / pixels for edge, pixels in zip(size, image.shape[2:]))  # positions per patch
    return next((steps for steps in range(pixel_density) if 2**steps >= wanted), pixel_density)
