"""Every method by its name, with its options as strings.

METHODS                            {name: class}; a new method is a class and an entry here
build(name, config, options)       a tuner
spell_out(name, options)           the options given and all others, as a checkpoint records them
describe_options(name)             what -o help prints
"""

import inspect
import math
from collections.abc import Iterable
from typing import get_args

from baselines.hidden import Summary
from baselines.hooks import IA3, Adapter, Full, LoRA
from baselines.prompts import CaPT, Constants, Dynamic, Mine, PrefixTuning, PromptTuning, PTuning2
from iapt import IAPT, PaperIAPT
from model import Config, Tuner
from plumbing.cli import UsageError

METHODS = {
    "iapt": IAPT,
    "summary": Summary,
    "paper-iapt": PaperIAPT,
    "constants": Constants,
    "ptuning2": PTuning2,
    "prefix": PrefixTuning,
    "prompt": PromptTuning,
    "dynamic": Dynamic,
    "capt": CaPT,
    "lora": LoRA,
    "ia3": IA3,
    "adapter": Adapter,
    "full": Full,
    "mine": Mine,
}


def build(name: str, config: Config, options: Iterable[str] = (), act: str = "all") -> Tuner:
    """A method's tuner, with options such as "P=8", acting on all tokens or on the answer alone.

    Raises UsageError if the method has no such options, or cannot act so.
    """
    cls = method(name, act)
    tuner = cls(config, **parse_options(cls, name, options))
    tuner.act = act
    if tuner.first and act != "all":
        raise UsageError(f"{name}'s option shift=1 is for acting on all tokens: leave --act and --hide-instruction out")
    return tuner


def method(name: str, act: str = "all") -> type[Tuner]:
    """The class of a method.  Raises UsageError, which lists the names, if there is none, or it cannot act so."""
    if name not in METHODS:
        raise UsageError(f"no method {name!r}. There are: {', '.join(METHODS)}")
    if act not in METHODS[name].acts:
        able = ", ".join(other for other, cls in METHODS.items() if act in cls.acts)
        option = "--hide-instruction" if act == "hidden" else f"--act {act}"
        raise UsageError(f"{name} acts on the whole prompt: {option} is for {able}")
    return METHODS[name]


def spell_out(name: str, options: Iterable[str], act: str = "all") -> list[str]:
    """All options of a method as on the command line, those left out with their defaults: defaults may change.

    The option "help" prints what there is, and ends the program.
    """
    cls = method(name, act)
    if "help" in options:
        print(describe_options(name))
        raise SystemExit(0)
    values = {k: p.default for k, p in parameters(cls).items()} | parse_options(cls, name, options)
    return as_options(values)


def as_options(values: dict) -> list[str]:
    """{"P": 8, ...} -> ["P=8", ...]; a switch is 0 or 1."""
    return [f"{k}={int(v) if isinstance(v, bool) else v}" for k, v in values.items()]


def describe_options(name: str) -> str:
    """A method's options with their defaults and choices, under what its class says of itself."""
    cls = method(name)
    lines = [inspect.getdoc(cls), "", "options:"]
    for key, parameter in parameters(cls).items():
        choices = ", ".join(map(str, get_args(parameter.annotation)))
        lines.append(f"  {as_options({key: parameter.default})[0]}{f'    ({choices})' if choices else ''}")
    return "\n".join(lines if parameters(cls) else [*lines[:2], "no options"])


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The constructor's arguments that can be options: those whose default is a number, a word, or yes or no."""
    return {k: p for k, p in inspect.signature(cls).parameters.items() if isinstance(p.default, (int, float, str))}


def parse_options(cls: type, name: str, options: Iterable[str]) -> dict:
    """["P=8", ...] -> {"P": 8}, checked against a class's arguments: names, types of the defaults, choices.

    A whole number is at least 1, or 0 where that is the default; another number is finite and not negative.
    """
    known, values = parameters(cls), {}
    for option in options:
        key, _, text = option.partition("=")
        if key not in known:
            have = ", ".join(as_options({k: p.default for k, p in known.items()})) or "none"
            raise UsageError(f"{name} has no option {key!r}. It has: {have}")
        values[key] = parse_value(text, known[key], f"{name}'s option {key}")
    return values


def parse_value(text: str, parameter: inspect.Parameter, what: str) -> int | float | str | bool:
    """A value of the type of a parameter's default.  Raises UsageError, which begins with `what`."""
    kind, choices = type(parameter.default), get_args(parameter.annotation)
    try:
        value = {"0": False, "1": True}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        wanted = "0 or 1" if kind is bool else "a whole number" if kind is int else "a number"
        raise UsageError(f"{what} takes {wanted}, got {text!r}") from None
    least = min(1, parameter.default) if kind is int else 0
    if kind is int and not least <= value < 2**31:
        raise UsageError(f"{what} must be from {least} to {2**31 - 1}, got {text}")
    if kind is float and not 0 <= value < math.inf:
        raise UsageError(f"{what} must be a finite number of 0 or more, got {text}")
    if choices and value not in choices:
        raise UsageError(f"{what} can be {', '.join(map(str, choices))}; got {text!r}")
    return value
