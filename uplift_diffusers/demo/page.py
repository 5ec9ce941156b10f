"""The Gradio page: its look, its tabs, its queue."""

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from uplift_diffusers.demo.compare_tab import compare_tab
from uplift_diffusers.demo.create_tab import create_tab
from uplift_diffusers.demo.enlarge_tab import enlarge_tab
from uplift_diffusers.demo.models import Models
from uplift_diffusers.demo.parts import Limits
from uplift_diffusers.demo.text_to_image import Source
from uplift_diffusers.demo.workshop import Workshop

QUEUE_SIZE = 32
"""Requests that may wait; further ones are told so."""

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


def build(
    *, workshop: Workshop, models: Models, source: Source, limits: Limits, examples: Sequence[Path]
) -> gr.Blocks:
    """The page. What it does is done in `workshop`, with `models`."""
    with gr.Blocks(title="uplift-diffusers", analytics_enabled=False, delete_cache=(60, FILES_KEPT_S)) as page:
        gr.Markdown("# uplift-diffusers\nMake pictures larger in latent space.")
        with gr.Tabs():
            with gr.Tab("Enlarge"):
                enlarge_tab(workshop, models, limits, examples)
            with gr.Tab("Create") as tab:
                create_tab(tab, workshop, models, source, limits)
            with gr.Tab("Compare"):
                compare_tab(workshop, models, limits, examples)

        def leave(request: gr.Request):
            workshop.leave(request.session_hash)

        page.unload(leave)
        page.load(None, js=PASTE)
    return page.queue(max_size=QUEUE_SIZE)
