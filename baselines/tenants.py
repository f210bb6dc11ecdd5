"""Many tenants on one frozen model: in a batch, each row has its own checkpoint.

    tenants = Tenants([tuner_a, tuner_b], tenant_of_row=[0, 0, 1])     # -1: the frozen model alone
    tenants.attach(model)
    generate(model, prompts, tenants)
    tenants.detach()

Methods, and numbers of soft tokens, may differ from row to row.  A tenant of a prompt method is asked once, when the
prompts are read.  After that its soft tokens are entries of the cache, and a decode step asks nobody.
A tenant with hooks (LoRA, adapters) works at every step, on its own rows.  That is the difference which the IAPT paper
is about, and `python -m experiments.bench serve` measures it.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from baselines.embedded import Embedded, EmbeddedTuner
from baselines.hooks import Hooked, LoRA
from model import NO_TUNER, Block, Context, Decoder, Soft, Tuner


class Tenants(EmbeddedTuner):
    """Several tuners as one.  Masks what a row does not own.

        tuners          one per tenant, not attached
        tenant_of_row   (B,) the tenant of each row, or -1

    In a beam search a row stands for its hypotheses, which are neighbours.  Raises ValueError for a tuner that changes
    the model by other means than hooks, such as full fine-tuning, and for rows of tenants that do not exist.
    """

    def __init__(self, tuners: list[Tuner], tenant_of_row: Sequence[int] | Tensor):
        super().__init__()
        for tuner in tuners:
            if type(tuner).attach is not Tuner.attach and not isinstance(tuner, Hooked):
                raise ValueError(f"{type(tuner).__name__} changes the model itself: its tenants cannot share one")
            if tuner.act != tuners[0].act:
                raise ValueError("tenants that act on all tokens and on the answer alone: ask them one after the other")
            if tuner.first != tuners[0].first:
                raise ValueError("tenants whose words have other positions (shift=1): ask them one after the other")
        self.act, self.first = (tuners[0].act, tuners[0].first) if tuners else ("all", 0)
        self.register_buffer("tenant_of_row", torch.as_tensor(tenant_of_row), persistent=False)
        owners = self.tenant_of_row.tolist()
        if not all(-1 <= t < len(tuners) for t in owners):
            raise ValueError(f"rows of tenants {sorted(set(owners))}, but there are {len(tuners)}")
        if self.first and -1 in owners:
            raise ValueError("the frozen model's words keep their positions (shift=0): ask it by itself")
        self.tuners = nn.ModuleList(tuners)
        self.rows = {t: [i for i, owner in enumerate(owners) if owner == t] for t in sorted(set(owners))}
        self.parts = [(rows, tuners[t] if t >= 0 else NO_TUNER) for t, rows in self.rows.items()]
        self.hooked = []

    def attach(self, model: Decoder):
        """Tenants of LoRA act together; other hooks row by row.

        LoRA's weights are copied now: train, and move to another device, before.
        """
        self.hooked = self.hooked_tuners()
        for tuner in self.hooked:
            tuner.attach(model)

    def detach(self):
        while self.hooked:
            tuner = self.hooked.pop()
            tuner.detach()
            tuner.rows = None

    @contextlib.contextmanager
    def attached(self, model: Decoder, rows: list[int]) -> Iterator["Tenants"]:
        """The tenants of these rows of the batch, attached meanwhile."""
        part = Tenants(list(self.tuners), self.tenant_of_row[rows]).to(self.tenant_of_row.device).eval()
        part.attach(model)
        try:
            yield part
        finally:
            part.detach()

    def hooked_tuners(self) -> list[Hooked]:
        """The tuners that put hooks on the model, LoRA's of several tenants as one."""
        hooked = {t: tuner for t, tuner in enumerate(self.tuners) if isinstance(tuner, Hooked)}
        if len(self.rows) == 1:  # one tenant: nothing to mix
            return [tuner for t, tuner in hooked.items() if t in self.rows]
        out, loras = [], {}
        for t, tuner in hooked.items():
            if isinstance(tuner, LoRA):
                loras.setdefault(tuple(tuner.on), []).append(t)
            else:
                tuner.rows = self.tenant_of_row == t
                out.append(tuner)
        for members in loras.values():
            member_of_row = [members.index(t) if t in members else -1 for t in self.tenant_of_row.tolist()]
            out.append(BatchedLoRA([self.tuners[t] for t in members], member_of_row))
        return out

    def ask(self, x: Tensor, instr: Tensor) -> Iterator[tuple[list[int], Tuner, Tensor, Tensor]]:
        """(rows, tuner, x and instr of these rows), part by part."""
        for rows, tuner in self.parts:
            yield rows, tuner, x[rows], instr[rows]

    def silent(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for hooked in self.hooked:
            stack.enter_context(hooked.silent())
        return stack

    def embed(self, x: Tensor, instr: Tensor) -> Embedded | None:
        B, T, device = *x.shape[:2], x.device
        self.check_rows(x)
        parts = [(rows, tuner.embed(*own)) for rows, tuner, *own in self.ask(x, instr) if hasattr(tuner, "embed")]
        parts = [(rows, part) for rows, part in parts if part is not None]
        if not parts:
            return None
        width = max(part.x.shape[1] for _, part in parts)
        out = F.pad(x, (0, 0, 0, width - T))  # a row with fewer soft tokens than others has more padding
        at, n = torch.arange(T, device=device).repeat(B, 1), torch.zeros(B, dtype=torch.long, device=device)
        for rows, part in parts:
            out[rows, : part.x.shape[1]] = part.x.to(x.dtype)
            at[rows], n[rows] = part.at, part.n
        return Embedded(out, at, n)

    def context(self, block: Block, l: int, x: Tensor, instr: Tensor) -> Context:
        with self.silent():  # soft tokens pass the frozen norm and projections, not those of another tenant
            return merge([(rows, tuner.context(block, l, *own)) for rows, tuner, *own in self.ask(x, instr)], x)

    def write(self, model: Decoder, states: list[Tensor], instr: Tensor) -> list[Context]:
        self.check_rows(instr)
        with self.silent():
            parts = [(rows, tuner.write(model, [x[rows] for x in states], instr[rows])) for rows, tuner in self.parts]
        return [merge([(rows, layers[l]) for rows, layers in parts], x) for l, x in enumerate(states)]

    def check_rows(self, x: Tensor):
        """Raise ValueError if a batch x (B, ..) has not a row for each that has a tenant."""
        if len(x) != len(self.tenant_of_row):
            raise ValueError(f"{len(x)} rows, but tenants of {len(self.tenant_of_row)}")


def merge(parts: list[tuple[list[int], Context]], x: Tensor) -> Context:
    """The soft tokens of some rows each as those of the whole batch x (B, ..).

    A row without separate ones sees zeros, which add nothing: a softmax over nothing is nan in some kernels.
    """
    joined = merge_rows([(rows, soft.joined) for rows, soft in parts], x, keep=False)
    separate = merge_rows([(rows, soft.separate) for rows, soft in parts], x, keep=True)
    return Context(joined, separate)


def merge_rows(parts: list[tuple[list[int], Soft | None]], x: Tensor, keep: bool) -> Soft | None:
    """Soft tokens of some rows each, as those of the whole batch x (B, ..).

    keep says whether rows without any see the zeros that stand in for them.
    """
    parts = [(rows, soft) for rows, soft in parts if soft is not None]
    if not parts:
        return None
    _, G, _, D = parts[0][1].k.shape
    P = max(soft.k.shape[2] for _, soft in parts)
    k, v = x.new_zeros(len(x), G, P, D), x.new_zeros(len(x), G, P, D)
    seen = torch.full((len(x), P), keep, device=x.device)
    for rows, soft in parts:
        n = soft.k.shape[2]
        k[rows, :, :n], v[rows, :, :n] = soft.k.to(k.dtype), soft.v.to(v.dtype)
        seen[rows] = torch.arange(P, device=x.device) < n
    complete = sum(len(rows) for rows, _ in parts) == len(x) and all(soft.k.shape[2] == P for _, soft in parts)
    return Soft(k, v, None if complete else seen[:, None, None])  # a mask that hides nothing costs time at every step


class BatchedLoRA(Hooked):
    """LoRA tenants on the same linear layers: each row's own two matrices, in two batched products.

    Ranks may differ (the smaller ones get zeros); row -1 has no update.  The weights are copies: not for training.
    """

    def __init__(self, loras: list[LoRA], member_of_row: list[int]):
        super().__init__()
        r = max(a.shape[0] for lora in loras for a in lora.A)
        self.like = loras[0]
        # Per linear layer (B, in, r) and (B, r, out): gathered once, ready to multiply.
        self.A = [
            gather([F.pad(a.T, (0, r - len(a))) for a in site], member_of_row) for site in zip(*(x.A for x in loras))
        ]
        self.B = [
            gather([F.pad(x.scale * b.T, (0, 0, 0, r - b.shape[1])) for x, b in zip(loras, site)], member_of_row)
            for site in zip(*(x.B for x in loras))
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


def gather(matrices: list[Tensor], index: list[int]) -> Tensor:
    """matrices[i] for each i of the index (B, .., ..); zeros where it is -1."""
    return F.pad(torch.stack([m.detach() for m in matrices]), (0, 0, 0, 0, 0, 1))[index]
