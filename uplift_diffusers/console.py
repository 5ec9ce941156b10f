"""What all commands share: whole numbers in their arguments, and output in single lines without control characters."""

import argparse
import os
import re
import sys
from contextlib import suppress
from typing import NoReturn

from uplift_diffusers.runtime import MAX_SEED
from uplift_diffusers.wording import MAX_REASON, printable, reason


class CommandError(Exception):
    """A command cannot start, for a reason that the user can fix: one line and the exit code 2."""


def tell(line: str) -> None:
    """Write one line to stderr; errors in doing so are ignored."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(printable(line), file=sys.stderr, flush=True)


def in_one_line(error: BaseException) -> str:
    """All that `error` says, its file names too."""
    return " ".join(str(error).split()) or type(error).__name__


def as_flags(error: BaseException) -> str:
    """The message of a library error, with argument names replaced by command-line flags."""
    return re.sub(r"`([a-z][a-z_]*)`", r"--\1", reason(error))


def say(text: str) -> bool:
    """Write lines to stdout and flush. Returns False, after a message on stderr, if that fails."""
    if sys.stdout is None:  # closed before the start, on purpose
        return True
    try:
        print(text, flush=True)
    except (OSError, ValueError) as error:
        tell(f"uplift-diffusers: standard output cannot be written: {reason(error)}")
        with suppress(OSError, ValueError):  # or the interpreter would try it again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the usage, and does not ignore write errors on stdout."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for argument in args:
            # argparse would take the first for no value at all, and the system takes no name with the second.
            if argument.startswith("--") and argument.endswith("=--"):
                self.error(f"argument {argument.removesuffix('=--')}: expected a value, got '--'")
            if "\0" in argument:
                self.error(f"an argument must not hold a null character, got {argument!r:.80}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        tell(f"{self.prog}: error: {message if len(message) <= MAX_REASON else message[:MAX_REASON] + '...'}")
        self.exit(2)

    def _print_message(self, message: str, file=None) -> None:
        if message and not say(message.removesuffix("\n")):
            self.exit(1)


def parse_count(text: str) -> int:
    """A whole number of at least 1."""
    return _parse_whole_number(text, minimum=1)


def parse_count_or_zero(text: str) -> int:
    """A whole number of at least 0."""
    return _parse_whole_number(text, minimum=0)


def _parse_whole_number(text: str, *, minimum: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) >= minimum):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text!r}")
    return int(text)


def parse_seed(text: str) -> int:
    """A seed for a torch.Generator."""
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= MAX_SEED):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {MAX_SEED}, got {text!r}")
    return int(text)
