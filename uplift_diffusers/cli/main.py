"""`uplift-diffusers COMMAND`: runs a command and turns its errors into one line and an exit code."""

import argparse
import importlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from uplift_diffusers._version import __version__
from uplift_diffusers.cli import features, fetch, upscale
from uplift_diffusers.console import CommandError, Parser, tell
from uplift_diffusers.saving import remove_own_unfinished

PROGRAM = "uplift-diffusers"


@dataclass(frozen=True)
class Delegate:
    """
    A command implemented by a module with its own argument parser.

    Args:
        module: module with a function `main(arguments) -> exit code`; imported only when the command is run.
        purpose: description in `uplift-diffusers --help`.
        extra: the extra that the command needs.
    """

    module: str
    purpose: str
    extra: str


DELEGATES = {
    "train": Delegate("uplift_diffusers.training.train", "train an upsampler for the latents of a VAE", "train"),
    "evaluate": Delegate("uplift_diffusers.evaluation.evaluate", "evaluate upscalers on photographs", "eval"),
    "train-features": Delegate(
        "uplift_diffusers.evaluation.predictive.training", "train an upsampler for a backbone's features", "train"
    ),
    "evaluate-features": Delegate(
        "uplift_diffusers.evaluation.predictive.evaluate", "evaluate upsamplers of a backbone's features", "eval"
    ),
    "demo": Delegate("uplift_diffusers.demo.app", "upscale and generate images in the browser", "demo"),
}


class InterruptedBySignal(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which end a command like Ctrl-C."""

    def __init__(self, number: int):
        super().__init__(number)
        self.exit_code = 128 + number


def main(arguments: list[str] | None = None) -> int:
    """Run a command line, by default that of the process, and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with _signals_interrupt():
        try:
            if arguments and arguments[0] in DELEGATES:
                return _delegate(arguments[0], arguments[1:])
            return _run(arguments)
        except KeyboardInterrupt as interrupt:
            remove_own_unfinished()
            tell("Interrupted. The outputs written so far are complete.")
            return getattr(interrupt, "exit_code", 130)


def _run(arguments: list[str]) -> int:
    parser = _build_parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # after --help, --version and errors in the arguments
        return int(stop.code or 0)
    try:
        return options.run(options)
    except CommandError as error:
        tell(f"{PROGRAM} {options.command}: error: {error}")
        return 2


def _delegate(name: str, arguments: list[str]) -> int:
    command = DELEGATES[name]
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("uplift_diffusers"):
            raise
        tell(f"{PROGRAM} {name}: error: {error.name} is missing: pip install 'uplift-diffusers[{command.extra}]'")
        return 2
    try:
        return module.main(arguments)
    except SystemExit as stop:  # of its parser
        return int(stop.code or 0)


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Upscale images in latent space.",
        epilog=f"See {PROGRAM} COMMAND --help for details.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (upscale, features, fetch):
        module.add_arguments(
            commands.add_parser(
                module.NAME,
                help=module.PURPOSE,
                description=f"{module.PURPOSE.capitalize()}.",
                epilog=module.EPILOG,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
        )
    for name, command in DELEGATES.items():
        commands.add_parser(name, help=command.purpose, add_help=False)
    return parser


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise an exception in the block, like Ctrl-C, so partial files are removed."""

    def interrupt(number, frame):
        raise InterruptedBySignal(number)

    numbers = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    # What is ignored, as SIGHUP under nohup, stays ignored.
    previous = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) == signal.SIG_DFL}
    for number in previous:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
