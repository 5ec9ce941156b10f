"""What is enlarged: photographs and prompts."""

import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.components import make_flow_unet, make_stable_diffusion, make_upsampler, seeded
from tests.evaluation.parts import TinyInception, make_pipeline, save_photographs
from uplift_diffusers import UPLiFTLatentUpscalePipeline
from uplift_diffusers.evaluation.measure import Evaluation, compute_results
from uplift_diffusers.evaluation.methods import bicubic, for_latents, make_methods, parse_methods, seed_of
from uplift_diffusers.evaluation.metrics import Metrics, to_bytes, to_tensor
from uplift_diffusers.evaluation.protocols import PhotographFiles, SuperResolution, TextToImage, read_prompts
from uplift_diffusers.evaluation.records import RecordStore


def test_reduction_and_bicubic_are_pillows(photographs, pipeline):
    protocol = SuperResolution(photographs, scales=(2,), crop=64)
    sample = protocol.sample(protocol.items[0], 2)
    with Image.open(photographs / "0.png") as file:
        crop = file.crop((28, 8, 92, 72))
    low = crop.resize((32, 32), Image.BICUBIC)
    assert (np.asarray(crop) == to_bytes(sample.truth)[0].permute(1, 2, 0).numpy()).all()
    assert (np.asarray(low) == np.asarray(sample.image)).all()
    output = bicubic(pipeline.vae, pipeline.latent_space)(sample)
    for enlarged, channel in zip(output[0], low.split(), strict=True):
        expected = np.asarray(channel.convert("F").resize((64, 64), Image.BICUBIC)) / 255
        np.testing.assert_allclose(enlarged.numpy(), expected.clip(0, 1), rtol=0, atol=1e-4)


def test_jpeg_inputs_are_those_that_pillow_saves(photographs, tmp_path):
    plain = SuperResolution(photographs, scales=(2,), crop=64)
    protocol = SuperResolution(photographs, scales=(2,), crop=64, jpeg_quality=40)
    assert protocol.identity != plain.identity
    assert protocol.real_identity == plain.real_identity  # the features of the photographs are the same
    sample, without = (each.sample(each.items[0], 2) for each in (protocol, plain))
    without.image.save(tmp_path / "low.jpg", quality=40)
    with Image.open(tmp_path / "low.jpg") as file:
        assert (np.asarray(file) == np.asarray(sample.image)).all()
        assert sample.image.quantization == file.quantization
    assert (np.asarray(sample.image) != np.asarray(without.image)).any()
    assert torch.equal(sample.truth, without.truth)
    assert protocol.timing_sample(scale=2, edge=32).image.format == "JPEG"
    with pytest.raises(ValueError, match="`jpeg_quality` must be from 1 to 100, got 0"):
        SuperResolution(photographs, scales=(2,), crop=64, jpeg_quality=0)


def test_photographs_that_cannot_be_measured_are_refused(photographs, tmp_path):
    with pytest.raises(
        ValueError, match=r"`crop` must fit into every photograph, got 96 and 5 smaller ones.*120 x 80"
    ):
        SuperResolution(photographs, scales=(2,), crop=96)
    with pytest.raises(ValueError, match="`crop` must be a multiple of 24 for 3x, got 64"):
        SuperResolution(photographs, scales=(3,), crop=64, multiple=8)
    with pytest.raises(FileNotFoundError, match="No images below"):
        SuperResolution(tmp_path, scales=(2,), crop=64)
    Image.new("L", (80, 80)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"must be in colour, got 1 in greyscale, such as .*grey.png"):
        SuperResolution(tmp_path, scales=(2,), crop=64)
    allowed = SuperResolution(tmp_path, scales=(2,), crop=64, allow_greyscale=True)
    assert allowed.sample(allowed.items[0], 2).image.mode == "RGB"
    (tmp_path / "broken.png").write_text("no")
    with pytest.raises(ValueError, match=r"broken.png: not an image"):
        SuperResolution(tmp_path, scales=(2,), crop=64)


