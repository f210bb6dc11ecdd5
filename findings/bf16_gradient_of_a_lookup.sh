#!/usr/bin/env bash
# In bf16 on a CPU, the gradient of a row that is looked up often is 5 times too small; expanded, the same row has the right one.
#
# Version     torch 2.13.0, on a CPU, one thread.
# Expected    A soft prompt in bf16 is used by 4,096 rows, each with a gradient of about 0.001.  Its own gradient is their sum,
#             4.1, within bf16's 0.4 %, however the row gets to its users: PyTorch's sums in bf16 run in fp32 inside.
# Seen        4.1 by expand, repeat, repeat_interleave and index_select.  0.8 by nn.Embedding, by indexing (prompt[ids]), by
#             torch.stack of a list and by torch.cat: there each row's gradient is added to a bf16 number, which hardly moves
#             once an addend is about half of its last bit.  F.layer_norm's bias gets 0.8 as well, F.linear's bias and
#             F.rms_norm's weight get 4.1.  In fp32 all of them are right.
# Meaning     The more rows share a parameter, the smaller is its gradient beside those of others, and whether it is depends
#             on how it is broadcast: soft prompts, embeddings of frequent tokens, LayerNorm's weights in BitFit or
#             adapters.  Keep what trains in fp32, or expand it in place of looking it up.
# Source      https://docs.pytorch.org/docs/2.13/generated/torch.nn.Embedding.html,
#             https://github.com/apache/mxnet/issues/17703 (the same in another framework)
# Here        What is learned is in fp32 whatever the frozen model is in (tests/method/test_every_method.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

torch.set_num_threads(1)  # each thread has a sum of its own
torch.manual_seed(0)
N, C = 4096, 8
ids = torch.zeros(N, dtype=torch.long)
row_gradients = (torch.rand(N, C) * 0.002).bfloat16()
exact = row_gradients.double().sum(0)
normal = torch.ones(N, C)
normal[:, ::2] = -1  # a layer's input whose normal form is itself
ways = {
    "expand": lambda p: p.expand(N, C),
    "repeat": lambda p: p.repeat(N, 1),
    "repeat_interleave": lambda p: p.repeat_interleave(N, 0),
    "index_select": lambda p: p.index_select(0, ids),
    "a sum with zeros": lambda p: p + torch.zeros(N, C, dtype=p.dtype),
    "linear's bias": lambda p: F.linear(torch.zeros(N, 1, dtype=p.dtype), torch.zeros(C, 1, dtype=p.dtype), p[0]),
    "rms_norm's weight": lambda p: F.rms_norm(torch.ones(N, C, dtype=p.dtype), (C,), p[0]),
    "embedding": lambda p: F.embedding(ids, p),
    "indexing": lambda p: p[ids],
    "stack": lambda p: torch.stack([p[0]] * N),
    "cat": lambda p: torch.cat([p] * N),
    "layer_norm's bias": lambda p: F.layer_norm(normal.to(p.dtype), (C,), torch.ones(C, dtype=p.dtype), p[0]),
}
print(f"torch {torch.__version__}; exact: {exact.min():.3f} to {exact.max():.3f}")
share = {}
for name, way in ways.items():
    for dtype in torch.bfloat16, torch.float32:
        prompt = torch.zeros(1, C, dtype=dtype, requires_grad=True)
        way(prompt).backward(row_gradients.to(dtype))
        share[name, dtype] = (prompt.grad[0].double() / exact).mean().item()
    print(f"{name}: {share[name, torch.bfloat16]:.3f} of it in bf16, {share[name, torch.float32]:.3f} in fp32")
for (name, dtype), x in share.items():
    lost = dtype == torch.bfloat16 and name in list(ways)[7:]
    assert x < 0.3 if lost else abs(x - 1) < 0.01, f"this has changed: {name}"
PYTHON
