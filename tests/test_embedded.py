import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from uplift_diffusers import UPLiFTSuperResolutionPipeline, embedded_bundle
from uplift_diffusers.evaluation.measure import evaluate, gap_closed
from uplift_diffusers.evaluation.methods import bicubic, bilinear, pipeline_method, vae_round_trip
from uplift_diffusers.evaluation.metrics import Metrics
from uplift_diffusers.evaluation.protocols import SuperResolution

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def scores():
    """Scores on the example photographs, which no stage was trained on."""
    pipeline = UPLiFTSuperResolutionPipeline.from_pretrained(embedded_bundle())
    pipeline.set_progress_bar_config(disable=True)
    vae, space = pipeline.vae, pipeline.latent_space
    methods = [
        bicubic(vae, space),
        bilinear(vae, space),
        pipeline_method("uplift", pipeline, seed=0),
        vae_round_trip(vae, space),
    ]
    protocol = SuperResolution(EXAMPLES, scales=(2, 4), crop=288)
    results = evaluate(protocol, methods, Metrics(names=("psnr", "ssim")))
    return {scale: found.scores for scale, found in results.items()}


def test_bundle_is_at_most_24_megabytes_of_half_precision_safetensors():
    files = [path for path in embedded_bundle().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24e6
    weights = [path for path in files if path.suffix not in (".json", ".md")]
    assert {path.suffix for path in weights} == {".safetensors"}
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118


def test_bundle_works_in_a_new_process_without_network(tmp_path):
    script = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("the network was used")

socket.socket.connect = refuse
socket.getaddrinfo = refuse
from PIL import Image
from uplift_diffusers import UPLiFTSuperResolutionPipeline, embedded_bundle

pipe = UPLiFTSuperResolutionPipeline.from_pretrained(embedded_bundle())
pipe(image=Image.open(sys.argv[1]).crop((0, 0, 40, 30)), scale=3).images[0].save(sys.argv[2])
"""
    output = tmp_path / "larger.png"
    command = [sys.executable, "-c", script, str(EXAMPLES / "cat.png"), str(output)]
    subprocess.run(command, check=True, capture_output=True)
    with Image.open(output) as image:
        assert image.size == (120, 90)


def test_upsampler_closes_most_of_the_gap_to_the_round_trip(scores):
    assert gap_closed(scores[2]) > 0.6


def test_bundle_is_ahead_of_bicubic_on_the_examples(scores):
    assert scores[2]["uplift"]["psnr"].value > scores[2]["bicubic"]["psnr"].value + 0.3
    assert scores[2]["uplift"]["ssim"].value > scores[2]["bicubic"]["ssim"].value
    assert scores[4]["uplift"]["psnr"].value > scores[4]["bicubic"]["psnr"].value
    assert scores[4]["uplift"]["ssim"].value > scores[4]["bicubic"]["ssim"].value


@pytest.mark.parametrize("scale", [2, 4])
def test_an_enlarged_example_reduced_is_the_example_to_within_a_level(scale):
    pipeline = UPLiFTSuperResolutionPipeline.from_pretrained(embedded_bundle())
    image = Image.open(EXAMPLES / "cat.png").convert("RGB").crop((60, 40, 220, 160))
    enlarged = pipeline(image=image, scale=scale).images[0]
    reduced = enlarged.resize(image.size, Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(reduced, dtype=float) - np.asarray(image, dtype=float))
    assert difference.mean() < 0.5
    assert np.quantile(difference, 0.99) <= 2


def test_the_same_image_gives_the_same_output_twice():
    pipeline = UPLiFTSuperResolutionPipeline.from_pretrained(embedded_bundle())
    image = Image.open(EXAMPLES / "cat.png").crop((0, 0, 64, 48))
    first, second = (pipeline(image=image, scale=2, output_type="np").images for _ in range(2))
    assert (first == second).all()


def test_every_example_names_its_licence():
    licences = (EXAMPLES / "LICENSES.md").read_text()
    photographs = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".jpg", ".png")]
    assert len(photographs) >= 2
    assert [name for name in photographs if f"`{name}`" not in licences] == []
