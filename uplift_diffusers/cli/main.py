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


class Interrupts:
    """
    The signals that end a command: Ctrl-C, SIGTERM and SIGHUP. Each raises KeyboardInterrupt while the command runs.

    `received` holds their numbers, as some libraries turn the exception into an error of their own.
    """

    def __init__(self):
        self.received: list[int] = []
        self.is_running = True

    def __call__(self, number, frame) -> None:
        self.received.append(number)
        if self.is_running:
            raise KeyboardInterrupt

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Receive signals in the block, in the main thread only."""
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        if threading.current_thread() is not threading.main_thread():
            numbers = []
        # What is ignored, as SIGHUP under nohup, stays ignored.
        usual = (signal.SIG_DFL, signal.default_int_handler)
        previous = {number: handler for number in numbers if (handler := signal.getsignal(number)) in usual}
        for number in previous:
            signal.signal(number, self)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> int:
    """Run a command line, by default that of the process, and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    interrupts = Interrupts()
    with interrupts.caught():
        try:
            code = _delegate(arguments) if arguments and arguments[0] in DELEGATES else _run(arguments)
            interrupts.is_running = False
        except KeyboardInterrupt:
            interrupts.is_running = False
            code = 128 + signal.SIGINT
        if code and interrupts.received:
            code = 128 + interrupts.received[0]
        if code > 128:
            remove_own_unfinished()
            tell("Interrupted. The outputs written so far are complete.")
        return code


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


def _delegate(arguments: list[str]) -> int:
    name, *arguments = arguments
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
