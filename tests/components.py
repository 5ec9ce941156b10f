"""Small real components, seeded: what a Stable Diffusion repository holds, and an upsampler for its latents."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from uplift_diffusers import AutoencoderLocal, LatentSpace, UPLiFTModel
from uplift_diffusers.cfm import name_latents

FEATURES = 16
"""Width of the text encoders, which is what the U-Nets attend to."""


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, offloading moves nothing but hooks everything
OFFLOADS = [
    pytest.param("enable_model_cpu_offload", {"device": DEVICE}, id="model"),
    pytest.param(
        "enable_group_offload",
        {"onload_device": torch.device(DEVICE), "offload_type": "block_level", "num_blocks_per_group": 1},
        id="group",
    ),
    pytest.param(
        "enable_group_offload",
        {"onload_device": torch.device(DEVICE), "offload_type": "leaf_level"},
        id="leaf",
    ),
    pytest.param(
        "enable_sequential_cpu_offload",
        {"device": DEVICE},
        id="sequential",
        marks=pytest.mark.skipif(DEVICE == "cpu", reason="sequential offloading needs an accelerator"),
    ),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_images(count: int, height: int, width: int, seed: int = 5) -> torch.Tensor:
    """(count, 3, height, width) in [0, 1]."""
    noise = torch.rand(count, 3, max(height // 8, 1), max(width // 8, 1), generator=seeded(seed))
    return torch.nn.functional.interpolate(noise, size=(height, width), mode="bicubic").clamp(0, 1)


def random_latents(pipe, count: int = 1, height: int = 4, width: int = 6, seed: int = 11) -> torch.Tensor:
    """(count, channels, height, width) for the VAE of `pipe`."""
    return torch.randn(count, pipe.latent_space.channels, height, width, generator=seeded(seed))


def count_calls(module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The inputs that `module` is called with from now on, until the test ends."""
    seen, forward = [], module.forward

    def counted(*args, **kwargs):
        seen.append(args)
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "forward", counted)
    return seen


def make_vae(scaling_factor: float = 0.18215, latent_channels: int = 4, **config) -> AutoencoderKL:
    """An AutoencoderKL of Stable Diffusion's latent shape: 4 channels, spatial factor 8."""
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
        **config,
    ).eval()


def make_tiny_vae(latent_channels: int = 4) -> AutoencoderTiny:
    torch.manual_seed(2)
    return AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).eval()


def make_dc_vae() -> AutoencoderDC:
    torch.manual_seed(3)
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        scaling_factor=0.5,
    ).eval()


def make_local_vae() -> AutoencoderLocal:
    torch.manual_seed(4)
    vae = AutoencoderLocal(
        latent_channels=12,
        block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        scaling_factor=0.8,
        latent_space="test-local",
    )
    blocks = smooth_images(16, 64, 64) * 2 - 1
    vae.fit_linear_code(blocks.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
    return vae.eval()


VAES = {
    "AutoencoderKL": make_vae,
    "AutoencoderTiny": make_tiny_vae,
    "AutoencoderDC": make_dc_vae,
    "AutoencoderLocal": make_local_vae,
}


def make_upsampler(latent_space: str = "sd15-vae", latent_channels: int = 4, spatial_factor: int = 8) -> UPLiFTModel:
    """A network with all parts of the published one: noise, attention over 17 values, a refiner."""
    torch.manual_seed(6)
    return UPLiFTModel(
        latent_channels=latent_channels,
        latent_space=latent_space,
        spatial_factor=spatial_factor,
        encoder_block_out_channels=(8, 8),
        encoder_layers_per_block=1,
        decoder_channels=16,
        refiner_channels=16,
        refiner_layers=1,
        refiner_residual=True,
        noise_channels=4,
    ).eval()


def make_flow_unet(space: LatentSpace) -> UNet2DModel:
    """A network with all parts of the published CFM's, trained for nothing."""
    torch.manual_seed(10)
    unet = UNet2DModel(
        in_channels=2 * space.channels,
        out_channels=space.channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        attn_norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
    )
    name_latents(unet, space)
    return unet.eval()


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer with the single letters and a few merges for its vocabulary."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = [("a", "t</w>"), ("c", "at</w>"), ("d", "o"), ("do", "g</w>"), ("s", "e"), ("se", "a</w>")]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merge_file = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    merge_file.write_text("\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]))
    return CLIPTokenizer(str(vocabulary), str(merge_file), model_max_length=12)


