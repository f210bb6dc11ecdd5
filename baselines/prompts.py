"""Methods that add soft tokens, behind the same interface as IAPT (`Tuner` in model.py).

    PTuning2       learned keys and values at each layer
    Constants      the same in a softmax of their own: IAPT without its generator
    PrefixTuning   the same, made by an MLP
    PromptTuning   learned rows before the embeddings
    Dynamic        learned rows whose place, number and mixture depend on the instruction
    CaPT           a learned vector plus the instruction's mean state, at each layer
    Mine           the example to fork: a projection of the instruction's mean state, at each layer

Letters for shapes are those of model.py.
"""

from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from baselines.embedded import Embedded, EmbeddedTuner
from model import Block, Config, Decoder, Soft, Tuner


def split_kv(s: Tensor, head_dim: int) -> Soft:
    """(B, P, 2 G D) -> keys and values (B, G, P, D)."""
    k, v = s.unflatten(-1, (2, -1, head_dim)).permute(2, 0, 3, 1, 4)
    return Soft(k, v)


class PTuning2(Tuner):
    """P-tuning v2 (arXiv 2110.07602): P learned keys and values at every layer, the same for every instruction.

    Without the reparametrising MLP, which the paper found to help on some tasks only.  2 G D P L parameters.  With
    shift=1 the words' positions begin at P, as in the package peft.
    """

    lr = 5e-2

    def __init__(self, config: Config, P: int = 16, shift: bool = False):
        super().__init__()
        self.head_dim, self.first = config.head_dim, P * shift
        out = 2 * config.n_kv_head * config.head_dim
        self.constants = nn.ParameterList(0.1 * torch.randn(P, out) for _ in range(config.n_layer))

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> Soft:
        return split_kv(self.constants[l].expand(len(x), -1, -1), self.head_dim)


class Constants(Tuner):
    """IAPT without its generator: P learned keys and values, with its softmax, start and rate.

    The control for what reading the instruction is worth.  2 G D P L parameters.
    """

    separate = True

    def __init__(self, config: Config, P: int = 16):
        super().__init__()
        out = config.n_kv_head * config.head_dim
        self.keys = nn.ParameterList(torch.randn(P, out) for _ in range(config.n_layer))
        self.values = nn.ParameterList(torch.zeros(P, out) for _ in range(config.n_layer))
        self.lr = 8.0 / config.n_embd

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> Soft:
        return Soft(*(block.attn.heads(s.expand(len(x), -1, -1)) for s in (self.keys[l], self.values[l])))


class PrefixTuning(Tuner):
    """Prefix-tuning (arXiv 2101.00190): keys and values at every layer, made from P embeddings by an MLP.

    Embedding (P, C) -> Linear(C, hidden) -> tanh -> Linear(hidden, L 2 G D), of which each layer takes its part.  The
    paper found training the keys and values themselves unstable.
    """

    lr = 5e-3

    def __init__(self, config: Config, P: int = 10, hidden: int = 512):
        super().__init__()
        self.head_dim = config.head_dim
        out = 2 * config.n_kv_head * config.head_dim
        self.tokens = nn.Parameter(torch.randn(P, config.n_embd))
        self.down = nn.Linear(config.n_embd, hidden)
        self.up = nn.ModuleList(nn.Linear(hidden, out) for _ in range(config.n_layer))

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> Soft:
        constants = self.up[l](self.down(self.tokens).tanh())  # (P, 2 G D)
        return split_kv(constants.expand(len(x), -1, -1), self.head_dim)


class PromptTuning(EmbeddedTuner):
    """Prompt tuning (arXiv 2104.08691): P learned rows before the input embeddings.  C P parameters.

    With shift=1 they take positions, and the words' begin at P, as in the package peft.
    """

    lr = 1e-2

    def __init__(self, config: Config, P: int = 20, shift: bool = False):
        super().__init__()
        self.first = P * shift
        self.rows = nn.Parameter(torch.zeros(P, config.n_embd))

    def start(self, model: Decoder):
        start_as_tokens(self.rows, model)

    def embed(self, x: Tensor, instr: Tensor) -> Embedded:
        B, T, _ = x.shape
        P = len(self.rows)
        at = torch.arange(P, P + T, device=x.device).expand(B, T)
        return Embedded(torch.cat((self.rows.to(x.dtype).expand(B, -1, -1), x), 1), at, at.new_full((B,), P))


@torch.no_grad()
def start_as_tokens(rows: Tensor, model: Decoder):
    """Set rows (.., C) to the embeddings of random tokens: the best start that arXiv 2104.08691 found."""
    rows.copy_(model.wte.weight[torch.randint(len(model.wte.weight), rows.shape[:-1])])


def mean_state(x: Tensor, instr: Tensor) -> Tensor:
    """The mean of x (B, T, C) over the instruction, each state scaled to unit mean square: (B, C), in fp32.

    In a real LLaMA the first token's state is some hundred times as long as the others: unscaled, the mean is that one.
    """
    weights = instr / instr.sum(1, keepdim=True)
    return (F.rms_norm(x.float(), x.shape[-1:]) * weights[..., None]).sum(1)


Position = Literal["before", "task", "instance"]


