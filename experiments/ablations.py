"""A form of IAPT that only a table needs, and two controls at inference."""

import contextlib

import torch
from torch import Tensor

from data import Example
from data.scores import score_examples
from iapt import IAPT
from model import Block, Decoder, Soft, Tuner


class Blind(IAPT):
    """IAPT that reads nothing: every instruction gets what its generators make of zeros."""

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> Soft:
        return super().kv(block, l, torch.zeros_like(x), instr)


ABLATIONS = {"blind": Blind}


# -- Controls at inference ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def swapped_instruction(tuner: Tuner):
    """Every generator reads the instruction of another row of the batch."""

    def roll(_, inputs):
        return tuple(x.roll(len(x) // 2, 0) for x in inputs)

    hooks = [g.register_forward_pre_hook(roll) for g in tuner.generators]
    yield
    for hook in hooks:
        hook.remove()


@contextlib.contextmanager
def mean_output(tuner: Tuner, model: Decoder, examples: list[Example]):
    """Every generator writes the mean of what it writes for `examples`, whatever the instruction."""
    sums = {g: 0.0 for g in tuner.generators}
    rows = dict.fromkeys(sums, 0)

    def collect(g, inputs, out):
        sums[g] = sums[g] + out.sum(0)
        rows[g] += len(out)

    hooks = [g.register_forward_hook(collect) for g in tuner.generators]
    score_examples(model, examples, tuner)
    for hook in hooks:
        hook.remove()
    hooks = [g.register_forward_hook(lambda g, _, out: (sums[g] / rows[g]).expand_as(out)) for g in tuner.generators]
    yield
    for hook in hooks:
        hook.remove()
