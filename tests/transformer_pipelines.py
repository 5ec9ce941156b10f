"""diffusers' pipelines of today, real but tiny and untrained, each with a VAE of its own kind of latents."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from tests.components import FEATURES, make_scheduler, make_unet, make_vae, seeded

HEIGHT, WIDTH = 32, 64
"""In pixels, of what the pipelines make."""


class Case(NamedTuple):
    """
    Args:
        make: the pipeline.
        arguments: of its call, beside size, steps, generator and output type.
        space: the name of its latents.
        latents: the shape of its latents for one image of HEIGHT x WIDTH.
    """

    make: Callable[[], DiffusionPipeline]
    arguments: dict
    space: str
    latents: tuple[int, ...]


def embeds(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(3))


def make_flux_vae() -> AutoencoderKL:
    return make_vae(0.3611, 16, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)


def make_sd3_vae() -> AutoencoderKL:
    return make_vae(1.5305, 16, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)


def make_flux2_vae() -> AutoencoderKLFlux2:
    torch.manual_seed(11)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
    )
    vae.bn.running_mean.normal_(generator=seeded(12))
    vae.bn.running_var.uniform_(0.3, 3, generator=seeded(13))
    return vae.eval()


def make_qwen_vae() -> AutoencoderKLQwenImage:
    torch.manual_seed(14)
    return AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def make_wan_vae() -> AutoencoderKLWan:
    torch.manual_seed(15)
    return AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def make_sana_vae() -> AutoencoderDC:
    torch.manual_seed(16)
    blocks, widths, layers = ("ResBlock",) * 6, (8,) * 5 + (32,), (1,) * 6
    return AutoencoderDC(
        latent_channels=32,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        scaling_factor=0.41407,
    ).eval()


def make_flux() -> FluxPipeline:
    torch.manual_seed(21)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        pooled_projection_dim=FEATURES,
        axes_dims_rope=(4, 4, 8),
    )
    return _assemble(FluxPipeline, make_flux_vae(), transformer, num_encoders=2)


def make_flux2(kind: type[DiffusionPipeline] = Flux2Pipeline) -> DiffusionPipeline:
    torch.manual_seed(22)
    transformer = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return _assemble(kind, make_flux2_vae(), transformer)


def make_z_image() -> ZImagePipeline:
    torch.manual_seed(23)
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=FEATURES,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return _assemble(ZImagePipeline, make_flux_vae(), transformer)


def make_sd3() -> StableDiffusion3Pipeline:
    torch.manual_seed(24)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        caption_projection_dim=16,
        pooled_projection_dim=FEATURES,
        pos_embed_max_size=16,
    )
    return _assemble(StableDiffusion3Pipeline, make_sd3_vae(), transformer, num_encoders=3)


def make_qwen_image() -> QwenImagePipeline:
    torch.manual_seed(25)
    transformer = QwenImageTransformer2DModel(
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        axes_dims_rope=(8, 4, 4),
    )
    return _assemble(QwenImagePipeline, make_qwen_vae(), transformer)


def make_wan() -> WanPipeline:
    torch.manual_seed(26)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=FEATURES,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    return _assemble(WanPipeline, make_wan_vae(), transformer)


def make_sana() -> SanaPipeline:
    torch.manual_seed(27)
    transformer = SanaTransformer2DModel(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=FEATURES,
        sample_size=8,
    )
    return _assemble(SanaPipeline, make_sana_vae(), transformer)


def make_sdxl() -> StableDiffusionXLPipeline:
    unet = make_unet(
        cross_attention_dim=FEATURES,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + FEATURES,
    )
    return _quiet(
        StableDiffusionXLPipeline(
            vae=make_vae(0.13025),
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=unet,
            scheduler=make_scheduler(),
            add_watermarker=False,
        )
    )


def _assemble(kind: type[DiffusionPipeline], vae, transformer, *, num_encoders: int = 1) -> DiffusionPipeline:
    """A pipeline without text encoders: prompts are given embedded."""
    texts = {
        f"{part}{'' if index == 0 else f'_{index + 1}'}": None
        for index in range(num_encoders)
        for part in ("text_encoder", "tokenizer")
    }
    return _quiet(kind(vae=vae, transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(), **texts))


def _quiet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


_POOLED = {"prompt_embeds": embeds(1, 5, FEATURES), "pooled_prompt_embeds": embeds(1, FEATURES)}
_EMBEDDED = {"prompt_embeds": embeds(1, 5, FEATURES), "guidance_scale": 1.0}

CASES = {
    "FLUX.1": Case(make_flux, _POOLED, "flux-vae", (1, 8, 64)),
    "FLUX.2": Case(make_flux2, _EMBEDDED, "flux2-vae", (1, 8, 128)),
    "FLUX.2 klein": Case(lambda: make_flux2(Flux2KleinPipeline), _EMBEDDED, "flux2-vae", (1, 32, 4, 8)),
    "Z-Image": Case(
        make_z_image,
        {"prompt_embeds": [embeds(5, FEATURES)], "guidance_scale": 0.0},
        "flux-vae",
        (1, 16, 4, 8),
    ),
    "SD3": Case(make_sd3, {**_POOLED, "guidance_scale": 1.0}, "sd3-vae", (1, 16, 4, 8)),
    "SDXL": Case(make_sdxl, {**_POOLED, "guidance_scale": 1.0}, "sdxl-vae", (1, 4, 4, 8)),
    "Qwen-Image": Case(
        make_qwen_image,
        {"prompt_embeds": embeds(1, 5, FEATURES), "prompt_embeds_mask": torch.ones(1, 5, dtype=torch.long)},
        "wan21-vae",
        (1, 8, 64),
    ),
    "Wan 2.1": Case(make_wan, {**_EMBEDDED, "num_frames": 1}, "wan21-vae", (1, 16, 1, 4, 8)),
    "Sana": Case(
        make_sana,
        {
            **_EMBEDDED,
            "prompt_attention_mask": torch.ones(1, 5, dtype=torch.long),
            "negative_prompt": None,
            "use_resolution_binning": False,
        },
        "sana-dc-ae",
        (1, 32, 1, 2),
    ),
}


def run(pipeline: DiffusionPipeline, case: Case, output_type: str) -> torch.Tensor:
    """What a call of one step gives: latents as the pipeline returns them, or images (1, 3, HEIGHT, WIDTH)."""
    (result,) = pipeline(
        **case.arguments,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=1,
        generator=seeded(4),
        output_type=output_type,
        return_dict=False,
    )
    is_frames = output_type == "pt" and isinstance(pipeline, WanPipeline)
    return result[:, 0] if is_frames else result  # (B, frames, 3, H, W)
