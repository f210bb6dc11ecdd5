"""What the tests share: small random models of both architectures, shaken tuners of every method, and the real models
if present.
"""

import os
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from baselines import build  # noqa: E402
from model import Config, Decoder  # noqa: E402

torch.set_num_threads(1)  # the models here are small: more threads only wait for each other

SHARED = os.path.join(os.path.dirname(ROOT), "shared")
ARCHS = ["gpt2", "llama"]


def shared(*path):
    """A file beside the project, or a reason to skip: real models and data are other people's, and not part of it."""
    where = os.path.join(SHARED, *path)
    if not os.path.exists(where):
        pytest.skip(f"needs {os.path.join('..', 'shared', *path)}")
    return where


def shake(module, scale=0.3, seed=1):
    """Add noise to every parameter: what starts at zero (biases, IAPT's up, LoRA's B) would hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, generator=g)
    return module


def small_model(arch, **config):
    """Two layers with every tensor random, LLaMA's with grouped queries.

    The head is not tied, and large: so greedy continuations vary, and do not just repeat a token.
    """
    torch.manual_seed(0)
    sizes = {
        "tied": False,
        "vocab_size": 50,
        "block_size": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "n_kv_head": 2 if arch == "llama" else 4,
    }
    return shake(Decoder(Config(**{**sizes, "arch": arch, **config})), 0.3).requires_grad_(False)


def small_tuner(method, model, given=()):
    """A shaken tuner, attached.  It acts visibly on the model, so that a test of its effect can fail."""
    torch.manual_seed(0)
    tuner = build(method, model.config, given)
    tuner.start(model)
    tuner.attach(model)
    return shake(tuner, 0.1).eval()


def right_padded(lengths, width, vocab=50, seed=0):
    """Random tokens idx (B, width) and the mask of the first `lengths` of each row."""
    g = torch.Generator().manual_seed(seed)
    idx = torch.randint(1, vocab, (len(lengths), width), generator=g)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return idx * mask, mask


@pytest.fixture(params=ARCHS)
def model(request):
    return small_model(request.param)
