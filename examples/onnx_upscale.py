"""
Upscale an image with only onnxruntime and Pillow: `python onnx_upscale.py uplift-2x.onnx photo.jpg large.png`.

scripts/export_onnx.py writes the model. The image is upscaled in one piece; the package uses tiles.
"""

import sys

import numpy as np  # onnxruntime depends on it
import onnxruntime
from PIL import Image, ImageOps


def upscale(model: str, source: str, target: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    numbers = session.get_modelmeta().custom_metadata_map
    factor, scale = int(numbers["spatial_factor"]), int(numbers["scale"])
    picture = ImageOps.exif_transpose(Image.open(source)).convert("RGB")
    pixels = np.asarray(picture, dtype=np.float32) / 255  # (H, W, 3)
    # The sides must be multiples of the factor, at least two of them: the last row and column are repeated.
    missing = [max(-length % factor, 2 * factor - length) for length in pixels.shape[:2]]
    pixels = np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
    (sample,) = session.run(None, {"image": pixels.transpose(2, 0, 1)[None]})
    large = sample[0, :, : scale * picture.height, : scale * picture.width].transpose(1, 2, 0)
    Image.fromarray((large * 255).round().astype(np.uint8)).save(target)


if __name__ == "__main__":
    upscale(*sys.argv[1:4])
