"""Latents from the cache are those of the VAE, bit by bit, and damage never gets past it."""

import json
import shutil
import tarfile
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from tests.components import make_local_vae, make_upsampler, make_vae, smooth_images
from uplift_diffusers import LatentSpace
from uplift_diffusers.data.latent_cache import LatentCache
from uplift_diffusers.data.sources import find_images
from uplift_diffusers.training import cli
from uplift_diffusers.training.loop import train
from uplift_diffusers.training.objective import MultiDepthObjective, image_pyramid
from uplift_diffusers.training.recipes import UpsamplerTrainingConfig


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for index in range(5):
        blocks = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        blocks.resize((120 + index, 90), Image.BICUBIC).save(folder / f"{index}.png")
    return folder


def pictures(count=3, size=32):
    return (smooth_images(count, size, size) * 255).round() / 255


def open_cache(folder, vae=None, **settings):
    vae = vae or make_vae()
    return LatentCache(folder, vae, LatentSpace.of(vae), **settings)


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for file in files:
            archive.add(file, file.name)


def shards_of(folder):
    return sorted(folder.rglob("*.safetensors"))


def train_upsampler(output_dir, *, cache_dir=None, **settings):
    """Losses and weights of a short training of a small UPLiFT on centre squares, some of them flipped."""
    config = UpsamplerTrainingConfig(
        output_dir=str(output_dir),
        augment_flip=True,
        **{
            "resolution": 64,
            "depths": (1, 2),
            "train_batch_size": 2,
            "max_train_steps": 9,
            "num_train_epochs": None,
            "validation_steps": 9,
            "checkpointing_steps": 3,
            "checkpoints_total_limit": 9,
            "logging_steps": 1,
            **settings,
        },
    )
    vae = make_local_vae()
    space = LatentSpace.of(vae)
    model = make_upsampler(space.name, space.channels)
    with LatentCache(cache_dir, vae, space) if cache_dir is not None else nullcontext() as cache:
        objective = MultiDepthObjective(model, vae, space, depths=(1, 2), latent_noise=0.1, cache=cache)
        train(model, objective, config, accelerator=Accelerator(cpu=True))
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], load_file(output_dir / "diffusion_pytorch_model.safetensors")


def assert_same_run(left, right):
    assert left[0] == right[0]
    assert left[1].keys() == right[1].keys()
    assert all(torch.equal(left[1][name], right[1][name]) for name in left[1])


@pytest.mark.parametrize("make", [make_vae, make_local_vae])
def test_latents_from_the_cache_are_those_of_the_vae(tmp_path, make):
    images, vae = pictures(), make()
    encode = partial(LatentSpace.of(vae).encode, vae)
    expected = torch.cat([encode(image) for image in images.split(1)]).detach()
    torch.testing.assert_close(expected, encode(images).detach(), rtol=0, atol=1e-5)
    with open_cache(tmp_path, vae) as cache:
        assert torch.equal(cache.encode(images), expected)
        assert torch.equal(cache.encode(images), expected)
        assert cache.num_encoded == 3
    with open_cache(tmp_path, vae) as cache:
        assert torch.equal(cache.encode(images.flip(0)), expected.flip(0))
        assert cache.num_encoded == 0


def test_every_size_flip_and_change_has_its_own_entry(tmp_path):
    images = pictures(1)
    changed = images.clone()
    changed[0, 0, 0, 0] = (changed[0, 0, 0, 0] + 1 / 255) % 1
    with open_cache(tmp_path) as cache:
        for part in (images, images.flip(-1), changed, *image_pyramid(images, 2)[1:]):
            cache.encode(part)
        assert cache.num_encoded == 5
        assert not torch.equal(cache.encode(images.flip(-1)), cache.encode(images).flip(-1))


def test_images_of_more_than_eight_bits_are_told_apart(tmp_path):
    images = pictures(1)
    with open_cache(tmp_path) as cache:
        cache.encode(images)
        cache.encode(images * 0.999)
        cache.encode(images * 0.9991)
        assert cache.num_encoded == 3


def test_another_vae_has_entries_of_its_own(tmp_path):
    images, weights = pictures(1), make_vae()
    with torch.no_grad():
        weights.encoder.conv_in.bias += 1e-3
    for vae in (make_vae(), weights, make_vae(scaling_factor=0.5), make_vae().bfloat16(), make_local_vae()):
        with open_cache(tmp_path, vae) as cache:
            latents = cache.encode(images)
            assert cache.num_encoded == 1
            assert latents.dtype == vae.dtype
    assert len(list(tmp_path.iterdir())) == 5
    with open_cache(tmp_path) as cache:
        cache.encode(images)
        assert cache.num_encoded == 0


def test_a_saved_and_loaded_vae_is_the_same(tmp_path):
    images, vae = pictures(1), make_vae()
    with open_cache(tmp_path / "cache", vae) as cache:
        cache.encode(images)
    vae.save_pretrained(tmp_path / "vae")
    with open_cache(tmp_path / "cache", type(vae).from_pretrained(tmp_path / "vae")) as cache:
        cache.encode(images)
        assert cache.num_encoded == 0


