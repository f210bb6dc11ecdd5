"""Forms that only a table needs, each with one thing changed, a rival from elsewhere, and two controls at inference."""

import contextlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from baselines.hidden import Summary, SummaryGenerator
from baselines.hooks import LoRA
from data import Example
from data.scores import score_examples
from iapt import IAPT, Activation, PaperGenerator, PaperIAPT
from model import Block, Config, Context, Decoder, Soft, Tuner, rotary, rotate


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
        unshare(self)


def unshare(tuner: IAPT):
    """Give each generator a W_down of its own."""
    for generator in tuner.generators:
        generator.W_down = nn.Parameter(torch.randn_like(generator.W_down) * len(generator.W_down) ** -0.5)


class PaperRandomStart(PaperIAPT):
    """The paper's form, with a W_up that starts at random."""

    def start(self, model: Decoder):
        pass


# -- Where the instruction is hidden -----------------------------------------------------------------------------------


class FixedParts(Summary):
    """The averages are those of the start: where a soft token reads is not learned."""

    class generator(SummaryGenerator):
        def attention(self, Z: Tensor, instr: Tensor) -> Tensor:
            return super().attention(torch.zeros_like(Z), instr)


class Uncorrected(Summary):
    """Averages alone: nothing is added to them."""

    def soft(self, block: Block, l: int, x: Tensor, A: Tensor, S: Tensor) -> Soft:
        return super().soft(block, l, x, A, torch.zeros_like(S))


class Unplaced(Summary):
    """Soft tokens stand at position 0, not among the words that they are averages of."""

    def position(self, A: Tensor) -> Tensor:
        return super().position(A) * 0


class OwnDownSummary(Summary):
    """Each layer has its own W_down."""

    def __init__(self, config: Config, P: int = 4, m: int = 0, activation: Activation = "rational"):
        super().__init__(config, P, m, activation)
        unshare(self)


class Compressor(LoRA):
    """P learned tokens behind the instruction, and a LoRA, read it together: the tokens' keys and values are kept.

    As in 500xCompressor (arXiv 2408.03094), where LoRA acts while the instruction is read, and at no other time.
    """

    silent = Tuner.silent  # it is muted but for `write`

    def __init__(self, config: Config, P: int = 4, r: int = 7, alpha: float = 16.0, on: str = "q,v"):
        super().__init__(config, r, alpha, on)
        self.config, self.muted = config, True
        self.tokens = nn.Parameter(torch.randn(P, config.n_embd) * 0.02)

    def start(self, model: Decoder):
        words = model.wte.weight.float()
        self.tokens.data = words[torch.randint(len(words), (len(self.tokens),))].to(self.tokens.device)

    def write(self, model: Decoder, states: list[Tensor], instr: Tensor) -> list[Context]:
        x, P, length = states[0], len(self.tokens), instr.sum(1, keepdim=True)
        behind = (length + torch.arange(P, device=x.device))[..., None].expand(-1, -1, x.shape[2])  # (B, P, C)
        x = F.pad(x, (0, 0, 0, P)).scatter(1, behind, self.tokens.to(x.dtype).expand(len(x), -1, -1))
        place = torch.arange(x.shape[1], device=x.device)
        rope, among = (rotary(self.config, at) if self.config.arch == "llama" else None
                       for at in (place, (torch.arange(P, device=x.device) + 0.5) * length / P))  # fmt: skip
        contexts, self.muted = [], False
        for block in model.h:
            soft = block.soft_kv(x.gather(1, behind))
            contexts.append(self.place(Soft(rotate(soft.k, among if block.attn.turns else None), soft.v), x.dtype))
            x, _, _ = block(x, rope)
        self.muted = True
        return contexts


ABLATIONS = {
    "joined": Joined,
    "random-start": RandomStart,
    "unscaled": Unscaled,
    "own-down": OwnDown,
    "paper-random-start": PaperRandomStart,
}
HIDDEN = {  # for an instruction that is hidden
    "summary-fixed-parts": FixedParts,
    "summary-uncorrected": Uncorrected,
    "summary-unplaced": Unplaced,
    "summary-own-down": OwnDownSummary,
    "compressor": Compressor,
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
