"""The command, from its options to the files on disk."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from tests.components import make_flow_unet, make_stable_diffusion, make_upsampler
from tests.evaluation.parts import save_photographs
from uplift_diffusers.evaluation.evaluate import choose_device, default_metrics, main
from uplift_diffusers.evaluation.statistics import FeatureStatistics
from uplift_diffusers.latent_space import KNOWN_SPACES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def one_thread():
    """More threads than in the other processes would sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def figures(folder):
    """What must not depend on how a report was made."""
    report = json.loads((folder / "report.json").read_text())
    for scale in report["results"].values():
        scale.pop("costs")
    return {key: value for key, value in report.items() if key not in ("command", "processes", "hardware")}


def test_without_options_there_is_a_table_and_a_sentence_on_what_is_left_out(photographs, capsys):
    assert main(["--data_dir", str(photographs), "--crop", "64", "--limit", "4", "--latency_repeats", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("| uplift |") == 2
    assert "UPLiFT closes" in captured.out
    assert "| PSNR (dB) ↑ (n = 4) | SSIM ↑ (n = 4) | colour shift ↓ (n = 4) | s/image |" in captured.out
    assert "FID, patch-FID and KID are left out. The Inception weights are converted once" in captured.err


def test_report_directory_holds_figures_plots_and_crops(photographs, inception_weights, tmp_path):
    output = tmp_path / "report"
    arguments = ["--data_dir", str(photographs), "--limit", "4", "--crop", "64", "--scales", "2"]
    arguments += ["--methods", "bilinear", "uplift", "--metrics", "fid", "psnr", "--latency_repeats", "1"]
    arguments += ["--inception_weights", str(inception_weights), "--output_dir", str(output)]
    assert main(arguments, program="eval_generative.py") == 0
    report = json.loads((output / "report.json").read_text())
    scores = report["results"]["2"]["scores"]
    assert scores["uplift"]["fid"]["samples"] == 4
    assert scores["uplift"]["psnr"]["value"] > scores["bilinear"]["psnr"]["value"]
    assert report["command"].startswith("eval_generative.py --data_dir")
    assert (output / "report.md").read_text().startswith("## 2x")
    assert (output / "figures.csv").read_text().count("\n") == 1 + 4 * 2
    plots = {path.name for path in (output / "plots").iterdir()}
    assert plots == {"scores.png", "quality_against_time.png", "time_against_size.png"}
    with Image.open(output / "contact_sheet_2x.png") as sheet:
        assert sheet.size == (3 * 68, 16 + 4 * 68)


@pytest.mark.slow
def test_two_processes_and_a_killed_and_resumed_run_give_the_report_of_one(
    photographs, inception_weights, tmp_path, one_thread
):
    # 64 threads of OpenMP on a few cores would take minutes.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    shared = ["--data_dir", str(photographs), "--limit", "4", "--crop", "32", "--scales", "2", "--methods", "uplift"]
    shared += ["--inception_weights", str(inception_weights), "--patches", "1", "--latency_repeats", "0"]
    arguments = {name: [*shared, "--output_dir", str(tmp_path / name)] for name in ("one", "two", "three")}
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]  # of CPUs, where they are all
    two = subprocess.Popen(
        [sys.executable, *launch, str(ROOT / "eval_generative.py"), *arguments["two"]], env=environment
    )

    killed = multiprocessing.get_context("fork").Process(target=main, args=(arguments["three"],))
    killed.start()
    while len(finished := list((tmp_path / "three").rglob("*.safetensors"))) < 2:
        assert killed.is_alive()
        time.sleep(0.02)
    killed.kill()
    killed.join()
    assert not (tmp_path / "three" / "report.json").exists()
    times = {path: path.stat().st_mtime_ns for path in finished}
    assert main(arguments["three"], program="eval_generative.py") == 0
    assert times == {path: path.stat().st_mtime_ns for path in finished}
    assert main(arguments["one"], program="eval_generative.py") == 0
    assert two.wait() == 0

    expected = figures(tmp_path / "one")
    measured = expected["results"]["2"]["scores"]["uplift"]
    assert {"fid", "patch_fid", "kid", "ssim"} < measured.keys()
    assert figures(tmp_path / "two") == expected
    assert figures(tmp_path / "three") == expected
    assert json.loads((tmp_path / "two" / "report.json").read_text())["processes"] == 2


def test_prompts_go_through_stable_diffusion_and_are_compared_with_real_images(inception_weights, tmp_path):
    make_stable_diffusion(tmp_path / "tokenizer").save_pretrained(tmp_path / "sd")
    make_upsampler().save_pretrained(tmp_path / "uplift")
    (tmp_path / "prompts.txt").write_text("a cat\n\nкошка\nсat at sea\n", encoding="utf-8")
    real = save_photographs(tmp_path / "real", count=2, size=(64, 70))
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--stable_diffusion", str(tmp_path / "sd")]
    arguments += ["--model", str(tmp_path / "uplift"), "--real_images", str(real), "--metrics", "fid"]
    arguments += ["--inception_weights", str(inception_weights), "--num_inference_steps", "2", "--scales", "2"]
    arguments += ["--latency_repeats", "1", "--latency_sizes", "128", "--output_dir", str(tmp_path / "report")]
    assert main([*arguments, "--methods", "bilinear", "uplift"]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["data"]["count"] == 3
    scores = report["results"]["2"]["scores"]
    assert scores["uplift"]["fid"]["samples"] == 2  # of 3 prompts and 2 real images
    assert scores["uplift"]["fid"]["value"] != scores["bilinear"]["fid"]["value"]
    assert report["results"]["2"]["costs"]["uplift"][-1]["edge"] == 128
    with Image.open(tmp_path / "report" / "contact_sheet_2x.png") as sheet:
        assert sheet.width == 2 * 132


def test_fresh_measures_again_and_a_second_run_does_not(photographs, tmp_path):
    arguments = ["--data_dir", str(photographs), "--limit", "1", "--crop", "64", "--scales", "2"]
    arguments += ["--methods", "bicubic", "--latency_repeats", "0", "--output_dir", str(tmp_path)]

    def times(*options):
        assert main([*arguments, *options]) == 0
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "records").rglob("*.safetensors")}

    first = times()
    assert len(first) == 1
    assert times() == first
    again = times("--fresh")
    assert again.keys() == first.keys()
    assert again != first


