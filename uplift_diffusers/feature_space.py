"""FeatureSpace describes a vision transformer's features; FeatureBackbone runs one on images of any size."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ModelMixin

# transformers is imported where a model is loaded: its TimmWrapperModel imports timm, which takes half a second.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODELS = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "timm_wrapper": "TimmWrapperModel",
}
"""Supported classes of transformers, by model type."""

KNOWN_SPACES = {
    ("dinov2", 384, 12, 14, False): "dinov2-s14",
    ("dinov2", 768, 12, 14, False): "dinov2-b14",
    ("dinov2", 1024, 24, 14, False): "dinov2-l14",
    ("dinov2_with_registers", 384, 12, 14, False): "dinov2-reg-s14",
    ("dinov2_with_registers", 768, 12, 14, False): "dinov2-reg-b14",
    ("dinov2_with_registers", 1024, 24, 14, False): "dinov2-reg-l14",
    ("dinov3_vit", 384, 12, 16, False): "dinov3-s16",
    ("dinov3_vit", 384, 12, 16, True): "dinov3-splus16",
    ("dinov3_vit", 768, 12, 16, False): "dinov3-b16",
    ("dinov3_vit", 1024, 24, 16, False): "dinov3-l16",
}
"""Names of feature spaces by model type, width, layers, patch size, and whether the MLP is gated."""

KNOWN_ARCHITECTURES = {
    "vit_small_patch14_dinov2": "dinov2-s14",
    "vit_base_patch14_dinov2": "dinov2-b14",
    "vit_large_patch14_dinov2": "dinov2-l14",
    "vit_small_patch14_reg4_dinov2": "dinov2-reg-s14",
    "vit_base_patch14_reg4_dinov2": "dinov2-reg-b14",
    "vit_large_patch14_reg4_dinov2": "dinov2-reg-l14",
    "vit_small_patch16_dinov3": "dinov3-s16",
    "vit_small_plus_patch16_dinov3": "dinov3-splus16",
    "vit_base_patch16_dinov3": "dinov3-b16",
    "vit_large_patch16_dinov3": "dinov3-l16",
}
"""Names of feature spaces by timm's architecture name."""

IMAGE_NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "sat493m": ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
}
"""Mean and standard deviation of a backbone's input; `sat493m` is for DINOv3 trained on satellite images."""


@dataclass(frozen=True)
class FeatureSpace:
    """
    The features of a vision backbone.

    Args:
        name: the identity that an upsampler's `config.latent_space` is compared with.
        channels: channels of the features.
        patch_size: image pixels per feature position, along each axis.
    """

    name: str
    channels: int
    patch_size: int

    @classmethod
    def of(cls, model: "PreTrainedModel", name: str | None = None) -> "FeatureSpace":
        """
        The feature space of `model`.

        Args:
            model: as for [`FeatureBackbone`].
            name: which space the features belong to, if the config does not determine it: for a fine-tuned backbone,
                or one that is not in the tables above.
        Raises:
            TypeError: `model` is of another class.
        """
        network: Any = _supported(model)
        config = network.config
        if config.model_type == "timm_wrapper":
            architecture = config.architecture.partition(".")[0]
            is_changed = bool(set(config.model_args or {}) - {"dynamic_img_size"})
            info = network.timm_model.feature_info
            if network.features_only:
                channels, patch_size = info.channels()[-1], info.reduction()[-1]
            else:  # the patches of a hybrid or hierarchical network are not those of its `patch_embed`
                channels, patch_size = network.timm_model.num_features, info[-1]["reduction"]
            known = None if is_changed else KNOWN_ARCHITECTURES.get(architecture)
            known = known or f"{architecture}-c{channels}-p{patch_size}"
        else:
            channels, layers, patch_size = config.hidden_size, config.num_hidden_layers, config.patch_size
            gated = getattr(config, "use_gated_mlp", getattr(config, "use_swiglu_ffn", False))
            known = KNOWN_SPACES.get(
                (config.model_type, channels, layers, patch_size, gated),
                f"{config.model_type}-c{channels}-l{layers}-p{patch_size}",
            )
        return cls(name or known, channels, patch_size)

    def check_upsampler(self, upsampler: ModelMixin) -> None:
        """Raise ValueError unless `upsampler` was trained for this space."""
        config = upsampler.config
        wanted = (config.latent_space, config.latent_channels, config.spatial_factor)
        if wanted == (self.name, self.channels, self.patch_size):
            return
        sentence = (
            "`upsampler` must have been trained for the backbone's features: it was trained for "
            f"{wanted[0]!r} ({wanted[1]} channels, patch size {wanted[2]}), got "
            f"{self.name!r} ({self.channels} channels, patch size {self.patch_size})."
        )
        if wanted[1:] == (self.channels, self.patch_size):
            sentence += f" If these are the same features under another name, pass feature_space={wanted[0]!r}."
        raise ValueError(sentence)


