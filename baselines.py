"""The other methods behind IAPT's interface:

    ptuning2   learned keys and values at each layer (P-tuning v2)
    static     learned hidden states at each layer
    prefix     the keys and values come from an MLP, which goes after training (prefix-tuning)
    prompt     learned rows before the embeddings (prompt tuning)
    dynamic    and where they stand, how many, which: chosen by the instruction (dynamic prompting)
    lora       low-rank updates of linear layers
    adapter    small MLPs after attention and MLP, and the norms
    full       all weights of the model train
    capt       a learned vector and the instruction's mean state, at each layer
    mine       the example to fork: soft tokens that are a projection of the mean instruction state

and what makes them methods everywhere, in train.py, sample.py, bench.py and the tests:

    METHODS                       {name: class}
    build(name, config, given)    a tuner from its name and its options as strings
    complete(name, given)         those options and all others

Each class reads alone.  Letters for shapes are those of model.py.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from cli import UsageError
from iapt import IAPT, Count, Tuner, mean_pool, split_kv
from model import Block, Config, Decoder, norm


class PTuning2(Tuner):
    """P-tuning v2 (arXiv 2110.07602): P learned keys and values at every layer, the same for every instruction.

    Without the reparametrising MLP, which the paper found to help on some tasks only.  2 G D P L parameters.  With
    P=12 apart=1 this is IAPT without its generator.
    """

    lr = 5e-2

    def __init__(self, config: Config, P: int = 16, apart: bool = False):
        super().__init__()
        self.head_dim, self.apart = config.head_dim, apart
        out = 2 * config.n_kv_head * config.head_dim
        self.static = nn.ParameterList(torch.randn(P, out) * 0.1 for _ in range(config.n_layer))

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> tuple[Tensor, Tensor, None]:
        return split_kv(self.static[l].expand(len(x), -1, -1), self.head_dim)


class Static(Tuner):
    """P learned hidden states at every layer, which pass through its own norm and projections.  C P L parameters.

    With P=4 this is IAPT with space=hidden static=1 apart=0, without its generator.
    """

    lr = 5e-2

    def __init__(self, config: Config, P: int = 16):
        super().__init__()
        self.static = nn.ParameterList(torch.randn(P, config.n_embd) * 0.1 for _ in range(config.n_layer))

    def prompt(self, l: int, x: Tensor, instr: Tensor) -> Tensor:
        return self.static[l].expand(len(x), -1, -1)


class PrefixTuning(Tuner):
    """Prefix-tuning (arXiv 2101.00190): keys and values at every layer, made of P embeddings by an MLP.

    Embedding (P, C) -> Linear(C, hidden) -> tanh -> Linear(hidden, L 2 G D), of which each layer takes its part.  The
    paper found training the keys and values themselves unstable.  Once trained, the MLP can go: `drop`.
    """

    lr = 5e-3

    def __init__(self, config: Config, P: int = 10, hidden: int = 512):
        super().__init__()
        self.config, out = config, 2 * config.n_kv_head * config.head_dim
        self.tokens = nn.Parameter(torch.randn(P, config.n_embd))
        self.down = nn.Linear(config.n_embd, hidden)
        self.up = nn.ModuleList(nn.Linear(hidden, out) for _ in range(config.n_layer))

    def keys_and_values(self, l: int) -> Tensor:
        """Layer l's soft tokens, as they are now: (P, 2 G D)."""
        return self.up[l](self.down(self.tokens).tanh())

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> tuple[Tensor, Tensor, None]:
        return split_kv(self.keys_and_values(l).expand(len(x), -1, -1), self.config.head_dim)

    @torch.no_grad()
    def drop(self) -> PTuning2:
        """The same soft tokens without the MLP: a PTuning2."""
        plain = PTuning2(self.config, P=len(self.tokens)).to(self.tokens.device)
        for l, static in enumerate(plain.static):
            static.copy_(self.keys_and_values(l))
        return plain


class PromptTuning(Tuner):
    """Prompt tuning (arXiv 2104.08691): P learned rows before the input embeddings.  C P parameters."""

    lr = 1e-2

    def __init__(self, config: Config, P: int = 20):
        super().__init__()
        self.soft = nn.Parameter(torch.zeros(P, config.n_embd))

    def start(self, model: Decoder):
        start_as_tokens(self.soft, model)

    def embed(self, x: Tensor, instr: Tensor) -> tuple[Tensor, Tensor, None]:
        (B, T, _), P = x.shape, len(self.soft)
        at = torch.arange(P, P + T, device=x.device).expand(B, T)
        return torch.cat((self.soft.to(x.dtype).expand(B, -1, -1), x), 1), at, None


