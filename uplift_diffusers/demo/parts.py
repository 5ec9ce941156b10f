"""What the tabs have in common: inputs, buttons, errors and figures."""

import asyncio
import functools
import html
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from uplift_diffusers.cli import CommandError, reason
from uplift_diffusers.demo import pictures
from uplift_diffusers.demo.models import Models
from uplift_diffusers.demo.viewer import view
from uplift_diffusers.demo.workshop import Report, StoppedError

log = logging.getLogger("uplift_diffusers.demo")

WORKING = {"concurrency_limit": 1, "concurrency_id": "device"}  # one queue for all that needs the device
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Limits:
    """
    What visitors may ask for.

    Args:
        max_pixels: of the largest picture that is made.
        other_models: whether they may name another Stable Diffusion than that of the command line.
    """

    max_pixels: int
    other_models: bool


def told(endpoint: Callable) -> Callable:
    """An endpoint whose errors reach the visitor as a sentence and the log with their trace."""

    @functools.wraps(endpoint)
    async def wrapper(*args, **kwargs):
        try:
            return await endpoint(*args, **kwargs)
        except gr.Error:
            raise
        except StoppedError:
            raise gr.Error("Stopped.", print_exception=False) from None
        except (CommandError, ValueError, OSError, RuntimeError, MemoryError, TypeError) as error:
            log.exception("%s failed", endpoint.__name__)
            sentence = reason(error)
            sentence = html.escape(sentence[0].upper() + sentence[1:])
            raise gr.Error(sentence, print_exception=False) from error

    return wrapper


def reporter(progress: gr.Progress) -> Report:
    """What a job reports goes to Gradio's progress bar."""
    return lambda fraction, sentence: progress(fraction, desc=sentence)


def file_input(label: str, *, file_count: str) -> gr.File:
    return gr.File(label=label, file_count=file_count, file_types=["image"], type="filepath", height=150)


def model_input(models: Models) -> gr.Dropdown:
    names = list(models.super_resolution)
    return gr.Dropdown(names, value=names[-1], label="Model", interactive=True)


def buttons(name: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return gr.Button(name, variant="primary", min_width=120), gr.Button("Cancel", min_width=120)


def examples_input(examples: Sequence[Path]) -> gr.Dataset | None:
    if not examples:
        return None
    samples = [[str(path)] for path in examples]
    return gr.Dataset(label="Examples", components=[gr.Image(visible=False)], samples=samples, type="index")


def stoppable(stop: gr.Button, figures: gr.HTML, *running) -> None:
    """Let `stop` cancel the listeners `running`, waiting or at work."""
    stop.click(lambda: paragraph("Cancelled."), None, figures, cancels=list(running), **QUIET)


def previewed(files: gr.File, seen: gr.HTML) -> None:
    """Show the picture as soon as it is chosen."""

    @told
    async def preview(files):
        chosen = [files] if isinstance(files, str) else files
        if not chosen:
            return None
        folder = Path(tempfile.mkdtemp(dir=seen.GRADIO_CACHE))
        return view([await asyncio.to_thread(pictures.preview, Path(chosen[0]), folder)])

    files.change(preview, files, seen, show_progress="minimal", api_visibility="private")


def table(facts: dict[str, str]) -> str:
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{html.escape(fact)}</td></tr>' for name, fact in facts.items())
    return f'<div role="status"><table><tbody>{rows}</tbody></table></div>'


def paragraph(sentence: str) -> str:
    return f'<p role="status">{html.escape(sentence)}</p>'


def size_in_words(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def seconds_in_words(seconds: float) -> str:
    return f"{seconds:.1f} s"
