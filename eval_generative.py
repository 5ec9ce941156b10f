"""
Evaluate upscalers on photographs, or on latents that Stable Diffusion generates from prompts. See docs/evaluation.md.

    python eval_generative.py --data_dir photos/val --output_dir report
    accelerate launch --multi_gpu --num_processes 4 eval_generative.py --data_dir photos/val --output_dir report
"""

from uplift_diffusers.evaluation.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main(program="eval_generative.py"))
