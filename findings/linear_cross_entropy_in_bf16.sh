#!/usr/bin/env bash
# linear_cross_entropy of PyTorch, in chunks, returns a loss that is up to 3 % too low in bf16, whatever its accuracy policy.
#
# Version     torch 2.13.0, on a CPU.
# Expected    torch.nn.functional.linear_cross_entropy(x, W, t, options=LinearCrossEntropyOptions(...)) computes the mean
#             cross-entropy of x W^T in chunks, and is documented to be equivalent to cross_entropy(linear(x, W), t).  With
#             inputs in bf16 one expects the nearest bf16 number, at most 0.03 away from a loss of 10.4; with
#             acc_policy="accurate", or acc_dtype=torch.float32, at least that.
# Seen        8,192 rows, 2,000 classes: 10.4375 in one chunk (float64: 10.4291), 10.1875 with the default options,
#             10.125 with acc_policy="accurate", 10.1875 with acc_dtype=torch.float32 as well.  The error grows with the
#             number of chunks: with one chunk it is 0.01.  So the mean is summed over chunks in bf16.
#             The gradient is right (within 0.2 %), and so are the losses in fp32 and fp16.
# Meaning     A training run learns what it should, and its log shows a loss 0.2 to 0.3 nats too low.  Compare losses only
#             where both were computed in the same way, or give it inputs in fp32.
# Source      https://docs.pytorch.org/docs/2.13/generated/torch.nn.functional.linear_cross_entropy.html
# Here        plumbing/head_loss.py sums in fp32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.nn import LinearCrossEntropyOptions as Options

torch.manual_seed(0)
W, x = torch.randn(2000, 64).bfloat16() * 0.3, torch.randn(8192, 64).bfloat16()
t = torch.randint(2000, (8192,))
exact = F.cross_entropy(F.linear(x.double(), W.double()), t).item()
cases = {
    "one chunk": Options(batch_chunk_size=8192),
    "default options": Options(),
    "accurate": Options(acc_policy="accurate"),
    "accurate, in float32": Options(acc_policy="accurate", acc_dtype=torch.float32),
}
print(f"torch {torch.__version__}; float64: {exact:.4f}")
error = {}
for name, options in cases.items():
    loss = F.linear_cross_entropy(x, W, t, options=options).item()
    error[name] = loss - exact
    print(f"{name}: {loss:.4f} ({error[name]:+.4f})")
in_fp32 = F.linear_cross_entropy(x.float(), W.float(), t, options=Options()).item() - exact
print(f"default options, inputs in fp32: {in_fp32:+.6f}")
assert abs(error.pop("one chunk")) < 0.04 and abs(in_fp32) < 1e-4
assert all(-0.5 < e < -0.1 for e in error.values()), "this has changed"
PYTHON
