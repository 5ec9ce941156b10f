"""A cache of latents on disk, to encode the same pixels only once."""

import hashlib
import json
import secrets
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from uplift_diffusers.latent_space import Autoencoder, LatentCodec, LatentSpace
from uplift_diffusers.saving import replaced_when_whole

logger = logging.get_logger(__name__)

SHARD_BYTES = 32 * 2**20
"""Latents are written once there are so many of them. A killed process loses at most these."""


class LatentCache:
    """
    `LatentCodec.encode` with a memory on disk.

    An entry's key is the SHA-256 of its image's pixels. So crops, flips and every level of a pyramid have entries of
    their own, and a photograph that was changed is encoded again. Everything else that latents depend on (the VAE's
    class, configuration and weights, its dtype, the kind of device) chooses a subfolder, so several VAEs may share
    `folder`.

    Entries are written in shards: safetensors files that appear whole. Several processes may use one folder at once;
    if two of them meet the same pixels at the same time, both encode them. Every entry has a SHA-256 that is checked
    when it is read. A damaged shard is named and deleted, and its latents are computed again.

    Use it in a `with` block, which writes the last shard at its end.

    Args:
        folder: created if it does not exist.
        vae: the frozen VAE that encodes.
        space: its latent space.
        shard_bytes: size of a shard.
    """

    def __init__(self, folder: str | Path, vae: Autoencoder, space: LatentSpace, *, shard_bytes: int = SHARD_BYTES):
        self.vae, self.space, self.shard_bytes = vae, space, shard_bytes
        self.num_encoded = 0
        identity = _identity(vae, space)
        self.folder = Path(folder) / _digest(json.dumps(identity, sort_keys=True).encode())[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        with replaced_when_whole(self.folder / "vae.json") as file:
            file.write(json.dumps(identity, indent=2, sort_keys=True).encode())
        self._waiting: dict[str, torch.Tensor] = {}
        self._shards: dict[Path, Any] = {}  # open safetensors files
        self._entries: dict[str, tuple[Path, str]] = {}  # shard and checksum
        self._open_new_shards()

    def __enter__(self) -> "LatentCache":
        return self

    def __exit__(self, *exception) -> None:
        self.flush()

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """
        (B, 3, H, W) in [0, 1] -> raw latents (B, C, h, w). Raises OSError if a shard cannot be written.

        Images are encoded one by one, so that an entry does not depend on the batch that it was first part of.
        """
        keys = _keys(images)
        if any(key not in self._waiting and key not in self._entries for key in keys):
            self._open_new_shards()  # another process may have written it
        found = [self._find(key) for key in keys]
        latents = []
        for index, (key, latent) in enumerate(zip(keys, found)):
            if latent is None:
                latent = LatentCodec(self.vae, self.space).encode(images[index : index + 1])[0].cpu()
                self._waiting[key] = latent
                self.num_encoded += 1
            latents.append(latent)
        if sum(waiting.nbytes for waiting in self._waiting.values()) >= self.shard_bytes:
            self.flush()
        return torch.stack(latents).to(images.device)

    def flush(self) -> None:
        """Write the latents that are not on disk yet as a shard."""
        if not self._waiting:
            return
        checksums = {key: _checksum(latents) for key, latents in self._waiting.items()}
        path = self.folder / f"{secrets.token_hex(8)}.safetensors"
        try:
            with replaced_when_whole(path) as file:
                file.write(save(self._waiting, metadata=checksums))
        except OSError as error:
            raise OSError(f"The latent cache `{self.folder}` cannot be written: {error}") from error
        self._waiting = {}
        self._open_new_shards()

    def _find(self, key: str) -> torch.Tensor | None:
        if key in self._waiting:
            return self._waiting[key]
        if key not in self._entries:
            return None
        path, checksum = self._entries[key]
        try:
            latents = self._shards[path].get_tensor(key)
        except SafetensorError as error:
            return self._drop(path, str(error))
        if _checksum(latents) != checksum:
            return self._drop(path, "a checksum does not match")
        return latents

    def _open_new_shards(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._shards:
                continue
            try:
                shard = safe_open(path, framework="pt")
            except FileNotFoundError:  # damaged, and deleted by another process
                continue
            except SafetensorError as error:
                self._drop(path, str(error))
                continue
            self._shards[path] = shard
            self._entries |= {key: (path, checksum) for key, checksum in (shard.metadata() or {}).items()}

    def _drop(self, path: Path, reason: str) -> None:
        logger.warning(f"`{path}` is damaged ({reason}). It is deleted; its latents are computed again.")
        self._shards.pop(path, None)
        self._entries = {key: entry for key, entry in self._entries.items() if entry[0] != path}
        path.unlink(missing_ok=True)


def _identity(vae: Autoencoder, space: LatentSpace) -> dict[str, Any]:
    """
    What the latents of given pixels depend on.

    The weights are hashed, not their revision: a revision may change other files only.
    """
    weights = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(_bytes(tensor.cpu()))
    # The private entries of the config are the version of diffusers and where the VAE was loaded from.
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    return {
        "class": type(vae).__name__,
        "config": config,
        "weights": weights.hexdigest(),
        "dtype": str(vae.dtype),
        "device": vae.device.type,
        "scaling_factor": space.scaling_factor,
        "shift_factor": space.shift_factor,
    }


def _keys(images: torch.Tensor) -> list[str]:
    pixels = (images * 255).round()
    if torch.equal(pixels / 255, images):  # 8-bit pictures: a quarter of the bytes to hash
        images = pixels.to(torch.uint8)
    return [_checksum(image) for image in images.cpu()]


def _checksum(tensor: torch.Tensor) -> str:
    return _digest(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + _bytes(tensor))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
