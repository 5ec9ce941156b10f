"""Shared parts of the upscaling text-to-image pipelines: checks before denoising, refinement after it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from uplift_diffusers.arguments import read_number, read_whole_number
from uplift_diffusers.scale import size_of


def count_images(
    prompt: str | list[str] | None, prompt_embeds: torch.Tensor | None, num_images_per_prompt: int | None
) -> int:
    """The number of images that a call generates."""
    if isinstance(prompt, list):
        count = len(prompt)
    else:
        count = len(prompt_embeds) if isinstance(prompt_embeds, torch.Tensor) else 1
    if count == 0:
        raise ValueError("`prompt` must hold at least one prompt, got none.")
    return count * read_whole_number("num_images_per_prompt", num_images_per_prompt)


def resolve_size(
    height: int | None,
    width: int | None,
    *,
    latents: torch.Tensor | None,
    unet: UNet2DConditionModel,
    spatial_factor: int,
) -> tuple[int, int]:
    """
    (height, width) in pixels of the image to denoise: as given, else that of `latents`, else the U-Net's.

    Raises:
        TypeError, ValueError: a size is not a positive multiple of `spatial_factor`.
    """
    sample_size = unet.config["sample_size"]
    positions = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
    if isinstance(latents, torch.Tensor) and latents.ndim == 4:
        positions = size_of(latents)
    size = []
    for name, value, default in (("height", height, positions[0]), ("width", width, positions[1])):
        value = default * spatial_factor if value is None else value
        value = read_whole_number(name, value)
        if value % spatial_factor:
            lower = max(value // spatial_factor, 1) * spatial_factor
            raise ValueError(
                f"`{name}` must be a multiple of {spatial_factor}, got {value}. "
                f"Take {lower} or {lower + spatial_factor}."
            )
        size.append(value)
    return size[0], size[1]


def check_tensors(
    *,
    unet: UNet2DConditionModel,
    count: int,
    size: tuple[int, int],
    spatial_factor: int,
    latents: torch.Tensor | None,
    **prompt_embeds: torch.Tensor | None,
) -> None:
    """
    Check the shapes of latents and prompt embeddings.

    Args:
        count: number of images of the call.
        size: (height, width) in pixels.
        latents: as passed to the pipeline.
        prompt_embeds: the pipeline's prompt embedding arguments, by name.
    Raises:
        TypeError, ValueError: `latents` are not (count, channels, h, w), embeds not (prompts, tokens, features).
    """
    channels = unet.config["in_channels"]
    height, width = size[0] // spatial_factor, size[1] // spatial_factor
    _check_shape(
        "latents",
        latents,
        (count, channels, height, width),
        reason=f"for {count} images of {size[0]} x {size[1]} (height x width) pixels",
    )
    features = unet.config["cross_attention_dim"]
    if unet.config["encoder_hid_dim_type"] == "text_proj":
        features = unet.config["encoder_hid_dim"]
    for name, tensor in prompt_embeds.items():
        _check_shape(
            name, tensor, (None, None, features if isinstance(features, int) else None), reason="for the U-Net"
        )


def check_refine_strength(refine_strength: float, *, num_inference_steps: int, channels: int) -> None:
    """
    Check the strength of the refinement.

    Raises:
        TypeError, ValueError: the strength is not from 0 to 1 or too small for a single step, or the latents do not
            have the four channels by which diffusers' image-to-image pipelines distinguish latents from images.
    """
    read_number("refine_strength", refine_strength, minimum=0, maximum=1)
    # Image-to-image runs the last int(num_inference_steps * strength) steps of the schedule.
    if refine_strength and int(num_inference_steps * refine_strength) < 1:
        least = math.ceil(1000 / num_inference_steps) / 1000
        raise ValueError(
            f"`refine_strength` must be 0 or at least {least}, which is one of {num_inference_steps} steps, "
            f"got {refine_strength}."
        )
    if refine_strength and channels != 4:
        raise ValueError(f"`refine_strength` must be 0 for latents of {channels} channels, got {refine_strength}.")


def refine(
    latents: torch.Tensor,
    *,
    pipeline: DiffusionPipeline,
    refiner: Any,
    strength: float,
    callback_on_step_end: Callable | None,
    **conditioning,
) -> torch.Tensor:
    """
    Add noise to upscaled latents and denoise them with the last part of the schedule: the "hires fix".

    Args:
        latents: (B, 4, h, w), scaled.
        pipeline: the text-to-image pipeline; its progress bar is used, and its `interrupt` is read and set.
        refiner: diffusers' image-to-image pipeline with the same components.
        strength: share of the schedule.
        callback_on_step_end: called with `refiner` as its pipeline.
        conditioning: the other arguments of `refiner`.
    Returns:
        (B, 4, h, w), scaled.
    Source: SDEdit, Meng et al. 2022, section 3.
    """
    refiner.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    callback = callback_on_step_end
    if callable(callback_on_step_end):
        callback = _share_interruption(callback_on_step_end, pipeline)
        if hasattr(callback_on_step_end, "tensor_inputs"):  # PipelineCallback, whose own list diffusers goes by
            conditioning["callback_on_step_end_tensor_inputs"] = callback_on_step_end.tensor_inputs
    latents = refiner(
        image=latents, strength=strength, output_type="latent", callback_on_step_end=callback, **conditioning
    ).images
    pipeline.maybe_free_model_hooks()  # the U-Net must not stay on the device while the large image is decoded
    return latents


def _share_interruption(callback: Callable, pipeline: DiffusionPipeline) -> Callable:
    """`callback`, followed by synchronising the interruption of `pipeline` and of the refiner."""

    def called(refiner: DiffusionPipeline, step: int, timestep: int, tensors: dict) -> dict:
        result = callback(refiner, step, timestep, tensors)
        refiner._interrupt = pipeline._interrupt = refiner._interrupt or pipeline._interrupt
        return result

    return called


def _check_shape(name: str, tensor: torch.Tensor | None, expected: tuple[int | None, ...], *, reason: str) -> None:
    """Raise unless `tensor` is None or has the shape `expected`, in which None matches any size."""
    if tensor is None:
        return
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}.")
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(want not in (None, got) for want, got in zip(expected, shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"`{name}` must be ({wanted}) {reason}, got {shape}.")
