import pytest
import torch
import torch.nn.functional as F

from uplift_diffusers.models.blocks import resample_nearest
from uplift_diffusers.models.local_attention import (
    NEIGHBORHOODS,
    LocalAttender,
    local_attention,
    neighborhood_offsets,
)


def attention_position_by_position(logits, values, neighborhood):
    """The definition, read literally."""
    factor = logits.shape[2] // values.shape[2]
    height, width = values.shape[2:]
    out = torch.zeros(*values.shape[:2], *logits.shape[2:], dtype=values.dtype)
    for y in range(logits.shape[2]):
        for x in range(logits.shape[3]):
            weights = logits[:, :, y, x].softmax(dim=1)
            for index, (dy, dx) in enumerate(neighborhood_offsets(neighborhood)):
                row = min(max(y // factor + dy, 0), height - 1)
                column = min(max(x // factor + dx, 0), width - 1)
                out[:, :, y, x] += weights[:, index, None] * values[:, :, row, column]
    return out


@pytest.mark.parametrize("neighborhood", NEIGHBORHOODS)
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_local_attention_equals_its_definition(neighborhood, factor):
    generator = torch.Generator().manual_seed(neighborhood * 10 + factor)
    values = torch.randn(2, 3, 3, 4, generator=generator, dtype=torch.float64)
    logits = torch.randn(2, neighborhood, 3 * factor, 4 * factor, generator=generator, dtype=torch.float64)
    expected = attention_position_by_position(logits, values, neighborhood)
    torch.testing.assert_close(local_attention(logits, values, neighborhood), expected, rtol=0, atol=1e-12)


def test_local_attention_has_the_gradient_of_its_definition():
    logits = torch.randn(1, 9, 4, 4, dtype=torch.float64, requires_grad=True)
    values = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: local_attention(a, b, 9), (logits, values))


def test_local_attention_stays_within_the_range_of_its_values():
    logits = torch.randn(1, 25, 12, 12) * 10
    values = torch.rand(1, 4, 6, 6)
    output = local_attention(logits, values, 25)
    assert output.min() >= values.min() - 1e-6
    assert output.max() <= values.max() + 1e-6


def test_local_attention_memory_does_not_grow_with_the_neighborhood():
    # The values have many channels and the weights few, so n copies of the output would show.
    values = torch.randn(1, 64, 32, 32)

    def largest_tensor(neighborhood):
        sizes = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                sizes.extend(t.numel() for t in (result,) if isinstance(t, torch.Tensor))
                return result

        with Watch():
            local_attention(torch.randn(1, neighborhood, 64, 64), values, neighborhood)
        return max(sizes)

    assert largest_tensor(25) == largest_tensor(5) == 64 * 64 * 64


@pytest.mark.parametrize(
    ("logits", "values", "message"),
    [
        ((1, 9, 4, 4), (1, 2, 3, 3), "integer number of times"),
        ((1, 9, 4, 6), (1, 2, 2, 2), "integer number of times"),
        ((1, 5, 4, 4), (1, 2, 2, 2), r"`logits` must be \(B, 9"),
        ((2, 9, 4, 4), (1, 2, 2, 2), r"`logits` must be \(B, 9"),
        ((1, 9, 2, 2), (1, 2, 4, 4), "integer number of times"),
    ],
)
def test_local_attention_refuses_shapes_that_do_not_fit(logits, values, message):
    with pytest.raises(ValueError, match=message):
        local_attention(torch.zeros(logits), torch.zeros(values), 9)


def test_unknown_neighborhood_is_refused():
    with pytest.raises(ValueError, match=r"one of \(5, 9, 13, 17, 25\), got 7"):
        neighborhood_offsets(7)


@pytest.mark.parametrize("size", [(3, 2), (6, 8), (12, 16), (4, 3), (1, 1)])
def test_nearest_resampling_takes_the_floor_of_the_scaled_index(size):
    features = torch.arange(6 * 8, dtype=torch.float32).reshape(1, 1, 6, 8)
    rows = torch.arange(size[0]) * 6 // size[0]
    columns = torch.arange(size[1]) * 8 // size[1]
    expected = features[:, :, rows][..., columns]
    torch.testing.assert_close(resample_nearest(features, size), expected, rtol=0, atol=0)
    torch.testing.assert_close(F.interpolate(features, size=size, mode="nearest"), expected, rtol=0, atol=0)


def test_an_attender_without_residual_begins_with_the_mean_and_does_not_see_the_size_of_its_guide():
    torch.manual_seed(0)
    attender = LocalAttender(12, 9, residual=False)
    guide, values = torch.randn(1, 12, 6, 6), torch.randn(1, 3, 3, 3)
    mean = torch.nn.functional.avg_pool2d(F.pad(values, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    torch.testing.assert_close(attender(guide, values), F.interpolate(mean, scale_factor=2), rtol=0, atol=1e-6)
    torch.nn.init.normal_(attender.conv.weight)
    torch.testing.assert_close(attender(100 * guide, values), attender(guide, values), rtol=0, atol=1e-4)
