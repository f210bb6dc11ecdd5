"""What becomes of a cache's rows: several hypotheses a row (beam search), or several rows that begin alike.

A cache of `Decoder.read` is the frozen model's, so it does for all methods that act on the answer alone, and tenants.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model import Cache, Decoder


def beam_search(
    step: Callable, logits: Tensor, cache: Cache, K: int, max_new: int, stop: int | None, length_penalty: float
) -> list[list[int]]:
    """Beam search from `prefill`'s logits (B, V) and cache: the new tokens, a list per row.

    Each row keeps the K hypotheses with the highest  log p(tokens) / n^length_penalty,  n their number with the stop.
    A hypothesis that has stopped stays as it is, and competes with those that go on.
    """
    (B, V), device = logits.shape, logits.device
    first = torch.arange(B, device=device)[:, None] * K  # a row's hypotheses are neighbours
    select_rows(cache, torch.arange(B, device=device).repeat_interleave(K))
    logits = logits.repeat_interleave(K, 0)
    score = torch.full((B, K), float("-inf"), device=device)  # log p; at first there is one hypothesis, the empty one
    score[:, 0] = 0
    done = torch.zeros(B, K, dtype=torch.bool, device=device)
    n = torch.zeros(B, K, device=device)
    tokens = torch.empty(B, K, 0, dtype=torch.long, device=device)
    stay = torch.full((V,), float("-inf"), device=device)
    stay[0] = 0  # the one continuation of a hypothesis that has stopped
    for i in range(max_new):
        log_p = logits.float().log_softmax(-1).unflatten(0, (B, K))
        log_p = torch.where(done[..., None], stay, log_p)  # (B, K, V)
        n = n + ~done
        rank = (score[..., None] + log_p) / n[..., None] ** length_penalty
        best = rank.flatten(1).topk(K).indices  # (B, K)
        beam, new = best // V, best % V
        score = (score[..., None] + log_p).flatten(1).gather(1, best)
        done, n = done.gather(1, beam), n.gather(1, beam)
        tokens = tokens.gather(1, beam[..., None].expand(-1, -1, i))
        tokens = torch.cat((tokens, new.masked_fill(done, -1)[..., None]), 2)
        if stop is not None:
            done = done | (new == stop)
        if done.all() or i == max_new - 1:
            break
        select_rows(cache, (first + beam).flatten())
        logits = step(new.flatten(), cache)
    return [[t for t in row if t not in (-1, stop)] for row in tokens[:, 0].tolist()]


def select_rows(cache: Cache, rows: Tensor):
    """Go on with the rows of these indices, in this order; a row may occur several times."""
    change_rows(cache, lambda x: x[rows])


def change_rows(cache: Cache, change: Callable[[Tensor], Tensor]):
    """Change all tensors (B, ..) of a cache."""

    def changed(x):
        if isinstance(x, tuple):
            return type(x)(*map(changed, x))
        return None if x is None else change(x)

    cache.layers, cache.states = [changed(layer) for layer in cache.layers], [changed(x) for x in cache.states]
    cache.last, cache.instr = changed(cache.last), changed(cache.instr)
    cache.at, cache.pos = change(cache.at), change(cache.pos)


def read_prefix(model: Decoder, ids: list[int], rows: int) -> Cache:
    """What `rows` prompts begin with, read once, for `prefill(..., past=...)`: which leaves it as it is."""
    idx = torch.tensor([ids], device=model.wte.weight.device)
    cache = model.read(idx, torch.tensor([len(ids)], device=idx.device), whole=True)
    change_rows(cache, lambda x: x.expand(rows, *x.shape[1:]))
    return cache


def common_prefix(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with, less than the shortest has."""
    shortest = min(map(len, prompts)) - 1
    return next((i for i in range(shortest) if len({prompt[i] for prompt in prompts}) > 1), shortest)
