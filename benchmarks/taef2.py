"""
Upsamplers of the latents of FLUX.2, trained and measured on a small published stand-in for its VAE.

    python -m benchmarks.taef2 convert --encoder taef2_encoder.safetensors --decoder taef2_decoder.safetensors \\
        --output_dir taef2
    python -m benchmarks.taef2 train --recipe embedded --vae taef2 --latent_space flux2-vae ... \\
        --output_dir runs/uplift
    python -m benchmarks.taef2 train --nearest ... --output_dir runs/nearest
    python -m benchmarks.taef2 evaluate --vae taef2 --data_dir photos/val --limit 30 --output_dir report \\
        --methods uplift=runs/uplift nearest=runs/nearest lift=runs/lift cfm=runs/cfm

TAEF2 of github.com/madebyollin/taesd (MIT) is an encoder and a decoder of 1.3 M parameters each, distilled from the
VAE of FLUX.2. `convert` writes its two files as a VAE of diffusers. `train` is `train_latent.py`, which finds that VAE
here; with `--nearest` the Local Attender is frozen at nearest neighbour, the ablation.

`evaluate` compares what is made of the latents of a reduced photograph with the latents of the photograph itself, and
what they decode to with the photograph, before and after the super-resolution pipeline's consistency step. Beside the
methods named it measures bilinear interpolation of the latents, bicubic interpolation of the pixels, that encoded and
decoded (`reencoded`), and the round trip of the photograph (`vae`).
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderTiny, UNet2DModel
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from safetensors.torch import load_file
from torch import nn

from uplift_diffusers.cfm import euler_scheduler
from uplift_diffusers.evaluation.measure import Evaluation, compute_results
from uplift_diffusers.evaluation.methods import Method, bicubic, seed_of
from uplift_diffusers.evaluation.metrics import Metrics, to_tensor
from uplift_diffusers.evaluation.protocols import PhotographFiles, Sample, SuperResolution
from uplift_diffusers.evaluation.records import write_whole
from uplift_diffusers.evaluation.report import describe_run, report_markdown, write_report
from uplift_diffusers.evaluation.statistics import bootstrap_mean
from uplift_diffusers.images.convert import missing_detail, resize
from uplift_diffusers.latent_space import LatentCodec, LatentSpace
from uplift_diffusers.loading import load_vae
from uplift_diffusers.models.interpolation import interpolate_latents
from uplift_diffusers.models.local_attention import neighborhood_offsets
from uplift_diffusers.models.upsampler import UPLiFTModel
from uplift_diffusers.pipelines.cfm_latent_upscale import CFMLatentUpscalePipeline
from uplift_diffusers.training import train as training
from uplift_diffusers.training.recipes import UpsamplerTrainingConfig

CHANNELS = 32
GLOBAL_BLOCKS = {"encoder": (11, 12, 13), "decoder": (2, 3, 4)}
"""Layers at 1/8 of the resolution: their blocks see the whole picture."""

CENTRE_LOGIT = 30.0
"""Softmax of it among 17 zeros is 1 to the last bit of float32."""


class GlobalBlock(AutoencoderTinyBlock):
    """The block of AutoencoderTiny after 1x1 convolutions around a group norm, which add up what is everywhere."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, "relu")
        wide = 4 * channels
        self.pool = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.GroupNorm(4, wide),
            nn.ReLU(),
            nn.Conv2d(wide, channels, 1, bias=False),
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden + self.pool(hidden))


class AutoencoderTAEF2(AutoencoderTiny):
    """An AutoencoderTiny of 32 channels with a `GlobalBlock` for each block at 1/8 of the resolution."""

    def __init__(self):
        super().__init__(latent_channels=CHANNELS)
        for part, indices in GLOBAL_BLOCKS.items():
            layers = getattr(self, part).layers
            for index in indices:
                layers[index] = GlobalBlock(layers[index].conv[0].in_channels)


diffusers.AutoencoderTAEF2 = AutoencoderTAEF2  # where `load_vae` looks for the class


def convert(encoder: str, decoder: str) -> AutoencoderTAEF2:
    """The VAE of the two published files. Raises RuntimeError where a tensor is missing or one too many."""
    vae = AutoencoderTAEF2()
    vae.encoder.layers.load_state_dict(load_file(encoder))
    # Layer 0 there is the soft clamp, which has no weights and is not a layer here.
    weights = {}
    for name, tensor in load_file(decoder).items():
        index, _, rest = name.partition(".")
        weights[f"{int(index) - 1}.{rest}"] = tensor
    vae.decoder.layers.load_state_dict(weights)
    return vae.eval()


