"""
Make the README's image (crops at 4x, bicubic next to the embedded model) and the model's learning curves.

    python -m scripts.make_pictures
"""

import json
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from uplift_diffusers import UPLiFTSuperResolutionPipeline, embedded_bundle

ROOT = Path(__file__).resolve().parent.parent
CROPS = [  # a face, text, architecture, foliage
    ("astronaut.jpg", (170, 50)),
    ("astronaut.jpg", (118, 333)),
    ("pagoda.jpg", (150, 150)),
    ("pagoda.jpg", (530, 150)),
]
EDGE, SCALE, GAP = 104, 4, 8

STAGES = [
    "autoencoder",
    "autoencoder_grown",
    "autoencoder_decoder",
    "autoencoder_pixels",
    "autoencoder_smaller",
    "upsampler_pixels",
    "upsampler",
    "upsampler_longer",
    "upsampler_two_depths",
    "upsampler_psnr",
]


def main() -> None:
    """Write docs/images/comparison.png and docs/images/curves.png."""
    compare()
    plot_curves()


def compare() -> None:
    pipeline = UPLiFTSuperResolutionPipeline.from_pretrained(embedded_bundle())
    images = {name: Image.open(ROOT / "examples" / name) for name, _ in CROPS}
    larger = {name: pipeline(image=image, scale=SCALE).images[0] for name, image in images.items()}
    edge = EDGE * SCALE
    sheet = Image.new("RGB", (2 * edge + GAP, len(CROPS) * (edge + GAP) - GAP), "white")
    for row, (name, corner) in enumerate(CROPS):
        left, top = (SCALE * position for position in corner)
        box = (left, top, left + edge, top + edge)
        bicubic = images[name].convert("RGB").resize(larger[name].size, Image.BICUBIC)
        sheet.paste(bicubic.crop(box), (0, row * (edge + GAP)))
        sheet.paste(larger[name].crop(box), (edge + GAP, row * (edge + GAP)))
    sheet.save(ROOT / "docs" / "images" / "comparison.png", optimize=True)


def plot_curves() -> None:
    """Loss in training, and PSNR on the validation crops of 256 px, by step and stage."""
    figure = Figure(figsize=(25, 5), layout="constrained")
    for column, (axes, stage) in enumerate(zip(figure.subplots(2, len(STAGES), sharex="col").T, STAGES, strict=True)):
        lines = (ROOT / "model_cards" / "embedded" / f"{stage}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        losses = [record for record in records if "loss" in record]
        axes[0].plot([record["step"] for record in losses], [record["loss"] for record in losses])
        for name in ("val_psnr", "val_psnr_2x", "val_psnr_4x"):
            values = [(record["step"], record[name]) for record in records if name in record]
            if values:
                axes[1].plot(*zip(*values), marker="o", label=name)
        axes[0].set_title(stage)
        if axes[1].lines:
            axes[1].set_xlabel("step")
            axes[1].legend()
        else:
            axes[1].set_axis_off()  # a run without validation
        if column == 0:
            axes[0].set_ylabel("loss")
            axes[1].set_ylabel("dB")
    figure.savefig(ROOT / "docs" / "images" / "curves.png", dpi=80)


if __name__ == "__main__":
    main()
