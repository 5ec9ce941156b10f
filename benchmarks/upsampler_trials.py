"""
Effects of changes to the embedded upsampler after a few minutes of training, and of its Local Attender.

    python -m benchmarks.upsampler_trials --train_data_dir photos/train --validation_data_dir photos/val
    python -m benchmarks.upsampler_trials ... --cpu_minutes 20 --trials "as it is" "no term in decoded pixels"
    python -m benchmarks.upsampler_trials ... --cpu_minutes 8 --trials "new" "new, nearest neighbour" "new, LiFT"

A trial starts as the same function: additional parts are initialised so that they change nothing at first, or hardly
anything in the case of the neighbourhood (see `grow`). It trains at depth 1. A trial called "new" keeps only the
upsampler's stem; its linear part is fitted to crops first (outside the budget), and it trains at depths 1 to 3, a LiFT
at 1. All train for the same CPU time, or with `--steps` for the same number of steps, with the embedded recipe on the
same crops without degradations, with Adam and a cosine schedule over that time.

Prints the final PSNR on one crop of 256 px of every validation photograph, downsampled by 2 to 16, and at 2x with a
JPEG as input, without the consistency step; and the mean weight that the Local Attender gives to the latent that
contains the position (1 is nearest neighbour). The comparison includes the cost of a step, but effects that need long
training do not show.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from benchmarks.measure import environment
from uplift_diffusers import UPLiFTModel, UPLiFTSuperResolutionPipeline, embedded_bundle
from uplift_diffusers.data.dataset import Crop, EpochSampler, Photographs, first_crops
from uplift_diffusers.data.degradation import through_jpeg
from uplift_diffusers.data.pyramid import image_pyramid
from uplift_diffusers.data.sources import FolderSource
from uplift_diffusers.images.compression import denoise_for_quality
from uplift_diffusers.latent_space import Autoencoder, LatentCodec, LatentSpace
from uplift_diffusers.models.local_attention import LocalAttender, neighborhood_offsets
from uplift_diffusers.training.losses import MultiDepthObjective, psnr_from_mse
from uplift_diffusers.training.monitoring import VALIDATION_BATCH, validation_crops
from uplift_diffusers.training.recipes import LIFT_SETTINGS, EmbeddedLiFTTrainingConfig, EmbeddedTrainingConfig

RECIPE = EmbeddedTrainingConfig
CROP = Crop(resolution=RECIPE.resolution, max_reduction=RECIPE.max_reduction)
OBJECTIVE = {"depths": (1,), "latent_noise": RECIPE.latent_noise, "pixel_weight": RECIPE.pixel_weight}
WARM_UP = 0.03
"""Part of the time over which the learning rate rises."""

DEPTHS = (1, 2, 3, 4)
"""Numbers of 2x steps in validation. The fourth, at least, is beyond training."""

NEW_DEPTHS = (1, 2, 3)
"""Depths of the training of new upsamplers."""

FIT_CROPS = 200
"""Crops that the linear part of a new upsampler is fitted to."""

QUALITY = 75
"""Quality of the JPEGs in validation: Pillow's default."""

NEW_LOGIT = -6.0
"""Bias of new positions of a neighbourhood: their softmax weights are small."""

CENTRE_LOGIT = 3.0
"""Bias of the centre where the Local Attender starts again: a weight of 0.56 among 17 positions."""


