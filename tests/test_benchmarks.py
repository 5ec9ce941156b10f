"""The networks that the benchmarks compare, and the benchmarks themselves at a small size."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks import (
    fuzz,
    fuzz_commands,
    fuzz_models,
    inference,
    latents_between,
    taef2,
    upsampler_trials,
    vae_tiling,
)
from benchmarks.measure import fit_exponent, interleave
from benchmarks.reference import OFFSETS, PlainUPLiFT
from tests.components import make_local_vae, make_vae, seeded, smooth_images
from tests.reference_weights import REFERENCE, reference_state_dict
from tests.training_runs import make_photographs
from uplift_diffusers import UPLiFTModel, UPLiFTSuperResolutionPipeline
from uplift_diffusers.latent_space import LatentCodec
from uplift_diffusers.loading import load_vae
from uplift_diffusers.models.blocks import add_shared_channels
from uplift_diffusers.models.conversion import convert_state_dict
from uplift_diffusers.models.local_attention import neighborhood_offsets

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"encoder_channels": (6, 10, 20), "channels": 20, "refiner_blocks": 3}


@pytest.fixture
def small_models():
    torch.manual_seed(0)
    plain = PlainUPLiFT(**SMALL).eval()
    model = UPLiFTModel(
        encoder_block_out_channels=SMALL["encoder_channels"],
        decoder_channels=SMALL["channels"],
        refiner_channels=SMALL["channels"],
        refiner_layers=SMALL["refiner_blocks"],
    ).eval()
    model.load_state_dict(convert_state_dict(plain.state_dict()))
    return plain, model


@torch.no_grad()
@pytest.mark.parametrize("case", ["sd15.square1", "sd15.wide2"])
def test_the_plain_network_is_the_reference(case):
    """Full size, with the reference's own outputs."""
    golden = load_file(REFERENCE / "golden.safetensors")
    plain = PlainUPLiFT().eval()
    plain.load_state_dict(reference_state_dict("sd15"))
    num_steps = json.loads((REFERENCE / "golden.json").read_text())[case]["iterations"]
    steps = plain(golden[f"{case}.latent"], image=golden[f"{case}.image"], num_steps=num_steps, generator=seeded(1234))
    for step, actual in enumerate(steps):
        torch.testing.assert_close(actual, golden[f"{case}.step{step}"], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_model_computes_what_the_plain_network_computes(small_models, num_steps):
    plain, model = small_models
    latents, image = torch.randn(2, 4, 3, 5, generator=seeded()), torch.rand(2, 3, 24, 40, generator=seeded())
    inputs = {"image": image, "num_steps": num_steps}
    expected = plain(latents, **inputs, generator=seeded(1))
    actual = model(latents, **inputs, generator=seeded(1), return_steps=True).steps
    assert len(actual) == len(expected) == num_steps
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_offsets_are_those_of_the_attender():
    assert tuple(OFFSETS) == neighborhood_offsets(17)


def test_the_inference_benchmark_measures_every_method(tmp_path, capsys):
    methods = ["plain", "uplift", "tiled", "uplift_bf16"]
    inference.main(
        [
            *("--tiny", "--repeats", "2", "--output_dir", str(tmp_path), "--methods", *methods),
            *("--cases", "16x2", "16x4", "32x4", "--no_memory"),
        ]
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert capsys.readouterr().out.strip() == (tmp_path / "report.md").read_text().strip()
    assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")
    assert set(results["exponents"]) == set(methods)  # two sizes at 4x
    small, _, large = results["cases"]
    assert (small["edge"], small["num_steps"], large["edge"], large["num_steps"]) == (16, 1, 32, 2)
    for case in results["cases"]:
        assert list(case["methods"]) == methods
        measured = case["methods"]
        assert all(len(method["seconds"]) == 2 for method in measured.values())
        assert measured["plain"]["difference"] == 0
        assert 0 < measured["uplift"]["difference"] < 1e-4
        assert measured["tiled"]["difference"] < 1e-4 < measured["uplift_bf16"]["difference"] < 0.2
        # Encoder layers are left out where they are not sampled, and tiles compute their surroundings again.
        assert measured["uplift"]["flop"] < measured["plain"]["flop"]
    assert large["methods"]["tiled"]["flop"] > large["methods"]["uplift"]["flop"]


def test_the_peak_of_a_call_is_measured_in_its_own_process():
    options = inference.parse_arguments(["--tiny"])
    small, large = (
        inference.in_fresh_process(inference.measure_peak, "plain", inference.Case.parse(text), options)
        for text in ("16x2", "512x2")
    )
    assert large > 4 * 28 * 512**2 * 2  # the encoder's last maps alone
    assert large > 3 * small > 0


def test_peaks_are_counted_without_computing(capsys):
    inference.main(
        [
            *("--tiny", "--count_memory", "--cases", "256x4", "1024x4", "--tile_size", "64"),
            *("--methods", "plain", "uplift", "plain_bf16"),
        ]
    )
    megabytes = [int(line.split()[-2]) for line in capsys.readouterr().out.splitlines()]
    plain, uplift, half, huge_plain, *_ = megabytes
    assert plain > uplift
    assert half == pytest.approx(plain / 2, rel=0.1)
    assert huge_plain == pytest.approx(4**2 * plain, rel=0.02)


def test_functions_take_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleave(functions, rounds=5, max_seconds=100, device="cpu")
    assert calls == list("abc") * 5
    assert [len(values) for values in seconds.values()] == [5, 5, 5]
    assert len(interleave(functions, rounds=5, max_seconds=0, device="cpu")["a"]) == 2


def test_the_exponent_of_a_power_law_is_found():
    assert fit_exponent([10, 100, 1000], [3 * pixels**1.2 for pixels in (10, 100, 1000)]) == pytest.approx(1.2)


def test_a_local_autoencoder_has_no_seam_and_another_one_does(tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.fromarray((smooth_images(1, 120, 136)[0].permute(1, 2, 0).numpy() * 255).astype("uint8")).save(photo)
    levels = {}
    for name, vae in (("local", make_local_vae()), ("kl", make_vae())):
        vae.save_pretrained(tmp_path / name)
        vae_tiling.main([str(photo), "--vae", str(tmp_path / name), "--tile_size", "64"])
        levels[name] = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert float(levels["local"]["largest"]) < 0.01
    assert float(levels["kl"]["largest"]) > float(levels["kl"]["worst column"]) > float(levels["kl"]["mean"]) > 0.01


def make_embedded_upsampler(**settings) -> UPLiFTModel:
    """Of the bundle's kind, but small, and as if it had been trained: nothing in it is zero."""
    torch.manual_seed(0)
    model = UPLiFTModel(
        **{
            **{"latent_channels": 12, "latent_space": "test-local", "noise_channels": 0, "norm_type": "bias"},
            **{"encoder_block_out_channels": (20, 20), "encoder_patch_size": 4, "encoder_convs_per_block": 2},
            **{"encoder_stem_layers": 1, "encoder_stem_channels": 6, "decoder_channels": 28},
            **{"refiner_channels": 8, "refiner_layers": 2, "image_residual": True, "neighborhood": 17},
            **settings,
        }
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {"refiner_layers": 4},
        {"refiner_channels": 11},
        {"encoder_stem_layers": 3},
        {"encoder_stem_channels": 9},
        {"noise_channels": 2},
    ],
    ids=str,
)
def test_a_trial_begins_as_the_same_function(settings):
    source, grown = make_embedded_upsampler(), make_embedded_upsampler(**settings)
    upsampler_trials.grow(grown, source)
    latents, image = torch.randn(1, 12, 4, 6, generator=seeded()), torch.rand(1, 3, 32, 48, generator=seeded())
    before, after = (model(latents, image=image, num_steps=2, generator=seeded(1)).sample for model in (source, grown))
    torch.testing.assert_close(after, before)


@torch.no_grad()
@pytest.mark.parametrize("size", [9, 25])
def test_another_neighbourhood_begins_with_the_logits_of_the_old_one(size):
    source, other = make_embedded_upsampler(), make_embedded_upsampler(neighborhood=size)
    upsampler_trials.grow(other, source)
    guide = torch.randn(1, 28, 3, 3, generator=seeded())

    def logits_by_offset(model):
        logits = add_shared_channels(model.attender.conv(guide), guide)[0]
        return dict(zip(neighborhood_offsets(model.config.neighborhood), logits, strict=True))

    old, new = logits_by_offset(source), logits_by_offset(other)
    assert len(old.keys() & new.keys()) == min(size, 17)
    for offset, logits in new.items():
        expected = old.get(offset, torch.full((3, 3), upsampler_trials.NEW_LOGIT))
        torch.testing.assert_close(logits, expected)


@torch.no_grad()
def test_an_attender_begins_anew_with_the_same_weights_everywhere():
    model = make_embedded_upsampler()
    upsampler_trials.reset_attender(model)
    guide = torch.randn(1, 28, 3, 3, generator=seeded())
    weights = add_shared_channels(model.attender.conv(guide), guide).softmax(dim=1)
    centre = neighborhood_offsets(17).index((0, 0))
    torch.testing.assert_close(weights[:, centre], torch.full((1, 3, 3), 0.5567), rtol=0, atol=1e-4)


@torch.no_grad()
def test_new_upsamplers_start_from_the_stem_and_a_fitted_linear_part():
    source, fitted = make_embedded_upsampler(), []
    models = {
        name: upsampler_trials.make_model(upsampler_trials.TRIALS[name], source, fitted.append)
        for name in ("new", "new, nearest neighbour", "new, LiFT")
    }
    attended, nearest, lift = models.values()
    assert fitted == [attended, nearest]
    for model in models.values():
        for name, weight in model.state_dict().items():
            assert name.startswith("stem.") == torch.equal(weight, source.state_dict().get(name, weight + 1)), name
    assert (lift.attender, lift.estimator, lift.config.reencode_image) == (None, None, True)

    # With all of its weight on the centre, a Local Attender is the nearest neighbour.
    conv = source.attender.conv
    conv.weight.zero_()
    conv.bias.fill_(-1e4)
    conv.bias[neighborhood_offsets(17).index((0, 0))] = 1e4
    guide, values = torch.randn(1, 28, 8, 12, generator=seeded()), torch.randn(1, 12, 4, 6, generator=seeded(1))
    assert torch.equal(nearest.attender(guide, values), source.attender(guide, values))


def test_trials_train_and_are_measured(tmp_path, capsys):
    photographs = make_photographs(tmp_path / "photographs")
    pipe = UPLiFTSuperResolutionPipeline(make_local_vae(), make_embedded_upsampler())
    pipe.save_pretrained(tmp_path / "pipe")
    capsys.readouterr()
    upsampler_trials.main(
        [
            *("--train_data_dir", str(photographs), "--validation_data_dir", str(photographs)),
            *("--model", str(tmp_path / "pipe"), "--steps", "12"),
            *("--trials", "as it is", "Local Attender started again", "half of the inputs degraded"),
        ]
    )
    _, _, *rows = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:1] == "|")
    _, before, *trained = rows
    assert [row[0] for row in trained] == ["as it is", "Local Attender started again", "half of the inputs degraded"]
    for row in trained:
        steps, *psnr, centre = map(float, row[1:])
        assert steps == 12
        assert 0 < centre < 1
        gain_2x, *gains, gain_jpeg = (now - float(then) for now, then in zip(psnr, before[-6:-1], strict=True))
        assert min(gain_2x, gain_jpeg) > 0.5  # found 0.92 to 0.98
        assert all(gain != 0 for gain in gains)  # measured; a step at 2x is all that they learn


