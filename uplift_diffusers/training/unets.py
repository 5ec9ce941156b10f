"""Sizes of the U-Net that Coupling Flow Matching trains."""

from diffusers import UNet2DModel
from torch import nn

UNETS = {
    "published": {
        "block_out_channels": (128, 256, 512, 1024),
        "layers_per_block": 3,
        "norm_num_groups": 32,
        "attention_head_dim": 64,
    },
    "same-parameters": {
        "block_out_channels": (64, 96, 112),
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "attention_head_dim": 32,
    },
    "same-time": {
        "block_out_channels": (128, 192, 256),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "attention_head_dim": 32,
    },
}
"""
Arguments of UNet2DModel by size.

`published`: the network of CFM's authors: width 128 times 1, 2, 4, 8, three blocks a level. 306 M parameters there and
331 M here for 4 latent channels, because diffusers' attentions are as wide as their input, not 4 heads of 64.
`same-parameters`: as many as the embedded bundle's upsampler has, 3.6 M for its 40 latent channels.
`same-time`: a step of training takes about as long as one of the embedded bundle's upsampler, 1.0 s against 1.4 s of
one CPU core in the embedded recipe, so that in the same time it sees a few more photographs: 23.7 M. The small
networks have three levels, for crops are small, and are wide at the top, for there are 80 input channels.
"""


def make_unet(size: str, latent_channels: int) -> UNet2DModel:
    """
    A new U-Net of one of the `UNETS` for latents of `latent_channels`: two of them in, a velocity out.

    Attention is on the coarsest level alone and in the middle, time enters by scale and shift, and the last
    convolution starts at zero, all as in the published network.
    """
    settings = UNETS[size]
    levels = len(settings["block_out_channels"])
    unet = UNet2DModel(
        **settings,
        in_channels=2 * latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        attn_norm_num_groups=settings["norm_num_groups"],
        resnet_time_scale_shift="scale_shift",
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet
