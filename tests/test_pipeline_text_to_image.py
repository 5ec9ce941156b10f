import inspect
import io

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.image_processor import VaeImageProcessor

from tests import components
from tests.components import count_calls, seeded, smooth_images, state_of
from uplift_diffusers import (
    UPLiFTLatentUpscalePipeline,
    UPLiFTModel,
    UPLiFTTextToImagePipeline,
    UPLiFTTextToImageXLPipeline,
)
from uplift_diffusers.runtime import dtype_option

PIPELINES = {"SD": UPLiFTTextToImagePipeline, "SDXL": UPLiFTTextToImageXLPipeline}
PARENTS = {"SD": StableDiffusionPipeline, "SDXL": StableDiffusionXLPipeline}

REFINERS = {"SD": StableDiffusionImg2ImgPipeline, "SDXL": StableDiffusionXLImg2ImgPipeline}
ARGUMENTS = {
    "SD": {
        "num_images_per_prompt": 2,
        "negative_prompt": "dog",
        "guidance_scale": 3.0,
        "guidance_rescale": 0.7,
        "clip_skip": 1,
        "eta": 0.8,
    },
    "SDXL": {
        "num_images_per_prompt": 2,
        "prompt_2": "sea",
        "negative_prompt": "dog",
        "negative_prompt_2": "do",
        "guidance_scale": 3.0,
        "guidance_rescale": 1.0,
        "clip_skip": 1,
        "eta": 0.8,
        "original_size": (512, 16),
        "target_size": (16, 512),
        "crops_coords_top_left": (64, 128),
        "negative_original_size": (32, 700),
        "negative_target_size": (700, 32),
        "negative_crops_coords_top_left": (200, 5),
    },
}
"""Arguments of the classes that the pipelines build on, each of which changes the image."""