def test_a_handful_of_damaged_files_and_models_and_odd_commands_are_refused_or_taken(tmp_path):
    for part, count in (("files", 20), ("models", 8), ("commands", 8)):
        folder = tmp_path / part
        folder.mkdir()
        attempt = fuzz._prepare(part, folder)
        for seed in range(1, count + 1):
            outcome, what = attempt(seed)
            assert outcome in ("opened", "refused"), (seed, what)


def test_every_damage_of_a_model_changes_it(tmp_path):
    sources = fuzz_models.save_models(tmp_path / "whole")
    whole = read_tree(sources["tiny"])
    for damage in dict.fromkeys(fuzz_models.DAMAGES):
        changes = 0
        for seed in range(4):  # two files that are exchanged may be one
            model = shutil.copytree(sources["tiny"], tmp_path / damage.__name__ / f"{seed}")
            damage(model, np.random.default_rng(seed), tmp_path / fuzz_models.CANARY)
            changes += read_tree(model) != whole
        assert changes >= 3, damage


def read_tree(folder):
    """What is below a folder: the bytes of files, and where links lead."""
    return {
        path.relative_to(folder): str(path.readlink()) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("code", "told", "outcome"),
    [
        (0, "", "opened"),
        (2, "uplift-diffusers upscale: error: no.\n", "refused"),
        (2, "usage: ...\nerror: no.\n", "traceback"),
        (1, "", "traceback"),
        (1, "Traceback (most recent call last):\n", "traceback"),
        (1, "a\x1b[31m.png: no.\n", "traceback"),
        (139, "a.png: no.\n", "traceback"),
    ],
)
def test_what_a_command_says_is_judged(code, told, outcome):
    assert fuzz_commands._judge("upscale", code, told) == outcome


