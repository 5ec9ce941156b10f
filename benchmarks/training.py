"""
Images per second of a training step, compared with a plain version of the reference's loop, and its memory.

    python -m benchmarks.training                      # 53.5 M parameters, SD1.5-shaped VAE, crops of 256 px
    python -m benchmarks.training --resolution 512 --device cuda
    python -m benchmarks.training --memory             # GiB at 256, 512 and 1024 px, computed without running it
    python -m benchmarks.training --tiny               # the same command in seconds, to try it

Speed: `plain` encodes the crop at every size with the VAE and gives every depth a forward pass of the plain network
(`benchmarks/reference.py`) with its own full-resolution encoder pass. `uplift` is the step of `train_latent.py`, and
`uplift, cached` the same from the second epoch on with --latent_cache_dir. All train the same weights on the same
crops with Adam, alternating in one process.

Memory: the live tensors of a step, counted while it runs on tensors without data, so any size can be computed
on any machine. The workspace of convolutions is not included. --measured runs the step on the CPU instead, in a fresh
process each, and prints its resident memory next to the count, as a check.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.measure import LiveMemory, environment, in_fresh_process, interleave, peak_resident_bytes
from benchmarks.reference import PlainUPLiFT
from uplift_diffusers import LatentSpace, UPLiFTModel
from uplift_diffusers.data.latent_cache import LatentCache
from uplift_diffusers.data.pyramid import image_pyramid
from uplift_diffusers.models.conversion import convert_state_dict
from uplift_diffusers.training.losses import MultiDepthObjective

DEPTHS = (1, 2, 3, 4)
LATENT_NOISE = 1.0
LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 1.0

FULL = {
    "plain": {"encoder_channels": (64, 128, 256, 512, 512), "channels": 512, "refiner_blocks": 12},
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
}
TINY = {
    "plain": {"encoder_channels": (8, 8, 20), "channels": 20, "refiner_blocks": 2},
    "vae": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
}


def make_vae(shape: dict) -> AutoencoderKL:
    """An AutoencoderKL of Stable Diffusion 1.5's shape with random weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **shape["vae"]
    ).requires_grad_(False)


def make_model(shape: dict) -> UPLiFTModel:
    plain = shape["plain"]
    return UPLiFTModel(
        encoder_block_out_channels=plain["encoder_channels"],
        decoder_channels=plain["channels"],
        refiner_channels=plain["channels"],
        refiner_layers=plain["refiner_blocks"],
    )


def multi_depth_loss(
    forward: Callable, targets: list[torch.Tensor], pyramid: list[torch.Tensor], *, generator: torch.Generator
) -> torch.Tensor:
    """
    The loss of all depths with one forward pass for each, from the latents of every size of the image.

    `forward(latents, image, num_steps, generator)` gives the result of every 2x step.
    """
    loss = 0
    for depth in DEPTHS:
        noise = torch.randn(targets[depth].shape, generator=generator).to(targets[depth])
        steps = forward(targets[depth] + LATENT_NOISE * noise, pyramid[depth], depth, generator)
        loss = loss + sum(F.mse_loss(step.float(), targets[depth - 1 - k]) for k, step in enumerate(steps))
    return loss