class Dynamic(EmbeddedTuner):
    """Dynamic prompting (arXiv 2303.02909): where P soft tokens stand, how many, and which, is learned.

        position   the first i stand before the instruction, the others after it.  before: i = P;  task: the logits
                   of i are learned;  instance: they are a linear function of the instruction's mean embedding
        length     1: how many of the P there are is a choice, too, by instance; the others are masked
        pool       this many prompts, mixed by instance

    The choices of i and of the length are Gumbel-softmax draws in training (one-hot forward, soft backward; the
    temperature falls from 1 to 1/2), and the most likely ones afterwards.
    """

    lr = 1e-2

    def __init__(self, config: Config, P: int = 10, position: Position = "instance", length: bool = False,
                 pool: int = 1):  # fmt: skip
        super().__init__()
        C = config.n_embd
        self.rows = nn.Parameter(torch.zeros(pool, P, C))
        self.mix = nn.Linear(C, pool) if pool > 1 else None
        self.count = nn.Linear(C, P + 1) if length else None
        self.split = nn.Linear(C, P + 1) if position == "instance" else None
        self.logits = nn.Parameter(torch.zeros(P + 1)) if position == "task" else None
        self.register_buffer("tau", torch.tensor(1.0), persistent=False)

    def start(self, model: Decoder):
        start_as_tokens(self.rows, model)

    def progress(self, done: float):
        self.tau.fill_(1 - done / 2)

    def choose(self, logits: Tensor) -> Tensor:
        """One of the n choices in each row of logits (.., n), one-hot: drawn in training, else the most likely."""
        if self.training:
            return F.gumbel_softmax(logits, self.tau, hard=True)
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)

    def embed(self, x: Tensor, instr: Tensor) -> Embedded:
        (B, T, _), P = x.shape, self.rows.shape[1]
        mean = mean_state(x, instr)  # (B, C)
        soft = self.rows[0].expand(B, -1, -1)
        if self.mix is not None:
            soft = torch.einsum("bk,kpc->bpc", self.mix(mean).softmax(-1), self.rows)
        n = torch.full((B, 1), P, device=x.device)
        if self.count is not None:
            count = self.choose(self.count(mean))  # (B, P+1), one-hot
            n = count.argmax(-1, keepdim=True)
            soft = soft * (1 - count.cumsum(-1))[:, :P, None]
        if self.split is None and self.logits is None:
            split = F.one_hot(n[:, 0], P + 1).to(soft.dtype)
        else:
            split = self.choose(self.logits.expand(B, -1) if self.split is None else self.split(mean))  # (B, P+1)
        index, first = layouts(P, T, n, instr)
        # All P+1 layouts are built, so that the choice among them gets a gradient.
        every = torch.cat((soft.to(x.dtype), x), 1)[torch.arange(B, device=x.device)[:, None, None], index]
        first = first.gather(1, split.argmax(-1, keepdim=True))  # (B, 1)
        at = torch.arange(T, device=x.device) + torch.where(instr, first, n)
        return Embedded(torch.einsum("bi,bitc->btc", split.to(x.dtype), every), at, n[:, 0])


def layouts(P: int, T: int, n: Tensor, instr: Tensor) -> tuple[Tensor, Tensor]:
    """The P+1 ways to place n (B, 1) of P soft tokens around the instruction among T tokens.

    Layout i: min(i, n) soft tokens, the instruction, the other soft tokens, the rest, the P - n unused ones.
    Returns indices (B, P+1, P+T) into soft tokens followed by tokens, and where the instruction begins (B, P+1).
    """
    first = torch.arange(P + 1, device=n.device).minimum(n)[..., None]  # (B, P+1, 1)
    n, t = n[..., None], instr.sum(1)[:, None, None]
    place = torch.arange(P + T, device=n.device)
    token, soft = P + place - first, place - t  # the instruction, and the soft tokens behind it
    index = torch.where(place < first, place, torch.where(place < first + t, token, soft))
    index = torch.where(place >= n + t, P + place - n, index)  # the rest
    return torch.where(place >= n + T, place - T, index), first[..., 0]


class CaPT(Tuner):
    """CaPT (arXiv 2510.16670): a learned vector plus the instruction's mean state, at every layer.

    One soft token a layer, no generator: C L parameters.  (The paper has P = 1 only.)
    """

    lr = 5e-2

    def __init__(self, config: Config, P: int = 1):
        super().__init__()
        self.p = nn.ParameterList(0.1 * torch.randn(P, config.n_embd) for _ in range(config.n_layer))

    def soft_tokens(self, l: int, x: Tensor, instr: Tensor) -> Tensor:
        return self.p[l] + mean_state(x, instr)[:, None]  # (P, C) + (B, 1, C)


class Mine(Tuner):
    """Fork me: soft tokens that are a linear function of the instruction's mean hidden state."""

    def __init__(self, config, P: int = 4):
        super().__init__()
        self.P = P
        self.to_soft = nn.ModuleList(nn.Linear(config.n_embd, P * config.n_embd) for _ in range(config.n_layer))

    def soft_tokens(self, l, x, instr):
        mean = mean_state(x, instr)  # (B, T, C) -> (B, C)
        return self.to_soft[l](mean).unflatten(-1, (self.P, -1))  # (B, P, C)
