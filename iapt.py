"""IAPT, instruction-aware prompt tuning (arXiv 2405.18203).

The language model is frozen.  At every layer a small generator reads the hidden states of the instruction (the whole
prompt) and writes P soft tokens.  All tokens attend to them, the instruction's included.  Only the generators and some
learned constants are trained.

    Z = H W_down           (T, m)   H (T, C): the instruction's hidden states at this layer; m is much smaller than C
    A = softmax(Z W_sa)    (T, P)   over the T positions: how much soft token p reads of each word
    Q = A^T Z              (P, m)   the instruction, summarised P times
    S = R(Q) W_up          (P, C)   R: a learned rational function

This happens once, when the prompt is read.  After that the soft tokens are entries of the KV cache.  Below are the
activation R; the method as the paper describes it, so far as is known (`PaperIAPT`); and the default form (`IAPT`).

    python train.py -o P=8 m=32              # IAPT; any argument of IAPT.__init__ is an option
    python train.py --method paper-iapt      # as in the paper
"""

import functools
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import Block, Config, Decoder, Soft, Tuner

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
    """R(x)."""
    n, s_over_x = polynomials(x, a, b)
    return n / (1 + (x * s_over_x).abs())


def rational_backward(x: Tensor, a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with respect to x, a and b, given g, the gradient with respect to R(x)."""
    j = torch.arange(1, max(len(a), len(b) + 1), dtype=a.dtype, device=a.device)
    n, s_over_x, dn, ds = polynomials(x, a, b, a[1:] * j[: len(a) - 1], b * j[: len(b)])
    s = x * s_over_x
    d = 1 + s.abs()
    g_n = g / d
    g_s = -(n / d) * g_n * s.sign()
    da, db = moments(x, (g_n, len(a)), (g_s * x, len(b)))
    return dn * g_n + ds * g_s, da, db


def polynomials(x: Tensor, *coefficients: Tensor) -> list[Tensor]:
    """c_0 + c_1 x + c_2 x^2 + ... for each c.

    Compiled, Horner's rule is one kernel.  Not compiled, each step of it would be one, so all share a table of powers.
    """
    if torch.compiler.is_compiling():
        return [functools.reduce(lambda y, c_j: y * x + c_j, reversed(c.unbind())) for c in coefficients]
    powers = torch.linalg.vander(x, N=max(map(len, coefficients)))
    return [powers[..., : len(c)] @ c for c in coefficients]


def moments(x: Tensor, *weighted: tuple[Tensor, int]) -> list[Tensor]:
    """The sums over all elements of g, g x, ..., g x^(n-1), for each (g, n)."""
    if torch.compiler.is_compiling():
        return [torch.stack([(g * x**j).sum() for j in range(n)]) for g, n in weighted]
    powers = torch.linalg.vander(x, N=max(n for _, n in weighted))
    return [(powers[..., :n] * g[..., None]).flatten(0, -2).sum(0) for g, n in weighted]


class Rational(nn.Module):
    """R(x / 4) with 12 learned coefficients; it starts as GELU (within 3.4e-3 on [-8, 8]).

    Adam moves all coefficients by the same amount, but x^6 is 244 at x = 2.5.  In powers of x / 4 one rate suits all.
    """

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([-0.00335156972, 2.0, 6.70129595, 8.00876269, 4.05149962, 0.734564999, 0.0]))
        self.b = nn.Parameter(torch.tensor([0.0, 4.00438133, 0.0, 0.367282504, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return RationalFunction.apply(x.float() / 4, self.a, self.b).to(x.dtype)  # fp32: (x / 4)^6 overflows fp16


ACTIVATIONS = {"rational": Rational, "gelu": nn.GELU, "relu": nn.ReLU, "identity": nn.Identity}
Activation = Literal["rational", "gelu", "relu", "identity"]

# -- 2. As in the paper ------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """One layer's generator: hidden states x (B, T, C) and instr (B, T), True on the instruction -> (B, P, out)."""

    def __init__(self, down: nn.Linear, up: nn.Linear, P: int, activation: Activation):
        super().__init__()
        self.down, self.up, self.act = down, up, ACTIVATIONS[activation]()
        self.w_sa = nn.Parameter(torch.randn(down.out_features, P) * down.out_features**-0.5)

    def project(self, x: Tensor) -> Tensor:
        """Z = H W_down, in fp32.  The product is in x's dtype: else autograd would keep a copy of H for each layer."""
        return F.linear(x, self.down.weight.to(x.dtype)).float()

    def read(self, x: Tensor, instr: Tensor) -> tuple[Tensor, Tensor]:
        """Z (B, T, m), and A^T (B, P, T): the weight of each token of the prompt for each row of Q."""
        z = self.project(x)
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


def linear(n_in: int, n_out: int, std: float) -> nn.Linear:
    """W_down or W_up: no bias."""
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


class PaperIAPT(Tuner):
    """A generator for each layer writes P hidden states, which stand among the tokens.

    L (2 C m + m P + 12) parameters: 83.9M for LLaMA-2 7B with m = 320, as arXiv 2410.18035 reports for IAPT.  m = 0
    stands for C / 8.  Ours are the rate, the start, and that R's coefficients are learned with all else.
    """

    def __init__(self, config: Config, P: int = 4, m: int = 0, activation: Activation = "rational"):
        super().__init__()
        C, L = config.n_embd, config.n_layer
        m = m or max(1, C // 8)
        own = [(linear(C, m, std=C**-0.5), linear(m, C, std=m**-0.5)) for _ in range(L)]
        self.generators = nn.ModuleList(Generator(down, up, P, activation) for down, up in own)
        self.lr = 5.0 / C  # chosen on tiny

    @torch.no_grad()
    def start(self, model: Decoder):
        """W_up starts as the hidden states of m random words, each the first of a text.

        A large model rests much attention on the first word, without harm (a sink, arXiv 2309.17453).  Soft tokens that
        start so take its place; random states take attention, too, and what is found in them harms.
        """
        vocabulary, m = model.wte.weight, self.generators[0].up.in_features
        words = torch.randint(len(vocabulary), (m, 1), device=vocabulary.device)
        x, rope = model.embed(words, torch.zeros_like(words[0]))  # each at position 0
        for block, generator in zip(model.h, self.generators):
            generator.up.weight.copy_(F.rms_norm(x.float(), x.shape[-1:])[:, 0].mT)  # (m, 1, C) -> (C, m)
            x, _, _ = block(x, rope)

    def prompt(self, l: int, x: Tensor, instr: Tensor) -> Tensor:
        return self.generators[l](x, instr)  # (B, P, C)


# -- 3. As we train it -------------------------------------------------------------------------------------------------
# Four changes; docs/RESULTS.md says what they are worth together, and what 2 to 4 are worth alone.
#   1. A soft token is a key and a value, not a hidden state.  The key is learned, the same for every instruction; the
#      value is learned, too, and what the generator writes is added to it.
#   2. Soft tokens get a softmax of their own (`separate`), so they take no attention away from the words.
#   3. All values and W_up start at zero: training starts as the frozen model.
#   4. H and Q are scaled to unit mean square.  All layers share one W_down: they read the same residual stream.


class NormedGenerator(Generator):
    """Scales each hidden state, and Q, to unit mean square: hidden states grow from layer to layer."""

    def project(self, x: Tensor) -> Tensor:
        # Each token's state is scaled after the projection, so that no scaled copy of H is kept.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return super().project(x) * (x.shape[-1] ** 0.5 / (length + 1e-6))

    def pool(self, x: Tensor, instr: Tensor) -> Tensor:
        q = super().pool(x, instr)
        return F.rms_norm(q, q.shape[-1:], eps=1e-4)


class IAPT(Tuner):
    """P generated values per layer, each added to `repeat` learned values with keys of their own: repeat P soft tokens.

    C m parameters shared by all layers, and in each layer m P + 12 + m K + 2 repeat P K.  K is the width of a
    layer's keys; m = 0 stands for C / 16.
    `Decoder.hidden` calls `soft`, and that calls `kv`, once for each layer, when a prompt is read.
    """

    separate = True
    generator = NormedGenerator

    def __init__(self, config: Config, P: int = 4, m: int = 0, repeat: int = 3, activation: Activation = "rational"):
        super().__init__()
        C, L, out = config.n_embd, config.n_layer, config.n_kv_head * config.head_dim
        m = m or max(1, C // 16)
        down = linear(C, m, std=C**-0.5)  # the same in all layers
        self.generators = nn.ModuleList(self.generator(down, linear(m, out, std=0.0), P, activation) for _ in range(L))
        self.keys = nn.ParameterList(torch.randn(repeat * P, out) for _ in range(L))
        self.values = nn.ParameterList(torch.zeros(repeat * P, out) for _ in range(L))
        self.repeat, self.lr = repeat, 0.5 / C  # a wider model wants smaller steps

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> Soft:
        k = self.keys[l].expand(len(x), -1, -1)
        v = self.values[l] + self.generators[l](x, instr).repeat(1, self.repeat, 1)
        return Soft(block.attn.heads(k), block.attn.heads(v))

    def groups(self, lr: float) -> list[dict]:
        """Adam moves everything by about lr a step: too little for the constants, too much for R's coefficients.

        Weight decay would pull an activation that starts as GELU, and keys, towards zero.
        """
        constants = [*self.keys, *self.values]
        coefficients = [p for g in self.generators for p in g.act.parameters()]
        own_rate = {id(p) for p in constants + coefficients}
        return [
            {"params": [p for p in self.parameters() if id(p) not in own_rate], "lr": lr},
            {"params": constants, "lr": 16 * lr, "weight_decay": 0.0},
            {"params": coefficients, "lr": 0.2 * lr, "weight_decay": 0.0},
        ]