def test_prompts_are_lines_in_any_script_without_the_empty_ones(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cat\n\n   \nкошка на крыше\r\n屋根の上の猫\n", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "кошка на крыше", "屋根の上の猫"]
    path.write_bytes("one\u2028line\r\nanother\x85\x0cone".encode())
    assert read_prompts(path) == ["one\u2028line", "another\x85\x0cone"]


def test_only_the_first_prompts_are_taken(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\nа\n\nб\nв", encoding="utf-8")
    assert read_prompts(path, limit=2) == ["а", "б"]


def test_prompts_of_coco_are_the_first_caption_of_every_image(tmp_path):
    annotations = [
        {"image_id": 7, "id": 30, "caption": "second of seven"},
        {"image_id": 9, "id": 5, "caption": "nine"},
        {"image_id": 7, "id": 2, "caption": "first of seven\n"},
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": [], "annotations": annotations}))
    assert read_prompts(path) == ["first of seven", "nine"]


def test_files_that_hold_no_prompts_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="`prompts` must be a file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="at least one prompt, got none"):
        read_prompts(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match="must be in UTF-8"):
        read_prompts(tmp_path / "latin.txt")
    (tmp_path / "list.json").write_text('["a cat"]')
    with pytest.raises(ValueError, match="must be COCO captions"):
        read_prompts(tmp_path / "list.json")


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    return make_stable_diffusion(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def prompts_protocol(stable_diffusion, tmp_path):
    """A function that makes the protocol again, on the same folder of latents, for some real images."""
    real = save_photographs(tmp_path / "real", count=5, size=(64, 70), seed=3)

    def make(real_images=real):
        return TextToImage(
            ["a cat", "кошка", "a dog at sea", "cat"],
            pipeline=stable_diffusion,
            store=RecordStore(tmp_path),
            real_images=real_images,
            scales=(2,),
            num_inference_steps=2,
        )

    return make


def methods_for(protocol, words):
    pipeline = UPLiFTLatentUpscalePipeline(vae=protocol.pipeline.vae, upsampler=make_upsampler())
    return make_methods(parse_methods(words), pipeline=pipeline, seed=0, samples=protocol.outline(), of_latents=True)


def test_latents_of_a_prompt_are_made_once(prompts_protocol, stable_diffusion, tmp_path):
    protocol = prompts_protocol()
    protocol.prepare(rank=1, world_size=2)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()}
    assert len(times) == 2
    prompts_protocol().prepare(rank=0, world_size=1)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    generator = torch.Generator().manual_seed(2)
    direct = stable_diffusion("a dog at sea", generator=generator, output_type="latent", num_inference_steps=2).images
    torch.testing.assert_close(protocol.sample(protocol.items[2], 2).latents, direct)


def test_methods_enlarge_the_latents_themselves(prompts_protocol, stable_diffusion, tmp_path):
    protocol = prompts_protocol()
    protocol.prepare(rank=0, world_size=1)
    make_flow_unet(protocol.space).save_pretrained(tmp_path / "cfm")
    words = ["bicubic", "bilinear", "uplift", f"cfm={tmp_path}/cfm:num_inference_steps=1"]
    methods = {method.name: method for method in methods_for(protocol, words)}
    sample = protocol.sample(protocol.items[0], 2)
    vae = stable_diffusion.vae
    with torch.no_grad():
        image = (vae.decode(sample.latents / 0.18215).sample / 2 + 0.5).clamp(0, 1)
        bilinear = torch.nn.functional.interpolate(sample.latents / 0.18215, scale_factor=2, mode="bilinear")
        bilinear = (vae.decode(bilinear).sample / 2 + 0.5).clamp(0, 1)
    bicubic = torch.nn.functional.interpolate(image, (128, 128), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(methods["bicubic"](sample), bicubic, atol=1e-5, rtol=0)
    torch.testing.assert_close(methods["bilinear"](sample), bilinear, atol=1e-5, rtol=0)
    uplift = UPLiFTLatentUpscalePipeline(vae=vae, upsampler=make_upsampler())
    uplift = uplift(latents=sample.latents, scale=2, generator=seeded(seed_of(0, sample.name))).images[0]
    torch.testing.assert_close(methods["uplift"](sample), to_tensor(uplift))
    assert methods["cfm"](sample).shape == (1, 3, 128, 128)


def test_prompts_are_compared_with_photographs_or_their_statistics(prompts_protocol, tmp_path):
    protocol = prompts_protocol()
    methods = methods_for(protocol, ["bicubic"])
    network = TinyInception()

    def scores(real_images, *names):
        metrics = Metrics(names=names, inception=network, patch_size=32)
        evaluation = Evaluation(prompts_protocol(real_images), methods, metrics, tmp_path / "records")
        evaluation.run()
        return compute_results(evaluation, seed=0)[2].scores["bicubic"]

    folder = tmp_path / "real"
    expected = scores(folder, "fid", "kid", "patch_fid")
    assert expected["fid"].samples == 4
    features = torch.stack([network(protocol.real_pixels(item))[0] for item in protocol.real_items])
    save_file({"features": features}, tmp_path / "real.safetensors")
    known = scores(tmp_path / "real.safetensors", "fid", "kid")
    assert known["fid"].value == pytest.approx(expected["fid"].value, rel=1e-9)
    assert known["kid"] == expected["kid"]
    np.savez(tmp_path / "real.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="`metrics` must not have 'kid' if only statistics of the real images"):
        scores(tmp_path / "real.npz", "fid", "kid")


def test_the_count_of_real_images_is_the_files_own_or_not_known(prompts_protocol, tmp_path):
    assert prompts_protocol().real_count == 5
    save_file({"features": torch.zeros(1, 2048)}, tmp_path / "one.safetensors")
    protocol = prompts_protocol(tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="must not have 'fid' for fewer than 2 images, got 1"):
        Evaluation(protocol, [], Metrics(names=("fid",), inception=TinyInception()), tmp_path)
    np.savez(tmp_path / "real.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert prompts_protocol(tmp_path / "real.npz").real_count is None


def test_damaged_or_small_real_images_are_found_before_latents_are_made(prompts_protocol, tmp_path):
    metrics = Metrics(names=("patch_fid",), inception=TinyInception(), patch_size=65)
    with pytest.raises(ValueError, match="`patch_size` must fit into every image, got 65 for one of 64 x 64"):
        Evaluation(prompts_protocol(), [], metrics, tmp_path)
    path = tmp_path / "real" / "4.png"
    path.write_bytes(path.read_bytes()[:3000])
    metrics = Metrics(names=("fid",), inception=TinyInception())
    with pytest.raises(ValueError, match=r"4.png: the image is damaged"):
        Evaluation(prompts_protocol(), [], metrics, tmp_path).run()
    assert not (tmp_path / "latents").exists()
    path.write_text("no")
    with pytest.raises(ValueError, match=r"4.png: not an image"):
        prompts_protocol()


def test_latents_are_told_apart_by_scheduler_tokenizer_and_vae(prompts_protocol, stable_diffusion, monkeypatch):
    digests = {prompts_protocol().items[0].digest}
    assert digests == {prompts_protocol().items[0].digest}
    for part, changes in (("scheduler", {"beta_end": 0.5}), ("vae", {"scaling_factor": 0.5})):
        component = getattr(stable_diffusion, part)
        with monkeypatch.context() as changed:
            changed.setattr(component, "_internal_dict", type(component.config)({**component.config, **changes}))
            digests.add(prompts_protocol().items[0].digest)
    with monkeypatch.context() as changed:
        changed.setattr(stable_diffusion.tokenizer, "model_max_length", 9)
        digests.add(prompts_protocol().items[0].digest)
    assert len(digests) == 4


def test_photographs_of_tar_shards_and_datasets_are_those_of_the_folder(photographs, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for path in sorted(photographs.iterdir()):
            shard.add(path, path.name)
    dataset = datasets.Dataset.from_dict({"picture": [str(path) for path in sorted(photographs.iterdir())]})
    dataset.cast_column("picture", datasets.Image()).save_to_disk(tmp_path / "dataset")
    folder = PhotographFiles(photographs)
    assert [item.name for item in folder.items] == [f"{index}.png" for index in range(5)]
    for other in (
        PhotographFiles(str(tmp_path / "*.tar")),
        PhotographFiles(dataset_name=str(tmp_path / "dataset"), image_column="picture"),
    ):
        assert [item.digest for item in other.items] == [item.digest for item in folder.items]
        protocol = SuperResolution(other, scales=(2,), crop=64)
        expected = SuperResolution(folder, scales=(2,), crop=64)
        assert torch.equal(protocol.real_pixels(other.items[3]), expected.real_pixels(folder.items[3]))
    assert PhotographFiles(str(tmp_path / "*.tar"), limit=1).items[0].name == "0.tar/0.png"


def test_there_is_no_round_trip_of_a_prompt(prompts_protocol):
    with pytest.raises(ValueError, match="must not have 'vae' for text-to-image"):
        methods_for(prompts_protocol(), ["vae"])


def test_pipelines_for_other_latents_are_refused(prompts_protocol):
    with pytest.raises(ValueError, match="must be for the latents of the Stable Diffusion, 'sd15-vae', got a"):
        for_latents(make_pipeline(), prompts_protocol().space)
