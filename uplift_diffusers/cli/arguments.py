"""Parsing of command-line values, with error messages."""

import argparse
import re

from uplift_diffusers.scale import MAX_SCALE, num_steps_for_scale


def parse_scale(text: str) -> float:
    """A number from 1 to 16."""
    try:
        scale = float(text)
        num_steps_for_scale(scale)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {MAX_SCALE}, got {text!r}") from None
    return scale


def parse_share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        share = float(text)
    except ValueError:
        share = float("nan")
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return share


def parse_denoise(text: str) -> float | str:
    """`auto` or a number from 0 to 1."""
    return text if text == "auto" else parse_share(text)


def parse_megapixels(text: str) -> float:
    """A number above 0."""
    try:
        megapixels = float(text)
    except ValueError:
        megapixels = float("nan")
    if not 0 < megapixels < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return megapixels


def parse_size(text: str) -> dict[str, int]:
    """`3840x2160`, `3840x` or `x2160`: width, height or both, for `resolve_scale`."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})?x([1-9][0-9]{0,8})?", text, re.ASCII)
    if match is None or text == "x":
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, WIDTHx or xHEIGHT in pixels, got {text!r}")
    return {name: int(number) for name, number in zip(("width", "height"), match.groups()) if number}
