"""Our decoder computes what transformers computes, in every variant that we read; and the comparison is sharp."""

import os
import shutil

import pytest
import torch
from conftest import SHARED
from parity import FOLDER, VARIANTS, make

import model as model_py
from plumbing import pretrained
from sample import generate

TOLERANCE = 1e-4  # of logits that are of the order of 1 to 10


def compare(folder):
    """Largest difference of logits, and whether greedy continuations agree."""
    expected = {
        name: x.read() for name, x in pretrained.read_safetensors(os.path.join(folder, "expected.safetensors")).items()
    }
    model = pretrained.load_pretrained(folder)
    with torch.no_grad():
        difference = (model(expected["idx"]) - expected["logits"]).abs().max().item()
    room = model.config.block_size - expected["idx"].shape[1]
    greedy = generate(model, expected["idx"].tolist(), max_new=min(8, room))
    return difference, greedy == expected["greedy"].tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_greedy_continuations_equal_transformers_s(name):
    difference, greedy = compare(os.path.join(FOLDER, name))
    assert difference < TOLERANCE and greedy


@pytest.mark.parametrize("name", VARIANTS)
def test_so_they_do_with_the_transformers_that_is_installed(name, tmp_path):
    pytest.importorskip("transformers", reason="pip install transformers")
    make(name, tmp_path)
    difference, greedy = compare(tmp_path)
    assert difference < TOLERANCE and greedy


@pytest.mark.parametrize("name", ["tinystories-instruct-3m", "tinystories-656k-llama"])
def test_so_do_real_models(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    folder = os.path.join(SHARED, "checkpoints", name)
    if not os.path.exists(folder):
        pytest.skip(f"needs ../shared/checkpoints/{name}")
    shutil.copytree(folder, tmp_path / name)
    theirs, ours = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name),
        pretrained.load_pretrained(folder),
    )
    idx = torch.randint(0, ours.config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(idx).logits - ours(idx)).abs().max() < 1e-3  # of logits up to 30


# -- Tempting mistakes: each would be seen -----------------------------------------------------------------------------


def erf_gelu(monkeypatch):
    real = model_py.F.gelu
    monkeypatch.setattr(model_py.F, "gelu", lambda x, approximate: real(x))


def no_transposition(monkeypatch):
    monkeypatch.setitem(pretrained.GPT2, "h.{l}.attn.c_proj", "h.{l}.attn.o")  # square: its shape would not tell


def wrong_order_of_q_k_v(monkeypatch):
    monkeypatch.setitem(pretrained.GPT2, "h.{l}.attn.c_attn", "conv: h.{l}.attn.k h.{l}.attn.q h.{l}.attn.v")


def wrong_eps(monkeypatch):
    for arch, name in (("gpt2", "layer_norm_epsilon"), ("llama", "rms_norm_eps")):
        monkeypatch.setitem(pretrained.CONFIG[arch], "norm_eps", f"no {name}")


def rope_scaling_ignored(monkeypatch):
    real = pretrained.read_rope
    monkeypatch.setattr(pretrained, "read_rope", lambda *args: {**real(*args), "rope_scaling": None})


def rope_theta_ignored(monkeypatch):
    real = pretrained.read_rope
    monkeypatch.setattr(pretrained, "read_rope", lambda *args: {**real(*args), "rope_theta": 10000.0})


def adjacent_pairs_rotated(monkeypatch):
    def rotate(x, rope):
        (cos, sin), a, b = rope, x[..., ::2], x[..., 1::2]
        half = x.shape[-1] // 2
        return torch.stack(
            (a * cos[..., :half] - b * sin[..., :half], b * cos[..., :half] + a * sin[..., :half]), -1
        ).flatten(-2)

    monkeypatch.setattr(model_py, "rotate", rotate)


def key_value_heads_dealt_out_in_turn(monkeypatch):
    """Head h with key/value head h mod G, and not h // (H / G)."""

    def mix(self, q, k, v, mask=None, separate=None):
        times = q.shape[1] // k.shape[1]
        k, v = k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1)
        y = model_py.F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o(y.transpose(1, 2).flatten(2))

    monkeypatch.setattr(model_py.Attention, "mix", mix)


def norms_of_heads_ignored(monkeypatch):
    real = pretrained.load_pretrained

    def load(folder):
        model = real(folder)
        for block in model.h:
            block.attn.q_norm = block.attn.k_norm = torch.nn.Identity()
        return model

    monkeypatch.setattr(pretrained, "load_pretrained", load)


def all_layers_have_positions(monkeypatch):
    monkeypatch.setattr(model_py.Attention, "turns", property(lambda self: True, lambda self, x: None), raising=False)


MISTAKES = [
    (erf_gelu, "gpt2"),
    (no_transposition, "gpt2"),
    (wrong_order_of_q_k_v, "gpt2"),
    (wrong_eps, "gpt2"),
    (wrong_eps, "llama"),
    (rope_scaling_ignored, "llama-linear"),
    (rope_scaling_ignored, "llama-llama3"),
    (rope_theta_ignored, "llama-theta"),
    (adjacent_pairs_rotated, "llama"),
    (norms_of_heads_ignored, "qwen3"),
    (all_layers_have_positions, "smollm3"),
    (key_value_heads_dealt_out_in_turn, "llama"),
]


@pytest.mark.parametrize("mistake, name", MISTAKES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_tempting_mistake_would_be_seen(mistake, name, monkeypatch):
    mistake(monkeypatch)
    difference, _ = compare(os.path.join(FOLDER, name))
    assert difference > 3 * TOLERANCE
