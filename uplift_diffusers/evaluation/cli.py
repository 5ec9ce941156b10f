"""Command line of `eval_generative.py`."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from uplift_diffusers.data.image_folder import find_images
from uplift_diffusers.embedded import embedded_bundle
from uplift_diffusers.evaluation.methods import bicubic, latent_bilinear, super_resolution, vae_round_trip
from uplift_diffusers.evaluation.super_resolution import evaluate, format_table
from uplift_diffusers.pipelines.super_resolution import UPLiFTSuperResolutionPipeline


def main(arguments: list[str] | None = None) -> int:
    """Parse the flags, measure, print the table and write it down where asked."""
    parser = argparse.ArgumentParser(
        description="Measure super-resolution on photographs: reduced, enlarged, compared with themselves.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data_dir", required=True, help="Folder of photographs, searched recursively.")
    parser.add_argument("--model", default=str(embedded_bundle()), help="Super-resolution pipeline.")
    parser.add_argument("--scales", type=int, nargs="+", default=[2, 4], choices=range(2, 17), help="Whole factors.")
    parser.add_argument("--crop", type=int, default=512, help="Edge of the centre crops in pixels.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of every image's noise.")
    parser.add_argument("--output_dir", type=Path, help="Where report.json and report.md go.")
    options = parser.parse_args(arguments)

    try:
        find_images(options.data_dir)
        pipeline = UPLiFTSuperResolutionPipeline.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    pipeline.set_progress_bar_config(disable=True)
    vae, space = pipeline.vae, pipeline.latent_space
    methods = {
        "bicubic": bicubic,
        "bilinear": latent_bilinear(vae, space),
        "uplift": super_resolution(pipeline, seed=options.seed),
        "vae": vae_round_trip(vae, space),
    }
    try:
        report = evaluate(options.data_dir, methods, scales=tuple(options.scales), crop=options.crop)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    table = format_table(report)
    print(table)
    if options.output_dir is not None:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        scores = {
            scale: {name: dataclasses.asdict(score) for name, score in by_method.items()}
            for scale, by_method in report["scores"].items()
        }
        text = json.dumps({**report, "scores": scores, "seed": options.seed}, indent=2)
        (options.output_dir / "report.json").write_text(text + "\n")
        (options.output_dir / "report.md").write_text(table + "\n")
    return 0
