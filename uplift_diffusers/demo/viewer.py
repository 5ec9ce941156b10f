"""Pictures of the same shape, seen together: one zoom for all, and a divider between two."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import gradio as gr
from gradio.data_classes import FileData

from uplift_diffusers.demo.work import Pane

_API = {"type": "object", "description": "panes: list of {image: file, label, width, height}, the original first"}


def viewer(*, label: str, placeholder: str) -> gr.HTML:
    """
    A component that shows one picture, several next to each other, or two with a divider to draw across.

    `gr.ImageSlider` has neither keys nor texts for screen readers, and nothing there zooms pictures together. It is no
    subclass because Gradio writes a file beside the module of every one.

    Args:
        label: what is seen, for the API.
        placeholder: what stands there without a picture.
    """
    html, css, js = (
        (files("uplift_diffusers.demo") / f"viewer.{kind}").read_text("utf-8") for kind in ("html", "css", "js")
    )
    component = gr.HTML(
        label=label,
        html_template=html,
        css_template=css,
        js_on_load=js,
        apply_default_css=False,
        placeholder=placeholder,
    )
    component.api_info = lambda: _API
    return component


def view(panes: Sequence[Pane], *, wipe: bool = False) -> dict[str, Any]:
    """
    The value of a viewer that shows `panes`.

    Args:
        panes: pictures of the same shape.
        wipe: two of them lie on each other, with a divider.
    """
    width, height = max(pane.size for pane in panes)
    shown = [
        {
            "image": FileData(path=str(pane.path), orig_name=pane.path.name).model_dump(),
            "label": pane.label,
            "width": pane.size[0],
            "height": pane.size[1],
        }
        for pane in panes
    ]
    return {"panes": shown, "ratio": f"{width / height:.5f}", "wipe": wipe}
