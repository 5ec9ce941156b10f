"""Small real vision transformers, seeded, and an upsampler of their features."""

import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from uplift_diffusers import FeatureSpace, UPLiFTFeaturePipeline, UPLiFTModel

WIDTH = 32
_SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_dinov2(seed: int = 0) -> Dinov2Model:
    """Patch 14, positions of 70 px."""
    torch.manual_seed(seed)
    return _randomized(Dinov2Model(Dinov2Config(**_SHAPE, image_size=70, patch_size=14)))


def make_dinov2_with_registers() -> Dinov2WithRegistersModel:
    torch.manual_seed(1)
    config = Dinov2WithRegistersConfig(**_SHAPE, image_size=70, patch_size=14, num_register_tokens=4)
    return _randomized(Dinov2WithRegistersModel(config))


def make_dinov3() -> DINOv3ViTModel:
    """Patch 16, four registers, rotary positions."""
    torch.manual_seed(2)
    config = DINOv3ViTConfig(**_SHAPE, intermediate_size=64, patch_size=16, num_register_tokens=4)
    return _randomized(DINOv3ViTModel(config))


@torch.no_grad()
def _randomized(model):
    """transformers initialises so small that neither positions nor layers would be seen in the output."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_feature_upsampler(backbone=None, **settings) -> UPLiFTModel:
    """For the features of `backbone`, by default of `make_dinov2`; its batch norms have statistics."""
    space = FeatureSpace.of(make_dinov2() if backbone is None else backbone)
    torch.manual_seed(3)
    model = UPLiFTModel(
        latent_channels=space.channels,
        spatial_factor=space.patch_size,
        latent_space=space.name,
        encoder_spatial_factor=16,
        encoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=1,
        image_normalization="imagenet",
        decoder_channels=20,
        decoder_layers=(1, 1),
        decoder_convs_per_block=2,
        refiner_layers=0,
        noise_channels=0,
        norm_type="batch_norm",
        **settings,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def make_feature_pipeline() -> UPLiFTFeaturePipeline:
    return UPLiFTFeaturePipeline(backbone=make_dinov2(), upsampler=make_feature_upsampler())
