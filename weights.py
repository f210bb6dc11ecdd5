"""Hugging Face folders of GPT-2 and LLaMA models, read and written.

    load(folder)            -> Decoder            from config.json and model.safetensors
    save(folder, model)                           the same two files
    read_safetensors(path)  -> {name: tensor}     memory-mapped: nothing is read before it is used
    write_safetensors(path, tensors)

No weights library is needed: the format is a JSON header and bytes, and what is worth reading are the tables of names.
`load` asserts that every tensor of ours is filled, that every tensor of the file is used or known to be a leftover,
and that all shapes agree: weights that half fit are an error, never a bad model.
"""

import hashlib
import json
import math
import mmap
import os
import struct

import torch

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
LEFTOVERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".rotary_emb.inv_freq",
)  # buffers that old versions of transformers saved


def rows(config):
    """(their module, our modules, whether a Conv1D) for every module of a model but its head."""
    prefix, table = TABLES[config.arch]
    for theirs, ours in table.items():
        conv = ours.startswith("conv: ")
        for l in range(config.n_layer) if "{l}" in theirs else [0]:
            yield prefix + theirs.format(l=l), ours.removeprefix("conv: ").format(l=l).split(), conv


def load(folder):
    """The model of a Hugging Face folder.  Raises FileNotFoundError or ValueError, saying what does not fit."""
    config = read_config(os.path.join(folder, "config.json"))
    path = os.path.join(folder, "model.safetensors")
    theirs = {name: x for name, x in read_safetensors(path).items() if not name.endswith(LEFTOVERS)}
    prefix, _ = TABLES[config.arch]
    if not any(name.startswith(prefix) for name in theirs):  # GPT-2's own files
        theirs = {name if name == "lm_head.weight" else prefix + name: x for name, x in theirs.items()}
    with torch.device("meta"):  # shapes only: nothing is allocated or initialised that the file will replace
        model = Decoder(config)
    ours = model.state_dict()

    def take(name, shape):
        if name not in theirs:
            raise ValueError(f"{path} lacks {name}")
        x = theirs.pop(name)
        if x.shape != shape:
            raise ValueError(f"{path}: {name} has shape {tuple(x.shape)}, the config wants {tuple(shape)}")
        return x.to(torch.float32)

    head, embedding = theirs.pop("lm_head.weight", None), next(rows(config))[0] + ".weight"
    if config.tied and head is not None:  # a tied table may be stored under either name, or both
        theirs.setdefault(embedding, head)
    filled = {}
    for name, modules, conv in rows(config):
        for part in ("weight", "bias"):
            wanted = [ours[f"{m}.{part}"] for m in modules if f"{m}.{part}" in ours]
            if wanted:
                shape = torch.Size([sum(w.shape[0] for w in wanted), *wanted[0].shape[1:]])
                turned = conv and part == "weight"
                x = take(f"{name}.{part}", shape[::-1] if turned else shape)
                chunks = (x.T if turned else x).split([w.shape[0] for w in wanted])
                filled.update((f"{m}.{part}", chunk.contiguous()) for m, chunk in zip(modules, chunks))
    if config.tied:
        filled["head.weight"] = filled["wte.weight"]
    else:
        theirs["lm_head.weight"] = head
        if head is None:
            raise ValueError(f"{path} lacks lm_head.weight, and the config does not tie the head to the embeddings")
        filled["head.weight"] = take("lm_head.weight", ours["head.weight"].shape)
    if theirs:
        raise ValueError(
            f"{path} has {len(theirs)} tensors that this model has no place for, such as {sorted(theirs)[0]}"
        )
    model.load_state_dict(filled, assign=True)
    if config.tied:
        model.head.weight = model.wte.weight
    return model


def save(folder, model, dtype=torch.float32):
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


def fingerprint(model):
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
                  head_dim="head_dim", n_inner="intermediate_size", norm_eps="rms_norm_eps", rope_theta="rope_theta",
                  tied="tie_word_embeddings", attn_bias="attention_bias", mlp_bias="mlp_bias"),
}  # fmt: skip
ABSENT = {
    "gpt2": {"tied": True},
    "llama": {"tied": False, "norm_eps": 1e-6},
}  # where transformers assumes other than us
FIXED = {  # what our decoder does, whatever the config says: so it had better say this, or nothing
    "gpt2": {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
             "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
             "quantization_config": (None,)},
    "llama": {"hidden_act": ("silu",), "rope_scaling": (None,), "pretraining_tp": (1,),
              "quantization_config": (None,)},
}  # fmt: skip


def read_config(path):
    """Config of a config.json.  Raises ValueError, by name, for what our decoder does not do: it is never ignored."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"no {path}: --init takes a folder with config.json, model.safetensors and a tokenizer")
    theirs = read_json(path)
    arch = theirs.get("model_type")
    if arch not in CONFIG:
        raise ValueError(f"{path}: model_type is {arch!r}; we have gpt2 and llama")
    for name, allowed in FIXED[arch].items():
        if theirs.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{path}: {name} is {theirs[name]!r}; our decoder has {allowed[0]!r}")
    values = {ours: theirs[name] for ours, name in CONFIG[arch].items() if theirs.get(name) is not None}
    return Config(arch=arch, **{**ABSENT[arch], **values})


def write_config(c):
    """config.json's content for a Config, as transformers would read it."""
    kind, act = {"gpt2": ("GPT2LMHeadModel", "activation_function"), "llama": ("LlamaForCausalLM", "hidden_act")}[
        c.arch
    ]
    values = {name: getattr(c, ours) for ours, name in CONFIG[c.arch].items()}
    return {"model_type": c.arch, "architectures": [kind], act: FIXED[c.arch][act][0], **values}


# -- safetensors: 8 bytes of length, a JSON header {name: {dtype, shape, data_offsets}}, the bytes ---------------------

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(path):
    """{name: tensor} over a memory-mapped file.  Raises ValueError for a file that is not what it says it is."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"no {path}")
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        n = struct.unpack("<Q", f.read(8))[0] if size >= 8 else size
        if not 2 <= n <= min(size - 8, 100_000_000):
            raise ValueError(f"{path} is not a safetensors file, or was cut off ({size:,} bytes)")
        try:
            header = json.loads(f.read(n).decode("utf-8"))
            tensors = {
                k: (DTYPES[t["dtype"]], t["shape"], *t["data_offsets"])
                for k, t in header.items()
                if k != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ValueError(f"{path} has a broken header ({type(e).__name__}: {str(e)[:80]})") from None
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)  # pages are read when used, and never written back
    out, end = {}, 0
    for name, (dtype, shape, start, stop) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        ok = all(type(i) is int and i >= 0 for i in [*shape, start, stop])
        if not ok or start != end or stop - start != math.prod(shape) * dtype.itemsize or 8 + n + stop > size:
            raise ValueError(
                f"{path}: {name} {dtype} {shape} at bytes {start} to {stop} of {size - 8 - n:,} does not fit (cut off?)"
            )
        flat = (
            torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=8 + n + start)
            if stop > start
            else torch.empty(0, dtype=dtype)
        )
        out[name], end = flat.view(shape), stop
    return out


def write_safetensors(path, tensors):
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
            f.write(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
