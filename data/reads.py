"""Prompts that have been read, kept for the whole of training: --act answer, where the reads of a data set fit.

With --act answer the frozen model reads each prompt in the same way at every step.  What it makes of a token takes
L (2 G D + C) numbers: keys and values, and the states that enter each layer.
"""

import torch
from torch import Tensor

from data import Example, right_pad
from model import Cache, Decoder, Tuner


class Reads:
    """reads(idx, instr) is the Cache that `model.read` would leave for the prompts of a batch idx, instr (B, T).

    But for the last hidden states, which are zeros: `Decoder.hidden` leaves them out, given `n`.
    """

    def __init__(self, model: Decoder, tuner: Tuner, prompts: list[list[int]], size: int = 64):
        self.kept = {}  # prompt: keys and values (L, G, T, D), states (L, T, C)
        prompts = sorted(set(map(tuple, prompts)), key=len)
        for part in (prompts[i : i + size] for i in range(0, len(prompts), size)):
            cache = model.read(*right_pad(part, model.wte.weight.device), tuner)
            k, v = (torch.stack([layer.joined[i] for layer in cache.layers]) for i in range(2))
            states = torch.stack(cache.states)
            for b, prompt in enumerate(part):
                n = len(prompt)
                self.kept[prompt] = k[:, b, :, :n].clone(), v[:, b, :, :n].clone(), states[:, b, :n].clone()

    def __call__(self, idx: Tensor, instr: Tensor) -> Cache:
        length = instr.sum(1)
        prompts = [tuple(ids[:n]) for ids, n in zip(idx.tolist(), length.tolist())]
        k, v, states = (padded([self.kept[prompt][i] for prompt in prompts]) for i in range(3))
        cache = Cache(length - 1)
        cache.instr = instr[:, : states.shape[2]]
        for layer in zip(k, v):
            cache.append(*layer)
        cache.states, cache.last = list(states), torch.zeros_like(states[0])
        return cache


def padded(rows: list[Tensor]) -> Tensor:
    """Rows (L, .., T, D) of different T, padded with zeros and stacked: (L, B, .., T, D)."""
    L, *more, _, D = rows[0].shape
    out = rows[0].new_zeros(L, len(rows), *more, max(x.shape[-2] for x in rows), D)
    for b, x in enumerate(rows):
        out[:, b, ..., : x.shape[-2], :] = x
    return out


def keep_reads(model: Decoder, tuner: Tuner, examples: list[Example], gigabytes: float) -> Reads | None:
    """The reads of all prompts, or None if they would take more than so many gigabytes; says which."""
    c, weight = model.config, model.wte.weight
    prompts = [prompt for prompt, _ in examples]
    numbers = c.n_layer * (2 * c.n_kv_head * c.head_dim + c.n_embd) * sum(map(len, set(map(tuple, prompts))))
    size = numbers * weight.element_size() / 1e9
    kept = size <= gigabytes
    print(
        f"reads of all prompts: {size:.2f} GB, {'kept' if kept else 'read anew each step'} (--keep-reads {gigabytes:g})"
    )
    return Reads(model, tuner, prompts) if kept else None
