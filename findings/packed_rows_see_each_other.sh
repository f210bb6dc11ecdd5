#!/usr/bin/env bash
# Rows that transformers' own collator packs for a model see each other, unless the model is told not to keep a cache.
#
# Version     transformers 5.24.0 (5.23.0 as well), torch 2.13.0, on a CPU, attention "sdpa" and "eager".
# Expected    DataCollatorWithFlattening puts the rows of a batch into one long row, whose position_ids begin again at 0
#             with each row, and transformers makes a mask of blocks from these positions.  So the logits of a row are
#             those of the row alone, in model(**batch).  A mask of ones, which says that nothing is padding, changes nothing.
# Seen        They are only with use_cache=False and without a mask (3e-6 apart).  In a plain model(**batch), where the model
#             has its default use_cache=True, the second row sees the first: logits are 6.8 apart, in train() as in eval().
#             The blocks are looked for only where there is no cache and no mask, and an empty cache that the model
#             has just made counts as one.  Nothing is said.  return_flash_attn_kwargs=True does not help.
# Meaning     Trainer sets use_cache to False, so it trains well; a training loop of one's own, or a loss measured with the
#             loaded model, reads other people's rows.  Pass use_cache=False, and no mask, and compare with a row alone.
# Source      https://github.com/huggingface/transformers/pull/46634 (the mask; the cache is not mentioned),
#             https://huggingface.co/docs/transformers/padding_free
# Here        Rows are never packed: they are padded on the right, and padding cannot reach anything
#             (tests/method/test_every_method.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
rows = [{"input_ids": torch.randint(3, 64, (n,)).tolist()} for n in (6, 5)]
print(f"transformers {transformers.__version__}, torch {torch.__version__}: the second row's logits, packed against alone")
found = {}
for attention in "sdpa", "eager":
    model.set_attn_implementation(attention)
    alone = model(torch.tensor([rows[1]["input_ids"]])).logits
    for extra in {}, {"return_flash_attn_kwargs": True}:
        batch = DataCollatorWithFlattening(**extra)(rows, return_tensors="pt")
        ones = {"attention_mask": torch.ones_like(batch["input_ids"])}
        for name, options in {
            "as it is": {},
            "use_cache=False": {"use_cache": False},
            "use_cache=False and a mask of ones": {"use_cache": False, **ones},
        }.items():
            for training in False, True:
                logits = model.train(training)(**batch, **options).logits[:, 6:]
                apart = found[attention, *extra, name, training] = (logits - alone).abs().max().item()
                print(f"{attention}, {extra}, {'train' if training else 'eval'}, {name}: {apart:.6f} apart")
            model.eval()
for key, apart in found.items():
    assert apart < 1e-4 if "use_cache=False" in key else apart > 1, f"this has changed: {key}"
PYTHON
