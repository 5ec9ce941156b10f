"""What the commands say, and how: one line each, without anything that a terminal obeys."""

import argparse
import os
import re
import sys
from contextlib import suppress

from uplift_diffusers.wording import printable, reason


class CommandError(Exception):
    """What keeps a command from beginning and a person can put right: one line and the exit code 2."""


def tell(line: str) -> None:
    """One line on stderr. There is nowhere to tell that it cannot be written."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(printable(line), file=sys.stderr, flush=True)


def as_flags(error: BaseException) -> str:
    """The sentence of an error of the library, with its arguments named as those of the command line."""
    return re.sub(r"`([a-z][a-z_]*)`", r"--\1", reason(error))


def say(text: str) -> bool:
    """Lines on stdout, at once. Returns whether they could be written; if not, that is told."""
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
    """Says what is wrong in one line, without the usage before it, and does not pass over a stdout that is full."""

    def error(self, message: str) -> None:
        tell(f"{self.prog}: error: {message}")
        self.exit(2)

    def _print_message(self, message: str, file=None) -> None:
        if message and not say(message.removesuffix("\n")):
            self.exit(1)
