"""What the scripts' command lines share: how they are read, and how they fail.

A user's mistake is one line on standard error that says what is wrong and what to type.  The exit status is 2 if it is
the command that has to change, 1 if it is something else (a file, the disk, the memory).
"""

import argparse
import sys
from collections.abc import Callable

import torch


class UsageError(ValueError):
    """The command asks for what there is not."""


class Parser(argparse.ArgumentParser):
    """A parser that shows a script's docstring as it stands, wants options in full, and keeps an error to one line."""

    def __init__(self, **how):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **how})

    def error(self, message: str):
        """One line, and exit status 2."""
        self.exit(2, f"error: {message} ({self.prog} --help shows the options)\n")


def run(main: Callable[[], object]):
    """Run a script's main: a user's mistake is one line; with --debug on the command line its traceback, too."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as e:
        memory = isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)
        if debug or (isinstance(e, RuntimeError) and not memory):
            raise
        if memory:
            peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0
            peak = f", {peak:.1f} GB at the peak" if peak else ""
            e = f"out of memory{peak}. Try a smaller --batch-size, --grad-accum, --block-size or --checkpoint"
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, UsageError) else 1)
