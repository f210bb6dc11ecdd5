"""Hugging Face folders of GPT-2, LLaMA, Mistral, Qwen2, Qwen3 and SmolLM3, read and written.

    load_pretrained(folder)          -> Decoder            config.json and model.safetensors, shards, or a .bin file
    save_pretrained(folder, model)                         writes config.json and model.safetensors
    read_config(path)                -> Config             of a config.json
    open_tensors(folder)             -> {name: LazyTensor} shapes now, values when they are read
    read_safetensors(path), write_safetensors(path, tensors)

No weights library is needed: a safetensors file is a JSON header and bytes.  What is worth reading are the tables of
names.  Loading asserts that every tensor of ours is filled, that every tensor of the files is used or known to be a
leftover, and that all shapes agree: weights that half fit are an error, never a bad model.  Tensors are read and
converted one at a time, so loading takes little more memory than the model.
"""

import dataclasses
import hashlib
import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model import Config, Decoder
from plumbing.files import no_duplicate_keys, read_json, refuse_adapter, refuse_lfs_pointer, replacing, write_json


class LazyTensor(NamedTuple):
    """A tensor in a file: its shape, and a function that reads it."""

    shape: torch.Size
    read: Callable[[], Tensor]


# -- Names of tensors: theirs -> ours ----------------------------------------------------------------------------------
# Several of ours: the file fuses them along the output axis.  "conv:" marks GPT-2's Conv1D, whose weight is (in, out).
# A module's weight and bias go together.  The head is not in the tables, because it may be tied to the embedding.

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
    **{f"layers.{{l}}.self_attn.{x}_norm": f"h.{{l}}.attn.{x}_norm" for x in "qk"},
    "layers.{l}.post_attention_layernorm": "h.{l}.ln_2",
    **{f"layers.{{l}}.mlp.{x}_proj": f"h.{{l}}.mlp.{x}" for x in ("gate", "up", "down")},
    "norm": "ln_f",
}
TABLES = {"gpt2": ("transformer.", GPT2), "llama": ("model.", LLAMA)}  # the prefix, of everything but the head
HEAD = "lm_head.weight"
# Buffers that old versions of transformers saved.
LEFTOVERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def name_pairs(config: Config, ours: dict) -> Iterator[tuple[str, list[str], bool]]:
    """(their tensor, those of ours that it holds, whether it is transposed) for all of `ours`, a model's state_dict."""
    prefix, table = TABLES[config.arch]
    for theirs, modules in table.items():
        conv = modules.startswith("conv: ")
        for l in range(config.n_layer) if "{l}" in theirs else [0]:
            for part in ("weight", "bias"):
                names = [f"{module}.{part}" for module in modules.removeprefix("conv: ").format(l=l).split()]
                if names[0] in ours:
                    yield f"{prefix}{theirs.format(l=l)}.{part}", names, conv and part == "weight"
    if not config.tied:
        yield HEAD, ["head.weight"], False


