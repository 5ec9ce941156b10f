"""The network computes what the reference computes, for the published checkpoints' parameter names."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.reference_weights import REFERENCE, reference_state_dict
from uplift_diffusers.models.conversion import CONFIGS, check_state_dict, convert_state_dict
from uplift_diffusers.models.local_attention import NEIGHBORHOODS, LocalAttender, neighborhood_offsets
from uplift_diffusers.models.upsampler import UPLiFTModel

CASES = json.loads((REFERENCE / "golden.json").read_text())
SD15_CASES = [case for case in CASES if case.startswith("sd15.")]
DINOV2_CASES = [case for case in CASES if case.startswith("dinov2.")]
TOLERANCE = 1e-4

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@pytest.fixture(scope="module")
def golden():
    return load_file(REFERENCE / "golden.safetensors")


def load_reference(name, variant):
    model = UPLiFTModel(**CONFIGS[variant])
    model.load_state_dict(convert_state_dict(reference_state_dict(name)))
    return model.eval()


@pytest.fixture(scope="module")
def sd15():
    return load_reference("sd15", "sd15-vae")


@pytest.fixture(scope="module")
def dinov2():
    return load_reference("dinov2", "dinov2-s14")


def golden_image(golden, case):
    """The image as our model takes it: the reference's DINO cases were fed without normalising it."""
    image = golden[f"{case}.image"]
    return image if case.startswith("sd15.") else image * IMAGENET_STD + IMAGENET_MEAN


@torch.no_grad()
def run_case(model, golden, case):
    return model(
        golden[f"{case}.latent"],
        image=golden_image(golden, case),
        num_steps=CASES[case]["iterations"],
        generator=torch.Generator().manual_seed(1234),
        return_steps=True,
    )


def max_difference(actual, expected):
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


def assert_every_step_matches(model, golden, case):
    output = run_case(model, golden, case)
    expected = [golden[f"{case}.step{step}"] for step in range(CASES[case]["iterations"])]
    assert len(output.steps) == len(expected)
    for step, (actual, wanted) in enumerate(zip(output.steps, expected, strict=True)):
        assert max_difference(actual, wanted) <= TOLERANCE, f"step {step}"
    assert max_difference(output.sample, expected[-1]) <= TOLERANCE


@pytest.mark.parametrize("case", SD15_CASES)
def test_sd15_steps_equal_the_reference(sd15, golden, case):
    assert_every_step_matches(sd15, golden, case)


@pytest.mark.parametrize("case", DINOV2_CASES)
def test_dinov2_steps_equal_the_reference(dinov2, golden, case):
    assert_every_step_matches(dinov2, golden, case)


@pytest.mark.parametrize(
    ("name", "case", "encoder_stride", "decoder_stride"),
    [("sd15", "sd15.square1", 16, 8), ("dinov2", "dinov2.square1", 1, 1)],
)
def test_intermediates_equal_the_reference(request, golden, name, case, encoder_stride, decoder_stride):
    model = request.getfixturevalue(name)
    seen = {}

    def record(part):
        return lambda module, inputs, output: seen.update({part: (inputs, output)})

    hooks = [getattr(model, part).register_forward_hook(record(part)) for part in ("encoder", "decoder", "attender")]
    try:
        run_case(model, golden, case)
    finally:
        for hook in hooks:
            hook.remove()

    (image, stride), (_, sampled) = seen["encoder"]
    with torch.no_grad():
        _, encoder_last = model.encoder(image, 1)
    expected = golden[f"{case}.encoder_last"]
    assert max_difference(encoder_last[:, ::encoder_stride], expected) <= TOLERANCE
    assert max_difference(sampled[:, ::encoder_stride], expected[..., ::stride, ::stride]) <= TOLERANCE
    assert max_difference(seen["decoder"][1][:, ::decoder_stride], golden[f"{case}.decoder_out"]) <= TOLERANCE
    assert max_difference(seen["attender"][1], golden[f"{case}.attender_out"]) <= TOLERANCE


def test_noise_is_drawn_in_the_order_of_the_reference(sd15, golden):
    case = "sd15.square2"
    drawn = []

    def record_decoder(module, inputs):
        drawn.extend(inputs[3:])

    def record_refiner(module, inputs):
        drawn.append(inputs[2])

    hooks = [
        sd15.decoder.register_forward_pre_hook(record_decoder),
        sd15.refiner.register_forward_pre_hook(record_refiner),
    ]
    try:
        run_case(sd15, golden, case)
    finally:
        for hook in hooks:
            hook.remove()

    assert [list(noise.shape) for noise in drawn] == CASES[case]["noise_shapes_in_draw_order"]
    for index, noise in enumerate(drawn):
        assert torch.equal(noise, golden[f"{case}.noise{index}"]), f"noise {index}"


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("neighborhood", NEIGHBORHOODS)
def test_local_attender_equals_the_reference(golden, neighborhood, factor):
    case = f"attender.n{neighborhood}.c{factor}"
    guide = golden[f"{case}.guide"]
    attender = LocalAttender(guide.shape[1], neighborhood)
    attender.conv.load_state_dict({"weight": golden[f"{case}.weight"], "bias": golden[f"{case}.bias"]})
    with torch.no_grad():
        attended = attender(guide, golden[f"{case}.value"])
    assert max_difference(attended, golden[f"{case}.out"]) <= TOLERANCE


@pytest.mark.parametrize("neighborhood", NEIGHBORHOODS)
def test_offsets_are_in_the_order_of_the_reference(neighborhood):
    expected = CASES[f"attender.n{neighborhood}"]["offsets_dy_dx"]
    assert [list(offset) for offset in neighborhood_offsets(neighborhood)] == expected


@pytest.mark.parametrize(
    ("name", "variant", "parameters"),
    [("sd15", "sd15-vae", 53_487_445), ("dinov2", "dinov2-s14", 789_521), ("dinov3", "dinov3-splus16", 789_521)],
)
def test_published_names_and_shapes_are_exactly_those_of_the_model(name, variant, parameters):
    with torch.device("meta"):
        model = UPLiFTModel(**CONFIGS[variant])
    converted = convert_state_dict(reference_state_dict(name))
    check_state_dict(converted, model.state_dict())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    missing, unexpected = model.load_state_dict(converted, assign=True)
    assert (missing, unexpected) == ([], [])


def without(state_dict):
    del state_dict["encoder.block_0.blocks.0.conv.0.weight"]


def with_another(state_dict):
    state_dict["decoder.block_0.blocks.7.conv.0.weight"] = torch.zeros(1)


def with_wrong_shape(state_dict):
    state_dict["attender.conv1.bias"] = torch.zeros(9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, r"no encoder\.blocks\.0\.layers\.0\.convs\.0\.weight"),
        (with_another, r"unknown decoder\.coarse\.layers\.7\.convs\.0\.weight"),
        (with_wrong_shape, r"attender\.conv\.bias is \(9,\), not \(17,\)"),
    ],
)
def test_a_checkpoint_that_differs_in_one_parameter_is_refused_by_name(change, message):
    state_dict = reference_state_dict("dinov2")
    change(state_dict)
    with torch.device("meta"):
        model = UPLiFTModel(**CONFIGS["dinov2-s14"])
    with pytest.raises(ValueError, match=rf"^The checkpoint does not fit `config`: {message}\.$"):
        check_state_dict(convert_state_dict(state_dict), model.state_dict())
