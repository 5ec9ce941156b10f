import torch

from uplift_diffusers.data.pyramid import image_pyramid


def test_pyramid_levels_are_eight_bit_reductions():
    images = torch.rand(1, 3, 32, 32)
    levels = image_pyramid(images, 2)
    assert [level.shape[-1] for level in levels] == [32, 16, 8]
    torch.testing.assert_close(levels[1] * 255, (levels[1] * 255).round(), rtol=0, atol=1e-4)
