"""What a run says about itself: metrics.jsonl always, a tracker through accelerate where one is asked for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from PIL import Image

from uplift_diffusers.images.files import save_image

METRICS = "metrics.jsonl"


class Validation(NamedTuple):
    """
    Args:
        figures: what was measured, by name.
        pictures: to look at, by name.
    """

    figures: dict[str, float]
    pictures: dict[str, Image.Image]


class RunLog:
    """
    The lines and pictures of a run below its folder; silent on all processes but the main one.

    Args:
        output_dir: the run's folder.
        accelerator: knows the trackers.
        step: what was written after it, by a process that was killed, is dropped.
        settings: shown by trackers.
    """

    def __init__(self, output_dir: Path, *, accelerator: Accelerator, step: int, settings: Mapping[str, Any]):
        self.output_dir = output_dir
        self.accelerator = accelerator
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            _truncate(output_dir / METRICS, step)
        if accelerator.log_with:
            shown = {
                name: value if isinstance(value, (bool, int, float)) else str(value)
                for name, value in settings.items()
            }
            accelerator.init_trackers("uplift", config=shown, init_kwargs={"tensorboard": {"purge_step": step + 1}})

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Append one line of figures."""
        self.accelerator.log(dict(figures), step=step)
        if self.accelerator.is_main_process:
            line = json.dumps({"step": step, **{name: round(value, 8) for name, value in figures.items()}})
            with (self.output_dir / METRICS).open("a") as file:
                file.write(line + "\n")

    def write_validation(self, step: int, validation: Validation) -> None:
        """Append a line of figures and save the pictures as validation/<name>-<step>.png."""
        self.write(step, validation.figures)
        for name, picture in validation.pictures.items():
            folder = self.output_dir / "validation"
            folder.mkdir(exist_ok=True)
            save_image(picture, folder / f"{name}-{step:06d}.png", overwrite=True)
            for tracker in self.accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: np.asarray(picture)[None]}, step=step, **layout)

    def close(self) -> None:
        """Let trackers write what they hold back."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def read_metrics(output_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl that are whole."""
    path = output_dir / METRICS
    # A process that was killed may have left half a line at the end.
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [json.loads(line) for line in lines]


def _truncate(path: Path, step: int) -> None:
    """Drop the lines that a resumed run is about to write again."""
    if path.exists():
        kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.replace(path)
