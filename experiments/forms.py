"""A search among forms of IAPT on validation rows.  This file lives in one commit; experiments/LOG.md has its results.

python -m experiments.forms p3 --validate-only --methods f-v1,f-const --rates 0.4 1 2.5 --seeds 1 --steps 100
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from baselines import METHODS
from experiments import compare
from experiments.compare import ROWS, Row
from iapt import ACTIVATIONS, SubtractMean, rms_norm, softmax_over
from model import Block, Config, Decoder, Soft, Tuner
from plumbing.cli import run


class Probe(nn.Module):
    """A layer's generator in one of many forms: x (B, T, C), instr (B, T) -> R(Q) (B, P, m)."""

    def __init__(self, down: nn.Linear, P: int, activation: str, centre: bool, norm: bool):
        super().__init__()
        m = down.out_features
        self.down, self.act, self.norm = down, ACTIVATIONS[activation](), norm
        self.w_sa = nn.Parameter(torch.randn(m, P) * m**-0.5)
        self.centre = nn.Parameter(torch.zeros(P, m)) if centre else None

    def forward(self, x: Tensor, instr: Tensor) -> Tensor:
        z = self.down(rms_norm(x.float()))
        q = softmax_over(instr, (rms_norm(z) if self.norm else z) @ self.w_sa) @ z
        if self.centre is not None:
            q = SubtractMean.apply(q, self.centre)
        return self.act(rms_norm(q, eps=1e-4) if self.norm else q)


class Form(Tuner):
    """IAPT in many forms: what is shared, what is written and where.

    down, up       1: one for all layers; 0: one for each
    write          kv: keys and values; v: values
    repeat         constants for each soft token
    mlp            soft tokens that the MLP looks at: x += gelu(h K^T) V, this many constants, the first P generated
    gains          gains on q, v and the MLP's hidden state, constant and generated
    generate       0: no generator, constants alone
    const          rate of the constants, of the generator's
    """

    lr = 1.25e-3

    def __init__(
        self, config: Config, P: int = 4, m: int = 8, repeat: int = 1, down: int = 0, up: int = 0, write: str = "v",
        mlp: int = 0, gains: bool = False, generate: bool = True, centre: bool = True, norm: bool = True,
        joined: bool = False, const: float = 8.0, activation: str = "rational", scale: float = 1.0, attention: bool = True,
        down_const: bool = False, mlp_keys: bool = False,
        sites: str = "attn.q,attn.v,mlp.up", write_gains: bool = True,
    ):  # fmt: skip
        super().__init__()
        C, L, kv = config.n_embd, config.n_layer, config.n_kv_head * config.head_dim
        self.separate, self.head_dim, self.repeat, self.P, self.write = not joined, config.head_dim, repeat, P, write
        self.const, self.scale, self.gains, self.mlp, self.attention = const, scale, gains, mlp, attention
        self.mlp_keys, self.down_const = mlp_keys, down_const
        widths = {}
        if attention:
            widths["kv"] = 2 * kv if write == "kv" else kv
        if mlp:
            widths["mlp"] = 2 * C if mlp_keys else C
        q, n = config.n_head * config.head_dim, config.n_inner
        every = {"attn.q": q, "attn.k": kv, "attn.v": kv, "attn.o": C, "mlp.gate": n, "mlp.up": n, "mlp.down": C}
        self.sites = {site: every[site] for site in (every if sites == "all" else sites.split(","))} if gains else {}
        self.write_gains = write_gains
        if write_gains:
            widths |= {site.replace(".", "_"): width for site, width in self.sites.items()}
        self.generators = nn.ModuleList()
        if generate:
            downs = [nn.Linear(C, m, bias=False) for _ in range(1 if down else L)]
            for d in downs:
                nn.init.normal_(d.weight, std=C**-0.5)
            self.generators.extend(Probe(downs[0 if down else l], P, activation, centre, norm) for l in range(L))
            self.ups = nn.ModuleDict(
                {
                    name: nn.ModuleList(nn.Linear(m, w, bias=False) for _ in range(1 if up else L))
                    for name, w in widths.items()
                }
            )
            for p in self.ups.parameters():
                nn.init.zeros_(p)
        n = repeat * P
        if attention:
            self.k = nn.ParameterList(torch.randn(n, kv) for _ in range(L))
            self.v = nn.ParameterList(torch.zeros(n, kv) for _ in range(L))
        if mlp:
            self.mlp_k = nn.ParameterList(torch.randn(mlp, C) for _ in range(L))
            self.mlp_v = nn.ParameterList(torch.zeros(mlp, C) for _ in range(L))
        if gains:
            self.gain = nn.ModuleDict(
                {s.replace(".", "_"): nn.ParameterList(torch.zeros(w) for _ in range(L)) for s, w in self.sites.items()}
            )
        self.hooks, self.now = [], {}

    def write_(self, name: str, l: int, r: Tensor | None) -> Tensor | float:
        """What is generated for one place, (B, P, width), or 0."""
        if r is None:
            return 0.0
        ups = self.ups[name]
        return self.scale * ups[0 if len(ups) == 1 else l](r)

    def soft(self, block: Block, l: int, x: Tensor, instr: Tensor) -> tuple[Soft | None, Soft | None]:
        r = self.generators[l](x, instr) if len(self.generators) else None
        B = len(x)
        if self.mlp:
            s = self.write_("mlp", l, r)
            k, v = self.mlp_k[l].expand(B, -1, -1), self.mlp_v[l].expand(B, -1, -1)
            if r is not None:
                copies = self.mlp // self.P
                if self.mlp_keys:
                    dk, dv = s.chunk(2, -1)
                    k, v = k + dk.repeat(1, copies, 1), v + dv.repeat(1, copies, 1)
                else:
                    v = v + s.repeat(1, copies, 1)
            self.now["mlp", l] = (k * x.shape[-1] ** -0.5).to(x.dtype), v.to(x.dtype)
        for site in self.sites:
            name = site.replace(".", "_")
            g = self.gain[name][l] + (
                self.write_(name, l, r).mean(1, keepdim=True)
                if r is not None and self.write_gains
                else torch.zeros(B, 1, 1, device=x.device)
            )
            self.now[site, l] = (1 + g).to(x.dtype)
        if not self.attention:
            return None, None
        s = self.write_("kv", l, r)
        k, v = self.k[l].expand(B, -1, -1), self.v[l].expand(B, -1, -1)
        if r is not None:
            if self.write == "kv":
                dk, dv = s.chunk(2, -1)
                k, v = k + dk.repeat(1, self.repeat, 1), v + dv.repeat(1, self.repeat, 1)
            else:
                v = v + s.repeat(1, self.repeat, 1)
        heads = lambda t: t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        soft = Soft(heads(k), heads(v))
        return (None, soft) if self.separate else (soft, None)

    def attach(self, model: Decoder):
        for l, block in enumerate(model.h):
            if self.mlp:

                def neurons(_, inputs, y, l=l):
                    k, v = self.now["mlp", l]
                    return y + F.gelu(inputs[0] @ k.transpose(1, 2)) @ v

                self.hooks.append(block.mlp.register_forward_hook(neurons))
            for site in self.sites:
                f = lambda _, inputs, y, l=l, site=site: y * self.now[site, l]
                self.hooks.append(block.get_submodule(site).register_forward_hook(f))

    def detach(self):
        while self.hooks:
            self.hooks.pop().remove()

    def groups(self, lr: float) -> list[dict]:
        constants = [
            p for name in ("k", "v", "mlp_k", "mlp_v", "gain") for p in getattr(self, name, nn.Module()).parameters()
        ]
        constants += [g.centre for g in self.generators if g.centre is not None]
        coefficients = [p for g in self.generators for p in g.act.parameters()]
        own = {id(p) for p in constants + coefficients}
        return [
            {"params": [p for p in self.parameters() if id(p) not in own], "lr": lr},
            {"params": constants, "lr": self.const * lr, "weight_decay": 0.0},
            {"params": coefficients, "lr": 0.2 * lr, "weight_decay": 0.0},
        ]