class PlainObjective:
    """The reference's training step."""

    def __init__(self, model: PlainUPLiFT, vae: AutoencoderKL):
        self.model, self.vae = model, vae

    def __call__(self, images: torch.Tensor, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
        torch.randint(len(DEPTHS), (), generator=generator)  # `MultiDepthObjective` draws one: same noise from here on
        pyramid = image_pyramid(images, max(DEPTHS))
        with torch.no_grad():
            targets = [self.vae.encode(level * 2 - 1).latent_dist.mode() for level in pyramid]
        return {"loss": multi_depth_loss(self._forward, targets, pyramid, generator=generator)}

    def _forward(self, latents, image, num_steps, generator) -> list[torch.Tensor]:
        return self.model(latents, image=image, num_steps=num_steps, generator=generator)


def make_step(
    objective: Callable, model: torch.nn.Module, images: torch.Tensor, *, clips: bool
) -> Callable[[], torch.Tensor]:
    """A function that takes one optimiser step and gives the loss before it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)

    def step() -> torch.Tensor:
        loss = objective(images, generator=generator)["loss"]
        loss.backward()
        if clips:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def make_steps(arguments: argparse.Namespace, cache_dir: str) -> dict[str, Callable[[], torch.Tensor]]:
    """The steps to be compared: same weights, same images."""
    torch.manual_seed(0)
    shape = TINY if arguments.tiny else FULL
    vae = make_vae(shape).eval().to(arguments.device)
    space = LatentSpace.of(vae)
    plain = PlainUPLiFT(**shape["plain"]).to(arguments.device)
    images = torch.rand(arguments.train_batch_size, 3, arguments.resolution, arguments.resolution)
    images = ((images * 255).round() / 255).to(arguments.device)
    steps = {"plain": make_step(PlainObjective(plain, vae), plain, images, clips=False)}
    for name, cache in (("uplift", None), ("uplift, cached", LatentCache(cache_dir, vae, space))):
        model = make_model(shape).to(arguments.device)
        model.load_state_dict(convert_state_dict(plain.state_dict()))
        if arguments.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        objective = MultiDepthObjective(model, vae, space, depths=DEPTHS, latent_noise=LATENT_NOISE, cache=cache)
        steps[name] = make_step(objective, model, images, clips=True)
    return steps


def report_speed(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as cache_dir:
        steps = make_steps(arguments, cache_dir)
        losses = {name: step().item() for name, step in steps.items()}  # fills the cache, too
        seconds = interleave(
            steps, rounds=arguments.rounds, max_seconds=arguments.max_seconds, device=arguments.device
        )
    rates = {name: arguments.train_batch_size / statistics.median(values) for name, values in seconds.items()}
    print(
        f"Crops of {arguments.resolution} px, {arguments.train_batch_size} a step, depths {DEPTHS}, float32, "
        f"median of {len(seconds['plain'])} steps in turns.\n"
    )
    print("| step | images/s | times plain | loss of the first step |\n| --- | --- | --- | --- |")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.4g} | {rate / rates['plain']:.2f} | {losses[name]:.6g} |")


def count_memory(resolution: int, *, tiny: bool, checkpointing: bool, bf16: bool, measured: bool) -> dict[str, float]:
    """Peaks in bytes of one optimiser step, weights and Adam's averages included, and of the VAE's encoding before."""
    shape = TINY if tiny else FULL
    with nullcontext() if measured else FakeTensorMode(), LiveMemory() as memory, torch.no_grad():
        vae = make_vae(shape)
        pyramid = image_pyramid(torch.rand(1, 3, resolution, resolution), max(DEPTHS))
        targets = [vae.encode(level * 2 - 1).latent_dist.mode() for level in pyramid]
        encoding = memory.peak
    del vae
    with nullcontext() if measured else FakeTensorMode(allow_non_fake_inputs=True), LiveMemory() as memory:
        model = make_model(shape)
        if checkpointing:
            model.enable_gradient_checkpointing()
        targets, pyramid = ([torch.rand(tensor.shape) for tensor in tensors] for tensors in (targets, pyramid))

        def forward(latents, image, num_steps, generator) -> list[torch.Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return model(latents, image=image, num_steps=num_steps, generator=generator, return_steps=True).steps

        def objective(images, *, generator) -> dict[str, torch.Tensor]:
            return {"loss": multi_depth_loss(forward, targets, pyramid, generator=generator)}

        step = make_step(objective, model, pyramid[0], clips=True)
        step()
        step()  # with Adam's averages there from the start
    return {"encoding": encoding, "step": memory.peak, "resident": peak_resident_bytes()}


def report_memory(arguments: argparse.Namespace) -> None:
    print("GiB of tensors in one step at batch size 1, and while the VAE encodes the crop before it.\n")
    measured = "| resident " if arguments.measured else ""
    print(f"| crop | autocast | gradient checkpointing | step | VAE {measured}|")
    print(f"| --- | --- | --- | --- | --- {'| --- ' if measured else ''}|")
    for resolution in arguments.resolutions:
        for bf16 in (False, True):
            for checkpointing in (False, True):
                settings = {"tiny": arguments.tiny, "checkpointing": checkpointing, "bf16": bf16}
                peaks = in_fresh_process(partial(count_memory, resolution, measured=arguments.measured, **settings))
                row = [f"{peaks[name] / 2**30:.3g}" for name in ("step", "encoding")]
                row += [f"{peaks['resident'] / 2**30:.3g}"] if arguments.measured else []
                kind, kept = "bf16" if bf16 else "no", "yes" if checkpointing else "no"
                print(f"| {resolution} | {kind} | {kept} | {' | '.join(row)} |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=256, help="edge of the crops; a multiple of 128")
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--gradient_checkpointing", action="store_true", help="of `uplift`")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each")
    parser.add_argument("--max_seconds", type=float, default=1200, help="limit, after two rounds")
    parser.add_argument("--threads", type=int, default=0, help="PyTorch threads; 0 for the default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", action="store_true", help="memory instead of speed")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512, 1024], help="of --memory")
    parser.add_argument("--measured", action="store_true", help="with --memory: run the step and measure")
    parser.add_argument("--tiny", action="store_true", help="networks of a few thousand parameters")
    arguments = parser.parse_args(arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    (report_memory if arguments.memory else report_speed)(arguments)
    print("\n" + ", ".join(f"{name} {value}" for name, value in environment(arguments.device).items()))


if __name__ == "__main__":
    main()
