"""
Train an upsampler of the latents of a VAE.

    accelerate launch train_latent.py --recipe sd15 --train_data_dir photos --output_dir runs/uplift
    accelerate launch train_latent.py --recipe embedded --vae runs/vae --train_data_dir photos --output_dir runs/small

`uplift-diffusers train` is the same command on one process. docs/training.md describes it.
"""

from uplift_diffusers.training.train import main

if __name__ == "__main__":
    raise SystemExit(main())
