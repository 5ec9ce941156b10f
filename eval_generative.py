"""
Measure an upscaler on photographs.

    python eval_generative.py --data_dir photos/val --scales 2 4
"""

from uplift_diffusers.evaluation.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