@pytest.mark.slow
def test_two_kills_of_a_folder_job_and_one_of_a_training_leave_no_trace():
    # In a process of its own: the benchmark forks, and the tests before this one have started threads.
    command = [sys.executable, "-m", "benchmarks.kills", "--folders", "2", "--trainings", "1", "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["2 kills", "1 kills"]
    assert all("0 half, 0 wrong, 0 left, 0 exit code" in line for line in lines)


def test_latents_between_powers_of_two_are_compared(tmp_path, capsys):
    pipe = UPLiFTSuperResolutionPipeline(make_local_vae(), make_embedded_upsampler())
    pipe.save_pretrained(tmp_path / "pipe")
    photo = tmp_path / "photo.png"
    Image.fromarray((smooth_images(1, 60, 80)[0].permute(1, 2, 0).numpy() * 255).astype("uint8")).save(photo)
    capsys.readouterr()
    latents_between.main([str(photo), "--model", str(tmp_path / "pipe")])
    rows = dict(line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:1] == "|")
    assert rows["at 1.5x"] == "photo"
    psnr = {name: float(value) for name, value in rows.items() if name[:1] in "ilt"}
    assert len(psnr) == 6
    assert psnr["image, consistency 1"] > psnr["image"]


@pytest.fixture(scope="module")
def taef2_vae():
    torch.manual_seed(0)
    return taef2.AutoencoderTAEF2().eval()


@torch.no_grad()
def test_taef2_is_made_of_its_published_files(taef2_vae, tmp_path):
    weights = {part: getattr(taef2_vae, part).layers.state_dict() for part in ("encoder", "decoder")}
    published = {}
    for name, tensor in weights["decoder"].items():
        index, _, rest = name.partition(".")
        published[f"{int(index) + 1}.{rest}"] = tensor  # after the soft clamp
    save_file(weights["encoder"], tmp_path / "encoder.safetensors")
    save_file(published, tmp_path / "decoder.safetensors")
    files = ["--encoder", str(tmp_path / "encoder.safetensors"), "--decoder", str(tmp_path / "decoder.safetensors")]
    assert taef2.main(["convert", *files, "--output_dir", str(tmp_path / "vae")]) == 0
    codec = LatentCodec(load_vae(tmp_path / "vae"), "flux2-vae")
    image = smooth_images(1, 64, 64)
    latents = codec.encode(image)
    torch.testing.assert_close(latents, taef2_vae.encode(image * 2 - 1).latents)
    torch.testing.assert_close(codec.decode(latents), (taef2_vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))
    assert (codec.space.name, codec.space.shape) == ("flux2-vae", (32, 8))


@torch.no_grad()
def test_every_latent_of_taef2_sees_the_whole_picture(taef2_vae):
    image = smooth_images(1, 256, 256)
    changed = image.clone()
    changed[..., -1, -1] = 1 - changed[..., -1, -1]
    difference = taef2_vae.encode(image).latents - taef2_vae.encode(changed).latents
    assert difference[..., 0, 0].abs().max() > 0


