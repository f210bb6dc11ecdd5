"""Many tenants on one frozen model: in a batch, each row has its own checkpoint.

    tenants = Tenants([tuner_a, tuner_b], who=[0, 0, 1])     # the tenant of each row; -1: the frozen model alone
    tenants.attach(model)
    generate(model, prompts, tenants)
    tenants.detach()

Methods, and numbers of soft tokens, may differ from row to row.  A tenant of a prompt method is asked once, when the
prompts are read; after that its soft tokens are entries of the cache, and a decode step is that of the frozen model.
A tenant with hooks (LoRA, adapters) works at every step, on its own rows: that is the difference which the IAPT paper
is about, and `python bench.py serve` measures it.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines import Full, Hooked, LoRA
from iapt import Tuner


class Tenants(Tuner):
    """Several tuners as one.  Masks what a row does not own.

        tuners   one per tenant, not attached
        who      (B,) the tenant of each row, or -1

    In a beam search a row stands for its hypotheses, which are neighbours.  Raises ValueError for full fine-tuning,
    which leaves no model to share, and for rows of tenants that are not there.
    """

    def __init__(self, tuners, who):
        super().__init__()
        if any(isinstance(tuner, Full) for tuner in tuners):
            raise ValueError("full fine-tuning changes the model itself: its tenants cannot share one")
        self.register_buffer("who", torch.as_tensor(who), persistent=False)
        if not all(-1 <= t < len(tuners) for t in self.who.tolist()):
            raise ValueError(f"rows of tenants {sorted(set(self.who.tolist()))}, but there are {len(tuners)}")
        self.tuners = nn.ModuleList(tuners)
        self.rows = {t: [i for i, w in enumerate(self.who.tolist()) if w == t] for t in sorted(set(self.who.tolist()))}
        self.hooked = []

    def attach(self, model):
        """LoRA tenants that are alike in all but their weights act together, other hooks row by row."""
        loras = {}
        for t, tuner in enumerate(self.tuners):
            if isinstance(tuner, LoRA):
                loras.setdefault(tuple(tuner.on), []).append(t)
            elif isinstance(tuner, Hooked):
                self.hooked.append(OnRows(tuner, self.who == t))
        for members in loras.values():
            self.hooked.append(BatchedLoRA([self.tuners[t] for t in members], [members.index(w) if w in members else -1
                                                                              for w in self.who.tolist()]))  # fmt: skip
        for tuner in self.hooked:
            tuner.attach(model)

    def detach(self):
        while self.hooked:
            self.hooked.pop().detach()

    def each(self, x, instr):
        """(rows, tuner or None for the frozen model, x and instr of these rows), tenant by tenant."""
        for t, rows in self.rows.items():
            yield rows, self.tuners[t] if t >= 0 else None, x[rows], instr[rows]

    def embed(self, x, instr):
        B, T, C = x.shape
        given = [
            (rows, *(tuner.embed(x_, instr_) if tuner is not None else (x_, None, None)))
            for rows, tuner, x_, instr_ in self.each(x, instr)
        ]
        width = max(x_.shape[1] for _, x_, _, _ in given)
        if width == T:
            return x, None, None
        out = x.new_zeros(B, width, C)
        at = torch.arange(T, device=x.device).repeat(B, 1)
        keep = torch.zeros(B, width, dtype=torch.bool, device=x.device)
        for rows, x_, at_, keep_ in given:  # to the right of what it has less than others
            less = width - x_.shape[1]
            out[rows, less:] = x_
            at[rows] = less + (at[rows] if at_ is None else at_)
            keep[rows, less:] = True if keep_ is None else keep_
        return out, at, keep

    def kv(self, block, l, x, instr):
        for hooked in self.hooked:  # soft tokens pass the frozen norm and projections, not those of another tenant
            hooked.quiet = True
        given = [
            (rows, tuner.kv(block, l, x_, instr_) if tuner is not None else None)
            for rows, tuner, x_, instr_ in self.each(x, instr)
        ]
        for hooked in self.hooked:
            hooked.quiet = False
        given = [(rows, slots) for rows, slots in given if slots is not None]
        if not given:
            return None
        B, P = len(x), max(k.shape[2] for _, (k, _, _) in given)
        _, G, _, D = given[0][1][0].shape
        k, v = x.new_zeros(B, G, P, D), x.new_zeros(B, G, P, D)
        keep = torch.zeros(B, P, dtype=torch.bool, device=x.device)
        for rows, (k_, v_, keep_) in given:
            n = k_.shape[2]
            k[rows, :, :n], v[rows, :, :n] = k_.to(k.dtype), v_.to(v.dtype)
            keep[rows, :n] = True if keep_ is None else keep_
        return k, v, keep


class OnRows(Hooked):
    """A tuner with hooks, on some rows alone: mine (B,), True on them."""

    quiet = False

    def __init__(self, tuner, mine):
        super().__init__()
        self.tuner, self.mine = tuner, mine

    def attach(self, model):
        def on_rows(module, f):
            def g(x, y):
                if self.quiet:
                    return y
                mine = self.mine.repeat_interleave(len(x) // len(self.mine))[:, None, None]
                return torch.where(mine, f(x, y).to(y.dtype), y)

            self.hook(module, g)

        self.tuner.hook, own = on_rows, self.tuner.hook
        self.tuner.attach(model)
        self.tuner.hook = own


class BatchedLoRA(Hooked):
    """LoRA tenants on the same linear layers: each row's own two matrices, in two batched products.

    Ranks may differ (the smaller ones get zeros); row -1 has no update.  Training is not meant: the weights are copies.
    """

    quiet = False

    def __init__(self, loras, who):
        super().__init__()
        r = max(a.shape[0] for lora in loras for a in lora.A)
        self.like = loras[0]
        # Per linear layer (B, in, r) and (B, r, out): gathered once, ready to multiply.
        self.A = [rows([F.pad(a.T, (0, r - len(a))) for a in same], who) for same in zip(*(x.A for x in loras))]
        self.B = [
            rows([F.pad(x.scale * b.T, (0, 0, 0, r - b.shape[1])) for x, b in zip(loras, same)], who)
            for same in zip(*(x.B for x in loras))
        ]

    def attach(self, model):
        for (linear, _, _), a, b in zip(self.like.sites(model), self.A, self.B):
            self.hook(linear, lambda x, y, a=a, b=b: self.update(x, y, a, b))

    def update(self, x, y, a, b):
        if self.quiet:
            return y
        beams = len(x) // len(a)
        if beams > 1:
            a, b = a.repeat_interleave(beams, 0), b.repeat_interleave(beams, 0)
        return torch.baddbmm(y.float(), torch.bmm(x, a), b)


def rows(matrices, who):
    """Of N matrices the one of each row (B, .., ..); zeros where who is -1."""
    return F.pad(torch.stack([m.detach() for m in matrices]), (0, 0, 0, 0, 0, 1))[who]