def make_pipeline(folder, family="SD", **changes):
    if family == "SD":
        parts = {**components.stable_diffusion_components(folder), "upsampler": components.make_upsampler()}
        settings = {"requires_safety_checker": False}
    else:
        parts = components.stable_diffusion_xl_components(folder)
        parts["upsampler"] = components.make_upsampler("sdxl-vae")
        settings = {"add_watermarker": False}
    pipe = PIPELINES[family](**{**parts, **settings, **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def pipe(folder):
    return make_pipeline(folder)


@pytest.fixture(scope="module", params=PIPELINES)
def any_pipe(request, folder):
    return make_pipeline(folder, request.param)


def call(pipe, prompt="a cat", output_type="pt", **arguments):
    arguments = {"num_inference_steps": 4, "generator": seeded(), **arguments}
    return pipe(prompt, output_type=output_type, **arguments).images


def assert_same(pipe, other):
    """The same weights, and the same image but for the last bits, which follow the weights' alignment in memory."""
    weights, other_weights = state_of(pipe), state_of(other)
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    torch.testing.assert_close(call(pipe), call(other), rtol=0, atol=1e-4)


# What it computes


@pytest.mark.parametrize("scale", [1, 2, 2.5])
def test_a_prompt_becomes_an_image_of_scale_times_the_size(any_pipe, scale):
    image = call(any_pipe, scale=scale)
    assert image.shape == (1, 3, round(64 * scale), round(64 * scale))
    assert image.dtype == torch.float32
    assert image.std() > 1e-2


def test_it_is_stable_diffusion_and_then_the_latent_upscale_pipeline(any_pipe):
    family = "SDXL" if isinstance(any_pipe, StableDiffusionXLPipeline) else "SD"
    parent = PARENTS[family].from_pipe(any_pipe)
    parent.set_progress_bar_config(disable=True)
    stage = UPLiFTLatentUpscalePipeline(any_pipe.vae, any_pipe.upsampler)
    generator = seeded()
    latents = call(parent, output_type="latent", generator=generator)
    expected = stage(latents=latents, generator=generator, output_type="pt", adain_factor=0.3, scale=4).images
    torch.testing.assert_close(call(any_pipe, scale=4, adain_factor=0.3), expected, rtol=0, atol=1e-5)


def test_scale_1_is_stable_diffusion_itself(any_pipe):
    family = "SDXL" if isinstance(any_pipe, StableDiffusionXLPipeline) else "SD"
    parent = PARENTS[family].from_pipe(any_pipe)
    parent.set_progress_bar_config(disable=True)
    torch.testing.assert_close(call(any_pipe, scale=1), call(parent), rtol=0, atol=1e-5)


def test_height_and_width_are_those_of_the_small_image(pipe):
    assert call(pipe, height=48, width=80).shape == (1, 3, 96, 160)
    assert call(pipe, width=80).shape == (1, 3, 128, 160)


def test_latents_come_out_scaled_and_decode_to_the_image(any_pipe):
    latents = call(any_pipe, output_type="latent")
    assert latents.shape == (1, 4, 16, 16)
    with torch.no_grad():
        image = any_pipe.vae.decode(latents / any_pipe.vae.config.scaling_factor).sample / 2 + 0.5
    torch.testing.assert_close(image.clamp(0, 1), call(any_pipe), rtol=0, atol=1e-4)


def test_latents_go_in_and_bring_their_size(pipe):
    noise = torch.randn(1, 4, 6, 10, generator=seeded(2))
    before = noise.clone()
    image = call(pipe, latents=noise)
    assert image.shape == (1, 3, 96, 160)
    assert torch.equal(noise, before)
    assert torch.equal(call(pipe, latents=noise), image)
    assert (call(pipe, latents=-noise) - image).abs().max() > 1e-2


@pytest.mark.parametrize("family", PIPELINES)
def test_every_argument_reaches_the_class_it_builds_on(folder, family):
    pipe, arguments = make_pipeline(folder, family), {**ARGUMENTS[family], "num_inference_steps": 2}
    parent = PARENTS[family].from_pipe(pipe)
    parent.set_progress_bar_config(disable=True)
    expected = call(parent, **arguments)
    torch.testing.assert_close(call(pipe, scale=1, **arguments), expected, rtol=0, atol=1e-4)
    for name in ARGUMENTS[family]:  # each one matters: were it lost on the way, the images would differ
        without = call(parent, **{key: value for key, value in arguments.items() if key != name})
        assert without.shape != expected.shape or (without - expected).abs().max() > 1e-3, name


@pytest.mark.parametrize("family", PIPELINES)
def test_refinement_is_image_to_image_on_the_upscaled_latents(folder, family):
    pipe = make_pipeline(folder, family)
    img2img = REFINERS[family].from_pipe(pipe)
    img2img.set_progress_bar_config(disable=True)
    own = {"num_images_per_prompt", "guidance_rescale"} if family == "SD" else {"num_images_per_prompt"}
    own |= {name for name in ARGUMENTS[family] if name.endswith("_size")}
    arguments = {name: value for name, value in ARGUMENTS[family].items() if name not in own}
    generator = seeded()
    upscaled = call(pipe, output_type="latent", generator=generator, **arguments)
    expected = img2img(
        "a cat",
        image=upscaled,
        strength=0.5,
        num_inference_steps=4,
        generator=generator,
        output_type="latent",
        **arguments,
    ).images
    refined = call(pipe, output_type="latent", refine_strength=0.5, **arguments)
    torch.testing.assert_close(refined, expected, rtol=1e-4, atol=1e-4)
    assert (refined - upscaled).abs().max() > 1e-2


def test_custom_timesteps_rule_denoising_and_refinement(folder, monkeypatch):
    pipe = make_pipeline(
        folder, "SD", scheduler=DPMSolverMultistepScheduler.from_config(components.make_scheduler().config)
    )
    times, forward = [], pipe.unet.forward
    monkeypatch.setattr(
        pipe.unet, "forward", lambda *args, **kwargs: times.append(int(args[1])) or forward(*args, **kwargs)
    )
    call(pipe, timesteps=[900, 600, 300, 100], num_inference_steps=50, refine_strength=0.5)
    assert times == [900, 600, 300, 100, 300, 100]


@pytest.mark.parametrize("family", ["SD", "SDXL"])
def test_an_ip_adapter_is_understood_in_denoising_and_refinement(folder, family, tmp_path, monkeypatch):
    pipe = make_pipeline(folder, family)
    plain = call(pipe)
    components.save_ip_adapter(pipe.unet, tmp_path)
    pipe.load_ip_adapter(tmp_path, subfolder="models", weight_name="ip_adapter.safetensors")
    picture = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(smooth_images(1, 32, 32)))[0]
    pipe.set_ip_adapter_scale(0.0)
    torch.testing.assert_close(call(pipe, ip_adapter_image=picture), plain, rtol=0, atol=1e-5)

    pipe.set_ip_adapter_scale(1.0)
    seen, forward = [], pipe.unet.forward

    def counted(*args, **kwargs):
        seen.append(kwargs["added_cond_kwargs"]["image_embeds"][0].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", counted)
    prompted = call(pipe, ip_adapter_image=picture, refine_strength=0.5)
    assert len(seen) == 6
    assert set(seen) == {(2, 1, components.FEATURES)}
    assert (prompted - call(pipe, ip_adapter_image=picture)).abs().max() > 1e-3  # the refinement did something
    embeds = pipe.prepare_ip_adapter_image_embeds([picture], None, pipe.device, 1, True)
    torch.testing.assert_close(call(pipe, ip_adapter_image_embeds=embeds, refine_strength=0.5), prompted)


def test_refinement_runs_the_last_share_of_the_schedule_at_the_large_size(any_pipe, monkeypatch):
    inputs = count_calls(any_pipe.unet, monkeypatch)
    call(any_pipe, refine_strength=0.5, num_inference_steps=4)
    assert [tuple(sample.shape[2:]) for sample, *_ in inputs] == [(8, 8)] * 4 + [(16, 16)] * 2


def test_a_guide_vae_decodes_the_guide_alone(folder, monkeypatch):
    pipe = make_pipeline(folder, guide_vae=components.make_tiny_vae())
    decodes = count_calls(pipe.vae.decoder, monkeypatch)
    image = call(pipe)
    assert [tuple(latents.shape[2:]) for latents, *_ in decodes] == [(16, 16)]
    generator = seeded()
    latents = call(StableDiffusionPipeline.from_pipe(pipe), output_type="latent", generator=generator)
    with torch.no_grad():
        guide = (pipe.guide_vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    stage = UPLiFTLatentUpscalePipeline(pipe.vae, pipe.upsampler)
    expected = stage(latents=latents, image=guide, generator=generator, output_type="pt").images
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
    assert (image - call(make_pipeline(folder))).abs().max() > 1e-3


def test_a_tiny_autoencoder_may_stand_in_for_the_vae(folder):
    pipe = make_pipeline(folder, vae=components.make_tiny_vae(), latent_space="sd15-vae")
    assert call(pipe).shape == (1, 3, 128, 128)


# Randomness and batches


@pytest.mark.parametrize("refine_strength", [0.0, 0.5])
def test_a_seed_gives_the_same_image(any_pipe, refine_strength):
    first = call(any_pipe, generator=seeded(5), refine_strength=refine_strength)
    assert torch.equal(first, call(any_pipe, generator=seeded(5), refine_strength=refine_strength))
    assert (first - call(any_pipe, generator=seeded(6), refine_strength=refine_strength)).abs().max() > 1e-2


@pytest.mark.parametrize("refine_strength", [0.0, 0.5])
def test_an_image_is_the_same_alone_and_in_a_batch(folder, refine_strength):
    pipe = make_pipeline(folder)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)  # draws noise at every step
    prompts = ["a cat", "dog", "sea at do"]
    batch = call(pipe, prompts, generator=[seeded(i) for i in range(3)], refine_strength=refine_strength)
    for index, prompt in enumerate(prompts):
        alone = call(pipe, prompt, generator=[seeded(index)], refine_strength=refine_strength)
        torch.testing.assert_close(batch[index : index + 1], alone, rtol=0, atol=1e-3)


def test_images_of_one_prompt_are_a_batch(pipe):
    images = call(pipe, num_images_per_prompt=2, generator=[seeded(0), seeded(1)])
    torch.testing.assert_close(images[:1], call(pipe, generator=[seeded(0)]), rtol=0, atol=1e-3)
    torch.testing.assert_close(images[1:], call(pipe, generator=[seeded(1)]), rtol=0, atol=1e-3)


# Forms of input and output


def test_the_tuple_holds_what_the_dataclass_holds(any_pipe):
    result = any_pipe("a cat", num_inference_steps=2, generator=seeded(), output_type="np", return_dict=False)
    np.testing.assert_array_equal(result[0], call(any_pipe, output_type="np", num_inference_steps=2))
    assert isinstance(result, tuple)
    assert result[1:] == (() if isinstance(any_pipe, StableDiffusionXLPipeline) else (None,))


def test_pil_array_and_tensor_outputs_are_one(any_pipe):
    tensor, array, image = (call(any_pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    np.testing.assert_allclose(np.asarray(image[0]) / 255, array[0], atol=0.5 / 255 + 1e-6)


def test_embedded_prompts_give_the_image_of_the_prompt(pipe):
    positive, negative = pipe.encode_prompt("a cat", "cpu", 1, True, "dog")
    image = call(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative, refine_strength=0.5)
    expected = call(pipe, "a cat", negative_prompt="dog", refine_strength=0.5)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


def test_a_textual_inversion_is_understood(folder):
    pipe = make_pipeline(folder)
    plain = call(pipe, "a <thing>")
    pipe.load_textual_inversion({"<thing>": torch.full((components.FEATURES,), 3.0)}, token="<thing>")
    assert (call(pipe, "a <thing>") - plain).abs().max() > 1e-3


def test_a_lora_is_understood(folder):
    peft = pytest.importorskip("peft")
    pipe = make_pipeline(folder)
    plain = call(pipe)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = call(pipe)
    assert (adapted - plain).abs().max() > 1e-3
    torch.testing.assert_close(call(pipe, cross_attention_kwargs={"scale": 0.0}), plain, rtol=0, atol=1e-5)


# Callbacks and progress


def test_a_callback_sees_the_denoising_and_then_the_refinement(any_pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, tuple(tensors["latents"].shape), sorted(tensors)))
        return tensors

    names = ["latents", "prompt_embeds"]
    call(
        any_pipe,
        refine_strength=0.5,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    )
    expected = [(step, (1, 4, 8, 8), names) for step in range(4)] + [(step, (1, 4, 16, 16), names) for step in (0, 1)]
    assert seen == expected


def test_what_a_callback_returns_is_used(pipe):
    noise = torch.randn(1, 4, 8, 8, generator=seeded(3))

    def callback(pipeline, step, timestep, tensors):
        return {"latents": noise} if step == 3 else tensors

    stage = UPLiFTLatentUpscalePipeline(pipe.vae, pipe.upsampler)
    generator = seeded()
    torch.randn(1, 4, 8, 8, generator=generator)  # what the denoising draws
    expected = stage(latents=noise, generator=generator, output_type="pt").images
    torch.testing.assert_close(call(pipe, callback_on_step_end=callback), expected, rtol=0, atol=1e-5)


def test_an_interrupted_call_upscales_what_there_is_and_refines_nothing(any_pipe, monkeypatch):
    def callback(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 1
        return tensors

    inputs = count_calls(any_pipe.unet, monkeypatch)
    image = call(any_pipe, callback_on_step_end=callback, refine_strength=1.0)
    assert len(inputs) == 2
    assert image.shape == (1, 3, 128, 128)


@pytest.mark.parametrize("through", ["the pipeline that is handed over", "the pipeline that was called"])
def test_a_refinement_is_interrupted(pipe, monkeypatch, through):
    def callback(pipeline, step, timestep, tensors):
        if tensors["latents"].shape[-1] == 16:
            (pipeline if through == "the pipeline that is handed over" else pipe)._interrupt = True
        return tensors

    inputs = count_calls(pipe.unet, monkeypatch)
    assert call(pipe, callback_on_step_end=callback, refine_strength=1.0).shape == (1, 3, 128, 128)
    assert len(inputs) == 4 + 1
    assert pipe.interrupt


def test_a_callback_of_diffusers_acts_in_denoising_and_refinement(pipe, monkeypatch):
    inputs = count_calls(pipe.unet, monkeypatch)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    call(pipe, callback_on_step_end=cutoff, refine_strength=0.5)
    assert [len(sample) for sample, *_ in inputs] == [2, 2, 1, 1, 2, 2]  # the second refining step still decides


def test_the_progress_bar_is_that_of_the_pipeline(folder, capsys):
    pipe, text = make_pipeline(folder), io.StringIO()
    pipe.set_progress_bar_config(file=text, desc="Painting", mininterval=0)
    call(pipe, refine_strength=0.5)
    assert text.getvalue().count("Painting: 100%") >= 2
    assert "4/4" in text.getvalue()
    assert "2/2" in text.getvalue()
    pipe.set_progress_bar_config(disable=True)
    capsys.readouterr()
    call(pipe, refine_strength=0.5)
    assert capsys.readouterr().err == ""


# Safety


def test_the_safety_checker_sees_and_blackens_the_large_image(folder):
    checker, extractor = components.make_safety_checker(flags=True)
    pipe = make_pipeline(folder, safety_checker=checker, feature_extractor=extractor)
    seen = []
    checker.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["images"].clone()), with_kwargs=True)
    result = pipe("a cat", num_inference_steps=2, generator=seeded(), output_type="pt", refine_strength=0.5)
    assert [tuple(images.shape) for images in seen] == [(1, 3, 128, 128)]
    assert seen[0].std() > 1e-2
    assert result.nsfw_content_detected == [True]
    assert result.images.shape == (1, 3, 128, 128)
    assert result.images.max() == 0


def test_an_image_that_the_safety_checker_passes_is_left_alone(folder, pipe):
    checker, extractor = components.make_safety_checker(flags=False)
    result = make_pipeline(folder, safety_checker=checker, feature_extractor=extractor)(
        "a cat", num_inference_steps=4, generator=seeded(), output_type="pt"
    )
    assert result.nsfw_content_detected == [False]
    torch.testing.assert_close(result.images, call(pipe), rtol=0, atol=1e-6)


# Saving, loading, precision


def test_a_saved_pipeline_gives_the_same_image(any_pipe, tmp_path):
    any_pipe.save_pretrained(tmp_path)
    loaded = type(any_pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert_same(loaded, any_pipe)


def test_optional_components_are_saved_and_loaded(folder, tmp_path):
    pipe = make_pipeline(folder, guide_vae=components.make_tiny_vae())
    pipe.save_pretrained(tmp_path / "with")
    loaded = UPLiFTTextToImagePipeline.from_pretrained(tmp_path / "with")
    assert_same(loaded, pipe)
    without = UPLiFTTextToImagePipeline.from_pretrained(tmp_path / "with", guide_vae=None)
    assert without.guide_vae is None
    without.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / "guide_vae").exists()
    again = UPLiFTTextToImagePipeline.from_pretrained(tmp_path / "without")
    assert_same(again, make_pipeline(folder))


@pytest.mark.parametrize("family", PIPELINES)
def test_it_loads_from_a_stable_diffusion_directory_and_an_upsampler(folder, tmp_path, family):
    pipe = make_pipeline(folder, family)
    PARENTS[family].from_pipe(pipe).save_pretrained(tmp_path / "sd")
    pipe.upsampler.save_pretrained(tmp_path / "upsampler")
    upsampler = UPLiFTModel.from_pretrained(tmp_path / "upsampler")
    loaded = PIPELINES[family].from_pretrained(tmp_path / "sd", upsampler=upsampler)
    assert loaded.upsampler is upsampler
    assert_same(loaded, pipe)


@pytest.mark.parametrize("family", PIPELINES)
def test_it_is_made_from_a_pipeline_and_turned_back_into_one(folder, family):
    pipe = make_pipeline(folder, family)
    parent = PARENTS[family].from_pipe(pipe)
    again = PIPELINES[family].from_pipe(parent, upsampler=pipe.upsampler)
    for name, component in parent.components.items():
        assert getattr(again, name) is component
    assert not hasattr(parent, "upsampler")
    assert torch.equal(call(again), call(pipe))


def test_from_pipe_keeps_a_declared_latent_space_and_the_guide_vae(folder):
    tiny = components.make_tiny_vae()
    pipe = make_pipeline(folder, vae=tiny, guide_vae=tiny, latent_space="sd15-vae")
    again = UPLiFTTextToImagePipeline.from_pipe(pipe)
    assert again.latent_space.name == "sd15-vae"
    assert again.guide_vae is tiny


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", PIPELINES)
def test_half_precision_follows_float32(folder, family, dtype):
    pipe = make_pipeline(folder, family)
    noise = torch.randn(1, 4, 8, 8, generator=seeded(1)).to(dtype)
    expected = call(pipe, latents=noise.float())
    pipe.to(dtype)
    image = call(pipe, latents=noise)
    assert image.dtype == torch.float32
    assert (image - expected).abs().mean() < (0.01 if dtype == torch.float16 else 0.03)
    latents = call(pipe, output_type="latent", refine_strength=0.5)
    assert latents.dtype == dtype
    assert torch.isfinite(latents).all()


def test_a_float16_variant_is_saved_and_loaded(folder, tmp_path):
    pipe = make_pipeline(folder).to(torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    loaded = UPLiFTTextToImagePipeline.from_pretrained(tmp_path, variant="fp16", **dtype_option(torch.float16))
    assert {loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder.dtype, loaded.upsampler.dtype} == {torch.float16}
    assert_same(loaded, pipe)


def test_a_float16_vae_that_overflows_gives_no_black_image(folder, caplog):
    pipe = make_pipeline(folder, guide_vae=components.make_tiny_vae())
    pipe.vae.decoder.conv_in.weight.data *= 1e5 / pipe.vae.decoder.conv_in.weight.abs().max() / 4
    pipe.vae.half()
    image = call(pipe)
    assert len([record for record in caplog.records if "overflowed in float16" in record.message]) == 1
    assert pipe.vae.dtype == torch.float16
    pipe.vae.float()
    torch.testing.assert_close(image, call(pipe), rtol=0, atol=1e-4)
    assert image.std() > 1e-2


def test_denoising_that_overflows_is_named(folder):
    pipe = make_pipeline(folder)
    pipe.unet.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"`latents` must be finite.*float32 or bfloat16"):
        call(pipe)


@pytest.mark.parametrize("refine_strength", [0.0, 0.5])
def test_components_are_not_changed_by_a_call(any_pipe, refine_strength):
    before, config, scheduler = state_of(any_pipe), dict(any_pipe.config), dict(any_pipe.scheduler.config)
    call(any_pipe, refine_strength=refine_strength, adain_factor=0.5)
    after = state_of(any_pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert dict(any_pipe.config) == config
    assert dict(any_pipe.scheduler.config) == scheduler


def test_tiling_and_slicing_of_the_vae_are_respected(folder, monkeypatch):
    pipe = make_pipeline(folder, guide_vae=components.make_tiny_vae())
    decodes = count_calls(pipe.vae.decoder, monkeypatch)
    call(pipe, num_images_per_prompt=2)
    assert len(decodes) == 1
    pipe.vae.enable_slicing()
    call(pipe, num_images_per_prompt=2)
    assert len(decodes) == 1 + 2
    pipe.vae.enable_tiling()
    call(pipe)
    assert len(decodes) > 1 + 2 + 1


@pytest.mark.parametrize(("offload", "options"), components.OFFLOADS)
@pytest.mark.parametrize("family", PIPELINES)
def test_offloading_gives_the_same_image_again_and_again(folder, family, offload, options):
    expected = call(make_pipeline(folder, family).to(components.DEVICE), refine_strength=0.5)
    pipe = make_pipeline(folder, family)
    getattr(pipe, offload)(**options)
    for _ in range(2):
        torch.testing.assert_close(call(pipe, refine_strength=0.5), expected, rtol=0, atol=1e-2)


# The interface


@pytest.mark.parametrize("family", PIPELINES)
def test_every_argument_of_the_class_it_builds_on_is_taken_in_the_same_place(family):
    parent = inspect.signature(PARENTS[family].__call__).parameters
    own = inspect.signature(PIPELINES[family].__call__).parameters
    named = [name for name, parameter in parent.items() if parameter.kind is not parameter.VAR_KEYWORD]
    assert list(own)[: len(named)] == named
    assert {name: own[name].default for name in named} == {name: parent[name].default for name in named}
    assert list(own)[len(named) :] == [
        "scale",
        "refine_strength",
        "adain_factor",
        "tile_size",
        "callback_on_progress",
    ]


@pytest.mark.parametrize("family", PIPELINES)
def test_every_component_of_the_class_it_builds_on_is_taken(family):
    parent = inspect.signature(PARENTS[family].__init__).parameters
    own = inspect.signature(PIPELINES[family].__init__).parameters
    assert set(own) - set(parent) == {"upsampler", "guide_vae", "latent_space"}
    assert set(parent) - set(own) == set()


@pytest.mark.parametrize("family", PIPELINES)
def test_help_names_every_argument(family):
    text = inspect.getdoc(PIPELINES[family].__call__)
    names = set(inspect.signature(PIPELINES[family].__call__).parameters) - {"self"}
    assert {name for name in names if name not in text} == set()


def test_a_misspelt_keyword_is_refused(any_pipe):
    with pytest.raises(TypeError, match="guidence_scale"):
        any_pipe("a cat", guidence_scale=3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scale": 0.5}, ValueError, r"`scale` must be from 1 to 16, got 0\.5"),
        ({"output_type": "jpeg"}, ValueError, r"`output_type` must be .*got 'jpeg'"),
        ({"height": 60}, ValueError, r"`height` must be a multiple of 8, got 60\. Take 56 or 64"),
        ({"width": 0}, ValueError, "`width` must be a whole number of at least 1, got 0"),
        ({"width": 64.0}, TypeError, "`width` must be a whole number, got 64.0"),
        ({"prompt": []}, ValueError, "`prompt` must hold at least one prompt"),
        ({"prompt": ["a", "b"], "generator": [seeded()]}, ValueError, "each of the 2 images, got 1"),
        ({"num_images_per_prompt": 2, "generator": [seeded()] * 3}, ValueError, "each of the 2 images, got 3"),
        ({"generator": 0}, TypeError, "`generator` must be a torch.Generator or a list of them, got int"),
        (
            {"num_images_per_prompt": 0},
            ValueError,
            "`num_images_per_prompt` must be a whole number of at least 1, got 0",
        ),
        (
            {"latents": torch.zeros(1, 3, 8, 8)},
            ValueError,
            r"`latents` must be \(1, 4, 8, 8\) for 1 images of 64 x 64",
        ),
        ({"latents": torch.zeros(2, 4, 8, 8)}, ValueError, r"`latents` must be \(1, 4, 8, 8\) .*got \(2, 4, 8, 8\)"),
        ({"latents": torch.zeros(1, 4, 8, 8), "height": 128}, ValueError, r"`latents` must be \(1, 4, 16, 8\)"),
        ({"latents": np.zeros((1, 4, 8, 8))}, TypeError, "`latents` must be a tensor, got ndarray"),
        ({"refine_strength": 1.5}, ValueError, r"`refine_strength` must be from 0 to 1, got 1\.5"),
        ({"refine_strength": 0.2}, ValueError, r"must be 0 or at least 0\.25, which is one of 4 steps, got 0\.2"),
        ({"refine_strength": True}, TypeError, "`refine_strength` must be a number, got bool"),
        ({"adain_factor": -0.1}, ValueError, r"`adain_factor` must be from 0 to 1, got -0\.1"),
        ({"prompt": None}, ValueError, "Provide either `prompt` or `prompt_embeds`"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, ValueError, "`negative_prompt`"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "noise"),
    ],
)
def test_a_bad_argument_is_refused_before_the_denoising(any_pipe, monkeypatch, arguments, error, message):
    inputs = count_calls(any_pipe.unet, monkeypatch)
    with pytest.raises(error, match=message):
        any_pipe(**{"prompt": "a cat", "num_inference_steps": 4, **arguments})
    assert inputs == []


@pytest.mark.parametrize("shape", [(1, 12, 7), (12, components.FEATURES)])
def test_embedded_prompts_of_another_shape_are_refused_before_the_denoising(pipe, monkeypatch, shape):
    inputs = count_calls(pipe.unet, monkeypatch)
    with pytest.raises(ValueError, match=r"`prompt_embeds` must be \(any, any, 16\) for the U-Net, got"):
        call(pipe, None, prompt_embeds=torch.zeros(shape), negative_prompt_embeds=torch.zeros(shape))
    assert inputs == []


def test_half_denoised_latents_are_not_upsampled(folder):
    with pytest.raises(ValueError, match=r"`denoising_end` must be None.*got 0\.8"):
        call(make_pipeline(folder, "SDXL"), denoising_end=0.8)


@pytest.mark.parametrize(("family", "wrong"), [("SD", "sdxl-vae"), ("SDXL", "sd15-vae")])
def test_an_upsampler_of_other_latents_is_refused_when_given_and_when_put_in_later(folder, family, wrong):
    with pytest.raises(ValueError, match=f"trained for '{wrong}'"):
        make_pipeline(folder, family, upsampler=components.make_upsampler(wrong))
    pipe = make_pipeline(folder, family)
    pipe.upsampler = components.make_upsampler(wrong)
    with pytest.raises(ValueError, match=f"trained for '{wrong}'"):
        call(pipe)


def test_a_guide_vae_of_another_kind_or_shape_is_refused(folder):
    with pytest.raises(TypeError, match="`guide_vae` must be an AutoencoderTiny, got AutoencoderKL"):
        make_pipeline(folder, guide_vae=components.make_vae())
    tiny = components.AutoencoderTiny(latent_channels=16)
    with pytest.raises(ValueError, match=r"`guide_vae` must decode the latents of 'sd15-vae'.*got 16 channels"):
        make_pipeline(folder, guide_vae=tiny)


def test_a_guide_image_is_what_the_super_resolution_of_its_decoding_would_see(pipe, monkeypatch):
    """The stage after denoising and the stage on an image are one: the guide of both is in [0, 1]."""
    guides, encode = [], pipe.upsampler.encode
    monkeypatch.setattr(
        pipe.upsampler, "encode", lambda image, **options: guides.append(image) or encode(image, **options)
    )
    call(pipe)
    UPLiFTLatentUpscalePipeline(pipe.vae, pipe.upsampler)(image=smooth_images(1, 64, 64))
    assert all(guide.min() >= 0 and guide.max() <= 1 for guide in guides)
    assert [tuple(guide.shape) for guide in guides] == [(1, 3, 64, 64)] * 2


@pytest.mark.parametrize("family", PIPELINES)
def test_a_pipeline_without_vae_and_upsampler_encodes_prompts_and_nothing_else(folder, family):
    components_of = {"SD": components.stable_diffusion_components, "SDXL": components.stable_diffusion_xl_components}
    parts = components_of[family](folder)
    options = {"requires_safety_checker": False} if family == "SD" else {}
    pipe = PIPELINES[family](**{**parts, "vae": None}, upsampler=None, **options)
    embeds = pipe.encode_prompt("a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    assert torch.isfinite(embeds[0]).all()
    with pytest.raises(ValueError, match="`vae` must be a model, got None: this pipeline can only encode prompts"):
        pipe("a cat")


def test_progress_of_the_stage_is_told_and_can_end_the_work(pipe):
    calls = []
    call(pipe, callback_on_progress=lambda *parts: calls.append(parts))
    assert calls == [(1, 2), (2, 2)]
    calls.clear()
    call(pipe, output_type="latent", callback_on_progress=lambda *parts: calls.append(parts))
    assert calls == [(1, 1)]  # nothing is decoded

    def stop(done, total):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        call(pipe, callback_on_progress=stop)
