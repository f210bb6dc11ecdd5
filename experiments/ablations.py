"""Forms of IAPT that only a table needs, and two controls at inference."""

import contextlib

import torch
import torch.nn as nn
from torch import Tensor

from data import Example
from data.scores import score_examples
from iapt import IAPT
from model import Block, Config, Decoder, Soft, Tuner


class Constants(Tuner):
    """IAPT without its generator: P learned keys and values, with its softmax, start and rate.  2 P G D L in all."""

    separate = True

    def __init__(self, config: Config, P: int = 16):
        super().__init__()
        out = config.n_kv_head * config.head_dim
        self.keys = nn.ParameterList(torch.randn(P, out) for _ in range(config.n_layer))
        self.values = nn.ParameterList(torch.zeros(P, out) for _ in range(config.n_layer))
        self.lr = 8.0 / config.n_embd

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> Soft:
        return Soft(*(block.attn.heads(s.expand(len(x), -1, -1)) for s in (self.keys[l], self.values[l])))


class Blind(IAPT):
    """IAPT that reads nothing: every instruction gets what its generators make of zeros."""

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> Soft:
        return super().kv(block, l, torch.zeros_like(x), instr)


ABLATIONS = {"constants": Constants, "blind": Blind}


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