METHODS["form"] = Form  # in the processes that do the work, too: they import this file
ROWS.update({
    "f-zero": Row("form", "down=1 up=1 write=kv repeat=3", "m"),
    "f-const": Row("form", "generate=0 repeat=5", ""),
    "f-v1": Row("form", "down=1 write=v repeat=1", "m"),
    "f-v3": Row("form", "down=1 write=v repeat=3", "m"),
    "f-kv1": Row("form", "down=1 write=kv repeat=1", "m"),
    "f-own-v1": Row("form", "write=v repeat=1", "m"),
    "f-vshared3": Row("form", "down=1 up=1 write=v repeat=3", "m"),
    "f-v3-nocentre": Row("form", "down=1 write=v repeat=3 centre=0", "m"),
    "f-v3-nonorm": Row("form", "down=1 write=v repeat=3 centre=0 norm=0", "m"),
    "f-v3-joined": Row("form", "down=1 write=v repeat=3 joined=1", "m"),
    "f-mlp-attn": Row("form", "down=1 write=v repeat=1 mlp=4", "m"),
    "f-mlp": Row("form", "attention=0 down=1 mlp=4", "m"),
    "f-mlp-up1": Row("form", "attention=0 down=1 up=1 mlp=4", "m"),
    "f-mlp-const": Row("form", "attention=0 generate=0 mlp=6", ""),
    "f-mlp-attn-const": Row("form", "generate=0 mlp=4 repeat=2", ""),
    "f-gains-const": Row("form", "attention=0 generate=0 gains=1", ""),
    "f-gains-up1": Row("form", "attention=0 down=1 up=1 gains=1", "m"),
    "f-gains": Row("form", "attention=0 down=1 gains=1", "m"),
    "f-gains-attn": Row("form", "down=1 up=1 gains=1 repeat=1 write=v", "m"),
    "f-mlp-gains": Row("form", "attention=0 down=1 up=1 gains=1 mlp=4", "m"),
    "c-gains-attn1": Row("form", "generate=0 gains=1 repeat=1", ""),
    "c-gains-attn3": Row("form", "generate=0 gains=1 repeat=3", ""),
    "c-gains-mlp": Row("form", "attention=0 generate=0 gains=1 mlp=4", ""),
    "c-allgains": Row("form", "attention=0 generate=0 gains=1 sites=all", ""),
    "c-allgains-attn": Row("form", "generate=0 gains=1 sites=all repeat=1", ""),
    "g-attn-only": Row("form", "down=1 gains=1 repeat=1 write=v write_gains=0", "m"),
    "g-allgains-attn": Row("form", "down=1 up=1 gains=1 sites=all repeat=1 write=v", "m"),
    "g-nocentre": Row("form", "down=1 up=1 gains=1 repeat=1 write=v centre=0", "m"),
    "g-nonorm": Row("form", "down=1 up=1 gains=1 repeat=1 write=v centre=0 norm=0", "m"),
    "g-const4": Row("form", "down=1 up=1 gains=1 repeat=1 write=v const=4", "m"),
})  # fmt: skip

if __name__ == "__main__":
    run(compare.main)
