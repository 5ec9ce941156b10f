"""
Train an upsampler for the features of a frozen vision transformer.

    accelerate launch train_features.py --recipe dinov2-s14 --train_data_dir imagenet/train --output_dir runs/dinov2
    accelerate launch train_features.py --recipe small --train_data_dir photos --output_dir runs/small --method lift
"""

from uplift_diffusers.evaluation.predictive.training import main

if __name__ == "__main__":
    raise SystemExit(main())
