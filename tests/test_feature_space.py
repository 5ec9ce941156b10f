"""Backbones: which features they make, and that they make them as timm does."""

import re

import pytest
import torch
from transformers import (
    AutoModel,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTModel,
)

from tests.components import smooth_images
from tests.feature_parts import (
    WIDTH,
    make_dinov2,
    make_dinov2_with_registers,
    make_dinov3,
    make_feature_upsampler,
)
from uplift_diffusers import FeatureBackbone, FeatureSpace, UPLiFTModel
from uplift_diffusers.feature_space import resize_bilinear
from uplift_diffusers.models.conversion import CONFIGS

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


VIT = {"embed_dim": WIDTH, "depth": 2, "num_heads": 2, "init_values": 1.0, "dynamic_img_size": True}


def timm_wrapper(architecture="vit_small_patch14_dinov2", model_args=VIT):
    pytest.importorskip("timm", reason="timm, which is compared with, is not installed")
    torch.manual_seed(0)
    return TimmWrapperModel(TimmWrapperConfig(architecture=architecture, model_args=dict(model_args))).eval()


def dinov2_of_timm(timm_model, image_size):
    """The Dinov2Model of transformers with the weights of a vision transformer of timm."""
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, image_size=image_size, patch_size=14
        )
    )
    weights = timm_model.state_dict()
    renamed = {
        "embeddings.cls_token": weights["cls_token"],
        "embeddings.position_embeddings": weights["pos_embed"],
        "embeddings.mask_token": torch.zeros(1, WIDTH),
    }
    for name in model.state_dict():
        if name in renamed:
            continue
        # Attention is named q_proj, k_proj, v_proj, o_proj in transformers 5, query, key, value, dense before it.
        part, kind = name.rsplit(".", 1)
        part = part.replace("embeddings.patch_embeddings.projection", "patch_embed.proj").replace("layernorm", "norm")
        part = re.sub(r"encoder\.layer\.(\d+)\.", r"blocks.\1.", part)
        part = re.sub(r"attention\.(o_proj|output\.dense)$", "attn.proj", part)
        part = re.sub(r"layer_scale(\d)", r"ls\1", part)
        kind = "gamma" if kind == "lambda1" else kind
        if match := re.search(r"attention\.(?:attention\.)?(q|k|v)\w*$", part):
            packed = weights[f"{part[: match.start()]}attn.qkv.{kind}"]
            renamed[name] = packed.chunk(3)["qkv".index(match[1])]
        else:
            renamed[name] = weights[f"{part}.{kind}"]
    model.load_state_dict(renamed)
    return model.eval()


@pytest.fixture(scope="module")
def image():
    return smooth_images(2, 448, 448)


