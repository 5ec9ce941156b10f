"""Training configurations: frozen, validated, and the only source of the command line's defaults."""

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from diffusers import ModelMixin
from diffusers.optimization import SchedulerType
from torch import nn

from uplift_diffusers.console import Parser
from uplift_diffusers.data.dataset import Crop, CropFunction

if typing.TYPE_CHECKING:
    from uplift_diffusers.training.monitoring import Validation

PRECISIONS = ("auto", "no", "bf16", "fp16")


@dataclass(frozen=True)
class Task:
    """
    The model and objective of a training run.

    Args:
        model: the network that is trained, averaged and saved.
        objective: contains `model`; `objective(images, generator=)` with images (B, 3, R, R) in [0, 1] returns a dict
            of scalars with a differentiable `loss`.
        fit: called before the first step of a new run with (N, 3, R, R) in [0, 1], to set parameters that have a
            closed-form solution.
        fit_crops: N.
        validate: measures `model`.
    """

    model: ModelMixin
    objective: nn.Module
    fit: Callable[[torch.Tensor], None] | None = None
    fit_crops: int = 200
    validate: Callable[[], "Validation"] | None = None


def option(default: typing.Any = dataclasses.MISSING, description: str = "") -> typing.Any:
    """A dataclass field with its `--help` text; by default that of the parent class."""
    return dataclasses.field(default=default, metadata={"help": description})


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The settings common to all training runs."""

    train_data_dir: str | None = option(None, "Folder of photographs, searched recursively; a .tar file or 'a/*.tar'.")
    dataset_name: str | None = option(None, "Instead of train_data_dir: a Hugging Face dataset, or a folder with one.")
    dataset_config_name: str | None = option(None, "Configuration of the dataset, if it has several.")
    image_column: str = option("image", "The dataset's column with images.")
    streaming: bool = option(False, "Download the dataset while training, instead of storing it first.")
    output_dir: str = option(description="Folder for checkpoints, metrics.jsonl and the final model.")
    seed: int = option(0, "Seed of initialisation, data order, crops and noise.")
    resolution: int = option(256, "Edge of the training crops in pixels.")
    random_crop: bool = option(True, "Random crops and flips; off: the centre square, resized.")
    max_reduction: float = option(1.0, "Half of the random crops come from an image downsampled by up to this factor.")
    augment_flip: bool = option(False, "Flip half of the centre squares (random crops are always flipped).")
    train_batch_size: int = option(8, "Images per process and micro-step.")
    gradient_accumulation_steps: int = option(1, "Micro-steps per optimiser step.")
    max_train_steps: int | None = option(10_000, "Optimiser steps.")
    num_train_epochs: int | None = option(None, "Passes over the photographs, instead of max_train_steps.")
    learning_rate: float = option(1e-3, "Peak learning rate of Adam.")
    adam_beta2: float = option(0.999, "Adam's decay of the squared gradients.")
    lr_scheduler: str = option("cosine", "diffusers' schedule: constant, constant_with_warmup, linear, cosine, ...")
    lr_warmup_steps: int = option(200, "Optimiser steps over which the learning rate rises from zero.")
    lr_floor: float = option(0.0, "Share of the peak learning rate at which the cosine schedule ends.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    use_ema: bool = option(True, "Keep an exponential moving average of the weights and save it as the result.")
    ema_decay: float = option(0.999, "Largest decay of the moving average (it warms up towards it).")
    mixed_precision: str = option("auto", "Autocast: no, bf16, fp16, or auto: the fastest on this machine.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    dataloader_num_workers: int = option(0, "Worker processes that read photographs.")
    checkpointing_steps: int = option(500, "Optimiser steps between checkpoints.")
    checkpoints_total_limit: int = option(2, "Checkpoints kept.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint folder, 'latest', or 'if-any'.")
    logging_steps: int = option(50, "Optimiser steps between lines of metrics.jsonl.")
    report_to: str = option(
        "none", "tensorboard (below output_dir/logs), wandb or none; metrics.jsonl is always written."
    )
    validation_data_dir: str | None = option(None, "Folder of photographs for validation; none: no validation.")
    validation_steps: int | None = option(1000, "Optimiser steps between validations.")
    validation_epochs: int | None = option(None, "Epochs between validations, instead of validation_steps.")
    push_to_hub: bool = option(False, "Upload the result to the Hugging Face hub.")
    hub_model_id: str | None = option(None, "Repository of the result on the hub; by default the name of output_dir.")
    hub_token: str | None = option(None, "Access token of the hub; by default the one that `hf auth login` stored.")
    license: str | None = option(
        None, "Licence of the trained weights, for the model card: apache-2.0, cc-by-4.0, ..."
    )

    def __post_init__(self):
        for name in (
            "resolution",
            "train_batch_size",
            "gradient_accumulation_steps",
            "max_train_steps",
            "num_train_epochs",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "logging_steps",
            "validation_steps",
            "validation_epochs",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("Either `train_data_dir` or `dataset_name` must be given.")
        if self.streaming and self.dataset_name is None:
            raise ValueError(
                "`streaming` must be off without `dataset_name`: a folder and tar files are read in place."
            )
        if self.streaming and self.dataloader_num_workers > 0:
            raise ValueError(
                f"`dataloader_num_workers` must be 0 with `streaming`, got {self.dataloader_num_workers}: "
                "`datasets` shuffles a stream in another order in worker processes."
            )
        if self.streaming and None in (self.max_train_steps, self.validation_steps):
            raise ValueError("`streaming` must be used with steps, not epochs: the length of a stream is not known.")
        for steps, epochs in STEPS_OR_EPOCHS.items():
            if getattr(self, steps) is None and getattr(self, epochs) is None:
                raise ValueError(f"`{steps}` or `{epochs}` must be given.")
        for name in ("lr_warmup_steps", "dataloader_num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(
                f"`mixed_precision` must be one of {', '.join(PRECISIONS)}, got {self.mixed_precision!r}."
            )
        if self.report_to not in ("tensorboard", "wandb", "none"):
            raise ValueError(f"`report_to` must be tensorboard, wandb or none, got {self.report_to!r}.")
        # All but the one that takes rules of its own.
        schedules = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]
        if self.lr_scheduler not in schedules:
            raise ValueError(f"`lr_scheduler` must be one of {', '.join(schedules)}, got {self.lr_scheduler!r}.")
        if not self.max_reduction >= 1:
            raise ValueError(f"`max_reduction` must be at least 1, got {self.max_reduction}.")
        for name in ("ema_decay", "adam_beta2", "lr_floor"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        if self.lr_floor and self.lr_scheduler != "cosine":
            raise ValueError(f"`lr_floor` must be 0 unless `lr_scheduler` is cosine, got {self.lr_floor}.")

    def make_crop(self) -> CropFunction:
        """The function that crops training squares: (image, epoch, index) -> (3, R, R) uint8."""
        return Crop(
            resolution=self.resolution,
            random_crop=self.random_crop,
            max_reduction=self.max_reduction,
            augment_flip=self.augment_flip,
            seed=self.seed,
        )

    def open_task(self, device: torch.device) -> AbstractContextManager[Task]:
        """The task that these settings describe, on `device`, for the duration of a `with` block."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it trains.")