def test_precision_and_compression_are_options(photographs, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    arguments = ["--data_dir", str(photographs), "--limit", "2", "--crop", "64", "--scales", "2", "--device", "cpu"]
    arguments += ["--model", str(tmp_path / "model"), "--methods", "bicubic", "vae", "--latency_repeats", "0"]

    def psnr(*options):
        output = tmp_path / "-".join(["report", *options])
        assert main([*arguments, "--output_dir", str(output), *options]) == 0
        report = json.loads((output / "report.json").read_text())
        scores = report["results"]["2"]["scores"]
        return report, scores["bicubic"]["psnr"]["value"], scores["vae"]["psnr"]["value"]

    report, bicubic, vae = psnr()
    assert report["dtype"] == "float32"
    assert "jpeg_quality" not in report["protocol"]
    report, bicubic_in_half, vae_in_half = psnr("--dtype", "bfloat16")
    assert report["dtype"] == "bfloat16"
    assert bicubic_in_half == bicubic  # no network
    assert vae_in_half != vae
    assert vae_in_half == pytest.approx(vae, abs=0.5)
    report, bicubic_of_jpeg, vae_of_jpeg = psnr("--jpeg_quality", "20")
    assert report["protocol"]["jpeg_quality"] == 20
    assert bicubic_of_jpeg < bicubic - 0.3
    assert vae_of_jpeg == vae  # of the photograph, which is not compressed


@pytest.mark.parametrize("name", ["meta", "cuda:77", "gpu"])
def test_devices_that_are_not_there_are_refused(name):
    state = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    assert choose_device("auto", state) == choose_device("cpu", state) == torch.device("cpu")
    with pytest.raises(ValueError, match=f"`device` must be auto, cpu or a device that PyTorch finds here, .*{name}"):
        choose_device(name, state)


def test_metrics_that_statistics_cannot_serve_are_no_default():
    for statistics, expected in (
        (None, ("fid", "kid")),
        (FeatureStatistics(features=torch.zeros(4, 2048)), ("fid", "kid")),
        (FeatureStatistics(mean=torch.zeros(2048), covariance=torch.eye(2048)), ("fid",)),
    ):
        protocol = SimpleNamespace(paired=False, statistics=statistics)
        names, note = default_metrics(protocol, inception_weights=None)
        assert names == expected
        assert note.startswith("KID is left out") == ("kid" not in expected)


def test_help_answers_without_loading_libraries(capsys):
    assert main(["--help"]) == 0
    assert "usage: uplift-diffusers evaluate" in capsys.readouterr().out
    code = "import sys, uplift_diffusers.evaluation.evaluate; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_without_the_extra_its_name_is_said(monkeypatch, capsys):
    monkeypatch.setattr("uplift_diffusers.evaluation.evaluate.EXTRA_PACKAGES", ("accelerate", "not_there"))
    assert main(["--data_dir", "photos"]) == 1
    assert 'needs not_there, which is not installed: pip install "uplift-diffusers[eval]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data_dir", "{empty}"], "No images below"),
        (["--data_dir", "{photographs}/none"], "is not a folder"),
        (["--data_dir", "{photographs}"], "`crop` must fit into every photograph, got 512 and 5 smaller ones"),
        (["--data_dir", "{photographs}", "--crop", "60"], "`crop` must be a multiple of 16 for 2x, got 60"),
        (["--data_dir", "{grey}", "--crop", "64"], "must be in colour, got 1 in greyscale"),
        (["--data_dir", "{photographs}", "--crop", "64", "--methods", "cfm"], "say where the weights are, got 'cfm'"),
        (["--data_dir", "{photographs}", "--crop", "64", "--methods", "a={empty}"], "no file named config.json"),
        (["--data_dir", "{photographs}", "--crop", "64", "--metrics", "sim"], "`metrics` must be of"),
        (["--data_dir", "{photographs}", "--crop", "64", "--metrics", "fid"], "Inception weights are converted once"),
        (
            ["--data_dir", "{photographs}", "--crop", "64", "--limit", "1", "--metrics", "fid", *("{weights}",)],
            "`metrics` must not have 'fid' for fewer than 2 images, got 1",
        ),
        (
            ["--data_dir", "{photographs}", "--crop", "64", "--latency_sizes", "50"],
            "`latency_sizes` must be multiples of 16 for 2x, got 50",
        ),
        (
            ["--data_dir", "{photographs}", "--guidance_scale", "1"],
            "`guidance_scale` must not be given with --data_dir",
        ),
        (["--data_dir", "{photographs}", "--crop", "64", "--jpeg_quality", "101"], "must be from 1 to 100, got 101"),
        (["--data_dir", "{photographs}", "--fresh"], "`fresh` must not be given without --output_dir"),
        (["--data_dir", "{photographs}", "--crop", "64", "--model", "{ddpm}"], "`model` must be a pipeline of this"),
        (["--prompts", "{prompts}", "--crop", "64"], "`crop` must not be given with --prompts"),
        (["--prompts", "{prompts}", "--jpeg_quality", "9"], "`jpeg_quality` must not be given with --prompts"),
        (["--prompts", "{empty}/none.txt"], "`prompts` must be a file"),
        (["--prompts", "{prompts}"], "`stable_diffusion` must be given with --prompts"),
        (["--prompts", "{prompts}", "--metrics", "ssim"], "`metrics` must be of fid, patch_fid, kid for prompts"),
    ],
)
def test_what_cannot_be_measured_ends_with_one_sentence(
    arguments, sentence, photographs, inception_weights, tmp_path, capsys, monkeypatch
):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    (tmp_path / "empty").mkdir()
    (tmp_path / "grey").mkdir()
    Image.fromarray(np.zeros((80, 80), dtype=np.uint8)).save(tmp_path / "grey" / "grey.png")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    if "{ddpm}" in arguments:
        DDPMPipeline(unet=make_flow_unet(KNOWN_SPACES["sd15-vae"]), scheduler=DDPMScheduler()).save_pretrained(
            tmp_path / "ddpm"
        )
    places = {name: tmp_path / name for name in ("empty", "grey", "ddpm")}
    places |= {"photographs": photographs, "prompts": tmp_path / "prompts.txt"}
    if "{weights}" in arguments:
        arguments = [*arguments[:-1], "--inception_weights", str(inception_weights)]
    assert main([argument.format(**places) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), 1, "Out of memory. Try smaller crops"),
        (KeyboardInterrupt(), 130, "Interrupted. The measurements in --output_dir are kept"),
    ],
    ids=["memory", "interruption"],
)
def test_a_run_that_breaks_off_ends_with_one_sentence(error, code, sentence, monkeypatch, capsys):
    def fail(options):
        raise error

    monkeypatch.setattr("uplift_diffusers.evaluation.evaluate.run", fail)
    assert main(["--data_dir", "photos"]) == code
    assert capsys.readouterr().err.startswith(sentence)