@pytest.mark.parametrize("size", [448, 336, 224, 518])
def test_dinov2_features_equal_those_of_timm_with_the_same_weights(image, size):
    wrapper = timm_wrapper()
    with torch.no_grad():
        for parameter in wrapper.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    image = resize_bilinear(image, (size, size))
    with torch.no_grad():
        tokens = wrapper.timm_model.forward_features((image - IMAGENET_MEAN) / IMAGENET_STD)
    expected = tokens[:, 1:].transpose(1, 2).unflatten(2, (size // 14, size // 14))

    model = dinov2_of_timm(wrapper.timm_model, image_size=518)
    own = model(pixel_values=(image - IMAGENET_MEAN) / IMAGENET_STD).last_hidden_state
    encoded = FeatureBackbone(model).encode_with_cls(image)
    assert (encoded.features - expected).abs().max() <= 1e-5
    assert (encoded.cls_token - tokens[:, 0]).abs().max() <= 1e-5
    if size < 518:  # what the resampling of positions is good for
        assert (own[:, 1:].transpose(1, 2).flatten(2) - expected.flatten(2)).abs().max() > 1e-2


def test_resampling_positions_is_a_matter_of_one_model_only():
    touched, untouched = make_dinov2(), make_dinov2()
    pixel_values = torch.randn(1, 3, 112, 56, generator=torch.Generator().manual_seed(0))
    before = untouched(pixel_values=pixel_values).last_hidden_state
    FeatureBackbone(touched)
    assert torch.equal(untouched(pixel_values=pixel_values).last_hidden_state, before)
    assert not torch.allclose(touched(pixel_values=pixel_values).last_hidden_state, before, atol=1e-3)


@pytest.mark.parametrize("make", [make_dinov2, make_dinov2_with_registers, make_dinov3])
def test_features_are_the_last_hidden_state_without_cls_and_registers(make):
    model = make()
    patch, prefix = model.config.patch_size, 1 + getattr(model.config, "num_register_tokens", 0)
    image = smooth_images(2, 5 * patch, 3 * patch)
    encoded = FeatureBackbone(model).encode_with_cls(image)
    with torch.no_grad():
        hidden = model(pixel_values=(image - IMAGENET_MEAN) / IMAGENET_STD).last_hidden_state
    assert encoded.features.shape == (2, WIDTH, 5, 3)
    for row, column in [(0, 0), (1, 2), (4, 1)]:
        expected = hidden[:, prefix + 3 * row + column]
        assert torch.equal(encoded.features[:, :, row, column], expected)
    assert torch.equal(encoded.cls_token, hidden[:, 0])


@pytest.mark.parametrize(
    ("architecture", "prefix", "patch"),
    [
        ("vit_small_patch14_dinov2", 1, 14),
        ("vit_small_patch14_reg4_dinov2", 5, 14),
        ("vit_small_plus_patch16_dinov3", 5, 16),
    ],
)
def test_a_timm_model_gives_its_forward_features(architecture, prefix, patch):
    wrapper = timm_wrapper(architecture)
    image = smooth_images(1, 4 * patch, 6 * patch)
    encoded = FeatureBackbone(wrapper).encode_with_cls(image)
    with torch.no_grad():
        tokens = wrapper.timm_model.forward_features((image - IMAGENET_MEAN) / IMAGENET_STD)
    assert torch.equal(encoded.features.flatten(2).transpose(1, 2), tokens[:, prefix:])
    assert torch.equal(encoded.cls_token, tokens[:, 0])


def test_a_timm_model_of_convolutions_gives_its_last_map_normalised_by_its_own_mean():
    model_args = {"features_only": True, "out_indices": [-1], "output_stride": 16}
    wrapper = timm_wrapper("tf_efficientnet_lite0", model_args)
    image = smooth_images(1, 64, 96)
    encoded = FeatureBackbone(wrapper).encode_with_cls(image)
    with torch.no_grad():
        expected = wrapper.timm_model((image - 0.5) / 0.5)[-1]
    assert torch.equal(encoded.features, expected)
    assert encoded.cls_token is None
    assert FeatureSpace.of(wrapper).patch_size == 16


SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "strict_img_size": False}


@pytest.mark.parametrize(
    ("architecture", "model_args", "channels"),
    [
        ("swin_tiny_patch4_window7_224", SWIN, 64),
        ("swin_tiny_patch4_window7_224", {**SWIN, "features_only": True}, 64),
        ("vit_tiny_r_s16_p8_224", {"depth": 1, "dynamic_img_size": True}, 192),
        ("resnet18", {}, 512),
    ],
)
def test_features_of_hierarchical_networks_have_their_channels_first(architecture, model_args, channels):
    wrapper = timm_wrapper(architecture, model_args)
    backbone = FeatureBackbone(wrapper)
    assert (backbone.space.channels, backbone.space.patch_size) == (channels, 32)
    assert backbone.encode(smooth_images(2, 192, 256)).shape == (2, channels, 6, 8)


def test_a_timm_model_of_one_size_is_refused_if_it_has_no_other():
    with pytest.raises(ValueError, match=r"^`model` must take images of any size, got a timm model of one size"):
        FeatureBackbone(timm_wrapper("cait_xxs24_224", {"embed_dim": 8, "depth": 1, "num_heads": 2}))


def test_a_timm_network_of_convolutions_is_loaded_as_it_is(tmp_path):
    wrapper = timm_wrapper("resnet18", {"channels": (8, 8, 8, 8)})
    wrapper.save_pretrained(tmp_path)
    image = smooth_images(1, 64, 96)
    loaded = FeatureBackbone.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(image), FeatureBackbone(wrapper).encode(image))


def test_each_side_goes_to_the_nearest_multiple_of_the_patch():
    backbone = FeatureBackbone(make_dinov2())
    assert backbone.encode(smooth_images(1, 20, 50)).shape == (1, WIDTH, 1, 4)
    assert backbone.encode(smooth_images(1, 22, 34)).shape == (1, WIDTH, 2, 2)
    image = smooth_images(1, 37, 44)
    expected = torch.nn.functional.interpolate(image, size=(42, 42), mode="bilinear", antialias=True)
    assert torch.equal(backbone.resize(image), expected)


def test_normalisation_can_be_declared():
    model, image = make_dinov2(), smooth_images(1, 28, 42)
    own = FeatureBackbone(model).encode(image)
    half = FeatureBackbone(model, image_normalization="half").encode(image)
    assert not torch.allclose(own, half, atol=1e-2)
    # What `half` makes of an image is what ImageNet's makes of the image with these pixels.
    same = ((image - 0.5) / 0.5) * IMAGENET_STD + IMAGENET_MEAN
    assert (FeatureBackbone(model).encode(same) - half).abs().max() <= 1e-4


