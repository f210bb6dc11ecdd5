"""Random models as transformers writes them, and what transformers computes with them.

    python tests/plumbing/parity.py        # writes tests/plumbing/parity/NAME/ for every variant, a few hundred kB

The folders are committed, so test_parity.py needs no transformers; where it is installed, they are made anew, too.
"""

import json
import os
import sys

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
FOLDER = os.path.join(HERE, "parity")

# eps is large so that another one would show; every size differs from every other, so that a swapped one would, too.
GPT2 = dict(vocab_size=24, n_positions=20, n_embd=16, n_layer=2, n_head=4, layer_norm_epsilon=1e-2)
LLAMA = dict(
    vocab_size=24, max_position_embeddings=64, hidden_size=16, intermediate_size=28, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-2, tie_word_embeddings=False,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3["original_max_position_embeddings"] = 16

THETA = {"rope_type": "default", "rope_theta": 100.0}

VARIANTS = {  # name: (configuration, how the files are changed after save_pretrained)
    "gpt2": (GPT2, None),
    "gpt2-untied": ({**GPT2, "tie_word_embeddings": False, "n_inner": 40}, None),
    "gpt2-own-names": (GPT2, "own names"),
    "gpt2-bin": (GPT2, "bin"),
    "llama": (LLAMA, None),
    "llama-tied": ({**LLAMA, "tie_word_embeddings": True, "num_key_value_heads": 4}, None),
    "llama-tied-as-head": ({**LLAMA, "tie_word_embeddings": True}, "tied as head"),
    "llama-multi-query": ({**LLAMA, "num_key_value_heads": 1}, None),
    "llama-head-dim": ({**LLAMA, "head_dim": 6}, None),
    "llama-biases": ({**LLAMA, "attention_bias": True, "mlp_bias": True}, None),
    "llama-theta": ({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}, None),
    "llama-linear": ({**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}}, None),
    "llama-linear-old": (
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}}, "old rope"),
    "llama-llama3": ({**LLAMA, "rope_parameters": {**LLAMA3, "rope_theta": 100.0}}, None),
    "llama-llama3-old": ({**LLAMA, "rope_parameters": {**LLAMA3, "rope_theta": 100.0}}, "old rope"),
    "llama-bf16": (LLAMA, "bfloat16"),
    "llama-fp16": (LLAMA, "float16"),
    "llama-shards": (LLAMA, "shards"),
    "mistral": ({**LLAMA, "sliding_window": None}, None),
    "mistral-window": ({**LLAMA, "sliding_window": 24}, None),
    "qwen2": ({**LLAMA, "tie_word_embeddings": True, "sliding_window": 4}, None),
    "qwen3": ({**LLAMA, "head_dim": 6, "num_hidden_layers": 3}, None),
    "smollm3": ({**LLAMA, "num_hidden_layers": 5, "rope_parameters": THETA, "pad_token_id": 0}, None),
}  # fmt: skip


def make(name, folder):
    """Write a variant's model folder and expected.safetensors: idx, transformers' logits, its greedy continuation."""
    import transformers

    from plumbing import pretrained

    config, change = VARIANTS[name]
    kind = {"gpt2": "GPT2", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}
    kind = kind.get(name.split("-")[0], "Llama")
    names = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{kind}Config")(**config, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, kind + names)(config).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=g)
        if change in ("bfloat16", "float16"):
            model = model.to(getattr(torch, change))
    model.save_pretrained(folder, max_shard_size="8kB" if change == "shards" else "1GB")
    model = type(model).from_pretrained(folder, dtype=torch.float32)  # what the files hold, and not what was rounded
    if change == "bin":
        torch.save(model.state_dict(), os.path.join(folder, "pytorch_model.bin"))
        os.remove(os.path.join(folder, "model.safetensors"))
    if change in ("own names", "tied as head"):
        path = os.path.join(folder, "model.safetensors")
        tensors = {k: x.read() for k, x in pretrained.read_safetensors(path).items()}
        if change == "own names":
            tensors = {k.removeprefix("transformer."): x for k, x in tensors.items()}
            tensors["h.0.attn.bias"] = torch.ones(1, 1, 20, 20).tril()
            tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
        else:
            tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        pretrained.write_safetensors(path, tensors)
    if change == "old rope":
        path = os.path.join(folder, "config.json")
        with open(path, encoding="utf-8") as f:
            written = json.load(f)
        rope = written.pop("rope_parameters")
        written["rope_theta"] = rope.pop("rope_theta")
        written["rope_scaling"] = {"type": rope.pop("rope_type"), **rope} if "linear" in name else rope
        with open(path, "w", encoding="utf-8") as f:
            json.dump(written, f, indent=1)
    idx = torch.randint(2, 24, (2, 12), generator=g)
    with torch.no_grad():
        logits, ids = model(idx).logits, idx
        for _ in range(8):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    pretrained.write_safetensors(
        os.path.join(folder, "expected.safetensors"), {"idx": idx, "logits": logits, "greedy": ids[:, 12:]}
    )


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
    for name in VARIANTS:
        make(name, os.path.join(FOLDER, name))
