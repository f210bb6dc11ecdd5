"""The frozen decoder, GPT-2 or LLaMA, and `Tuner`, what a method plugs into it.

A map of this file, top to bottom:

    Config       the sizes, and which of two variants each part has
    Soft         the soft tokens of a layer: keys and values
    rotary, Attention, attend, MLP, Block
    Tuner        the places at which a method may reach into the decoder; the defaults do nothing
    Cache        keys and values already computed, for decoding one token a step
    Decoder      embed -> blocks -> norm -> head;  forward, prefill, step

One thing is new beside a plain decoder: before each block, it asks the tuner for soft tokens to attend to, when a whole
sequence is read.  `step` writes one more token, and takes no tuner: by then they are entries of the cache.

Letters for shapes, here and everywhere: B rows of a batch, T tokens, P soft tokens, C n_embd, H heads, G key/value
heads, D head size, V vocabulary, L layers.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    """Sizes of a decoder.  `arch` picks the variant of each part:

        arch      positions   norm        MLP          biases
        'gpt2'    learned     LayerNorm   tanh-GELU    everywhere
        'llama'   rotary      RMSNorm     SwiGLU       where `attn_bias`, `mlp_bias` say so

    Zeros are derived: n_kv_head = n_head (fewer: grouped-query attention), head_dim = n_embd / n_head, n_inner =
    4 n_embd for GPT-2 and 8/3 n_embd, rounded up to a multiple of 32, for LLaMA.
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
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.arch == "llama" and self.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs: head_dim must be even, got {self.head_dim}")
        self.n_inner = self.n_inner or (4 * self.n_embd if self.arch == "gpt2" else -(-self.n_embd * 8 // 96) * 32)


class Soft(NamedTuple):
    """Soft tokens of a layer: P keys and values."""

    k: Tensor  # (B, G, P, D)
    v: Tensor  # (B, G, P, D)
    keep: Tensor | None = None  # (B, P), False on what a row lacks, if rows differ (tenants); None: all are there

    def mask(self) -> Tensor:
        """`keep` for attention, spelled out: (B or 1, 1, 1, P)."""
        keep = self.k.new_ones(1, self.k.shape[2], dtype=torch.bool) if self.keep is None else self.keep
        return keep[:, None, None]


class SoftTokens(NamedTuple):
    """What a method adds to a layer: soft tokens in the words' softmax, and in a softmax of their own."""

    joined: Soft | None = None
    separate: Soft | None = None

    def join(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The joined ones behind the keys and values (B, G, T, D) of tokens: two of (B, G, T + P, D)."""
        if self.joined is None:
            return k, v
        return torch.cat((k, self.joined.k), 2), torch.cat((v, self.joined.v), 2)


NO_SOFT = SoftTokens()


def rotary(c: Config, pos: Tensor) -> tuple[Tensor, Tensor]:
    """Angles of the rotary embedding: pos (.., T) -> cos, sin (.., 1, T, D), for `rotate` below.

    Pair i of a head turns by pos * theta^(-2i/D).  Pairs are (i, i + D/2), as in the weights on the hub.
    """
    # In fp32 whatever the weights' dtype: bf16 has 8 bits, too few to tell positions apart.
    freq = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, device=pos.device).float() / c.head_dim)
    angle = pos[..., None].float() * (scale_frequencies(freq, **c.rope_scaling) if c.rope_scaling else freq)
    angle = torch.cat((angle, angle), -1)[..., None, :, :]
    return angle.cos(), angle.sin()


def scale_frequencies(freq: Tensor, rope_type: str, factor: float, **llama3) -> Tensor:
    """Frequencies (D/2,) for a context `factor` times longer: 'linear' slows all of them, 'llama3' the slow ones."""
    if rope_type == "linear":
        return freq / factor
    low, high = llama3["low_freq_factor"], llama3["high_freq_factor"]
    turns = llama3["original_max_position_embeddings"] * freq / (2 * torch.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * freq + (1 - kept) * freq / factor


def rotate(x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Turn q or k (B, heads, T, D) by the angles of their positions.  With learned positions rope is None."""
    if rope is None:
        return x
    cos, sin = rope
    a, b = x.float().chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with separate q, k, v, o (so that LoRA on q and v is a hook on two modules)."""

    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.q = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=c.attn_bias)
        self.k = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.attn_bias)
        self.v = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.attn_bias)
        self.o = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.attn_bias)

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, G D) -> (B, G, T, D)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def qkv(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> rotated queries (B, H, T, D) and keys (B, G, T, D), and values (B, G, T, D)."""
        return rotate(self.heads(self.q(x)), rope), rotate(self.heads(self.k(x)), rope), self.heads(self.v(x))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, separate: Soft | None) -> Tensor:
        """What q (B, H, T, D) finds in k, v (B, G, S, D), and in separate soft tokens, projected: (B, T, C)."""
        y = attend(q, k, v, mask, causal=mask is None)
        if separate is not None:
            y = y + attend(q, separate.k, separate.v, None if separate.keep is None else separate.mask())
        return self.o(y.transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q (B, H, T, D) and k, v (B, G, S, D), where mask (.., T, S) is True."""
    if q.shape[2] == 1:  # one token: heads that share a key can be rows of one, which is faster (71 ms a step, was 91)
        rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
        return F.scaled_dot_product_attention(rows, k, v, mask).reshape(q.shape)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] > k.shape[1])


class MLP(nn.Module):
    """GPT-2's down(gelu(up x)), or LLaMA's down(silu(gate x) * up x): (B, T, C) -> (B, T, C)."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate = nn.Linear(c.n_embd, c.n_inner, bias=c.mlp_bias) if c.arch == "llama" else None
        self.up = nn.Linear(c.n_embd, c.n_inner, bias=c.mlp_bias)
        self.down = nn.Linear(c.n_inner, c.n_embd, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate="tanh"))  # GPT-2's weights were trained with the tanh form


def norm(c: Config) -> nn.Module:
    """The norm of an architecture, over the last dimension, C."""
    return (nn.LayerNorm if c.arch == "gpt2" else nn.RMSNorm)(c.n_embd, eps=c.norm_eps)


class Block(nn.Module):
    """x + attention(norm(x)), then the same with the MLP."""

    def __init__(self, c: Config):
        super().__init__()
        self.ln_1, self.attn = norm(c), Attention(c)
        self.ln_2, self.mlp = norm(c), MLP(c)

    def soft_kv(self, s: Tensor) -> Soft:
        """Keys and values of soft tokens s (B, P, C) that enter this block."""
        s = self.ln_1(s)  # at rotary position 0, where the rotation is the identity
        return Soft(self.attn.heads(self.attn.k(s)), self.attn.heads(self.attn.v(s)))

    def forward(self, x: Tensor, rope: tuple | None, soft: SoftTokens = NO_SOFT, mask: Tensor | None = None
                ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """x (B, T, C) -> x (B, T, C) and its keys and values (B, G, T, D); mask (.., T, T + P), see `attention_mask`.

        What is joined with the tokens may be soft tokens, or all that is in the cache.
        """
        q, k, v = self.attn.qkv(self.ln_1(x), rope)
        x = x + self.attn.mix(q, *soft.join(k, v), mask, soft.separate)
        return x + self.mlp(self.ln_2(x)), k, v

    def step(self, x: Tensor, rope: tuple | None, cached: "CachedLayer", at: Tensor) -> Tensor:
        """One token a row: x (B, 1, C) -> (B, 1, C).  Writes its key and value at index `at` (B,) of the cache."""
        q, k, v = self.attn.qkv(self.ln_1(x), rope)
        rows = torch.arange(len(x), device=x.device)
        cached.k[rows, :, at] = k[:, :, 0]
        cached.v[rows, :, at] = v[:, :, 0]
        cached.mask[rows, :, :, at] = True
        x = x + self.attn.mix(q, *cached)
        return x + self.mlp(self.ln_2(x))


def attention_mask(T: int, joined: Soft | None) -> Tensor | None:
    """(.., T, T + P), True where a token may look: at tokens up to itself, and at P soft tokens joined behind them."""
    if joined is None:
        return None  # plain causal attention: so it always is for IAPT
    causal = torch.ones(T, T, dtype=torch.bool, device=joined.k.device).tril()
    soft = joined.mask()
    return torch.cat((causal.expand(*soft.shape[:2], -1, -1), soft.expand(-1, -1, T, -1)), -1)


class Tuner(nn.Module):
    """A way to tune a frozen decoder.  Override what you need: the defaults do nothing.

    The decoder hands over hidden states x (B, T, C) and instr (B, T), True on the prompt.  Read nothing else: the
    rest is padding and the response, and a prompt that has seen the response has seen the labels.  Keep nothing
    between calls, so that nothing stale survives a step.
    """

    lr = 1e-2  # the default of train.py's --lr
    separate = False  # whether its soft tokens get a softmax of their own, whose result is added
    act = "all"  # on all tokens; "answer": the frozen model reads the prompt, and the tuner acts from its last token on
    acts = ("all", "answer")  # what `act` can be

    def start(self, model: "Decoder"):
        """Once, before training: set parameters that start from the frozen model's own."""

    def attach(self, model: "Decoder"):
        """Before training or use: put hooks on the frozen model's modules."""

    def detach(self):
        """Leave the model as `attach` found it."""

    def progress(self, done: float):
        """Before each training step: the share of training that is over, 0 to 1, for what anneals."""

    def soft_tokens(self, l: int, x: Tensor, instr: Tensor) -> Tensor | None:
        """Once a layer: the hidden states x (B, T, C) that enter layer l -> its soft tokens (B, P, C), or None."""
        return None

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> Soft | None:
        """Once a layer: its soft tokens as keys and values.  They are not carried to the next layer."""
        s = self.soft_tokens(l, x, instr)
        return None if s is None else block.soft_kv(s.to(x.dtype))

    def soft(self, block: Block, l: int, x: Tensor, instr: Tensor) -> SoftTokens:
        """`kv` in x's dtype, joined or separate."""
        soft = self.kv(block, l, x, instr)
        if soft is None:
            return NO_SOFT
        soft = Soft(soft.k.to(x.dtype).contiguous(), soft.v.to(x.dtype).contiguous(), soft.keep)
        return SoftTokens(separate=soft) if self.separate else SoftTokens(joined=soft)

    def write(self, model: "Decoder", states: list[Tensor], instr: Tensor) -> list[SoftTokens]:
        """Once a prompt, with act = "answer": what entered each layer of the frozen model -> each layer's `soft`."""
        return [self.soft(block, l, x, instr) for l, (block, x) in enumerate(zip(model.h, states))]

    def silent(self) -> AbstractContextManager:
        """A with block in which the tuner does nothing."""
        return nullcontext()

    def around_blocks(self, model: "Decoder", x: Tensor, rope: tuple | None, instr: Tensor | None,
                      cache: "Cache | None") -> Tensor:  # fmt: skip
        """Once a sequence: embeddings x (B, T, C) through the blocks.  Prompt tuning adds tokens here (embedded.py)."""
        return model.blocks(x, rope, instr, self, cache)

    def groups(self, lr: float) -> list[dict]:
        """Parameter groups for the optimizer, where some parameters want another rate than lr."""
        return [{"params": list(self.parameters()), "lr": lr}]


NO_TUNER = Tuner()  # the frozen model alone


class CachedLayer(NamedTuple):
    """A layer's part of a `Cache`: S tokens, then the P soft tokens joined with them."""

    k: Tensor  # (B, G, S + P, D)
    v: Tensor  # (B, G, S + P, D)
    mask: Tensor  # (B, 1, 1, S + P), True where the next token may look
    separate: Soft | None


class Cache:
    """Keys and values of right-padded prompts, with `room` for more tokens.

    Each row goes on at its own length, over its own padding, so prompts of different lengths decode together.  Shapes
    never change, so a decode step is compiled once.
    """

    def __init__(self, length: Tensor, room: int = 0):
        self.room, self.layers = room, []
        self.states = []  # what entered each layer, (B, T, C), if the frozen model alone has read: for `Tuner.write`
        self.at, self.pos = length.clone(), length.clone()  # (B,): where a row's next token goes, and its position

    def append(self, k: Tensor, v: Tensor, soft: SoftTokens):
        """Add a layer's keys and values (B, G, T, D), and its soft tokens."""
        k, v = F.pad(k, (0, 0, 0, self.room)), F.pad(v, (0, 0, 0, self.room))
        mask = torch.arange(k.shape[2], device=k.device) < self.at[:, None]
        self.layers.append(CachedLayer(k, v, mask[:, None, None], None))
        self.add_soft(len(self.layers) - 1, soft)

    def add_soft(self, l: int, soft: SoftTokens):
        """Add soft tokens to a layer."""
        k, v, mask, _ = self.layers[l]
        if soft.joined is not None:
            mask = torch.cat((mask, soft.joined.mask().expand(len(mask), -1, -1, -1)), -1)
        self.layers[l] = CachedLayer(*soft.join(k, v), mask, soft.separate)

    def select_rows(self, rows: Tensor):
        """Go on with the rows of these indices, in this order; a row may occur several times."""

        def select(x):
            if isinstance(x, tuple):
                return type(x)(*map(select, x))
            return None if x is None else x[rows]

        self.layers = [select(layer) for layer in self.layers]
        self.at, self.pos = self.at[rows], self.pos[rows]


class Decoder(nn.Module):
    """A decoder-only language model: idx (B, T) -> logits (B, T, V)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.checkpointing = False  # True: a layer's activations are computed again for the backward pass, not kept
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.block_size, c.n_embd) if c.arch == "gpt2" else None
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = norm(c)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # what adds to the residual stream starts smaller, as in GPT-2
                residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * c.n_layer) ** 0.5 if residual else 0.02)
        if c.tied:
            self.head.weight = self.wte.weight

    def embed(self, idx: Tensor, pos: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Tokens idx (B, T) at positions pos, (T,) or (B, T) -> x (B, T, C) and, for LLaMA, the angles of `rotary`."""
        x = self.wte(idx)
        return (x, rotary(self.config, pos)) if self.wpe is None else (x + self.wpe(pos), None)

    def hidden(self, idx: Tensor, instr: Tensor | None = None, tuner: Tuner | None = None, cache: Cache | None = None,
               needed: Tensor | None = None) -> Tensor:  # fmt: skip
        """The last hidden states (B, T, C) of right-padded tokens idx (B, T); instr (B, T): True on the prompt.

        needed (B, T): where they will be used; elsewhere they may be anything.
        """
        T, limit = idx.shape[1], self.config.block_size
        if T > limit:
            raise ValueError(f"this model wants at most {limit} tokens, got {T} (--block-size, or shorten the prompt)")
        if tuner is not None and instr is None:
            raise ValueError("a tuner needs instr (B, T), True on the instruction's tokens: it got None")
        tuner = tuner or NO_TUNER
        if tuner.act == "answer":
            return self.read_write_answer(idx, instr, tuner, needed)
        # Tokens become vectors, ...
        x, rope = self.embed(idx, torch.arange(T, device=idx.device))
        # ... which go through the blocks, among a method's own vectors if it has any, ...
        x = tuner.around_blocks(self, x, rope, instr, cache)
        # ... and are normed for the head.
        return self.ln_f(x)

    def blocks(self, x: Tensor, rope: tuple | None, instr: Tensor | None, tuner: Tuner, cache: Cache | None) -> Tensor:
        """x (B, T, C) through all blocks.  The tuner sees what enters a block, and says what it may look at, too."""

        def layer(l: int, x: Tensor) -> Tensor:
            soft = tuner.soft(self.h[l], l, x, instr)
            x, k, v = self.h[l](x, rope, soft, attention_mask(x.shape[1], soft.joined))
            if cache is not None:
                cache.append(k, v, soft)
            return x

        return self.through_layers(layer, x)

    def through_layers(self, layer: Callable[[int, Tensor], Tensor], x: Tensor) -> Tensor:
        """layer(L - 1, .. layer(1, layer(0, x)))."""
        recompute = self.checkpointing and torch.is_grad_enabled()
        for l in range(len(self.h)):
            x = checkpoint(layer, l, x, use_reentrant=False) if recompute else layer(l, x)
        return x

    # -- Read, write, answer: for a tuner that acts on the answer alone

    def read_write_answer(self, idx: Tensor, instr: Tensor, tuner: Tuner, needed: Tensor | None) -> Tensor:
        """`hidden`: the frozen model reads, the tuner writes soft tokens, the prompt's last token and what follows act.

        Only the last of the three has a gradient with respect to hidden states, and it has the answer's tokens alone.
        """
        B, width = idx.shape
        length, place = instr.sum(1), torch.arange(width, device=idx.device)
        end = place[-1:] + 1 if needed is None else (needed * (place + 1)).amax(1)
        longest, n = torch.stack((length.max(), (end - length).max() + 1)).clamp(1).tolist()
        with tuner.silent():
            x, cache = self.read(idx[:, :longest], length)
        for l, soft in enumerate(tuner.write(self, cache.states, instr[:, :longest])):
            cache.add_soft(l, soft)
        at = cache.pos[:, None] + torch.arange(n, device=idx.device)  # (B, n)
        more = max(0, longest - 1 + n - width)  # a row with a long prompt may have padding alone behind it
        y = self.answer(F.pad(idx, (0, more)).gather(1, at), cache)
        x = F.pad(x, (0, 0, 0, width + more - longest))
        return x.scatter(1, at[..., None].expand(-1, -1, x.shape[2]), y)[:, :width]

    @torch.no_grad()
    def read(self, idx: Tensor, length: Tensor, room: int = 0, past: Cache | None = None) -> tuple[Tensor, Cache]:
        """Right-padded prompts idx (B, T) of `length` (B,) tokens -> hidden states (B, T, C), and a Cache with states.

        It ends before the last token of each prompt, which is the first that `answer` or `step` takes.  Prompts go on
        from `past`, what one row without padding has left here, if it is given.
        """
        B, T = idx.shape
        S = past.states[0].shape[1] if past else 0
        cache = Cache(S + length - 1, room)
        x, rope = self.embed(idx, torch.arange(S, S + T, device=idx.device))
        for l, block in enumerate(self.h):
            cache.states.append(x)
            before = Soft(*(a[:, :, :S].expand(B, -1, -1, -1) for a in past.layers[l][:2])) if past else None
            x, k, v = block(x, rope, SoftTokens(before), attention_mask(T, before))
            if past:
                k, v = torch.cat((before.k, k), 2), torch.cat((before.v, v), 2)
                cache.states[l] = torch.cat((past.states[l].expand(B, -1, -1), cache.states[l]), 1)
            cache.append(k, v, NO_SOFT)
        return self.ln_f(x), cache

    def answer(self, idx: Tensor, cache: Cache) -> Tensor:
        """The last hidden states of tokens idx (B, T) that follow what is in the cache: T steps at once.

        With a gradient, and without writing into the cache.
        """
        T = idx.shape[1]
        pos = cache.pos[:, None] + torch.arange(T, device=idx.device)
        x, rope = self.embed(idx, pos.clamp(max=self.config.block_size - 1))  # padding may go beyond

        def layer(l: int, x: Tensor) -> Tensor:
            k, v, mask, separate = cache.layers[l]
            past = Soft(k, v, mask[:, 0, 0])
            return self.h[l](x, rope, SoftTokens(past, separate), attention_mask(T, past))[0]

        return self.ln_f(self.through_layers(layer, x))

    def forward(self, idx: Tensor, instr: Tensor | None = None, tuner: Tuner | None = None,
                targets: Tensor | None = None) -> Tensor:  # fmt: skip
        """Logits (B, T, V); or, given targets (B, T) with -1 where there is none, the mean loss in nats per target."""
        x = self.hidden(idx, instr, tuner)
        return self.head(x) if targets is None else self.loss(x, targets)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of hidden states x (B, T, C).  The head, much of the work, skips what has no target."""
        x, targets = x[targets >= 0], targets[targets >= 0]
        return F.cross_entropy(self.head(x).float(), targets, reduction="sum") / max(1, len(targets))

    @torch.no_grad()
    def prefill(self, idx: Tensor, length: Tensor, tuner: Tuner | None = None, room: int = 0, past: Cache | None = None
                ) -> tuple[Tensor, Cache]:  # fmt: skip
        """Read right-padded prompts idx (B, T) of `length` (B,) tokens: logits (B, V) of the next one, and a Cache.

        For a tuner that acts on the answer alone, what all rows begin with is read once; or it is `past`, see `read`.
        """
        rows = torch.arange(len(idx), device=idx.device)
        last = idx[rows, length - 1]
        if tuner is not None and tuner.act == "answer":
            with tuner.silent():
                n = 0 if past else common_prefix(idx, length)
                if n >= 16:
                    _, past = self.read(idx[:1, :n], length[:1] * 0 + n)
                    idx, length = idx[:, n:], length - n
                _, cache = self.read(idx, length, room, past)
            instr = torch.arange(cache.states[0].shape[1], device=idx.device) <= cache.pos[:, None]
            for l, soft in enumerate(tuner.write(self, cache.states, instr)):
                cache.add_soft(l, soft)
            return self.step(last, cache), cache
        instr = torch.arange(idx.shape[1], device=idx.device) < length[:, None]  # all of a prompt is instruction
        cache = Cache(length, room)
        x = self.hidden(idx, instr, tuner, cache)
        return self.head(x[rows, length - 1]), cache

    @torch.no_grad()
    def step(self, idx: Tensor, cache: Cache) -> Tensor:
        """One more token a row, idx (B,): logits (B, V) of the one after it.  No tuner: its work is in the cache."""
        x, rope = self.embed(idx[:, None], cache.pos[:, None])
        for block, cached in zip(self.h, cache.layers):
            x = block.step(x, rope, cached, cache.at)
        cache.at += 1
        cache.pos += 1
        return self.head(self.ln_f(x))[:, 0]


def common_prefix(idx: Tensor, length: Tensor) -> int:
    """How many tokens all rows of idx (B, T) begin with; 0 for one row, and less than the shortest `length` (B,)."""
    same = (idx == idx[:1]).all(0).long().cumprod(0).sum().item()
    return min(same, length.min().item() - 1) if len(idx) > 1 else 0