def test_known_backbones_have_the_names_of_the_published_upsamplers():
    with torch.device("meta"):
        dinov2 = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518))
        dinov3 = DINOv3ViTModel(
            DINOv3ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, use_gated_mlp=True)
        )
        ungated = DINOv3ViTModel(DINOv3ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536))
    for model, name in ((dinov2, "dinov2-s14"), (dinov3, "dinov3-splus16")):
        space = FeatureSpace.of(model)
        assert space.name == name
        with torch.device("meta"):
            space.check_upsampler(UPLiFTModel(**CONFIGS[name]))
    assert FeatureSpace.of(ungated).name == "dinov3-s16"


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("vit_small_patch14_dinov2", "dinov2-s14"), ("vit_small_plus_patch16_dinov3.lvd1689m", "dinov3-splus16")],
)
def test_timm_and_transformers_name_the_same_features_alike(architecture, name):
    pytest.importorskip("timm", reason="timm is not installed")
    model_args = {"dynamic_img_size": True}
    with torch.device("meta"):
        model = TimmWrapperModel(TimmWrapperConfig(architecture=architecture, model_args=model_args))
    assert FeatureSpace.of(model) == FeatureSpace(name, 384, int(name[-2:]))


def test_a_timm_model_of_changed_shape_has_another_name():
    assert FeatureSpace.of(timm_wrapper()).name == f"vit_small_patch14_dinov2-c{WIDTH}-p14"


def test_a_backbone_of_another_width_is_refused():
    backbone, other = make_dinov2(), make_dinov3()
    expected = (
        "`upsampler` must have been trained for the backbone's features: it was trained for 'dinov3_vit-c32-l2-p16' "
        "(32 channels, patch size 16), got 'dinov2-c32-l2-p14' (32 channels, patch size 14)."
    )
    with pytest.raises(ValueError, match=rf"^{re.escape(expected)}$"):
        FeatureSpace.of(backbone).check_upsampler(make_feature_upsampler(other))


def test_features_of_the_same_shape_can_be_declared_the_same():
    model = make_dinov2()
    upsampler = make_feature_upsampler(model)
    upsampler.register_to_config(latent_space="mine")
    with pytest.raises(ValueError, match=r"under another name, pass feature_space='mine'\.$"):
        FeatureSpace.of(model).check_upsampler(upsampler)
    FeatureSpace.of(model, "mine").check_upsampler(upsampler)


@pytest.mark.parametrize(
    "model",
    [
        torch.nn.Linear(2, 2),
        ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)),
        Dinov2ForImageClassification(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)),
        Dinov2Backbone(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_another_kind_of_model_is_refused(model):
    with pytest.raises(TypeError, match=rf"^`backbone` must be a Dinov2Model, .*, got {type(model).__name__}\. "):
        FeatureBackbone(model)


def test_bad_input_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"^`image` must be at least one patch of 14 x 14 pixels, got 13 x 40\. "):
        FeatureBackbone(make_dinov2()).encode(smooth_images(1, 13, 40))
    with pytest.raises(ValueError, match=r"^`image_normalization` must be one of \('imagenet', .* or None, got 'no'"):
        FeatureBackbone(make_dinov2(), image_normalization="no")


def test_a_timm_model_of_one_size_is_refused():
    with pytest.raises(ValueError, match=r"^`model` must take images of any size, got a timm model of one size"):
        FeatureBackbone(timm_wrapper(model_args={**VIT, "dynamic_img_size": False}))


def test_a_saved_backbone_loads_from_its_folder(tmp_path):
    model, image = make_dinov2(), smooth_images(1, 42, 28)
    model.save_pretrained(tmp_path)
    loaded = FeatureBackbone.from_pretrained(tmp_path, "mine", dtype=torch.bfloat16)
    assert loaded.space == FeatureSpace("mine", WIDTH, 14)
    assert loaded.encode(image).dtype == torch.bfloat16
    expected = FeatureBackbone(model).encode(image)
    assert torch.equal(FeatureBackbone(AutoModel.from_pretrained(tmp_path)).encode(image), expected)


def test_a_timm_backbone_is_loaded_for_any_size(tmp_path):
    wrapper = timm_wrapper()
    expected = FeatureBackbone(wrapper).encode(smooth_images(1, 42, 28))
    del wrapper.config.model_args["dynamic_img_size"]
    wrapper.save_pretrained(tmp_path)
    actual = FeatureBackbone.from_pretrained(tmp_path).encode(smooth_images(1, 42, 28))
    assert torch.equal(actual, expected)


def test_another_kind_of_model_is_refused_before_its_weights_are_loaded(tmp_path):
    ViTConfig(hidden_size=8).save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(TypeError, match=r"must hold a model of type dinov2, .* or timm_wrapper, got vit\.$"):
        FeatureBackbone.from_pretrained(tmp_path)
