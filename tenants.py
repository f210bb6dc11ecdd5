"""Many tenants on one frozen model: in a batch, each row has its own checkpoint.

    tenants = Tenants([tuner_a, tuner_b], who=[0, 0, 1])     # the tenant of each row; -1: the frozen model alone
    tenants.attach(model)
    generate(model, prompts, tenants)
    tenants.detach()

Methods, and numbers of soft tokens, may differ from row to row.  A tenant of a prompt method is asked once, when the
prompts are read; after that its soft tokens are entries of the cache, and a decode step asks nobody.  Tenants of IAPT
with the same options, and as many rows each, are asked together, in one call a layer (`Alike`).
A tenant with hooks (LoRA, adapters) works at every step, on its own rows: that is the difference which the IAPT paper
is about, and `python bench.py serve` measures it.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from baselines import Hooked, LoRA
from iapt import IAPT, Tuner
from model import Block, Decoder


class Tenants(Tuner):
    """Several tuners as one.  Masks what a row does not own.

        tuners   one per tenant, not attached
        who      (B,) the tenant of each row, or -1

    In a beam search a row stands for its hypotheses, which are neighbours.  Raises ValueError for a tuner that changes
    the model by other means than hooks, such as full fine-tuning, and for rows of tenants that are not there.
    """

    def __init__(self, tuners: list[Tuner], who: Sequence[int] | Tensor):
        super().__init__()
        for tuner in tuners:
            if type(tuner).attach is not Tuner.attach and not isinstance(tuner, Hooked):
                raise ValueError(f"{type(tuner).__name__} changes the model itself: its tenants cannot share one")
        self.register_buffer("who", torch.as_tensor(who), persistent=False)
        if not all(-1 <= t < len(tuners) for t in self.who.tolist()):
            raise ValueError(f"rows of tenants {sorted(set(self.who.tolist()))}, but there are {len(tuners)}")
        self.tuners = nn.ModuleList(tuners)
        self.rows = {t: [i for i, w in enumerate(self.who.tolist()) if w == t] for t in sorted(set(self.who.tolist()))}
        self.parts, self.hooked = self.one_by_one(), []

    def attach(self, model: Decoder):
        """Tenants of IAPT, and of LoRA, that are alike in all but their weights act together, other hooks row by row.

        The weights are those of this moment, copies: training, and moving to another device, come before.
        """
        groups = {}
        for rows, tuner in self.one_by_one():  # alike in the number of their rows, too: those are stacked
            groups.setdefault((len(rows), form(tuner)) if type(tuner) is IAPT else id(rows), []).append((rows, tuner))
        self.parts = [
            alike[0] if len(alike) == 1 else (sum((rows for rows, _ in alike), []), Alike([t for _, t in alike]))
            for alike in groups.values()
        ]
        hooked = [t for t, tuner in enumerate(self.tuners) if isinstance(tuner, Hooked)]
        if len(self.rows) == 1:  # one tenant: nothing to mix
            self.hooked = [self.tuners[t] for t in hooked if t in self.rows]
        else:
            loras = {}
            for t in hooked:
                if isinstance(self.tuners[t], LoRA):
                    loras.setdefault(tuple(self.tuners[t].on), []).append(t)
                else:
                    self.tuners[t].only = self.who == t
                    self.hooked.append(self.tuners[t])
            for members in loras.values():
                who = [members.index(w) if w in members else -1 for w in self.who.tolist()]
                self.hooked.append(BatchedLoRA([self.tuners[t] for t in members], who))
        for tuner in self.hooked:
            tuner.attach(model)

    def detach(self):
        self.parts = self.one_by_one()
        while self.hooked:
            tuner = self.hooked.pop()
            tuner.detach()
            tuner.only = None

    def one_by_one(self) -> list[tuple[list[int], Tuner | None]]:
        """(rows, tuner or None for the frozen model), tenant by tenant."""
        return [(rows, self.tuners[t] if t >= 0 else None) for t, rows in self.rows.items()]

    def each(self, x: Tensor, instr: Tensor) -> Iterator[tuple[list[int], Tuner | None, Tensor, Tensor]]:
        """(rows, tuner or None for the frozen model, x and instr of these rows), part by part."""
        for rows, tuner in self.parts:
            yield rows, tuner, x[rows], instr[rows]

    def embed(self, x: Tensor, instr: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        B, T, C = x.shape
        if B != len(self.who):
            raise ValueError(f"{B} rows, but tenants of {len(self.who)}")
        given = [
            (rows, *(tuner.embed(x_, instr_) if tuner is not None else (x_, None, None)))
            for rows, tuner, x_, instr_ in self.each(x, instr)
        ]
        width = max(x_.shape[1] for _, x_, _, _ in given)
        if width == T:
            x = x.clone()
            for rows, x_, _, _ in given:
                x[rows] = x_.to(x.dtype)
            return x, None, None
        out = x.new_zeros(B, width, C)
        at = torch.arange(T, device=x.device).repeat(B, 1)
        keep = torch.zeros(B, width, dtype=torch.bool, device=x.device)
        for rows, x_, at_, keep_ in given:  # to the right of what it has less than others
            less = width - x_.shape[1]
            out[rows, less:] = x_.to(x.dtype)
            at[rows] = less + (at[rows] if at_ is None else at_)
            keep[rows, less:] = True if keep_ is None else keep_
        return out, at, keep

    def slots(self, block: Block, l: int, x: Tensor, instr: Tensor) -> tuple[tuple | None, tuple | None]:
        for hooked in self.hooked:  # soft tokens pass the frozen norm and projections, not those of another tenant
            hooked.quiet = True
        given = [
            (rows, tuner.slots(block, l, x_, instr_) if tuner is not None else (None, None))
            for rows, tuner, x_, instr_ in self.each(x, instr)
        ]
        for hooked in self.hooked:
            hooked.quiet = False
        # A row that has none apart sees zeros there, which add nothing: a softmax over nothing is nan in some kernels.
        return together([(rows, among) for rows, (among, _) in given], x, keep=False), together(
            [(rows, apart) for rows, (_, apart) in given], x, keep=True
        )


def together(given: list[tuple], x: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Soft tokens (k, v, keep), or None, of some rows each, as those of the whole batch x (B, ..).

    keep says whether rows without any see the zeros that they are given.
    """
    given = [(rows, slots) for rows, slots in given if slots is not None]
    if not given:
        return None
    (_, G, _, D), P = given[0][1][0].shape, max(k.shape[2] for _, (k, _, _) in given)
    k, v = (x.new_zeros(len(x), G, P, D) for _ in "kv")
    seen = torch.full((len(x), P), keep, device=x.device)
    for rows, (k_, v_, keep_) in given:
        n = k_.shape[2]
        k[rows, :, :n], v[rows, :, :n] = k_.to(k.dtype), v_.to(v.dtype)
        seen[rows] = False
        seen[rows, :n] = True if keep_ is None else keep_
    alike = sum(len(rows) for rows, _ in given) == len(x) and all(
        keep_ is None and k_.shape[2] == P for _, (k_, _, keep_) in given
    )
    return k, v, None if alike else seen  # a mask that hides nothing costs time at every step


