"""Photographs to measure on and a pipeline to measure, for every test of the evaluation."""

import pytest

from tests.evaluation.parts import make_pipeline, save_photographs


@pytest.fixture(scope="package")
def photographs(tmp_path_factory):
    return save_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="package")
def pipeline():
    return make_pipeline()