STEPS_OR_EPOCHS = {"max_train_steps": "num_train_epochs", "validation_steps": "validation_epochs"}
"""Giving one of a pair drops the default of the other. Steps take precedence if both are given."""

Config = typing.TypeVar("Config", bound=TrainingConfig)


def parse_config(
    config_class: type[Config],
    arguments: list[str] | None = None,
    *,
    settings: Mapping[str, typing.Any] | None = None,
    description: str = "",
) -> Config:
    """
    Build `config_class` from command-line flags named after its fields; they override `settings`.

    Args:
        config_class: a dataclass of `option` fields.
        arguments: the flags; by default those of this process.
        settings: values by field name, as in a YAML file; by default those of the --config file.
        description: first paragraph of `--help`.
    """
    if settings is None:
        settings, arguments = take_config_file(arguments)
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", default=argparse.SUPPRESS, help="YAML file of these settings. Flags override it.")
    hints = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for name, field in fields.items():
        help_text = _description(config_class, name)
        if field.default is not dataclasses.MISSING:
            help_text += f" (default: {field.default})"
        required = field.default is dataclasses.MISSING and name not in settings
        parser.add_argument(
            f"--{name}", default=argparse.SUPPRESS, required=required, help=help_text, **_argument_type(hints[name])
        )
    from_file = []
    for name, value in settings.items():
        if name not in fields:
            parser.error(f"there is no setting `{name}`.{_nearest(name, fields)}")
        try:
            from_file += _as_flags(name, value, is_switch=hints[name] is bool)
        except ValueError as error:
            parser.error(str(error))
    known, unknown = parser.parse_known_args([*from_file, *(sys.argv[1:] if arguments is None else arguments)])
    if unknown:
        name = unknown[0].partition("=")[0].removeprefix("--")
        hint = _nearest(name, fields) if unknown[0].startswith("--") else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}.{hint}")
    values: dict[str, typing.Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(known).items()
    }
    for pair in STEPS_OR_EPOCHS.items():
        for given, other in (pair, pair[::-1]):
            if given in values and other not in values:
                values[other] = None
    try:
        return config_class(**values)
    except ValueError as error:
        parser.error(str(error))


