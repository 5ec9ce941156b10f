"""What docs/text_to_image.md says of refinement: the hires fix at 1.5x, and a ControlNet that keeps to the image."""

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetImg2ImgPipeline

from tests import components
from tests.components import seeded
from uplift_diffusers import UPLiFTLatentUpscalePipeline, UPLiFTTextToImagePipeline, UPLiFTTextToImageXLPipeline
from uplift_diffusers.images.convert import resize
from uplift_diffusers.latent_space import LatentCodec

KINDS = {
    "SD": (UPLiFTTextToImagePipeline, components.stable_diffusion_components, "sd15-vae"),
    "XL": (UPLiFTTextToImageXLPipeline, components.stable_diffusion_xl_components, "sdxl-vae"),
}
CALL = {"prompt": "a cat", "num_inference_steps": 4}


@pytest.fixture(scope="module", params=KINDS)
def pipe(request, tmp_path_factory):
    kind, make_parts, space = KINDS[request.param]
    parts = make_parts(tmp_path_factory.mktemp(request.param))
    options = {"requires_safety_checker": False} if request.param == "SD" else {"add_watermarker": False}
    pipeline = kind(**parts, upsampler=components.make_upsampler(space), **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def refine(pipe, output_type="pt", **arguments):
    return pipe(**CALL, generator=seeded(), output_type=output_type, **arguments).images


def test_the_hires_fix_denoises_at_one_and_a_half_times_the_size(pipe):
    sizes = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    image = refine(pipe, scale=1.5, refine_strength=0.5)
    hook.remove()
    assert sizes == [(8, 8)] * 4 + [(12, 12)] * 2
    assert image.shape == (1, 3, 96, 96)


def test_what_is_refined_is_the_reduced_image_encoded_again(pipe):
    codec = LatentCodec(pipe.vae)
    with torch.no_grad():
        large = refine(pipe, scale=2)
        expected = codec.space.normalize(codec.encode(resize(large, (96, 96))))
    latents = refine(pipe, "latent", scale=1.5)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


def test_a_refined_image_has_the_size_that_is_asked_for_where_latents_do_not_divide_it(pipe):
    # 1.4 * 64 pixels are 89.6, and 1.4 * 8 latents 11.2.
    assert refine(pipe, scale=1.4, refine_strength=0.5).shape == (1, 3, 90, 90)
    assert refine(pipe, "latent", scale=1.4).shape == (1, 4, 11, 11)


def test_a_control_net_refines_what_the_stage_made(tmp_path):
    sd = components.make_stable_diffusion(tmp_path)
    stage = UPLiFTLatentUpscalePipeline(sd.vae, components.make_upsampler())
    torch.manual_seed(31)
    control_net = ControlNetModel.from_unet(sd.unet, conditioning_embedding_out_channels=(8, 8, 8, 16)).eval()
    for name, parameter in control_net.named_parameters():
        if "controlnet" in name:  # zero before training, as if it were not there
            torch.nn.init.normal_(parameter, std=0.3)
    tile = StableDiffusionControlNetImg2ImgPipeline(
        **sd.components, controlnet=control_net, requires_safety_checker=False
    )
    tile.set_progress_bar_config(disable=True)

    latents = sd(**CALL, generator=seeded(), output_type="latent").images
    image = stage(latents=latents, scale=1.5, generator=seeded(), output_type="pt").images
    controlled, free = (
        tile(
            **CALL,
            image=image,
            control_image=image,
            strength=0.5,
            controlnet_conditioning_scale=scale,
            generator=seeded(),
            output_type="pt",
        ).images
        for scale in (1.0, 0.0)
    )
    assert controlled.shape == image.shape == (1, 3, 96, 96)
    assert (controlled - image).abs().max() > 1e-3
    assert (controlled - free).abs().max() > 1e-4
