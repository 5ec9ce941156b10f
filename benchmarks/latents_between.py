"""
PSNR of decoded latents at a scale between powers of two, compared with other ways to obtain them.

    python -m benchmarks.latents_between
    python -m benchmarks.latents_between --scale 3 --model runs/pipeline examples/coffee.jpg

Each image, cropped to a multiple of the scale, is downsampled (antialiased bicubic), upscaled again and compared with
the original: PSNR in dB.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.measure import environment
from uplift_diffusers import UPLiFTLatentUpscalePipeline, embedded_bundle
from uplift_diffusers.images.convert import read_batch, resize
from uplift_diffusers.latent_space import LatentCodec
from uplift_diffusers.scale import num_steps_for_scale
from uplift_diffusers.training.losses import psnr_from_mse

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = ("astronaut.jpg", "cat.png", "coffee.jpg", "pagoda.jpg")


@torch.no_grad()
def measure(pipe: UPLiFTLatentUpscalePipeline, picture: Image.Image, scale: float) -> dict[str, float]:
    """PSNR in dB by what was done."""
    codec, photo = LatentCodec(pipe.vae), read_batch(picture.convert("RGB"))
    numerator, denominator = float(scale).as_integer_ratio()
    multiple = codec.space.spatial_factor * numerator
    height, width = (length // multiple * multiple for length in photo.shape[2:])
    photo = photo[..., :height, :width]
    small = resize(photo, (height * denominator // numerator, width * denominator // numerator))

    def enlarge(output_type: str, scale: float = scale, consistency: float = 0.0) -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        settings = {"scale": scale, "consistency": consistency, "output_type": output_type, "generator": noise}
        return pipe(image=small, **settings).images

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return codec.decode(codec.space.denormalize(latents))

    doubled = enlarge("latent", scale=2 ** num_steps_for_scale(scale))
    size = (height // codec.space.spatial_factor, width // codec.space.spatial_factor)
    images = {
        "image": enlarge("pt"),
        "image, consistency 1": enlarge("pt", consistency=1.0),
        "latents, decoded": decode(enlarge("latent")),
        "latents, consistency 1, decoded": decode(enlarge("latent", consistency=1.0)),
        "latents of the power of two, interpolated, decoded": decode(
            F.interpolate(doubled, size=size, mode="bicubic", antialias=True)
        ),
        "the photograph through the VAE": codec.decode(codec.encode(photo)),
    }
    return {name: psnr_from_mse(F.mse_loss(image, photo)).item() for name, image in images.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", type=Path, default=[EXAMPLES / name for name in NAMES])
    parser.add_argument("--model", default=str(embedded_bundle()), help="pipeline that is measured")
    parser.add_argument("--scale", type=float, default=1.5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pipe = UPLiFTLatentUpscalePipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    rows: dict[str, list[float]] = {}
    for path in options.pictures:
        for name, value in measure(pipe, Image.open(path), options.scale).items():
            rows.setdefault(name, []).append(value)
    print(f"| at {options.scale:g}x | {' | '.join(path.stem for path in options.pictures)} |")
    print("|" + " --- |" * (1 + len(options.pictures)))
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |")
    print(f"\n{environment('cpu')}")


if __name__ == "__main__":
    main()
