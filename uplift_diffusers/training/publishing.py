"""The model card of a trained model, and its upload to the hub."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.utils.logging import get_logger
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder

from uplift_diffusers._version import __version__
from uplift_diffusers.runtime import device_name
from uplift_diffusers.saving import replaced_when_whole
from uplift_diffusers.training.checkpoints import list_checkpoints, read_settings
from uplift_diffusers.training.config import TrainingConfig
from uplift_diffusers.training.monitoring import METRICS, read_metrics

logger = get_logger(__name__)

PUBLISHED = ["README.md", "config.json", "diffusion_pytorch_model*.safetensors*", METRICS]
"""Files to upload: no checkpoints, and no validation images, which show other people's photographs."""

_NOT_A_RECIPE = {
    "output_dir",
    "report_to",
    "resume_from_checkpoint",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "license",
    "num_photographs",
    "num_processes",
}

_CARD = """
# {title}

{kind} of {parameters:.1f} M parameters, trained with uplift-diffusers for {steps} optimiser steps.

```python
{loading}
```

## Data

{data}.

## Recipe

```
{command}
```

| setting | value |
| --- | --- |
{recipe}

## Metrics

{metrics}

## Hardware

{hardware}

## Licence

{license}
"""


def create_repository(config: TrainingConfig) -> str | None:
    """
    Create the repository for the result, if it is to be uploaded, and return its name.

    Called before training, so a missing permission is found early.
    """
    if not config.push_to_hub:
        return None
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    return create_repo(name, token=config.hub_token, exist_ok=True).repo_id


def publish(
    model: ModelMixin, config: TrainingConfig, *, accelerator: Accelerator, command: str, repository: str | None
) -> None:
    """
    Write the model card of a finished run, and upload the result.

    Args:
        model: the trained model.
        config: the settings it was trained with.
        accelerator: the accelerator of the run.
        command: the command without the flags for `config`.
        repository: from `create_repository`; None for no upload.
    """
    output_dir = Path(config.output_dir)
    card = model_card(model, config, accelerator=accelerator, command=command, repository=repository)
    with replaced_when_whole(output_dir / "README.md") as file:
        file.write(str(card).encode())
    if repository is not None:
        upload_folder(
            repo_id=repository,
            folder_path=output_dir,
            allow_patterns=PUBLISHED,
            commit_message=f"{type(model).__name__} of uplift-diffusers {__version__}",
            token=config.hub_token,
        )
        logger.info(f"Published as {repository}.")


def model_card(
    model: ModelMixin, config: TrainingConfig, *, accelerator: Accelerator, command: str, repository: str | None
) -> ModelCard:
    """The card of a finished run, from its last checkpoint and its log."""
    output_dir = Path(config.output_dir)
    settings, records = read_settings(list_checkpoints(output_dir)[-1]), read_metrics(output_dir)
    recipe = {name: value for name, value in settings.items() if value is not None and name not in _NOT_A_RECIPE}
    source = settings["train_data_dir"] or settings["dataset_name"]
    title = repository or output_dir.resolve().name
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",
        base_model=_hub_id(settings.get("vae")),
        datasets=_hub_id(settings["dataset_name"]),
        license=config.license,
        tags=["uplift-diffusers", "super-resolution"],
    )
    body = _CARD.format(
        title=title.rpartition("/")[2],
        kind=type(model).__name__,
        loading=_loading(model, title),
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        steps=records[-1]["step"],
        data=f"{settings['num_photographs'] or 'Streamed'} photographs of `{_public(source)}`",
        command=" ".join([command, *_flags(config)]),
        recipe="\n".join(f"| {name} | {_public(value)} |" for name, value in recipe.items()),
        metrics=_metrics(records),
        hardware=_hardware(accelerator, settings, records),
        license=config.license
        or "Not declared. Which licence is possible depends on the photographs: fill it in here and above.",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}", ignore_metadata_errors=True)


def _flags(config: TrainingConfig) -> list[str]:
    """The flags that turn the defaults into `config`, without those that do not affect the result."""
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name in _NOT_A_RECIPE - {"output_dir"}:
            continue
        if isinstance(value, bool):
            flags.append(f"--{field.name}" if value else f"--no-{field.name}")
        elif value is not None:
            values = value if isinstance(value, tuple) else (value,)
            flags.append(" ".join([f"--{field.name}", *(str(_public(item)) for item in values)]))
    return flags


def _loading(model: ModelMixin, repository: str) -> str:
    """
    The lines that load `model`: its `loading_lines`, or an import of its class, from its package if that exports it,
    else from its own module, and `from_pretrained`.
    """
    loading_lines = getattr(model, "loading_lines", None)
    if loading_lines is not None:
        return loading_lines()
    module, kind = type(model).__module__, type(model).__name__
    package = module.partition(".")[0]
    place = package if hasattr(importlib.import_module(package), kind) else module
    return f'from {place} import {kind}\n\nmodel = {kind}.from_pretrained("{repository}")'


def _hub_id(name: str | None) -> str | None:
    """`name` if it is a repository on the hub and not a folder on this machine."""
    return None if name is None or Path(name).exists() else name


def _public(value: Any) -> Any:
    """Shorten absolute paths, which describe the machine and not the model, to their last part."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _metrics(records: list[dict[str, float]]) -> str:
    training = next(record for record in reversed(records) if "loss" in record)
    validation = next((record for record in reversed(records) if "loss" not in record), None)
    lines = ["| | |", "| --- | --- |"]
    for record in (training, validation or {}):
        lines += [f"| {name} | {value:.6g} |" for name, value in record.items() if name not in ("step", "lr")]
    lines += ["", "Losses are means over the last logged steps, of the weights in training and not their average."]
    if validation is None:
        lines.append("There was no validation.")
    return "\n".join(lines)


def _hardware(accelerator: Accelerator, settings: dict[str, Any], records: list[dict[str, float]]) -> str:
    images_per_step = (
        settings["train_batch_size"] * settings["gradient_accumulation_steps"] * settings["num_processes"]
    )
    seconds, before = 0.0, 0
    for record in records:
        if "images_per_s" in record:
            seconds += (record["step"] - before) * images_per_step / record["images_per_s"]
            before = record["step"]
    return (
        f"{accelerator.num_processes} x {device_name(accelerator.device)}, {seconds / 3600:.1f} h of training by the "
        f"log; uplift-diffusers {__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"accelerate {accelerate.__version__}."
    )