@dataclass(frozen=True)
class Trial:
    """
    The differences from the embedded recipe.

    Args:
        model: settings of the upsampler.
        objective: settings of the objective.
        batch: images per step.
        learning_rate: peak learning rate of Adam.
        new_attender: reset the Local Attender to the same weights everywhere, the largest for the centre.
        new: initialise everything but the stem.
        nearest: replace the Local Attender by nearest-neighbour interpolation.
    """

    model: dict = field(default_factory=dict)
    objective: dict = field(default_factory=dict)
    batch: int = RECIPE.train_batch_size
    learning_rate: float = 5e-4
    new_attender: bool = False
    new: bool = False
    nearest: bool = False


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
    "new": Trial(objective={"depths": NEW_DEPTHS}, new=True),
    "new, nearest neighbour": Trial(objective={"depths": NEW_DEPTHS}, new=True, nearest=True),
    "new, LiFT": Trial(
        model={name: EmbeddedLiFTTrainingConfig.model_settings[name] for name in (*LIFT_SETTINGS, "refiner_residual")},
        objective={"depths": EmbeddedLiFTTrainingConfig.depths},
        new=True,
    ),
}


class NearestNeighbor(torch.nn.Module):
    """What a Local Attender is whose centre has all the weight."""

    def forward(self, guide: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(B, G, cH, cW) and (B, C, H, W) -> (B, C, cH, cW)."""
        return F.interpolate(values, size=guide.shape[2:], mode="nearest")


@torch.no_grad()
def grow(model: UPLiFTModel, source: UPLiFTModel) -> None:
    """
    Load the weights of `source` into `model`, and initialise its additional parts so that it computes the same
    function.

    New blocks start as the identity (their last convolution is zero). New channels are initialised as in a new model,
    and no old channel reads them yet. If the neighbourhood differs, common positions keep their weights, and new ones
    start with small weights.
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


def make_model(trial: Trial, source: UPLiFTModel, fit: Callable[[UPLiFTModel], None]) -> UPLiFTModel:
    """
    What a trial starts with.

    Args:
        trial: says how it differs from `source`.
        source: the upsampler that is tried.
        fit: called with a new upsampler to fit its linear part.
    """
    settings = {name: value for name, value in source.config.items() if not name.startswith("_")}
    model = UPLiFTModel(**{**settings, **trial.model})
    if trial.new:
        model.stem.load_state_dict(source.stem.state_dict())
        if model.estimator is not None:
            fit(model)
    else:
        grow(model, source)
    if trial.new_attender:
        reset_attender(model)
    if trial.nearest:
        model.attender = NearestNeighbor()
    return model


@torch.no_grad()
def fit_linear_part(model: UPLiFTModel, crops: torch.Tensor, codec: LatentCodec) -> None:
    """Fit the image residual of every step to crops (N, 3, R, R) in [0, 1], as the recipe does before its training."""
    levels = len(model.estimator.convs)
    pyramids = [image_pyramid(images, levels) for images in crops.split(8)]
    for depth in range(1, levels + 1):
        pairs = []
        for pyramid in pyramids:
            pixels = model.encode(pyramid[depth], step=0, num_steps=depth).pixels
            pairs.append((pixels, codec.encode(pyramid[0])))
        model.estimator.fit(pairs)


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
    """Train for a number of CPU seconds, or of steps if given; returns the number of steps."""
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
    Of an upsampler on the validation photographs: PSNR in dB at every depth of `DEPTHS` and at 2x from JPEGs, and the
    mean weight of the centre in the Local Attender, in a step of 2x on the first of them; None without one.
    """

    def __init__(self, folder: str, codec: LatentCodec):
        self.codec = codec
        self.pyramids = [image_pyramid(part, max(DEPTHS)) for part in validation_crops(folder).split(VALIDATION_BATCH)]

    @torch.no_grad()
    def __call__(self, model: UPLiFTModel) -> list[float | None]:
        model.eval()
        rows = []
        for pyramid in self.pyramids:
            inputs = [(depth, pyramid[depth], 0.0) for depth in DEPTHS]
            inputs.append((1, through_jpeg(pyramid[1], quality=QUALITY), denoise_for_quality(QUALITY)))
            columns = [self._psnr(model, pyramid[0], *given) for given in inputs]
            rows.append(torch.stack(columns, dim=1))  # (B, columns)
        return [*torch.cat(rows).mean(dim=0).tolist(), self._centre_weight(model)]

    def bicubic(self) -> list[float | None]:
        """The same of bicubic interpolation of the pixels."""
        rows = []
        for pyramid in self.pyramids:
            inputs = [pyramid[depth] for depth in DEPTHS] + [through_jpeg(pyramid[1], quality=QUALITY)]
            outputs = [F.interpolate(image, size=pyramid[0].shape[2:], mode="bicubic").clamp(0, 1) for image in inputs]
            rows.append(torch.stack([_psnr(output, pyramid[0]) for output in outputs], dim=1))
        return [*torch.cat(rows).mean(dim=0).tolist(), None]

    def _psnr(
        self, model: UPLiFTModel, truth: torch.Tensor, depth: int, image: torch.Tensor, denoise: float
    ) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            settings = {"num_steps": depth, "generator": torch.Generator().manual_seed(0)}
            strengths = torch.full((len(image),), denoise)
            latents = model(self.codec.encode(image), image=image, denoise=strengths, **settings).sample
            return _psnr(self.codec.decode(latents.float()), truth)

    def _centre_weight(self, model: UPLiFTModel) -> float | None:
        attender, guides = model.attender, []
        if not isinstance(attender, LocalAttender):
            return None
        hook = attender.register_forward_hook(lambda module, inputs, output: guides.append(inputs[0]))
        self._psnr(model, self.pyramids[0][0], 1, self.pyramids[0][1], 0.0)
        hook.remove()
        with torch.autocast("cpu", torch.bfloat16):
            weights = attender.logits(guides[0]).float().softmax(dim=1)
        return weights[:, neighborhood_offsets(attender.neighborhood).index((0, 0))].mean().item()


def _psnr(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """(B,), of each item."""
    return psnr_from_mse((actual.float() - expected).square().mean(dim=(1, 2, 3)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--validation_data_dir", required=True)
    parser.add_argument("--model", default=str(embedded_bundle()), help="pipeline with the upsampler to start from")
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS), metavar="NAME")
    parser.add_argument("--fit_crops", type=int, default=FIT_CROPS, help="crops for the linear part of new upsamplers")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--cpu_minutes", type=float, default=5.0, help="training time of every trial")
    budget.add_argument("--steps", type=int, help="training steps instead, for the same figures on every run")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    pipe = UPLiFTSuperResolutionPipeline.from_pretrained(options.model)
    vae, space, source = pipe.vae.requires_grad_(False), pipe.latent_space, pipe.upsampler
    photographs = Photographs(FolderSource(options.train_data_dir), CROP)
    codec = LatentCodec(vae, space)
    measure = Measurement(options.validation_data_dir, codec)

    def fit(model: UPLiFTModel) -> None:
        fit_linear_part(model, first_crops(photographs, options.fit_crops).float() / 255, codec)

    scales = " | ".join(f"{2**depth}x" for depth in DEPTHS)
    print(f"| trial | steps | {scales} | 2x, JPEG of quality {QUALITY} | centre |\n|{' --- |' * (len(DEPTHS) + 4)}")
    print(_row("bicubic", "", measure.bicubic()))
    if not all(TRIALS[name].new for name in options.trials):
        print(_row("before", "", measure(source)), flush=True)
    for name in options.trials:
        torch.manual_seed(0)
        trial = TRIALS[name]
        model = make_model(trial, source, fit)
        budget = {"max_steps": options.steps} if options.steps else {"cpu_seconds": 60 * options.cpu_minutes}
        steps = train(model, trial, photographs, vae, space, **budget)
        print(_row(name, steps, measure(model)), flush=True)
    budget = f"{options.steps} steps" if options.steps else f"{options.cpu_minutes:g} minutes of the CPU"
    print(f"\n{budget} for each trial; {environment('cpu')}")


def _row(name: str, steps: int | str, values: list[float | None]) -> str:
    return " | ".join([f"| {name}", str(steps), *("" if value is None else f"{value:.3f}" for value in values)]) + " |"


if __name__ == "__main__":
    main()