@torch.no_grad()
def start_as_tokens(soft: Tensor, model: Decoder):
    """Set soft (.., C) to embeddings of tokens drawn at random: the best start that arXiv 2104.08691 found."""
    soft.copy_(model.wte.weight[torch.randint(len(model.wte.weight), soft.shape[:-1])])


def mean_state(x: Tensor, instr: Tensor) -> Tensor:
    """The instruction's mean state (B, 1, C), in fp32, of x (B, T, C)."""
    return mean_pool(x.float(), None, instr) @ x.float()


Position = Literal["before", "task", "instance"]


class Dynamic(Tuner):
    """Dynamic prompting (arXiv 2303.02909): where P soft tokens stand, how many, and which is chosen, not fixed.

        position   the first i stand before the instruction, the others after it: before (i = P), task (the logits of
                   i are learned), instance (they are a linear function of the instruction's mean embedding)
        length     how many of the P there are, by instance; the others are masked
        pool       so many prompts, mixed by instance

    The choices of i and of the length are Gumbel-softmax draws while training (one-hot forward, soft backward, the
    temperature falling from 1 to 1/2), and the likeliest ones afterwards.
    """

    lr = 1e-2

    def __init__(
        self, config: Config, P: int = 10, position: Position = "instance", length: bool = False, pool: int = 1
    ):
        super().__init__()
        C = config.n_embd
        self.soft = nn.Parameter(torch.zeros(pool, P, C))
        self.mix = nn.Linear(C, pool) if pool > 1 else None
        self.count = nn.Linear(C, P + 1) if length else None
        self.split = nn.Linear(C, P + 1) if position == "instance" else None
        self.logits = nn.Parameter(torch.zeros(P + 1)) if position == "task" else None
        self.register_buffer("tau", torch.tensor(1.0), persistent=False)

    def start(self, model: Decoder):
        start_as_tokens(self.soft, model)

    def progress(self, done: float):
        self.tau.fill_(1 - done / 2)

    def choose(self, logits: Tensor) -> Tensor:
        """One of the n choices in each row of logits (.., n), one-hot: drawn while training, else the likeliest."""
        if self.training:
            return F.gumbel_softmax(logits, self.tau, hard=True)
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)

    def embed(self, x: Tensor, instr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (B, T, _), P = x.shape, self.soft.shape[1]
        mean = mean_state(x, instr)[:, 0]  # (B, C)
        soft = self.soft[0].expand(B, -1, -1)
        if self.mix is not None:
            soft = torch.einsum("bk,kpc->bpc", self.mix(mean).softmax(-1), self.soft)
        n = torch.full((B, 1), P, device=x.device)
        if self.count is not None:
            count = self.choose(self.count(mean))  # (B, P+1), one-hot
            n, soft = count.argmax(-1, keepdim=True), soft * (1 - count.cumsum(-1))[:, :P, None]
        if self.split is None and self.logits is None:
            split = F.one_hot(n[:, 0], P + 1).to(soft.dtype)
        else:
            split = self.choose(self.logits.expand(B, -1) if self.split is None else self.split(mean))  # (B, P+1)
        index, first = layouts(P, T, n, instr)
        every = torch.cat((soft.to(x.dtype), x), 1)[torch.arange(B, device=x.device)[:, None, None], index]
        first = first.gather(1, split.argmax(-1, keepdim=True))  # (B, 1)
        at = torch.arange(T, device=x.device) + torch.where(instr, first, P)
        return torch.einsum("bi,bitc->btc", split.to(x.dtype), every), at, torch.arange(P + T, device=x.device) >= P - n


def layouts(P: int, T: int, n: Tensor, instr: Tensor) -> tuple[Tensor, Tensor]:
    """The P+1 ways to stand n (B, 1) of P soft tokens around the instruction among T tokens.

    Layout i: the P - n unused soft tokens, min(i, n) soft tokens, the instruction, the other soft tokens, the rest.
    Returns indices (B, P+1, P+T) into soft tokens and tokens, one behind the other, and where the instruction begins
    (B, P+1).
    """
    place, n, t = torch.arange(P + T, device=n.device), n[..., None], instr.sum(1)[:, None, None]
    first = P - n + torch.arange(P + 1, device=n.device)[:, None].minimum(n)  # (B, P+1, 1)
    index = torch.where(place < first, place - P + n, P + place - first)
    index = torch.where(place < P - n, n + place, index)
    index = torch.where(place >= first + t, place - t - P + n, index)
    return torch.where(place >= P + t, place, index), first[..., 0]


class Hooked(Tuner):
    """A tuner that acts through hooks on the frozen model's modules.

    Among other tenants (`Tenants`): only (B,) is True on its rows, None for all; quiet stops it for a while.
    """

    only, quiet = None, False

    def __init__(self):
        super().__init__()
        self.hooks = []

    def hook(self, module: nn.Module, f: Callable[[Tensor, Tensor], Tensor]):
        """From now on `module` gives f(x, y) where it gave y for x; what trains is in fp32, x and y may not be."""

        def g(_, inputs, y):
            if self.quiet:
                return y
            out = f(inputs[0], y).to(y.dtype)
            if self.only is None:
                return out
            return torch.where(self.only.repeat_interleave(len(y) // len(self.only))[:, None, None], out, y)

        self.hooks.append(module.register_forward_hook(g))

    def detach(self):
        while self.hooks:
            self.hooks.pop().remove()


class LoRA(Hooked):
    """y = W x + (alpha / r) B A x for the linear layers named in `on` (arXiv 2106.09685).

    q, k, v, o of the attention, up, down (and gate) of the MLP, or all.  B starts at zero, so training starts at the
    frozen model.  L r (in + out) parameters a linear layer.
    """

    lr = 5e-3

    def __init__(self, config: Config, r: int = 8, alpha: float = 16.0, on: str = "q,v"):
        super().__init__()
        with torch.device("meta"):
            linear = {name: m for name, m in Block(config).named_modules() if isinstance(m, nn.Linear)}
        names = {name.split(".")[-1]: name for name in linear}
        asked = list(names) if on == "all" else on.split(",")
        if set(asked) - set(names) or len(set(asked)) < len(asked):
            raise UsageError(f"lora's option on takes some of {','.join(names)}, or all; got {on!r}")
        self.scale, self.on = alpha / r, [names[site] for site in asked]
        sites = [linear[name] for name in self.on] * config.n_layer
        self.A = nn.ParameterList(torch.empty(r, site.in_features) for site in sites)
        self.B = nn.ParameterList(torch.zeros(site.out_features, r) for site in sites)
        for a in self.A:
            nn.init.kaiming_uniform_(a, a=5**0.5)

    def sites(self, model: Decoder) -> Iterator[tuple[nn.Linear, Tensor, Tensor]]:
        """(linear layer, its A (r, in), its B (out, r)), one after the other."""
        return zip([block.get_submodule(name) for block in model.h for name in self.on], self.A, self.B, strict=True)

    def attach(self, model: Decoder):
        for linear, a, b in self.sites(model):
            self.hook(linear, lambda x, y, a=a, b=b: y + self.scale * F.linear(F.linear(x.float(), a), b))

    @torch.no_grad()
    def merge(self, model: Decoder):
        """Add the updates to the model's weights and detach: the tuned model, at the frozen model's cost."""
        self.detach()
        for linear, a, b in self.sites(model):
            linear.weight += (self.scale * b @ a).to(linear.weight.dtype)


class Adapter(Hooked):
    """y + W2 gelu(W1 y + b1) + b2 on what the attention and the MLP give, before the residual sum (arXiv 1902.00751).

    Bottleneck m; W2 starts near zero.  The norms train, too.  2 L (2 C m + m + C) parameters and those of the norms.
    """

    lr = 2e-3

    def __init__(self, config: Config, m: int = 8):
        super().__init__()
        C, L = config.n_embd, config.n_layer
        self.adapters = nn.ModuleList(nn.Sequential(nn.Linear(C, m), nn.GELU(), nn.Linear(m, C)) for _ in range(2 * L))
        for adapter in self.adapters:
            nn.init.normal_(adapter[2].weight, std=1e-3)
            nn.init.zeros_(adapter[2].bias)
        self.norms = nn.ModuleList(norm(config) for _ in range(2 * L + 1))

    def pairs(self, model: Decoder) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(the model's norm, ours): ours train, the model's stay as they are."""
        frozen = [m for block in model.h for m in (block.ln_1, block.ln_2)] + [model.ln_f]
        return zip(frozen, self.norms, strict=True)

    def start(self, model: Decoder):
        for frozen, ours in self.pairs(model):
            ours.load_state_dict(frozen.state_dict())

    def attach(self, model: Decoder):
        for module, adapter in zip([m for block in model.h for m in (block.attn.o, block.mlp)], self.adapters):
            self.hook(module, lambda x, y, adapter=adapter: y + adapter(y.float()))
        for frozen, ours in self.pairs(model):
            self.hook(frozen, lambda x, y, ours=ours: ours(x.float()))


class Full(Tuner):
    """Every weight trains: a copy of the model's, in fp32, which stands in for them while it is attached."""

    lr = 1e-3

    def __init__(self, config: Config):
        super().__init__()
        self.model, self.frozen = Decoder(config), {}

    def start(self, model: Decoder):
        self.model.load_state_dict(model.state_dict())

    def attach(self, model: Decoder):
        self.frozen = {"of": model, "parts": dict(model.named_children())}
        for name, part in self.model.named_children():
            setattr(model, name, part)

    def detach(self):
        for name, part in self.frozen.get("parts", {}).items():
            setattr(self.frozen["of"], name, part)


class CaPT(Tuner):
    """CaPT (arXiv 2510.16670): a learned vector plus the instruction's mean state, at every layer.

    One soft token a layer, no generator: C L parameters.  (With P > 1, which the paper does not have, P of them.)
    """

    lr = 5e-2

    def __init__(self, config: Config, P: int = 1):
        super().__init__()
        self.p = nn.ParameterList(torch.randn(P, config.n_embd) * 0.1 for _ in range(config.n_layer))

    def prompt(self, l: int, x: Tensor, instr: Tensor) -> Tensor:
        return self.p[l] + mean_state(x, instr)  # (P, C) + (B, 1, C)


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


METHODS = {
    "iapt": IAPT, "static": Static, "ptuning2": PTuning2, "prefix": PrefixTuning, "prompt": PromptTuning,
    "dynamic": Dynamic, "capt": CaPT, "lora": LoRA, "adapter": Adapter, "full": Full, "mine": Mine,
}  # fmt: skip


def arguments(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class that can be options: those with a number, a word, yes or no as default."""
    return {k: p for k, p in inspect.signature(cls).parameters.items() if isinstance(p.default, (int, float, str))}


def options(cls: type[Tuner], name: str, given: Iterable[str]) -> dict:
    """['P=8', ...] -> {'P': 8}, checked against a class's arguments: names, types of the defaults, choices.

    A whole number is a size: at least 1, or 0 for a Count or where that is the default; another is a rate or a factor,
    not negative.  Raises UsageError, which names the method.
    """
    known, out = arguments(cls), {}
    for text in given:
        key, _, value = text.partition("=")
        if key not in known:
            have = ", ".join(f"{k}={p.default}" for k, p in known.items()) or "none"
            raise UsageError(f"{name} has no option {key!r}. It has: {have}")
        choices = get_args(known[key].annotation)
        kind = type(known[key].default)
        try:
            out[key] = {"0": False, "1": True}[value] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise UsageError(
                f"{name}'s option {key} takes {'0 or 1' if kind is bool else 'a number'}, got {value!r}"
            ) from None
        least = 0 if known[key].annotation is Count or known[key].default == 0 else 1
        if kind is int and out[key] < least:
            raise UsageError(f"{name}'s option {key} must be at least {least}, got {value}")
        if kind is float and not 0 <= out[key] < math.inf:
            raise UsageError(f"{name}'s option {key} must be a finite number of 0 or more, got {value}")
        if choices and out[key] not in choices:
            raise UsageError(f"{name}'s option {key} can be {', '.join(map(str, choices))}; got {value!r}")
    return out


def complete(name: str, given: Iterable[str]) -> list[str]:
    """All of a method's options, as on the command line: what a checkpoint has to say, because defaults may change."""
    defaults = {k: p.default for k, p in arguments(METHODS[name]).items()}
    chosen = defaults | options(METHODS[name], name, given)
    return [f"{k}={int(v) if isinstance(v, bool) else v}" for k, v in chosen.items()]


def build(name: str, config: Config, given: Iterable[str] = ()) -> Tuner:
    """A method's tuner by its name, with options as on the command line.  Raises UsageError if one of them is wrong."""
    if name not in METHODS:
        raise UsageError(f"no method {name!r}. There are: {', '.join(METHODS)}")
    return METHODS[name](config, **options(METHODS[name], name, given))
