"""The frozen decoder, GPT-2 or LLaMA, and `Tuner`, what a method plugs into it.

    Config, Soft, rotary, Attention, MLP, Block      the parts of a plain decoder, and soft tokens for its attention
    Tuner                                            where a method may reach into it; the defaults do nothing
    Cache                                            keys and values already computed
    Decoder                                          hidden, or read, write, answer;  forward, prefill, step
New beside a plain decoder: before each block, the tuner is asked for soft tokens to attend to.  `step` writes one more
token, and takes no tuner: by then they are entries of the cache.

Letters for shapes, here and everywhere: B rows of a batch, T tokens, P soft tokens, C n_embd, H heads, G key/value
heads, D head size, V vocabulary, L layers.
"""

from collections.abc import Callable
from contextlib import nullcontext
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

    Zeros are derived: n_kv_head = n_head, head_dim = n_embd / n_head, n_inner = 4 n_embd, or 8/3 n_embd for LLaMA.
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
    o_bias: bool | None = None  # None: as attn_bias.  Qwen2 has biases on q, k and v alone
    qk_norm: bool = False  # the queries and keys of each head pass an RMSNorm, as Qwen3's
    no_rope: int = 0  # each so many layers, one has no positions, as SmolLM3's

    def __post_init__(self):
        if self.arch not in ("gpt2", "llama"):
            raise ValueError(f"arch must be 'gpt2' or 'llama', got {self.arch!r}")
        gpt2 = self.arch == "gpt2"
        self.attn_bias, self.mlp_bias = self.attn_bias or gpt2, self.mlp_bias or gpt2
        self.o_bias = self.attn_bias if self.o_bias is None else self.o_bias
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_inner = self.n_inner or (4 * self.n_embd if gpt2 else -(-self.n_embd * 8 // 96) * 32)


class Soft(NamedTuple):
    """P soft tokens of a layer: keys and values, which have no rotary position."""

    k: Tensor  # (B, G, P, D)
    v: Tensor  # (B, G, P, D)
    keep: Tensor | None = None  # (B or 1, 1, 1, P), False on what a row lacks; None: every row has all of them

    def kept(self) -> Tensor:
        return self.k.new_ones(1, 1, 1, self.k.shape[2], dtype=torch.bool) if self.keep is None else self.keep


class Context(NamedTuple):
    """What a layer may look at beside the tokens: in the tokens' softmax, and in a softmax of its own."""

    joined: Soft | None = None
    separate: Soft | None = None

    def join(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # behind those of tokens, (B, G, T, D)
        return (k, v) if self.joined is None else (torch.cat((k, self.joined.k), 2), torch.cat((v, self.joined.v), 2))


def rotary(c: Config, pos: Tensor) -> tuple[Tensor, Tensor]:
    """pos (.., T) -> cos, sin (.., 1, T, D) for `rotate`: pair i of a head (i, i + D/2) turns by pos theta^(-2i/D)."""
    # In fp32 whatever the weights' dtype: bf16 has 8 bits, too few to tell positions apart.
    freq = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, device=pos.device).float() / c.head_dim)
    if c.rope_scaling:  # for a longer context, some pairs turn more slowly
        freq = freq * torch.tensor(c.rope_scaling["speeds"], device=pos.device)
    angle = pos[..., None].float() * freq
    angle = torch.cat((angle, angle), -1)[..., None, :, :]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Turn q or k (B, heads, T, D) by the angles of their positions.  With learned positions rope is None."""
    if rope is None:
        return x
    cos, sin = rope
    a, b = x.float().chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with separate q, k, v, o (so that LoRA on q and v is a hook on two modules)."""

    def __init__(self, c: Config, l: int = 0):
        super().__init__()
        self.head_dim, self.turns = c.head_dim, not c.no_rope or (l + 1) % c.no_rope > 0
        H, G = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        self.q, self.k, self.v = (nn.Linear(c.n_embd, n, bias=c.attn_bias) for n in (H, G, G))
        self.o = nn.Linear(H, c.n_embd, bias=c.o_bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity() for _ in "qk")

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, G D) -> (B, G, T, D)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)

    def qkv(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> rotated queries (B, H, T, D) and keys (B, G, T, D), and values (B, G, T, D)."""
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        rope = rope if self.turns else None
        return rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, separate: Soft | None) -> Tensor:
        """What q (B, H, T, D) finds in k, v (B, G, S, D), and in separate soft tokens, projected: (B, T, C)."""
        y = attend(q, k, v, mask, causal=mask is None)
        if separate is not None:
            y = y + attend(q, *separate)
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

    def __init__(self, c: Config, l: int = 0):
        super().__init__()
        self.ln_1, self.attn = norm(c), Attention(c, l)
        self.ln_2, self.mlp = norm(c), MLP(c)

    def soft_kv(self, s: Tensor) -> Soft:
        """Keys and values of soft tokens s (B, P, C) that enter this block."""
        s = self.ln_1(s)  # at rotary position 0, where the rotation is the identity
        return Soft(self.attn.k_norm(self.attn.heads(self.attn.k(s))), self.attn.heads(self.attn.v(s)))

    def forward(self, x: Tensor, rope: tuple | None, more: Context = Context(), mask: Tensor | None = None) -> tuple:
        """x (B, T, C) -> x (B, T, C) and its own keys and values (B, G, T, D); mask as of `attention_mask`."""
        q, k, v = self.attn.qkv(self.ln_1(x), rope)
        x = x + self.attn.mix(q, *more.join(k, v), mask, more.separate)
        return x + self.mlp(self.ln_2(x)), k, v

    def step(self, x: Tensor, rope: tuple | None, cached: Context, at: Tensor) -> Tensor:
        """One token a row: x (B, 1, C) -> (B, 1, C).  Writes its key and value at index `at` (B,) of the cache."""
        q, k, v = self.attn.qkv(self.ln_1(x), rope)
        keys, values, keep = cached.joined
        rows = torch.arange(len(x), device=x.device)
        keys[rows, :, at], values[rows, :, at] = k[:, :, 0], v[:, :, 0]
        keep[rows, :, :, at] = True
        x = x + self.attn.mix(q, keys, values, keep, cached.separate)
        return x + self.mlp(self.ln_2(x))


def attention_mask(T: int, joined: Soft | None) -> Tensor | None:
    """(.., T, T + P), True where a token may look: at tokens up to itself, and at P soft tokens joined behind them."""
    if joined is None:
        return None  # plain causal attention
    causal, keep = torch.ones(T, T, dtype=torch.bool, device=joined.k.device).tril(), joined.kept()
    return torch.cat((causal.expand(len(keep), 1, -1, -1), keep.expand(-1, -1, T, -1)), -1)


class Tuner(nn.Module):
    """A way to tune a frozen decoder.  Override what you need: the defaults do nothing.

    It gets hidden states x (B, T, C) and instr (B, T), True on the prompt.  Read nothing else: what has seen the answer
    has seen the labels.  Keep nothing between calls: it would become stale.
    """

    lr = 1e-2  # the default of train.py's --lr
    separate = False  # whether its soft tokens get a softmax of their own, whose result is added
    act = "all"  # on all tokens; "answer": from the prompt's last one on; "hidden": on what follows an instruction
    acts = ("all", "answer", "hidden")  # what `act` can be; in the last two, the frozen model reads by itself
    first = 0  # the first word's position, if it acts on all tokens: soft tokens may take positions, too
    silent = nullcontext  # with tuner.silent(): it does nothing

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

    def context(self, block: Block, l: int, x: Tensor, instr: Tensor) -> Context:
        """Once a layer: `kv` in its place, in x's dtype."""
        return self.place(self.kv(block, l, x, instr), x.dtype)

    def place(self, soft: Soft | None, dtype: torch.dtype) -> Context:
        if soft is None:
            return Context()
        soft = Soft(soft.k.to(dtype).contiguous(), soft.v.to(dtype).contiguous(), soft.keep)
        return Context(separate=soft) if self.separate else Context(joined=soft)

    def write(self, model: "Decoder", states: list[Tensor], instr: Tensor) -> list[Context]:
        """Once a prompt, with act = "answer": what entered each layer of the frozen model -> each layer's `context`."""
        return [self.context(block, l, x, instr) for l, (block, x) in enumerate(zip(model.h, states))]

    def around_blocks(self, model: "Decoder", x: Tensor, rope: tuple | None, instr: Tensor | None,
                      cache: "Cache | None") -> Tensor:  # fmt: skip
        """Once a sequence: embeddings x (B, T, C) through the blocks.  Prompt tuning adds tokens here (embedded.py)."""
        return model.blocks(x, rope, lambda l, x: self.context(model.h[l], l, x, instr), cache)

    def groups(self, lr: float) -> list[dict]:
        """Parameter groups for the optimizer, where some parameters want another rate than lr."""
        return [{"params": list(self.parameters()), "lr": lr}]


NO_TUNER = Tuner()  # the frozen model alone


class Cache:
    """Keys and values of right-padded prompts, with `room` for more tokens: shapes never change."""

    def __init__(self, length: Tensor, room: int = 0, first: int = 0):
        self.room, self.layers = room, []
        self.at, self.pos = length.clone(), length + first  # (B,): where a row's next token goes, and its position
        self.states, self.last, self.instr = [], None, None  # from `Decoder.read`: what entered each layer, and left

    def append(self, k: Tensor, v: Tensor):
        """Add a layer's keys and values (B, G, T, D)."""
        k, v = (F.pad(x, (0, 0, 0, self.room)) if self.room else x for x in (k, v))
        keep = torch.arange(k.shape[2], device=k.device) < self.at[:, None]
        self.layers.append(Context(Soft(k, v, keep[:, None, None])))

    def add(self, l: int, soft: Context):
        """Add soft tokens to layer l."""
        k, v, keep = self.layers[l].joined
        if soft.joined is not None:
            ours, theirs = (x.kept().expand(len(k), -1, -1, -1) for x in (self.layers[l].joined, soft.joined))
            keep = torch.cat((ours, theirs), -1)
        self.layers[l] = Context(Soft(*soft.join(k, v), keep), soft.separate or self.layers[l].separate)


class Decoder(nn.Module):
    """A decoder-only language model: idx (B, T) -> logits (B, T, V)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.checkpointing = False  # True: a layer's activations are computed again for the backward pass, not kept
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.block_size, c.n_embd) if c.arch == "gpt2" else None
        self.h = nn.ModuleList(Block(c, l) for l in range(c.n_layer))
        self.ln_f = norm(c)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.wte.weight

    def embed(self, idx: Tensor, pos: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Tokens idx (B, T) at positions pos, (T,) or (B, T) -> x (B, T, C) and, for LLaMA, the angles of `rotary`."""
        if (T := idx.shape[1]) > (limit := self.config.block_size):
            raise ValueError(f"this model wants at most {limit} tokens, got {T} (--block-size, or shorten the prompt)")
        x = self.wte(idx)
        return (x, rotary(self.config, pos)) if self.wpe is None else (x + self.wpe(pos), None)

    def hidden(self, idx: Tensor, instr: Tensor | None = None, tuner: Tuner | None = None, cache: Cache | None = None,
               n: int | None = None) -> Tensor:  # fmt: skip
        """The last hidden states (B, T, C) of right-padded tokens idx (B, T); instr (B, T): True on what a tuner reads.

        cache: to be filled; or what the frozen model has read.  n: how many states behind it will be used, at most.
        """
        tuner, T = tuner or NO_TUNER, idx.shape[1]
        if tuner is not NO_TUNER and instr is None:
            raise ValueError("a tuner needs instr (B, T), True on the instruction's tokens: it got None")
        if tuner.act == "all":
            pos = torch.arange(tuner.first, tuner.first + T, device=idx.device)
            x, rope = self.embed(idx, pos.clamp(max=self.config.block_size - 1))  # padding may go beyond
            return self.ln_f(tuner.around_blocks(self, x, rope, instr, cache))
        if cache is None:
            cache = self.read(idx[:, : int(instr.sum(1).max())], instr.sum(1), tuner, whole=tuner.act == "hidden")
        self.write(cache, tuner)
        at = cache.pos[:, None] + torch.arange(n or T, device=idx.device)  # (B, n)
        idx = F.pad(idx, (0, n or T))  # behind a row with a long prompt there may not be n tokens
        x = F.pad(cache.last, (0, 0, 0, idx.shape[1] - cache.last.shape[1]))
        return x.scatter(1, at[..., None].expand(-1, -1, x.shape[2]), self.answer(idx.gather(1, at), cache))[:, :T]

    def blocks(self, x: Tensor, rope: tuple | None, soft: Callable[[int, Tensor], Context],
               cache: Cache | None = None) -> Tensor:  # fmt: skip
        """x (B, T, C) through all blocks.  soft(l, x): what layer l, which x enters, may look at beside x."""

        def layer(l: int, x: Tensor) -> Tensor:
            more = soft(l, x)
            x, k, v = self.h[l](x, rope, more, attention_mask(x.shape[1], more.joined))
            if cache is not None:  # never with checkpointing, which would do it twice
                cache.append(k, v)
                cache.add(l, more)
            return x

        again = self.checkpointing and torch.is_grad_enabled()
        for l in range(len(self.h)):
            x = checkpoint(layer, l, x, use_reentrant=False) if again else layer(l, x)
        return x

    @torch.no_grad()
    def read(self, idx: Tensor, length: Tensor, tuner: Tuner = NO_TUNER, room: int = 0, past: Cache | None = None,
             whole: bool = False) -> Cache:  # fmt: skip
        """The frozen model reads right-padded prompts idx (B, T) of `length` (B,) tokens; the tuner is silent.

        The cache ends before each prompt's last token, with which `answer` or `step` begins; whole: after it.  past:
        what prompts go on from, a whole cache.
        """
        cache, place = Cache(length if whole else length - 1, room), torch.arange(idx.shape[1], device=idx.device)
        cache.instr = place < length[:, None]
        if past is not None:
            place, cache.pos = past.pos[:, None] + place, past.pos + cache.pos
            cache.instr = torch.cat((past.instr, cache.instr), 1)

        def look(l: int, x: Tensor) -> Context:
            cache.states.append(x if past is None else torch.cat((past.states[l], x), 1))
            return Context() if past is None else past.layers[l]

        with tuner.silent():
            x, rope = self.embed(idx, place)
            cache.last = self.ln_f(self.blocks(x, rope, look, cache))
        return cache

    def write(self, cache: Cache, tuner: Tuner):
        """The tuner writes soft tokens into a cache of `read`: in place of the words, if they are hidden."""
        soft = tuner.write(self, cache.states, cache.instr)
        if tuner.act == "hidden":  # each row's first word stays, a sink: it takes the attention that nothing else wants
            cache.layers = [Context(Soft(words.k[:, :, :1], words.v[:, :, :1])) for words, _ in cache.layers]
            cache.states, cache.instr = [x[:, :0] for x in cache.states], cache.instr[:, :0]
        for l, more in enumerate(soft):
            cache.add(l, more)

    def answer(self, idx: Tensor, cache: Cache) -> Tensor:
        """The last hidden states of tokens idx (B, T) that follow a cache: T steps at once, which leave it as it is."""
        pos = cache.pos[:, None] + torch.arange(idx.shape[1], device=idx.device)
        x, rope = self.embed(idx, pos.clamp(max=self.config.block_size - 1))  # padding may go beyond
        return self.ln_f(self.blocks(x, rope, lambda l, _: cache.layers[l]))

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
        """Read right-padded prompts idx (B, T) of `length` (B,) tokens: logits (B, V) of the next one, and a Cache."""
        tuner, last = tuner or NO_TUNER, (torch.arange(len(idx), device=idx.device), length - 1)
        if tuner.act == "answer" or past is not None:
            cache = self.read(idx, length, tuner, room, past, whole=tuner is NO_TUNER)
            x = cache.last[last] if tuner is NO_TUNER else None
            self.write(cache, tuner)
            cache.states, cache.last, cache.instr = [], None, None  # decoding wants none of them
            return self.step(idx[last], cache) if x is None else self.head(x), cache
        cache, place = Cache(length, room, tuner.first), torch.arange(idx.shape[1], device=idx.device)
        x = self.hidden(idx, place < length[:, None], tuner, cache)  # all of a prompt is instruction
        return self.head(x[last]), cache

    @torch.no_grad()
    def step(self, idx: Tensor, cache: Cache) -> Tensor:
        """One more token a row, idx (B,): logits (B, V) of the one after it.  No tuner: its work is in the cache."""
        x, rope = self.embed(idx[:, None], cache.pos[:, None])
        for block, cached in zip(self.h, cache.layers):
            x = block.step(x, rope, cached, cache.at)
        cache.at += 1
        cache.pos += 1
        return self.head(self.ln_f(x))[:, 0]
