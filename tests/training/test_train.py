import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torchmetrics.image import PeakSignalNoiseRatio

from scripts import train_autoencoder
from tests.training_runs import (
    SPACE,
    logged,
    make_config,
    make_model,
    make_objective,
    make_photographs,
    make_vae,
    run_training,
)
from uplift_diffusers.data.dataset import Crop, Photographs, first_crops
from uplift_diffusers.data.pyramid import image_pyramid
from uplift_diffusers.data.sources import FolderSource
from uplift_diffusers.images.convert import missing_detail
from uplift_diffusers.latent_space import LatentCodec
from uplift_diffusers.training import train as training
from uplift_diffusers.training.checkpoints import list_checkpoints
from uplift_diffusers.training.losses import negative_psnr
from uplift_diffusers.training.monitoring import Validation
from uplift_diffusers.training.train import train


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("photographs"))


def seeded():
    return torch.Generator().manual_seed(0)


def test_loss_is_the_sum_over_depths_and_steps_of_the_papers_terms():
    model = make_model(noise_channels=0).eval()
    objective = make_objective(model, latent_noise=0.0, pixel_weight=0.0)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        losses = objective(images, generator=torch.Generator().manual_seed(0))
        pyramid = image_pyramid(images, 2)
        at_64, at_32, at_16 = (LatentCodec(objective.vae, SPACE).encode(level) for level in pyramid)
        once = model(at_32, image=pyramid[1], num_steps=1).sample
        half_way, twice = model(at_16, image=pyramid[2], num_steps=2, return_steps=True).steps
    expected = sum((a - b).square().mean() for a, b in ((once, at_64), (half_way, at_32), (twice, at_64)))
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-5, atol=0)


@torch.no_grad()
def test_the_term_in_pixels_may_be_the_mean_psnr_of_the_images():
    model = make_model(noise_channels=0).eval()
    settings = {"latent_noise": 0.0, "pixel_weight": 1.0, "depths": (1,), "consistent_pixels": False}
    objective = make_objective(model, pixel_loss="psnr", **settings)
    images = torch.rand(2, 3, 64, 64, generator=seeded())
    codec, small = LatentCodec(objective.vae, SPACE), image_pyramid(images, 1)[1]
    decoded = codec.decode_sample(model(codec.encode(small), image=small, num_steps=1).sample) / 2 + 0.5
    measure = PeakSignalNoiseRatio(data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3))
    pixel = objective(images, generator=seeded())["pixel"]
    torch.testing.assert_close(pixel, -measure(decoded, images), rtol=0, atol=0.05)


def test_the_loss_in_psnr_levels_off_where_there_is_nothing_left_to_gain():
    images = torch.rand(1, 3, 8, 8, generator=seeded())
    exact = images.clone().requires_grad_()
    loss = negative_psnr(exact, images)
    loss.backward()
    torch.testing.assert_close(loss.item(), -40.0, rtol=1e-5, atol=0)
    assert exact.grad.abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("consistent", [False, True])
def test_the_term_in_pixels_may_be_taken_before_the_consistency_step(consistent):
    model = make_model(noise_channels=0).eval()
    settings = {"latent_noise": 0.0, "pixel_weight": 1.0, "depths": (1,), "consistent_pixels": consistent}
    objective = make_objective(model, **settings)
    images = torch.rand(2, 3, 64, 64, generator=seeded())
    codec, small = LatentCodec(objective.vae, SPACE), image_pyramid(images, 1)[1]
    decoded = codec.decode_sample(model(codec.encode(small), image=small, num_steps=1).sample) / 2 + 0.5
    expected = decoded + missing_detail(small, decoded) if consistent else decoded
    pixel = objective(images, generator=seeded())["pixel"]
    torch.testing.assert_close(pixel, (expected - images).abs().mean(), rtol=1e-5, atol=0)


def test_noise_lands_in_the_starting_latents_and_never_in_targets():
    model = make_model(noise_channels=0).eval()
    starts = []
    model.register_forward_pre_hook(lambda module, args: starts.append(args[0]))
    objective = make_objective(model, latent_noise=3.0, pixel_weight=0.0)
    images = torch.rand(1, 3, 64, 64)
    targets = []
    encode = objective.vae.encode
    objective.vae.encode = lambda image: targets.append(encode(image)) or targets[-1]
    before = [LatentCodec(make_vae(), SPACE).encode(level) for level in image_pyramid(images, 2)]
    with torch.no_grad():
        objective(images, generator=torch.Generator().manual_seed(0))
    for target, clean in zip(targets, before, strict=True):
        torch.testing.assert_close(target.latent, clean, rtol=0, atol=1e-6)
    for start, clean in zip(starts, before[1:], strict=True):
        assert 2 < (start - clean).std() < 4


