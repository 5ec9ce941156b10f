"""A viewer for images of the same shape: shared zoom and pan, and a divider between two images."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import gradio as gr
from gradio.data_classes import FileData

from uplift_diffusers.demo.work import Pane

_API = {"type": "object", "description": "panes: list of {image: file, label, width, height}, the original first"}


def viewer(*, label: str, placeholder: str) -> gr.HTML:
    """
    A component that shows one image, several next to each other, or two with a draggable divider.

    `gr.ImageSlider` supports neither keyboard control nor screen readers, and Gradio has no component with a shared
    zoom. This is not a subclass, because Gradio writes a file next to the module of every subclass.

    Args:
        label: name of the value in the API.
        placeholder: text without an image.
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
        panes: images of the same shape.
        wipe: show two images on top of each other, with a divider.
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
