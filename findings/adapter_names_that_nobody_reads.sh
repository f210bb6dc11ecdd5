#!/usr/bin/env bash
# A mixed batch of soft prompts: PEFT takes adapter_names, even checks LoRA's spelling, and answers every row with one tenant.
#
# Version     peft 0.21.2, transformers 5.23.0, torch 2.13.0.
# Expected    model(input_ids, adapter_names=["a", "b"]) answers the first row with adapter a and the second with b, as it does
#             for LoRA, or says that this method cannot.  A name that does not exist is an error, as for LoRA.
# Seen        LoRA: the second row has b's logits.  Prefix, prompt tuning, P-tuning, LLaMA-Adapter, (IA)3, LoHa, VeRA, OFT, BOFT
#             and HRA: it has those of the active adapter, a, and no line says so; a name that does not exist is taken, too.
# Meaning     A server of several tenants that works with LoRA answers tenant b as tenant a once it is given soft prompts or
#             (IA)3.  Send each tenant's rows in a batch of their own, after set_adapter.
# Source      https://huggingface.co/docs/peft/developer_guides/lora#inference-with-different-lora-adapters-in-the-same-batch
# Here        A mixed batch equals one tenant at a time, of every method but those that are refused by name
#             (baselines/tenants.py, tests/method/test_tenants.py).
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
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

soft, on_q = dict(num_virtual_tokens=4), dict(target_modules=["q_proj"])
methods = {
    "LoRA": peft.LoraConfig(r=2, init_lora_weights=False, **on_q),
    "prefix": peft.PrefixTuningConfig(**soft),
    "prompt tuning": peft.PromptTuningConfig(**soft),
    "P-tuning": peft.PromptEncoderConfig(**soft, encoder_hidden_size=8),
    "LLaMA-Adapter": peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2),
    "(IA)3": peft.IA3Config(init_ia3_weights=False, feedforward_modules=[], **on_q),
    "LoHa": peft.LoHaConfig(init_weights=False, **on_q),
    "VeRA": peft.VeraConfig(r=4, init_weights=False, **on_q),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, init_weights=False, **on_q),
    "BOFT": peft.BOFTConfig(boft_block_size=4, init_weights=False, **on_q),
    "HRA": peft.HRAConfig(init_weights=False, **on_q),
}
print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
for method, settings in methods.items():
    settings.task_type = "CAUSAL_LM"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    tuned = get_peft_model(LlamaForCausalLM(config), settings, adapter_name="a")
    tuned.add_adapter("b", settings)
    for name, weight in tuned.named_parameters():
        if any(part in name for part in ("prompt", "ia3", "adaption", "lora_", "vera_lambda")):
            torch.nn.init.normal_(weight)
    tuned.eval()
    rows = torch.randint(3, 64, (2, 8))
    inputs = dict(input_ids=rows, attention_mask=torch.ones_like(rows))
    with torch.no_grad():
        logits = {}
        for adapter in "b", "a":
            tuned.set_adapter(adapter)
            logits[adapter] = tuned(**inputs).logits[1]
        second = tuned(**inputs, adapter_names=["a", "b"]).logits[1]
        try:
            tuned(**inputs, adapter_names=["a", "nobody"])
            error = "none"
        except ValueError as e:
            error = str(e).partition(".")[0]
    apart = {adapter: (second - x).abs().max().item() for adapter, x in logits.items()}
    read = "b" if apart["b"] < 1e-4 else "a" if apart["a"] < 1e-4 else "neither"
    differ = (logits["a"] - logits["b"]).abs().max().item()
    print(f"{method}: the row for b has {read}'s logits (a's and b's are {differ:.2f} apart); error for 'nobody': {error}")
    assert differ > 0.01 and read == ("b" if method == "LoRA" else "a"), "this has changed"
    assert (error != "none") == (method == "LoRA"), "this has changed"
PYTHON
