"""IAPT, instruction-aware prompt tuning (arXiv 2405.18203), in one file.

A language model stays frozen.  At each of its layers a small generator reads the hidden states H of the *instruction* and writes P = 4
soft tokens for that layer; everything that follows may attend to them.  Only the generators learn.  Per layer:

    H (T, C)   the instruction's hidden states entering the layer
    Z = H W_down                          down-projection to m dimensions, m << C
    A = softmax(Z W_sa)   over T          attention pooling: column p says what soft token p reads
    Q = A^T Z                             (P, m): the instruction, summed up P times
    S = R(Q) W_up                         a learned rational activation, then the up-projection

It is done once, when the prompt is read.  After that the soft tokens are P entries of the key/value cache, and each further token
costs what it costs the frozen model.

Read on for, in this order: the interface that IAPT shares with every other method (Tuner), the activation (RationalFunction,
Rational), the pooling, the generator, and IAPT itself.  Letters for shapes are those of model.py: B batch, T tokens, P soft tokens,
C n_embd, G key/value heads, D head size, L layers, and m for the bottleneck.

    python train.py                                # train it
    python train.py -o P=8 m=32 activation=gelu    # any argument of IAPT.__init__ is an option
    python train.py -o space=hidden static=0 norm=0 # the paper's form, as far as it is known
"""

from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

# -- The interface -----------------------------------------------------------------------------------------------------


class Tuner(nn.Module):
    """A way to tune a frozen decoder.  Override what you need: the defaults do nothing.

    A tuner is handed hidden states and returns soft tokens.  It keeps no state between calls, so nothing stale survives a step.
    """

    lr = 1e-2  # the default of train.py's --lr

    def attach(self, model):
        """Called once, before training or use: the place for hooks on the frozen model's modules (and for detach to undo them)."""

    def detach(self):
        """Leave the model as attach found it."""

    def embed(self, x, instr):
        """Once a sequence: embeddings x (B, T, C) -> (x with soft tokens among them (B, T', C), where each token went (B, T))."""
        return x, None

    def prompt(self, l, x, instr):
        """Once a layer: hidden states x (B, T, C) entering layer l -> its soft tokens (B, P, C), or None.

        instr (B, T) is True on the instruction.  Look nowhere else: the rest is padding and the response, and a prompt that has
        seen the response has seen the labels.
        """
        return None

    def kv(self, block, l, x, instr):
        """Once a layer: the keys and values of its soft tokens: None, or (k, v, keep) with k, v (B, G, P, D).

        Each layer's soft tokens replace the layer below's, so nothing ever reads what becomes of one: only its key and value act.
        By default these come from `prompt`, through the layer's own frozen norm and projections.  keep (B, P) tells which of a row's
        slots exist; None: all.
        """
        s = self.prompt(l, x, instr)
        return None if s is None else (*block.soft_kv(s.to(x.dtype)), None)

    def groups(self, lr):
        """Parameter groups for the optimizer."""
        return [{"params": list(self.parameters()), "lr": lr}]


# -- The learned activation --------------------------------------------------------------------------------------------


class RationalFunction(torch.autograd.Function):
    """R(x) = P(x) / Q(x),  P = a_0 + a_1 x + ... + a_n x^n,  Q = 1 + |S|,  S = b_1 x + ... + b_k x^k.

    x any shape; a (n+1,), b (k,).  Q >= 1, so there is no pole ("safe" Pade units, arXiv 1907.06732, here with one absolute value
    around the whole sum).  Computed in fp32 at least: x^6 overflows fp16 near |x| = 6.

    The gradients, for a loss whose derivative by R is g.  The quotient rule, with dQ = sgn(S) dS:

        dR/da_j =  x^j / Q                             (P is linear in a)
        dR/db_i = -(P / Q^2) sgn(S) x^i                (so is S in b)
        dR/dx   =  P' / Q - (P / Q^2) sgn(S) S'  =  (P' - R sgn(S) S') / Q

    At S = 0, where |S| has a kink, sgn(0) = 0 is a sub-gradient.  Everything follows from x, so x is all that is kept: autograd alone
    would keep every intermediate product of the polynomials.
    """

    @staticmethod
    def forward(x, a, b):
        t = x.to(torch.promote_types(x.dtype, torch.float32))
        return (horner(t, a) / (1 + (horner(t, b) * t).abs())).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, a, b = ctx.saved_tensors
        t = x.to(torch.promote_types(x.dtype, torch.float32))
        s = horner(t, b) * t
        sign, q = s.sign(), 1 + s.abs()
        r = horner(t, a) / q
        dp, ds = (
            horner(t, a[1:] * degrees(a[1:])),
            horner(t, b * degrees(b)),
        )  # P' = sum of j a_j x^(j-1), and S' likewise
        g = g.to(t.dtype) / q
        dx = g * (dp - r * sign * ds)
        da, db, gs = [], [], -g * r * sign
        for _ in a:  # the sums of (g/Q) x^j ...
            da.append(g.sum())
            g = g * t
        for _ in b:  # ... and of -(g/Q) R sgn(S) x^i
            gs = gs * t
            db.append(gs.sum())
        return dx.to(x.dtype), torch.stack(da).to(a.dtype), torch.stack(db).to(b.dtype)


def horner(x, c):
    """c_0 + c_1 x + c_2 x^2 + ..., without ever forming a power of x."""
    y = torch.zeros_like(x)
    for j in reversed(range(len(c))):
        y = y * x + c[j]
    return y


def degrees(c):
    return torch.arange(1, len(c) + 1, device=c.device, dtype=c.dtype)


