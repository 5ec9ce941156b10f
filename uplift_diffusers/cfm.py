"""
Coupling Flow Matching, the baseline: its path, scheduler, networks and objective.

The path is a straight line from noised latents of the upsampled image to the latents of the large image. The network
gets a point on the path and the context (the latents of the low-resolution image upsampled in pixels) and predicts
the velocity. All latents here are scaled, as diffusers passes them between pipelines.

Source: Schusterbauer et al. 2024 (arXiv 2312.07360), section 3, and the code they published.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import nn

from uplift_diffusers.data.latent_cache import LatentCache
from uplift_diffusers.data.pyramid import encode_pyramid, image_pyramid
from uplift_diffusers.latent_space import Autoencoder, LatentCodec, LatentSpace
from uplift_diffusers.models.blocks import start_at_zero
from uplift_diffusers.scale import size_of

NOISING_STEP = 400
"""Step, out of 1,000, of the diffusion process that makes the source from the context."""

TIMESTEPS = 1000
"""The network's timestep at the end of the path. It is 0 at the start."""

UNETS = {
    "published": {
        "block_out_channels": (128, 256, 512, 1024),
        "layers_per_block": 3,
        "norm_num_groups": 32,
        "attention_head_dim": 64,
    },
    "same-parameters": {
        "block_out_channels": (48, 64, 80),
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "attention_head_dim": 16,
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

`published`: the network of CFM's authors: width 128 times 1, 2, 4, 8, three blocks per level. 306 M parameters there
and 331 M here for 4 latent channels, because diffusers' attention layers are as wide as their input, not 4 heads of
64. `same-parameters`: as many as the embedded bundle's upsampler, 1.8 M for its 40 latent channels.
`same-time`: 23.7 M. A training step takes less time than one of the embedded bundle's upsampler, 1.0 s against 2 s of
one CPU core in the embedded recipe, so it sees more photographs in the same time.
The small networks have three levels because crops are small, and are wide at the top because there are 80 input
channels.
"""


@cache
def forward_diffusion() -> DDPMScheduler:
    """
    The diffusion process that adds noise to the context, with the cosine schedule.

    At `NOISING_STEP` it keeps 0.804 of the context and adds noise of standard deviation 0.595. (The authors' code,
    which leaves out the schedule's small offset, keeps 0.809; the betas of Stable Diffusion would keep 0.652 and add
    0.759.)
    Source: Nichol and Dhariwal 2021, equation 17.
    """
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")


def enlarge(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, 3, h, w) -> (B, 3, *size) by bilinear interpolation: the image whose latents are the context."""
    return F.interpolate(image, size=size, mode="bilinear")


def noise_context(context: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """
    The source x0 of the path: the context at `NOISING_STEP` of the diffusion process.

    Args:
        context: (B, C, h, w) float32.
        noise: (B, C, h, w), standard normal.
    """
    add_noise: Callable[..., torch.Tensor] = forward_diffusion().add_noise  # typed for an IntTensor, which no step is
    return add_noise(context, noise, torch.full((len(context),), NOISING_STEP))


def point_on_path(source: torch.Tensor, target: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x0 + t x1 for x0, x1 of (B, C, h, w) and t of (B,) from 0 to 1."""
    return torch.lerp(source, target, time[:, None, None, None])


def velocity(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """x1 - x0, which the network is trained to predict at every point of the path."""
    return target - source


def predict_velocity(
    unet: UNet2DModel, point: torch.Tensor, context: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """
    The network's velocity at a point of the path.

    Args:
        unet: takes the point and the context, concatenated along the channels.
        point: (B, C, h, w).
        context: (B, C, h, w).
        timestep: (B,) or (), from 0 to `TIMESTEPS`.
    Returns:
        (B, C, h, w), dtype of `unet`.
    """
    return unet(torch.cat([point, context], dim=1).to(unet.dtype), timestep).sample


def euler_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """
    diffusers' Euler steps from x0 to x1.

    diffusers measures the position on a path by the share of noise, from 1 to 0; with `invert_sigmas` it is the time
    from 0 to 1, and steps add the velocity instead of subtracting it.
    """
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, invert_sigmas=True)


def check_scheduler(scheduler: FlowMatchEulerDiscreteScheduler) -> None:
    """Raise TypeError or ValueError unless `scheduler` has the class and configuration of `euler_scheduler`."""
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise TypeError(f"`scheduler` must be a FlowMatchEulerDiscreteScheduler, got a {type(scheduler).__name__}.")
    for name, value in euler_scheduler().config.items():
        if not name.startswith("_") and scheduler.config[name] != value:
            raise ValueError(
                f"`scheduler` must have {name}={value}, got {scheduler.config[name]}. "
                "Use FlowMatchEulerDiscreteScheduler(invert_sigmas=True)."
            )


def set_equal_steps(scheduler: FlowMatchEulerDiscreteScheduler, num_steps: int, device: torch.device) -> torch.Tensor:
    """Prepare `num_steps` steps of equal length, which end at x1 exactly, and return their timesteps."""
    sigmas = [1 - step / num_steps for step in range(num_steps)]
    scheduler.set_timesteps(sigmas=sigmas, device=device)
    assert isinstance(scheduler.timesteps, torch.Tensor)
    return scheduler.timesteps


def make_unet(size: str, latent_channels: int) -> UNet2DModel:
    """
    A new U-Net of one of the `UNETS` for `latent_channels`: point and context in, velocity out.

    Attention is used only on the coarsest level and in the middle block, time enters by scale and shift, and the last
    convolution is initialised to zero, all as in the published network.
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
    start_at_zero(unet.conv_out)
    return unet


def name_latents(unet: UNet2DModel, space: LatentSpace) -> None:
    """Store in the U-Net's configuration which latents it is trained for; UNet2DModel has no argument for that."""
    unet.register_to_config(_latent_space=space.name)


def check_unet(unet: UNet2DModel, space: LatentSpace) -> None:
    """
    Raise ValueError unless `unet` has the channels for the latents of `space` and was trained for them.

    If the configuration does not say what it was trained for (see `name_latents`), only the channels are checked.
    """
    expected, actual = (2 * space.channels, space.channels), (unet.config["in_channels"], unet.config["out_channels"])
    if actual != expected:
        raise ValueError(
            f"`unet` must have {expected[0]} input and {expected[1]} output channels for the latent space "
            f"{space.name!r}, got {actual[0]} and {actual[1]}."
        )
    trained_for = unet.config.get("_latent_space", space.name)
    if trained_for != space.name:
        raise ValueError(
            f"`unet` must have been trained for the VAE's latents: it was trained for {trained_for!r}, got "
            f"{space.name!r}. If these are the same latents under another name, pass latent_space={trained_for!r}."
        )


def latent_multiple(unet: UNet2DModel) -> int:
    """The number that height and width of the latents must be multiples of for `unet`."""
    return 2 ** (len(unet.config["block_out_channels"]) - 1)


class FlowMatchingObjective(nn.Module):
    """
    mean((predicted velocity - (x1 - x0))^2) at a time drawn uniformly from [0, 1] for every image.

    The paper trains a network for one factor. Here the factor of each batch is drawn from `depths`, so one network
    serves several; it has to infer the factor from the context.

    Args:
        model: the U-Net that is trained.
        vae: frozen; makes the context and the target x1.
        space: the VAE's latent space.
        depths: the low-resolution image has 1/2^d of the resolution, d drawn uniformly from these.
        cache: stored latents of that VAE.
    Source: Schusterbauer et al. 2024, section 3.
    """

    def __init__(
        self,
        model: UNet2DModel,
        vae: Autoencoder,
        space: LatentSpace,
        *,
        depths: tuple[int, ...],
        cache: LatentCache | None = None,
    ):
        super().__init__()
        self.model = model
        self.vae = vae.eval().requires_grad_(False)
        self.codec = LatentCodec(self.vae, space)
        self.depths = depths
        self.cache = cache

    def forward(self, images: torch.Tensor, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """(B, 3, R, R) in [0, 1], R / spatial_factor a multiple of `latent_multiple(model)` -> `loss`."""
        depth = self.depths[int(torch.randint(len(self.depths), (), generator=generator))]
        low = image_pyramid(images, depth)[depth]
        pyramid = [images, enlarge(low, size_of(images))]
        target, context = encode_pyramid(self.codec, pyramid, cache=self.cache)
        target, context = self.codec.space.normalize(target), self.codec.space.normalize(context)  # (B, C, r, r)

        noise = torch.randn(context.shape, generator=generator).to(context)
        time = torch.rand(len(images), generator=generator).to(context)
        source = noise_context(context, noise)
        predicted = predict_velocity(
            self.model, point_on_path(source, target, time), context, timestep=time * TIMESTEPS
        )
        return {"loss": F.mse_loss(predicted.float(), velocity(source, target))}
