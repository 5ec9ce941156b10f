"""What a run leaves behind: the model, its card, figures and pictures of validation, trackers, the hub."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from huggingface_hub import ModelCard, constants, upload_folder

from tests.hub_server import HubServer, point_at
from tests.training_runs import logged, make_config, make_model, make_photographs, make_vae, run_training
from uplift_diffusers import LatentSpace, UPLiFTModel
from uplift_diffusers.data.dataset import Crop, Photographs
from uplift_diffusers.data.degradation import through_jpeg
from uplift_diffusers.data.pyramid import image_pyramid
from uplift_diffusers.data.sources import FolderSource
from uplift_diffusers.latent_space import LatentCodec
from uplift_diffusers.runtime import device_name
from uplift_diffusers.training import monitoring, publishing
from uplift_diffusers.training import train as training
from uplift_diffusers.training.monitoring import UpsamplerValidation
from uplift_diffusers.training.train import main, make_accelerator

TOKEN = "hf_secret"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    make_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def flags(photographs, vae, tmp_path, monkeypatch):
    """Of a run of three steps, as `train_latent.py` takes them, validated on small crops."""
    monkeypatch.setattr(monitoring, "VALIDATION_RESOLUTION", 64)
    settings = {
        "recipe": "embedded",
        "vae": vae,
        "train_data_dir": photographs,
        "output_dir": tmp_path / "run",
        "resolution": 32,
        "train_batch_size": 1,
        "max_train_steps": 3,
        "checkpointing_steps": 2,
        "logging_steps": 1,
        "mixed_precision": "no",
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the local hub speaks Git LFS
    with HubServer(tmp_path / "hub") as server:
        point_at(monkeypatch, server.url, tmp_path / "cache")
        server.write_token = TOKEN
        yield server


def test_the_result_loads_and_its_card_says_how_it_came_about(flags, photographs, tmp_path):
    flags += ["--validation_data_dir", str(photographs), "--license", "cc-by-4.0", "--learning_rate", "2e-3"]
    assert main(flags) == 0
    model = UPLiFTModel.from_pretrained(tmp_path / "run")
    assert model.config.latent_space == "test"

    card = ModelCard.load(tmp_path / "run" / "README.md", ignore_metadata_errors=False)
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "diffusers")
    assert card.data.pipeline_tag == "image-to-image"
    assert "super-resolution" in card.data.tags
    assert card.data.base_model is None  # the VAE is a local folder
    assert f"5 photographs of `{photographs.name}`" in card.text
    assert "train_latent.py --recipe embedded --method uplift" in card.text
    assert "--resolution 32" in card.text
    assert "| learning_rate | 0.002 |" in card.text
    assert f"| loss | {logged(tmp_path / 'run')[-1]:.6g} |" in card.text
    assert f"| val_psnr_2x | {logged(tmp_path / 'run', 'val_psnr_2x')[-1]:.6g} |" in card.text
    assert f"1 x {device_name('cpu')}, " in card.text
    assert str(tmp_path) not in card.text
    assert not list((tmp_path / "run").glob(".*"))


def test_a_card_without_a_licence_asks_for_one(flags, tmp_path):
    assert main(flags) == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Not declared" in card
    assert "There was no validation" in card
    assert "\nlicense:" not in card


def test_a_card_names_the_hub_repositories_that_a_model_is_made_from(photographs, tmp_path):
    run_training(photographs, tmp_path, max_train_steps=1)
    path = tmp_path / "checkpoint-1" / "state.json"
    state = json.loads(path.read_text())
    state["settings"] |= {"vae": "owner/pipeline", "train_data_dir": None, "dataset_name": "owner/photographs"}
    path.write_text(json.dumps(state))
    config = make_config(photographs, tmp_path, license="mit")
    card = publishing.model_card(
        make_model(), config, accelerator=Accelerator(cpu=True), command="train", repository="owner/model"
    )
    assert (card.data.base_model, card.data.datasets) == ("owner/pipeline", "owner/photographs")
    assert card.content.startswith("---\n")


@torch.no_grad()
def test_validation_on_jpegs_tells_the_model_how_much_there_is_to_clean(photographs, monkeypatch):
    monkeypatch.setattr(monitoring, "VALIDATION_RESOLUTION", 64)
    vae = make_vae().eval()
    space = LatentSpace.of(vae)
    seen = []

    def bilinear(image, depth, denoise, generator):
        seen.append((depth, image, denoise))
        return F.interpolate(LatentCodec(vae, space).encode(image), scale_factor=2**depth, mode="bilinear")

    figures = UpsamplerValidation(bilinear, vae, space, photographs, jpeg_qualities=(90, 30))().figures
    images = monitoring.validation_crops(photographs)
    for depth, small in enumerate(image_pyramid(images, 2)[1:], 1):
        decoded = LatentCodec(vae, space).decode(bilinear(through_jpeg(small, quality=30), depth, None, None))
        psnr = -10 * (decoded - images).square().mean(dim=(1, 2, 3)).log10().mean().item()
        assert figures[f"val_psnr_{2**depth}x_jpeg30"] == pytest.approx(psnr, abs=1e-3)
    assert [depth for depth, _, _ in seen[:6]] == [1, 1, 1, 2, 2, 2]
    strengths = [denoise.unique().item() for _, _, denoise in seen[:3]]
    assert strengths == pytest.approx([0.0, 1 / 7, 1.0])
    clean, high, low = (image for _, image, _ in seen[:3])
    assert (high - clean).abs().mean() < (low - clean).abs().mean()


@torch.no_grad()
def test_validation_compares_with_bilinear_interpolation_of_the_latents(photographs):
    vae = make_vae().eval()
    space = LatentSpace.of(vae)

    def bilinear(image, depth, denoise, generator):
        return F.interpolate(LatentCodec(vae, space).encode(image), scale_factor=2**depth, mode="bilinear")

    validation = UpsamplerValidation(bilinear, vae, space, photographs)()
    for scale in ("2x", "4x"):
        expected = pytest.approx(validation.figures[f"val_latent_mse_bilinear_{scale}"], rel=1e-5)
        assert validation.figures[f"val_latent_mse_{scale}"] == expected
    held_out = Photographs(FolderSource(photographs), Crop(resolution=256))
    image = torch.stack([held_out[0, index] for index in range(5)]).float() / 255
    low = F.interpolate(image, size=(128, 128), mode="bicubic", antialias=True).mul(255).round().clamp(0, 255) / 255
    enlarged, target = bilinear(low, 1, None, None), LatentCodec(vae, space).encode(image)
    assert validation.figures["val_latent_mse_2x"] == pytest.approx(F.mse_loss(enlarged, target).item(), rel=1e-4)
    mse = (LatentCodec(vae, space).decode(enlarged) - image).square().mean(dim=(1, 2, 3))
    assert validation.figures["val_psnr_2x"] == pytest.approx(-10 * mse.log10().mean().item(), rel=1e-4)

    picture = np.asarray(validation.pictures["input-bilinear-prediction-target"])
    assert picture.shape == (4 * 256, 4 * 256, 3)
    low, interpolated, predicted, target = (picture[:256, left : left + 256] for left in range(0, 1024, 256))
    assert np.array_equal(interpolated, predicted)
    assert np.array_equal(low[0, 0], low[3, 3])  # four times the pixel
    expected = LatentCodec(vae, space).decode(LatentCodec(vae, space).encode(image[:1]))[0].permute(1, 2, 0) * 255
    assert np.abs(target - expected.numpy()).max() <= 1


def test_validation_leaves_the_training_as_it_was(flags, photographs, tmp_path):
    assert main(flags) == 0
    validated = [str(tmp_path / "validated") if part == str(tmp_path / "run") else part for part in flags]
    assert main([*validated, "--validation_data_dir", str(photographs), "--validation_steps", "1"]) == 0
    assert logged(tmp_path / "validated") == logged(tmp_path / "run")
    assert len(list((tmp_path / "validated" / "validation").glob("*.png"))) == 3


def test_tensorboard_gets_figures_and_pictures_and_each_step_once(flags, photographs, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags += ["--report_to", "tensorboard", "--validation_data_dir", str(photographs), "--validation_steps", "2"]
    flags += ["--checkpoints_total_limit", "9"]
    assert main(flags) == 0
    resumed = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2"), "--max_train_steps", "4"]
    assert main([*flags, *resumed]) == 0
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "logs" / "uplift"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4]
    assert [event.value for event in losses] == pytest.approx(logged(tmp_path / "run"), rel=1e-5)
    assert [event.step for event in events.Images("input-bilinear-prediction-target")] == [2, 4]


def test_a_tracker_that_is_not_installed_is_said_before_work_begins(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(training._TRACKERS, "wandb", lambda: False)
    assert main([*flags, "--report_to", "wandb"]) == 1
    assert capsys.readouterr().err == ("`report_to` is 'wandb', which is not installed. Run `pip install wandb`.\n")
    assert not (tmp_path / "run").exists()


def test_the_result_is_uploaded_without_checkpoints_and_photographs(flags, photographs, hub, tmp_path):
    to_hub = ["--push_to_hub", "--hub_model_id", "owner/small-uplift", "--hub_token", TOKEN]
    assert main([*flags, *to_hub, "--validation_data_dir", str(photographs)]) == 0
    uploaded = {path.name for path in hub.folder("owner/small-uplift").iterdir()}
    assert uploaded == {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "metrics.jsonl"}
    model, local = UPLiFTModel.from_pretrained("owner/small-uplift"), UPLiFTModel.from_pretrained(tmp_path / "run")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in local.state_dict().items())
    assert 'from_pretrained("owner/small-uplift")' in (hub.folder("owner/small-uplift") / "README.md").read_text()
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


def test_a_refused_token_ends_the_command_before_training(flags, hub, tmp_path, capsys):
    assert main([*flags, "--push_to_hub", "--hub_model_id", "owner/small-uplift", "--hub_token", "wrong"]) == 1
    assert "401" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_upload_that_fails_is_made_up_for_by_resuming(flags, hub, capsys, monkeypatch):
    flags += ["--push_to_hub", "--hub_token", TOKEN]  # by default the folder's name
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "upload_folder", lambda **settings: upload_folder(**{**settings, "token": "old"}))
        assert main(flags) == 1
    assert "401" in capsys.readouterr().err
    assert main([*flags, "--resume_from_checkpoint", "latest"]) == 0
    assert (hub.folder("owner/run") / "diffusion_pytorch_model.safetensors").exists()


def test_a_launch_that_shards_is_refused(photographs, tmp_path, monkeypatch):
    class Sharding:
        distributed_type = training.DistributedType.FSDP

        def __init__(self, **settings):
            pass

    monkeypatch.setattr(training, "Accelerator", Sharding)
    with pytest.raises(ValueError, match=r"Launch with DDP \(`multi_gpu`\), got FSDP"):
        make_accelerator(make_config(photographs, tmp_path))
