"""The frozen decoder: GPT-2 and LLaMA in one class, with room for soft prompts.

A map of this file, top to bottom:

    Config       the sizes, and which of two variants each part takes
    Rotary       rotary positions                        (LLaMA; GPT-2 learns its positions)
    Attention    q, k, v, o, and the extra key/value slots that soft prompts occupy
    GeluMLP, SwiGLU
    Block        norm, attention, norm, MLP
    Cache        keys and values already computed, for decoding one token a step
    HeadLoss     the loss of a frozen head, without keeping its logits
    Decoder      embed -> blocks -> norm -> head;  forward, prefill, step
    generate     text from prompts of different lengths, in one batch; search, its beam search; compiled_step

The one thing a plain decoder lacks: before each block the decoder asks `tuner.slots(block, l, x, instr)` for more keys
and values (see `Tuner` in iapt.py), and the block attends to them: among its own, or apart, in a softmax of their own.
They are asked for when whole sequences are read; `step`, which writes one more token, takes no tuner: by then a prompt
is nothing but entries of the cache.

    >>> import torch
    >>> model = Decoder(Config(vocab_size=100, block_size=32, n_layer=2, n_head=4, n_embd=64))
    >>> model(torch.zeros(1, 5, dtype=torch.long)).shape
    torch.Size([1, 5, 100])

Letters for shapes, here and everywhere: B rows of a batch, T tokens, P soft tokens, C n_embd, H heads, G key/value
heads, D size of a head, V vocabulary, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from iapt import Tuner  # which imports this file


@dataclass
class Config:
    """Sizes of a decoder.  `arch` picks the variant of each part:

        arch      positions   norm        MLP          biases
        'gpt2'    learned     LayerNorm   tanh-GELU    everywhere
        'llama'   rotary      RMSNorm     SwiGLU       where `attn_bias`, `mlp_bias` say so

    `n_kv_head` < `n_head` is grouped-query attention.  Zeros mean: derive it (n_kv_head = n_head, head_dim = n_embd /
    n_head, n_inner = 4 n_embd for GPT-2 and 8/3 n_embd, rounded up to a multiple of 32, for LLaMA).
    """

    vocab_size: int
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int = 0
    head_dim: int = 0
    n_inner: int = 0
    arch: str = "gpt2"
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tied: bool = True
    attn_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        if self.arch not in ("gpt2", "llama"):
            raise ValueError(f"arch must be 'gpt2' or 'llama', got {self.arch!r}")
        if self.arch == "gpt2":
            self.attn_bias = self.mlp_bias = True
        self.n_kv_head = self.n_kv_head or self.n_head
        divided = self.head_dim or self.n_head and self.n_embd % self.n_head == 0
        self.head_dim = self.head_dim or self.n_embd // max(1, self.n_head)
        self.n_inner = self.n_inner or (4 * self.n_embd if self.arch == "gpt2" else -(-self.n_embd * 8 // 96) * 32)
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "head_dim", "n_inner"):
            if not (type(getattr(self, name)) is int and 0 < getattr(self, name) < 2**31):
                raise ValueError(f"{name} must be a positive whole number, got {getattr(self, name)!r}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if self.arch == "llama" and self.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs: head_dim must be even, got {self.head_dim}")
        if not divided:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        numbers = {"norm_eps": self.norm_eps, "rope_theta": self.rope_theta, **(self.rope_scaling or {})}
        numbers.pop("rope_type", None)
        for name, x in numbers.items():
            if type(x) not in (int, float) or not 0 < x < 1e12:
                raise ValueError(f"{name} must be a positive number, got {x!r}")
        for name in ("tied", "attn_bias", "mlp_bias"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")


class Rotary(nn.Module):
    """Angles of the rotary embedding: pos (..., T) -> cos, sin (..., 1, T, D), for `rotate` below.

    Pair i of a head turns by pos * theta^(-2i/D); pairs are (i, i + D/2), as in the weights that the hub holds.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.theta, self.head_dim, self.scaling = c.rope_theta, c.head_dim, c.rope_scaling

    def forward(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        # In fp32 whatever the weights' dtype: bf16 has 8 bits, too few to tell positions apart.
        freq = self.theta ** -(torch.arange(0, self.head_dim, 2, device=pos.device).float() / self.head_dim)
        angle = pos[..., None].float() * (stretch(freq, **self.scaling) if self.scaling else freq)
        angle = torch.cat((angle, angle), -1)[..., None, :, :]
        return angle.cos(), angle.sin()


def stretch(
    freq: Tensor, rope_type: str, factor: float, low_freq_factor: float = 0, high_freq_factor: float = 0,
    original_max_position_embeddings: int = 0,
) -> Tensor:  # fmt: skip
    """Frequencies (D/2,) for a context `factor` times longer.  'linear': all slower; 'llama3': the slow ones alone.

    Llama 3.1 leaves frequencies that turn more than high_freq_factor times in the original context as they are, divides
    those that turn less than low_freq_factor times, and goes over from one to the other in between.
    """
    if rope_type == "linear":
        return freq / factor
    turns = original_max_position_embeddings * freq / (2 * torch.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return kept * freq + (1 - kept) * freq / factor


def rotate(x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Turn q or k (B, heads, T, D) by the angles of their positions; with learned positions (rope None) leave them."""
    if rope is None:
        return x
    (cos, sin), (a, b) = rope, x.float().chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with separate q, k, v, o (so that LoRA on q and v is a hook on two modules)."""

    def __init__(self, c: Config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, c.head_dim
        self.q = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=c.attn_bias)
        self.k = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.attn_bias)
        self.v = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.attn_bias)
        self.o = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.attn_bias)

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, G D) -> (B, G, T, D)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def qkv(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of x (B, T, C) the queries (B, H, T, D) and keys (B, G, T, D), rotated, and the values (B, G, T, D)."""
        return rotate(self.heads(self.q(x)), rope), rotate(self.heads(self.k(x)), rope), self.heads(self.v(x))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, apart: tuple | None = None) -> Tensor:
        """What q (B, H, T, D) finds in k, v (B, G, S, D) where mask (.., T, S) is True (None: causally): (B, T, C).

        apart   (k, v, keep) of soft tokens with a softmax of their own; what q finds there is added
        """
        grouped = self.n_kv_head < self.n_head
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        if apart is not None:
            k, v, keep = apart
            keep = None if keep is None else keep[:, None, None]  # (B, 1, 1, P)
            y = y + F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=keep, enable_gqa=grouped)
        return self.o(y.transpose(1, 2).flatten(2))


class GeluMLP(nn.Module):
    """down(gelu(up x)), GPT-2's: (B, T, C) -> (B, T, C)."""

    def __init__(self, c: Config):
        super().__init__()
        self.up = nn.Linear(c.n_embd, c.n_inner, bias=c.mlp_bias)
        self.down = nn.Linear(c.n_inner, c.n_embd, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))  # GPT-2's weights were trained with the tanh form


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), LLaMA's: (B, T, C) -> (B, T, C)."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate = nn.Linear(c.n_embd, c.n_inner, bias=c.mlp_bias)
        self.up = nn.Linear(c.n_embd, c.n_inner, bias=c.mlp_bias)
        self.down = nn.Linear(c.n_inner, c.n_embd, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def norm(c: Config) -> nn.Module:
    """The norm of an architecture, over the last dimension, C."""
    return (nn.LayerNorm if c.arch == "gpt2" else nn.RMSNorm)(c.n_embd, eps=c.norm_eps)


class Block(nn.Module):
    """A layer: x + attention(norm(x)), and to that the same with the MLP."""

    def __init__(self, c: Config):
        super().__init__()
        self.ln_1, self.attn = norm(c), Attention(c)
        self.ln_2, self.mlp = norm(c), (GeluMLP if c.arch == "gpt2" else SwiGLU)(c)

    def soft_kv(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of soft tokens s (B, P, C) that stand before this block's input: two of (B, G, P, D).

        They are at rotary position 0, where the rotation is the identity.
        """
        s = self.ln_1(s)
        return self.attn.heads(self.attn.k(s)), self.attn.heads(self.attn.v(s))

    def forward(
        self, x: Tensor, rope: tuple | None, slots: tuple | None = None, apart: tuple | None = None,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
        """x (B, T, C) -> x (B, T, C), and the keys and values it looked at, slots first.

        slots   (k, v, keep): P more keys and values, and which of them a row has (B, P), or None for all; or None
        apart   the same, for soft tokens with a softmax of their own
        seen    (B, P + T), False where nobody may look, if there is such a place
        """
        q, k, v = self.attn.qkv(self.ln_1(x), rope)
        if slots is not None:
            k, v = torch.cat((slots[0].to(k.dtype), k), 2), torch.cat((slots[1].to(v.dtype), v), 2)
        plain = slots is None and seen is None
        mask = None if plain else slot_mask(x.shape[1], k.shape[2], seen, x.device)
        x = x + self.attn.mix(q, k, v, mask, apart)
        return x + self.mlp(self.ln_2(x)), (k, v)

    def step(
        self, x: Tensor, rope: tuple | None, k_cache: Tensor, v_cache: Tensor, mask: Tensor, at: Tensor,
        apart: tuple | None = None,
    ) -> Tensor:  # fmt: skip
        """One token a row: x (B, 1, C) writes its key and value at `at` (B,) in the cache; looks where mask is True.

        k_cache, v_cache (B, G, P + S, D), mask (B, 1, 1, P + S) and apart are a layer's part of a `Cache`.
        """
        q, k, v = self.attn.qkv(self.ln_1(x), rope)
        rows = torch.arange(len(x), device=x.device)
        k_cache[rows, :, at], v_cache[rows, :, at], mask[rows, :, :, at] = k[:, :, 0], v[:, :, 0], True
        x = x + self.attn.mix(q, k_cache, v_cache, mask, apart)
        return x + self.mlp(self.ln_2(x))


def slot_mask(T: int, S: int, seen: Tensor | None, device: torch.device) -> Tensor:
    """(.., T, S): every token sees the S - T slots and, causally, the tokens; of these what `seen` (B, S) lets it see.

    Not `is_causal=True`: with slots in front the score matrix is not square, and its diagonal not the tokens'.
    """
    causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    if seen is None:
        return causal
    itself = causal.triu(S - T)  # a token that nobody may see still sees itself: a softmax over nothing is nan
    return (causal & seen[:, None, None, :]) | itself


def places(slots: tuple | None, keep: Tensor | None, x: Tensor) -> Tensor | None:
    """(B, P + T): False where nobody may look, among P slots and T tokens x; None if there is no such place.

    keep (B, T) says it for the tokens, the third of `slots` for the slots; None: all may be looked at.
    """
    some = None if slots is None else slots[2]
    if some is None and keep is None:
        return None
    B, P, T = len(x), 0 if slots is None else slots[0].shape[2], x.shape[1]
    every = torch.ones(B, P + T, dtype=torch.bool, device=x.device)
    return torch.cat((every[:, :P] if some is None else some, every[:, P:] if keep is None else keep), 1)


class Cache:
    """What `prefill` leaves for `step`: where each row's slots and tokens are, and how many.

        layers   of each layer (k, v, mask, apart)
                 k, v    (B, G, P + S, D)   P slots, then the prompt of T tokens and room for more, S in all
                 mask    (B, 1, 1, P + S)   what may be looked at
                 apart   the soft tokens with a softmax of their own, (k, v, keep) or None
        at       (B,)   index at which a row's next token will be written
        pos      (B,)   its position

    Prompts are right-padded and each row goes on at its own length, over its own padding: so prompts of different
    lengths decode together.  The shapes never change, so a decode step can be compiled once.  (Each layer has tensors
    of its own: if all were parts of one, a compiled step would copy all of it to write one token.)
    """

    def __init__(self, layers: list[tuple], T: int, length: Tensor, pos: Tensor, room: int):
        most = max(P for _, _, P, _, _ in layers)

        def fill(x):  # layers may have fewer slots than others, or none: padded in front, and masked
            return F.pad(x, (0, 0, most + T - x.shape[2], room))

        def visible(P, seen):
            seen = torch.ones(len(length), P + T, dtype=torch.bool, device=length.device) if seen is None else seen
            return (F.pad(seen, (most - P, room)) & tokens)[:, None, None]

        tokens = F.pad(torch.arange(T + room, device=length.device) < length[:, None], (most, 0), value=True)
        self.layers = []
        for k, v, P, seen, apart in layers:
            if apart is not None:
                apart = (apart[0].to(k.dtype), apart[1].to(k.dtype), apart[2])
            self.layers.append((fill(k), fill(v), visible(P, seen), apart))
        self.at, self.pos = most + length, pos.clone()

    def take(self, rows: Tensor):
        """Go on with the rows of these indices, in this order; a row may occur several times."""

        def taken(x):
            if isinstance(x, tuple):
                return tuple(map(taken, x))
            return None if x is None else x[rows]

        self.layers = [taken(layer) for layer in self.layers]
        self.at, self.pos = self.at[rows], self.pos[rows]


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy, in nats, of logits x W^T (N, V) against targets (N,), for a frozen W.

    Its gradient by x, (softmax - one-hot) W / N, is computed with the loss itself, for CHUNK targets at a time: so
    there are never more logits than that, and none are kept.
    """

    CHUNK = 1024

    @staticmethod
    def forward(x, weight, targets):
        loss, dx = x.new_zeros((), dtype=torch.float32), torch.empty_like(x)
        for some, t, d in zip(*(y.split(HeadLoss.CHUNK) for y in (x, targets, dx))):
            logits = F.linear(some, weight).float()
            loss += F.cross_entropy(logits, t, reduction="sum")
            p = logits.softmax(-1)
            p[torch.arange(len(t), device=t.device), t] -= 1
            d.copy_((p / len(x)).to(weight.dtype) @ weight)
        return loss / len(x), dx

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, g, _):
        return ctx.saved_tensors[0] * g, None, None


class Decoder(nn.Module):
    """A decoder-only language model: idx (B, T) -> logits (B, T, V)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.checkpointing = False  # True: a block's activations are computed again for the backward pass, not kept
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.block_size, c.n_embd) if c.arch == "gpt2" else None
        self.rotary = Rotary(c) if c.arch == "llama" else None
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = norm(c)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.apply(self._init)
        for name, p in self.named_parameters():  # residual branches start small, as in GPT-2
            if name.endswith(("attn.o.weight", "mlp.down.weight")):
                nn.init.normal_(p, std=0.02 / (2 * c.n_layer) ** 0.5)
        if c.tied:
            self.head.weight = self.wte.weight

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def embed(self, idx: Tensor, pos: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Tokens idx (B, T) at positions pos, (T,) or (B, T) -> x (B, T, C), and the angles that the blocks rotate by.

        With learned positions, these are None.
        """
        x = self.wte(idx)
        return (x, self.rotary(pos)) if self.wpe is None else (x + self.wpe(pos), None)

    def hidden(
        self, idx: Tensor, instr: Tensor | None = None, tuner: "Tuner | None" = None, layers: list | None = None
    ) -> Tensor:
        """The last hidden states (B, T, C).

        idx     (B, T)  tokens, right-padded
        instr   (B, T)  True on the tokens of the instruction, the only ones a tuner may read
        tuner           asked for soft tokens at the embeddings and at each layer (`Tuner` in iapt.py), or None
        layers          a list to which each layer's (k, v, P, seen, apart) is appended, for a `Cache`

        Raises ValueError if T > block_size.
        """
        T, most = idx.shape[1], self.config.block_size
        if T > most:
            raise ValueError(f"this model wants at most {most} tokens, got {T} (--block-size, or shorten the prompt)")
        x, rope = self.embed(idx, torch.arange(T, device=idx.device))
        at = keep = None
        if tuner is not None:
            x, at, keep = tuner.embed(x, instr)  # soft tokens among the embeddings; at (B, T): where the tokens went
        if at is not None:
            real = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device).scatter(1, at, 1)
            instr = torch.zeros_like(real).scatter(1, at, instr.long()).bool()
            if rope is not None:  # tokens keep their positions; a soft token has that of the token after it
                rope = self.rotary(real.cumsum(1) - real)
        for l, block in enumerate(self.h):
            slots, apart = tuner.slots(block, l, x, instr) if tuner is not None else (None, None)
            seen = places(slots, keep, x)
            if self.checkpointing and torch.is_grad_enabled():
                x, (k, v) = checkpoint(block, x, rope, slots, apart, seen, use_reentrant=False)
            else:
                x, (k, v) = block(x, rope, slots, apart, seen)
            if layers is not None:
                layers.append((k, v, k.shape[2] - x.shape[1], seen, apart))
        if at is not None:
            # What follows token t is read off the place before token t+1, where a soft token may stand.
            before_next = F.pad(at[:, 1:], (0, 1), value=x.shape[1]) - 1
            x = x.gather(1, before_next[..., None].expand(-1, -1, x.shape[2]))
        return self.ln_f(x)

    def forward(
        self, idx: Tensor, instr: Tensor | None = None, tuner: "Tuner | None" = None, targets: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V); or, given targets (B, T) with -1 where there is none, the mean loss in nats per target.

        The head is then computed only where there is a target: at a vocabulary of 50,000 it is much of a small model's
        work.
        """
        x = self.hidden(idx, instr, tuner)
        if targets is None:
            return self.head(x)
        there = targets >= 0
        if x.requires_grad and not self.head.weight.requires_grad:
            return HeadLoss.apply(x[there], self.head.weight, targets[there])[0]
        return F.cross_entropy(self.head(x[there]).float(), targets[there])

    @torch.no_grad()
    def prefill(self, idx: Tensor, length: Tensor, tuner: "Tuner | None" = None, room: int = 0) -> tuple[Tensor, Cache]:
        """Read right-padded prompts idx (B, T) of `length` (B,) tokens: logits (B, V) of the next one, and a Cache.

        All of a prompt counts as instruction.  The cache has room for `room` more tokens a row.
        """
        instr = torch.arange(idx.shape[1], device=idx.device) < length[:, None]
        layers = []
        x = self.hidden(idx, instr, tuner, layers)
        k, _, P, _, _ = layers[0]
        soft = k.shape[2] - P - idx.shape[1]  # soft tokens among the embeddings: they take up room too
        rows = torch.arange(len(idx), device=idx.device)
        return self.head(x[rows, length - 1]), Cache(layers, idx.shape[1] + soft, length + soft, length, room)

    @torch.no_grad()
    def step(self, idx: Tensor, cache: Cache) -> Tensor:
        """One more token a row, idx (B,): logits (B, V) of the one after it.  No tuner: its work lies in the cache."""
        x, rope = self.embed(idx[:, None], cache.pos[:, None])
        for block, (k, v, mask, apart) in zip(self.h, cache.layers):
            x = block.step(x, rope, k, v, mask, cache.at, apart)
        cache.at += 1
        cache.pos += 1
        return self.head(self.ln_f(x))[:, 0]


def pick(
    logits: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Next tokens (B,) from logits (B, V): the likeliest at temperature 0, else drawn.

    Drawn from the top_k likeliest (0: all), and from the fewest likeliest tokens that have the mass top_p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = (logits.float() / temperature).sort(-1, descending=True)
    probs = logits.softmax(-1)
    drop = probs.cumsum(-1) - probs >= top_p  # the mass before a token: so the first always stays
    if top_k:
        drop[:, top_k:] = True
    drop[:, 0] = False
    probs = probs.masked_fill(drop, 0)
    return order.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


@torch.no_grad()
def generate(
    model: Decoder, prompts: list[list[int]], tuner: "Tuner | None" = None, max_new: int = 64, stop: int | None = None,
    seed: int = 0, beams: int = 1, length_penalty: float = 1.0, **sampling: float,
) -> list[list[int]]:  # fmt: skip
    """Continue several prompts at once.

    prompts          lists of token ids, of any lengths
    max_new          new tokens a row, at most
    stop             id at which a row ends (it is left out of the result); None: no such id
    beams            with more than one: the best of what a beam search of this width finds
    length_penalty   of the beam search, see `search`
    sampling         temperature, top_k, top_p of `pick`

    Returns the new tokens, a list per prompt.  Raises ValueError for an empty prompt, for one that leaves no room, and
    for beams that are to be drawn.
    """
    longest = max(map(len, prompts), default=0)
    if not longest or not all(prompts):
        raise ValueError("an empty prompt: there is nothing to continue")
    if longest + max_new > model.config.block_size:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new} new ones: this model has room for {model.config.block_size}"
            " (--max-new, or shorten the prompt)"
        )
    if beams < 1 or beams > 1 and sampling.get("temperature"):
        raise ValueError(f"a beam search draws nothing: give {beams} beams or a temperature, not both")
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    idx = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)
    length = torch.tensor([len(p) for p in prompts], device=device)
    logits, cache = model.prefill(idx, length, tuner, max_new)
    if beams > 1:
        return search(model, logits, cache, beams, max_new, stop, length_penalty)
    out, done = [[] for _ in prompts], [False] * len(prompts)
    for i in range(max_new):
        new = pick(logits, generator=generator, **sampling)
        for row, token in enumerate(new.tolist()):
            done[row] = done[row] or token == stop
            if not done[row]:
                out[row].append(token)
        if all(done) or i == max_new - 1:
            break
        logits = model.step(new, cache)
    return out


def compiled_step(model: Decoder) -> Callable[[Tensor, Cache], Tensor]:
    """`model.step`, compiled in one graph when it is first called, with the weights as constants of the graph.

    That packs them for a CPU's matrix products, in a second copy of them; no weight may change after it.  The compiler
    tries several kernels for each product, and on a GPU CUDA graphs where they can be had.
    """
    import torch._inductor.config as inductor

    inductor.freezing = True  # of graphs without gradients, as this is, alone; as an option it has no effect
    quiet = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
    quiet = {key: value for key, value in quiet.items() if hasattr(inductor, key)}  # older PyTorch knows but one
    how = {"max_autotune": True, "triton.cudagraphs": model.wte.weight.is_cuda, **quiet}
    return torch.compile(model.step, fullgraph=True, options=how)


def search(
    model: Decoder, logits: Tensor, cache: Cache, K: int, max_new: int, stop: int | None, length_penalty: float
) -> list[list[int]]:
    """Beam search from `prefill`'s logits (B, V) and cache: the new tokens, a list per row.

    Each row keeps the K hypotheses that are best by  log p(tokens) / n^length_penalty,  n their number with the stop.
    One that has stopped stays as it is, and must hold its place against those that go on.
    """
    (B, V), device = logits.shape, logits.device
    first = torch.arange(B, device=device)[:, None] * K  # a row's hypotheses are neighbours
    cache.take(torch.arange(B, device=device).repeat_interleave(K))
    logits = logits.repeat_interleave(K, 0)
    score = torch.full((B, K), float("-inf"), device=device)  # log p; at first there is one hypothesis, the empty one
    score[:, 0] = 0
    done, n = torch.zeros(B, K, dtype=torch.bool, device=device), torch.zeros(B, K, device=device)
    tokens = torch.empty(B, K, 0, dtype=torch.long, device=device)
    as_it_is = torch.full((V,), float("-inf"), device=device)
    as_it_is[0] = 0  # the one way in which what has stopped goes on
    for i in range(max_new):
        log_p = logits.float().log_softmax(-1).unflatten(0, (B, K))
        log_p = torch.where(done[..., None], as_it_is, log_p)  # (B, K, V)
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
        cache.take((first + beam).flatten())
        logits = model.step(new.flatten(), cache)
    return [[t for t in row if t not in (-1, stop)] for row in tokens[:, 0].tolist()]
