"""What UPLiFT's form alone promises, trained or not, and LiFT's does not."""

import pytest
import torch
import torch.nn.functional as F

from tests.predictive.parts import CHANNELS, PATCH, tiny_uplift
from uplift_diffusers.evaluation.predictive.peers import load_peer
from uplift_diffusers.evaluation.predictive.upsamplers import UPLiFT

STEPS = 3
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def image():
    torch.manual_seed(1)
    return torch.rand(1, 3, 7 * PATCH, 9 * PATCH)


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(2)
    return torch.randn(1, CHANNELS, 7, 9)


def steps_of(upsampler, features, image):
    """The features, and the result after each 2x step."""
    sizes = [(7 << step, 9 << step) for step in range(1, STEPS + 1)]
    with torch.no_grad():
        return [features, *(upsampler.upsample(features, image, size) for size in sizes)]


def lies_between(result, values):
    """Whether every position of `result` lies within the extremes of the 5x5 `values` around its own."""
    padded = F.pad(values, (2, 2, 2, 2), mode="replicate")
    high = F.interpolate(F.max_pool2d(padded, 5, stride=1), scale_factor=2, mode="nearest")
    low = F.interpolate(-F.max_pool2d(-padded, 5, stride=1), scale_factor=2, mode="nearest")
    return bool((result <= high + TOLERANCE).all() and (result >= low - TOLERANCE).all())


def lifts():
    torch.manual_seed(3)
    return {
        "the original network": load_peer("lift", channels=CHANNELS),
        "the twin of UPLiFT": UPLiFT(tiny_uplift(neighborhood=None, reencode_image=True)),
    }


@pytest.mark.parametrize("neighborhood", [5, 9, 13, 17, 25])
def test_every_step_of_uplift_lies_between_its_5x5_tokens(neighborhood, features, image):
    steps = steps_of(UPLiFT(tiny_uplift(neighborhood=neighborhood)), features, image)
    for before, after in zip(steps, steps[1:]):
        assert lies_between(after, before)
    assert (steps[-1] - F.interpolate(features, size=steps[-1].shape[2:])).abs().mean() > 0.1  # it does something


def test_uplift_keeps_constants(image):
    features = torch.linspace(-3, 3, CHANNELS).view(1, -1, 1, 1).expand(1, -1, 7, 9)
    for result in steps_of(UPLiFT(tiny_uplift()), features, image):
        assert (result - features[..., :1, :1]).abs().max() < TOLERANCE


def test_affine_probes_of_uplift_lie_between_the_probed_tokens(features, image):
    torch.manual_seed(4)
    probe = torch.nn.Conv2d(CHANNELS, 20, 1)
    steps = steps_of(UPLiFT(tiny_uplift()), features, image)
    with torch.no_grad():
        for before, after in zip(steps, steps[1:]):
            assert lies_between(probe(after), probe(before))


@pytest.mark.parametrize("name", lifts())
def test_lift_has_none_of_these_properties(name, features, image):
    lift = lifts()[name]
    assert not lies_between(*steps_of(lift, features, image)[1::-1])
    constant = torch.ones_like(features)
    assert (steps_of(lift, constant, image)[1] - 1).abs().max() > 0.1


def test_uplift_reduces_what_lies_beyond_the_asked_size(features, image):
    upsampler = UPLiFT(tiny_uplift())
    _, _, quadrupled, _ = steps_of(upsampler, features, image)
    with torch.no_grad():
        result = upsampler.upsample(features, image, (21, 30))
    assert torch.allclose(result, F.interpolate(quadrupled, size=(21, 30), mode="bilinear", antialias=True), atol=1e-6)
