"""Methods that change what the frozen model's modules compute: LoRA, adapters, full fine-tuning.

LoRA and adapters are forward hooks, so the decoder's modules and their names never change.  Letters for shapes are
those of model.py.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from model import Config, Decoder, Tuner, norm
from plumbing.cli import UsageError


class Hooked(Tuner):
    """A tuner that acts through hooks on the frozen model's modules.

    Among other tenants (`Tenants`) it acts on some rows only: rows (B,) is True on them; muted stops it for a while.
    """

    rows, muted = None, False

    def __init__(self):
        super().__init__()
        self.hooks = []

    def hook(self, module: nn.Module, f: Callable[[Tensor, Tensor], Tensor]):
        """From now on `module` returns f(x, y) where it returned y for x."""

        def forward_hook(_, inputs, y):
            if self.muted:
                return y
            out = f(inputs[0], y)
            if self.rows is None:
                return out
            return torch.where(self.rows.repeat_interleave(len(y) // len(self.rows))[:, None, None], out, y)

        self.hooks.append(module.register_forward_hook(forward_hook))

    def detach(self):
        while self.hooks:
            self.hooks.pop().remove()

    @contextlib.contextmanager
    def silent(self):
        self.muted = True
        try:
            yield
        finally:
            self.muted = False


def call_in_dtype(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), its fp32 parameters cast to x's dtype: smaller than a cast of x, and nothing in fp32 is kept."""
    return functional_call(module, {name: p.to(x.dtype) for name, p in module.named_parameters()}, (x,))


def linear_layers(c: Config, on: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Names of a block's linear layers that an option `on` names, and the shapes of their weights in all blocks."""
    H, G = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    attn = {"q": (H, c.n_embd), "k": (G, c.n_embd), "v": (G, c.n_embd), "o": (c.n_embd, H)}
    gate = {"gate": (c.n_inner, c.n_embd)} if c.arch == "llama" else {}
    mlp = {**gate, "up": (c.n_inner, c.n_embd), "down": (c.n_embd, c.n_inner)}
    shapes = {**attn, **mlp}
    sites = {"all": list(shapes), "mlp": list(mlp)}.get(on) or on.split(",")
    if set(sites) - set(shapes) or len(set(sites)) < len(sites):
        raise UsageError(f"the option on takes some of {','.join(shapes)}, each once, or mlp, or all; got {on!r}")
    names = [f"{'attn' if site in attn else 'mlp'}.{site}" for site in sites]
    return names, [shapes[site] for site in sites] * c.n_layer


def modules(model: Decoder, on: list[str]) -> list[nn.Module]:
    """The modules of these names in all blocks."""
    return [block.get_submodule(name) for block in model.h for name in on]


class LoRA(Hooked):
    """y = W x + (alpha / r) B A x for the linear layers named in `on` (arXiv 2106.09685).

    q, k, v, o of the attention; up, down (and gate) of the MLP; `mlp` or `all` of them.  B starts at zero, so training
    starts at the frozen model.  L r (in + out) parameters a linear layer.
    """

    lr = 5e-3

    def __init__(self, config: Config, r: int = 8, alpha: float = 16.0, on: str = "q,v"):
        super().__init__()
        self.on, shapes = linear_layers(config, on)
        self.scale = alpha / r
        self.A = nn.ParameterList(torch.empty(r, n_in) for _, n_in in shapes)
        self.B = nn.ParameterList(torch.zeros(n_out, r) for n_out, _ in shapes)
        for a in self.A:
            nn.init.kaiming_uniform_(a, a=5**0.5)

    def sites(self, model: Decoder) -> Iterator[tuple[nn.Linear, Tensor, Tensor]]:
        """(linear layer, its A (r, in), its B (out, r)), one after the other."""
        return zip(modules(model, self.on), self.A, self.B, strict=True)

    def attach(self, model: Decoder):
        for linear, a, b in self.sites(model):
            self.hook(
                linear, lambda x, y, a=a, b=b: y + self.scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
            )

    @torch.no_grad()
    def merge(self, model: Decoder):
        """Add the updates to the model's weights and detach: the tuned model, at the frozen model's cost.

        Raises ValueError for updates that are not for the prompt: weights act on all tokens.
        """
        if self.act != "all":
            raise ValueError("a LoRA that acts on the answer alone cannot be merged: weights act on the prompt, too")
        self.detach()
        for linear, a, b in self.sites(model):
            linear.weight += (self.scale * b @ a).to(linear.weight.dtype)


class IA3(Hooked):
    """(1 + g) times the output of the linear layers named in `on`: a learned gain for each of their features.

    Gains start at zero.  With on=k,v,up this is (IA)^3 for LLaMA (arXiv 2205.05638); for GPT-2, whose up is followed by
    GELU, the gain acts before it.  PARA, of IAPT's authors (arXiv 2502.01033), has q, v and up.
    """

    lr = 2e-2

    def __init__(self, config: Config, on: str = "q,v,up"):
        super().__init__()
        self.on, shapes = linear_layers(config, on)
        self.gains = nn.ParameterList(torch.zeros(n_out) for n_out, _ in shapes)

    def attach(self, model: Decoder):
        for linear, gain in zip(modules(model, self.on), self.gains, strict=True):
            self.hook(linear, lambda x, y, gain=gain: y * (1 + gain).to(y.dtype))


class Adapter(Hooked):
    """y + W2 gelu(W1 y + b1) + b2 after attention and after the MLP, before the residual sum (arXiv 1902.00751).

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

    def norm_pairs(self, model: Decoder) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(the model's norm, ours): ours train, the model's stay as they are."""
        frozen = [m for block in model.h for m in (block.ln_1, block.ln_2)] + [model.ln_f]
        return zip(frozen, self.norms, strict=True)

    def start(self, model: Decoder):
        for frozen, ours in self.norm_pairs(model):
            ours.load_state_dict(frozen.state_dict())

    def attach(self, model: Decoder):
        for module, adapter in zip([m for block in model.h for m in (block.attn.o, block.mlp)], self.adapters):
            self.hook(module, lambda x, y, adapter=adapter: y + call_in_dtype(adapter, y))
        for frozen, ours in self.norm_pairs(model):
            self.hook(frozen, lambda x, y, ours=ours: call_in_dtype(ours, x))


class Full(Tuner):
    """Every weight trains: a copy of the model's, in fp32, which takes the place of its own parts while attached.

    So no hook is needed, and the frozen weights stay as they are.
    """

    lr = 1e-3
    acts = ("all",)

    def __init__(self, config: Config):
        super().__init__()
        self.model = Decoder(config)
        self.replaced = None  # (the frozen model, its own parts) while attached

    def start(self, model: Decoder):
        self.model.load_state_dict(model.state_dict())

    def attach(self, model: Decoder):
        self.replaced = model, dict(model.named_children())
        for name, part in self.model.named_children():
            setattr(model, name, part)

    merge = attach  # there is no more to it

    def detach(self):
        if self.replaced is not None:
            model, parts = self.replaced
            for name, part in parts.items():
                setattr(model, name, part)
            self.replaced = None
