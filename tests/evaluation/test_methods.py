"""What enlarges, and what it costs."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from tests.components import make_flow_unet, make_upsampler, make_vae, seeded
from tests.evaluation.parts import make_pipeline, save_photographs
from tests.hub_server import HubServer, point_at
from uplift_diffusers import CFMLatentUpscalePipeline, LatentSpace, UPLiFTSuperResolutionPipeline
from uplift_diffusers.evaluation.cost import measure_cost
from uplift_diffusers.evaluation.methods import (
    Method,
    MethodSpec,
    bilinear,
    check_model,
    folder_method,
    load_pipeline,
    make_methods,
    parse_methods,
    pipeline_method,
    seed_of,
    vae_round_trip,
)
from uplift_diffusers.evaluation.metrics import to_tensor
from uplift_diffusers.evaluation.protocols import Sample, SuperResolution

SAMPLE = {"name": "photo.png", "scale": 2, "size": (64, 64)}


class PixelPipeline(DiffusionPipeline):
    """Doubles images, has no VAE, and keeps the first noise that it drew in each call."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)
        self.drawn = []

    def __call__(self, image, generator, num_inference_steps=1):
        self.drawn.append(torch.rand(1, generator=generator).item())
        return ImagePipelineOutput(images=[image.resize((2 * image.width, 2 * image.height))])


def methods_for(protocol, words, pipeline, **settings):
    settings = {"seed": 0, "samples": protocol.outline(), "of_latents": not protocol.paired, **settings}
    return make_methods(parse_methods(words), pipeline=pipeline, **settings)


