"""
Coupling Flow Matching: a straight path from noised latents of the enlarged image to those of the large image.

The network sees a point on the path beside the context, which are the latents of the low-resolution image enlarged in
pixels, and predicts the velocity. All latents here are scaled, as diffusers passes them between pipelines.

Source: Schusterbauer et al. 2024 (arXiv 2312.07360), section 3, and the code they published.
"""

from functools import cache

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from uplift_diffusers.latent_space import LatentSpace

NOISING_STEP = 400
"""Step of 1,000 of the diffusion process that makes the source from the context."""

TIMESTEPS = 1000
"""The network's timestep at the end of the path; 0 at its start."""


@cache
def forward_diffusion() -> DDPMScheduler:
    """
    The diffusion process that noises the context: the cosine schedule.

    At `NOISING_STEP` it keeps 0.804 of the context and adds noise of deviation 0.595. (The authors' code, which leaves
    out the schedule's small offset, keeps 0.809; the betas of Stable Diffusion would keep 0.652 and add 0.759.)
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
    return forward_diffusion().add_noise(context, noise, torch.full((len(context),), NOISING_STEP))


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
        unet: takes the point and the context, one after the other along the channels.
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

    diffusers counts a path's position by the share of noise, from 1 to 0; inverted, it is the time from 0 to 1, and
    steps add the velocity instead of subtracting it.
    """
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, invert_sigmas=True)


def check_scheduler(scheduler: FlowMatchEulerDiscreteScheduler) -> None:
    """Raise TypeError or ValueError unless `scheduler` is of the kind and configuration of `euler_scheduler`."""
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
    return scheduler.timesteps


def name_latents(unet: UNet2DModel, space: LatentSpace) -> None:
    """Write into the U-Net's configuration which latents it is trained for; a UNet2DModel has no argument for that."""
    unet.register_to_config(_latent_space=space.name)


def check_unet(unet: UNet2DModel, space: LatentSpace) -> None:
    """
    Raise ValueError unless `unet` takes two of the latents of `space`, gives one, and was trained for them.

    A U-Net that does not say what it was trained for (see `name_latents`) is taken at its shape.
    """
    expected, actual = (2 * space.channels, space.channels), (unet.config.in_channels, unet.config.out_channels)
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
    """Height and width of the latents that `unet` takes are multiples of this."""
    return 2 ** (len(unet.config.block_out_channels) - 1)