class Alike(Tuner):
    """N tenants of IAPT, of one `form`, asked as one: of N R rows, row i is that of tenant i // R.

    Their weights are stacked (copies: training is not meant), and `vmap` makes one tenant's computation that of all, in
    as many kernels.
    """

    def __init__(self, tuners: list[IAPT]):
        super().__init__()
        self.apart, self.ask = tuners[0].apart, Ask(tuners[0])
        self.N, (self.weights, _) = len(tuners), stack_module_state([Ask(tuner) for tuner in tuners])  # {name: (N, ..)}

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> tuple[Tensor, Tensor, None]:
        def one(weights, x, instr):
            # tie_weights would replace the weights of a module that layers share once for each of them, and leave them.
            return functional_call(self.ask, weights, (block, l, x, instr), tie_weights=False)

        k, v = vmap(one)(self.weights, x.unflatten(0, (self.N, -1)), instr.unflatten(0, (self.N, -1)))
        return k.flatten(0, 1), v.flatten(0, 1), None


class Ask(nn.Module):
    """A tuner's `kv` as a module's forward, which is what functional_call calls."""

    def __init__(self, tuner: Tuner):
        super().__init__()
        self.tuner = tuner

    def forward(self, *args) -> tuple[Tensor, Tensor]:
        return self.tuner.kv(*args)[:2]


def form(tuner: Tuner) -> str:
    """All that its soft tokens depend on but the values of its parameters, as a text to compare."""
    shapes = [(name, p.shape, p.dtype, p.requires_grad) for name, p in tuner.named_parameters()]
    given = [
        (name, type(m), {key: value for key, value in vars(m).items() if key[0] != "_" and key != "rates"})
        for name, m in tuner.named_modules()
    ]
    return repr((shapes, given))


class BatchedLoRA(Hooked):
    """LoRA tenants on the same linear layers: each row's own two matrices, in two batched products.

    Ranks may differ (the smaller ones get zeros); row -1 has no update.  Training is not meant: the weights are copies.
    """

    def __init__(self, loras: list[LoRA], who: list[int]):
        super().__init__()
        r = max(a.shape[0] for lora in loras for a in lora.A)
        self.like = loras[0]
        # Per linear layer (B, in, r) and (B, r, out): gathered once, ready to multiply.
        self.A = [rows([F.pad(a.T, (0, r - len(a))) for a in same], who) for same in zip(*(x.A for x in loras))]
        self.B = [
            rows([F.pad(x.scale * b.T, (0, 0, 0, r - b.shape[1])) for x, b in zip(loras, same)], who)
            for same in zip(*(x.B for x in loras))
        ]

    def attach(self, model: Decoder):
        for (linear, _, _), a, b in zip(self.like.sites(model), self.A, self.B):
            a, b = a.to(linear.weight.dtype), b.to(linear.weight.dtype)  # as LoRA is served: no casts at each step
            self.hook(linear, lambda x, y, a=a, b=b: self.update(x, y, a, b))

    def update(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """y + x a b by rows: x (B K, T, in), y (B K, T, out), a (B, in, r), b (B, r, out), for K beams a row."""
        beams = len(x) // len(a)
        if beams > 1:
            a, b = a.repeat_interleave(beams, 0), b.repeat_interleave(beams, 0)
        return torch.baddbmm(y, torch.bmm(x, a), b)


def rows(matrices: list[Tensor], who: list[int]) -> Tensor:
    """Of N matrices the one of each row (B, .., ..); zeros where who is -1."""
    return F.pad(torch.stack([m.detach() for m in matrices]), (0, 0, 0, 0, 0, 1))[who]