def test_methods_are_read_from_words():
    assert MethodSpec.parse("bicubic") == MethodSpec("bicubic")
    assert MethodSpec.parse("lift=runs/lift") == MethodSpec("lift", "runs/lift")
    assert MethodSpec.parse("mine=owner/name") == MethodSpec("mine", "owner/name")
    word = "cfm20=C:/runs/a=b:num_inference_steps=20,mode=fast"
    assert MethodSpec.parse(word) == MethodSpec("cfm20", "C:/runs/a=b", {"num_inference_steps": 20, "mode": "fast"})


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cfm"], "or say where the weights are, got 'cfm'"),
        (["a b=c"], "must be name, name=path or"),
        (["uplift", "uplift=runs/other"], "different names, got 'uplift' twice"),
    ],
)
def test_words_that_are_no_methods_are_refused(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_methods(words)


def test_networks_and_pipelines_become_methods_by_their_path(photographs, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    make_upsampler("test-local", latent_channels=12).save_pretrained(tmp_path / "lift")
    make_flow_unet(pipeline.latent_space).save_pretrained(tmp_path / "cfm")
    words = ["bicubic", "bilinear", "vae", "uplift", f"same={tmp_path}/pipeline", f"lift={tmp_path}/lift"]
    words += [f"cfm{steps}={tmp_path}/cfm:num_inference_steps={steps}" for steps in (1, 2)]
    protocol = SuperResolution(photographs, scales=(2,), crop=64)
    methods = methods_for(protocol, words, pipeline)
    sample = protocol.sample(protocol.items[0], 2)
    outputs = {method.name: method(sample) for method in methods}
    assert torch.equal(outputs["uplift"], outputs["same"])
    assert not torch.equal(outputs["cfm1"], outputs["cfm2"])
    by_name = {method.name: method for method in methods}
    assert by_name["cfm1"].identity != by_name["cfm2"].identity
    assert by_name["uplift"].identity == by_name["same"].identity
    assert by_name["lift"].parameters["upsampler"] == make_upsampler("test-local", latent_channels=12).num_parameters()
    assert outputs["vae"].shape == (1, 3, 64, 64)


def test_the_methods_are_what_they_say(photographs, pipeline):
    vae, space = pipeline.vae, pipeline.latent_space
    protocol = SuperResolution(photographs, scales=(2,), crop=64)
    sample = protocol.sample(protocol.items[1], 2)
    with torch.no_grad():
        raw_latents = vae.encode(to_tensor(sample.image) * 2 - 1).latent
        larger = torch.nn.functional.interpolate(raw_latents, scale_factor=2, mode="bilinear", align_corners=False)
        expected = (vae.decode(larger).sample / 2 + 0.5).clamp(0, 1)
        round_trip = (vae(sample.truth * 2 - 1).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(bilinear(vae, space)(sample), expected)
    torch.testing.assert_close(vae_round_trip(vae, space)(sample), round_trip)
    direct = pipeline(image=sample.image, scale=2, generator=seeded(seed_of(3, sample.name))).images[0]
    assert torch.equal(pipeline_method("uplift", pipeline, seed=3)(sample), to_tensor(direct))


def test_options_that_a_pipeline_does_not_take_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"`mine` must be a pipeline that takes 'steps', got a UPLiFTSuperRes"):
        pipeline_method("mine", pipeline, seed=0, options={"steps": 4})


def test_outputs_of_another_size_are_refused():
    method = Method("mine", lambda sample: torch.zeros(1, 3, 32, 48), {})
    with pytest.raises(ValueError, match="`mine` must give 64 x 64 pixels at 2x, got 48 x 32"):
        method(Sample(**SAMPLE))


def samples_named(*names, size=64, scales=(2,)):
    return [Sample(name=name, scale=scale, size=(size, size)) for name in names for scale in scales]


def test_images_of_other_software_are_a_method(tmp_path):
    samples = samples_named("sub/0.jpg", "sub/1.jpg")
    folder = save_photographs(tmp_path / "2x" / "sub", count=3, size=(64, 64)).parent.parent  # one more than measured
    method = folder_method("theirs", folder, samples=samples)
    assert not method.timed
    with Image.open(folder / "2x" / "sub" / "1.png") as file:
        assert torch.equal(method(samples[1]), to_tensor(file))
    assert folder_method("theirs", folder / "2x", samples=samples).identity == method.identity  # one scale, no 2x/
    with Image.open(folder / "2x" / "sub" / "1.png") as file:
        turned = file.rotate(90)
    turned.save(folder / "2x" / "sub" / "1.png")
    assert folder_method("theirs", folder, samples=samples).identity != method.identity
    with pytest.raises(ValueError, match="must have images of 96 x 96 pixels, the size of the crops, got 64 x 64"):
        folder_method("theirs", folder, samples=samples_named("sub/0.jpg", size=96))


def test_missing_images_of_other_software_are_named(tmp_path):
    folder = save_photographs(tmp_path / "2x", count=2, size=(64, 64)).parent
    with pytest.raises(ValueError, match=r"3 in all, got 2\. Missing: 2x/2\.$"):
        folder_method("theirs", folder, samples=samples_named("0.jpg", "1.jpg", "2.jpg"))
    with pytest.raises(ValueError, match=r"in all, got 2\. Missing: 2x/2, 2x/3, 4x/0, 4x/1, 4x/2 and 1 more\.$"):
        folder_method("theirs", folder, samples=samples_named("0.jpg", "1.jpg", "2.jpg", "3.jpg", scales=(2, 4)))


def test_images_whose_names_differ_only_in_the_suffix_are_refused(tmp_path):
    folder = save_photographs(tmp_path / "2x", count=1, size=(64, 64)).parent
    samples = samples_named("0.jpg", "0.png")
    with pytest.raises(ValueError, match="different names without their suffixes, got 0 twice for 2x"):
        folder_method("theirs", folder, samples=samples)
    with Image.open(folder / "2x" / "0.png") as file:
        file.save(folder / "2x" / "0.webp")
    with pytest.raises(ValueError, match="different names without their suffixes, got 0 twice for 2x"):
        folder_method("theirs", folder, samples=samples[:1])


def test_a_folder_of_images_is_a_path_of_a_method(photographs, pipeline, tmp_path):
    protocol = SuperResolution(photographs, scales=(2,), crop=64)
    for item in protocol.items:
        to_pil_image(protocol.real_pixels(item)[0]).save(tmp_path / item.name)
    (method,) = methods_for(protocol, [f"theirs={tmp_path}"], pipeline)
    sample = protocol.sample(protocol.items[2], 2)
    assert torch.equal(method(sample), sample.truth)
    with pytest.raises(ValueError, match="`theirs` must have no options"):
        methods_for(protocol, [f"theirs={tmp_path}:steps=4"], pipeline)


DOUBLER = """
from diffusers import DiffusionPipeline, ImagePipelineOutput

class Doubler(DiffusionPipeline):
    def __init__(self, vae, scheduler):
        super().__init__()
        self.register_modules(vae=vae, scheduler=scheduler)

    def __call__(self, image, turn=0):
        larger = image.resize((2 * image.width, 2 * image.height), resample=0).rotate(turn)
        return ImagePipelineOutput(images=[larger])
"""


@pytest.fixture
def custom_pipeline(tmp_path, monkeypatch):
    """A folder with a saved pipeline of a class of its own, whose file lies beside model_index.json."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    namespace = {"__name__": "doubler"}
    exec(DOUBLER, namespace)
    folder = tmp_path / "custom"
    namespace["Doubler"](make_vae(), DDPMScheduler()).save_pretrained(folder)
    (folder / "doubler.py").write_text(DOUBLER)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": ["doubler", "Doubler"]}))
    return folder


def test_a_pipeline_of_a_custom_class_is_a_method(custom_pipeline, photographs, pipeline):
    protocol = SuperResolution(photographs, scales=(2,), crop=64)
    words = [f"doubler={custom_pipeline}", f"turned={custom_pipeline}:turn=180"]
    plain, turned = methods_for(protocol, words, pipeline, trust_remote_code=True, dtype=torch.bfloat16)
    sample = protocol.sample(protocol.items[0], 2)
    expected = to_tensor(sample.image).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(plain(sample), expected)
    assert torch.equal(turned(sample), expected.flip(2, 3))
    assert plain.identity != turned.identity
    assert plain.settings["method"] == "Doubler"
    assert plain.modules["vae"].dtype == torch.bfloat16
    assert plain.note.startswith("`doubler` uses a different VAE")


def test_code_of_a_pipeline_runs_only_where_it_is_trusted(custom_pipeline):
    with pytest.raises(ValueError, match=r"without custom code, got one with.*--trust_remote_code"):
        load_pipeline(str(custom_pipeline), vae=None)
    index = custom_pipeline / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "_class_name": "Doubler"}))
    with pytest.raises(ValueError, match=r"must be a pipeline of a class that diffusers finds, .*Doubler"):
        load_pipeline(str(custom_pipeline), vae=None, trust_remote_code=True)


def test_noise_is_another_for_every_photograph_and_the_same_for_every_method():
    pipeline, small = PixelPipeline(DDPMScheduler()), Image.new("RGB", (32, 32))
    for steps in (1, 2):
        method = pipeline_method("mine", pipeline, seed=0, options={"num_inference_steps": steps})
        for name in ("a.png", "b.png"):
            method(Sample(name=name, scale=2, size=(64, 64), image=small))
    assert pipeline.drawn[:2] == pipeline.drawn[2:]
    assert pipeline.drawn[0] != pipeline.drawn[1]
    assert seed_of(0, "a.png") != seed_of(1, "a.png")


def test_what_a_pipeline_is_configured_as_is_part_of_its_identity(pipeline):
    declared = UPLiFTSuperResolutionPipeline(pipeline.vae, pipeline.upsampler, latent_space="test-local")
    identities = [pipeline_method("mine", each, seed=0).identity for each in (pipeline, declared, pipeline)]
    assert identities[0] == identities[2] != identities[1]
    vae, space = pipeline.vae, pipeline.latent_space
    other = replace(space, scaling_factor=0.5)
    assert bilinear(vae, space).identity == bilinear(vae, space).identity != bilinear(vae, other).identity


def test_a_vae_of_its_own_is_noted(photographs, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "same")
    other = make_pipeline()
    with torch.no_grad():
        next(other.vae.parameters()).add_(0.1)
    other.save_pretrained(tmp_path / "other")
    protocol = SuperResolution(photographs, scales=(2,), crop=64)
    methods = methods_for(protocol, ["uplift", f"same={tmp_path}/same", f"other={tmp_path}/other"], pipeline)
    assert [bool(method.note) for method in methods] == [False, False, True]
    assert methods[2].note.startswith("`other` uses a different VAE")


def test_one_network_is_loaded_once(photographs, pipeline, tmp_path):
    make_flow_unet(pipeline.latent_space).save_pretrained(tmp_path)
    words = [f"cfm{steps}={tmp_path}:num_inference_steps={steps}" for steps in (1, 2)]
    one, two = methods_for(SuperResolution(photographs, scales=(2,), crop=64), words, pipeline)
    assert one.components["unet"] is two.components["unet"]


def test_the_model_must_be_a_pipeline_that_names_its_latents():
    with pytest.raises(TypeError, match=r"`model` must be a pipeline of this package, .* got a DDPMPipeline"):
        check_model(DDPMPipeline(unet=None, scheduler=DDPMScheduler()))


def test_networks_for_other_latents_are_refused(tmp_path):
    make_upsampler("test-local", latent_channels=12).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`upsampler` must have been trained for the VAE's latents"):
        load_pipeline(str(tmp_path), vae=make_vae())


def test_networks_on_the_hub_are_loaded_like_those_in_folders(tmp_path, monkeypatch, pipeline):
    vae = pipeline.vae
    repositories = {"me/network": pipeline.upsampler, "me/flow": make_flow_unet(LatentSpace.of(vae))}
    for name, network in repositories.items():
        network.save_pretrained(tmp_path / "hub" / name)
    with HubServer(tmp_path / "hub") as server:
        point_at(monkeypatch, server.url, tmp_path / "cache")
        loaded = [type(load_pipeline(name, vae=vae)) for name in repositories]
        with pytest.raises(OSError, match="has no such repository"):
            load_pipeline("me/nothing", vae=vae)
    assert loaded == [UPLiFTSuperResolutionPipeline, CFMLatentUpscalePipeline]


def test_stages_are_timed_apart_and_add_up(photographs, pipeline):
    protocol = SuperResolution(photographs, scales=(2,), crop=64)
    cost = measure_cost(
        pipeline_method("uplift", pipeline, seed=0),
        protocol.timing_sample(scale=2, edge=96),
        repeats=1,
        device=torch.device("cpu"),
    )
    assert cost.edge == 96
    assert min(cost.encode, cost.upsample, cost.decode) > 0
    assert cost.encode + cost.upsample + cost.decode == pytest.approx(cost.seconds)
    assert "encode" not in vars(pipeline.vae)


def test_decoding_latents_for_a_pipeline_that_takes_images_counts_as_decoding():
    vae = make_vae()
    method = pipeline_method("pixels", PixelPipeline(DDPMScheduler()), seed=0, vae_of_latents=vae)
    sample = Sample(name="00000", scale=2, size=(128, 128), latents=torch.randn(1, 4, 8, 8, generator=seeded()))
    cost = measure_cost(method, sample, repeats=1, device=torch.device("cpu"))
    assert cost.decode > cost.upsample / 10 > 0
    assert cost.encode == 0
    assert method.parameters == {}
    assert method.identity != pipeline_method("pixels", PixelPipeline(DDPMScheduler()), seed=0).identity


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_is_what_a_call_takes():
    def upscale(sample):
        return torch.ones(40_000_000)[0] * torch.zeros(1, 3, 64, 64)  # 160 MB

    cost = measure_cost(Method("large", upscale, {}), Sample(**SAMPLE), repeats=1, device=torch.device("cpu"))
    assert cost.peak_bytes == pytest.approx(160e6, rel=0.1)
