"""IAPT, instruction-aware prompt tuning (arXiv 2405.18203), in one file.

A language model stays frozen.  At each of its layers a small generator reads the hidden states H of the *instruction*
and writes P = 4 soft tokens for that layer, to which all that follows may attend.  Only the generators learn:

    H  (T, C)               the instruction's hidden states entering the layer
    Z = H W_down            (T, m)  down-projection, m << C
    A = softmax_T(Z W_sa)   (T, P)  attention pooling: column p says what soft token p reads
    Q = A^T Z               (P, m)  the instruction, summed up P times
    S = R(Q) W_up           (P, C)  a learned rational activation R, then the up-projection

It is done once, when the prompt is read.  After that the soft tokens are entries of the key/value cache, and a further
token costs hardly more than it costs the frozen model.

Four things are ours (EXPERIMENTS.md says what they are worth): S are keys and values, not hidden states; tokens attend
to them in a softmax of their own, and add what they find to what they find among the words; three learned constants
stand under each S, so that it is three soft tokens, alike in what is generated; and Q is measured from its mean over
all instructions.

What follows: the interface that IAPT shares with every other method (Tuner), the activation (RationalFunction,
Rational), the pooling, a layer's generator, IAPT.  Letters for shapes are those of model.py: B batch, T tokens, P soft
tokens, C n_embd, G key/value heads, D head size, L layers; and m for the bottleneck.

    python train.py                                  # train it
    python train.py -o P=8 m=32 activation=gelu      # any argument of IAPT.__init__ is an option
"""

import functools
from collections.abc import Callable
from typing import Literal, NewType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import Block, Config, Decoder

# -- The interface -----------------------------------------------------------------------------------------------------


