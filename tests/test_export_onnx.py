"""scripts/export_onnx.py and examples/onnx_upscale.py: the same numbers as PyTorch, without PyTorch."""

import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import components
from tests.components import smooth_images
from uplift_diffusers import UPLiFTSuperResolutionPipeline, embedded_bundle

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ROOT = Path(__file__).resolve().parent.parent
export = runpy.run_path(str(ROOT / "scripts" / "export_onnx.py"))["export"]


def open_session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "bundle.onnx"
    export(embedded_bundle(), path, num_steps=1, upsampler_only=False)
    return path


@pytest.fixture(scope="module")
def pipe():
    pipeline = UPLiFTSuperResolutionPipeline.from_pretrained(embedded_bundle())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 64, 88), (2, 120, 72), (1, 16, 160)])
def test_the_bundle_gives_what_it_gives_in_pytorch(bundle, pipe, shape):
    image = smooth_images(*shape)
    (sample,) = open_session(bundle).run(None, {"image": image.numpy()})
    expected = pipe(image=image, scale=2, output_type="np", consistency=0).images
    assert sample.shape == (shape[0], 3, 2 * shape[1], 2 * shape[2])
    np.testing.assert_allclose(sample.transpose(0, 2, 3, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_example_enlarges_a_file_without_torch(bundle, pipe, tmp_path):
    picture = Image.open(ROOT / "examples" / "coffee.jpg").crop((0, 0, 75, 50))
    picture.save(tmp_path / "small.png")
    script = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", script, str(ROOT / "examples" / "onnx_upscale.py"), str(bundle)]
    subprocess.run([*command, "small.png", "large.png"], cwd=tmp_path, check=True, timeout=60)
    expected = np.asarray(pipe(image=picture, scale=2, consistency=0).images[0], dtype=int)
    large = np.asarray(Image.open(tmp_path / "large.png"), dtype=int)
    assert large.shape == (100, 150, 3)
    assert np.abs(large - expected).max() <= 1  # a rounding


@pytest.mark.slow
def test_the_benchmark_compares_the_two_and_times_the_start(bundle, capsys):
    importlib.import_module("benchmarks.onnx_speed").main([str(bundle), "--sizes", "64", "--repeats", "1"])
    *_, row, _, start, _ = capsys.readouterr().out.splitlines()
    size, eager, onnx, _, difference = row.strip("| ").split(" | ")
    assert size == "64 x 64"
    assert float(eager.split()[0]) > 0 < float(onnx.split()[0])
    assert float(difference) <= 1e-5
    assert start.startswith("Start: ")


@pytest.mark.slow
def test_an_upsampler_takes_its_noise_as_inputs(tmp_path):
    upsampler = components.make_upsampler()
    upsampler.save_pretrained(tmp_path / "upsampler")
    export(tmp_path / "upsampler", tmp_path / "new" / "upsampler.onnx", num_steps=2, upsampler_only=True)
    session = open_session(tmp_path / "new" / "upsampler.onnx")
    assert session.get_modelmeta().custom_metadata_map.items() >= {"spatial_factor": "8", "scale": "4"}.items()
    raw_latents, image = torch.randn(1, 4, 5, 7), smooth_images(1, 40, 56)
    noise = list(upsampler.draw_noise(raw_latents, 2, None))
    inputs = {
        f"noise_{step}_{name}": part.numpy()
        for step, parts in enumerate(noise)
        for name, part in parts._asdict().items()
    }
    (sample,) = session.run(None, {"raw_latents": raw_latents.numpy(), "image": image.numpy(), **inputs})
    with torch.no_grad():
        expected = upsampler(raw_latents, image=image, num_steps=2, noise=noise).sample
    np.testing.assert_allclose(sample, expected.numpy(), rtol=0, atol=1e-5)


def test_what_is_no_bundle_leaves_no_file(tmp_path):
    components.make_upsampler().save_pretrained(tmp_path / "upsampler")
    with pytest.raises(OSError, match="model_index"):
        export(tmp_path / "upsampler", tmp_path / "out.onnx", num_steps=1, upsampler_only=False)
    assert not (tmp_path / "out.onnx").exists()


def test_a_file_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", None)  # calling it would fail
    with pytest.raises(FileExistsError, match="is not replaced"):
        export(embedded_bundle(), tmp_path, num_steps=1, upsampler_only=False)
