"""Hugging Face folders of GPT-2 and LLaMA models, read and written.

    load(folder)                   -> Decoder      config.json and model.safetensors, its shards, or pytorch_model.bin
    save(folder, model)                            config.json and model.safetensors
    stored(folder)                 -> {name: Stored}      what a folder's files hold: shapes now, values when asked for
    read_safetensors(path), write_safetensors(path, tensors)

No weights library is needed: the format is a JSON header and bytes, and what is worth reading are the tables of names.
`load` asserts that every tensor of ours is filled, that every tensor of the files is used or known to be a leftover,
and that all shapes agree: weights that half fit are an error, never a bad model.  It reads and converts one tensor at a
time, so loading takes little more memory than the model.
"""

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from data import read_json, replacing
from model import Config, Decoder

# -- Names: their module -> ours ---------------------------------------------------------------------------------------
# Several of ours: the file fuses them along the output axis.  "conv:" marks GPT-2's Conv1D, whose weight is (in, out).
# A module's weight and bias go together; the head is handled by `load`, since it may be tied.

GPT2 = {
    "wte": "wte",
    "wpe": "wpe",
    "h.{l}.ln_1": "h.{l}.ln_1",
    "h.{l}.attn.c_attn": "conv: h.{l}.attn.q h.{l}.attn.k h.{l}.attn.v",
    "h.{l}.attn.c_proj": "conv: h.{l}.attn.o",
    "h.{l}.ln_2": "h.{l}.ln_2",
    "h.{l}.mlp.c_fc": "conv: h.{l}.mlp.up",
    "h.{l}.mlp.c_proj": "conv: h.{l}.mlp.down",
    "ln_f": "ln_f",
}
LLAMA = {
    "embed_tokens": "wte",
    "layers.{l}.input_layernorm": "h.{l}.ln_1",
    **{f"layers.{{l}}.self_attn.{x}_proj": f"h.{{l}}.attn.{x}" for x in "qkvo"},
    "layers.{l}.post_attention_layernorm": "h.{l}.ln_2",
    **{f"layers.{{l}}.mlp.{x}_proj": f"h.{{l}}.mlp.{x}" for x in ("gate", "up", "down")},
    "norm": "ln_f",
}
TABLES = {"gpt2": ("transformer.", GPT2), "llama": ("model.", LLAMA)}  # the prefix, of everything but the head
# Buffers of old versions of transformers.
LEFTOVERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def rows(config: Config) -> Iterator[tuple[str, list[str], bool]]:
    """(their module, our modules, whether a Conv1D) for every module of a model but its head."""
    prefix, table = TABLES[config.arch]
    for theirs, ours in table.items():
        conv = ours.startswith("conv: ")
        for l in range(config.n_layer) if "{l}" in theirs else [0]:
            yield prefix + theirs.format(l=l), ours.removeprefix("conv: ").format(l=l).split(), conv