def test_degraded_inputs_reach_the_model_with_their_strength_and_targets_stay_clean(monkeypatch):
    model = make_model(noise_channels=0, denoise_channel=True).eval()
    objective = make_objective(model, latent_noise=0.0, pixel_weight=0.0, depths=(1,), degraded_probability=0.5)
    images = torch.rand(8, 3, 64, 64, generator=seeded())
    seen, forward = [], model.forward

    def with_channel(latents, *, image, denoise, **settings):
        seen.append((latents, image, denoise))
        return forward(latents, image=image, denoise=denoise, **settings)

    monkeypatch.setattr(model, "forward", with_channel)
    with torch.no_grad():
        losses = objective(images, generator=seeded())
        clean, target = image_pyramid(images, 1)[1], LatentCodec(objective.vae, SPACE).encode(images)
        ((latents, image, denoise),) = seen
        step = forward(latents, image=image, denoise=denoise, num_steps=1).sample
    changed = (image != clean).flatten(1).any(dim=1)
    assert torch.equal(changed, denoise > 0)
    assert 0 < changed.sum() < 8
    assert len(denoise.unique()) == changed.sum() + 1  # strengths are drawn for each
    torch.testing.assert_close(latents, LatentCodec(objective.vae, SPACE).encode(image), rtol=0, atol=1e-5)
    torch.testing.assert_close(losses["loss"], (step - target).square().mean())


def test_the_encoder_and_the_vae_see_each_image_size_once_a_step():
    model = make_model()
    objective = make_objective(model, depths=(1, 2, 3), pixel_weight=0.0)
    encoded, guides = [], []
    encode = objective.vae.encode
    objective.vae.encode = lambda image: encoded.append(image.shape[-1]) or encode(image)
    model.encoder.register_forward_pre_hook(lambda module, args: guides.append(args[0].shape[-1]))
    objective(torch.rand(1, 3, 64, 64), generator=torch.Generator().manual_seed(0))["loss"].backward()
    assert sorted(encoded) == [8, 16, 32, 64]
    assert sorted(guides) == [8, 16, 32]


def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_less():
    gradients, kept = [], []
    for enable in (False, True):
        model = make_model()
        if enable:
            model.enable_gradient_checkpointing()
        objective = make_objective(model)
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
        ):
            loss = objective(torch.rand(1, 3, 64, 64, generator=seeded()), generator=seeded())["loss"]
        kept.append(sum(tensor.nbytes for tensor in saved.values()))
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
    assert kept[1] < 0.8 * kept[0]


def test_training_lowers_the_loss(photographs, tmp_path):
    run_training(photographs, tmp_path, max_train_steps=60, learning_rate=3e-3, checkpointing_steps=100)
    losses = logged(tmp_path)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_a_used_folder_is_refused_unless_resumed(photographs, tmp_path):
    run_training(photographs, tmp_path, max_train_steps=2)
    with pytest.raises(FileExistsError, match=r"must hold no checkpoints of another run, got .*checkpoint-2"):
        run_training(photographs, tmp_path, max_train_steps=2)


def test_resuming_an_earlier_checkpoint_sets_later_ones_aside(photographs, tmp_path, caplog):
    run_training(photographs, tmp_path)
    run_training(
        photographs, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"), max_train_steps=5, seed=1
    )
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]
    assert (tmp_path / "abandoned-checkpoint-6" / "model.safetensors").exists()
    printed = caplog.text
    assert "Changed since then: seed: 0 -> 1" in printed
    assert "Changed since then: max_train_steps: 6 -> 5" in printed


def test_accumulated_micro_steps_give_the_mean_gradient(photographs, tmp_path):
    # One photograph, cropped whole: both micro-steps see the same picture, so their mean is each of them.
    (tmp_path / "one").mkdir()
    Image.open(next(iter(sorted(photographs.rglob("*.png"))))).save(tmp_path / "one" / "only.png")
    norms = []
    for steps in (1, 2):
        model = make_model(noise_channels=0)
        objective = make_objective(model, latent_noise=0.0, depths=(1,), pixel_weight=0.0)
        config = make_config(
            tmp_path / "one",
            tmp_path / str(steps),
            gradient_accumulation_steps=steps,
            train_batch_size=1,
            max_train_steps=1,
            random_crop=False,
            max_grad_norm=1e9,
        )
        accelerator = Accelerator(cpu=True)
        accelerator.clip_grad_norm_ = lambda parameters, limit: norms.append(
            torch.nn.utils.clip_grad_norm_(parameters, limit).item()
        )
        train(model, objective, config, accelerator=accelerator)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_the_cosine_schedule_ends_at_its_floor(photographs, tmp_path):
    settings = {"lr_warmup_steps": 2, "lr_floor": 0.1, "learning_rate": 1e-3, "max_train_steps": 6}
    run_training(photographs, tmp_path, **settings)
    expected = [
        min(1, (step + 1) / 2) * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 6)) / 2) * 1e-3 for step in range(1, 7)
    ]
    assert logged(tmp_path, "lr") == pytest.approx(expected, abs=1e-8)  # of the next step; the log has eight digits
    assert expected[-1] == pytest.approx(1e-4)