def parse_choices(
    choices: Mapping[str, tuple[str, ...]], arguments: list[str] | None = None
) -> tuple[dict[str, str], dict[str, typing.Any], list[str]]:
    """
    Read the flags that select a configuration, from the command line or the --config file.

    Args:
        choices: allowed values by flag; the first one is the default.
        arguments: the flags; by default those of this process.
    Returns:
        The choices made, and the other settings of the file and the other flags, for `parse_config`.
    """
    settings, arguments = take_config_file(arguments)
    parser = Parser(add_help=False, allow_abbrev=False)
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0])
    from_file = [f"--{name}={settings.pop(name)}" for name in choices if name in settings]
    known, rest = parser.parse_known_args([*from_file, *arguments])
    return vars(known), settings, rest


def take_config_file(arguments: list[str] | None = None) -> tuple[dict[str, typing.Any], list[str]]:
    """
    The contents of the --config YAML file, and the other arguments.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a mapping in YAML.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(arguments)
    if known.config is None:
        return {}, rest
    try:
        settings = yaml.safe_load(Path(known.config).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`{known.config}` is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"`{known.config}` must have lines such as `resolution: 512`, got {settings!r:.60}.")
    return {str(name): value for name, value in settings.items()}, rest


def _as_flags(name: str, value: typing.Any, *, is_switch: bool) -> list[str]:
    """The flags for a line of a YAML file, so argparse checks both in the same way."""
    if is_switch:
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` must be true or false, got {value!r}.")
        return [f"--{name}" if value else f"--no-{name}"]
    if value is None or isinstance(value, (bool, dict)):
        raise ValueError(f"`{name}` must have a value, got {value!r}. Leave the line out to keep the default.")
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean `{matches[0]}`?" if matches else ""


def _description(config_class: type[TrainingConfig], name: str) -> str:
    fields = (base.__dict__.get("__dataclass_fields__", {}).get(name) for base in config_class.__mro__)
    return next((field.metadata["help"] for field in fields if field is not None and field.metadata["help"]), "")


def _argument_type(hint: typing.Any) -> dict[str, typing.Any]:
    if isinstance(hint, types.UnionType):  # `int | None`
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is tuple:
        return {"type": typing.get_args(hint)[0], "nargs": "+"}
    return {"type": hint}
