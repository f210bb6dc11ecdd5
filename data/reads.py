"""What the frozen model makes of a text is the same at every step: it is computed once, and kept while it fits.

Reads     the prompts of --act answer, or instructions that are hidden: keys, values, and states that enter a layer
Teacher   the last states of the model that sees an instruction, for --distill
seen      the same, for one batch
"""

import torch
from torch import Tensor

from data import Batch, Example, right_pad
from model import NO_TUNER, Cache, Decoder, Tuner


class Reads:
    """reads(batch) is the Cache that `model.read` would leave for what `batch.instr` marks.

    But for the last hidden states, which are zeros: `Decoder.hidden` leaves them out, given `n`.  A token takes
    L (2 G D + C) numbers.
    """

    def __init__(self, model: Decoder, tuner: Tuner):
        self.model, self.tuner, self.kept = model, tuner, {}  # text: keys and values (L, G, T, D), states (L, T, C)

    def __call__(self, batch: Batch) -> Cache:
        length = batch.instr.sum(1)
        texts = [tuple(ids[:n]) for ids, n in zip(batch.idx.tolist(), length.tolist())]
        if new := sorted(set(texts) - set(self.kept), key=len):
            self.keep(new)
        k, v, states = (padded([self.kept[text][i] for text in texts]) for i in range(3))
        cache = Cache(length if self.tuner.act == "hidden" else length - 1)
        cache.instr = batch.instr[:, : states.shape[2]]
        for layer in zip(k, v):
            cache.append(*layer)
        cache.states, cache.last = list(states), torch.zeros_like(states[0])
        return cache

    def keep(self, texts: list[tuple[int, ...]]):
        cache = self.model.read(*right_pad(texts, self.model.wte.weight.device), self.tuner)
        k, v = (torch.stack([layer.joined[i] for layer in cache.layers]) for i in range(2))
        states = torch.stack(cache.states)
        for b, text in enumerate(texts):
            n = len(text)
            self.kept[text] = k[:, b, :, :n].clone(), v[:, b, :, :n].clone(), states[:, b, :n].clone()


def padded(rows: list[Tensor]) -> Tensor:
    """Rows (L, .., T, D) of different T, padded with zeros and stacked: (L, B, .., T, D)."""
    L, *more, _, D = rows[0].shape
    out = rows[0].new_zeros(L, len(rows), *more, max(x.shape[-2] for x in rows), D)
    for b, x in enumerate(rows):
        out[:, b, ..., : x.shape[-2], :] = x
    return out


def keep_reads(model: Decoder, tuner: Tuner, examples: list[Example], gigabytes: float) -> Reads | None:
    """The reads of all examples, or None if they would take more than so many gigabytes; says which."""
    c, weight = model.config, model.wte.weight
    texts = {tuple(e.prompt[: e.hidden or None]) for e in examples}
    numbers = c.n_layer * (2 * c.n_kv_head * c.head_dim + c.n_embd) * sum(map(len, texts))
    size, what = numbers * weight.element_size() / 1e9, "instructions" if tuner.act == "hidden" else "prompts"
    kept = size <= gigabytes
    print(
        f"reads of all {what}: {size:.2f} GB, {'kept' if kept else 'read anew each step'} (--keep-reads {gigabytes:g})"
    )
    return Reads(model, tuner) if kept else None


@torch.no_grad()
def seen(model: Decoder, idx: Tensor, tuner: Tuner = NO_TUNER) -> Tensor:
    """The last hidden states (B, T, C) of the frozen model that sees all of idx (B, T); the tuner is silent."""
    with tuner.silent():
        return model.hidden(idx)


class Teacher:
    """teacher(batch) -> `seen`'s states (N, C) of the tokens with a target; kept, if those of all examples fit.

    share: how much of the loss is the divergence from it; the rest is the answers' own.
    """

    def __init__(self, model: Decoder, tuner: Tuner, examples: list[Example], share: float, gigabytes: float):
        weight = model.wte.weight
        size = sum(len(e.response) for e in examples) * model.config.n_embd * weight.element_size() / 1e9
        self.model, self.tuner, self.share, self.kept, self.keep = model, tuner, share, {}, size <= gigabytes

    def __call__(self, batch: Batch) -> Tensor:
        on = batch.targets >= 0
        if not self.keep:
            return seen(self.model, batch.idx, self.tuner)[on]
        last = torch.where(on, torch.arange(on.shape[1], device=on.device), 0).amax(1).tolist()
        rows = [tuple(ids[: n + 1]) for ids, n in zip(batch.idx.tolist(), last)]
        if new := [b for b, row in enumerate(rows) if row not in self.kept]:
            states = seen(self.model, batch.idx[new], self.tuner)
            self.kept |= {rows[b]: x[mask].clone() for b, x, mask in zip(new, states, on[new])}
        return torch.cat([self.kept[row] for row in rows])
