"""Scales, and the sizes that they make."""

import numpy as np
import pytest

from uplift_diffusers.scale import check_output_size, num_steps_for_scale, resolve_scale, scaled_size


@pytest.mark.parametrize(("scale", "steps"), [(1, 0), (1.01, 1), (2, 1), (2.01, 2), (4, 2), (15.9, 4), (16, 4)])
@pytest.mark.parametrize("kind", [float, np.float32, np.float64])
def test_steps_reach_the_scale(scale, steps, kind):
    assert num_steps_for_scale(kind(scale)) == steps


def test_numbers_of_numpy_are_scales():
    assert num_steps_for_scale(np.int64(4)) == 2
    assert scaled_size((30_001, 7), np.float32(2)) == (60_002, 14)


@pytest.mark.parametrize(
    ("scale", "error"), [(True, TypeError), ("2", TypeError), (np.nan, ValueError), (17, ValueError)]
)
def test_what_is_no_scale_is_refused(scale, error):
    with pytest.raises(error, match="`scale` must be"):
        num_steps_for_scale(scale)


@pytest.mark.parametrize("size", [(1333, 2000), (2000, 1333), (999, 1001), (7, 1900)])
@pytest.mark.parametrize("edge", [2001, 3840, 4096, 7919])
def test_an_edge_that_is_asked_for_is_met_exactly(size, edge):
    assert scaled_size(size, resolve_scale(size, width=edge))[1] == edge if size[1] <= edge <= 16 * size[1] else True
    assert max(scaled_size(size, resolve_scale(size, long_side=edge))) == edge


def test_height_alone_and_a_box_keep_the_shape():
    assert resolve_scale((600, 1000), height=1500) == 2.5
    assert scaled_size((600, 1000), resolve_scale((600, 1000), width=2000, height=1500)) == (1200, 2000)
    assert scaled_size((600, 1000), resolve_scale((600, 1000), width=4000, height=900)) == (900, 1500)


def test_megapixels_are_met_up_to_the_rounding_of_the_edges():
    height, width = scaled_size((1333, 2000), resolve_scale((1333, 2000), megapixels=12))
    assert abs(height * width - 12e6) < 0.5 * (height + width)
    assert resolve_scale((1333, 2000), megapixels=1333 * 2000 / 1e6) == 1


def test_a_scale_is_returned_as_it_is():
    assert resolve_scale((10, 20), scale=3.5) == 3.5


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({}, ValueError, "Exactly one of .* got none"),
        ({"scale": 2, "width": 30}, ValueError, "got scale, width/height"),
        ({"megapixels": 1, "long_side": 30}, ValueError, "got megapixels, long_side"),
        ({"width": 19}, ValueError, "a width of 19 pixels requested for an image of 20 x 10 pixels, .* smaller"),
        ({"long_side": 321}, ValueError, "more than 16 times as large"),
        ({"megapixels": 1}, ValueError, "1 megapixels requested for .* more than 16 times"),
        ({"width": 30.5}, TypeError, "`width` must be a whole number"),
        ({"long_side": True}, TypeError, "`long_side` must be a whole number"),
        ({"megapixels": float("nan")}, ValueError, "`megapixels` must be from 0 to"),
        ({"height": 0}, ValueError, "`height` must be a whole number of at least 1"),
    ],
)
def test_a_size_that_cannot_be_met_is_told(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        resolve_scale((10, 20), **arguments)


def test_the_size_that_counts_is_the_one_that_is_made():
    check_output_size((100, 100), 2.5, max_pixels=400 * 400)
    with pytest.raises(ValueError, match=r"100 x 100 pixels would be upscaled to 400 x 400, more than .* 0.159999"):
        check_output_size((100, 100), 2.5, max_pixels=400 * 400 - 1)
    check_output_size((100, 100), 1, max_pixels=1)  # nothing is made


def test_an_edge_that_the_format_does_not_hold_is_told():
    check_output_size((10, 100), 2.5, max_pixels=10**6, max_edge=250)
    with pytest.raises(ValueError, match=r"the output of 250 x 25 pixels has an edge over the 249 of a \.webp"):
        check_output_size((10, 100), 2.5, max_pixels=10**6, max_edge=249, kind=".webp")
