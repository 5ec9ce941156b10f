"""The published upsamplers: equal to their golden outputs, loaded strictly, convex where they claim to be."""

import pytest
import torch
from safetensors.torch import save_file

from tests.predictive import golden
from uplift_diffusers.evaluation.predictive.peers import PEERS, anyup, load_peer, naf

PUBLISHED = ("lift", "featup", "loftup", "jafar", "anyup", "naf")
MIXTURES = ("nearest", "bilinear", "jafar", "anyup", "naf")
"""Those whose every output lies between the extremes of the tokens."""

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def load(tmp_path):
    """Load a peer through a file of the given tensors."""

    def load(name, tensors, channels=384):
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "peer.safetensors")
        return load_peer(name, channels=channels, weights=tmp_path / "peer.safetensors")

    return load


def upsample(model, case, size, **kwargs):
    return model.upsample(golden.features(case), golden.image(case), tuple(size), **kwargs)


def largest_difference(result, case, part="output"):
    expected, channels = golden.output(case, part)
    return (result[:, channels] - expected).abs().max().item()


@pytest.mark.parametrize("case", golden.cases_of("featup", "loftup", "jafar", "anyup", "naf"))
def test_output_equals_that_of_the_published_network(case, load):
    settings = golden.CASES[case]
    model = load(settings["method"], golden.state_dict(case))
    if "window_ratio" in settings:
        model.window_ratio = settings["window_ratio"]
    result = upsample(model, case, settings["size"])
    assert largest_difference(result, case) <= settings["tolerance"]


@pytest.mark.parametrize("case", golden.cases_of("lift"))
def test_every_step_of_lift_equals_that_of_the_published_network(case, load):
    settings = golden.CASES[case]
    model = load("lift", golden.state_dict(case))
    for step in range(1, settings["steps"] + 1):
        result = upsample(model, case, [length * 2**step for length in settings["tokens"]])
        assert largest_difference(result, case, f"step{step}") <= settings["tolerance"]


def test_loftup_behind_its_fourier_features_equals_the_published_network_closely(load):
    """A sine at its frequencies moves by 1e-3 with one rounding, which the whole network's tolerance has to allow."""
    case = "loftup.staged"
    model = load("loftup", golden.state_dict(case))
    fourier = golden.OUTPUTS[f"{case}.fourier"]
    assert torch.allclose(model.upsampler.fourier_features(model.normalize(golden.image(case))), fourier, atol=5e-3)
    model.upsampler.fourier_features = lambda image: fourier
    assert largest_difference(upsample(model, case, golden.CASES[case]["size"]), case) <= 1e-5


@pytest.mark.parametrize("case", ["anyup.square", "anyup.wide"])
def test_anyup_windows_are_the_published_ones(case):
    (height, width), (rows, columns) = golden.CASES[case]["size"], golden.CASES[case]["tokens"]
    assert torch.equal(anyup.window(height, rows, 0.1), golden.OUTPUTS[f"{case}.window_rows"].long())
    assert torch.equal(anyup.window(width, columns, 0.1), golden.OUTPUTS[f"{case}.window_columns"].long())


@pytest.mark.parametrize(("length", "count"), [(36, 9), (50, 12), (35, 10), (20, 10)])
def test_naf_windows_are_those_of_a_dilated_neighbourhood_on_enlarged_keys(length, count):
    dilation = length // count
    token_of = [int((position + 0.5) * count / length) for position in range(length)]  # nearest-exact
    for position, tokens in enumerate(naf.window_tokens(length, count).tolist()):
        candidates = range(position % dilation, length, dilation)
        place = position // dilation
        first = min(max(place - 4, 0), len(candidates) - 9)
        assert tokens == [token_of[candidate] for candidate in candidates[first : first + 9]]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_have_the_published_names_and_shapes(name):
    tensors = load_peer(name, channels=384).state_dict()
    assert {key: list(value.shape) for key, value in tensors.items()} == golden.SHAPES[name]