def load(folder: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Decoder:
    """The model of a Hugging Face folder.  Raises FileNotFoundError or ValueError, saying what does not fit."""
    config = read_config(os.path.join(folder, "config.json"))
    theirs = {name: x for name, x in stored(folder).items() if not name.endswith(LEFTOVERS)}
    prefix, _ = TABLES[config.arch]
    if not any(name.startswith(prefix) for name in theirs):  # GPT-2's own files
        theirs = {name if name == "lm_head.weight" else prefix + name: x for name, x in theirs.items()}
    if config.n_layer > len(theirs):
        raise ValueError(f"{folder}: the config says {config.n_layer} layers, the files hold {len(theirs)} tensors")
    with torch.device("meta"):  # shapes only: nothing is allocated or initialised that the files will replace
        model = Decoder(config)
    ours = {name: x.shape for name, x in model.state_dict().items()}

    def take(name, modules, part, turned=False):
        """Copy one of their tensors into one or several of ours."""
        shapes = [ours[f"{m}.{part}"] for m in modules]
        shape = torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]])
        if name not in theirs:
            raise ValueError(f"{folder} lacks {name}")
        x = theirs.pop(name)
        if x.shape != (shape[::-1] if turned else shape):
            raise ValueError(f"{folder}: {name} has shape {tuple(x.shape)}, the config wants {tuple(shape)}")
        x = x.read().T if turned else x.read()
        for m, chunk in zip(modules, x.split([shape[0] for shape in shapes])):
            filled[f"{m}.{part}"] = torch.empty(chunk.shape, dtype=dtype, device=device).copy_(chunk)

    filled, embedding = {}, next(rows(config))[0] + ".weight"
    if config.tied and "lm_head.weight" in theirs:  # a tied table may be stored under either name, or both
        theirs.setdefault(embedding, theirs.pop("lm_head.weight"))
    for name, modules, conv in rows(config):
        for part in ("weight", "bias"):
            if f"{modules[0]}.{part}" in ours:
                take(f"{name}.{part}", modules, part, conv and part == "weight")
    if not config.tied:
        take("lm_head.weight", ["head"], "weight")
    if theirs:
        some = sorted(theirs)[0]
        raise ValueError(f"{folder} has {len(theirs)} tensors that this model has no place for, such as {some}")
    if config.tied:
        filled["head.weight"] = filled["wte.weight"]
    model.load_state_dict(filled, assign=True)
    if config.tied:
        model.head.weight = model.wte.weight
    return model


def save(folder: str, model: Decoder, dtype: torch.dtype = torch.float32):
    """Write a model as a Hugging Face folder, its tensors in `dtype`."""
    os.makedirs(folder, exist_ok=True)
    ours, out = model.state_dict(), {}
    for name, modules, conv in rows(model.config):
        for part in ("weight", "bias"):
            have = [ours[f"{m}.{part}"] for m in modules if f"{m}.{part}" in ours]
            if have:
                x = torch.cat(have)
                out[f"{name}.{part}"] = x.T if conv and part == "weight" else x
    if not model.config.tied:
        out["lm_head.weight"] = ours["head.weight"]
    write_safetensors(os.path.join(folder, "model.safetensors"), {name: x.to(dtype) for name, x in out.items()})
    with replacing(os.path.join(folder, "config.json")) as f:
        json.dump(write_config(model.config), f, indent=2)
        f.write("\n")


