"""The other methods behind IAPT's interface:

    static    learned soft tokens at each layer: P-tuning v2 (space=kv), deep soft prompts (space=hidden)
    lora      low-rank updates of linear layers
    full      all weights of the model train
    mine      the example to fork: soft tokens that are a projection of the mean instruction state

and what all methods share:

    METHODS                       {name: class}; what stands here is a method everywhere: train.py, sample.py, the tests
    build(name, config, given)    a tuner from its name and its options as strings
    save_tuner, load_tuner        what was trained, and for what

Each class reads alone.  Letters for shapes are those of model.py.
"""

import inspect
from typing import get_args

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import replacing
from iapt import IAPT, Space, Tuner, split_kv


class Static(Tuner):
    """P learned soft tokens at every layer, the same for every instruction.

    space='kv' learns keys and values (P-tuning v2, arXiv 2110.07602, without a reparametrising MLP), 2 G D P L
    parameters; space='hidden' learns hidden states that pass through the layer's own norm and projections, C P L
    parameters.
    """

    lr = 5e-2  # what IAPT's static part learns with

    def __init__(self, config, P: int = 16, space: Space = "kv"):
        super().__init__()
        if P < 1:
            raise ValueError(f"static wants P >= 1, got P={P}")
        c, self.space, self.head_dim = config, space, config.head_dim
        out = {"kv": 2 * c.n_kv_head * c.head_dim, "hidden": c.n_embd}[space]
        self.static = nn.ParameterList(torch.randn(P, out) * 0.1 for _ in range(c.n_layer))

    def prompt(self, l, x, instr):
        return self.static[l].expand(len(x), -1, -1)

    def kv(self, block, l, x, instr):
        if self.space == "hidden":
            return super().kv(block, l, x, instr)
        return split_kv(self.prompt(l, x, instr), self.head_dim)


class LoRA(Tuner):
    """y = W x + (alpha / r) B A x for the attention's projections named in `on` (arXiv 2106.09685).

    B starts at zero, so training starts at the frozen model.  L r (in + out) parameters a projection.
    """

    lr = 5e-3

    def __init__(self, config, r: int = 8, alpha: float = 16.0, on: str = "qv"):
        super().__init__()
        c, self.on = config, on
        out = {"q": c.n_head * c.head_dim, "k": c.n_kv_head * c.head_dim, "v": c.n_kv_head * c.head_dim}
        if r < 1 or not on or set(on) - set(out):
            raise ValueError(f"lora wants r >= 1 and on of the letters q, k, v; got r={r} on={on!r}")
        self.scale = alpha / r
        self.A = nn.ParameterList(torch.empty(r, c.n_embd) for _ in range(c.n_layer) for _ in on)
        self.B = nn.ParameterList(torch.zeros(out[site], r) for _ in range(c.n_layer) for site in on)
        for a in self.A:
            nn.init.kaiming_uniform_(a, a=5**0.5)
        self.hooks = []

    def attach(self, model):
        sites = [getattr(block.attn, site) for block in model.h for site in self.on]
        self.hooks = [linear.register_forward_hook(self.update(i)) for i, linear in enumerate(sites)]

    def detach(self):
        while self.hooks:
            self.hooks.pop().remove()

    def update(self, i):
        def hook(linear, inputs, y):
            delta = F.linear(F.linear(inputs[0].float(), self.A[i]), self.B[i])
            return y + (self.scale * delta).to(y.dtype)

        return hook


class Full(Tuner):
    """Every weight of the model trains."""

    lr = 1e-3

    def __init__(self, config):
        super().__init__()

    def attach(self, model):
        # A submodule, so that its weights are the tuner's parameters; in fp32, as everything that is trained.
        self.model = model.float().requires_grad_(True)


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


METHODS = {"iapt": IAPT, "static": Static, "lora": LoRA, "full": Full, "mine": Mine}


def options(cls, name, given):
    """['P=8', ...] -> {'P': 8}, checked against a class's arguments: names, types of the defaults, choices."""
    known = {k: p for k, p in inspect.signature(cls).parameters.items() if isinstance(p.default, (int, float, str))}
    out = {}
    for text in given:
        key, _, value = text.partition("=")
        if key not in known:
            have = ", ".join(f"{k}={p.default}" for k, p in known.items()) or "none"
            raise ValueError(f"{name} has no option {key!r}. It has: {have}")
        choices = get_args(known[key].annotation)
        kind = type(known[key].default)
        try:
            out[key] = {"0": False, "1": True}[value] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise ValueError(
                f"{name}'s option {key} takes {'0 or 1' if kind is bool else 'a number'}, got {value!r}"
            ) from None
        if choices and out[key] not in choices:
            raise ValueError(f"{name}'s option {key} can be {', '.join(map(str, choices))}; got {value!r}")
    return out


def build(name, config, given=()):
    """A method's tuner by its name, with options as on the command line."""
    if name not in METHODS:
        raise ValueError(f"no method {name!r}. There are: {', '.join(METHODS)}")
    return METHODS[name](config, **options(METHODS[name], name, given))


def save_tuner(path, tuner, meta, **more):
    """Write a checkpoint: the trained tensors, nothing frozen, and `meta`, which says what they are."""
    with replacing(path, "wb") as f:
        torch.save({"tuner": tuner.state_dict(), "meta": meta, **more}, f)


def fill(tuner, content, path):
    """Put a checkpoint's tensors into a tuner.  Raises ValueError if they are of another shape."""
    try:
        tuner.load_state_dict(content["tuner"])
    except RuntimeError as e:
        raise ValueError(f"{path} does not fit this model: {str(e).splitlines()[-1].strip()[:200]}") from None


def load_tuner(path):
    """A checkpoint's content.  Never unpickles code; raises ValueError for what is not a checkpoint."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["tuner"], [content["meta"][key] for key in ("method", "options", "init", "base")]
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {path}. Run: python train.py") from None
    except Exception as e:  # torch.load raises half a dozen kinds
        raise ValueError(f"{path} is not a checkpoint of train.py, or was cut off ({type(e).__name__})") from None
    return content
