#!/usr/bin/env bash
# Inside one torch.autocast, a model whose LoRA was hot-swapped goes on answering with the LoRA that it had before.
#
# Version     peft 0.21.2, transformers 5.23.0, torch 2.13.0, autocast to bf16 on a CPU.
# Expected    hotswap_adapter copies another adapter's weights into the place of the first one.  From then on the model is the
#             model with the second adapter, wherever that happens: under autocast as without it.
# Seen        In one `with torch.autocast(...)` around "answer, swap, answer", the second answer is the first one's, bit for bit,
#             if the adapter was loaded with is_trainable=True or made active by set_adapter, which makes it trainable;
#             with torch.no_grad() as well.  Each answer in an autocast of its own is right, and so is one autocast with
#             cache_enabled=False, and an adapter as from_pretrained leaves it, which does not train.  The weights
#             themselves have been swapped: autocast keeps the bf16 copies of fp32 leaves that require a gradient until
#             its end, and looks them up by tensor, not by version.
# Meaning     A server that holds one autocast open for all requests answers a tenant with another tenant's adapter.  The
#             same befalls a training loop in one autocast: the loss stays where it is.  Open an autocast for each call.
# Source      https://huggingface.co/docs/peft/package_reference/hotswap,
#             https://docs.pytorch.org/docs/2.13/amp.html (cache_enabled)
# Here        No autocast is used: weights are cast where they are used, and nothing is kept (baselines/hooks.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import LlamaConfig, LlamaForCausalLM


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


for seed in 1, 2:
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    tuned = get_peft_model(llama(), settings)
    torch.manual_seed(seed)
    for weight in tuned.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save_pretrained(f"tenant{seed}")
question = torch.randint(3, 64, (1, 8))


def loaded(tenant, trainable=False, active=False):
    model = PeftModel.from_pretrained(llama(), tenant, is_trainable=trainable).eval()
    if active:
        model.set_adapter("default")
    return model


def answers(model, one_autocast, **options):
    """The logits of tenant 1, and those after the swap."""
    found = []
    with torch.autocast("cpu", torch.bfloat16, **options) if one_autocast else contextlib.nullcontext():
        for tenant in None, "tenant2":
            if tenant:
                hotswap_adapter(model, tenant, "default")
            if one_autocast:
                found.append(model(question).logits)
            else:
                with torch.autocast("cpu", torch.bfloat16):
                    found.append(model(question).logits)
    return found


print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
with torch.no_grad():
    with torch.autocast("cpu", torch.bfloat16):
        first, second = loaded("tenant1")(question).logits, loaded("tenant2")(question).logits
    found = {
        "trainable, one autocast": answers(loaded("tenant1", trainable=True), True),
        "set_adapter, one autocast": answers(loaded("tenant1", active=True), True),
        "trainable, an autocast each": answers(loaded("tenant1", trainable=True), False),
        "trainable, one autocast without its cache": answers(loaded("tenant1", trainable=True), True, cache_enabled=False),
        "not trainable, one autocast": answers(loaded("tenant1"), True),
    }
for name, (before, after) in found.items():
    assert torch.equal(before, first)
    whose = "the first" if torch.equal(after, first) else "the second" if torch.equal(after, second) else "neither"
    print(f"{name}: after the swap, {whose} tenant's logits")
    assert whose == ("the first" if name in list(found)[:2] else "the second"), "this has changed"
print(f"the two tenants' logits are {(first - second).abs().max():.2f} apart")
PYTHON
