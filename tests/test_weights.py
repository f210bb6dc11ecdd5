"""Hugging Face folders: what is written is read back, and what does not fit is an error that says why."""

import json
import struct

import pytest
import torch
from conftest import ARCHS, small_model

import weights

VARIANTS = [
    ("gpt2", {"tied": True}),
    ("gpt2", {}),
    ("llama", {"tied": True}),
    ("llama", {"attn_bias": True, "mlp_bias": True, "head_dim": 16}),
]


@pytest.mark.parametrize("arch, config", VARIANTS)
def test_a_saved_model_is_loaded_exactly(arch, config, tmp_path):
    model = small_model(arch, **config)
    weights.save(tmp_path, model)
    loaded = weights.load(tmp_path)
    assert loaded.config == model.config
    idx = torch.randint(0, 50, (2, 12))
    assert torch.equal(loaded(idx), model(idx))
    assert weights.fingerprint(loaded) == weights.fingerprint(model)
    assert (loaded.head.weight is loaded.wte.weight) == model.config.tied


def test_gpt2_s_own_files_leave_the_prefix_out_and_hold_old_buffers(tmp_path):
    model = small_model("gpt2")
    weights.save(tmp_path, model)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): x.read() for name, x in weights.read_safetensors(path).items()}
    weights.write_safetensors(
        path, {**tensors, "h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.zeros(1)}
    )
    idx = torch.randint(0, 50, (2, 12))
    assert torch.equal(weights.load(tmp_path)(idx), model(idx))


def test_a_tied_table_may_be_stored_as_the_head(tmp_path):
    model = small_model("llama", tied=True)
    weights.save(tmp_path, model)
    path = tmp_path / "model.safetensors"
    tensors = {name: x.read() for name, x in weights.read_safetensors(path).items()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    weights.write_safetensors(path, tensors)
    idx = torch.randint(0, 50, (2, 12))
    assert torch.equal(weights.load(tmp_path)(idx), model(idx))


def broken(tensors, how):
    name = next(n for n in tensors if n.endswith("attn.c_proj.weight") or n.endswith("o_proj.weight"))
    if how == "lacks":
        del tensors[name]
    if how == "no place for":
        tensors["surprise"] = torch.zeros(3)
    if how == "has shape":
        tensors[name] = tensors[name][:-1]
    return tensors


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("how", ["lacks", "no place for", "has shape"])
def test_weights_that_half_fit_are_an_error(arch, how, tmp_path):
    weights.save(tmp_path, small_model(arch))
    path = tmp_path / "model.safetensors"
    weights.write_safetensors(path, broken({name: x.read() for name, x in weights.read_safetensors(path).items()}, how))
    with pytest.raises(ValueError, match=how):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "bert"),
        ("activation_function", "relu"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("quantization_config", {}),
    ],
)
def test_what_our_decoder_does_not_do_is_refused_by_name(key, value, tmp_path):
    weights.save(tmp_path, small_model("gpt2"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=key):
        weights.load(tmp_path)


def test_a_file_that_is_not_safetensors_or_was_cut_off_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    weights.write_safetensors(path, {"a": torch.randn(5, 3), "b": torch.randn(7)})
    whole = path.read_bytes()
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="safetensors"):
            weights.read_safetensors(path)
    for header in (b"[]", b"{}x", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}'):
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
        with pytest.raises(ValueError, match="x.safetensors"):
            weights.read_safetensors(path)


def test_the_fingerprint_is_of_the_weights_not_of_their_dtype(tmp_path):
    model = small_model("llama")
    weights.save(tmp_path, model)
    assert weights.fingerprint(weights.load(tmp_path).bfloat16()) == weights.fingerprint(model)
    with torch.no_grad():
        model.h[1].mlp.up.weight[0, 0] += 1
    assert weights.fingerprint(weights.load(tmp_path)) != weights.fingerprint(model)


@pytest.mark.parametrize("second, size", [((0, 4), 4), ((2, 6), 6), ((8, 12), 12)])
def test_tensors_that_overlap_or_leave_a_hole_are_refused(second, size, tmp_path):
    tensors = {"a": (0, 4), "b": second}
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": at} for name, at in tensors.items()}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(ValueError, match="does not fit bytes"):
        weights.read_safetensors(tmp_path / "x.safetensors")
