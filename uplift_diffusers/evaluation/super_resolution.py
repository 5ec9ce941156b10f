"""The super-resolution protocol: photographs reduced by 2 or 4, enlarged by every method, compared with themselves."""

import platform
import time
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

import uplift_diffusers
from uplift_diffusers.data.image_folder import find_images
from uplift_diffusers.evaluation.methods import Method

try:
    import torchmetrics
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
except ImportError as error:
    raise ImportError('Evaluation needs torchmetrics: pip install "uplift-diffusers[eval]".') from error


@dataclass(frozen=True)
class Score:
    """Means over the photographs of one method at one scale: PSNR in dB, SSIM (data range 1), seconds an image."""

    psnr: float
    ssim: float
    seconds: float


def read_centre_crop(path: Path, edge: int) -> torch.Tensor:
    """(1, 3, edge, edge) in [0, 1]: the centre of a photograph, at its own resolution."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    if min(image.size) < edge:
        raise ValueError(f"`crop` must fit into every photograph, got {edge} for `{path}` of {image.size}.")
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    return _to_tensor(image.crop((left, top, left + edge, top + edge)))


def reduce_by(image: torch.Tensor, factor: int) -> torch.Tensor:
    """The image reduced by antialiased bicubic interpolation to 8-bit values, as a photograph would be (Pillow)."""
    pil = Image.fromarray((image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    return _to_tensor(pil.resize((pil.width // factor, pil.height // factor), Image.BICUBIC))


def evaluate(folder: str | Path, methods: dict[str, Method], *, scales: tuple[int, ...], crop: int) -> dict:
    """
    Measure every method on every photograph below `folder`.

    Outputs are rounded to 8 bits before they are compared. PSNR and SSIM are computed for each photograph and then
    averaged.

    Args:
        folder: photographs, searched recursively.
        methods: by name.
        scales: whole factors.
        crop: edge of the centre crops in pixels, a multiple of every scale.
    Returns:
        `{"photographs": n, "scores": {scale: {method: Score}}, ...}` with versions and hardware.
    Raises:
        FileNotFoundError: no photographs.
        ValueError: a photograph smaller than the crop, or a crop that a scale does not divide.
    """
    if any(crop % scale for scale in scales):
        raise ValueError(f"`crop` must be a multiple of every scale in {scales}, got {crop}.")
    paths = find_images(folder)
    figures: dict[int, dict[str, list[tuple[float, float, float]]]] = {
        scale: {name: [] for name in methods} for scale in scales
    }
    for path in tqdm(paths, unit="photograph"):
        high = read_centre_crop(path, crop)
        for scale in scales:
            low = reduce_by(high, scale)
            for name, method in methods.items():
                start = time.perf_counter()
                with torch.no_grad():
                    output = method(low, high)
                seconds = time.perf_counter() - start
                output = (output * 255).round() / 255
                psnr = peak_signal_noise_ratio(output, high, data_range=1.0).item()
                ssim = structural_similarity_index_measure(output, high, data_range=1.0).item()
                figures[scale][name].append((psnr, ssim, seconds))
    return {
        "photographs": len(paths),
        "crop": crop,
        "scores": {
            scale: {
                name: Score(*(float(value) for value in (*np.mean(rows, axis=0)[:2], np.median(rows, axis=0)[2])))
                for name, rows in by_method.items()
            }
            for scale, by_method in figures.items()
        },
        "versions": {
            "uplift_diffusers": uplift_diffusers.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "torchmetrics": torchmetrics.__version__,
            "python": platform.python_version(),
        },
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    }


def gap_closed(scores: dict[str, Score]) -> float:
    """The share of the PSNR gap from latent-bilinear to the VAE's round trip that UPLiFT closes."""
    low, high = scores["bilinear"].psnr, scores["vae"].psnr
    return (scores["uplift"].psnr - low) / (high - low)


def format_table(report: dict) -> str:
    """The report as a Markdown table."""
    lines = ["| scale | method | PSNR (dB) | SSIM | s/image |", "| --- | --- | --- | --- | --- |"]
    for scale, scores in report["scores"].items():
        for name, score in scores.items():
            lines.append(f"| {scale}x | {name} | {score.psnr:.2f} | {score.ssim:.4f} | {score.seconds:.2f} |")
    lines.append("")
    for scale, scores in report["scores"].items():
        if {"bilinear", "uplift", "vae"} <= scores.keys():
            share = gap_closed(scores)
            lines.append(f"{scale}x: UPLiFT closes {share:.1%} of the PSNR gap from bilinear to vae.")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += [
        "",
        f"{report['photographs']} photographs, centre {report['crop']} px; {versions}; {report['hardware']}.",
    ]
    return "\n".join(lines)


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