def flip_a_bit(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize(
    "harm", [flip_a_bit, lambda content: content[:-9], lambda content: content[:5], lambda content: b""]
)
def test_a_damaged_shard_is_named_and_made_anew(tmp_path, harm):
    images = pictures()
    with open_cache(tmp_path) as cache:
        expected = cache.encode(images)
    (shard,) = shards_of(tmp_path)
    shard.write_bytes(harm(shard.read_bytes()))

    def read_again():
        cache = open_cache(tmp_path)
        return cache, cache.encode(images)

    with pytest.warns(UserWarning, match=f"{shard.name}` is damaged"):
        cache, latents = read_again()
    assert torch.equal(latents, expected)
    assert not shard.exists()
    cache.encode(images)
    assert cache.num_encoded == 3  # the others of the shard are lost with it
    cache.flush()
    cache, latents = read_again()
    assert torch.equal(latents, expected)
    assert cache.num_encoded == 0


def test_shards_are_written_as_they_fill(tmp_path):
    images = pictures(6)
    entry = 4 * 4 * 4 * 4  # bytes: channels, latents of 32 pixels, float32
    cache = open_cache(tmp_path, shard_bytes=2 * entry)
    for image in images.split(1):
        cache.encode(image)
    assert len(shards_of(tmp_path)) == 3
    assert not list(tmp_path.rglob("*.partial"))


def test_one_process_reads_what_another_has_written_meanwhile(tmp_path):
    images = pictures()
    first, second = open_cache(tmp_path), open_cache(tmp_path)
    expected = first.encode(images)
    first.flush()
    assert torch.equal(second.encode(images), expected)
    assert second.num_encoded == 0
    for shard in shards_of(tmp_path):
        shard.unlink()  # as the other one does with a damaged one
    assert torch.equal(open_cache(tmp_path).encode(images), expected)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    cache = open_cache(tmp_path)
    cache.encode(pictures())

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("uplift_diffusers.saving.os.replace", fail)
        with pytest.raises(OSError, match=r"The latent cache .* cannot be written: .*No space left"):
            cache.flush()
    assert [path.name for path in cache.folder.iterdir()] == ["vae.json"]
    cache.flush()
    assert len(shards_of(tmp_path)) == 1


def test_training_from_the_cache_is_training_without_it(photographs, tmp_path):
    data = {"train_data_dir": str(photographs)}
    without = train_upsampler(tmp_path / "without", **data)
    filling = train_upsampler(tmp_path / "filling", cache_dir=tmp_path / "cache", **data)
    before = {path: path.stat().st_mtime_ns for path in shards_of(tmp_path / "cache")}
    from_cache = train_upsampler(tmp_path / "from-cache", cache_dir=tmp_path / "cache", **data)
    assert before
    assert {path: path.stat().st_mtime_ns for path in shards_of(tmp_path / "cache")} == before  # nothing was encoded
    assert len(without[0]) == 9
    assert_same_run(filling, without)
    assert_same_run(from_cache, without)


def test_training_on_tar_shards_is_training_on_the_folder(photographs, tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", find_images(photographs)[number::2])
    folder = train_upsampler(tmp_path / "folder", train_data_dir=str(photographs))
    shards = train_upsampler(tmp_path / "shards", train_data_dir=str(tmp_path / "*.tar"))
    assert_same_run(shards, folder)


def test_training_on_a_stream_resumes_exactly(photographs, tmp_path):
    (tmp_path / "stream").mkdir()
    write_tar(tmp_path / "stream" / "0.tar", find_images(photographs))
    data = {"dataset_name": str(tmp_path / "stream"), "image_column": "png", "streaming": True}
    whole = train_upsampler(tmp_path / "run", **data)
    for step in (6, 9):  # as if the process had been killed before the second checkpoint
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    assert_same_run(train_upsampler(tmp_path / "run", resume_from_checkpoint="latest", **data), whole)


def test_the_command_fills_the_folder_that_it_is_given(photographs, tmp_path):
    make_local_vae().save_pretrained(tmp_path / "vae")
    settings = {
        "recipe": "embedded",
        "vae": tmp_path / "vae",
        "train_data_dir": photographs,
        "output_dir": tmp_path / "run",
        "latent_cache_dir": tmp_path / "cache",
        "resolution": 32,
        "train_batch_size": 1,
        "max_train_steps": 2,
        "mixed_precision": "no",
    }
    flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    assert cli.main([*flags, "--no-random_crop"]) == 0
    (shard,) = shards_of(tmp_path / "cache")
    assert len(load_file(shard)) == 2 * 3  # photographs and sizes


def test_a_cache_of_random_crops_is_refused():
    settings = {"train_data_dir": "a", "output_dir": "b", "latent_cache_dir": "c"}
    with pytest.raises(ValueError, match="`latent_cache_dir` must not be given with `random_crop`"):
        UpsamplerTrainingConfig(**settings, random_crop=True)
    assert UpsamplerTrainingConfig(**settings).latent_cache_dir == "c"
