"""
What changes to the embedded upsampler give in a few minutes of training on from its weights.

    python -m benchmarks.upsampler_trials --train_data_dir photos/train --validation_data_dir photos/val
    python -m benchmarks.upsampler_trials ... --cpu_minutes 20 --trials "as it is" "no term in decoded pixels"

Every trial starts as the same function: whatever it has beyond the upsampler is added so that it changes nothing at
first, or hardly anything if it is the neighbourhood (see `grow`). All trials then train for the same CPU time, or with
`--steps` for as many steps, in the embedded recipe, but only at depth 1, on the same crops, with Adam and a cosine
schedule over that time.

Prints the final PSNR on one crop of 256 px of every validation photograph, reduced two and four times, and at 2x with
a JPEG as input; and the mean weight that the Local Attender gives to the latent in which a position lies (1 is nearest
neighbour). Effects that need long training do not show here; what a step costs does.
"""

import argparse
import math
import time
from dataclasses import dataclass, field

import torch

from benchmarks.measure import environment
from uplift_diffusers import UPLiFTModel, UPLiFTSuperResolutionPipeline, embedded_bundle
from uplift_diffusers.data.dataset import Crop, EpochSampler, Photographs
from uplift_diffusers.data.sources import FolderSource
from uplift_diffusers.latent_space import Autoencoder, LatentCodec, LatentSpace
from uplift_diffusers.models.local_attention import neighborhood_offsets
from uplift_diffusers.training.losses import MultiDepthObjective, run_upsampler
from uplift_diffusers.training.monitoring import UpsamplerValidation
from uplift_diffusers.training.recipes import EmbeddedTrainingConfig

RECIPE = EmbeddedTrainingConfig
CROP = Crop(resolution=RECIPE.resolution, max_reduction=RECIPE.max_reduction)
OBJECTIVE = {"depths": (1,), "latent_noise": RECIPE.latent_noise, "pixel_weight": RECIPE.pixel_weight}
WARM_UP = 0.03
"""Part of the time over which the learning rate rises."""

QUALITY = 75
"""Quality of the JPEGs in validation: Pillow's default."""

NEW_LOGIT = -6.0
"""Bias of new positions of a neighbourhood: their softmax weights are small."""

CENTRE_LOGIT = 3.0
"""Bias of the centre where the Local Attender starts again: a weight of 0.56 among 17 positions."""


@dataclass(frozen=True)
class Trial:
    """
    What differs from the embedded recipe.

    Args:
        model: settings of the upsampler.
        objective: settings of the objective.
        batch: images of a step.
        learning_rate: Adam's, at its peak.
        new_attender: start the Local Attender again, with the same weights everywhere, most for the centre.
    """

    model: dict = field(default_factory=dict)
    objective: dict = field(default_factory=dict)
    batch: int = RECIPE.train_batch_size
    learning_rate: float = 5e-4
    new_attender: bool = False


TRIALS = {
    "as it is": Trial(),
    "refiner of 12 blocks, not 8": Trial(model={"refiner_layers": 12}),
    "refiner of 192 channels, not 128": Trial(model={"refiner_channels": 192}),
    "stem of 8 blocks, not 4": Trial(model={"encoder_stem_layers": 8}),
    "stem of 48 channels, not 32": Trial(model={"encoder_stem_channels": 48}),
    "neighbourhood of 9, not 17": Trial(model={"neighborhood": 9}),
    "neighbourhood of 25": Trial(model={"neighborhood": 25}),
    "Local Attender started again": Trial(new_attender=True),
    "4 noise channels, not none": Trial(model={"noise_channels": 4}),
    "no term in decoded pixels": Trial(objective={"pixel_weight": 0.0}),
    "4 times its weight": Trial(objective={"pixel_weight": 4 * RECIPE.pixel_weight}),
    "1 image a step, not 4, Adam 3e-4": Trial(batch=1, learning_rate=3e-4),
    "half of the inputs degraded": Trial(objective={"degraded_probability": 0.5}),
}


@torch.no_grad()
def grow(model: UPLiFTModel, source: UPLiFTModel) -> None:
    """
    Give `model` the weights of `source`, and what it has more such values that it computes the same.

    New blocks begin as the identity (their last convolution is zero). New channels begin as a new model's do, and no
    old channel reads them yet. Of other neighbourhoods, positions that both have keep their weights, and new ones
    begin with small ones.
    """
    weights = source.state_dict()
    changes_neighborhood = model.config.neighborhood != source.config.neighborhood
    for name, value in model.state_dict().items():
        old = weights.get(name)
        if changes_neighborhood and name.startswith("attender."):
            continue
        if old is None:
            if ".proj." in name:
                value.zero_()
        elif value.shape[1:] == old.shape[1:]:
            value[: len(old)] = old
        else:
            # Inputs are appended, but for noise, which stands before the estimate in what the refiner reads.
            follow = source.config.latent_channels if name == "refiner.blocks.layers.0.convs.0.weight" else 0
            place = old.shape[1] - follow
            new = old.new_zeros(len(old), value.shape[1] - old.shape[1], *old.shape[2:])
            value[: len(old)] = torch.cat([old[:, :place], new, old[:, place:]], dim=1)
    if changes_neighborhood:
        _change_neighborhood(model.attender.conv, source.attender.conv)


