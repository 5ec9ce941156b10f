"""What the tests of the evaluation share: photographs, a small pipeline, a network that costs nothing."""

import torch
from PIL import Image

from tests.components import make_local_vae, make_upsampler, smooth_images
from uplift_diffusers import UPLiFTSuperResolutionPipeline
from uplift_diffusers.evaluation.methods import Method
from uplift_diffusers.evaluation.metrics import Metrics, to_bytes


class TinyInception(torch.nn.Module):
    """Stands where the Inception network does, and costs nothing: 2048 random features of 8 x 8 pixels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(12)
        self.layer = torch.nn.Linear(192, 2048)

    def forward(self, pixels):
        small = torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 8)
        return self.layer(small.flatten(1)).detach().relu()


def all_metrics(**settings):
    names = ("fid", "patch_fid", "kid", "psnr", "ssim", "color_shift")
    return Metrics(names=names, inception=TinyInception(), patch_size=32, **settings)


def save_photographs(folder, count=5, size=(80, 120), seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(smooth_images(count, *size, seed=seed)):
        noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(index)) - 0.5
        pixels = to_bytes(image + 0.2 * noise).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def make_pipeline():
    """A UPLiFTSuperResolutionPipeline whose VAE gives recognisable pictures."""
    upsampler = make_upsampler("test-local", latent_channels=12)
    pipeline = UPLiFTSuperResolutionPipeline(vae=make_local_vae(), upsampler=upsampler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def truth_method(name="truth"):
    return Method(name, lambda sample: sample.truth, {"method": name})