def make_text_encoder(tokenizer: CLIPTokenizer, *, projected: bool = False) -> CLIPTextModel:
    torch.manual_seed(7)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=FEATURES,
        intermediate_size=2 * FEATURES,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=FEATURES,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="gelu",
    )
    encoder = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()
    if not hasattr(encoder, "text_model"):
        # diffusers 0.42 asks for it where there is a `clip_skip`; transformers 5 has put its layers into the model.
        object.__setattr__(encoder, "text_model", encoder)
    return encoder


def make_unet(**config) -> UNet2DConditionModel:
    torch.manual_seed(8)
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": FEATURES,
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**settings, **config}).eval()


def save_ip_adapter(unet: UNet2DConditionModel, folder: Path) -> None:
    """`models/ip_adapter.safetensors` and `models/image_encoder/`, as IP-Adapters are published."""
    torch.manual_seed(10)
    tokens, width = 4, unet.config.cross_attention_dim
    weights = {
        "image_proj.proj.weight": torch.randn(tokens * width, FEATURES),
        "image_proj.proj.bias": torch.zeros(tokens * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(names):
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        index = 2 * number + 1  # as published: counted with the self-attention in between
        weights[f"ip_adapter.{index}.to_k_ip.weight"] = torch.randn(hidden, width)
        weights[f"ip_adapter.{index}.to_v_ip.weight"] = torch.randn(hidden, width)
    (folder / "models").mkdir()
    save_file(weights, folder / "models" / "ip_adapter.safetensors")
    config = CLIPVisionConfig(
        num_hidden_layers=1,
        hidden_size=FEATURES,
        intermediate_size=FEATURES,
        num_attention_heads=2,
        projection_dim=FEATURES,
        image_size=32,
        patch_size=16,
    )
    CLIPVisionModelWithProjection(config).eval().save_pretrained(folder / "models" / "image_encoder")


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_safety_checker(*, flags: bool) -> tuple[StableDiffusionSafetyChecker, CLIPImageProcessor]:
    """A safety checker that finds a concept in every image, or in none, and its feature extractor."""
    torch.manual_seed(9)
    tower = {"num_hidden_layers": 1, "hidden_size": FEATURES, "intermediate_size": FEATURES, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 64},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        projection_dim=FEATURES,
    )
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.fill_(-2.0 if flags else 2.0)  # a cosine is never beyond
    checker.special_care_embeds_weights.fill_(2.0)
    size = {"height": 32, "width": 32}
    return checker.eval(), CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)


def stable_diffusion_components(folder: Path) -> dict:
    """The components of a [`StableDiffusionPipeline`] that makes images of 64 x 64 pixels."""
    tokenizer = make_tokenizer(folder)
    return {
        "vae": make_vae(),
        "text_encoder": make_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "unet": make_unet(),
        "scheduler": make_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
    }


def stable_diffusion_xl_components(folder: Path) -> dict:
    """The components of a [`StableDiffusionXLPipeline`] that makes images of 64 x 64 pixels."""
    tokenizer = make_tokenizer(folder)
    return {
        "vae": make_vae(scaling_factor=0.13025),
        "text_encoder": make_text_encoder(tokenizer),
        "text_encoder_2": make_text_encoder(tokenizer, projected=True),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "unet": make_unet(
            cross_attention_dim=2 * FEATURES,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + FEATURES,
        ),
        "scheduler": make_scheduler(),
        "image_encoder": None,
        "feature_extractor": None,
    }


def make_stable_diffusion(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(**stable_diffusion_components(folder), requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def arguments_of(name: str) -> dict:
    """Arguments that the pipeline of the file `name` can be called with."""
    arguments = {"generator": seeded(), "output_type": "np"}
    if name.startswith("text_to_image"):
        return {**arguments, "prompt": "a cat", "num_inference_steps": 2}
    if name == "features":
        return {"image": smooth_images(1, 40, 33), "output_type": "np"}
    return {**arguments, "image": smooth_images(1, 16, 24)}


def state_of(pipeline) -> dict[str, torch.Tensor]:
    """A copy of every tensor of every component, by name."""
    return {
        f"{name}.{key}": value.clone()
        for name, component in pipeline.components.items()
        if isinstance(component, torch.nn.Module)
        for key, value in component.state_dict().items()
    }
