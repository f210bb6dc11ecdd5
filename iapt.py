"""IAPT, instruction-aware prompt tuning (arXiv 2405.18203): the method.

A language model stays frozen.  In each of its layers a small generator reads the prompt, and adjusts the values of a
few soft tokens: extra keys and values that attention can look at.  This is one layer, and all of the method:

    def soft_tokens(H, instr, keys, values, W_down, W_sa, R, W_up):
        Z = rms_norm(H) @ W_down                                             # (T, m)  all layers have the same W_down
        A = (Z @ W_sa).masked_fill(~instr[:, None], -torch.inf).softmax(0)   # (T, P)  over the prompt, never the answer
        Q = rms_norm(A.T @ Z)                                                # (P, m)  the prompt, read P times
        S = R(Q) @ W_up                                                      # (P, K)  zero at the start
        return keys, values + S.repeat(3, 1)                                 # 3 P learned keys, 3 P learned values + S
    #   and in attention:  y = attend(q, k_words, v_words) + attend(q, k_soft, v_soft)

H (T, C) are hidden states as they enter the layer; instr (T,) is True on the prompt.  m is much smaller than C; K is a
layer's key/value heads times their size.  R is a learned activation, which starts as GELU.  Trained are W_down and, in
each layer, W_sa, R, W_up, keys and values (these two alone are called *constants*: they are the same for every prompt).

Attention to soft tokens has a softmax of its own; what is found in them is added to what is found among the words.  All
tokens look at them, those of the prompt, too, or the answer's alone (--act answer).  Then they stay in the KV cache.
For an instruction that all but the generators do without (--hide-instruction), see Summary in baselines/hidden.py.

    Decoder.blocks or .read (model.py)  ->  Tuner.context  ->  IAPT.kv  ->  Generator.forward    the lines above
                                        ->  Block.forward  ->  Attention.mix                     the last of them

`python train.py -o P=8 m=32` trains it; any argument of IAPT.__init__ is an option.
"""

from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, vmap

from model import Block, Config, Context, Decoder, Soft, Tuner

Activation = Literal["rational", "gelu", "relu", "identity"]


class Generator(nn.Module):
    """One layer's generator: H (B, T, C), instr (B, T) -> A (B, T, P), S (B, P, K), fp32.  Layers may share W_down."""

    def __init__(self, W_down: nn.Parameter, K: int, P: int, activation: Activation):
        super().__init__()
        m = W_down.shape[1]
        self.W_down = W_down
        self.W_sa = nn.Parameter(torch.randn(m, P) * m**-0.5)  # "sa": the paper's self-attention pooling
        self.R = ACTIVATIONS[activation]()
        self.W_up = nn.Parameter(torch.zeros(m, K))

    def forward(self, H: Tensor, instr: Tensor) -> tuple[Tensor, Tensor]:
        Z = self.project(H)
        A = self.attention(Z, instr)
        Q = F.rms_norm(A.mT @ Z, Z.shape[-1:], eps=1e-4)
        return A, self.R(Q) @ self.W_up

    def project(self, H: Tensor) -> Tensor:
        """Z (B, T, m) = rms_norm(H) @ W_down."""
        # Scaled after the product, so that no scaled H is kept: 608 MB, not 672 (SmolLM2's shape, 8 x 128, bf16).
        length = torch.linalg.vector_norm(H, dim=-1, keepdim=True, dtype=torch.float32)
        return (H @ self.W_down.to(H.dtype)).float() * (H.shape[-1] ** 0.5 / (length + 1e-6))

    def attention(self, Z: Tensor, instr: Tensor) -> Tensor:
        """A (B, T, P): how much each of P readings takes of each token.  Override it to read in another way."""
        return (Z @ self.W_sa).masked_fill(~instr[..., None], -torch.inf).softmax(-2)


