#!/usr/bin/env bash
# A learned prefix is forgotten in a long text where the model has a sliding window: PEFT puts it at the text's beginning.
#
# Version     peft 0.21.2, transformers 5.23.0, torch 2.13.0.
# Expected    Prefix-tuning gives each layer keys and values that every token sees; this is what tells it from a prompt in
#             words.  So a prefix acts on the last token of a long text as on the first.
# Seen        In Mistral, Qwen2 and Gemma 3 with a window of 8, two layers and a prefix of 4, it acts on tokens 0 to 13, less
#             and less (logits are 1.5 to 6.8 apart from the frozen model's at the first four tokens), and from token 14 on
#             not at all (at most 1e-5 apart).  The window covers the prefix as if it were the text's first words.  LLaMA,
#             which has no window, goes on.  No line says so.
# Meaning     Mistral 7B v0.1 has a window of 4,096, Gemma 3's local layers (five in six) have 512 or 1,024.  A prefix that
#             was trained on short rows does nothing on long ones, or less than it did.  LoRA has no such limit.
# Source      https://huggingface.co/docs/peft/package_reference/prefix_tuning
# Here        A model's window is the longest text that it takes, so every token sees all soft tokens (plumbing/pretrained.py).
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
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

WINDOW, LAYERS, LENGTH = 8, 2, 24
sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3,
)  # fmt: skip
configs = [
    LlamaConfig(**sizes),
    MistralConfig(**sizes, sliding_window=WINDOW),
    Qwen2Config(**sizes, sliding_window=WINDOW, use_sliding_window=True, max_window_layers=0),
    Gemma3TextConfig(**sizes, sliding_window=WINDOW),
]
print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
last = LAYERS * (WINDOW - 1)  # the first token that even by way of other tokens sees nothing of the prefix
for config in configs:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    text = torch.randint(3, 64, (1, LENGTH))
    with torch.no_grad():
        frozen = model(text).logits
        tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
        torch.nn.init.normal_(tuned.prompt_encoder["default"].embedding.weight)
        logits = tuned(input_ids=text, attention_mask=torch.ones_like(text)).logits
    apart = [(logits - frozen)[0, i].abs().max().item() for i in range(LENGTH)]
    print(config.model_type, " ".join(f"{x:.3f}" for x in apart))
    assert min(apart[:4]) > 1, "this has changed"
    assert min(apart[last:]) > 0.1 if config.model_type == "llama" else max(apart[last:]) < 1e-5, "this has changed"
PYTHON
