"""`python -m uplift_diffusers` is `uplift-diffusers`."""

import sys

from uplift_diffusers.cli import main

if __name__ == "__main__":
    sys.exit(main())
