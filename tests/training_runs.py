"""Training runs of a few steps with small real parts, here and in processes of their own."""

import json
import multiprocessing
import os
import socket
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from uplift_diffusers import AutoencoderLocal, LatentSpace, UPLiFTModel
from uplift_diffusers.runtime import PATIENCE
from uplift_diffusers.training.losses import MultiDepthObjective
from uplift_diffusers.training.recipes import EmbeddedTrainingConfig
from uplift_diffusers.training.train import make_accelerator, train

SPACE = LatentSpace("test", 8, 8, 1.0)
RESULT = "diffusion_pytorch_model.safetensors"


def make_photographs(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for index in range(5):
        blocks = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        (folder / str(index % 2)).mkdir(exist_ok=True, parents=True)
        blocks.resize((120 + index, 90), Image.BICUBIC).save(folder / str(index % 2) / f"{index}.png")
    return folder


def make_vae(decoder_layers_per_block: tuple[int, int] = (1, 1)) -> AutoencoderLocal:
    torch.manual_seed(0)
    return AutoencoderLocal(
        latent_channels=8,
        block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=decoder_layers_per_block,
        latent_space="test",
    )


def make_model(**settings) -> UPLiFTModel:
    torch.manual_seed(0)
    defaults = {
        "latent_channels": 8,
        "latent_space": "test",
        "encoder_block_out_channels": (8, 8),
        "encoder_patch_size": 4,
        "decoder_channels": 20,
        "refiner_channels": 8,
        "refiner_layers": 1,
        "noise_channels": 2,
    }
    return UPLiFTModel(**{**defaults, **settings})


def make_objective(model: UPLiFTModel, **settings) -> MultiDepthObjective:
    return MultiDepthObjective(
        model, make_vae(), SPACE, **{"depths": (1, 2), "latent_noise": 0.5, "pixel_weight": 1.0, **settings}
    )


def make_config(photographs: Path, output_dir: Path, **settings) -> EmbeddedTrainingConfig:
    return EmbeddedTrainingConfig(
        train_data_dir=str(photographs),
        output_dir=str(output_dir),
        vae="unused",
        **{
            "resolution": 64,
            "train_batch_size": 2,
            "max_train_steps": 6,
            "checkpointing_steps": 2,
            "logging_steps": 1,
            "lr_warmup_steps": 2,
            "mixed_precision": "no",
            **settings,
        },
    )


def run_training(
    photographs: Path, output_dir: Path, *, model: dict | None = None, objective: dict | None = None, **settings
) -> dict[str, torch.Tensor]:
    """Train with `settings` of the configuration; returns the resulting weights."""
    network = make_model(**(model or {}))
    config = make_config(photographs, output_dir, **settings)
    # A process that was launched as one of several makes its accelerator as the command does.
    accelerator = make_accelerator(config) if "RANK" in os.environ else Accelerator(cpu=True)
    if accelerator.num_processes > 1:
        group = torch.distributed.group.WORLD._get_backend(accelerator.device)
        assert group.options._timeout == PATIENCE  # by default accelerate gives NCCL ten minutes, and gloo thirty
    train(network, make_objective(network, **(objective or {})), config, accelerator=accelerator)
    return load_file(output_dir / RESULT)


def logged(output_dir: Path, name: str = "loss") -> list[float]:
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


def start_training(*arguments, environment: dict[str, str] | None = None, **settings) -> multiprocessing.Process:
    """`run_training` in a process of its own, which may be killed; importing torch is done once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run_in_child, args=(environment or {}, arguments, settings))
    process.start()
    return process


def start_distributed_training(num_processes: int, *arguments, **settings) -> list[multiprocessing.Process]:
    """`run_training` as `torchrun` starts it, with the environment that accelerate reads."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        start_training(
            *arguments,
            environment={
                "ACCELERATE_USE_CPU": "true",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_processes),
                "LOCAL_WORLD_SIZE": str(num_processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            **settings,
        )
        for rank in range(num_processes)
    ]


def _run_in_child(environment: dict[str, str], arguments: tuple, settings: dict) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    run_training(*arguments, **settings)
