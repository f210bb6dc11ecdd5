#!/usr/bin/env bash
# With transformers 5.24.0, generate() of a PEFT prefix writes what the frozen LLaMA writes; loss and training are right.
#
# Version     peft 0.21.2 with transformers 5.24.0 (with 5.23.0 all is right), torch 2.13.0.
# Expected    generate() of a model with soft tokens gives the words that its own forward gives, one after the other, greedily.
#             peft 0.21.2 does not exclude transformers 5.24.0.
# Seen        Of 16 questions to a random LLaMA with a prefix, 0 are answered as by its forward, and 16 as by the frozen model:
#             the prefix is lost on the way, and nothing is said.  Prompt tuning and P-tuning: 0 of 16, of which 0 are as the
#             frozen model's.  LoRA: 16 of 16.  With transformers 5.23.0: 16 of 16 for each of the four.
# Meaning     A run trains well, its loss on the test set is good, and its answers are those of an untrained model, so that
#             one looks for the fault in the training.  Pin transformers 5.23.0 for PEFT's prompt methods, and compare
#             generate() with forward once.
# Source      https://huggingface.co/docs/peft/package_reference/prefix_tuning
# Here        Answers are decoded by model.py, and tests/method/test_every_method.py compares them with the forward, a row at
#             a time, for every method.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2
cd "$folder"
cat > ask.py <<'PYTHON'
import sys

import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ROWS, NEW = 16, 10
soft = dict(task_type="CAUSAL_LM", num_virtual_tokens=5)
methods = {
    "prefix": PrefixTuningConfig(**soft),
    "prompt tuning": PromptTuningConfig(**soft),
    "P-tuning": PromptEncoderConfig(**soft, encoder_hidden_size=16),
    "LoRA": LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False),
}
wanted = {  # as the forward, as the frozen model
    "5.23.0": {"prefix": (16, 0), "prompt tuning": (16, 0), "P-tuning": (16, 0), "LoRA": (16, 0)},
    "5.24.0": {"prefix": (0, 16), "prompt tuning": (0, 0), "P-tuning": (0, 0), "LoRA": (16, 0)},
}[transformers.__version__]
torch.manual_seed(0)
questions = torch.randint(3, 64, (ROWS, 8))
ones = torch.ones_like(questions)
options = dict(attention_mask=ones, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
for name, settings in methods.items():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    frozen = model.generate(questions, **options)
    tuned = get_peft_model(model, settings).eval()
    for part, weight in tuned.named_parameters():
        if weight.requires_grad and "lora" not in part:
            torch.nn.init.normal_(weight)
    with torch.no_grad():
        ids = questions
        for _ in range(NEW):
            last = tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
        answers = tuned.generate(input_ids=questions, **options)
    same = tuple((answers == other).all(1).sum().item() for other in (ids, frozen))
    print(f"{name}: of {ROWS} answers of generate(), {same[0]} are the forward's and {same[1]} the frozen model's")
    if same != wanted[name]:
        sys.exit(f"this has changed: {name}, {same} in place of {wanted[name]}")
PYTHON
"$folder/venv/bin/python" ask.py
"$folder/venv/bin/pip" install -q --no-deps transformers==5.24.0
"$folder/venv/bin/pip" check
"$folder/venv/bin/python" ask.py
