"""Forms of IAPT that only a table needs, each with one thing changed, and two controls at inference."""

import contextlib

import torch
import torch.nn as nn

from data import Example
from data.scores import score_examples
from iapt import IAPT, PaperGenerator, PaperIAPT
from model import Config, Decoder, Tuner


class Joined(IAPT):
    """Soft tokens in the softmax of the words."""

    separate = False


class RandomStart(IAPT):
    """Values and W_up start at random, at a tenth of the keys' scale, not at zero."""

    def start(self, model: Decoder):
        for value in self.values:
            nn.init.normal_(value, std=0.1)
        for generator in self.generators:
            nn.init.normal_(generator.W_up, std=0.1 * len(generator.W_up) ** -0.5)


class Unscaled(IAPT):
    """H and Q as they are, not at unit mean square."""

    generator = PaperGenerator


class OwnDown(IAPT):
    """Each layer has its own W_down."""

    def __init__(self, config: Config, P: int = 4, m: int = 4, repeat: int = 3):
        super().__init__(config, P, m, repeat)
        for generator in self.generators:
            generator.W_down = nn.Parameter(torch.randn(config.n_embd, m) * config.n_embd**-0.5)


class PaperRandomStart(PaperIAPT):
    """The paper's form, with a W_up that starts at random."""

    def start(self, model: Decoder):
        pass


ABLATIONS = {
    "joined": Joined,
    "random-start": RandomStart,
    "unscaled": Unscaled,
    "own-down": OwnDown,
    "paper-random-start": PaperRandomStart,
}


# -- Controls at inference ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def swapped_instruction(tuner: Tuner):
    """Every generator reads the instruction of another row of the batch (in a batch of one row, its own)."""

    def roll(_, inputs):
        return tuple(x.roll(len(x) // 2, 0) for x in inputs)

    with contextlib.ExitStack() as hooks:  # removes them at its end
        for g in tuner.generators:
            hooks.enter_context(g.register_forward_pre_hook(roll))
        yield


@contextlib.contextmanager
def mean_output(tuner: Tuner, model: Decoder, examples: list[Example]):
    """Every generator writes the mean of what it writes for `examples`, whatever the instruction."""
    sums = {g: 0.0 for g in tuner.generators}
    rows = dict.fromkeys(sums, 0)

    def collect(g, inputs, out):
        sums[g] = sums[g] + out[1].sum(0)
        rows[g] += len(out[1])

    def replace(g, inputs, out):
        return out[0], (sums[g] / rows[g]).expand_as(out[1])

    with contextlib.ExitStack() as hooks:
        for g in tuner.generators:
            hooks.enter_context(g.register_forward_hook(collect))
        score_examples(model, examples, tuner)
    with contextlib.ExitStack() as hooks:
        for g in tuner.generators:
            hooks.enter_context(g.register_forward_hook(replace))
        yield