def _change_neighborhood(conv: torch.nn.Conv2d, old: torch.nn.Conv2d) -> None:
    """Every offset's logits stay what they were, though the guide's channel that is added to them is another one."""
    known = neighborhood_offsets(old.out_channels)
    conv.weight.zero_()
    conv.bias.fill_(NEW_LOGIT)
    for row, offset in enumerate(neighborhood_offsets(conv.out_channels)):
        if offset in known:
            old_row = known.index(offset)
            conv.weight[row] = old.weight[old_row]
            conv.bias[row] = old.bias[old_row]
            conv.weight[row, old_row] += 1
        conv.weight[row, row] -= 1


@torch.no_grad()
def reset_attender(model: UPLiFTModel) -> None:
    """Logits that do not depend on the guide, as far as they have learnt nothing: `CENTRE_LOGIT` and zeros."""
    conv = model.attender.conv
    torch.nn.init.dirac_(conv.weight).neg_()  # takes away the guide's channels that are added to the logits
    conv.bias.zero_()
    conv.bias[neighborhood_offsets(conv.out_channels).index((0, 0))] = CENTRE_LOGIT


def train(
    model: UPLiFTModel,
    trial: Trial,
    photographs: Photographs,
    vae: Autoencoder,
    space: LatentSpace,
    *,
    cpu_seconds: float | None = None,
    max_steps: int | None = None,
) -> int:
    """Train for so many seconds of the CPU, or else for so many steps; returns the number of steps."""
    objective = MultiDepthObjective(model.train(), vae, space, **{**OBJECTIVE, **trial.objective})
    optimizer = torch.optim.Adam(model.parameters(), lr=trial.learning_rate)
    generator = torch.Generator().manual_seed(0)
    order = iter(EpochSampler(len(photographs), seed=0))
    begin, steps = time.process_time(), 0

    def spent() -> float:
        return steps / max_steps if max_steps else (time.process_time() - begin) / cpu_seconds

    while (passed := spent()) < 1:
        rate = min(1.0, passed / WARM_UP) * (1 + math.cos(math.pi * passed)) / 2
        for group in optimizer.param_groups:
            group["lr"] = trial.learning_rate * rate
        images = torch.stack([photographs[next(order)] for _ in range(trial.batch)]).float() / 255
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(images, generator=generator)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps


class Measurement:
    """
    Of an upsampler on the validation photographs: PSNR in dB at 2x, at 4x and at 2x from JPEGs, and the mean weight of
    the centre in the Local Attender, in a step of 2x on the first of them.
    """

    def __init__(self, folder: str, vae: Autoencoder, space: LatentSpace):
        self.vae, self.space = vae, space
        self.validation = UpsamplerValidation(self._upsample, vae, space, folder, jpeg_qualities=(QUALITY,))

    def __call__(self, model: UPLiFTModel) -> list[float]:
        self.model = model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            figures = self.validation().figures
            names = ("val_psnr_2x", "val_psnr_4x", f"val_psnr_2x_jpeg{QUALITY}")
            return [*(figures[name] for name in names), self._centre_weight()]

    def _upsample(
        self, image: torch.Tensor, depth: int, denoise: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        latents = LatentCodec(self.vae, self.space).encode(image)
        settings = {"num_steps": depth, "generator": generator}
        return run_upsampler(self.model, latents, image=image, denoise=denoise, **settings).sample

    @torch.no_grad()
    def _centre_weight(self) -> float:
        attender, guides = self.model.attender, []
        hook = attender.register_forward_hook(lambda module, inputs, output: guides.append(inputs[0]))
        pyramid, latents = self.validation.batches[0]
        self.model(latents[1], image=pyramid[1], num_steps=1, generator=torch.Generator().manual_seed(0))
        hook.remove()
        weights = attender.logits(guides[0]).softmax(dim=1)
        return weights[:, neighborhood_offsets(attender.neighborhood).index((0, 0))].mean().item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--validation_data_dir", required=True)
    parser.add_argument("--model", default=str(embedded_bundle()), help="pipeline whose upsampler is tried")
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS), metavar="NAME")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--cpu_minutes", type=float, default=5.0, help="of training, for every trial")
    budget.add_argument("--steps", type=int, help="of training instead: the same figures on every run")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    pipe = UPLiFTSuperResolutionPipeline.from_pretrained(options.model)
    vae, space, source = pipe.vae.requires_grad_(False), pipe.latent_space, pipe.upsampler
    photographs = Photographs(FolderSource(options.train_data_dir), CROP)
    measure = Measurement(options.validation_data_dir, vae, space)
    print(f"| trial | steps | 2x | 4x | 2x, JPEG of quality {QUALITY} | centre |\n|{' --- |' * 6}")
    print(_row("before", "", measure(source)), flush=True)
    for name in options.trials:
        torch.manual_seed(0)
        trial = TRIALS[name]
        model = UPLiFTModel.from_config({**source.config, **trial.model})
        grow(model, source)
        if trial.new_attender:
            reset_attender(model)
        budget = {"max_steps": options.steps} if options.steps else {"cpu_seconds": 60 * options.cpu_minutes}
        steps = train(model, trial, photographs, vae, space, **budget)
        print(_row(name, steps, measure(model)), flush=True)
    budget = f"{options.steps} steps" if options.steps else f"{options.cpu_minutes:g} minutes of the CPU"
    print(f"\n{budget} for each trial; {environment('cpu')}")


def _row(name: str, steps: int | str, values: list[float]) -> str:
    return " | ".join([f"| {name}", str(steps), *(f"{value:.3f}" for value in values)]) + " |"


if __name__ == "__main__":
    main()
