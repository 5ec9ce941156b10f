"""Photographs, a pipeline and Inception weights, made once for every test of the evaluation."""

import pytest
from safetensors.torch import save_file

from tests.evaluation.parts import make_pipeline, save_photographs
from tests.random_weights import random_inception


@pytest.fixture(scope="package")
def photographs(tmp_path_factory):
    """A folder of five photographs of 120 x 80 pixels."""
    return save_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="package")
def pipeline():
    return make_pipeline()


@pytest.fixture(scope="package")
def inception_weights(tmp_path_factory):
    """A file of random Inception weights in torch-fidelity's layout."""
    path = tmp_path_factory.mktemp("inception") / "random.safetensors"
    save_file(random_inception(), path)
    return path
