"""Hidden instructions: read once, for all inputs that share them, and kept in files, to be used without their words.

    cache = read_instructions(model, [ids, ...], tuner)     # `generate(.., past=cache)` goes on from it
    cache = recall(model, [ids, load_instruction("plural.safetensors", model, tuner), ...], tuner)
    save_instruction("french.safetensors", cache, model, tuner)

A file has keys and values (L, G, P, D).  They were made from a text: treat them as you would treat the text.
"""

import torch

from data import right_pad
from model import Cache, Context, Decoder, Soft, Tuner
from plumbing.caches import select_rows
from plumbing.pretrained import fingerprint, read_safetensors, write_safetensors


@torch.no_grad()
def read_instructions(model: Decoder, instructions: list[list[int]], tuner: Tuner) -> Cache:
    """What a tuner writes in place of hidden instructions, given as ids: a row each.

    The prompts that follow go on from it (`past`), without the tuner.
    """
    idx, length = right_pad(instructions, model.wte.weight.device)
    cache = model.read(idx, length, tuner, whole=True)
    model.write(cache, tuner)
    cache.last = None
    return cache


def recall(model: Decoder, instructions: list[list[int] | Cache], tuner: Tuner) -> Cache:
    """A row for each instruction, given as ids or by `load_instruction`; equal ids are read once."""
    loaded = {id(x): x for x in instructions if isinstance(x, Cache)}
    keys = [id(x) if isinstance(x, Cache) else tuple(x) for x in instructions]
    texts = list(dict.fromkeys(key for key in keys if key not in loaded))
    read = [read_instructions(model, texts, tuner)] if texts else []
    cache, order = join_rows([*loaded.values(), *read]), [*loaded, *texts]
    select_rows(cache, torch.tensor([order.index(key) for key in keys], device=cache.pos.device))
    return cache


def save_instruction(path: str, cache: Cache, model: Decoder, tuner: Tuner):
    """Write the first row of a cache of `read_instructions`."""
    tensors = {"position": cache.pos[:1], **marks(model, tuner)}
    for kind in Context._fields:
        if getattr(cache.layers[0], kind) is not None:
            soft = [getattr(layer, kind) for layer in cache.layers]
            tensors |= {f"{kind}.{x}": torch.stack([getattr(s, x)[0] for s in soft]) for x in ("k", "v")}
    write_safetensors(path, tensors)


def load_instruction(path: str, model: Decoder, tuner: Tuner) -> Cache:
    """A cache of one row.  Raises ValueError for a file of another run or model, or that is not one of these."""
    tensors = {name: lazy.read() for name, lazy in read_safetensors(path).items()}
    for name, ours in marks(model, tuner).items():
        if not torch.equal(tensors.get(name, ours[:0]), ours):
            raise ValueError(f"{path} was not written by --save with this {name}: save the instruction again")
    weight, c = model.wte.weight, model.config
    kinds = {name.partition(".")[0] for name in tensors if "." in name}
    softs = {kind: [tensors.get(f"{kind}.{x}", weight[:0]) for x in ("k", "v")] for kind in kinds}
    fits = lambda k, v: k.ndim == 4 and k.shape == v.shape == (c.n_layer, c.n_kv_head, k.shape[2], c.head_dim)
    known = kinds and kinds <= {*Context._fields} and "position" in tensors
    if not (known and all(fits(*kv) for kv in softs.values())):
        raise ValueError(f"{path} is damaged: save the instruction again")
    cache = Cache(tensors["position"].to(weight.device))
    for l in range(c.n_layer):
        soft = {kind: Soft(k[l, None].to(weight), v[l, None].to(weight)) for kind, (k, v) in softs.items()}
        cache.layers.append(Context(**soft))
    cache.states = [weight.new_zeros(1, 0, c.n_embd)] * c.n_layer
    cache.instr = torch.zeros(1, 0, dtype=torch.bool, device=weight.device)
    return cache


def marks(model: Decoder, tuner: Tuner) -> dict[str, torch.Tensor]:
    """By what a file knows its model and its run: bytes of their fingerprints."""
    return {name: torch.tensor(list(fingerprint(x).encode()), dtype=torch.uint8)
            for name, x in (("model", model), ("run", tuner))}  # fmt: skip


def join_rows(caches: list[Cache]) -> Cache:
    """The rows of several caches of one run as one cache."""
    cache = Cache(torch.cat([cache.pos for cache in caches]))

    def joined(parts):
        if parts[0] is None:
            return None
        return Soft(torch.cat([soft.k for soft in parts]), torch.cat([soft.v for soft in parts]))

    for layers in zip(*(cache.layers for cache in caches)):
        cache.layers.append(Context(*map(joined, zip(*layers))))
    cache.states = [torch.cat(states) for states in zip(*(cache.states for cache in caches))]
    cache.instr = torch.cat([cache.instr for cache in caches])
    return cache