class EncodedImage(NamedTuple):
    """
    The output of a backbone.

    Args:
        features: (B, C, h, w), the last hidden state after the final norm.
        cls_token: (B, C), or None if the backbone has none.
    """

    features: torch.Tensor
    cls_token: torch.Tensor | None


class FeatureBackbone:
    """
    Runs one frozen vision backbone.

    A Dinov2Model interpolates its position embeddings without antialiasing, but timm and the published upsamplers use
    it; the difference is 7 % of the embeddings at 448 px and 34 % at 224 px. So this object, `model`, is modified to
    interpolate as timm does. The other classes already do, or have rotary embeddings.

    Args:
        model: a Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel or TimmWrapperModel, put into evaluation mode.
        feature_space: which feature space the features belong to, see [`FeatureSpace.of`].
        image_normalization: one of `IMAGE_NORMALIZATIONS`; by default that of timm's configuration, or ImageNet's for
            the DINO models of transformers.
    Raises:
        TypeError: `model` is of another class.
        ValueError: the normalisation is unknown, or a timm model takes images of one size only.
    """

    def __init__(
        self, model: "PreTrainedModel", feature_space: str | None = None, *, image_normalization: str | None = None
    ):
        self.space = FeatureSpace.of(model, feature_space)
        if image_normalization is not None and image_normalization not in IMAGE_NORMALIZATIONS:
            raise ValueError(
                f"`image_normalization` must be one of {tuple(IMAGE_NORMALIZATIONS)} or None, "
                f"got {image_normalization!r}."
            )
        network: Any = _supported(model)
        self.image_mean, self.image_std = IMAGE_NORMALIZATIONS[image_normalization or "imagenet"]
        self.has_cls_token, self.num_prefix_tokens = True, 1 + getattr(network.config, "num_register_tokens", 0)
        self.channels_last = False  # whether its maps are (B, h, w, C), as Swin's are
        if network.config.model_type == "timm_wrapper":
            timm_model = network.timm_model
            if image_normalization is None:
                own = getattr(network.config, "pretrained_cfg", None) or timm_model.pretrained_cfg
                self.image_mean, self.image_std = tuple(own["mean"]), tuple(own["std"])
            if any(getattr(module, "strict_img_size", False) for module in timm_model.modules()):
                raise ValueError(
                    "`model` must take images of any size, got a timm model of one size. Load it with "
                    "FeatureBackbone.from_pretrained, or with model_args={'dynamic_img_size': True} in its config, "
                    "if its architecture takes that."
                )
            self.channels_last = getattr(timm_model, "output_fmt", None) == "NHWC"
            self.has_cls_token = getattr(timm_model, "cls_token", None) is not None
            self.num_prefix_tokens = getattr(timm_model, "num_prefix_tokens", 0)
        if network.config.model_type == "dinov2":
            network.embeddings.interpolate_pos_encoding = MethodType(_antialiased_positions, network.embeddings)
        self.model: Any = model.eval()  # a PreTrainedModel, of which transformers hides what `to` takes

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        feature_space: str | None = None,
        *,
        image_normalization: str | None = None,
        subfolder: str = "",
        dtype: torch.dtype = torch.float32,
    ) -> "FeatureBackbone":
        """
        Load a backbone from a folder or the hub: a transformers model, or a timm model of the hub's `timm/...`.

        Weights are read from safetensors only, and no code that lies beside them is run.

        Raises:
            TypeError: the model is of another class; raised before its weights are loaded.
            ValueError: the weights lack a tensor, or have one of another shape.
            OSError: there is no such model.
        """
        from transformers import AutoConfig, AutoModel

        where = {"subfolder": subfolder, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(path, **where)
        if config.model_type not in MODELS:
            raise TypeError(f"`{path}` must hold a model of type {_either(MODELS)}, got {config.model_type}.")
        own_args = getattr(config, "model_args", None) or {}
        if config.model_type == "timm_wrapper" and not own_args.get("features_only"):
            config.model_args = {**own_args, "dynamic_img_size": True}
        settings: dict[str, Any] = {
            "config": config,
            "dtype": dtype,
            "use_safetensors": True,
            "ignore_mismatched_sizes": True,  # whose names transformers would not say
            "output_loading_info": True,
            **where,
        }
        # AutoModel, since the features of AutoBackbone are the same and transformers 5 cannot load it from a folder.
        try:
            model, told = AutoModel.from_pretrained(path, **settings)
        except TypeError as error:
            if "'dynamic_img_size'" not in str(error):
                raise
            config.model_args = own_args  # convolutions take any size without it
            model, told = AutoModel.from_pretrained(path, **settings)
        missing = sorted(name for name in told["missing_keys"] if not name.endswith("mask_token"))  # for training only
        if missing:
            raise ValueError(f"the weights of `{path}` must have all tensors of the network, got no {missing[0]}.")
        for entry in told["mismatched_keys"]:  # transformers 4 gives names, 5 names and shapes
            name = entry if isinstance(entry, str) else entry[0]
            raise ValueError(f"{name} of `{path}` must be of the shape that the configuration gives.")
        return cls(model, feature_space, image_normalization=image_normalization)

    def resize(self, image: torch.Tensor) -> torch.Tensor:
        """
        Resize (B, 3, H, W) so that each side is the nearest multiple of the patch size, bilinear and antialiased.

        Raises:
            ValueError: the image is smaller than a patch.
        """
        patch = self.space.patch_size
        height, width = image.shape[2:]
        if min(height, width) < patch:
            raise ValueError(
                f"`image` must be at least one patch of {patch} x {patch} pixels, got {height} x {width}. "
                "Resize it first."
            )
        return resize_bilinear(image, (round(height / patch) * patch, round(width / patch) * patch))

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """
        Encode an image to features.

        Args:
            image: (B, 3, H, W) float in [0, 1], of at least one patch; see `resize`.
        Returns:
            (B, C, h, w), dtype and device of the model, without gradient: the last hidden state after the final norm,
            without CLS and register tokens.
        Raises:
            ValueError: the image is smaller than a patch.
        """
        return self.encode_with_cls(image).features

    @torch.no_grad()
    def encode_with_cls(self, image: torch.Tensor) -> EncodedImage:
        """As `encode`, with the CLS token."""
        image = self.resize(image)
        mean, std = (image.new_tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        pixel_values = ((image - mean) / std).to(self.model.dtype)
        hidden = self.model(pixel_values=pixel_values).last_hidden_state
        if isinstance(hidden, (list, tuple)):  # timm's `features_only`, one map for each of `out_indices`
            hidden = hidden[-1]
        if hidden.ndim == 4:
            return EncodedImage(hidden.movedim(-1, 1) if self.channels_last else hidden, None)
        cls_token = hidden[:, 0] if self.has_cls_token else None
        height, width = (size // self.space.patch_size for size in image.shape[2:])
        tokens = hidden[:, self.num_prefix_tokens :]  # (B, h * w, C)
        return EncodedImage(tokens.transpose(1, 2).unflatten(2, (height, width)), cls_token)


def resize_bilinear(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (B, C, H, W) to `size` (height, width), bilinear, antialiased when downsampling."""
    if tuple(image.shape[2:]) == tuple(size):
        return image
    # In float32: on a CPU there is no antialiasing in bfloat16.
    return F.interpolate(image.float(), size=size, mode="bilinear", antialias=True).to(image.dtype)


def _supported(model: "PreTrainedModel") -> "PreTrainedModel":
    """The original of a compiled network. Raises TypeError unless it is of a supported class."""
    network = getattr(model, "_orig_mod", model)
    if not any(kind.__name__ in MODELS.values() for kind in type(network).__mro__):
        raise TypeError(
            f"`backbone` must be a {_either(MODELS.values())}, got {type(network).__name__}. "
            "Load it with transformers' AutoModel."
        )
    return network


def _either(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"


def _antialiased_positions(embeddings: Any, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    The position embeddings of a Dinov2Model for an image of `height` by `width` pixels, in timm's way.

    Args:
        embeddings: a Dinov2Embeddings.
        tokens: (B, 1 + h * w, C), not looked at.
    Returns:
        (1, 1 + h * w, C).
    """
    cls_position, positions = embeddings.position_embeddings.split(
        [1, embeddings.position_embeddings.shape[1] - 1], dim=1
    )
    rows, columns = embeddings.patch_embeddings.patch_size
    edge = round(positions.shape[1] ** 0.5)
    grid = positions.transpose(1, 2).unflatten(2, (edge, edge))  # (1, C, edge, edge)
    size = (height // rows, width // columns)
    if size == (edge, edge):
        return embeddings.position_embeddings
    grid = F.interpolate(grid.float(), size=size, mode="bicubic", antialias=True).to(grid.dtype)
    return torch.cat([cls_position, grid.flatten(2).transpose(1, 2)], dim=1)
