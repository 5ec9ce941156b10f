"""Training configurations: frozen, validated, and the only source of the command line's defaults."""

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass


def option(default: typing.Any = dataclasses.MISSING, description: str = "") -> typing.Any:
    """A dataclass field with the sentence that `--help` shows for it."""
    return dataclasses.field(default=default, metadata={"help": description})


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every training run here needs, whatever it trains."""

    train_data_dir: str = option(description="Folder of photographs, searched recursively.")
    output_dir: str = option(description="Where checkpoints, metrics.jsonl and the final model go.")
    seed: int = option(0, "Seed of initialisation, data order, crops and noise.")
    resolution: int = option(256, "Edge of the training crops in pixels.")
    random_crop: bool = option(True, "Random crops and flips; off: the whole picture's centre square, resized.")
    max_reduction: float = option(1.0, "Half of the random crops come from a picture reduced by up to this factor.")
    train_batch_size: int = option(8, "Images per process and micro-step.")
    gradient_accumulation_steps: int = option(1, "Micro-steps per optimiser step.")
    max_train_steps: int = option(10_000, "Optimiser steps.")
    learning_rate: float = option(1e-3, "Peak learning rate of Adam.")
    lr_scheduler: str = option("cosine", "diffusers' schedule: constant, constant_with_warmup, linear, cosine, ...")
    lr_warmup_steps: int = option(200, "Optimiser steps over which the learning rate rises from zero.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    use_ema: bool = option(True, "Keep an exponential moving average of the weights and save it as the result.")
    ema_decay: float = option(0.999, "Largest decay of the moving average (it warms up towards it).")
    mixed_precision: str | None = option(None, "no, bf16 or fp16 (autocast); by default what accelerate is set to.")
    dataloader_num_workers: int = option(0, "Worker processes that read photographs.")
    checkpointing_steps: int = option(500, "Optimiser steps between checkpoints.")
    checkpoints_total_limit: int = option(2, "Checkpoints kept.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint folder, 'latest', or 'if-any'.")
    logging_steps: int = option(50, "Optimiser steps between lines of metrics.jsonl.")
    validation_data_dir: str | None = option(None, "Folder of photographs for validation; none: no validation.")
    validation_steps: int = option(1000, "Optimiser steps between validations.")

    def __post_init__(self):
        for name in (
            "resolution",
            "train_batch_size",
            "gradient_accumulation_steps",
            "max_train_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "logging_steps",
            "validation_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        if self.mixed_precision not in (None, "no", "bf16", "fp16"):
            raise ValueError(f"`mixed_precision` must be no, bf16 or fp16, got {self.mixed_precision!r}.")
        if not self.max_reduction >= 1:
            raise ValueError(f"`max_reduction` must be at least 1, got {self.max_reduction}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), got {self.ema_decay}.")


Config = typing.TypeVar("Config", bound=TrainingConfig)


def parse_config(config_class: type[Config], arguments: list[str] | None = None, *, description: str = "") -> Config:
    """Build `config_class` from command-line flags named after its fields."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        required = field.default is dataclasses.MISSING
        settings: dict[str, typing.Any] = {"help": field.metadata["help"], "required": required}
        if not required:
            settings["default"] = field.default
        parser.add_argument(f"--{field.name}", **settings, **_argument_type(hints[field.name]))
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parser.parse_args(arguments)).items()
    }
    try:
        return config_class(**values)
    except ValueError as error:
        parser.error(str(error))


def _argument_type(hint: typing.Any) -> dict[str, typing.Any]:
    if isinstance(hint, types.UnionType):  # `int | None`
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is tuple:
        return {"type": typing.get_args(hint)[0], "nargs": "+"}
    return {"type": hint}