def freeze_attender(model: nn.Module) -> None:
    """Let the Local Attender give every position the value of its own cell, for good."""
    conv = model.attender.conv.requires_grad_(False)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    conv.bias[neighborhood_offsets(model.attender.neighborhood).index((0, 0))] = CENTRE_LOGIT
    model.attender.norm.requires_grad_(False)


def train(arguments: list[str], *, nearest: bool) -> int:
    """`train_latent.py` with these arguments; `nearest` freezes the attender of what it makes."""
    make_task = UpsamplerTrainingConfig.make_task

    def make_ablated_task(self, *inputs, **settings):
        task = make_task(self, *inputs, **settings)
        freeze_attender(task.model)
        return task

    try:
        UpsamplerTrainingConfig.make_task = make_ablated_task if nearest else make_task
        return training.main(arguments)
    finally:
        UpsamplerTrainingConfig.make_task = make_task


class LatentMethods:
    """
    Methods that make raw latents, and the squared error of the latents of everything that they were given.

    Args:
        codec: of the VAE.
        errors_file: JSON, where the errors are kept by scale, method and photograph.
        seed: of every photograph's noise.
    """

    def __init__(self, codec: LatentCodec, errors_file: Path, *, seed: int):
        self.codec, self.errors_file, self.seed = codec, errors_file, seed
        self.errors = json.loads(errors_file.read_text()) if errors_file.is_file() else {}
        self._made: dict[str, tuple[tuple, torch.Tensor]] = {}

    def pair(self, name: str, enlarge: Callable, components: dict, settings: dict) -> list[Method]:
        """
        Methods that decode what `enlarge` makes, without and with the consistency step.

        Args:
            enlarge: (image, its latents, scale, generator) -> raw latents.
        """
        components = {"vae": self.codec.vae, **components}

        def make(sample: Sample) -> torch.Tensor:
            generator = torch.Generator().manual_seed(seed_of(self.seed, sample.name))
            image = to_tensor(sample.image)
            latents = self._once("small", (sample.name, sample.scale), lambda: self.codec.encode(image))
            enlarged = enlarge(image, latents, sample.scale, generator).float()
            self._note(name, sample, (enlarged - self.truth(sample)).square().mean().item())
            return self.codec.decode(enlarged)

        def decode(sample: Sample) -> torch.Tensor:
            return self._once("decoded", (name, sample.name, sample.scale), lambda: make(sample))

        def decode_consistently(sample: Sample) -> torch.Tensor:
            decoded = decode(sample)
            return (decoded + missing_detail(to_tensor(sample.image), decoded)).clamp(0, 1)

        return [
            Method(name, decode, settings, components),
            Method(f"{name}_consistent", decode_consistently, {**settings, "consistency": 1.0}, components),
        ]

    def round_trip(self) -> Method:
        """The photograph itself, encoded and decoded."""

        def upscale(sample: Sample) -> torch.Tensor:
            return self._once("round trip", (sample.name,), lambda: self.codec.decode(self.truth(sample)))

        return Method("vae", upscale, {"method": "encoded and decoded"}, {"vae": self.codec.vae})

    def truth(self, sample: Sample) -> torch.Tensor:
        """Raw latents of the photograph."""
        return self._once("truth", (sample.name,), lambda: self.codec.encode(sample.truth).float())

    def _once(self, kind: str, key: tuple, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `function` gave last for `key`: one method after the other asks for the same."""
        if kind not in self._made or self._made[kind][0] != key:
            self._made[kind] = key, function()
        return self._made[kind][1]

    def _note(self, name: str, sample: Sample, error: float) -> None:
        self.errors.setdefault(f"{sample.scale}x", {}).setdefault(name, {})[sample.name] = error
        write_whole(self.errors_file, json.dumps(self.errors, indent=1) + "\n")


def make_methods(latent: LatentMethods, folders: dict[str, str], *, cfm_steps: int) -> list[Method]:
    """What `evaluate` measures: the built-in methods, and the networks in `folders`."""
    codec = latent.codec

    def bilinear(image, latents, scale, generator):
        return interpolate_latents(latents, scale=scale)

    def reencoded(image, latents, scale, generator):
        return codec.encode(resize(image, (image.shape[2] * scale, image.shape[3] * scale)))

    methods = [bicubic(codec.vae, codec.space)]
    methods += latent.pair("bilinear", bilinear, {}, {"method": "bilinear interpolation of the latents"})
    methods += latent.pair("reencoded", reencoded, {}, {"method": "bicubic interpolation of the pixels, encoded"})
    for name, folder in folders.items():
        if json.loads(Path(folder, "config.json").read_text())["_class_name"] == UNet2DModel.__name__:
            unet = UNet2DModel.from_pretrained(folder)
            pipe = CFMLatentUpscalePipeline(codec.vae, unet, euler_scheduler())
            pipe.set_progress_bar_config(disable=True)

            def enlarge(image, latents, scale, generator, pipe=pipe):
                settings = {"num_inference_steps": cfm_steps, "generator": generator}
                return pipe(image=image, scale=scale, output_type="latent", **settings).images

            settings = {"method": "Coupling Flow Matching", "num_inference_steps": cfm_steps}
            methods += latent.pair(name, enlarge, {"unet": unet}, settings)
            continue
        model = UPLiFTModel.from_pretrained(folder)
        codec.space.check_upsampler(model)

        def enlarge(image, latents, scale, generator, model=model):
            steps = {"num_steps": scale.bit_length() - 1, "generator": generator}
            return model(latents, image=image, **steps).sample

        methods += latent.pair(name, enlarge, {"upsampler": model}, {"method": "UPLiFTModel"})
    return [*methods, latent.round_trip()]


def evaluate(options: argparse.Namespace, command: str) -> None:
    """Measure, print the tables, and write the report. It continues what was stopped and adds methods."""
    vae = load_vae(options.vae)
    codec = LatentCodec(vae, LatentSpace.of(vae, "flux2-vae"))
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    latent = LatentMethods(codec, output_dir / "latents.json", seed=options.seed)
    folders = dict(word.split("=", 1) for word in options.methods)
    methods = make_methods(latent, folders, cfm_steps=options.cfm_steps)
    photographs = PhotographFiles(options.data_dir, limit=options.limit)
    protocol = SuperResolution(photographs, scales=(2, 4), crop=options.crop, multiple=8, allow_greyscale=True)
    evaluation = Evaluation(protocol, methods, Metrics(names=("psnr", "ssim")), output_dir / "records")
    evaluation.run()  # in float32: bfloat16 autocast would reach into SSIM's convolutions
    results = compute_results(evaluation, seed=options.seed)
    description = describe_run(evaluation, command=command, seed=options.seed, processes=1, dtype="float32")
    write_report(evaluation, results, description, output_dir)
    report = report_markdown(results, description)
    report += "\n## Latents\n\n| | mean squared error, 2x | 4x |\n| --- | --- | --- |\n"
    for name in ("bilinear", "reencoded", *folders):
        cells = []
        for scale in protocol.scales:
            errors = np.array([latent.errors[f"{scale}x"][name][item.name] for item in protocol.items])
            mean = bootstrap_mean(errors, seed=options.seed)
            interval = "" if mean.low is None else f" [{mean.low:.3f}, {mean.high:.3f}]"
            cells.append(f"{mean.value:.3f}{interval}")
        report += f"| {name} | {' | '.join(cells)} |\n"
    write_whole(output_dir / "report.md", report)
    print(report)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert")
    for name in ("--encoder", "--decoder", "--output_dir"):
        command.add_argument(name, required=True)
    command = commands.add_parser("train")
    command.add_argument("--nearest", action="store_true")
    command = commands.add_parser("evaluate")
    for name in ("--vae", "--data_dir", "--output_dir"):
        command.add_argument(name, required=True)
    command.add_argument("--methods", nargs="*", default=[], metavar="NAME=FOLDER", help="networks; one is uplift")
    command.add_argument("--limit", type=int, help="only so many photographs, the first ones")
    command.add_argument("--crop", type=int, default=512, help="edge of the centre crops in pixels")
    command.add_argument("--cfm_steps", type=int, default=4, help="Euler steps of CFM")
    command.add_argument("--seed", type=int, default=0)
    options, rest = parser.parse_known_args(arguments)
    if options.command == "train":
        return train(rest, nearest=options.nearest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "evaluate":
        evaluate(options, f"python -m benchmarks.taef2 {shlex.join(arguments)}")
        return 0
    convert(options.encoder, options.decoder).save_pretrained(options.output_dir)
    print(Path(options.output_dir).resolve())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
