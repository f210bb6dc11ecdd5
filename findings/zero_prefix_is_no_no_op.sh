#!/usr/bin/env bash
# PEFT's prefix with init_weights="zero", "a no-op" in its help, changes nearly as much as a random prefix does.
#
# Version     peft 0.21.2, transformers 5.23.0, torch 2.13.0.
# Expected    PrefixTuningConfig(init_weights="zero") begins as a no-op: so says its help, and so do LoRA's zero B and (IA)3's
#             ones.  The logits before training are those of the frozen model.
# Seen        With 30 zero keys and values, logits of a random LLaMA are up to 8.9 apart from the frozen model's, a divergence
#             of 1.1 nats a token in texts of eight tokens, against 1.6 with a random prefix; LoRA and (IA)3: 0.  A zero key
#             has the score 0, which is the score of an average word, so 30 of them take 30 words' share of the softmax,
#             and a zero value gives nothing for it: the attention of the n-th token shrinks to about n / (n + 30).
# Meaning     A run begins above the frozen model's loss, however it is initialized, and more so with longer prefixes and
#             shorter texts.  Only keys with scores far below 0 would be a no-op.
# Source      https://huggingface.co/docs/peft/package_reference/prefix_tuning
# Here        IAPT's soft tokens have a softmax of their own, and their values start at zero: the frozen model
#             (test_training_starts_as_the_frozen_model in tests/method/test_iapt.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import peft
import torch
import transformers
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

words = dict(task_type="CAUSAL_LM", num_virtual_tokens=30)
methods = {
    "prefix of zeros": PrefixTuningConfig(**words, init_weights="zero"),
    "random prefix": PrefixTuningConfig(**words),
    "LoRA": LoraConfig(task_type="CAUSAL_LM"),
    "(IA)3": IA3Config(task_type="CAUSAL_LM"),
}
print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
apart, nats = {}, {}
for name, settings in methods.items():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    text = torch.randint(3, 64, (64, 8))
    with torch.no_grad():
        frozen = model(text).logits
        tuned = get_peft_model(model, settings).eval()
        logits = tuned(input_ids=text, attention_mask=torch.ones_like(text)).logits
        if name == "prefix of zeros":
            assert not tuned.prompt_encoder["default"].embedding.weight.any()
    apart[name] = (logits - frozen).abs().max().item()
    likely, frozen = logits.log_softmax(-1), frozen.log_softmax(-1)
    nats[name] = (frozen.exp() * (frozen - likely)).sum(-1).mean().item()
    print(f"{name}: logits at most {apart[name]:.4f} apart, divergence {nats[name]:.4f} nats a token")
assert apart["prefix of zeros"] > 1 and nats["prefix of zeros"] > 0.3, "this has changed"
assert apart["LoRA"] == apart["(IA)3"] == 0, "this has changed"
PYTHON