class IAPT(Tuner):
    """P generated values a layer, each added to `repeat` learned values with keys of their own: repeat P soft tokens.

    C m parameters shared by all layers, and in each layer m P + 12 + m K + 2 repeat P K.  m = 0 stands for C / 16.
    """

    separate = True  # its soft tokens have a softmax of their own, whose result is added
    generator = Generator

    def __init__(self, config: Config, P: int = 4, m: int = 0, repeat: int = 3, activation: Activation = "rational"):
        super().__init__()
        C, L, K = config.n_embd, config.n_layer, config.n_kv_head * config.head_dim
        m = m or max(1, C // 16)
        W_down = nn.Parameter(torch.randn(C, m) * C**-0.5)  # one for all layers: they read the same residual stream
        self.generators = nn.ModuleList(self.generator(W_down, K, P, activation) for _ in range(L))
        self.keys = nn.ParameterList(torch.randn(repeat * P, K) for _ in range(L))
        self.values = nn.ParameterList(torch.zeros(repeat * P, K) for _ in range(L))
        self.repeat = repeat
        self.lr = 0.5 / C  # a wider model wants smaller steps

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> Soft:
        return self.soft(block, l, x, *self.generators[l](x, instr))

    def soft(self, block: Block, l: int, x: Tensor, A: Tensor, S: Tensor) -> Soft:
        """Layer l's keys and values, with S (B, P, K) added to the values: S_1 .. S_P, S_1 .. S_P, ..."""
        values = self.values[l] + S.repeat(1, self.repeat, 1)
        return Soft(block.attn.heads(self.keys[l].expand_as(values)), block.attn.heads(values))

    def write(self, model: Decoder, states: list[Tensor], instr: Tensor) -> list[Context]:
        """All generators in one batched computation: a training step has 160 operators a layer, not 223."""
        one = self.generators[0]
        if any(g._forward_pre_hooks or g._forward_hooks for g in self.generators):  # who looks into one, sees one
            return super().write(model, states, instr)
        names = [name for name, p in one.named_parameters() if p is not self.generators[-1].get_parameter(name)]
        own = {name: torch.stack([g.get_parameter(name) for g in self.generators]) for name in names}
        generate = vmap(lambda own, H: functional_call(one, own, (H, instr)), randomness="different")
        A, S = generate(own, torch.stack(states))  # (L, B, T, P), (L, B, P, K)
        layers = enumerate(zip(model.h, states, A, S))
        return [self.place(self.soft(block, l, x, *AS), x.dtype) for l, (block, x, *AS) in layers]

    def groups(self, lr: float) -> list[dict]:
        """Adam moves everything by about lr a step: too little for the constants, too much for R's coefficients."""
        constants = [*self.keys, *self.values]
        coefficients = [p for g in self.generators for p in g.R.parameters()]
        own_rate = {id(p) for p in constants + coefficients}
        return [  # weight decay would pull keys, and an activation that starts as GELU, towards zero
            {"params": [p for p in self.parameters() if id(p) not in own_rate], "lr": lr},
            {"params": constants, "lr": 16 * lr, "weight_decay": 0.0},
            {"params": coefficients, "lr": 0.2 * lr, "weight_decay": 0.0},
        ]


# -- As in the paper ---------------------------------------------------------------------------------------------------
# We did not have the paper's full text: PaperIAPT is its form as far as that is known.  IAPT differs from it in what
# follows, which is worth 0.633 nats per token (95 % interval 0.478 to 0.811) on tiny's test rows (docs/RESULTS.md):
#     a soft token is a key and a value, and there are 3 P; in the paper, P hidden states       (not measured alone)
#     a softmax of its own, not that of the words                                               0.033 (-0.020 to 0.120)
#     values and W_up start at zero, not at random: training starts as the frozen model         0.005 (-0.012 to 0.025)
#     H and Q have unit mean square                                                             0.021 (0.004 to 0.045)
#     all layers have one W_down, and so a larger m                                             0.011 (-0.006 to 0.033)
class PaperGenerator(Generator):
    """H and Q as they are."""

    def forward(self, H: Tensor, instr: Tensor) -> tuple[Tensor, Tensor]:
        A = self.attention(Z := self.project(H), instr)
        return A, self.R(A.mT @ Z) @ self.W_up

    def project(self, H: Tensor) -> Tensor:
        return (H @ self.W_down.to(H.dtype)).float()


class PaperIAPT(Tuner):
    """A generator for each layer writes P hidden states, which stand among the tokens (`Block.soft_kv`).

    L (2 C m + m P + 12) parameters: 83.9M for LLaMA-2 7B with m = 320, as arXiv 2410.18035 reports for IAPT.  m = 0
    stands for C / 8.  The rate, the start, and that R learns with all else are our choice.
    """

    def __init__(self, config: Config, P: int = 4, m: int = 0, activation: Activation = "rational"):
        super().__init__()
        C, m = config.n_embd, m or max(1, config.n_embd // 8)
        downs = [nn.Parameter(torch.randn(C, m) * C**-0.5) for _ in range(config.n_layer)]
        self.generators = nn.ModuleList(PaperGenerator(W_down, C, P, activation) for W_down in downs)
        self.lr = 5.0 / C  # chosen on tiny

    @torch.no_grad()
    def start(self, model: Decoder):
        """W_up starts as states of m random words that begin a text: sinks (arXiv 2309.17453), which do no harm."""
        vocabulary, m = model.wte.weight, len(self.generators[0].W_up)
        words = torch.randint(len(vocabulary), (m, 1), device=vocabulary.device)
        x, rope = model.embed(words, torch.zeros_like(words[0]))  # each at position 0
        for block, generator in zip(model.h, self.generators):
            generator.W_up.copy_(F.rms_norm(x.float(), x.shape[-1:])[:, 0])  # (m, C)
            x, _, _ = block(x, rope)

    def soft_tokens(self, l: int, x: Tensor, instr: Tensor) -> Tensor:
        return self.generators[l](x, instr)[1]  # (B, P, C)


# -- The activation ----------------------------------------------------------------------------------------------------
class RationalFunction(torch.autograd.Function):
    """R(x) = n / d,  n = a_0 + a_1 x + ... + a_6 x^6,  d = 1 + |s|,  s = b_1 x + ... + b_5 x^5.

    d >= 1, so there are no poles (safe Pade units, arXiv 1907.06732).  The backward pass needs only x:

        dR/da_j =  x^j / d
        dR/db_i = -R sign(s) x^i / d
        dR/dx   = (n' - R sign(s) s') / d
    """

    generate_vmap_rule = True  # many tenants, or all layers, are computed at once

    @staticmethod
    def forward(x, a, b):
        X = x[..., None] ** torch.arange(7, device=x.device)  # 1, x, ..., x^6
        n, s = (X @ torch.stack((a, F.pad(b, (1, 1))), 1)).unbind(-1)
        return n / (1 + s.abs())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, a, b = ctx.saved_tensors
        j, b = torch.arange(7, device=x.device), F.pad(b, (1, 1))
        X = x[..., None] ** j
        dn, ds = F.pad((a * j)[1:], (0, 1)), F.pad((b * j)[1:], (0, 1))
        n, s, dn, ds = (X @ torch.stack((a, b, dn, ds), 1)).unbind(-1)
        d = 1 + s.abs()
        g_n = g / d
        g_s = -(n / d) * g_n * s.sign()
        da, db = torch.stack((g_n, g_s)).reshape(2, -1) @ X.reshape(-1, 7)
        return g_n * dn + g_s * ds, da, db[1:6]


class Rational(nn.Module):
    """R(x / 4) with 12 learned coefficients, which start as GELU (within 3.4e-3 on [-8, 8], where they were fitted).

    Adam moves all of them by the same amount, but x^6 is 244 at x = 2.5: in powers of x / 4 one rate suits all.
    """

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([-0.00335156972, 2.0, 6.70129595, 8.00876269, 4.05149962, 0.734564999, 0.0]))
        self.b = nn.Parameter(torch.tensor([0.0, 4.00438133, 0.0, 0.367282504, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return RationalFunction.apply(x.float() / 4, self.a, self.b).to(x.dtype)  # fp32: (x / 4)^6 overflows fp16


ACTIVATIONS = {"rational": Rational, "gelu": nn.GELU, "relu": nn.ReLU, "identity": nn.Identity}
