"""Run `uplift-diffusers` as `python -m uplift_diffusers`."""

import sys

from uplift_diffusers.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
