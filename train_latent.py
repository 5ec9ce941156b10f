"""
Train an upsampler for the latents of a VAE.

    accelerate launch train_latent.py --recipe sd15 --train_data_dir photos --output_dir runs/uplift
    accelerate launch train_latent.py --recipe embedded --vae runs/vae --train_data_dir photos --output_dir runs/small

`uplift-diffusers train` is the same command in one process. See docs/training.md.
"""

from uplift_diffusers.training.train import main

if __name__ == "__main__":
    raise SystemExit(main())
