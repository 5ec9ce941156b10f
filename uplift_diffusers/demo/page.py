"""The Gradio page: theme, tabs, and error messages."""

import inspect
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import BlockFunction

from uplift_diffusers.demo.jobs import BusyError, JobQueue, StoppedError
from uplift_diffusers.demo.tabs import Limits, compare_tab, create_tab, enlarge_tab
from uplift_diffusers.demo.weights import Models, Source
from uplift_diffusers.wording import printable, reason

log = logging.getLogger("uplift_diffusers.demo")

EXPECTED = (ValueError, TypeError, OSError, RuntimeError, MemoryError, BusyError)
"""Errors that a visitor can fix or has to know; all others are bugs."""

MAX_REQUESTS = 200
"""Maximum number of concurrent requests; further ones get an error. `JobQueue` limits the waiting jobs."""

FILES_KEPT_S = 3600
"""Seconds after which uploads and results are deleted."""

THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="stone",
    font=["system-ui", "sans-serif"],  # nothing is fetched
    font_mono=["ui-monospace", "monospace"],
).set(  # the hues of the base theme, darker in the light and lighter in the dark, so that everything can be read
    color_accent="*primary_700",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_600",
    slider_color="*primary_700",
    slider_color_dark="*primary_500",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_400",
    block_label_text_color="*neutral_600",
    block_label_text_color_dark="*neutral_300",
    block_title_text_color="*neutral_700",
    block_title_text_color_dark="*neutral_200",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)
CSS = """
.gradio-container { width: 100%; max-width: 1200px !important; margin: 0 auto !important; }
.main, .wrap > .contain { width: 100%; }
.figures { overflow-x: auto; }
.figures table { font-size: var(--text-sm); border-collapse: collapse; font-variant-numeric: tabular-nums; }
.figures :is(table, tr, th, td) { border: 0 !important; }
.figures :is(th, td) { padding: 0.3rem 0.75rem 0.3rem 0; text-align: left; }
.figures :is(th, td):not(:first-child) { white-space: nowrap; }
.html-container { padding: 0 !important; }
footer .divider { display: none !important; }
.dark .tab-container button.selected { color: var(--primary-400); }
"""
PASTE = """
() => document.addEventListener("paste", (event) => {
  const files = event.clipboardData?.files;
  const inputs = [...document.querySelectorAll("input[type=file]")];
  const input = inputs.find((input) => input.closest(".tabitem")?.offsetParent);
  if (!files?.length || !input) return;
  event.preventDefault();
  const chosen = new DataTransfer();
  for (const file of input.multiple ? files : [files[0]]) chosen.items.add(file);
  input.files = chosen.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
})
"""


class Page(gr.Blocks):
    """Blocks that report every error to visitors and programs as a sentence, and to the log with its traceback."""

    async def process_api(self, *args, **kwargs) -> dict[str, Any]:
        try:
            return await super().process_api(*args, **kwargs)
        except gr.Error:
            raise
        except StoppedError:
            raise _refusal("Stopped.") from None
        except EXPECTED as error:
            log.exception("A request failed")
            raise _refusal(reason(error)) from error
        except Exception as error:
            log.exception("A request failed, which is a bug")
            raise _refusal("Internal error. See the server's log for details.") from error

    async def preprocess_data(self, block_fn: BlockFunction, inputs: list, *args, **kwargs) -> list:
        if not isinstance(inputs, list) or len(inputs) != len(block_fn.inputs):
            count = len(inputs) if isinstance(inputs, list) else 0
            raise _refusal(f"{len(block_fn.inputs)} values are needed, got {count}.")
        names = list(inspect.signature(block_fn.fn).parameters) if block_fn.fn else []
        for name, component, value in zip(names, block_fn.inputs, inputs):
            if (rule := _broken_rule(component, value)) is not None:
                raise _refusal(f"`{name}` must be {rule}, got {value!r:.60}.")
        try:
            return await super().preprocess_data(block_fn, inputs, *args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:  # of Gradio's own checks, as of files that nobody uploaded
            log.exception("A request was refused")
            raise _refusal("Files must be uploaded to this server, and other values must match its API.") from error


def build(*, jobs: JobQueue, models: Models, source: Source, limits: Limits, examples: Sequence[Path]) -> gr.Blocks:
    """Build the page. Its work runs in `jobs`, with `models`."""
    with Page(title="uplift-diffusers", analytics_enabled=False, delete_cache=(60, FILES_KEPT_S)) as page:
        gr.Markdown("# uplift-diffusers\nUpscale images in latent space.")
        with gr.Tabs():
            with gr.Tab("Enlarge"):
                enlarge_tab(jobs, models, limits, examples)
            with gr.Tab("Create") as tab:
                create_tab(tab, jobs, models, source, limits)
            with gr.Tab("Compare"):
                compare_tab(jobs, models, limits, examples)

        def leave(request: gr.Request):
            jobs.leave(request.session_hash)

        page.unload(leave)
        page.load(None, js=PASTE)
    return page.queue(max_size=MAX_REQUESTS)


def _refusal(sentence: str) -> gr.Error:
    # The page shows it as HTML and programs as text, so it has nothing that would differ between them.
    sentence = printable(sentence).replace("<", "‹").replace(">", "›")
    if sentence.split(" ")[0].isalpha():  # a word, and no name of a file or repository
        sentence = sentence[:1].upper() + sentence[1:]
    return gr.Error(sentence, print_exception=False)


def _broken_rule(component: object, value: Any) -> str | None:
    """The rule for values of `component`, if `value` violates it."""
    if isinstance(component, gr.Slider | gr.Number):
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if isinstance(component, gr.Number):
            return None if is_number else "a number"
        fits = is_number and component.minimum <= value <= component.maximum
        return None if fits else f"a number from {component.minimum:g} to {component.maximum:g}"
    if isinstance(component, gr.Checkbox):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(component, gr.Radio | gr.Dropdown):
        choices = [choice for _, choice in component.choices]
        fits = any(type(value) is type(choice) and value == choice for choice in choices)
        return None if fits else f"one of {', '.join(map(str, choices))}"
    if isinstance(component, gr.Textbox):
        return None if isinstance(value, str) else "text"
    if isinstance(component, gr.File):
        files = value if component.file_count == "multiple" and isinstance(value, list) else [value]
        is_file = all(isinstance(file, dict) and isinstance(file.get("path"), str) for file in files)
        return None if value is None or is_file else "an uploaded file"
    return None
