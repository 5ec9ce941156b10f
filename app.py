"""
Upscale and generate images in the browser.

    python app.py
    python app.py --model UPLiFT-upsampler/uplift_sd1.5vae --vae stable-diffusion-v1-5/stable-diffusion-v1-5
"""

from pathlib import Path

from uplift_diffusers.demo.app import main

if __name__ == "__main__":
    raise SystemExit(main(examples=Path(__file__).resolve().parent / "examples"))
