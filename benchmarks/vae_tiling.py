"""
Difference between a VAE's tiled decoding and decoding the whole image.

    python -m benchmarks.vae_tiling photo.jpg                                         # the embedded autoencoder
    python -m benchmarks.vae_tiling photo.jpg --vae stable-diffusion-v1-5/stable-diffusion-v1-5

An AutoencoderLocal is decoded by `tiling.decode_tiled`, which is exact; the others as diffusers does it after
`vae.enable_tiling()`, which is not: attention and group norms see only a tile, and overlaps are blended. Both
decode the latents of the photograph, encoded without tiles. Prints the differences in 8-bit levels: the mean over all
pixels, the mean of the worst row and the worst column, where a seam shows, and the maximum.
"""

import argparse

import torch

from uplift_diffusers import LatentSpace, embedded_bundle
from uplift_diffusers.images.convert import pad_to_multiple, read_pictures
from uplift_diffusers.images.files import open_image
from uplift_diffusers.latent_space import Autoencoder, LatentCodec
from uplift_diffusers.loading import load_vae
from uplift_diffusers.models.autoencoder_local import AutoencoderLocal


@torch.no_grad()
def measure_difference(vae: Autoencoder, image: torch.Tensor, *, tile_size: int) -> dict[str, float]:
    """
    Differences between tiled and untiled decoding, in 8-bit levels.

    Args:
        vae: the VAE; it uses diffusers' tiling unless it is an AutoencoderLocal.
        image: (1, 3, H, W) in [0, 1], H and W multiples of its spatial factor.
        tile_size: tile size in pixels, for an AutoencoderLocal.
    """
    codec = LatentCodec(vae)
    vae.disable_tiling()
    raw_latents = codec.encode(image)
    whole = codec.decode(raw_latents)
    vae.enable_tiling(**({"tile_size": tile_size} if isinstance(vae, AutoencoderLocal) else {}))
    tiled = codec.decode(raw_latents)
    difference = 255 * (tiled - whole).abs()[0].mean(dim=0)  # (H, W)
    return {
        "mean": difference.mean().item(),
        "worst row": difference.mean(dim=1).max().item(),
        "worst column": difference.mean(dim=0).max().item(),
        "largest": difference.max().item(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", help="an image larger than the VAE's tiles, which are 512 px for Stable Diffusion")
    parser.add_argument("--vae", default=str(embedded_bundle()), metavar="DIR_OR_HUB_ID")
    parser.add_argument("--tile_size", type=int, default=256, help="tile size for the embedded autoencoder")
    options = parser.parse_args(arguments)

    vae = load_vae(options.vae)
    picture = read_pictures(open_image(options.photo).image)[0]
    image = pad_to_multiple(picture.color[None], LatentSpace.of(vae).spatial_factor)
    for name, levels in measure_difference(vae, image, tile_size=options.tile_size).items():
        print(f"{name}: {levels:.3g}")


if __name__ == "__main__":
    main()
