"""The nodes in a real ComfyUI, which runs as a process of its own."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from tests.comfyui.server import ROOT
from tests.comfyui.workflows import to_prompt
from uplift_diffusers import UPLiFTModel, UPLiFTSuperResolutionPipeline, embedded_bundle
from uplift_diffusers.images.convert import read_batch, resize
from uplift_diffusers.latent_space import LatentCodec

pytestmark = pytest.mark.slow

SETTINGS = {"scale": 2.0, "seed": 0, "tile_size": 768, "latent_space": "automatic"}
FLUX2, SD15, WAN21 = "tiny flux2-vae", "tiny sd15-vae", "tiny wan21-vae"


def node(kind, /, **inputs):
    return {"class_type": kind, "inputs": inputs}


def load(name):
    return node("LoadImage", image=name)


def upsampler(name="embedded bundle"):
    return node("LoadUPLiFT", name=name, dtype="float32")


def upscale_image(image, **settings):
    return node("UPLiFTUpscaleImage", upscale_model=["upsampler", 0], image=[image, 0], **{**SETTINGS, **settings})


def upscale_latent(samples, vae=("vae", 0), **settings):
    inputs = {"upscale_model": ["upsampler", 0], "samples": [samples, 0], "vae": list(vae), **SETTINGS, **settings}
    return node("UPLiFTUpscaleLatent", **inputs)


def save(image, output=0):
    return node("SaveImage", images=[image, output], filename_prefix="test")


def save_latent(samples):
    return node("SaveLatent", samples=[samples, 0], filename_prefix="test")


def encoded(image="photo"):
    """The nodes that encode a photograph by the embedded VAE."""
    return {
        "upsampler": upsampler(),
        "vae": node("UPLiFTEmbeddedVAE"),
        "photo": load("first.png"),
        "latent": node("VAEEncode", pixels=[image, 0], vae=["vae", 0]),
    }


def assert_same_image(image, expected, levels=1):
    """ComfyUI truncates when it saves a PNG, and the pipelines round: a level of difference."""
    assert (image.size, image.mode) == (expected.size, expected.mode)
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= levels


@pytest.fixture(scope="module")
def pipeline():
    pipeline = UPLiFTSuperResolutionPipeline.from_pretrained(embedded_bundle())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def codec(pipeline):
    return LatentCodec(pipeline.vae)


@pytest.mark.parametrize(("name", "scale"), [("odd.png", 2.0), ("odd.png", 1.5), ("cut_out.png", 2.0)])
def test_image_node_equals_the_pipeline(comfyui, base, pipeline, name, scale):
    prompt = {"upsampler": upsampler(), "photo": load(name), "large": upscale_image("photo", scale=scale)}
    if name == "cut_out.png":  # LoadImage hands out the alpha on its own, inverted
        prompt["cut out"] = node("JoinImageWithAlpha", image=["photo", 0], alpha=["photo", 1])
        prompt["large"] = upscale_image("cut out", scale=scale)
    (image,) = comfyui.run({**prompt, "save": save("large")})["save"]
    with Image.open(base / "input" / name) as photo:
        (expected,) = pipeline(image=photo, scale=scale).images
    assert_same_image(image, expected)


def test_scale_1_returns_the_image(comfyui, base):
    prompt = {"upsampler": upsampler(), "photo": load("odd.png"), "large": upscale_image("photo", scale=1.0)}
    (image,) = comfyui.run({**prompt, "save": save("large")})["save"]
    assert_same_image(image, Image.open(base / "input" / "odd.png"), levels=0)


def test_images_of_a_batch_are_made_with_consecutive_seeds(comfyui):
    prompt = {
        "upsampler": upsampler(SD15),
        "checkpoint": node("StandInCheckpoint", ckpt_name="stable diffusion"),
        "first": load("first.png"),
        "second": load("second.png"),
        "both": node("ImageBatch", image1=["first", 0], image2=["second", 0]),
    }
    parts = {"vae": ["checkpoint", 2], "model": ["checkpoint", 0]}
    for image, seed in (("both", 5), ("first", 5), ("second", 6), ("second", 5)):
        prompt[f"{image} {seed}"] = upscale_image(image, seed=seed, **parts)
        prompt[f"save {image} {seed}"] = save(f"{image} {seed}")
    saved = comfyui.run(prompt)
    first, second = saved["save both 5"]
    assert_same_image(first, saved["save first 5"][0], levels=0)
    assert_same_image(second, saved["save second 6"][0], levels=0)
    assert np.any(np.asarray(second) != np.asarray(saved["save second 5"][0]))  # noise does something


def test_latent_node_equals_the_image_node(comfyui):
    prompt = {
        **encoded(),
        "decoded small": node("VAEDecode", samples=["latent", 0], vae=["vae", 0]),
        "guided by photo": upscale_latent("latent", image=["photo", 0]),
        "guided by decoded": upscale_latent("latent", image=["decoded small", 0]),
        "not guided": upscale_latent("latent"),
        "from decoded": node("VAEDecode", samples=["guided by photo", 0], vae=["vae", 0]),
        "from image node": upscale_image("photo", consistency=0.0),  # latents have none
    }
    for name in ("from decoded", "from image node"):
        prompt[f"save {name}"] = save(name)
    for name in ("guided by photo", "guided by decoded", "not guided"):
        prompt[f"save {name}"] = save_latent(name)
    saved = {name.removeprefix("save "): files[0] for name, files in comfyui.run(prompt).items()}
    assert_same_image(saved["from decoded"], saved["from image node"], levels=0)
    torch.testing.assert_close(saved["not guided"], saved["guided by decoded"], rtol=0, atol=1e-6)
    assert (saved["not guided"] - saved["guided by photo"]).abs().max() > 1e-2  # the guide does something


def test_latents_between_powers_of_two_are_reduced_as_pixels(comfyui, codec):
    prompt = {
        **encoded(),
        "doubled": upscale_latent("latent", image=["photo", 0]),
        "larger": upscale_latent("latent", image=["photo", 0], scale=1.5),
        "save doubled": save_latent("doubled"),
        "save larger": save_latent("larger"),
    }
    saved = comfyui.run(prompt)
    (doubled,), (larger,) = saved["save doubled"], saved["save larger"]
    assert larger.shape == (1, 40, 12, 18)
    with torch.no_grad():
        expected = codec.encode(resize(codec.decode(doubled), (96, 144)))
    torch.testing.assert_close(larger, expected, rtol=0, atol=1e-4)


def test_noise_mask_grows_with_the_latents_and_the_given_ones_stay(comfyui):
    prompt = {
        **encoded(),
        "mask": node("SolidMask", value=1.0, width=96, height=64),
        "nothing": node("SolidMask", value=0.0, width=48, height=64),
        "half": node("MaskComposite", destination=["mask", 0], source=["nothing", 0], x=0, y=0, operation="multiply"),
        "masked": node("SetLatentNoiseMask", samples=["latent", 0], mask=["half", 0]),
        "large": upscale_latent("masked", image=["photo", 0], scale=4.0),
        "save large": save_latent("large"),
    }
    for name in ("large", "masked"):  # the small one last: after the large one has been made
        prompt[f"mask of {name}"] = node("LatentMask", samples=[name, 0])
        prompt[f"image of {name}"] = node("MaskToImage", mask=[f"mask of {name}", 0])
        prompt[f"save mask of {name}"] = save(f"image of {name}")
    prompt["save masked"] = save_latent("masked")
    saved = comfyui.run(prompt)
    assert saved["save large"][0].shape == (1, 40, 32, 48)
    assert saved["save masked"][0].shape == (1, 40, 8, 12)
    for name, width in (("large", 384), ("masked", 96)):
        mask = np.asarray(saved[f"save mask of {name}"][0])[..., 0] / 255
        assert mask.shape == (width * 2 // 3, width)
        edge = width // 96 * 2
        assert np.all(mask[:, : width // 2 - edge] == 0)
        assert np.all(mask[:, width // 2 + edge :] == 1)


def test_latents_of_image_models_with_a_time_axis_keep_it(comfyui):
    prompt = {
        "upsampler": upsampler(WAN21),
        "checkpoint": node("StandInCheckpoint", ckpt_name="wan"),
        "photo": load("first.png"),
        "latent": node("VAEEncode", pixels=["photo", 0], vae=["checkpoint", 2]),
        "decoded": node("VAEDecode", samples=["latent", 0], vae=["checkpoint", 2]),
    }
    parts = {"vae": ("checkpoint", 2), "model": ["checkpoint", 0]}
    for name, scale, guide in (
        ("doubled", 2.0, {"image": ["decoded", 0]}),
        ("not guided", 2.0, {}),
        ("larger", 1.5, {}),
    ):
        prompt[name] = upscale_latent("latent", scale=scale, **parts, **guide)
        prompt[f"save {name}"] = save_latent(name)
    prompt["image"] = upscale_image("photo", vae=["checkpoint", 2], model=["checkpoint", 0])
    prompt["save image"] = save("image")
    saved = comfyui.run(prompt)
    assert saved["save larger"][0].shape == (1, 16, 1, 12, 18)
    assert saved["save doubled"][0].shape == (1, 16, 1, 16, 24)
    torch.testing.assert_close(saved["save not guided"], saved["save doubled"], rtol=0, atol=1e-6)
    assert saved["save image"][0].size == (192, 128)


def test_packed_latents_of_flux_2_are_unpacked_and_packed_again(comfyui, base):
    prompt = {
        "upsampler": upsampler(FLUX2),
        "checkpoint": node("StandInCheckpoint", ckpt_name="flux2"),
        "photo": load("first.png"),
        "latent": node("VAEEncode", pixels=["photo", 0], vae=["checkpoint", 2]),
        "decoded": node("VAEDecode", samples=["latent", 0], vae=["checkpoint", 2]),
        "guided": upscale_latent("latent", vae=("checkpoint", 2), image=["decoded", 0], model=["checkpoint", 0]),
        "told by the VAE": upscale_latent("latent", vae=("checkpoint", 2)),
        "larger": upscale_latent("latent", vae=("checkpoint", 2), scale=1.5),
        "large photo": upscale_image("photo", vae=["checkpoint", 2]),
        "save image": save("large photo"),
        "save decoded": save("decoded"),
    }
    for name in ("latent", "guided", "told by the VAE", "larger"):
        prompt[f"save {name}"] = save_latent(name)
    saved = comfyui.run(prompt)
    (latent,), (guided,), (decoded,) = saved["save latent"], saved["save guided"], saved["save decoded"]
    assert latent.shape == (1, 128, 4, 6)
    assert guided.shape == (1, 128, 8, 12)
    assert saved["save larger"][0].shape == (1, 128, 6, 9)
    assert saved["save image"][0].size == (192, 128)
    torch.testing.assert_close(saved["save told by the VAE"][0], guided, rtol=0, atol=1e-4)

    # The statistics of the stand-in, by which its patches are normalized.
    mean = torch.linspace(-1, 1, 128)[:, None, None]
    std = (torch.linspace(0.5, 2, 128) + 1e-4).sqrt()[:, None, None]
    upsampler_there = UPLiFTModel.from_pretrained(base / "models" / "latent_upscale_models" / FLUX2)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        raw_latents = F.pixel_shuffle(latent * std + mean, 2)
        large = upsampler_there(raw_latents, image=read_batch(decoded), generator=noise).sample
    torch.testing.assert_close(guided, (F.pixel_unshuffle(large, 2) - mean) / std, rtol=0, atol=2e-2)  # 8-bit guide


def test_latents_with_a_time_axis_of_several_positions_are_refused(comfyui, base):
    video = {"latent_tensor": torch.zeros(1, 40, 2, 8, 12), "latent_format_version_0": torch.zeros(0)}
    save_file(video, base / "input" / "video.latent")
    prompt = {**encoded(), "video": node("LoadLatent", latent="video.latent"), "large": upscale_latent("video")}
    assert "must be latents of images, got a video's" in comfyui.error({**prompt, "save": save_latent("large")})


def test_alpha_of_the_guide_is_left_aside(comfyui):
    prompt = {
        **encoded(),
        "white": node("SolidMask", value=0.3, width=96, height=64),
        "cut out": node("JoinImageWithAlpha", image=["photo", 0], alpha=["white", 0]),
        "with": upscale_latent("latent", image=["cut out", 0]),
        "without": upscale_latent("latent", image=["photo", 0]),
        "save with": save_latent("with"),
        "save without": save_latent("without"),
    }
    saved = comfyui.run(prompt)
    torch.testing.assert_close(saved["save with"], saved["save without"], rtol=0, atol=0)


def test_embedded_vae_works_with_comfyui_s_own_nodes(comfyui, base, codec):
    tiles = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    prompt = {
        "vae": node("UPLiFTEmbeddedVAE"),
        "photo": load("odd.png"),
        "latent": node("VAEEncode", pixels=["photo", 0], vae=["vae", 0]),
        "tiled": node("VAEEncodeTiled", pixels=["photo", 0], vae=["vae", 0], **tiles),
        "decoded": node("VAEDecode", samples=["latent", 0], vae=["vae", 0]),
        "decoded tiled": node("VAEDecodeTiled", samples=["latent", 0], vae=["vae", 0], **tiles),
        "save latent": save_latent("latent"),
        "save tiled": save_latent("tiled"),
        "save decoded": save("decoded"),
        "save decoded tiled": save("decoded tiled"),
    }
    saved = comfyui.run(prompt)
    with Image.open(base / "input" / "odd.png") as photo:  # 73 x 61: cut to whole latents on all sides
        image = read_batch(photo.crop((0, 2, 72, 58)))
    with torch.no_grad():
        raw_latents = codec.encode(image)
        expected = (codec.decode(raw_latents)[0].permute(1, 2, 0) * 255).byte().numpy()
    torch.testing.assert_close(saved["save latent"][0], raw_latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(saved["save tiled"], saved["save latent"], rtol=0, atol=0)
    assert_same_image(saved["save decoded"][0], Image.fromarray(expected))
    assert_same_image(saved["save decoded tiled"][0], saved["save decoded"][0], levels=0)


def test_wrong_latents_give_the_node_s_error_and_the_server_goes_on(comfyui):
    prompt = {
        **encoded(),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "large": upscale_latent("empty"),
    }
    error = comfyui.error({**prompt, "save": save_latent("large")})
    assert "`samples` must have 40 channels" in error
    assert "(1, 4, 8, 8)" in error
    prompt["large"] = upscale_latent("latent")
    assert comfyui.run({**prompt, "save": save_latent("large")})["save"][0].shape == (1, 40, 16, 24)


@pytest.mark.parametrize(
    ("name", "kind", "settings", "message"),
    [
        (SD15, "stable diffusion", {}, "`latent_space` must be chosen, or `model` connected"),
        (SD15, "stable diffusion", {"latent_space": "sdxl-vae"}, "'sd15-vae', got 'sdxl-vae'"),
        (WAN21, "stable diffusion", {"model": ["checkpoint", 0]}, "got 4 channels and 8 pixels a latent"),
        ("embedded bundle", "stable diffusion", {"vae": ["vae", 0], "model": ["checkpoint", 0]}, "got 'sd15-vae'"),
        (SD15, "stable diffusion", {"vae": None}, "`vae` must be connected"),
        (SD15, "stable diffusion", {"latent_space": "nonsense"}, "`latent_space` must be one of"),
    ],
)
def test_foreign_latent_spaces_are_refused(comfyui, name, kind, settings, message):
    inputs = {"vae": ["checkpoint", 2], **settings}
    prompt = {
        "upsampler": upsampler(name),
        "checkpoint": node("StandInCheckpoint", ckpt_name=kind),
        "vae": node("UPLiFTEmbeddedVAE"),
        "photo": load("first.png"),
        "large": upscale_image("photo", **{key: value for key, value in inputs.items() if value is not None}),
        "save": save("large"),
    }
    assert message in comfyui.error(prompt)


def test_declared_latent_space_is_taken_where_no_model_is_connected(comfyui):
    prompt = {
        "upsampler": upsampler(SD15),
        "checkpoint": node("StandInCheckpoint", ckpt_name="stable diffusion"),
        "photo": load("first.png"),
        "declared": upscale_image("photo", vae=["checkpoint", 2], latent_space="sd15-vae"),
        "told": upscale_image("photo", vae=["checkpoint", 2], model=["checkpoint", 0]),
        "save declared": save("declared"),
        "save told": save("told"),
    }
    saved = comfyui.run(prompt)
    assert_same_image(saved["save declared"][0], saved["save told"][0], levels=0)


def test_unknown_upsampler_is_refused(comfyui):
    prompt = {"upsampler": upsampler("nonsense"), "photo": load("first.png"), "large": upscale_image("photo")}
    error = comfyui.error({**prompt, "save": save("large")})
    assert "`name` must be one of ['embedded bundle', 'tiny flux2-vae', 'tiny sd15-vae', 'tiny wan21-vae'" in error


def test_progress_counts_steps_of_tiles_and_decoding(comfyui):
    prompt = {
        "upsampler": upsampler(),
        "photo": load("first.png"),
        "large": upscale_image("photo", scale=4.0, tile_size=64),
        "save": save("large"),
    }
    events = [data for kind, data in comfyui.watch(prompt) if kind == "progress" and data["node"] == "large"]
    tiles, steps, decoded = 2, 2, 1
    assert [event["value"] for event in events] == [1, 2, 3, 4, 5]
    assert {event["max"] for event in events} == {tiles * steps + decoded}


def test_interrupt_ends_the_work_between_two_layers(comfyui):
    prompt = {
        "upsampler": upsampler(),
        "photo": load("large.png"),
        "large": upscale_image("photo", scale=4.0, tile_size=128),
        "save": save("large"),
    }
    events = []
    for kind, data in comfyui.watch(prompt):
        events.append((kind, data.get("value")))
        if events.count(("progress", 1)) == 1 and events[-1] == ("progress", 1):
            comfyui.post("/interrupt", {})
    kinds = [kind for kind, _ in events]
    assert kinds[-1] == "execution_interrupted"
    assert kinds.count("progress") <= 2  # of 25; a step takes longer than a layer
    prompt["photo"], prompt["large"] = load("first.png"), upscale_image("photo")
    assert comfyui.run(prompt)["save"][0].size == (192, 128)


def test_nodes_have_the_inputs_that_are_documented(comfyui):
    nodes = json.loads(comfyui.get("/object_info"))
    kinds = {name: {**nodes[name]["input"]["required"], **nodes[name]["input"].get("optional", {})} for name in nodes}
    names = kinds["LoadUPLiFT"]["name"][1]["options"]
    assert names == ["embedded bundle", FLUX2, SD15, WAN21, "UPLiFT-upsampler/uplift_sd1.5vae"]
    readme = (ROOT / "integrations" / "comfyui" / "README.md").read_text()
    for kind in ("LoadUPLiFT", "UPLiFTEmbeddedVAE", "UPLiFTUpscaleImage", "UPLiFTUpscaleLatent"):
        assert f"**{nodes[kind]['display_name']}**" in readme
        for name in kinds[kind]:
            assert f"`{name}`" in readme


@pytest.mark.parametrize(("name", "size"), [("photograph", (192, 128)), ("second_pass", (192, 192))])
def test_example_workflow_runs(comfyui, name, size):
    workflow = json.loads((ROOT / "integrations" / "comfyui" / "example_workflows" / f"{name}.json").read_text())
    prompt = to_prompt(workflow, json.loads(comfyui.get("/object_info")))
    stand_ins = {"CheckpointLoaderSimple": "StandInCheckpoint", "CLIPTextEncode": "StandInText"}
    small = {"LoadImage": {"image": "first.png"}, "EmptyLatentImage": {"width": 128, "height": 128}}
    small |= {"KSampler": {"steps": 2}, "CheckpointLoaderSimple": {"ckpt_name": "stable diffusion"}}
    for part in prompt.values():
        kind = part["class_type"]
        part["inputs"].update(small.get(kind, {}))
        part["class_type"] = stand_ins.get(kind, kind)
        if kind == "LoadUPLiFT" and part["inputs"]["name"] != "embedded bundle":
            part["inputs"]["name"] = SD15
    (files,) = comfyui.run(prompt).values()
    assert files[0].size == size
