"""The measurement as a whole, and its report."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.components import make_upsampler
from tests.evaluation.parts import TinyInception, all_metrics, truth_method
from uplift_diffusers import UPLiFTSuperResolutionPipeline
from uplift_diffusers.evaluation.measure import Evaluation, compute_results, evaluate, gap_closed, rows_to_show
from uplift_diffusers.evaluation.methods import Method, bicubic, bilinear, pipeline_method, vae_round_trip
from uplift_diffusers.evaluation.metrics import Metrics
from uplift_diffusers.evaluation.protocols import PhotographFiles, SuperResolution
from uplift_diffusers.evaluation.records import Entry, RecordStore
from uplift_diffusers.evaluation.report import (
    describe_run,
    make_contact_sheet,
    make_plots,
    report_csv,
    report_json,
    report_markdown,
    warnings_of,
)
from uplift_diffusers.evaluation.statistics import Estimate


def test_returning_the_truth_scores_perfectly(photographs):
    protocol = SuperResolution(photographs, scales=(2,), crop=64)
    evaluation = evaluate(protocol, [truth_method()], all_metrics())
    scores = evaluation[2].scores["truth"]
    assert scores["psnr"] == Estimate(math.inf, 5, math.inf, math.inf)
    assert scores["ssim"].value == pytest.approx(1, abs=1e-6)
    assert scores["fid"].value == pytest.approx(0, abs=1e-3)
    assert scores["patch_fid"].value == pytest.approx(0, abs=1e-3)
    assert (scores["fid"].samples, scores["patch_fid"].samples) == (5, 20)
    assert scores["color_shift"].value == 0


def test_figures_are_means_over_photographs_and_patch_fid_follows_its_seed(photographs):
    darker = Method("darker", lambda sample: (sample.truth - 10 / 255).clamp(0, 1), {"method": "darker"})
    protocol = SuperResolution(photographs, scales=(2,), crop=64)
    scores = evaluate(protocol, [darker], all_metrics())[2].scores["darker"]
    expected = []
    for item in protocol.items:
        truth = protocol.real_pixels(item).double()
        expected.append(10 * math.log10(255**2 / ((truth - 10).clamp(0, 255) - truth).square().mean().item()))
    assert scores["psnr"].value == pytest.approx(np.mean(expected), abs=1e-4)
    assert evaluate(protocol, [darker], all_metrics())[2].scores["darker"] == scores
    other = evaluate(protocol, [darker], all_metrics(seed=1))[2].scores["darker"]
    assert other["patch_fid"].value != scores["patch_fid"].value
    assert other["fid"] == scores["fid"]


def test_shares_of_two_processes_give_the_figures_of_one(photographs, pipeline, tmp_path):
    vae, space = pipeline.vae, pipeline.latent_space
    protocol = SuperResolution(photographs, scales=(2, 4), crop=64)
    methods = [bicubic(vae, space), pipeline_method("uplift", pipeline, seed=0), vae_round_trip(vae, space)]
    alone = Evaluation(protocol, methods, all_metrics(), tmp_path / "one")
    alone.run()
    shared = Evaluation(protocol, methods, all_metrics(), tmp_path / "two")
    for rank in (1, 0):
        shared.run(rank=rank, world_size=2)
    one, two = (compute_results(evaluation, seed=0) for evaluation in (alone, shared))
    assert {scale: found.scores for scale, found in one.items()} == {
        scale: found.scores for scale, found in two.items()
    }
    assert one[2].differences == two[2].differences
    assert one[2].scores["uplift"] != one[4].scores["uplift"]
    psnr = [one[2].values[name]["psnr"] for name in ("uplift", "bicubic")]
    assert one[2].differences["bicubic"]["psnr"].value == pytest.approx((psnr[0] - psnr[1]).mean())


def test_a_stopped_run_goes_on_without_measuring_again(photographs, tmp_path):
    calls = []

    def upscale(sample):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append((sample.name, sample.scale))
        return (sample.truth * 0.9).clamp(0, 1)

    protocol = SuperResolution(photographs, scales=(2, 4), crop=64)
    evaluation = Evaluation(protocol, [Method("mine", upscale, {})], all_metrics(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run()
    stopped = list(calls)
    calls.clear()
    evaluation.run()
    assert sorted(stopped + calls) == sorted((item.name, scale) for item in protocol.items for scale in (2, 4))
    whole = Method("mine", lambda sample: (sample.truth * 0.9).clamp(0, 1), {})
    expected = evaluate(protocol, [whole], all_metrics())
    assert compute_results(evaluation, seed=0)[4].scores == expected[4].scores


def test_records_are_not_mistaken_for_those_of_other_settings(photographs, pipeline, tmp_path):
    protocol = SuperResolution(PhotographFiles(photographs, limit=1), scales=(2,), crop=64)
    other_weights = UPLiFTSuperResolutionPipeline(vae=pipeline.vae, upsampler=make_upsampler("test-local", 12))
    with torch.no_grad():
        next(other_weights.upsampler.parameters()).add_(0.1)
    variants = [
        (protocol, pipeline_method("mine", pipeline, seed=0), Metrics(names=("psnr",))),
        (protocol, pipeline_method("mine", pipeline, seed=1), Metrics(names=("psnr",))),
        (protocol, pipeline_method("mine", pipeline, seed=0, options={"tile_size": 64}), Metrics(names=("psnr",))),
        (protocol, pipeline_method("mine", other_weights, seed=0), Metrics(names=("psnr",))),
        (protocol, pipeline_method("mine", pipeline, seed=0), Metrics(names=("ssim",))),
        (
            SuperResolution(PhotographFiles(photographs, limit=1), scales=(2,), crop=48),
            pipeline_method("mine", pipeline, seed=0),
            Metrics(names=("psnr",)),
        ),
    ]
    for used_protocol, method, metrics in (*variants, *variants[:2]):
        Evaluation(used_protocol, [method], metrics, tmp_path).run()
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(variants)


def test_records_are_not_mistaken_for_those_of_other_versions_or_another_device(photographs, tmp_path, monkeypatch):
    protocol = SuperResolution(PhotographFiles(photographs, limit=2), scales=(2,), crop=64)

    def count(**settings):
        Evaluation(
            protocol, [truth_method()], Metrics(names=("fid", "psnr"), inception=TinyInception()), tmp_path, **settings
        ).run()
        return len(list(tmp_path.rglob("*.safetensors")))

    assert count() == 4
    assert count() == 4
    assert count(device="meta") == 8
    monkeypatch.setattr("uplift_diffusers.evaluation.records.__version__", "0.0")
    assert count() == 12
    monkeypatch.undo()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0" if name == "torchvision" else "1.0")
    assert count() == 16


ENTRY = Entry("2x-mine", "sub/a photo.png", {"seed": 0})


@pytest.mark.parametrize("damage", ["cut off", "a bit", "another identity", "no record"])
def test_damaged_records_are_told_of_in_one_line_and_count_as_missing(damage, tmp_path, caplog):
    store, record = RecordStore(tmp_path), {"features": torch.arange(64.0), "psnr": torch.tensor(math.inf).double()}
    store.write(ENTRY, record)
    assert store.holds(ENTRY)
    assert all(torch.equal(tensor, record[name]) for name, tensor in store.read(ENTRY).items())
    path = tmp_path / ENTRY.path
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "a bit":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "another identity":
        other = replace(ENTRY, identity={"seed": 1})
        store.write(other, record)
        path.write_bytes((tmp_path / other.path).read_bytes())
    else:
        path.write_text("no")
    assert not caplog.messages
    assert not store.holds(ENTRY)
    assert len(caplog.messages) == 1
    assert str(path) in caplog.messages[0]
    assert caplog.messages[0].endswith("It is measured again.")
    with pytest.raises(ValueError, match="is damaged"):
        store.read(ENTRY)
    store.write(ENTRY, record)
    assert store.holds(ENTRY)


def test_only_what_is_damaged_is_measured_again(photographs, tmp_path):
    calls = []

    def upscale(sample):
        calls.append(sample.name)
        return sample.truth

    def run(**settings):
        calls.clear()
        protocol = SuperResolution(PhotographFiles(photographs, limit=3), scales=(2,), crop=64)
        store = RecordStore(tmp_path, **settings)
        Evaluation(protocol, [Method("mine", upscale, {})], Metrics(names=("psnr",)), store).run()
        return calls

    assert run() == ["0.png", "1.png", "2.png"]
    next(tmp_path.rglob("1.png-*")).write_text("no")
    assert run() == ["1.png"]
    assert run() == []
    assert run(fresh=True) == ["0.png", "1.png", "2.png"]


def test_metrics_that_need_more_images_are_refused(photographs, tmp_path):
    protocol = SuperResolution(PhotographFiles(photographs, limit=1), scales=(2,), crop=64)
    with pytest.raises(ValueError, match="`metrics` must not have 'fid' for fewer than 2 images, got 1"):
        Evaluation(protocol, [truth_method()], all_metrics(), tmp_path)
    assert evaluate(protocol, [truth_method()], Metrics(names=("ssim",)))[2].scores["truth"]["ssim"].samples == 1


@pytest.fixture(scope="module")
def report(photographs, pipeline, tmp_path_factory):
    vae, space = pipeline.vae, pipeline.latent_space
    methods = [truth_method(), bilinear(vae, space), pipeline_method("uplift", pipeline, seed=0)]
    methods.append(vae_round_trip(vae, space))
    protocol = SuperResolution(photographs, scales=(2,), crop=64)
    evaluation = Evaluation(protocol, methods, all_metrics(), tmp_path_factory.mktemp("records"))
    evaluation.run()
    results = compute_results(evaluation, seed=0, costs=evaluation.measure_costs(edges={2: [32, 64]}, repeats=1))
    return evaluation, results, describe_run(evaluation, command="eval_generative.py", seed=0, processes=1)


def test_report_holds_every_figure_and_what_it_comes_from(report):
    _, results, run = report
    values = json.loads(json.dumps(report_json(results, run), allow_nan=False))
    scores = values["results"]["2"]["scores"]
    assert set(scores) == {"truth", "bilinear", "uplift", "vae"}
    assert set(scores["uplift"]) == {"fid", "patch_fid", "kid", "psnr", "ssim", "color_shift"}
    assert scores["truth"]["psnr"]["value"] == "inf"
    assert scores["uplift"]["ssim"]["low"] < scores["uplift"]["ssim"]["value"] < scores["uplift"]["ssim"]["high"]
    assert values["results"]["2"]["uplift_minus"]["truth"]["psnr"] is None
    assert [cost["edge"] for cost in values["results"]["2"]["costs"]["uplift"]] == [32, 64]
    assert values["data"]["count"] == 5
    assert values["methods"]["uplift"]["parameters"]["upsampler"] > 0
    assert {"torch", "torchmetrics", "python"} <= values["versions"].keys()
    assert "below 2048" in values["warnings"][0]


def test_table_names_every_method_and_warns(report):
    _, results, run = report
    text = report_markdown(results, run)
    assert (
        "| method | parameters | FID ↓ (n = 5) | patch-FID ↓ (n = 20) | KID ↓ (n = 5) | PSNR (dB) ↑ (n = 5) |" in text
    )
    for name in ("truth", "bilinear", "uplift", "vae"):
        assert f"| {name} |" in text
    assert "| ∞ |" in text
    assert "**FID from 5 and 20 samples: below 2048" in text
    assert "UPLiFT closes" in text


def test_methods_without_a_cost_stay_in_the_table_and_out_of_the_plots(report):
    evaluation, results, _ = report
    untimed = [replace(method, timed=method.name != "truth", note="Mind this.") for method in evaluation.methods]
    again = Evaluation(evaluation.protocol, untimed, evaluation.metrics, evaluation.store.folder)
    costs = again.measure_costs(edges={2: [64]}, repeats=1)
    assert "truth" not in costs[2]
    results = compute_results(again, seed=0, costs=costs)
    text = report_markdown(results, describe_run(again, command="eval_generative.py", seed=0, processes=1))
    assert next(line for line in text.splitlines() if line.startswith("| truth")).endswith("| – | – | – |")
    assert text.count("**Mind this.**") == 4
    assert len(make_plots(results)["quality_against_time"].axes[1].lines) == 3  # SSIM


def test_statistics_without_a_count_are_told_of_and_strange_numbers_shown_as_what_they_are(report):
    _, results, run = report
    unknown = {**run, "real_images": {"count": None, "digest": ""}}
    assert "The number of real images is unknown" in warnings_of(results, unknown)[0]
    scores = {name: {"ssim": Estimate(value, 5)} for name, value in (("a", math.nan), ("b", -math.inf))}
    found = replace(results[2], scores=scores, differences={}, costs={})
    methods = {name: {"parameters": {}, "note": ""} for name in scores}
    text = report_markdown({2: found}, {**run, "methods": methods})
    assert "| not a number |" in text
    assert "| -∞ |" in text


def test_rows_hold_the_figures_of_single_outputs(report):
    evaluation, results, _ = report
    lines = report_csv(results, [item.name for item in evaluation.protocol.items]).splitlines()
    assert lines[0] == "item,scale,method,psnr,ssim,color_shift"
    assert len(lines) == 1 + 5 * 4
    row = next(line for line in lines if line.startswith("3.png,2,uplift,")).split(",")
    assert float(row[3]) == results[2].values["uplift"]["psnr"][3]


def test_plots_show_what_was_measured(report):
    _, results, _ = report
    plots = make_plots(results)
    assert set(plots) == {"scores", "quality_against_time", "time_against_size"}
    bars, _ = plots["scores"].axes
    assert bars.get_ylabel() == "FID ↓ (n = 5)"
    heights = [bar.get_height() for bar in bars.patches]
    assert heights == [results[2].scores[name]["fid"].value for name in results[2].scores]
    points = plots["quality_against_time"].axes[0]
    assert len(points.lines) == 3  # not the truth, whose PSNR is infinite
    assert [len(line.get_xdata()) for line in plots["time_against_size"].axes[0].lines] == [2] * 4


def test_contact_sheet_has_a_column_for_every_method(report):
    evaluation, results, _ = report
    rows = rows_to_show(5)
    sheet = make_contact_sheet(results[2].previews, evaluation.protocol.previews(rows))
    assert sheet.size == (5 * 68, 16 + 5 * 68)
    pixels = np.asarray(sheet)
    assert (pixels[16:80, 0:64] == pixels[16:80, 68:132]).all()  # the photograph, and the method that returns it
    assert rows_to_show(60) == [0, 10, 20, 30, 40, 50]


def test_gap_closed_runs_from_bilinear_to_the_round_trip():
    scores = {name: {"psnr": Estimate(value, 1)} for name, value in (("bilinear", 20), ("uplift", 29), ("vae", 32))}
    assert gap_closed(scores) == pytest.approx(0.75)
    assert gap_closed({**scores, "vae": scores["bilinear"]}) is None