@pytest.mark.parametrize("name", ["loftup", "jafar", "anyup"])
def test_attending_in_chunks_gives_the_same(name):
    torch.manual_seed(0)
    features, image = torch.randn(1, 384, 3, 4), torch.rand(1, 3, 48, 64)
    model = load_peer(name, channels=384)
    whole = model.upsample(features, image, (24, 32))
    model.query_chunk = 100  # does not divide the 768 positions
    assert torch.allclose(model.upsample(features, image, (24, 32)), whole, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_outputs_of_mixtures_lie_between_the_extremes_of_the_tokens(name):
    torch.manual_seed(0)
    features, image = torch.randn(2, 64, 9, 10), torch.rand(2, 3, 36, 40)
    result = load_peer(name, channels=64).upsample(features, image, (36, 40)).flatten(2)
    tokens = features.flatten(2)
    assert (result <= tokens.amax(2, keepdim=True) + 1e-5).all()
    assert (result >= tokens.amin(2, keepdim=True) - 1e-5).all()
    assert result.std() > 0.05  # and are not all the mean


@pytest.mark.parametrize("name", PEERS)
def test_any_peer_takes_any_size(name):
    torch.manual_seed(0)
    features, image = torch.randn(2, 32, 9, 10), torch.rand(2, 3, 126, 140)
    result = load_peer(name, channels=32).upsample(features, image, (30, 37))
    assert result.shape == (2, 32, 30, 37)
    assert result.isfinite().all()


@pytest.mark.parametrize("name", sorted(PEERS.keys() - {"loftup"}))
def test_half_precision_gives_nearly_the_same(name):
    torch.manual_seed(0)
    features, image = torch.randn(1, 32, 9, 10), torch.rand(1, 3, 126, 140)
    model = load_peer(name, channels=32)
    expected = model.upsample(features, image, (30, 37))
    actual = model.bfloat16().upsample(features.bfloat16(), image, (30, 37))
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).norm() < 0.05 * expected.norm()


def test_loftup_is_refused_in_half_precision():
    with pytest.raises(ValueError, match=r"^`features` must be float32 for LoftUp, got torch.bfloat16\."):
        load_peer("loftup", channels=32).bfloat16().upsample(
            torch.randn(1, 32, 9, 9).bfloat16(), torch.rand(1, 3, 126, 126), (18, 18)
        )


@pytest.mark.parametrize("name", ["lift", "jafar", "anyup", "naf"])
def test_gradients_reach_every_parameter_that_has_influence(name):
    dead = ("norm_v", "v_proj_weight", "out_proj")
    with torch.enable_grad():
        torch.manual_seed(0)
        model = load_peer(name, channels=32).train()
        model.upsample(torch.randn(2, 32, 9, 9), torch.rand(2, 3, 144, 144), (18, 18)).square().mean().backward()
    without = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert [key for key in without if not any(part in key for part in dead)] == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_of_another_network_are_refused(name, load):
    case = golden.cases_of(name)[0]
    tensors = golden.state_dict(case)
    missing = dict(list(tensors.items())[:-1])
    with pytest.raises(ValueError, match=f"tensors of {name}"):
        load(name, missing)
    with pytest.raises(ValueError, match="unknown intruder"):
        load(name, {**tensors, "intruder": torch.zeros(1)})


def test_weights_for_another_backbone_are_refused(load):
    with pytest.raises(ValueError, match="for this backbone"):
        load("jafar", golden.state_dict("jafar.square"), channels=768)


def test_published_checkpoints_are_freed_of_what_is_not_the_upsampler(load):
    case = "featup.square"
    extra = {"model.0.patch_embed.weight": torch.zeros(2), "downsampler.kernel": torch.zeros(2)}
    model = load("featup", {**golden.state_dict(case), **extra})
    assert largest_difference(upsample(model, case, (64, 64)), case) <= golden.CASES[case]["tolerance"]
    prefixed = {f"module.{name}": tensor for name, tensor in golden.state_dict("lift.wide").items()}
    assert largest_difference(upsample(load("lift", prefixed), "lift.wide", (6, 10)), "lift.wide", "step1") <= 1e-5


def test_pickled_weights_are_not_opened(tmp_path):
    torch.save({}, tmp_path / "jafar.pth")
    with pytest.raises(ValueError, match="safetensors"):
        load_peer("jafar", channels=384, weights=tmp_path / "jafar.pth")


def test_mismatched_inputs_are_refused():
    model = load_peer("bilinear", channels=8)
    features, image = torch.zeros(2, 8, 4, 4), torch.zeros(2, 3, 64, 64)
    for arguments, name in (
        ((features[0], image, (8, 8)), "features"),
        ((features, image[:1], (8, 8)), "image"),
        ((features, image, (8, 3)), "size"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            model.upsample(*arguments)
    with pytest.raises(ValueError, match="9 tokens a side"):
        load_peer("naf", channels=8).upsample(features, image, (8, 8))
