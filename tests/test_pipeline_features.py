"""UPLiFTFeaturePipeline: the published inference path, any size, tiles, heads, and the way through the hub."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from tests.components import OFFLOADS, smooth_images
from tests.feature_parts import (
    WIDTH,
    make_dinov2,
    make_dinov3,
    make_feature_pipeline,
    make_feature_upsampler,
)
from tests.hub_server import HubServer
from tests.reference_weights import reference_state_dict
from uplift_diffusers import UPLiFTFeaturePipeline, UPLiFTModel
from uplift_diffusers.feature_space import FeatureBackbone
from uplift_diffusers.pipelines.features import principal_components

ROOT = Path(__file__).resolve().parent.parent
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@pytest.fixture(scope="module")
def pipe():
    return make_feature_pipeline()


def make_pipeline_of_patch_16():
    backbone = make_dinov3()
    return UPLiFTFeaturePipeline(backbone=backbone, upsampler=make_feature_upsampler(backbone))


def make_head(kind="conv", classes=5):
    torch.manual_seed(7)
    return torch.nn.Conv2d(WIDTH, classes, 1) if kind == "conv" else torch.nn.Linear(WIDTH, classes)


def max_difference(actual, expected):
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


def test_backbone_and_encoder_see_the_same_normalised_image(pipe):
    image = smooth_images(1, 50, 75)
    seen = {}
    hooks = [
        pipe.backbone.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(backbone=kwargs["pixel_values"]), with_kwargs=True
        ),
        pipe.upsampler.encoder.register_forward_pre_hook(lambda module, args: seen.update(encoder=args[0])),
    ]
    pipe(image)
    for hook in hooks:
        hook.remove()
    resized = F.interpolate(image, size=(56, 70), mode="bilinear", antialias=True)
    normalised = (resized - IMAGENET_MEAN) / IMAGENET_STD
    assert max_difference(seen["backbone"], normalised) <= 1e-5
    # Patch 14: the encoder's image has 16 pixels for each patch.
    expected = F.interpolate(normalised, size=(64, 80), mode="bilinear", antialias=True)
    assert max_difference(seen["encoder"], expected) <= 1e-5


def test_patches_of_14_are_upsampled_to_16_positions_and_reduced_with_antialiasing(pipe):
    image = smooth_images(1, 56, 70)
    tokens = FeatureBackbone(pipe.backbone).encode(image)
    with torch.no_grad():
        upsampled = pipe.upsampler(tokens, image=image, num_steps=4).sample
    assert upsampled.shape == (1, WIDTH, 64, 80)
    output = pipe(image)
    assert max_difference(output.backbone_features, tokens) == 0
    expected = F.interpolate(upsampled, size=(56, 70), mode="bilinear", antialias=True)
    assert max_difference(output.features, expected) <= 1e-5
    aliased = F.interpolate(upsampled, size=(56, 70), mode="bilinear")
    assert max_difference(output.features, aliased) > 1e-3
    assert max_difference(pipe(image, output_size=None).features, upsampled) <= 1e-5


def test_patches_of_16_land_on_the_pixels():
    pipe = make_pipeline_of_patch_16()
    image = smooth_images(1, 48, 64)
    output = pipe(image)
    with torch.no_grad():
        expected = pipe.upsampler(FeatureBackbone(pipe.backbone).encode(image), image=image, num_steps=4).sample
    assert max_difference(output.features, expected) <= 1e-5


@pytest.mark.parametrize("size", [(14, 14), (29, 83), (64, 21)])
def test_any_image_size_gives_features_of_that_size(pipe, size):
    output = pipe(smooth_images(2, *size))
    assert output.features.shape == (2, WIDTH, *size)
    assert output.cls_token.shape == (2, WIDTH)


@pytest.mark.parametrize(
    ("output_size", "num_steps", "made", "shape"),
    [
        ((6, 5), None, 1, (6, 5)),
        ((8, 10), None, 1, (8, 10)),
        ((8, 11), None, 2, (8, 11)),
        ((4, 5), None, 0, (4, 5)),
        ((300, 300), None, 4, (300, 300)),
        (None, 2, 2, (16, 20)),
        (None, np.int64(5), 5, (128, 160)),
        ("pixels", 1, 1, (56, 70)),
    ],
)
def test_steps_are_the_fewest_that_reach_the_size(pipe, output_size, num_steps, made, shape):
    image = smooth_images(1, 56, 70)  # 4 x 5 patches
    features = pipe(image, output_size=output_size, num_steps=num_steps).features
    expected = FeatureBackbone(pipe.backbone).encode(image)
    with torch.no_grad():
        if made:
            expected = pipe.upsampler(expected, image=image, num_steps=made).sample
    expected = F.interpolate(expected, size=shape, mode="bilinear", antialias=True)
    assert max_difference(features, expected) <= 1e-5


@pytest.mark.parametrize("make", [make_feature_pipeline, make_pipeline_of_patch_16], ids=["patch14", "patch16"])
def test_tiled_features_equal_the_whole(make):
    pipe = make()
    image = smooth_images(2, 150, 230)
    whole, tiled = (pipe(image, tile_size=tile_size).features for tile_size in (None, 64))
    assert max_difference(tiled, whole) <= 1e-5


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("tile_size", [None, 64])
def test_a_head_by_tiles_equals_the_head_on_the_whole(pipe, kind, tile_size):
    head, image = make_head(kind), smooth_images(1, 150, 110)
    features = pipe(image, tile_size=None).features
    with torch.no_grad():
        expected = head(features) if kind == "conv" else head(features.movedim(1, -1)).movedim(-1, 1)
    assert max_difference(pipe(image, head=head, tile_size=tile_size).features, expected) <= 1e-5


def test_a_head_by_tiles_never_holds_the_features_of_the_whole(pipe):
    """The largest tensor that is made has fewer elements than the features at the size of the steps."""
    image = smooth_images(1, 280, 280)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    sizes = {}
    for name, head in (("features", None), ("head", make_head())):
        with Largest() as largest:
            pipe(image, head=head, tile_size=64)
        sizes[name] = largest.elements
    assert sizes["features"] >= WIDTH * 320 * 320
    assert sizes["head"] < WIDTH * 320 * 320 / 2


def test_progress_is_told_and_can_end_the_call(pipe):
    told = []
    pipe(smooth_images(1, 150, 110), tile_size=64, callback_on_progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 24) for done in range(1, 25)]  # 3 x 2 tiles, 4 steps

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(smooth_images(1, 56, 56), callback_on_progress=stop)


def test_pictures_show_three_components_in_the_colours_of_the_backbones(pipe):
    image = smooth_images(2, 56, 84)
    output = pipe(image, output_type="pil")
    tensors = pipe(image)
    colours = principal_components(tensors.backbone_features)
    for pictures, features, mode in (
        (output.features, tensors.features, "features"),
        (output.backbone_features, tensors.backbone_features, "backbone"),
    ):
        assert [picture.size for picture in pictures] == [(84, 56), (84, 56)]
        values = colours(features).clamp(0, 1)
        values = values if mode == "features" else F.interpolate(values, size=(56, 84), mode="nearest")
        expected = (values * 255).round().permute(0, 2, 3, 1).numpy()
        actual = np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32)
        assert np.abs(actual - expected).max() <= 1


def test_principal_components_are_those_of_a_singular_value_decomposition():
    features = torch.randn(2, 16, 9, 11, generator=torch.Generator().manual_seed(0))
    features = features * torch.linspace(4, 0.1, 16)[:, None, None]
    colours = principal_components(features)(features)
    samples = features.movedim(1, -1).reshape(-1, 16)
    _, _, directions = torch.linalg.svd(samples - samples.mean(0), full_matrices=False)
    projected = (samples - samples.mean(0)) @ directions[:3].T
    actual = colours.movedim(1, -1).reshape(-1, 3)
    for component in range(3):
        correlation = torch.corrcoef(torch.stack([actual[:, component], projected[:, component]]))[0, 1]
        assert abs(correlation) > 0.9999
    low, high = actual.quantile(torch.tensor([0.01, 0.99]), dim=0)
    assert low.abs().max() < 1e-4
    assert (high - 1).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 2, 3, 3)])
def test_features_with_fewer_than_three_components_have_grey_for_the_rest(shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    colours = principal_components(features)(features)
    flat = slice(0, 3) if shape[2] == 1 else slice(2, 3)
    assert (colours[:, flat] - 0.5).abs().max() < 1e-5


def test_arrays_have_their_channels_last(pipe):
    image = smooth_images(1, 28, 45)
    arrays, tensors = pipe(image, output_type="np"), pipe(image)
    np.testing.assert_array_equal(arrays.features, tensors.features.movedim(1, -1).numpy())
    np.testing.assert_array_equal(arrays.backbone_features, tensors.backbone_features.movedim(1, -1).numpy())
    np.testing.assert_array_equal(arrays.cls_token, tensors.cls_token.numpy())
    features, backbone_features, cls_token = pipe(image, return_dict=False)
    assert torch.equal(features, tensors.features)
    assert torch.equal(backbone_features, tensors.backbone_features)
    assert torch.equal(cls_token, tensors.cls_token)


def test_pil_images_and_lists_are_taken(pipe):
    arrays = [np.random.default_rng(seed).integers(0, 256, (30, 44, 3), dtype=np.uint8) for seed in (0, 1)]
    expected = pipe(np.stack(arrays)).features
    actual = pipe([Image.fromarray(array) for array in arrays]).features
    assert torch.equal(actual, expected)
    # A batch differs from its items by the rounding of other kernels only.
    assert max_difference(pipe(arrays[1]).features, expected[1:]) <= 1e-5


def test_half_precision_gives_nearly_the_same():
    image = smooth_images(1, 44, 59)
    half = make_pipeline_of_patch_16().to(torch.bfloat16)(image).features
    assert half.dtype == torch.bfloat16
    expected = make_pipeline_of_patch_16()(image).features
    assert (half.float() - expected).norm() / expected.norm() < 0.05


def test_nothing_is_trained_or_random(pipe):
    image = smooth_images(1, 42, 56)
    pipe.backbone.train()
    try:
        first, second = pipe(image).features, pipe(image).features
    finally:
        pipe.backbone.eval()
    assert not first.requires_grad
    assert torch.equal(first, second)


@pytest.mark.parametrize(("method", "arguments"), OFFLOADS)
def test_offloading_changes_nothing(pipe, method, arguments):
    image = smooth_images(1, 42, 56)
    expected = pipe(image).features
    offloaded = make_feature_pipeline()
    getattr(offloaded, method)(**arguments)
    assert max_difference(offloaded(image).features.cpu(), expected) <= 1e-4


def test_another_component_is_taken_at_the_next_call():
    pipe, image = make_feature_pipeline(), smooth_images(1, 42, 56)
    pipe.backbone = make_dinov2(seed=9)
    expected = FeatureBackbone(make_dinov2(seed=9)).encode(image)
    assert max_difference(pipe(image).backbone_features, expected) == 0
    pipe.backbone = make_dinov3()
    with pytest.raises(ValueError, match=r"^`upsampler` must have been trained for the backbone's features"):
        pipe(image)


def test_a_pair_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"trained for 'dinov3_vit-c32-l2-p16' .*, got 'dinov2-c32-l2-p14' "):
        UPLiFTFeaturePipeline(backbone=make_dinov2(), upsampler=make_feature_upsampler(make_dinov3()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"image": smooth_images(1, 13, 40)},
            ValueError,
            "`image` must be at least one patch of 14 x 14 pixels, got 13 x 40.",
        ),
        ({"image": "photo.jpg"}, TypeError, "`image` must be a PIL image"),
        (
            {"output_size": "tokens"},
            ValueError,
            "`output_size` must be 'pixels', None or a (height, width), got 'tokens'.",
        ),
        (
            {"output_size": np.array([4, 3])},
            ValueError,
            "`output_size` must be 'pixels', None or a (height, width), got array([4, 3]).",
        ),
        ({"output_size": (0, 3)}, ValueError, "`output_size` must be a whole number of at least 1, got 0."),
        ({"output_size": (True, 3)}, TypeError, "`output_size` must be a whole number, got True."),
        ({"num_steps": 0}, ValueError, "`num_steps` must be a whole number of at least 1, got 0."),
        ({"num_steps": 1.5}, TypeError, "`num_steps` must be a whole number, got 1.5."),
        ({"output_type": "latent"}, ValueError, "`output_type` must be 'pt', 'np' or 'pil', got 'latent'."),
        ({"tile_size": 3}, ValueError, "`tile_size` must be a whole number of at least 64, got 3."),
        ({"head": torch.nn.Linear(3, 2)}, ValueError, "`head` must take the 32 channels of the features, got 3."),
        (
            {"head": torch.nn.Conv2d(WIDTH, 2, 3)},
            TypeError,
            "`head` must be a torch.nn.Linear or a 1x1 torch.nn.Conv2d",
        ),
        ({"head": torch.nn.Conv2d(WIDTH, 2, 1, padding=1)}, TypeError, "`head` must be a torch.nn.Linear or a 1x1"),
        ({"head": torch.nn.ReLU()}, TypeError, "`head` must be a torch.nn.Linear or a 1x1 torch.nn.Conv2d"),
        ({"head": make_head(), "output_type": "pil"}, ValueError, "`head` must be None for `output_type` 'pil'"),
    ],
)
def test_bad_input_is_refused_before_any_work(pipe, monkeypatch, arguments, error, message):
    monkeypatch.setattr(pipe.backbone, "forward", None)  # calling it would fail
    with pytest.raises(error, match=rf"^{re.escape(message)}"):
        pipe(**{"image": smooth_images(1, 28, 28), **arguments})


def test_features_that_overflow_are_told_of(pipe):
    broken = make_feature_pipeline()
    with torch.no_grad():
        broken.backbone.layernorm.bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"^`upsampler` must give finite features, got NaN or infinity"):
        broken(smooth_images(1, 28, 28))


def test_a_saved_pipeline_loads_again(pipe, tmp_path):
    saved = UPLiFTFeaturePipeline(pipe.backbone, pipe.upsampler, image_normalization="half")
    saved.save_pretrained(tmp_path)
    loaded = UPLiFTFeaturePipeline.from_pretrained(tmp_path)
    assert loaded.config.image_normalization == "half"
    image = smooth_images(1, 42, 56)
    assert torch.equal(loaded(image).features, saved(image).features)
    assert not torch.equal(loaded(image).features, pipe(image).features)


def test_a_published_upsampler_and_a_backbone_come_from_the_hub(tmp_path):
    """A newcomer's three lines, with a small random backbone of the published width."""
    with HubServer(tmp_path / "hub") as hub:
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=1, image_size=70, patch_size=14
        )
        backbone = Dinov2Model(config).eval()
        backbone.save_pretrained(hub.folder("facebook/dinov2-small"))
        save_file(
            reference_state_dict("dinov2"),
            hub.folder("UPLiFT-upsampler/uplift_dinov2-s14") / "uplift_dinov2-s14.safetensors",
        )
        Image.fromarray((smooth_images(1, 40, 60)[0].permute(1, 2, 0) * 255).byte().numpy()).save(
            tmp_path / "photo.png"
        )
        code = """
import torch
torch.set_num_threads(1)
from PIL import Image
from transformers import AutoModel
from uplift_diffusers import UPLiFTFeaturePipeline, UPLiFTModel

backbone = AutoModel.from_pretrained("facebook/dinov2-small")
upsampler = UPLiFTModel.from_pretrained("UPLiFT-upsampler/uplift_dinov2-s14")
features = UPLiFTFeaturePipeline(backbone, upsampler)(Image.open("photo.png")).features
print(tuple(features.shape), features.double().square().mean().item())
"""
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
    assert result.returncode == 0, result.stderr[-3000:]
    shape, energy = result.stdout.strip().rsplit(" ", 1)
    assert shape == "(1, 384, 40, 60)"

    weights = tmp_path / "hub" / "UPLiFT-upsampler" / "uplift_dinov2-s14" / "uplift_dinov2-s14.safetensors"
    model = UPLiFTModel.from_single_file(weights)
    expected = UPLiFTFeaturePipeline(backbone, model)(Image.open(tmp_path / "photo.png")).features
    assert float(energy) == pytest.approx(expected.double().square().mean().item(), rel=1e-4)
