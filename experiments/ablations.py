"""A form of IAPT that only a table needs, and two controls at inference."""

import contextlib

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

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
def removing(hooks: list[RemovableHandle]):
    """While it lasts, hooks act."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def swapped_instruction(tuner: Tuner):
    """Every generator reads the instruction of another row of the batch."""

    def roll(_, inputs):
        return tuple(x.roll(len(x) // 2, 0) for x in inputs)

    with removing([g.register_forward_pre_hook(roll) for g in tuner.generators]):
        yield


@contextlib.contextmanager
def mean_output(tuner: Tuner, model: Decoder, examples: list[Example]):
    """Every generator writes the mean of what it writes for `examples`, whatever the instruction."""
    sums = {g: 0.0 for g in tuner.generators}
    rows = dict.fromkeys(sums, 0)

    def collect(g, inputs, out):
        sums[g] = sums[g] + out.sum(0)
        rows[g] += len(out)

    def replace(g, inputs, out):
        return (sums[g] / rows[g]).expand_as(out)

    with removing([g.register_forward_hook(collect) for g in tuner.generators]):
        score_examples(model, examples, tuner)
    with removing([g.register_forward_hook(replace) for g in tuner.generators]):
        yield
