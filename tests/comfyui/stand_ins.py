"""
A node pack for ComfyUI, loaded only by the tests: small random models of the kinds that checkpoints hold.

They are ComfyUI's own classes. Real checkpoints are too large for a test.
"""

import comfy.latent_formats
import comfy.ldm.models.autoencoder
import comfy.ldm.wan.vae
import comfy.model_base
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import ComfyExtension, io

CPU = torch.device("cpu")
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
    "context_dim": 768,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
    "dtype": torch.float32,
}

FLUX2_VAE = {
    "double_z": True,
    "z_channels": 32,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
    "batch_norm_latent": True,
}
"""As ComfyUI builds it whatever a checkpoint says: 84 M parameters."""


def stable_diffusion():
    model = comfy.model_base.BaseModel(comfy.supported_models.SD15(UNET), device=CPU)
    vae = comfy.taesd.taesd.TAESD(latent_channels=4)
    fill(model.diffusion_model)
    fill(vae.taesd_encoder)
    fill(vae.taesd_decoder)
    return model, vae


def wan():
    model = torch.nn.Module()
    model.latent_format = comfy.latent_formats.Wan21()
    vae = comfy.ldm.wan.vae.WanVAE(
        dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
    )
    fill(vae)
    return model, vae


def flux2():
    model = torch.nn.Module()
    model.latent_format = comfy.latent_formats.Flux2()
    vae = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=FLUX2_VAE, embed_dim=FLUX2_VAE["z_channels"])
    fill(vae)
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 128))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 128))
    return model, vae


def fill(module):
    """Random weights: ComfyUI's layers have none until a checkpoint is loaded."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)


KINDS = {"stable diffusion": stable_diffusion, "flux2": flux2, "wan": wan}


class StandInCheckpoint(io.ComfyNode):
    """In place of CheckpointLoaderSimple; its CLIP is an empty module."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StandInCheckpoint",
            category="testing",
            inputs=[io.Combo.Input("ckpt_name", options=list(KINDS))],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, ckpt_name):
        with torch.inference_mode(False):
            torch.manual_seed(0)
            model, vae = KINDS[ckpt_name]()
            patcher = ModelPatcher(model, load_device=CPU, offload_device=CPU)
            return io.NodeOutput(patcher, torch.nn.Module(), comfy.sd.VAE(sd=vae.state_dict()))


class StandInText(io.ComfyNode):
    """In place of CLIPTextEncode."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StandInText",
            category="testing",
            inputs=[io.Clip.Input("clip"), io.String.Input("text")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, clip, text):
        generator = torch.Generator().manual_seed(len(text))
        return io.NodeOutput([[torch.randn(1, 77, UNET["context_dim"], generator=generator), {}]])


class LatentMask(io.ComfyNode):
    """Shows the noise mask of latents."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LatentMask",
            category="testing",
            inputs=[io.Latent.Input("samples")],
            outputs=[io.Mask.Output()],
        )

    @classmethod
    def execute(cls, samples):
        return io.NodeOutput(samples["noise_mask"].squeeze(1))


class StandIns(ComfyExtension):
    async def get_node_list(self):
        return [StandInCheckpoint, StandInText, LatentMask]


async def comfy_entrypoint():
    return StandIns()
