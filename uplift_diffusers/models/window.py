"""Windows of a larger grid: what part of the whole picture a tensor is."""

from typing import NamedTuple

import torch

Margins = tuple[int, int, int, int]
"""Positions at the top, bottom, left and right."""

NO_MARGINS: Margins = (0, 0, 0, 0)


class Span(NamedTuple):
    """Positions from `start` up to, but not including, `stop` of an axis of `size` positions."""

    start: int
    stop: int
    size: int

    def grow(self, reach: int) -> "Span":
        """Extended by `reach` on both sides, as far as the axis goes."""
        return Span(max(self.start - reach, 0), min(self.stop + reach, self.size), self.size)

    def finer(self, factor: int) -> "Span":
        """The same stretch of an axis with `factor` positions in place of one."""
        return Span(self.start * factor, self.stop * factor, self.size * factor)

    def cover(self, factor: int) -> "Span":
        """The cells of `factor` positions that the span touches."""
        return Span(self.start // factor, -(-self.stop // factor), self.size // factor)

    def interpolated_from(self) -> "Span":
        """
        The positions that a 2x bilinear interpolation with `align_corners=True` mixes into this span of its output.

        Of n positions, output i is read at i (n - 1) / (2n - 1): output 2k from k - 1 and k, output 2k + 1 from k and
        k + 1. The cell of each output, k, is always among them.
        """
        half = self.size // 2
        return Span(max((self.start + 1) // 2 - 1, 0), min(self.stop // 2 + 1, half), half)


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
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid."""
        return self.rows.size, self.columns.size

    @property
    def is_whole(self) -> bool:
        return self.shape == self.grid

    def grow(self, reach: int) -> "Window":
        """Extended by `reach` on all sides, as far as the grid goes."""
        return Window(self.rows.grow(reach), self.columns.grow(reach))

    def finer(self, factor: int) -> "Window":
        """The same rectangle of a grid with `factor` x `factor` positions in place of one."""
        return Window(self.rows.finer(factor), self.columns.finer(factor))

    def cover(self, factor: int) -> "Window":
        """The cells of `factor` x `factor` positions that the window touches."""
        return Window(self.rows.cover(factor), self.columns.cover(factor))

    def interpolated_from(self) -> "Window":
        """See [`Span.interpolated_from`]."""
        return Window(self.rows.interpolated_from(), self.columns.interpolated_from())

    def margins(self, inner: "Window") -> Margins:
        """How far this window goes beyond `inner`, a window of the same grid inside it."""
        return (
            inner.rows.start - self.rows.start,
            self.rows.stop - inner.rows.stop,
            inner.columns.start - self.columns.start,
            self.columns.stop - inner.columns.stop,
        )

    def crop(self, features: torch.Tensor, inner: "Window") -> torch.Tensor:
        """The part `inner` of `features` (..., H, W), which fill this window: a view."""
        return trim(features, self.margins(inner))


def trim(features: torch.Tensor, margins: Margins) -> torch.Tensor:
    """`features` (..., H, W) without `margins`: a view, `features` itself where there is nothing to cut."""
    if margins == NO_MARGINS:
        return features
    top, bottom, left, right = margins
    return features[..., top : features.shape[-2] - bottom, left : features.shape[-1] - right]