def fingerprint(model: Decoder) -> str:
    """A hash of names, shapes and some values of every tensor: a checkpoint knows by it what it was trained for."""
    h = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        some = x.flatten()[:: max(1, x.numel() // 64)].to(
            "cpu", torch.bfloat16
        )  # the same whichever dtype the model was loaded in
        h.update(f"{name} {tuple(x.shape)}".encode() + some.view(torch.int16).numpy().tobytes())
    return h.hexdigest()[:16]


# -- config.json -------------------------------------------------------------------------------------------------------

CONFIG = {  # ours: theirs
    "gpt2": dict(vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head", n_embd="n_embd",
                 n_inner="n_inner", norm_eps="layer_norm_epsilon", tied="tie_word_embeddings"),
    "llama": dict(vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
                  n_head="num_attention_heads", n_kv_head="num_key_value_heads", n_embd="hidden_size",
                  head_dim="head_dim", n_inner="intermediate_size", norm_eps="rms_norm_eps",
                  tied="tie_word_embeddings", attn_bias="attention_bias", mlp_bias="mlp_bias"),
}  # fmt: skip
# Where transformers assumes other than us, when a config does not say.
ABSENT = {"gpt2": {"tied": True}, "llama": {"tied": False, "norm_eps": 1e-6}}
# What our decoder does, whatever the config says: so it had better say this, or nothing.
FIXED = {
    "gpt2": {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
             "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
             "quantization_config": (None,)},
    "llama": {"hidden_act": ("silu", "swish"), "pretraining_tp": (1,), "partial_rotary_factor": (1, None),
              "sliding_window": (None,), "quantization_config": (None,)},
}  # fmt: skip
# The kinds of rotary scaling that we have, and their parameters.
ROPE = {"default": [], "linear": ["factor"],
        "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]}  # fmt: skip


def read_config(path: str) -> Config:
    """Config of a config.json.  Raises ValueError, by name, for what our decoder does not do: it is never ignored.

    Raises FileNotFoundError if there is no such file.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no {path}: --init takes a folder with config.json, model.safetensors and a tokenizer")
    theirs = read_json(path)
    arch = theirs.get("model_type") if isinstance(theirs, dict) else None
    if not isinstance(arch, str) or arch not in CONFIG:
        raise ValueError(f"{path}: model_type is {arch!r}; we have gpt2 and llama")
    for name, allowed in FIXED[arch].items():
        if theirs.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{path}: {name} is {theirs[name]!r}; our decoder has {allowed[0]!r}")
    values = {ours: theirs[name] for ours, name in CONFIG[arch].items() if theirs.get(name) is not None}
    try:
        rope = read_rope(theirs) if arch == "llama" else {}
        return Config(arch=arch, **{**ABSENT[arch], **values, **rope})
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        raise ValueError(f"{path}: {e}") from None


def read_rope(theirs: dict) -> dict:
    """Rotary theta and scaling, in the old spelling (rope_theta, rope_scaling) or the new one (rope_parameters).

    Raises ValueError for a kind of scaling that we lack, and for one whose parameters are not all there.
    """
    given = {"rope_theta": theirs.get("rope_theta") or 10000.0}
    given.update(theirs.get("rope_scaling") or {})
    given.update(theirs.get("rope_parameters") or {})
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE:
        raise ValueError(f"rotary scaling {kind!r}; we have {', '.join(ROPE)}")
    lacking = [name for name in ROPE[kind] if name not in given]
    if lacking:
        raise ValueError(f"rotary scaling {kind!r} without {', '.join(lacking)}")
    scaling = {"rope_type": kind, **{name: given[name] for name in ROPE[kind]}} if ROPE[kind] else None
    return {"rope_theta": given["rope_theta"], "rope_scaling": scaling}


def write_config(c: Config) -> dict:
    """config.json's content for a Config, as transformers would read it."""
    kind, act = {"gpt2": ("GPT2LMHeadModel", "activation_function"), "llama": ("LlamaForCausalLM", "hidden_act")}[
        c.arch
    ]
    values = {name: getattr(c, ours) for ours, name in CONFIG[c.arch].items()}
    rope = {} if c.arch == "gpt2" else {"rope_theta": c.rope_theta, "rope_scaling": c.rope_scaling}
    return {"model_type": c.arch, "architectures": [kind], act: FIXED[c.arch][act][0], **values, **rope}


# -- Files of tensors --------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor in a file: its shape, and a function that reads it."""

    shape: torch.Size
    read: Callable[[], Tensor]


def stored(folder: str) -> dict[str, Stored]:
    """{name: Stored} of a folder: model.safetensors, or the shards of its index, or pytorch_model.bin likewise.

    Raises FileNotFoundError if it has none of them, ValueError for a broken file.
    """
    for name, reader in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        path, index = os.path.join(folder, name), os.path.join(folder, f"{name}.index.json")
        if os.path.exists(path):
            return reader(path)
        if os.path.exists(index):
            return read_shards(folder, index, reader)
    raise FileNotFoundError(f"no weights in {folder}: neither model.safetensors nor pytorch_model.bin, nor their index")


def read_shards(folder: str, index: str, reader: Callable[[str], dict]) -> dict[str, Stored]:
    """{name: Stored} of the files that an index names.  Raises ValueError if one lacks what the index says it has."""
    where = read_index(index)
    shards = {file: reader(os.path.join(folder, file)) for file in sorted(set(where.values()))}
    for name, file in where.items():
        if name not in shards[file]:
            raise ValueError(f"{index}: {file} lacks {name}")
    return {name: shards[file][name] for name, file in where.items()}


def read_index(path: str) -> dict[str, str]:
    """{tensor name: file} of an index of shards.  Raises ValueError for one that names files elsewhere."""
    where = read_json(path)
    where = where.get("weight_map") if isinstance(where, dict) else None
    if not isinstance(where, dict) or not all(isinstance(f, str) and f == os.path.basename(f) for f in where.values()):
        raise ValueError(f"{path} has no weight_map of tensor names and files beside it")
    return where


def read_bin(path: str) -> dict[str, Stored]:
    """{name: Stored} of a pytorch_model.bin.  Only tensors are unpickled: code in it does not run.

    Raises ValueError for a file of anything else.
    """
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than PyTorch 1.6 cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: Stored(x.shape, lambda x=x: x) for name, x in tensors.items()}
    except FileNotFoundError:
        raise
    except Exception as e:  # it raises half a dozen kinds
        raise ValueError(f"{path} is not a file of tensors alone, or was cut off ({type(e).__name__})") from None


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
LONGEST = 1 << 24  # bytes of a header; those of the largest models have some 100 kB


def read_safetensors(path: str) -> dict[str, Stored]:
    """{name: Stored} of a safetensors file: 8 bytes of length n, n of JSON {name: {dtype, shape, data_offsets}}, data.

    Raises ValueError for a file that is not what it says it is.  Nothing is allocated before it is known to be there.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        n = struct.unpack("<Q", f.read(8))[0] if size >= 8 else 0
        if not 2 <= n <= min(size - 8, LONGEST):
            raise ValueError(f"{path} is not a safetensors file, or was cut off ({size:,} bytes)")
        try:
            header = json.loads(f.read(n).decode("utf-8"), object_pairs_hook=unique)
            header.pop("__metadata__", None)
            tensors = [(DTYPES[t["dtype"]], t["shape"], *t["data_offsets"], name) for name, t in header.items()]
            tensors = sorted(tensors, key=lambda t: t[2:4])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ValueError(f"{path} has a broken header ({type(e).__name__}: {str(e)[:80]})") from None
    out, end = {}, 0
    for dtype, shape, start, stop, name in tensors:
        whole = isinstance(shape, list) and all(type(i) is int and i >= 0 for i in (*shape, start, stop))
        if not whole or start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name[:80]} {dtype} {str(shape)[:80]} does not fit bytes {start} to {stop}")
        end = stop
        out[name] = Stored(torch.Size(shape), lambda t=(path, dtype, shape, 8 + n + start): read_tensor(*t))
    if 8 + n + end != size:
        raise ValueError(f"{path} has {size:,} bytes, its safetensors header wants {8 + n + end:,} (cut off?)")
    return out


def unique(pairs: list[tuple[str, object]]) -> dict:
    """The pairs as a dict.  Raises ValueError if a name occurs twice."""
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a name occurs twice")
    return out


def read_tensor(path: str, dtype: torch.dtype, shape: list[int], start: int) -> Tensor:
    """A tensor over its bytes in the file, memory-mapped: they take memory only while it lives."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    with open(path, "rb") as f:
        page = start % mmap.ALLOCATIONGRANULARITY  # a mapping starts at a whole page
        data = mmap.mmap(f.fileno(), page + count * dtype.itemsize, offset=start - page, access=mmap.ACCESS_COPY)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=page).view(shape)


def write_safetensors(path: str, tensors: dict[str, Tensor]):
    """Write {name: tensor}, atomically."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        header[name] = {
            "dtype": names[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [at, at + x.numel() * x.element_size()],
        }
        at = header[name]["data_offsets"][1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with replacing(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for x in tensors.values():
            f.write(x.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
