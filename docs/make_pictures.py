"""
Make the README's picture: crops enlarged four times, bicubic beside the embedded model.

    python docs/make_pictures.py
"""

from pathlib import Path

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


def main() -> None:
    """Write docs/images/comparison.png."""
    pipeline = UPLiFTSuperResolutionPipeline.from_pretrained(embedded_bundle())
    large = EDGE * SCALE
    sheet = Image.new("RGB", (2 * large + GAP, len(CROPS) * (large + GAP) - GAP), "white")
    for row, (name, (left, top)) in enumerate(CROPS):
        image = Image.open(ROOT / "examples" / name).convert("RGB")
        box = (left, top, left + EDGE, top + EDGE)
        larger_box = tuple(SCALE * edge for edge in box)
        bicubic = image.resize((SCALE * image.width, SCALE * image.height), Image.BICUBIC).crop(larger_box)
        uplift = pipeline(image=image, scale=SCALE).images[0].crop(larger_box)
        sheet.paste(bicubic, (0, row * (large + GAP)))
        sheet.paste(uplift, (large + GAP, row * (large + GAP)))
    sheet.save(ROOT / "docs" / "images" / "comparison.png", optimize=True)


if __name__ == "__main__":
    main()
