"""Methods that add soft tokens, behind the same interface as IAPT (`Tuner` in model.py).

    PTuning2       learned keys and values at each layer
    Constants      the same in a softmax of their own: IAPT without its generator
    PrefixTuning   the same, made by an MLP that can be dropped after training
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

from model import Block, Config, Decoder, Embedded, Soft, Tuner


def split_kv(s: Tensor, head_dim: int) -> Soft:
    """(B, P, 2 G D) -> keys and values (B, G, P, D)."""
    k, v = s.unflatten(-1, (2, -1, head_dim)).permute(2, 0, 3, 1, 4)
    return Soft(k, v)


class PTuning2(Tuner):
    """P-tuning v2 (arXiv 2110.07602): P learned keys and values at every layer, the same for every instruction.

    Without the reparametrising MLP, which the paper found to help on some tasks only.  2 G D P L parameters.
    """

    lr = 5e-2

    def __init__(self, config: Config, P: int = 16):
        super().__init__()
        self.head_dim = config.head_dim
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
    paper found training the keys and values themselves unstable.  After training, `drop` removes the MLP.
    """

    lr = 5e-3

    def __init__(self, config: Config, P: int = 10, hidden: int = 512):
        super().__init__()
        self.config = config
        out = 2 * config.n_kv_head * config.head_dim
        self.tokens = nn.Parameter(torch.randn(P, config.n_embd))
        self.down = nn.Linear(config.n_embd, hidden)
        self.up = nn.ModuleList(nn.Linear(hidden, out) for _ in range(config.n_layer))

    def keys_and_values(self, l: int) -> Tensor:
        """Layer l's soft tokens as they are now: (P, 2 G D)."""
        return self.up[l](self.down(self.tokens).tanh())

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> Soft:
        return split_kv(self.keys_and_values(l).expand(len(x), -1, -1), self.config.head_dim)

    @torch.no_grad()
    def drop(self) -> PTuning2:
        """The same soft tokens without the MLP."""
        plain = PTuning2(self.config, P=len(self.tokens)).to(self.tokens.device)
        for l, constants in enumerate(plain.constants):
            constants.copy_(self.keys_and_values(l))
        return plain


class PromptTuning(Tuner):
    """Prompt tuning (arXiv 2104.08691): P learned rows before the input embeddings.  C P parameters."""

    lr = 1e-2

    def __init__(self, config: Config, P: int = 20):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(P, config.n_embd))

    def start(self, model: Decoder):
        start_as_tokens(self.rows, model)

    def embed(self, x: Tensor, instr: Tensor) -> Embedded:
        B, T, _ = x.shape
        P = len(self.rows)
        at = torch.arange(P, P + T, device=x.device).expand(B, T)
        return Embedded(torch.cat((self.rows.to(x.dtype).expand(B, -1, -1), x), 1), at)


@torch.no_grad()
def start_as_tokens(rows: Tensor, model: Decoder):
    """Set rows (.., C) to the embeddings of random tokens: the best start that arXiv 2104.08691 found."""
    rows.copy_(model.wte.weight[torch.randint(len(model.wte.weight), rows.shape[:-1])])


def mean_state(x: Tensor, instr: Tensor) -> Tensor:
    """The mean of x (B, T, C) over the instruction: (B, C), in fp32."""
    weights = instr / instr.sum(1, keepdim=True)
    return (weights[:, None] @ x.float())[:, 0]


Position = Literal["before", "task", "instance"]


class Dynamic(Tuner):
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
        at = torch.arange(T, device=x.device) + torch.where(instr, first, P)
        visible = torch.arange(P + T, device=x.device) >= P - n
        return Embedded(torch.einsum("bi,bitc->btc", split.to(x.dtype), every), at, visible)


def layouts(P: int, T: int, n: Tensor, instr: Tensor) -> tuple[Tensor, Tensor]:
    """The P+1 ways to place n (B, 1) of P soft tokens around the instruction among T tokens.

    Layout i: the P - n unused soft tokens, min(i, n) soft tokens, the instruction, the other soft tokens, the rest.
    Returns indices (B, P+1, P+T) into soft tokens followed by tokens, and where the instruction begins (B, P+1).
    """
    place = torch.arange(P + T, device=n.device)
    n, t = n[..., None], instr.sum(1)[:, None, None]
    first = P - n + torch.arange(P + 1, device=n.device)[:, None].minimum(n)  # (B, P+1, 1)
    index = torch.where(place < first, place - P + n, P + place - first)
    index = torch.where(place < P - n, n + place, index)
    index = torch.where(place >= first + t, place - t - P + n, index)
    return torch.where(place >= P + t, place, index), first[..., 0]


class CaPT(Tuner):
    """CaPT (arXiv 2510.16670): a learned vector plus the instruction's mean state, at every layer.

    One soft token a layer, no generator: C L parameters.  (The paper has P = 1 only.)
    """

    lr = 5e-2

    def __init__(self, config: Config, P: int = 1):
        super().__init__()
        self.p = nn.ParameterList(0.1 * torch.randn(P, config.n_embd) for _ in range(config.n_layer))

    def prompt(self, l: int, x: Tensor, instr: Tensor) -> Tensor:
        return self.p[l] + mean_state(x, instr)[:, None]  # (P, C) + (B, 1, C)


class Mine(Tuner):
    """Fork me: soft tokens that are a linear function of the instruction's mean hidden state."""

    def __init__(self, config, P: int = 4):
        super().__init__()
        self.P = P
        self.to_soft = nn.ModuleList(nn.Linear(config.n_embd, P * config.n_embd) for _ in range(config.n_layer))

    def prompt(self, l, x, instr):
        w = instr.float() / instr.sum(1, keepdim=True)  # (B, T)
        mean = (w[:, None] @ x.float())[:, 0]
        return self.to_soft[l](mean).unflatten(-1, (self.P, -1))  # (B, C) -> (B, P, C)
