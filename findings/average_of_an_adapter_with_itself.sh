#!/usr/bin/env bash
# The "linear" average of a LoRA with itself is twice that LoRA, and with "ties" it is half of it.
#
# Version     peft 0.21.2, transformers 5.23.0, torch 2.13.0.
# Expected    add_weighted_adapter(["a", "b"], [0.5, 0.5], ..., combination_type="linear") is the linear combination
#             0.5 BA of a + 0.5 BA of b.  So the average of an adapter with its copy is the adapter.
# Seen        It is 2.00 times the adapter.  What is averaged are the factors, each with the root of its weight:
#             (0.71 B + 0.71 B)(0.71 A + 0.71 A) = 2 BA.  Of two different adapters the mean update is missed by 105 % of its
#             own norm, because B of one meets A of the other.  Of three copies it is 3.00 times the adapter.
#             "magnitude_prune" with density 1 does the same, "ties" gives 0.50 and 0.33; "cat" and "svd" give 1.00.
#             One adapter alone with weight 1 is right in all of them, which is what one would test.
# Meaning     A merge of tenants or of checkpoints that looks like an average is louder with each member.  Use "cat", which is
#             exact (its rank is the sum); "svd" keeps the rank, and misses 49 % of the mean of two.
# Source      https://huggingface.co/docs/peft/developer_guides/model_merging,
#             https://github.com/huggingface/peft/pull/3013 (closed)
# Here        No adapters are averaged: those of one batch stay apart, row by row (baselines/tenants.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
tuned = get_peft_model(LlamaForCausalLM(config), settings, adapter_name="a")
for name in "b", "copy", "copy2":
    tuned.add_adapter(name, settings)
layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
with torch.no_grad():
    for factor in layer.lora_A, layer.lora_B:
        for name in "copy", "copy2":
            factor[name].weight.copy_(factor["a"].weight)


def update(names, kind):
    """The update of the layer's weight by the average of these adapters."""
    adapter = f"{kind} of {' '.join(names)}"
    tuned.add_weighted_adapter(names, [1 / len(names)] * len(names), adapter, combination_type=kind, density=1.0)
    return layer.get_delta_weight(adapter)


print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
one, other = layer.get_delta_weight("a"), layer.get_delta_weight("b")
times, missed = {}, {}
for kind in "linear", "magnitude_prune", "ties", "svd", "cat":
    times[kind] = [(update(names, kind) / one).median().item() for names in (["a"], ["a", "copy"], ["a", "copy", "copy2"])]
    missed[kind] = ((update(["a", "b"], kind) - (one + other) / 2).norm() / ((one + other) / 2).norm()).item()
    print(f"{kind}: one, two, three copies are {', '.join(f'{x:.2f}' for x in times[kind])} times the adapter;", end=" ")
    print(f"two adapters' mean is missed by {missed[kind]:.0%} of it")
wanted = {"linear": [1, 2, 3], "magnitude_prune": [1, 2, 3], "svd": [1, 1, 1], "cat": [1, 1, 1]}
for kind, numbers in wanted.items():
    assert all(abs(x - y) < 0.01 for x, y in zip(times[kind], numbers)), f"this has changed: {kind}"
assert abs(times["ties"][1] - 0.5) < 0.01 and missed["linear"] > 0.9 and missed["cat"] < 1e-5, "this has changed"
PYTHON
