import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from uplift_diffusers.evaluation import cli
from uplift_diffusers.evaluation.methods import bicubic
from uplift_diffusers.evaluation.super_resolution import (
    Score,
    evaluate,
    format_table,
    gap_closed,
    read_centre_crop,
    reduce_by,
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for index in range(3):
        noise = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
        noise.resize((120, 80), Image.BICUBIC).save(folder / f"{index}.png")
    return folder


def test_returning_the_truth_scores_perfectly(photographs):
    report = evaluate(photographs, {"truth": lambda low, high: high}, scales=(2,), crop=64)
    score = report["scores"][2]["truth"]
    assert score.psnr == math.inf
    assert score.ssim == pytest.approx(1, abs=1e-6)
    assert report["photographs"] == 3


def test_figures_are_means_of_the_definition_over_photographs(photographs):
    def darker(low, high):
        return (high - 10 / 255).clamp(0, 1)

    report = evaluate(photographs, {"darker": darker}, scales=(2,), crop=64)
    expected = []
    for path in sorted(photographs.iterdir()):
        high = (read_centre_crop(path, 64) * 255).double()
        error = (high - 10).clamp(0, 255) - high
        expected.append(10 * math.log10(255**2 / error.square().mean().item()))
    assert report["scores"][2]["darker"].psnr == pytest.approx(np.mean(expected), abs=1e-3)


def test_reduction_and_bicubic_are_pillows(photographs):
    high = read_centre_crop(photographs / "0.png", 64)
    with Image.open(photographs / "0.png") as file:
        crop = file.crop((28, 8, 92, 72))
    low = crop.resize((32, 32), Image.BICUBIC)
    assert (np.asarray(crop) == (high[0].permute(1, 2, 0).numpy() * 255).round()).all()
    assert (np.asarray(low) == (reduce_by(high, 2)[0].permute(1, 2, 0).numpy() * 255).round()).all()
    for enlarged, channel in zip(bicubic(reduce_by(high, 2), high)[0], low.split(), strict=True):
        expected = np.asarray(channel.convert("F").resize((64, 64), Image.BICUBIC)) / 255
        np.testing.assert_allclose(enlarged.numpy(), expected.clip(0, 1), rtol=0, atol=1e-4)


def test_gap_closed_runs_from_bilinear_to_the_round_trip():
    scores = {"bilinear": Score(20.0, 0, 0), "uplift": Score(29.0, 0, 0), "vae": Score(32.0, 0, 0)}
    assert gap_closed(scores) == pytest.approx(0.75)


def test_table_names_every_figure_and_its_sample_count(photographs):
    table = format_table(evaluate(photographs, {"bicubic": bicubic}, scales=(2, 4), crop=64))
    assert table.count("| bicubic |") == 2
    assert "3 photographs, centre 64 px" in table
    assert f"torch {torch.__version__}" in table


def test_crops_larger_than_a_photograph_are_refused(photographs):
    with pytest.raises(ValueError, match="`crop` must fit into every photograph, got 128"):
        evaluate(photographs, {"bicubic": bicubic}, scales=(2,), crop=128)
    with pytest.raises(ValueError, match="`crop` must be a multiple of every scale"):
        evaluate(photographs, {"bicubic": bicubic}, scales=(3,), crop=64)


def test_command_measures_the_embedded_bundle_and_writes_the_report(photographs, tmp_path, capsys):
    arguments = [
        "--data_dir",
        str(photographs),
        "--crop",
        "64",
        "--scales",
        "2",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert cli.main(arguments) == 0
    assert "UPLiFT closes" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["scores"]["2"]) == {"bicubic", "bilinear", "uplift", "vae"}
    assert report["scores"]["2"]["vae"]["psnr"] > report["scores"]["2"]["bilinear"]["psnr"]


def test_command_ends_with_one_sentence_where_there_is_nothing_to_measure(tmp_path, capsys):
    assert cli.main(["--data_dir", str(tmp_path)]) == 1
    assert "No images below" in capsys.readouterr().err
