"""Soft tokens among the embeddings: what prompt tuning and dynamic prompting need of the decoder, and IAPT does not.

A soft token is one more token, without a position of its own: the others keep theirs, unless a tuner's `first` leaves
room for soft tokens before them.  What follows token t is read off the place before token t + 1, where a soft token may
stand.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model import Cache, Decoder, Tuner, rotary


class Embedded(NamedTuple):
    """Embeddings with soft tokens among them."""

    x: Tensor  # (B, T', C)
    at: Tensor  # (B, T): where the T tokens went
    n: Tensor  # (B,): how many soft tokens a row has; its last T' - T - n places are padding


class EmbeddedTuner(Tuner):
    """A method with soft tokens among the embeddings.  Override `embed`."""

    acts = ("all",)

    def embed(self, x: Tensor, instr: Tensor) -> Embedded | None:
        """Once a sequence: embeddings x (B, T, C), with soft tokens in each row before its padding; or None."""
        return None

    def around_blocks(
        self, model: Decoder, x: Tensor, rope: tuple | None, instr: Tensor, cache: Cache | None
    ) -> Tensor:
        embedded = self.embed(x, instr)
        if embedded is None:
            return super().around_blocks(model, x, rope, instr, cache)
        T = x.shape[1]
        x, at, n = embedded
        real = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device).scatter(1, at, 1)
        instr = torch.zeros_like(real).scatter(1, at, instr.long()).bool()
        if rope is not None:  # a soft token has the position of the token after it, or of its place
            place, behind = torch.arange(x.shape[1], device=x.device), self.first + real.cumsum(1) - real
            rope = rotary(model.config, torch.where(real.bool(), behind, place) if self.first else behind)
        if cache is not None:
            cache.at += n  # they take up room, but no positions
        x = super().around_blocks(model, x, rope, instr, cache)
        before_next = torch.cat((at[:, 1:], T + n[:, None]), 1) - 1
        return x.gather(1, before_next[..., None].expand(-1, -1, x.shape[2]))
