"""`python -m uplift_diffusers` is `uplift-diffusers`."""

import sys

from uplift_diffusers.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
