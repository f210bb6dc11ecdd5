"""Command lines: options, devices, and errors of one line.

A user's mistake becomes one line on standard error that says what is wrong and what to type.  The exit status is 2 if
the command has to change, and 1 if something else has to (a file, the disk, the memory).
"""

import argparse
import signal
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch


class UsageError(ValueError):
    """An invalid command line."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the script's docstring as it is written, and each option's default after its help."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        no_default = action.default in (None, argparse.SUPPRESS, "", []) or action.default is False
        if no_default or "(default" in text:
            return text
        return f"{text} (default: %(default)s)".lstrip()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that accepts no abbreviated options and reports an error in one line, with exit status 2."""

    def __init__(self, **settings):
        module = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "__main__")
        prog = None if "__main__" in module else f"python -m {module}"  # the name of its file would not run
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False, "prog": prog, **settings})

    def error(self, message: str):
        self.exit(2, f"error: {message} ({self.prog} --help shows the options)\n")


def at_least(least: int | float, most: float = 2**40) -> Callable[[str], int | float]:
    """The type of an option that is a finite number of the type of `least`, not below it nor above `most`."""

    def parse(text: str) -> int | float:
        value = type(least)(text)
        if not least <= value <= most:  # nor nan; a seed is multiplied by a million
            raise argparse.ArgumentTypeError(f"must be from {least} to {'2^40' if most == 2**40 else most}, got {text}")
        return value

    parse.__name__ = "whole number" if type(least) is int else "number"  # for argparse's own message
    return parse


class SignalGuard:
    """Notes Ctrl-C and SIGTERM, for a loop to act on between two steps.  The second one acts at once.

    In a thread it does nothing: signals go to the main one.
    """

    def __enter__(self):
        self.stop_requested = False
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self.handlers = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number, frame):
        self.stop_requested = True
        signal.signal(number, self.handlers[number])

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def run(main: Callable[[], object]):
    """Run a script's main().  A user's mistake is printed as one line; with --debug, its traceback is shown, too."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a character shows its code
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        if debug:
            raise
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as e:
        out_of_memory = isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)
        if debug or (isinstance(e, RuntimeError) and not out_of_memory):
            raise
        if out_of_memory:
            peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0
            peak = f", {peak:.1f} GB at the peak" if peak else ""
            e = f"out of memory{peak}. Try a smaller --batch-size, --grad-accum, --block-size or --checkpoint"
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, UsageError) else 1)


# -- Devices -----------------------------------------------------------------------------------------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Device(NamedTuple):
    """Where a model runs, the dtype of its frozen weights, and the reason for that dtype."""

    device: str
    dtype: torch.dtype
    reason: str


def add_device_options(parser: argparse.ArgumentParser):
    """Add --device and --dtype, the arguments of `pick_device`."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="dtype of the frozen weights")


def pick_device(device: str = "auto", dtype: str = "auto") -> Device:
    """The device and dtype to use.  "auto" is the GPU if there is one, and bf16 where the device computes in it.

    Raises UsageError for a device that does not exist.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: this PyTorch sees no CUDA device. Leave the option out to use the CPU")
    try:
        if torch.device(device).type == "cuda":  # not with a tensor: each process of torchrun would put one on GPU 0
            torch.cuda.get_device_properties(device)
        else:
            torch.zeros(1, device=device).item()
    except Exception:  # of many kinds
        raise UsageError(f"--device {device}: there is no such device here. Try cpu, cuda, cuda:1, ...") from None
    if dtype != "auto":
        return Device(device, DTYPES[dtype], "as asked")
    if device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0):
        return Device(device, torch.bfloat16, "this GPU computes in it")
    fast = any(cpu_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    reason = "exact; for a large model --dtype bf16 is faster" if fast else "this processor is slow in bf16"
    return Device(device, torch.float32, reason if device == "cpu" else "exact on every device")


def cpu_capabilities() -> dict:
    """What this processor can do; nothing is known where PyTorch is too old to say."""
    return getattr(torch.cpu, "get_capabilities", dict)()