class SkipInit(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device nothing is filled, and PyTorch would import its compiler to find out."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_pretrained(folder: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Decoder:
    """The model of a Hugging Face folder.  Raises FileNotFoundError or ValueError, naming what does not fit."""
    config, theirs = open_model_tensors(folder)
    try:
        with torch.device("meta"), SkipInit():  # shapes only: the files will replace what would be there
            model = Decoder(config)
    except RuntimeError as e:
        raise ValueError(f"{folder}: no model can have the sizes of its config.json ({str(e)[:80]})") from None
    ours = {name: x.shape for name, x in model.state_dict().items()}
    filled = {}
    for name, parts, transposed in name_pairs(config, ours):
        rows = [ours[part][0] for part in parts]
        shape = torch.Size([sum(rows), *ours[parts[0]][1:]])
        if name not in theirs:
            raise ValueError(f"{folder} lacks {name}")
        x = theirs.pop(name)
        if x.shape != (shape[::-1] if transposed else shape):
            raise ValueError(f"{folder}: {name} has shape {tuple(x.shape)}, the config wants {tuple(shape)}")
        x = x.read().T if transposed else x.read()
        for part, chunk in zip(parts, x.split(rows)):
            filled[part] = torch.empty(chunk.shape, dtype=dtype, device=device).copy_(chunk)
    if config.tied:
        filled["head.weight"] = filled["wte.weight"]
    if theirs:
        some = min(theirs)[:80]
        raise ValueError(f"{folder} has {len(theirs)} tensors that this model has no place for, such as {some}")
    model.load_state_dict(filled, assign=True)
    if config.tied:
        model.head.weight = model.wte.weight
    return model


def open_model_tensors(folder: str) -> tuple[Config, dict[str, LazyTensor]]:
    """A folder's Config, and its tensors under the names that transformers gives them now, each of them once."""
    refuse_adapter(folder)
    config = read_config(os.path.join(folder, "config.json"))
    tensors = {name: x for name, x in open_tensors(folder).items() if not name.endswith(LEFTOVERS)}
    prefix, table = TABLES[config.arch]
    if not any(name.startswith(prefix) for name in tensors):  # GPT-2's own files
        tensors = {name if name == HEAD else prefix + name: x for name, x in tensors.items()}
    if config.n_layer > len(tensors):
        raise ValueError(f"{folder}: the config says {config.n_layer} layers, the files hold {len(tensors)} tensors")
    embedding = f"{prefix}{next(iter(table))}.weight"
    if config.tied and HEAD in tensors:  # a tied table may be stored under either name, or both
        head = tensors.pop(HEAD)
        other = tensors.setdefault(embedding, head)
        if head.shape != other.shape or (head.read() != other.read()).any():
            tensors[HEAD] = head  # two different tables: the files hold what was trained, whatever the config says
            config = dataclasses.replace(config, tied=False)
    return config, tensors


def init_weights(model: Decoder) -> Decoder:
    """A model with random weights, from which to train: as GPT-2's, what adds to the residual stream starts smaller."""
    small = 0.02 / (2 * model.config.n_layer) ** 0.5
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.dim() == 2:
            nn.init.normal_(p, std=small if name.endswith(("attn.o.weight", "mlp.down.weight")) else 0.02)
    return model


def save_pretrained(folder: str, model: Decoder, dtype: torch.dtype = torch.float32):
    """Write a model as a Hugging Face folder, its tensors in `dtype`."""
    os.makedirs(folder, exist_ok=True)
    ours = model.state_dict()
    theirs = {}
    for name, parts, transposed in name_pairs(model.config, ours):
        x = torch.cat([ours[part] for part in parts]).to(dtype)
        theirs[name] = x.T if transposed else x
    write_safetensors(os.path.join(folder, "model.safetensors"), theirs)
    write_json(os.path.join(folder, "config.json"), write_config(model.config), indent=2)


def fingerprint(model: Decoder) -> str:
    """A hash of the name, the shape and 64 values of every tensor, by which a checkpoint knows the model it is for.

    It is the same whatever dtype the model was loaded in.
    """
    h = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        values = x.flatten()[:: max(1, x.numel() // 64)].to("cpu", torch.bfloat16)
        h.update(f"{name} {tuple(x.shape)}".encode() + values.view(torch.int16).numpy().tobytes())
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
# In what a family that is read as LLaMA differs from it, and what its config means where it says nothing.
LIKE_LLAMA = {
    "llama": ({}, {}),
    "mistral": ({}, dict(block_size=131072, n_inner=14336, n_kv_head=8)),
    "qwen2": (dict(attn_bias=True, o_bias=False), dict(vocab_size=151936, block_size=32768, n_inner=22016)),
    "qwen3": (dict(qk_norm=True), dict(vocab_size=151936, block_size=32768, n_inner=22016, head_dim=128)),
    "smollm3": (dict(no_rope=4), dict(vocab_size=128256, block_size=32768, n_layer=36, n_head=16, n_embd=2048,
                                      n_kv_head=4, tied=True, rope_theta=2e6)),
}  # fmt: skip
# What transformers assumes where a config says nothing, if our Config assumes something else.
HF_DEFAULTS = {
    "gpt2": dict(vocab_size=50257),
    "llama": dict(vocab_size=32000, block_size=2048, n_layer=32, n_head=32, n_embd=4096, n_inner=11008, norm_eps=1e-6,
                  tied=False),
}  # fmt: skip
# What our decoder does.  A config that says otherwise is refused; the first value is what is assumed and written.
REQUIRED = {
    "gpt2": {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
             "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
             "quantization_config": (None,)},
    "llama": {"hidden_act": ("silu", "swish"), "pretraining_tp": (1,), "quantization_config": (None,),
              "logits_scaling": (None, 1), "residual_multiplier": (None, 1), "embedding_multiplier": (None, 1),
              "attention_multiplier": (None,)},
}  # fmt: skip
# What a family would need that our decoder lacks.
LACKING = {
    "olmo2": "norms behind attention and MLP", "gemma": "scaled embeddings", "gemma2": "norms on both sides",
    "gemma3_text": "norms on both sides", "granite": "multipliers of its own", "phi3": "fused projections",
    "mixtral": "experts", "qwen3_moe": "experts", "qwen3_next": "layers without attention",
    "lfm2": "layers without attention", "mamba": "layers without attention",
}  # fmt: skip
# The kinds of rotary scaling that our decoder has, and their parameters.
ROPE = {"default": [], "linear": ["factor"],
        "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]}  # fmt: skip


def read_config(path: str) -> Config:
    """Config of a config.json.

    Raises ValueError for values that make no sense and for what our decoder does not do, FileNotFoundError if there is
    no such file.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no {path}: --init takes a folder with config.json, model.safetensors and a tokenizer")
    theirs = read_json(path)
    family = theirs.get("model_type") if isinstance(theirs, dict) else None
    if not isinstance(family, str) or family not in ("gpt2", *LIKE_LLAMA):
        lacking = f", which needs {LACKING[family]}" if isinstance(family, str) and family in LACKING else ""
        raise ValueError(f"{path}: model_type is {family!r}{lacking}; we have gpt2, {', '.join(LIKE_LLAMA)}")
    arch = "gpt2" if family == "gpt2" else "llama"
    for name, allowed in REQUIRED[arch].items():
        if theirs.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{path}: {name} is {theirs[name]!r}; our decoder has {allowed[0]!r}"[:300])
    values = {ours: theirs[name] for ours, name in CONFIG[arch].items() if theirs.get(name) is not None}
    try:
        flags, defaults = LIKE_LLAMA.get(family, ({}, {}))
        rope = read_rope(theirs, defaults) if arch == "llama" else {}
        check_values({CONFIG[arch].get(ours, ours): x for ours, x in {**values, **rope}.items()})
        c = Config(arch=arch, **{**HF_DEFAULTS[arch], **defaults, **values, **rope, **flags})
        read_layers(theirs, family, c)
        if c.rope_scaling:
            c.rope_scaling["speeds"] = rope_speeds(c)
        if "head_dim" not in values and c.n_embd % c.n_head:
            raise ValueError(f"n_embd={c.n_embd} is not a multiple of n_head={c.n_head}")
        if c.n_head % c.n_kv_head:
            raise ValueError(f"n_head={c.n_head} is not a multiple of n_kv_head={c.n_kv_head}")
        if arch == "llama" and c.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs: head_dim must be even, got {c.head_dim}")
        return c
    except (TypeError, ValueError, AttributeError) as e:
        raise ValueError(f"{path}: {str(e)[:300]}") from None


def read_layers(theirs: dict, family: str, c: Config):
    """Set what differs from layer to layer: which have no positions, and how far they look.

    Within its window a layer looks at all tokens, so a window is the most that our decoder takes.  Raises ValueError
    for kinds of layers that it lacks.
    """
    kinds = set(theirs.get("layer_types") or []) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ValueError(f"layer_types has {min(kinds)!r}; our decoder has full_attention")
    window = theirs.get("sliding_window", 4096 if family == "mistral" else None)
    if window is not None and theirs.get("use_sliding_window", family in ("mistral", "llama")):
        check_values({"sliding_window": window})
        c.block_size = min(c.block_size, window)
    every = theirs.get("no_rope_layer_interval", c.no_rope)
    turned = theirs.get("no_rope_layers") or layers_with_rope(every, c.n_layer)
    fitting = [n for n in {0, every} if turned == layers_with_rope(n, c.n_layer)]
    if not fitting or (max(fitting) and family != "smollm3"):
        raise ValueError(f"no_rope_layers is {turned}; our decoder leaves out each so many layers, of smollm3")
    c.no_rope = max(fitting)


def layers_with_rope(every: int, n_layer: int) -> list[int]:
    """1 for each layer with rotary positions, 0 for the last of each `every` (0: none of them)."""
    return [int(not every or (l + 1) % every > 0) for l in range(n_layer)]


def check_values(values: dict):
    """Raise ValueError for a value of a config.json that has not the type or the size that its name asks for."""
    for name, x in values.items():
        if name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if type(x) is not bool:
                raise ValueError(f"{name} must be true or false, got {x!r}")
        elif name == "rope_scaling":
            check_values({key: number for key, number in (x or {}).items() if key != "rope_type"})
        elif name.endswith(("eps", "epsilon", "theta", "factor", "original_max_position_embeddings")):
            if type(x) not in (int, float) or not 0 < x < 1e12:  # nan is not
                raise ValueError(f"{name} must be a positive number, got {x!r}")
        elif type(x) is not int or not 0 < x < 2**31:
            raise ValueError(f"{name} must be a positive whole number, got {x!r}")


def read_rope(theirs: dict, defaults: dict) -> dict:
    """Rotary theta and scaling, in the old spelling (rope_theta, rope_scaling) or the new one (rope_parameters).

    Raises ValueError for a kind of scaling that our decoder lacks, and for parameters that are missing.
    """
    rope = {"rope_theta": theirs.get("rope_theta") or defaults.get("rope_theta", 10000.0)}
    rope |= {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
    if "original_max_position_embeddings" in theirs:
        rope["original_max_position_embeddings"] = theirs["original_max_position_embeddings"]
    share = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise ValueError(f"partial_rotary_factor is {share!r}; our decoder rotates all of a head")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE:
        raise ValueError(f"rotary scaling {kind!r}; we have {', '.join(ROPE)}")
    if missing := [name for name in ROPE[kind] if name not in rope]:
        raise ValueError(f"rotary scaling {kind!r} without {', '.join(missing)}")
    scaling = {"rope_type": kind, **{name: rope[name] for name in ROPE[kind]}} if ROPE[kind] else None
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def rope_speeds(c: Config) -> list[float]:
    """How fast each pair of a head turns, of what it would without scaling: "llama3" slows the slow ones, "linear" all.

    A pair that turns high_freq_factor times within the context that a model was made for keeps its speed.
    """
    get = c.rope_scaling.get
    turns = (
        get("original_max_position_embeddings", 0) / (2 * math.pi) * c.rope_theta ** -(np.arange(0, 1, 2 / c.head_dim))
    )
    low, high = get("low_freq_factor", 1), get("high_freq_factor", 4)
    kept = ((turns - low) / (high - low)).clip(0, 1)
    return (kept + (1 - kept) / get("factor")).tolist()


def write_config(c: Config) -> dict:
    """config.json's content for a Config, as transformers reads it."""
    activation = {"gpt2": "activation_function", "llama": "hidden_act"}[c.arch]
    values = {name: getattr(c, ours) for ours, name in CONFIG[c.arch].items()}
    scaling = {name: x for name, x in c.rope_scaling.items() if name != "speeds"} if c.rope_scaling else None
    rope = {} if c.arch == "gpt2" else {"rope_theta": c.rope_theta, "rope_scaling": scaling}
    family, name = "gpt2", "GPT2LMHeadModel"
    if c.arch == "llama":
        fits = {"qwen3": c.qk_norm, "smollm3": c.no_rope, "qwen2": c.attn_bias and not c.o_bias, "llama": True}
        family = next(family for family, fit in fits.items() if fit)
        name = {"qwen3": "Qwen3", "smollm3": "SmolLM3", "qwen2": "Qwen2", "llama": "Llama"}[family] + "ForCausalLM"
    if c.no_rope:
        rope |= {"no_rope_layers": layers_with_rope(c.no_rope, c.n_layer), "no_rope_layer_interval": c.no_rope}
    named = {"model_type": family, "architectures": [name], activation: REQUIRED[c.arch][activation][0]}
    return {**named, **values, **rope}


# -- Files of tensors --------------------------------------------------------------------------------------------------


def open_tensors(folder: str) -> dict[str, LazyTensor]:
    """The tensors of a folder: of model.safetensors, of the shards of its index, or of pytorch_model.bin likewise.

    Raises FileNotFoundError if it has none of them, ValueError for a broken file.
    """
    for name, reader in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        path = os.path.join(folder, name)
        index = f"{path}.index.json"
        if os.path.exists(path):
            return reader(path)
        if os.path.exists(index):
            return read_shards(folder, index, reader)
    raise FileNotFoundError(f"no weights in {folder}: neither model.safetensors nor pytorch_model.bin, nor their index")


def read_shards(folder: str, index: str, reader: Callable[[str], dict]) -> dict[str, LazyTensor]:
    """The tensors of the files that an index names.  Raises ValueError if a file lacks what the index says it has."""
    file_of = read_index(index)
    shards = {file: reader(os.path.join(folder, file)) for file in sorted(set(file_of.values()))}
    for name, file in file_of.items():
        if name not in shards[file]:
            raise ValueError(f"{index}: {file} lacks {name}")
    unnamed = {name: x for shard in shards.values() for name, x in shard.items()}  # what the index forgets counts, too
    return {**unnamed, **{name: shards[file][name] for name, file in file_of.items()}}


def read_index(path: str) -> dict[str, str]:
    """{tensor name: file} of an index of shards.  Raises ValueError for one that names files elsewhere."""
    content = read_json(path)
    file_of = content.get("weight_map") if isinstance(content, dict) else None
    files = file_of.values() if isinstance(file_of, dict) else [None]
    if not all(isinstance(file, str) and file == os.path.basename(file) for file in files):
        raise ValueError(f"{path} has no weight_map of tensor names and files beside it")
    return file_of


def read_bin(path: str) -> dict[str, LazyTensor]:
    """The tensors of a pytorch_model.bin.  Only tensors are unpickled: code in the file does not run.

    Raises ValueError for a file of anything else.
    """
    refuse_lfs_pointer(path)
    try:
        can_be_mapped = zipfile.is_zipfile(path)  # as all are that PyTorch 1.6 or a newer one wrote
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped)
        return {name: LazyTensor(x.shape, lambda x=x: x) for name, x in tensors.items()}
    except Exception as e:  # torch.load raises many kinds of errors
        raise ValueError(f"{path} is not a file of tensors alone, or was cut off ({type(e).__name__})") from None


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
MAX_HEADER = 1 << 24  # bytes; the headers of the largest models have about 100 kB


def read_safetensors(path: str) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file: 8 bytes of length n, n of JSON {name: {dtype, shape, data_offsets}}, data.

    Raises ValueError for a file that is not what its header says.  Nothing is allocated for a tensor that is not there.
    """
    refuse_lfs_pointer(path)
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        n = struct.unpack("<Q", f.read(8))[0] if size >= 8 else 0
        if not 2 <= n <= min(size - 8, MAX_HEADER):
            raise ValueError(f"{path} is not a safetensors file, or was cut off ({size:,} bytes)")
        try:
            header = json.loads(f.read(n).decode("utf-8"), object_pairs_hook=no_duplicate_keys)
            header.pop("__metadata__", None)
            entries = [(DTYPES[t["dtype"]], t["shape"], *t["data_offsets"], name) for name, t in header.items()]
            entries = sorted(entries, key=lambda entry: entry[2:4])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ValueError(f"{path} has a broken header ({type(e).__name__}: {str(e)[:80]})") from None
    tensors, end = {}, 0
    for dtype, shape, start, stop, name in entries:
        valid = isinstance(shape, list) and all(type(i) is int and i >= 0 for i in (*shape, start, stop))
        if not valid or start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name[:80]} {dtype} {str(shape)[:80]} does not fit bytes {start} to {stop}")
        end = stop
        where = (path, dtype, shape, 8 + n + start)
        tensors[name] = LazyTensor(torch.Size(shape), lambda where=where: read_tensor(*where))
    if 8 + n + end != size:
        raise ValueError(f"{path} has {size:,} bytes, its safetensors header wants {8 + n + end:,} (cut off?)")
    return tensors


def read_tensor(path: str, dtype: torch.dtype, shape: list[int], start: int) -> Tensor:
    """A tensor over its bytes in the file, memory-mapped: they take memory only while it lives."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    data = np.memmap(path, mode="c", offset=start, shape=count * dtype.itemsize)  # c: changes stay in memory
    return torch.from_numpy(data).view(dtype).view(shape)


def write_safetensors(path: str, tensors: dict[str, Tensor]):
    """Write {name: tensor}, atomically."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        start, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with replacing(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for x in tensors.values():
            f.write(x.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
