"""IAPT, instruction-aware prompt tuning (arXiv 2405.18203).

The language model is frozen.  At every layer a small generator reads the hidden states of the instruction and writes P
soft tokens, to which everything after it can attend.  Only the generators, and a few learned constants, are trained.

    Z = H W_down           (T, m)   H (T, C): the instruction's hidden states at this layer; m is much smaller than C
    A = softmax(Z W_sa)    (T, P)   over the T positions: how much soft token p reads of each word
    Q = A^T Z              (P, m)   the instruction, summarised P times
    S = R(Q) W_up          (P, C)   R: a learned rational function

This happens once, when the prompt is read.  After that the soft tokens are entries of the KV cache.  Below are the
activation R; the method as the paper describes it, so far as we know (`PaperIAPT`); and as we train it (`IAPT`).

    python train.py -o P=8 m=32              # IAPT; any argument of IAPT.__init__ is an option
    python train.py --method paper-iapt      # as in the paper
"""

from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import Block, Config, Soft, Tuner, split_kv

# -- 1. The activation -------------------------------------------------------------------------------------------------


class RationalFunction(torch.autograd.Function):
    """R(x) = n / d,  n = a_0 + a_1 x + ... + a_6 x^6,  d = 1 + |s|,  s = b_1 x + ... + b_5 x^5.

    d >= 1, so there are no poles (safe Pade units, arXiv 1907.06732).  The backward pass needs only x:

        dR/da_j =  x^j / d
        dR/db_i = -R sign(s) x^i / d
        dR/dx   = (n' - R sign(s) s') / d
    """

    generate_vmap_rule = True  # baselines/tenants.py computes many tenants at once

    @staticmethod
    def forward(x, a, b):
        return rational(x, a, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return rational_backward(*ctx.saved_tensors, g)


def rational(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """R(x).  For large x, torch.compile(rational) is one kernel (see experiments/bench.py)."""
    return polynomial(x, a) / (1 + polynomial(x, F.pad(b, (1, 0))).abs())


def rational_backward(x: Tensor, a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with respect to x, a and b, given g, the gradient with respect to R(x)."""
    n, dn = polynomial_and_slope(x, a)
    s, ds = polynomial_and_slope(x, F.pad(b, (1, 0)))  # b_0 = 0
    d = 1 + s.abs()
    ga = g / d
    gb = -(n / d) * ga * s.sign()
    return torch.addcmul(dn * ga, ds, gb), moments(x, ga, len(a)), moments(x, gb, len(b) + 1)[1:]


def polynomial(x: Tensor, c: Tensor) -> Tensor:
    """c_0 + c_1 x + c_2 x^2 + ..., by Horner's rule."""
    y = torch.zeros_like(x)
    for c_j in reversed(c.unbind()):
        y = y * x + c_j
    return y


def polynomial_and_slope(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and its derivative with respect to x."""
    y = dy = torch.zeros_like(x)
    for c_j in reversed(c.unbind()):
        dy = dy * x + y
        y = y * x + c_j
    return y, dy


def moments(x: Tensor, g: Tensor, n: int) -> Tensor:
    """The sums of g, g x, ..., g x^(n-1) over all elements: (n,)."""
    sums = []
    for _ in range(n):
        sums.append(g.sum(-1))  # rows first: one running sum over millions of numbers would lose digits
        g = g * x
    return torch.stack(sums).reshape(n, -1).sum(-1)


class Rational(nn.Module):
    """R(x / 4) with 12 learned coefficients; it starts as GELU (within 3.4e-3 on [-8, 8]).

    Adam moves all coefficients by the same amount, but x^6 is 244 at x = 2.5.  In powers of x / 4 one rate suits all.
    """

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([-0.00335156972, 2.0, 6.70129595, 8.00876269, 4.05149962, 0.734564999, 0.0]))
        self.b = nn.Parameter(torch.tensor([0.0, 4.00438133, 0.0, 0.367282504, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return RationalFunction.apply(x.float() / 4, self.a, self.b).to(x.dtype)  # x^6 overflows fp16 near |x| = 6


ACTIVATIONS = {"rational": Rational, "gelu": nn.GELU, "relu": nn.ReLU, "identity": nn.Identity}
Activation = Literal["rational", "gelu", "relu", "identity"]
# -- 2. As in the paper ------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """One layer's generator: hidden states x (B, T, C) and instr (B, T), True on the instruction -> (B, P, out)."""

    def __init__(self, down: nn.Linear, up: nn.Linear, P: int, activation: Activation):
        super().__init__()
        self.down, self.up, self.act = down, up, ACTIVATIONS[activation]()
        self.w_sa = nn.Parameter(torch.randn(down.out_features, P) * down.out_features**-0.5)

    def read(self, x: Tensor, instr: Tensor) -> tuple[Tensor, Tensor]:
        """Z (B, T, m), and A^T (B, P, T): how much each soft token reads of each word."""
        z = self.down(x.float())
        return z, softmax_over(instr, z @ self.w_sa)

    def pool(self, x: Tensor, instr: Tensor) -> Tensor:
        """Q (B, P, m): the instruction, as each soft token has read it."""
        z, weights = self.read(x, instr)
        return weights @ z

    def forward(self, x: Tensor, instr: Tensor) -> Tensor:
        return self.up(self.act(self.pool(x, instr)))


def softmax_over(instr: Tensor, scores: Tensor) -> Tensor:
    """Scores (B, T, P) -> weights (B, P, T) over the instruction: never the padding, never the response."""
    return scores.masked_fill(~instr[..., None], float("-inf")).softmax(1).transpose(1, 2)


def projections(C: int, m: int, out: int, up_std: float) -> tuple[nn.Linear, nn.Linear]:
    """W_down and W_up, without biases."""
    down, up = nn.Linear(C, m, bias=False), nn.Linear(m, out, bias=False)
    nn.init.normal_(down.weight, std=C**-0.5)
    nn.init.normal_(up.weight, std=up_std)
    return down, up


class PaperIAPT(Tuner):
    """A generator for each layer writes P hidden states, which stand among the tokens.

    L (2 C m + m P + 12) parameters: 83.9M for LLaMA-2 7B with m = 320, as arXiv 2410.18035 reports for IAPT.
    """

    lr = 4e-2

    def __init__(self, config: Config, P: int = 4, m: int = 0, activation: Activation = "rational"):
        super().__init__()
        C, L, m = config.n_embd, config.n_layer, m or config.n_embd // 8
        own = [projections(C, m, C, up_std=m**-0.5) for _ in range(L)]
        self.generators = nn.ModuleList(Generator(down, up, P, activation) for down, up in own)

    def prompt(self, l: int, x: Tensor, instr: Tensor) -> Tensor:
        return self.generators[l](x, instr)  # (B, P, C)


# -- 3. As we train it -------------------------------------------------------------------------------------------------
# Four changes; docs/RESULTS.md says what each is worth.
#   1. Soft tokens are keys and values, not hidden states, and get a softmax of their own (`separate`).
#   2. Each is repeated and added to learned constants.  W_up starts at zero, so training starts at the constants.
#   3. H, Z and Q are normalised, and the average Q over all instructions is subtracted: it is most of Q.
#   4. All layers share one W_down and one W_up.


class NormedGenerator(Generator):
    """A generator that looks at how this instruction differs from the average one."""

    def __init__(self, *args):
        super().__init__(*args)
        self.centre = nn.Parameter(torch.zeros(self.w_sa.shape[::-1]))  # (P, m)

    def read(self, x: Tensor, instr: Tensor) -> tuple[Tensor, Tensor]:
        z = self.down(rms_norm(x.float()))
        return z, softmax_over(instr, rms_norm(z) @ self.w_sa)  # un-normed, |z| grows until one word takes all

    def pool(self, x: Tensor, instr: Tensor) -> Tensor:
        q = SubtractMean.apply(super().pool(x, instr), self.centre)
        return rms_norm(q, eps=1e-4)  # eps: where all instructions are alike, only noise is left


def rms_norm(x: Tensor, eps: float | None = None) -> Tensor:
    """Each row of x (.., n) scaled to unit mean square."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


class SubtractMean(torch.autograd.Function):
    """q - mean, where `mean` learns to be the average of q: its gradient is that of |q - mean|^2 / 2, not of the loss.

    A factor of 1e-6 hides it from gradient clipping; Adam does not depend on the scale of a gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q, mean):
        return q - mean

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (centred,) = ctx.saved_tensors
        return g, -1e-6 * centred.sum(0)


class IAPT(Tuner):
    """P generated soft tokens per layer, each added to `repeat` learned constants: P * repeat keys and values.

    C m + 2 m G D parameters shared by all layers, and 2 m P + 12 + 2 P repeat G D for each.
    """

    lr = 1.25e-3
    separate = True

    def __init__(self, config: Config, P: int = 4, m: int = 0, repeat: int = 3, activation: Activation = "rational"):
        super().__init__()
        C, out = config.n_embd, 2 * config.n_kv_head * config.head_dim
        shared = projections(C, m or C // 8, out, up_std=0.0)
        self.generators = nn.ModuleList(NormedGenerator(*shared, P, activation) for _ in range(config.n_layer))
        self.constants = nn.ParameterList(0.1 * torch.randn(repeat * P, out) for _ in range(config.n_layer))
        self.repeat, self.head_dim = repeat, config.head_dim

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> Soft:
        s = self.generators[l](x, instr).repeat(1, self.repeat, 1) + self.constants[l]
        return split_kv(s, self.head_dim)

    def groups(self, lr: float) -> list[dict]:
        """Adam moves everything by about lr a step: too little for the constants, too much for R's coefficients."""
        constants = [*self.constants, *(g.centre for g in self.generators)]
        coefficients = [p for g in self.generators for p in g.act.parameters()]
        own_rate = {id(p) for p in constants + coefficients}
        return [
            {"params": [p for p in self.parameters() if id(p) not in own_rate], "lr": lr},
            {"params": constants, "lr": 40 * lr, "weight_decay": 0.0},
            {"params": coefficients, "lr": 0.2 * lr, "weight_decay": 0.0},
        ]
