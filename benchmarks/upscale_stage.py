"""
Time and peak memory of the upscale stage, compared with the denoising before it.

    python benchmarks/upscale_stage.py                      # 512 -> 1024 and 512 -> 2048, reference-sized networks
    python benchmarks/upscale_stage.py --scales 2 --vae_tiling
    python benchmarks/upscale_stage.py --device cuda --dtype float16
    python benchmarks/upscale_stage.py --tiny               # the same command in seconds, to try it

The networks have random weights, from a seed: UPLiFT as published for the SD1.5 VAE (53.5 M parameters), an
AutoencoderKL and a U-Net of Stable Diffusion 1.5's shapes. Every case runs in a separate process, so peaks are
independent. The whole call is `--denoising_steps` times one measured step of the U-Net with guidance (a batch of two)
plus the stage, without text encoding. Prints a Markdown table.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from benchmarks.measure import in_fresh_process, peak_resident_bytes
from uplift_diffusers import LatentSpace, UPLiFTModel, __version__
from uplift_diffusers.latent_space import LatentCodec
from uplift_diffusers.pipelines.upscale_stage import decode_to_scale, upscale_raw_latents
from uplift_diffusers.runtime import device_name
from uplift_diffusers.scale import num_steps_for_scale

TINY = {
    "vae": {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1},
    "upsampler": {
        "encoder_block_out_channels": (8, 8),
        "decoder_channels": 16,
        "refiner_channels": 16,
        "refiner_layers": 1,
    },
    "unet": {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 4},
}


def make_vae(settings: dict) -> AutoencoderKL:
    shape = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512, **settings}
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **shape
    )


def peak_bytes(device: str) -> int:
    """Peak memory so far: of the process on a CPU, of tensors on an accelerator."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident_bytes()


def clock(function, *, device: str, repeats: int) -> tuple[float, object]:
    """Median seconds of `repeats` runs, and the last result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


@torch.no_grad()
def measure_stage(scale: float, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of the three parts of the stage, and peak memory before decoding and in total."""
    setup(arguments)
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    networks = TINY if arguments.tiny else {"vae": {}, "upsampler": {}}
    vae = make_vae(networks["vae"]).to(device, dtype).eval()
    upsampler = UPLiFTModel(**networks["upsampler"]).to(device, dtype).eval()
    if arguments.vae_tiling:
        vae.enable_tiling()
    space, num_steps = LatentSpace.of(vae), num_steps_for_scale(scale)
    edge = arguments.size // space.spatial_factor
    raw_latents = torch.randn(1, space.channels, edge, edge, generator=torch.Generator().manual_seed(0)).to(device)
    options = {"device": device, "repeats": arguments.repeats}
    guide_s, guide = clock(lambda: LatentCodec(vae, space).decode(raw_latents), **options)
    upsample_s, large = clock(
        lambda: upscale_raw_latents(
            raw_latents,
            guide=guide,
            upsampler=upsampler,
            num_steps=num_steps,
            generator=torch.Generator().manual_seed(0),
        ),
        **options,
    )
    upsampled = peak_bytes(device)
    size = (arguments.size, arguments.size)
    decode_s, _ = clock(
        lambda: decode_to_scale(large, space=space, vae=vae, size=size, num_steps=num_steps, scale=scale), **options
    )
    return {
        "guide_s": guide_s,
        "upsample_s": upsample_s,
        "decode_s": decode_s,
        "upsampled_bytes": upsampled,
        "peak_bytes": peak_bytes(device),
        "parameters": sum(parameter.numel() for parameter in upsampler.parameters()),
    }


@torch.no_grad()
def measure_denoising_step(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of one step of the U-Net with guidance at the small size."""
    setup(arguments)
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    unet = UNet2DConditionModel(cross_attention_dim=768, **(TINY["unet"] if arguments.tiny else {}))
    unet = unet.to(device, dtype).eval()
    sample = torch.randn(2, 4, arguments.size // 8, arguments.size // 8, device=device, dtype=dtype)
    embeds = torch.randn(2, 77, 768, device=device, dtype=dtype)
    step_s, _ = clock(
        lambda: unet(sample, 500, encoder_hidden_states=embeds).sample, device=device, repeats=arguments.repeats
    )
    return {"step_s": step_s, "peak_bytes": peak_bytes(device)}


def setup(arguments: argparse.Namespace) -> None:
    diffusers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="edge of the small image, in pixels")
    parser.add_argument("--scales", type=float, nargs="+", default=[2, 4])
    parser.add_argument("--denoising_steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each part; the median is printed")
    parser.add_argument("--threads", type=int, default=0, help="PyTorch threads; 0 for the default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--vae_tiling", action="store_true", help="vae.enable_tiling()")
    parser.add_argument("--tiny", action="store_true", help="networks of a few thousand parameters")
    arguments = parser.parse_args()

    step = in_fresh_process(measure_denoising_step, arguments)
    cases = {scale: in_fresh_process(measure_stage, scale, arguments) for scale in arguments.scales}

    device = device_name(arguments.device)
    threads = arguments.threads or torch.get_num_threads()
    million = next(iter(cases.values()))["parameters"] / 1e6
    print(
        f"uplift-diffusers {__version__}, diffusers {diffusers.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}; {device}, {os.cpu_count()} cores, {threads} threads; {arguments.dtype}, "
        f"UPLiFT of {million:.1f} M parameters, VAE tiling {'on' if arguments.vae_tiling else 'off'}, "
        f"median of {arguments.repeats}.\n"
    )
    print(
        f"One denoising step with guidance at {arguments.size}: {step['step_s']:.2f} s. "
        f"A whole call is {arguments.denoising_steps} of them and the stage.\n"
    )
    print(
        "| size | guide | upsampling | decoding | stage | in denoising steps | share of a whole call | "
        "peak memory until upsampled | peak memory |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for scale, case in cases.items():
        stage_s = case["guide_s"] + case["upsample_s"] + case["decode_s"]
        share = stage_s / (stage_s + arguments.denoising_steps * step["step_s"])
        print(
            f"| {arguments.size} → {round(arguments.size * scale)} | {case['guide_s']:.2f} s | "
            f"{case['upsample_s']:.2f} s | {case['decode_s']:.2f} s | {stage_s:.2f} s | "
            f"{stage_s / step['step_s']:.1f} | {share:.1%} | {case['upsampled_bytes'] / 2**30:.2f} GiB | "
            f"{case['peak_bytes'] / 2**30:.2f} GiB |"
        )


if __name__ == "__main__":
    main()
