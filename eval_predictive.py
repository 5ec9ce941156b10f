"""
Evaluate upsamplers of a vision transformer's features: probes, drift, and cost.

    python eval_predictive.py --task segmentation --backbone facebook/dinov2-small --dataset voc --data_dir VOCdevkit \
        --upsamplers bilinear uplift=tiny-uplift/dinov2-s14 --output_dir report
    python eval_predictive.py --task cost --output_dir report
"""

from uplift_diffusers.evaluation.predictive.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
