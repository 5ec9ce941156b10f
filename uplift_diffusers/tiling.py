"""
Exact tiled execution: the untiled output, with the memory of a tile.

A tile is computed with a halo: the surroundings that it depends on, which follow from the layers
(`UPLiFTModel.step_reach`, `UPLiFTModel.guide_reach`, `AutoencoderLocal.decoder_reach`). Zero padding affects only the
halo. At the image's own border there is no halo, and the padding is that of the whole image. What depends on the
position in the image (the noise and the decoder's bilinear interpolation) gets the tile's position. What remains is
float32 rounding.

A tile passes through the encoder and all steps with the halos of all steps around it, and is cropped after every
step to what the next ones need.
"""

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import is_compiled_module
from torch.utils._pytree import tree_map

from uplift_diffusers.arguments import read_whole_number
from uplift_diffusers.scale import size_of

if TYPE_CHECKING:
    from uplift_diffusers.models.upsampler import Generator, StepNoise, UPLiFTModel


class Span(NamedTuple):
    """Positions from `start` up to, but not including, `stop` of an axis of `size` positions."""

    start: int
    stop: int
    size: int

    def grow(self, reach: int) -> "Span":
        """Extended by `reach` on both sides, as far as the axis goes."""
        return Span(max(self.start - reach, 0), min(self.stop + reach, self.size), self.size)

    def finer(self, factor: int) -> "Span":
        """The same stretch of an axis with `factor` times as many positions."""
        return Span(self.start * factor, self.stop * factor, self.size * factor)

    def cover(self, factor: int) -> "Span":
        """The cells of `factor` positions that the span touches."""
        return Span(self.start // factor, -(-self.stop // factor), self.size // factor)


class Window(NamedTuple):
    """A rectangle of a grid."""

    rows: Span
    columns: Span

    @classmethod
    def whole(cls, size: tuple[int, int]) -> "Window":
        """All of a grid of `size` (height, width)."""
        return cls(Span(0, size[0], size[0]), Span(0, size[1], size[1]))

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def slices(self) -> tuple[slice, slice]:
        """Its rows and columns in the grid."""
        return slice(self.rows.start, self.rows.stop), slice(self.columns.start, self.columns.stop)

    def grow(self, reach: int) -> "Window":
        """Extended by `reach` on all sides, as far as the grid goes."""
        return Window(self.rows.grow(reach), self.columns.grow(reach))

    def finer(self, factor: int) -> "Window":
        """The same rectangle of a grid with `factor` times as many positions along each axis."""
        return Window(self.rows.finer(factor), self.columns.finer(factor))

    def cover(self, factor: int) -> "Window":
        """The cells of `factor` x `factor` positions that the window touches."""
        return Window(self.rows.cover(factor), self.columns.cover(factor))

    def crop(self, features: torch.Tensor, inner: "Window") -> torch.Tensor:
        """The part `inner` of `features` (..., H, W), which cover this window; returns a view."""
        top, left = inner.rows.start - self.rows.start, inner.columns.start - self.columns.start
        height, width = inner.shape
        return features[..., top : top + height, left : left + width]


def split_into_tiles(size: tuple[int, int], edge: int) -> list[list[Window]]:
    """Rows of windows that partition a grid of `size`: as few as `edge` allows, and as equal as possible."""
    rows, columns = (
        [Span(length * index // count, length * (index + 1) // count, length) for index in range(count)]
        for length, count in ((length, -(-length // edge)) for length in size)
    )
    return [[Window(row, column) for column in columns] for row in rows]


def run_on_tile(
    function: Callable[[torch.Tensor], torch.Tensor],
    values: torch.Tensor,
    tile: Window,
    *,
    halo: int,
    input_factor: int = 1,
    output_factor: int = 1,
) -> torch.Tensor:
    """
    The part of `function(values)` that belongs to `tile`.

    Args:
        function: maps (B, C, H, W) to an output of which each position depends only on a neighbourhood.
        values: (B, C, H, W), the whole image.
        tile: a window of a grid with one cell for every `input_factor` positions of `values` along each axis.
        halo: number of cells to each side on which an output depends.
        input_factor, output_factor: positions of input and output per cell and axis.
    """
    seen = tile.grow(halo)
    whole = Window.whole((tile.rows.size, tile.columns.size))
    result = function(whole.finer(input_factor).crop(values, seen.finer(input_factor)))
    return seen.finer(output_factor).crop(result, tile.finer(output_factor))


def tile_edge(tile_size: int, spatial_factor: int) -> int:
    """
    The edge of a tile in latents.

    Raises:
        TypeError: `tile_size`, in pixels, is not a whole number.
        ValueError: it is less than `spatial_factor`.
    """
    return read_whole_number("tile_size", tile_size, minimum=spatial_factor) // spatial_factor


@torch.no_grad()
def upsample_tiled(
    model: "UPLiFTModel",
    raw_latents: torch.Tensor,
    *,
    image: torch.Tensor,
    num_steps: int = 1,
    generator: "Generator" = None,
    denoise: float = 0.0,
    tile_size: int,
    callback_on_step: Callable[[], None] | None = None,
) -> torch.Tensor:
    """
    `model(raw_latents, image=image, num_steps=num_steps, generator=generator).sample`, tile by tile.

    Args:
        model, raw_latents, image, num_steps, generator, denoise, tile_size: as for `iterate_tiles`.
        callback_on_step: called after every step of every tile. An exception raised in it ends the work.
    Returns:
        (B, C, h * 2**num_steps, w * 2**num_steps), dtype and device of `raw_latents`, without gradient.
    Raises:
        TypeError, ValueError: as `iterate_tiles`.
    """
    output = None
    for tile, sample in iterate_tiles(
        model,
        raw_latents,
        image=image,
        num_steps=num_steps,
        generator=generator,
        denoise=denoise,
        tile_size=tile_size,
        callback_on_step=callback_on_step,
    ):
        if output is None:
            output = sample.new_empty(*sample.shape[:2], tile.rows.size, tile.columns.size)
        output[..., tile.slices[0], tile.slices[1]] = sample
    assert output is not None  # there is at least one tile
    return output


def iterate_tiles(
    model: "UPLiFTModel",
    raw_latents: torch.Tensor,
    *,
    image: torch.Tensor,
    num_steps: int = 1,
    generator: "Generator" = None,
    denoise: float = 0.0,
    tile_size: int,
    callback_on_step: Callable[[], None] | None = None,
) -> Iterator[tuple[Window, torch.Tensor]]:
    """
    The tiles of `model(raw_latents, image=image, num_steps=num_steps, generator=generator).sample`, row by row.

    Apart from latents, image and noise, which have few channels, memory depends only on `tile_size`. Noise is drawn
    for the whole image, as the model draws it.

    Args:
        model: in evaluation mode if it has batch norms. If it is compiled, tiles run compiled code too.
        raw_latents: (B, C, h, w) float, unscaled.
        image: (B, 3, h * spatial_factor, w * spatial_factor) float in [0, 1]; may lie on another device.
        num_steps: number of 2x steps, >= 1.
        generator: one generator, or one for each item of the batch.
        denoise: from 0 to 1, as for `UPLiFTModel.forward`.
        tile_size: largest edge of a tile in pixels of `image`, at least the model's `spatial_factor`. It does not
            change the output. Below a few hundred pixels, most of the work is in the halos.
        callback_on_step: called after every step of every tile. An exception raised in it ends the work.
    Returns:
        An iterator over (window, sample): the tile's window in the output, and (B, C, *window.shape) without gradient.
    Raises:
        TypeError: `tile_size` or `num_steps` is not a whole number.
        ValueError: as `UPLiFTModel.forward`; `tile_size` is too small; the model's receptive field is not bounded.
    """
    encode, step = model.encode, model.step
    if is_compiled_module(model):
        # torch.compile(model) compiles only `forward`: what a tile runs is compiled with the same backend and options.
        encode, step = (_with_dynamic_sizes(model.dynamo_ctx(function)) for function in (model.encode, model.step))
    num_steps = model.check_inputs(raw_latents, image, num_steps, generator)
    _check_local(model)
    edge = tile_edge(tile_size, model.config.spatial_factor)
    encode = partial(encode, denoise=denoise)
    tiles = [tile for row in split_into_tiles(size_of(raw_latents), edge) for tile in row]

    def watched_step(*arguments) -> torch.Tensor:
        result = step(*arguments)
        if callback_on_step is not None:
            callback_on_step()
        return result

    def compute() -> Iterator[tuple[Window, torch.Tensor]]:
        _load_offloaded(model)
        noise = list(model.draw_noise(raw_latents, num_steps, generator))
        for tile in tiles:
            with torch.no_grad():  # not around the yield, where it would reach into the caller
                sample = _upsample_tile(model, encode, watched_step, raw_latents, image, noise, tile)
            yield tile.finer(2**num_steps), sample

    return compute()


@apply_forward_hook
def _load_offloaded(model: "UPLiFTModel") -> None:
    """Move a model that is offloaded as a whole to its device, which its `forward` would do: tiles go past that."""


def step_halos(model: "UPLiFTModel", num_steps: int) -> list[int]:
    """Positions needed to each side of a tile before every step, and 0 after the last one."""
    halos = [0]
    for _ in range(num_steps):
        halos.append(model.step_reach(halos[-1]))
    return halos[::-1]


def _upsample_tile(
    model: "UPLiFTModel",
    encode: Callable,
    step: Callable,
    raw_latents: torch.Tensor,
    image: torch.Tensor,
    noise: list["StepNoise"],
    tile: Window,
) -> torch.Tensor:
    """`model.forward` on the window `tile` of the model's input."""
    factor, whole = model.config.spatial_factor, Window.whole((tile.rows.size, tile.columns.size))
    halos = step_halos(model, len(noise))
    window = tile.grow(halos[0])  # of the latents, on the grid before the step
    latents = whole.crop(raw_latents, window).contiguous(memory_format=torch.channels_last)
    maps = seen = None
    for index, step_noise in enumerate(noise):
        level, finer = 2**index, 2 ** (index + 1)
        if maps is None or seen is None or model.config.reencode_image:
            seen = window.cover(level).grow(model.guide_reach(index))  # of the image, in latents of the input
            part = whole.finer(factor).crop(image, seen.finer(factor))
            maps = encode(part.to(raw_latents), step=index, num_steps=len(noise))
        guide = model.guide(maps, seen.finer(level).shape)
        guide = guide._replace(
            coarse=seen.finer(level).crop(guide.coarse, window),
            fine=seen.finer(finer).crop(guide.fine, window.finer(2)),
            refiner=seen.finer(finer).crop(guide.refiner, window.finer(2)),
            estimate=_crop_optional(seen.finer(finer), guide.estimate, window.finer(2)),
        )
        step_noise = step_noise._replace(
            coarse=whole.finer(level).crop(step_noise.coarse, window),
            fine=whole.finer(finer).crop(step_noise.fine, window.finer(2)),
            refiner=_crop_optional(whole.finer(finer), step_noise.refiner, window.finer(2)),
        )
        latents = step(latents, guide, step_noise, _place(window, latents.device))
        needed = tile.finer(finer).grow(halos[index + 1])
        latents = window.finer(2).crop(latents, needed)
        window = needed
    return latents


def _with_dynamic_sizes(function: Callable) -> Callable:
    """`function`, compiled with dynamic height and width from the first call on, for 4-D tensors of one layout."""

    def prepare(value):
        if not isinstance(value, torch.Tensor) or value.ndim != 4:
            return value
        value = value.contiguous(memory_format=torch.channels_last)
        torch._dynamo.maybe_mark_dynamic(value, (2, 3))
        return value

    def call(*arguments, **options):
        return function(*tree_map(prepare, arguments), **options)

    return call


def _place(window: Window, device: torch.device) -> torch.Tensor | None:
    """See `interpolate_2x`; None for the whole image."""
    rows, columns = window
    if window.shape == (rows.size, columns.size):
        return None
    return torch.tensor([rows.start, columns.start, rows.size, columns.size], device=device)


def _crop_optional(outer: Window, features: torch.Tensor | None, inner: Window) -> torch.Tensor | None:
    return None if features is None else outer.crop(features, inner)


def _check_local(model: "UPLiFTModel") -> None:
    config = model.config
    if model.training and config.norm_type == "batch_norm":
        raise ValueError(
            "`model` must be in evaluation mode: in training mode its batch norms depend on the whole image. "
            "Call `model.eval()`."
        )
    ratio = Fraction(config.spatial_factor, config.encoder_spatial_factor or config.spatial_factor)
    if ratio.denominator & (ratio.denominator - 1):
        # Resizing takes its weights from coordinates in float32, which shift from tile to tile unless they are exact.
        raise ValueError(
            "`model` must resize its image by a ratio with an inverse that is exact in binary, such as 16/14, got "
            f"{config.encoder_spatial_factor}/{config.spatial_factor}. Run it without tiles."
        )