@torch.no_grad()
def test_a_frozen_attender_is_nearest_neighbour():
    model = make_embedded_upsampler(attender_residual=False)
    taef2.freeze_attender(model)
    guide, values = torch.randn(1, 28, 8, 12, generator=seeded()), torch.randn(1, 12, 4, 6, generator=seeded())
    torch.testing.assert_close(model.attender(guide, values), F.interpolate(values, scale_factor=2), rtol=0, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in model.attender.parameters())


@pytest.mark.slow
def test_upsamplers_of_taef2_are_trained_and_measured(taef2_vae, tmp_path, capsys):
    photographs = make_photographs(tmp_path / "photographs")
    taef2_vae.save_pretrained(tmp_path / "vae")
    model = make_embedded_upsampler(
        latent_channels=32, latent_space="flux2-vae", denoise_channel=True, image_normalization="imagenet"
    )
    model.save_pretrained(tmp_path / "other")
    settings = ["--recipe", "embedded", "--vae", str(tmp_path / "vae"), "--train_data_dir", str(photographs)]
    settings += ["--resolution", "32", "--train_batch_size", "1", "--max_train_steps", "1", "--depths", "1"]
    settings += ["--mixed_precision", "no"]  # the other trainings of this process have the same
    stem = ["--latent_space", "flux2-vae", "--initial_stem", str(tmp_path / "other")]
    for name, flags in (("uplift", stem), ("nearest", ["--nearest", *stem]), ("cfm", ["--method", "cfm"])):
        assert taef2.main(["train", *flags, *settings, "--output_dir", str(tmp_path / name)]) == 0
    frozen = UPLiFTModel.from_pretrained(tmp_path / "nearest").attender.conv
    assert frozen.weight.abs().max() == 0
    assert frozen.bias.max() == taef2.CENTRE_LOGIT

    capsys.readouterr()
    methods = [f"{name}={tmp_path / name}" for name in ("uplift", "nearest", "cfm")]
    taef2.main(
        [
            *("evaluate", "--vae", str(tmp_path / "vae"), "--data_dir", str(photographs), "--crop", "64"),
            *("--limit", "2", "--cfm_steps", "1", "--output_dir", str(tmp_path / "report"), "--methods", *methods),
        ]
    )
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    errors = json.loads((tmp_path / "report" / "latents.json").read_text())
    names = {"bilinear", "reencoded", "uplift", "nearest", "cfm"}
    assert errors["4x"].keys() == names
    assert len(errors["2x"]["uplift"]) == 2
    assert "| uplift | 0." in (tmp_path / "report" / "report.md").read_text().partition("## Latents")[2]
    scores = report["results"]["2"]["scores"]
    assert scores.keys() == names | {f"{name}_consistent" for name in names} | {"bicubic", "vae"}
    for name in names:
        assert scores[f"{name}_consistent"]["psnr"]["value"] > scores[name]["psnr"]["value"]
