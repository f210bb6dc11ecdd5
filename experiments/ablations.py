"""Forms of IAPT that only a table needs, each with one thing changed, and two controls at inference."""

import contextlib

import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from baselines.hooks import IA3
from data import Example
from data.scores import score_examples
from iapt import IAPT, Generator, linear
from model import Block, Config, Decoder, Soft, Tuner


class Joined(IAPT):
    """Soft tokens in the softmax of the words."""

    separate = False


class RandomStart(IAPT):
    """Values and W_up start at random, at a tenth of the keys' scale, not at zero."""

    def start(self, model: Decoder):
        for value in self.values:
            nn.init.normal_(value, std=0.1)
        for generator in self.generators:
            nn.init.normal_(generator.up.weight, std=0.1 * generator.up.in_features**-0.5)


class Unscaled(IAPT):
    """H and Q as they are, not at unit mean square."""

    generator = Generator


class OwnDown(IAPT):
    """Each layer has its own W_down."""

    def __init__(self, config: Config, P: int = 4, m: int = 4, repeat: int = 3):
        super().__init__(config, P, m, repeat)
        for generator in self.generators:
            generator.down = linear(config.n_embd, m, std=config.n_embd**-0.5)


class GeneratedKeys(IAPT):
    """The generator writes keys, too, which are added to the learned ones."""

    def __init__(self, config: Config, P: int = 4, m: int = 4, repeat: int = 3):
        super().__init__(config, P, m, repeat)
        for generator in self.generators:
            generator.up = linear(m, 2 * generator.up.out_features, std=0.0)

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> Soft:
        k, v = self.generators[l](x, instr).repeat(1, self.repeat, 1).chunk(2, -1)
        return Soft(block.attn.heads(self.keys[l] + k), block.attn.heads(self.values[l] + v))


class OneRate(IAPT):
    """Generator, constants and coefficients learn at the same rate, four times that of IAPT's generator by default."""

    groups = Tuner.groups

    def __init__(self, config: Config, P: int = 4, m: int = 4, repeat: int = 3):
        super().__init__(config, P, m, repeat)
        self.lr *= 4


class WithGains(IAPT):
    """Also a learned gain on each output of q, v and up, the same for every instruction.  Its control is repeat=1."""

    def __init__(self, config: Config, P: int = 4, m: int = 4, repeat: int = 3):
        super().__init__(config, P, m, repeat)
        self.ia3 = IA3(config)

    def attach(self, model: Decoder):
        self.ia3.attach(model)

    def detach(self):
        self.ia3.detach()

    def groups(self, lr: float) -> list[dict]:
        weights, constants, coefficients = super().groups(lr)
        gains = {id(p) for p in self.ia3.parameters()}
        weights["params"] = [p for p in weights["params"] if id(p) not in gains]
        constants["params"] += self.ia3.parameters()
        return [weights, constants, coefficients]


ABLATIONS = {
    "joined": Joined,
    "random-start": RandomStart,
    "unscaled": Unscaled,
    "own-down": OwnDown,
    "generated-keys": GeneratedKeys,
    "one-rate": OneRate,
    "with-gains": WithGains,
}


# -- Controls at inference ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def removing(hooks: list[RemovableHandle]):
    """Removes the hooks at the end of the with block."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def swapped_instruction(tuner: Tuner):
    """Every generator reads the instruction of another row of the batch (in a batch of one row, its own)."""

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
