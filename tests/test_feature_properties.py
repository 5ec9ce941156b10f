"""What follows from pooling features instead of predicting them: bounds, constants, and what a probe says of them."""

import pytest
import torch
import torch.nn.functional as F

from tests.components import smooth_images
from tests.feature_parts import WIDTH, make_feature_upsampler

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tokens():
    return torch.randn(1, WIDTH, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def image():
    return smooth_images(1, 6 * 14, 5 * 14)


def make_lift():
    return make_feature_upsampler(neighborhood=None, reencode_image=True)


@torch.no_grad()
def steps_of(model, tokens, image):
    """(what a step was given, what it made) of three steps."""
    steps = model(tokens, image=image, num_steps=3, return_steps=True).steps
    return list(zip([tokens, *steps[:-1]], steps))


def outside(values, made):
    """How far `made` leaves the range of the 5 x 5 `values` around each of its positions."""
    padded = F.pad(values, (2, 2, 2, 2), mode="replicate")
    high = F.max_pool2d(padded, 5, stride=1).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    low = -F.max_pool2d(-padded, 5, stride=1).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return torch.maximum(made - high, low - made).max().item()


def test_every_channel_stays_within_its_5x5_tokens_at_every_step(tokens, image):
    for values, made in steps_of(make_feature_upsampler(), tokens, image):
        assert outside(values, made) <= TOLERANCE
    assert max(outside(values, made) for values, made in steps_of(make_lift(), tokens, image)) > 0.1


def test_constant_features_stay(tokens, image):
    constant = tokens[..., :1, :1].expand_as(tokens).contiguous()
    for _, made in steps_of(make_feature_upsampler(), constant, image):
        assert (made - constant[..., :1, :1]).abs().max() <= TOLERANCE
    assert max((made - constant[..., :1, :1]).abs().max() for _, made in steps_of(make_lift(), constant, image)) > 0.1


def test_an_affine_probe_says_a_mixture_of_what_it_says_of_the_tokens(tokens, image):
    torch.manual_seed(1)
    probe = torch.nn.Conv2d(WIDTH, 7, 1).requires_grad_(False)
    for values, made in steps_of(make_feature_upsampler(), tokens, image):
        assert outside(probe(values), probe(made)) <= TOLERANCE
    assert max(outside(probe(values), probe(made)) for values, made in steps_of(make_lift(), tokens, image)) > 0.1
