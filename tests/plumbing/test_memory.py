"""Loading takes little more memory than the model: tensors are read and converted one at a time."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from model import Config, Decoder
from plumbing import pretrained

CODE = """
import re, sys, torch
from plumbing import pretrained
def memory(what):  # not getrusage: its peak is the parent's, too
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = memory("VmRSS")
model = pretrained.load_pretrained(sys.argv[1], getattr(torch, sys.argv[2]))
size = sum({x.data_ptr(): x.numel() * x.element_size() for x in model.state_dict().values()}.values())
print(memory("VmHWM") - before, size)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """GPT-2's shape with random weights, 500 MB in fp32."""
    folder = tmp_path_factory.mktemp("gpt2")
    pretrained.save_pretrained(folder, Decoder(Config(vocab_size=50257)))
    return folder


@pytest.mark.slow  # writes half a gigabyte
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads a process's peak memory from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_a_fifth_more_than_the_model_and_one_tensor(folder, dtype):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder), dtype], cwd=ROOT, capture_output=True, text=True, check=True
    )
    peak, size = map(int, done.stdout.split())
    largest = 50257 * 768 * torch.float32.itemsize
    print(f"{dtype}: peak {peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB")
    assert size > 124e6 * getattr(torch, dtype).itemsize
    assert peak <= 1.2 * size + largest
