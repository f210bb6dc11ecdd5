#!/usr/bin/env bash
# Two seeds that differ above their 32nd bit are one seed on a CPU: torch.manual_seed takes 64 bits and uses 32.
#
# Version     torch 2.13.0, on a CPU; numpy 2.4.6 beside it.
# Expected    torch.manual_seed takes any number from -2^63 to 2^64 - 1, and torch.initial_seed() gives all of it back.  So
#             seeds that differ draw different numbers, as numpy's default_rng does.  PyTorch's advice for a generator is a
#             large seed with a good balance of 0 and 1 bits.
# Seen        Seeds 1, 1 + 2^32, 1 + 2^50 and 1 + 2^63 draw the same torch.rand, torch.randn and torch.randperm, also from a
#             torch.Generator of one's own, and a DataLoader with either generator has the same order.  initial_seed() is
#             another one each time.  numpy's default_rng draws other numbers for each.
# Meaning     Where a seed is put together of parts, such as "rank << 32" plus a step, or a hash of 64 bits, the high part is
#             lost on a CPU: all processes drop out the same units, or two runs are one.  Nothing shows it, since the
#             seeds that are logged differ.  Mix the parts into the low 32 bits.  (A GPU was not tried.)
# Source      https://docs.pytorch.org/docs/2.13/generated/torch.manual_seed.html,
#             https://docs.pytorch.org/docs/2.13/generated/torch.Generator.html
# Here        plumbing/distributed.py seeds a process in the low 32 bits (tests/plumbing/test_distributed.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import torch
from torch.utils.data import DataLoader

seeds = [1, 1 + 2**32, 1 + 2**50, 1 + 2**63]


def drawn(seed):
    torch.manual_seed(seed)
    parts = [torch.rand(3), torch.randn(3), torch.randperm(9)]
    own = torch.Generator().manual_seed(seed)
    parts += [torch.rand(3, generator=own), torch.cat(list(DataLoader(range(20), shuffle=True, generator=own)))]
    return torch.initial_seed(), torch.cat([part.double() for part in parts])


initial, numbers = zip(*map(drawn, seeds))
print(f"torch {torch.__version__}; initial_seed() {initial}")
same = [torch.equal(x, numbers[0]) for x in numbers]
print(f"the same numbers as seed 1: {same}; seed 2: {torch.equal(drawn(2)[1], numbers[0])}")
others = [np.random.default_rng(seed).random() for seed in seeds]
print(f"numpy: {len(set(others))} different numbers of {len(seeds)}")
assert len(set(initial)) == len(set(others)) == 4 and not torch.equal(drawn(2)[1], numbers[0])
assert all(same), "this has changed"
PYTHON