class Tuner(nn.Module):
    """A way to tune a frozen decoder.  Override what you need: the defaults do nothing.

    The decoder hands a tuner its hidden states x and instr (B, T), True on the instruction.  Look nowhere else: the
    rest is padding and the response, and a prompt that has seen the response has seen the labels.  A tuner keeps
    nothing between calls, so nothing stale survives a step.
    """

    lr = 1e-2  # what train.py takes for --lr
    apart = False  # tokens attend to its soft tokens in a softmax of their own, and add what they find there

    def start(self, model: Decoder):
        """Once, before training: parameters that start from the frozen model's own."""

    def attach(self, model: Decoder):
        """Before training or use: put hooks on the frozen model's modules."""

    def detach(self):
        """Leave the model as attach found it."""

    def progress(self, done: float):
        """Before each training step: the share of training that is over, 0 to 1, for what anneals."""

    def embed(self, x: Tensor, instr: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Once a sequence: embeddings x (B, T, C) -> x with soft tokens (B, T', C), at (B, T), keep (B, T').

        at says where the tokens went.  Soft tokens stand among a row's tokens or right after them, before its padding,
        T' - T in every row; keep is False on those that nobody may see (None: there are none).
        """
        return x, None, None

    def prompt(self, l: int, x: Tensor, instr: Tensor) -> Tensor | None:
        """Once a layer: the hidden states x (B, T, C) that enter layer l -> its soft tokens (B, P, C), or None."""
        return None

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Once a layer: keys and values of its soft tokens, (k, v, keep) with k, v (B, G, P, D), or None.

        Each layer's soft tokens replace those of the layer below, so nothing reads what becomes of one: only its key
        and value act.  Here they come from `prompt`, through the layer's own frozen norm and projections.  keep (B, P)
        says which slots a row has; None: all.
        """
        s = self.prompt(l, x, instr)
        return None if s is None else (*block.soft_kv(s.to(x.dtype)), None)

    def slots(self, block: Block, l: int, x: Tensor, instr: Tensor) -> tuple[tuple | None, tuple | None]:
        """Once a layer: what `kv` says, as soft tokens among the tokens and as soft tokens apart."""
        made = self.kv(block, l, x, instr)
        return (None, made) if self.apart else (made, None)

    def groups(self, lr: float) -> list[dict]:
        """Parameter groups for the optimizer, where some parameters want another rate than lr."""
        return [{"params": list(self.parameters()), "lr": lr}]

    def upper(self) -> list[nn.Parameter]:
        """The upper level of `train.py --bilevel`: the parameters that learn on held-out batches."""
        return []


# -- The learned activation --------------------------------------------------------------------------------------------


class RationalFunction(torch.autograd.Function):
    """R(x) = n / d,  n = a_0 + a_1 x + ... + a_6 x^6,  d = 1 + |s|,  s = b_1 x + ... + b_5 x^5  (or other degrees).

    x of any shape, a (7,), b (5,).  d >= 1, so there is no pole ("safe" Pade units, arXiv 1907.06732, here with one
    absolute value around the whole sum).  Computed in fp32 at least: in fp16, x^6 overflows near |x| = 6.

    The gradients are the quotient rule, with d' = sgn(s) s' and n, s linear in their coefficients:

        dR/da_j =  x^j / d
        dR/db_i = -(n / d^2) sgn(s) x^i          =  -R sgn(s) x^i / d
        dR/dx   =  n' / d - (n / d^2) sgn(s) s'  =  (n' - R sgn(s) s') / d

    At s = 0, where |s| has its kink, sgn(0) = 0 gives a sub-gradient.  All of it follows from x, so x is all that is
    kept for the backward pass; left to itself, autograd would keep every intermediate product of both polynomials.
    Both passes are functions of tensors, `rational` and `rational_gradients`, which torch.compile turns into one kernel
    each; `compiled` says when.
    """

    generate_vmap_rule = True  # many tenants at once (tenants.py)

    @staticmethod
    def forward(x, a, b):
        return compiled(rational, x)(x, a, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, a, b = ctx.saved_tensors
        return compiled(rational_gradients, x)(x, a, b, g)


def rational(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """R(x), of the shape and dtype of x."""
    t = x.to(torch.promote_types(x.dtype, torch.float32))
    n, s = polynomial(t, a), polynomial(t, [0.0, *b])
    return n.div_(s.abs_().add_(1)).to(x.dtype)


def rational_gradients(x: Tensor, a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by x, a and b, given g, that by R(x)."""
    t = x.to(torch.promote_types(x.dtype, torch.float32))
    (n, dn), (s, ds) = polynomial(t, a, slope=True), polynomial(t, [0.0, *b], slope=True)
    sign, d = s.sign(), s.abs_().add_(1)
    ga = g.to(t.dtype) / d  # what the sums for da are made of ...
    gb = n.div_(d).mul_(ga).mul_(sign).neg_()  # ... and those for db
    dx = dn.mul_(ga).addcmul_(ds, gb)
    sums = [ga.sum(-1)]
    for _ in a[1:]:
        sums.append(ga.mul_(t).sum(-1))
    for _ in b:
        sums.append(gb.mul_(t).sum(-1))
    # In two stages: one running sum over millions of numbers would lose digits.
    sums = torch.stack(sums).reshape(len(sums), -1).sum(-1)
    return dx.to(x.dtype), sums[: len(a)].to(a.dtype), sums[len(a) :].to(b.dtype)


def polynomial(x: Tensor, c: Tensor | list, slope: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """c_0 + c_1 x + c_2 x^2 + ..., and its derivative if asked, by Horner's rule: no power of x is ever formed."""
    y, dy = torch.zeros_like(x).add_(c[-1]), torch.zeros_like(x) if slope else None
    for j in reversed(range(len(c) - 1)):
        if slope:
            dy.mul_(x).add_(y)
        y.mul_(x).add_(c[j])
    return (y, dy) if slope else y


LARGE = 2**20  # elements


@functools.cache
def compiled_once(f: Callable) -> Callable:
    """torch.compile(f), one and the same however often it is asked for.

    y x + c may be one instruction, as it always may on a GPU: a tenth faster, and one rounding where there were two.
    """
    return torch.compile(f, options={"cpp.enable_floating_point_contract_flag": "fast"})


def compiled(f: Callable, x: Tensor) -> Callable:
    """f, compiled where that pays: it takes half a minute, and IAPT itself evaluates R on P m numbers a row.

    Inside a model that is being compiled there is nothing to do: it is traced with the rest.
    """
    return compiled_once(f) if x.numel() >= LARGE and not torch.compiler.is_compiling() else f


class Rational(nn.Module):
    """A rational activation of degrees (6, 5), 12 learned coefficients; at first it is GELU, within 3.4e-3 on [-8, 8].

    They start at our own least-squares fit: published ones are often meant for d = 1 + |b_1 x| + |b_2 x^2| + ...
    What learns are the coefficients of powers of x / unit.  Adam moves all parameters alike, and x^6 is 244 at x = 2.5:
    of coefficients of x itself (unit=1), a step that does little to a_1 throws the whole curve about by a_6.
    """

    def __init__(self, unit: int = 4):
        super().__init__()
        a = [-0.00335156972, 0.5, 0.418830997, 0.125136917, 0.0158261704, 0.000717348636, 0.0]
        b = [0.0, 0.250273834, 0.0, 0.00143469727, 0.0]
        self.a = nn.Parameter(torch.tensor([c * unit**j for j, c in enumerate(a)]))
        self.b = nn.Parameter(torch.tensor([c * unit**i for i, c in enumerate(b, 1)]))
        self.unit = unit

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """a (7,) and b (5,), those of powers of x."""
        units = float(self.unit) ** -torch.arange(7, dtype=self.a.dtype, device=self.a.device)
        return self.a * units, self.b * units[1:6]

    def forward(self, x: Tensor) -> Tensor:
        return RationalFunction.apply(x, *self.coefficients())


ACTIVATIONS = {"rational": Rational, "gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh, "identity": nn.Identity}
Activation = Literal["rational", "gelu", "relu", "tanh", "identity"]
Space = Literal["kv", "hidden"]  # what a soft token is: a key and a value, or a hidden state
Count = NewType("Count", int)  # 0 or more; other whole numbers are sizes, of 1 or more
Pool = Literal["normed", "attention", "mean", "last", "none"]

# -- The method --------------------------------------------------------------------------------------------------------


def rms(x: Tensor, eps: float | None = None) -> Tensor:
    """x (.., n), each row brought to unit mean square; to less, if its mean square is not well above eps."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def attention_pool(z: Tensor, w_sa: Tensor, instr: Tensor) -> Tensor:
    """How much P query columns w_sa (m, P) read of each z (B, T, m): weights (B, P, T), each row of sum 1."""
    scores = (z @ w_sa).masked_fill(~instr[..., None], float("-inf"))  # never the padding, never the response
    return scores.softmax(1).transpose(1, 2)


def normed_pool(z: Tensor, w_sa: Tensor, instr: Tensor) -> Tensor:
    """`attention_pool` of z brought to unit mean square: weights (B, P, T).

    Where Q is brought to unit length after it, the length of z would do nothing but sharpen the pooling, and it grows
    until single words are read and no gradient leads away from them.
    """
    return attention_pool(rms(z), w_sa, instr)


def mean_pool(z: Tensor, w_sa: Tensor | None, instr: Tensor) -> Tensor:
    """The instruction's mean, for all soft tokens: weights (B, 1, T)."""
    return (instr / instr.sum(1, keepdim=True))[:, None].to(z.dtype)


def last_pool(z: Tensor, w_sa: Tensor | None, instr: Tensor) -> Tensor:
    """The instruction's last token, for all soft tokens: weights (B, 1, T)."""
    last = (instr * torch.arange(instr.shape[1], device=instr.device)).argmax(1, keepdim=True)
    return torch.zeros_like(instr, dtype=z.dtype).scatter(1, last, 1.0)[:, None]


def no_pool(z: Tensor, w_sa: Tensor | None, instr: Tensor) -> Tensor:
    """Nothing, for all soft tokens: weights (B, 1, T).  A control, to see what reading the instruction is worth."""
    return torch.zeros_like(instr, dtype=z.dtype)[:, None]


POOLS = {"normed": normed_pool, "attention": attention_pool, "mean": mean_pool, "last": last_pool, "none": no_pool}


class Centre(torch.autograd.Function):
    """q - c, where c learns to be the mean of q, whatever the loss is.

    q (B, P, m), c (P, m) or (1, m).  The gradient for c is that of |q - c|^2 / 2, summed over rows, so that parts of a
    batch add up; and a millionth of it, for clipping not to notice.  Adam does not mind how small a gradient is.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q, c):
        return q - c

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (away,) = ctx.saved_tensors
        return g, -1e-6 * away.sum(0)


class Generator(nn.Module):
    """A layer's generator: hidden states (B, T, C) and instr (B, T) -> (B, P, out).  Layers may share down and up."""

    def __init__(self, down: nn.Linear, up: nn.Linear, act: nn.Module, P: int, pool: Pool, centre: bool, norm: bool):
        super().__init__()
        self.down, self.up, self.act, self.P, self.pool, self.norm = down, up, act, P, POOLS[pool], norm
        m, learned = down.out_features, pool in ("normed", "attention")
        self.w_sa = nn.Parameter(torch.randn(m, P) * m**-0.5) if learned else None
        self.centre = nn.Parameter(torch.zeros(P if learned else 1, m)) if centre else None

    def reads(self, x: Tensor, instr: Tensor) -> tuple[Tensor, Tensor]:
        """Z (B, T, m), and how much each soft token reads of each place: (B, P, T), or (B, 1, T) if all do alike."""
        # Our choice: bring H and Q to unit mean square.  Hidden states grow along the layers, some of their dimensions
        # are huge in every model, and it is around 1 that R has its shape.  The paper mentions no norm: norm=0.
        z = self.down(rms(x.float()) if self.norm else x.float())
        return z, self.pool(z, self.w_sa, instr)

    def pooled(self, x: Tensor, instr: Tensor) -> Tensor:
        """Q, the instruction as each soft token has read it: what the activation gets, (B, P, m) or (B, 1, m)."""
        z, weights = self.reads(x, instr)
        q = weights @ z
        # Also ours: most of Q is the same for all instructions, on E2E all but a twentieth.  The rest has to stand out
        # before it is brought to unit mean square.  (Where all instructions are alike, only noise is left: hence eps.)
        if self.centre is not None:
            q = Centre.apply(q, self.centre)
        return rms(q, eps=1e-4) if self.norm else q

    def forward(self, x: Tensor, instr: Tensor) -> Tensor:
        s = self.up(self.act(self.pooled(x, instr)))
        return s.expand(-1, self.P, -1)  # where there is one Q for all, one S for all


class IAPT(Tuner):
    """Instruction-aware prompt tuning.

        P            soft tokens a layer
        m            bottleneck of the generator; 0 means C / 8
        share        this many neighbouring layers share one down- and one up-projection; 0: all of them
        activation   rational, gelu, relu, tanh or identity
        unit         the rational's coefficients learn as those of powers of x / unit
        one_act      one activation for all layers, in place of one each
        pool         what a soft token reads: 'attention', softmax(Z W_sa); 'normed', the same with Z of unit mean
                     square; the 'mean' or 'last' token, one for all P of them; or 'none', a control: every
                     instruction gets what the average one would
        space        what it writes: 'kv', keys and values; 'hidden', states that pass the layer's norm, k and v
        static       so many learned constants stand under what is generated for a soft token, which then is so many
                     soft tokens; the up-projection starts at zero, so training starts at a static prompt.
                     0: no constant, one soft token
        beside       so many more soft tokens that are constants alone, the same for every instruction
        apart        tokens attend to the soft tokens in a softmax of their own, and add what they find there
        centre       subtract from Q its mean over all instructions, which is learned on the way
        norm         bring H and Q to unit mean square
        static_lr    learning rate of the constants, of --lr
        act_lr       learning rate of the coefficients, of --lr

    The paper's form is, so far as we know, share=1 pool=attention unit=1 space=hidden static=0 centre=0 norm=0 apart=0.
    There a soft token has the length that the frozen norm gives it: its key cannot grow to draw attention, nor its
    value to matter; and what attention it gets, the words lose.  The README measures that.

    Trainable: C m + m out, once or for every `share` layers; L (m P + 12), and L m P with the centre (pools without
    W_sa: L 12, and L m); and L (static P + beside) out constants.  out is C in 'hidden', 2 G D in 'kv'.
    """

    lr = 1.25e-3

    def __init__(
        self, config: Config, P: int = 4, m: Count = 0, share: Count = 0, activation: Activation = "rational",
        unit: int = 4, one_act: bool = False, pool: Pool = "normed", space: Space = "kv", static: Count = 3,
        centre: bool = True, norm: bool = True, beside: Count = 0, apart: bool = True, static_lr: float = 40.0,
        act_lr: float = 0.2,
    ):  # fmt: skip
        super().__init__()
        self.rates, self.apart = {"static": static_lr, "centre": static_lr, "act": act_lr}, apart
        self.space, self.head_dim, C, L = space, config.head_dim, config.n_embd, config.n_layer
        m, share, out = m or C // 8, share or L, C if space == "hidden" else 2 * config.n_kv_head * config.head_dim
        down = [nn.Linear(C, m, bias=False) for _ in range(0, L, share)]
        up = [nn.Linear(m, out, bias=False) for _ in range(0, L, share)]
        for d, u in zip(down, up, strict=True):
            nn.init.normal_(d.weight, std=C**-0.5)
            nn.init.normal_(u.weight, std=0.0 if static else m**-0.5)
        acts = [Rational(unit) if activation == "rational" else ACTIVATIONS[activation]() for _ in range(L)]
        if one_act:
            acts = acts[:1] * L
        owned = [(down[l // share], up[l // share], acts[l]) for l in range(L)]
        self.generators = nn.ModuleList(Generator(*parts, P, pool, centre, norm) for parts in owned)
        self.beside, self.copies, constants = beside, max(1, static), beside + P * static
        self.static = nn.ParameterList(torch.randn(constants, out) * 0.1 for _ in range(L if constants else 0))

    def prompt(self, l: int, x: Tensor, instr: Tensor) -> Tensor:
        s = self.generators[l](x, instr).repeat(1, self.copies, 1)  # (B, copies P, out)
        if not len(self.static):
            return s
        s, constants = F.pad(s, (0, 0, self.beside, 0)), self.static[l]
        return s + F.pad(constants, (0, 0, 0, s.shape[1] - len(constants)))  # (B, beside + copies P, out)

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        if self.space == "hidden":
            return super().kv(block, l, x, instr)
        return split_kv(self.prompt(l, x, instr), self.head_dim)

    def groups(self, lr: float) -> list[dict]:
        # Adam moves every parameter by about lr a step, whatever its size: not far enough for constants that start at
        # 0.1 and have to end around 1, and far for coefficients, each of which bends the curve for all that passes it.
        by_part = {part: [] for part in ("", *self.rates)}
        for name, p in self.named_parameters():
            by_part[next((part for part in self.rates if part in name.split(".")), "")].append(p)
        groups = {
            part: {"params": params, "lr": lr * self.rates.get(part, 1)} for part, params in by_part.items() if params
        }
        for part in {"act", "centre"} & groups.keys():  # decay would pull a GELU, or a mean, towards zero
            groups[part]["weight_decay"] = 0.0
        return list(groups.values())

    def upper(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if "act" in name.split(".")]


def split_kv(s: Tensor, head_dim: int) -> tuple[Tensor, Tensor, None]:
    """(B, P, 2 G D) -> keys and values (B, G, P, D), and None: every row has all its slots."""
    k, v = s.unflatten(-1, (2, -1, head_dim)).permute(2, 0, 3, 1, 4)
    return k, v, None
