"""
Train an UPLiFT on the latents of a VAE.

    accelerate launch train_latent.py --recipe sd15 --train_data_dir photos --output_dir runs/uplift
    accelerate launch train_latent.py --recipe embedded --vae runs/vae --train_data_dir photos --output_dir runs/small
"""

from uplift_diffusers.training.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
