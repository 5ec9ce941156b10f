"""The command line: `uplift-diffusers` and `python -m uplift_diffusers`."""
