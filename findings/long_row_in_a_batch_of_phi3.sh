#!/usr/bin/env bash
# In a batch with a long prompt, Phi-3 answers a short prompt otherwise than alone: the longest row chooses everybody's rotation.
#
# Version     transformers 5.24.0 (5.23.0 as well), torch 2.13.0; Phi3ForCausalLM, LongRoPE.
# Expected    In fp32, greedy, with an attention mask and padding on the left, a prompt's answer does not depend on which other
#             prompts are in its batch: that is what masks are for.
# Seen        Beside a row of 9 tokens a prompt of 6 is answered as alone in 20 of 20 cases; beside one of 20 tokens in 4 of 20,
#             where original_max_position_embeddings is 16.  LongRoPE has two sets of frequencies, for texts up to that
#             length and beyond it, and the greatest position in the batch chooses one set for all rows (logits 2.1 apart
#             at the same positions).  rope_type "dynamic" of LLaMA has the same trait.
# Meaning     On Phi-3.5 and Phi-4-mini one prompt of more than 4,096 tokens changes the answers of all that share its batch.
#             Sort prompts by that length, and batch them apart, in serving and in evaluation.
# Source      https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py
#             (longrope_frequency_update), https://github.com/ggml-org/llama.cpp/pull/24875
# Here        Phi-3 is refused by name, and so are both kinds of rotation (plumbing/pretrained.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import Phi3Config, Phi3ForCausalLM

LIMIT, CASES, PAD = 16, 20, 0
torch.manual_seed(0)
config = Phi3Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=LIMIT, pad_token_id=PAD,
    bos_token_id=1, eos_token_id=None, initializer_range=0.3,
    rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": LIMIT,
        "partial_rotary_factor": 1.0, "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 2.0, 4.0, 8.0],
    },
)  # fmt: skip
model = Phi3ForCausalLM(config).eval()


def answer(prompts):
    """The first prompt's greedy answer, six tokens, in a batch that is padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = (ids != PAD).long()
    return model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[0, longest:].tolist()


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
same = {9: 0, 20: 0}
for case in range(CASES):
    torch.manual_seed(case)
    short, long = torch.randint(3, 64, (6,)).tolist(), torch.randint(3, 64, (20,)).tolist()
    alone = answer([short])
    for length in same:
        together = answer([short, long[:length]])
        same[length] += together == alone
        if case == 0:
            print(f"beside {length} tokens: {together}, alone: {alone}")
print(f"answered as alone, of {CASES}: {same}")
with torch.no_grad():
    ids = torch.tensor([short + [PAD] * 14, long])
    together = model(ids, attention_mask=(ids != PAD).long()).logits[0, :6]
    apart = (together - model(torch.tensor([short])).logits[0]).abs().max().item()
print(f"logits, padded on the right, {apart:.3f} apart")
assert same[9] == CASES and same[20] < CASES / 2 and apart > 0.5, "this has changed"
PYTHON