def test_adam_has_the_decay_of_the_settings(photographs, tmp_path):
    run_training(photographs, tmp_path, adam_beta2=0.9, max_train_steps=1)
    averages = load_file(tmp_path / "checkpoint-1" / "optimizer.safetensors")
    gradient = 10 * averages["0.exp_avg"]  # after one step, with a beta1 of 0.9
    torch.testing.assert_close(averages["0.exp_avg_sq"], 0.1 * gradient.square(), rtol=1e-4, atol=1e-12)


def test_half_a_line_of_the_log_is_dropped(photographs, tmp_path):
    run_training(photographs, tmp_path, max_train_steps=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    run_training(photographs, tmp_path, max_train_steps=4, resume_from_checkpoint="latest")
    assert len(logged(tmp_path)) == 4


def test_both_commands_end_with_one_line_where_there_is_nothing_to_train_on(tmp_path, capsys):
    for command in (training, train_autoencoder):
        assert command.main(["--train_data_dir", str(tmp_path / "none"), "--output_dir", str(tmp_path)]) == 1
        assert capsys.readouterr().err.strip().endswith("is not a folder.")


def test_only_the_newest_checkpoints_are_kept(photographs, tmp_path):
    run_training(photographs, tmp_path, checkpoints_total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]


def test_a_loss_that_is_not_finite_ends_the_run(photographs, tmp_path):
    with pytest.raises(FloatingPointError, match="at step"):
        run_training(photographs, tmp_path, learning_rate=1e30, max_grad_norm=1e30, max_train_steps=40)


def test_epochs_stand_for_the_steps_that_they_take(photographs, tmp_path):
    # Five photographs, two a step: two epochs are five steps, and an epoch is over in the third.
    config = make_config(
        photographs, tmp_path, max_train_steps=None, num_train_epochs=2, validation_steps=None, validation_epochs=1
    )
    model = make_model()
    validate = lambda: Validation({"val": 1.0}, pictures={})  # noqa: E731
    train(model, make_objective(model), config, accelerator=Accelerator(cpu=True), validate=validate)
    assert logged(tmp_path, "step") == [1, 2, 3, 3, 4, 5, 5]
    assert len(logged(tmp_path, "val")) == 2


def test_an_autoencoder_grows_and_shrinks_by_whole_residual_blocks(tmp_path):
    generator = seeded()
    source = make_vae()
    for parameter in source.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    source.save_pretrained(tmp_path)
    grown, shrunk = (make_vae(decoder_layers_per_block=(1, layers)) for layers in (2, 0))
    for model in (grown, shrunk):
        train_autoencoder.load_pretrained(model, str(tmp_path))
    images = torch.rand(1, 3, 32, 32, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(grown(images).sample, source(images).sample, rtol=0, atol=0)
        del source.decoder.coarse[-1]
        torch.testing.assert_close(shrunk(images).sample, source(images).sample, rtol=0, atol=0)


def test_the_linear_code_is_the_principal_components(photographs):
    vae = make_vae()
    crops = first_crops(Photographs(FolderSource(photographs), Crop(resolution=64)), 40)
    blocks = train_autoencoder.blocks_of(crops / 255)
    vae.fit_linear_code(blocks)
    flat = blocks - blocks.mean(dim=(0, 2, 3))[:, None, None]
    _, _, components = torch.linalg.svd(flat.flatten(1).double(), full_matrices=False)
    best = (flat.flatten(1).double() @ components[:8].T @ components[:8]).reshape(flat.shape)
    with torch.no_grad():
        latents = vae.encode(blocks).latent
        error = vae.decode(latents).sample - blocks
    torch.testing.assert_close(error.square().mean(), (best - flat).square().mean().float(), rtol=1e-3, atol=0)
    assert abs(latents.std().item() - 1) < 0.1