class Rational(nn.Module):
    """A rational activation of degrees (6, 5) whose 12 coefficients are learned; it starts as GELU, within 3.4e-3 on [-8, 8].

    Our own least-squares fit.  Published "GELU" coefficients of this shape are often for 1 + sum |b_i x^i|, another function.
    """

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(
            torch.tensor([-0.00335156972, 0.5, 0.418830997, 0.125136917, 0.0158261704, 0.000717348636, 0.0])
        )
        self.b = nn.Parameter(torch.tensor([0.0, 0.250273834, 0.0, 0.00143469727, 0.0]))

    def forward(self, x):
        return RationalFunction.apply(x, self.a, self.b)


ACTIVATIONS = {"rational": Rational, "gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh, "identity": nn.Identity}
Activation = Literal["rational", "gelu", "relu", "tanh", "identity"]
Space = Literal["kv", "hidden"]


# -- The method --------------------------------------------------------------------------------------------------------


def attention_pool(z, w_sa, instr):
    """z (B, T, m), w_sa (m, P), instr (B, T) -> what P query columns read of the instruction (B, P, m), and their weights (B, P, T)."""
    scores = (z @ w_sa).masked_fill(~instr[..., None], float("-inf"))  # never the padding, never the response
    weights = scores.softmax(1).transpose(1, 2)
    return weights @ z, weights


class Generator(nn.Module):
    """One layer's generator: hidden states (B, T, C) and instr (B, T) -> (B, P, out).

    `down` and `up` may be shared between layers; the pooling and the activation are the layer's own.
    """

    def __init__(self, down, up, P, activation, norm):
        super().__init__()
        self.down, self.up, self.norm = down, up, norm
        self.w_sa = nn.Parameter(torch.randn(down.out_features, P) * down.out_features**-0.5)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x, instr):
        # Our choice: H and Q are brought to unit mean square.  Hidden states grow along the layers, and some of their dimensions are
        # huge in every model; and R is at its most interesting around 1.  norm=0 leaves this out, as the paper does.
        z = self.down(rms(x.float()) if self.norm else x.float())
        q, _ = attention_pool(z, self.w_sa, instr)
        return self.up(self.act(rms(q) if self.norm else q))


def rms(x):
    return F.rms_norm(x, x.shape[-1:])


class IAPT(Tuner):
    """Instruction-aware prompt tuning.

        P            soft tokens a layer
        m            bottleneck of the generator; 0 means C / 8
        share        so many neighbouring layers share one down- and one up-projection
        activation   rational, gelu, relu, tanh, identity
        space        what the generator writes: 'kv', keys and values, or 'hidden', hidden states that pass through the layer's own norm
                     and projections
        static       add a learned constant, at which a generator that starts at zero starts
        norm         bring H and Q to unit mean square

    The paper is, as far as we know, space=hidden static=0 norm=0.  A soft token that passes through the norm has a length that it
    cannot change, so its key cannot grow to draw attention, nor its value to matter: four of them can hardly steer a small model.
    Writing keys and values directly lifts that; the README has the measurements.

    Trainable parameters with share=1: L (C m + m P + m out + 12), and P out for each static part; out is C, or 2 G D in 'kv'.
    """

    lr = 2e-2

    def __init__(
        self,
        config,
        P: int = 4,
        m: int = 0,
        share: int = 1,
        activation: Activation = "rational",
        space: Space = "kv",
        static: bool = True,
        norm: bool = True,
    ):
        super().__init__()
        if P < 1 or m < 0 or share < 1:
            raise ValueError(f"iapt wants P >= 1, m >= 0 and share >= 1, got P={P} m={m} share={share}")
        c, self.space, self.head_dim = config, space, config.head_dim
        m = m or c.n_embd // 8
        out = {"kv": 2 * c.n_kv_head * c.head_dim, "hidden": c.n_embd}[space]
        groups = -(-c.n_layer // share)
        down = [nn.Linear(c.n_embd, m, bias=False) for _ in range(groups)]
        up = [nn.Linear(m, out, bias=False) for _ in range(groups)]
        for d, u in zip(down, up):
            nn.init.normal_(d.weight, std=c.n_embd**-0.5)
            nn.init.zeros_(u.weight) if static else nn.init.normal_(u.weight, std=m**-0.5)
        self.generators = nn.ModuleList(
            Generator(down[l // share], up[l // share], P, activation, norm) for l in range(c.n_layer)
        )
        self.static = nn.ParameterList(torch.randn(P, out) * 0.1 for _ in range(c.n_layer if static else 0))

    def soft(self, l, x, instr):
        """What layer l's generator writes, with its static part: (B, P, out)."""
        s = self.generators[l](x, instr)
        return s + self.static[l] if len(self.static) else s

    def prompt(self, l, x, instr):
        return self.soft(l, x, instr)

    def kv(self, block, l, x, instr):
        if self.space == "hidden":
            return super().kv(block, l, x, instr)
        k, v = (
            self.soft(l, x, instr).unflatten(-1, (2, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        )  # two of (B, G, P, D)
        return k, v, None

    def groups(self, lr):
        # Adam moves every parameter by about lr a step, whatever its size: too far for coefficients that multiply x^6, not far
        # enough for constants that start at 0.1 and end near 1.
        own = {"static": 5 * lr, "act": lr / 20}
        by_lr = {}
        for name, p in self.named_parameters():
            part = next((part for part in own if part in name.split(".")), None)
            by_lr.setdefault(own.get(part, lr), []).append(p)
        return [{"params": params, "lr": lr} for lr, params in by_lr.items()]
