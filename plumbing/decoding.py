"""The next token, and whether there is room for it."""

import torch
from torch import Tensor


def sample_token(
    logits: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Next tokens (B,) from logits (B, V): the likeliest at temperature 0, else drawn.

    Drawn from the top_k likeliest (0: all) and the fewest likeliest tokens that have the mass top_p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = logits.float().sort(-1, descending=True)
    logits = logits - logits[:, :1]  # the largest is 0, which no temperature overflows
    probs = (logits / max(temperature, 1e-20)).softmax(-1)
    drop = probs.cumsum(-1) - probs >= top_p  # the mass before a token, so that the first always stays
    if top_k:
        drop[:, top_k:] = True
    drop[:, 0] = False
    return order.gather(1, torch.multinomial(probs.masked_fill(drop, 0), 1, generator=generator))[:, 0]


def check_room(n: int, max_new: int, limit: int):
    """Raise ValueError if a prompt of n tokens leaves no room for max_new more, of `limit`."""
    if n + max_new > limit:
        advice = "--max-new, or shorten the prompt"
        raise ValueError(f"a prompt of {n} tokens and {max_new} new ones: this model has room for {limit} ({advice})")
