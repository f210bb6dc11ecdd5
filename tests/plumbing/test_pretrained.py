"""Hugging Face folders: what is written is read back, and what does not fit is an error that says why."""

import json
import struct

import pytest
import torch
from conftest import ARCHS, small_model

from plumbing import pretrained

VARIANTS = [
    ("gpt2", {"tied": True}),
    ("gpt2", {}),
    ("llama", {"tied": True}),
    ("llama", {"attn_bias": True, "mlp_bias": True, "head_dim": 16}),
    ("llama", {"attn_bias": True, "o_bias": False}),  # Qwen2
    ("qk-norm", {"head_dim": 16}),  # Qwen3
    ("llama", {"no_rope": 2}),  # SmolLM3
]


@pytest.mark.parametrize("arch, config", VARIANTS)
def test_a_saved_model_is_loaded_exactly(arch, config, tmp_path):
    model = small_model(arch, **config)
    pretrained.save_pretrained(tmp_path, model)
    loaded = pretrained.load_pretrained(tmp_path)
    assert loaded.config == model.config
    idx = torch.randint(0, 50, (2, 12))
    assert torch.equal(loaded(idx), model(idx))
    assert pretrained.fingerprint(loaded) == pretrained.fingerprint(model)
    assert (loaded.head.weight is loaded.wte.weight) == model.config.tied


def test_gpt2_s_own_files_leave_the_prefix_out_and_hold_old_buffers(tmp_path):
    model = small_model("gpt2")
    pretrained.save_pretrained(tmp_path, model)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): x.read() for name, x in pretrained.read_safetensors(path).items()}
    pretrained.write_safetensors(
        path, {**tensors, "h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.zeros(1)}
    )
    idx = torch.randint(0, 50, (2, 12))
    assert torch.equal(pretrained.load_pretrained(tmp_path)(idx), model(idx))


def test_a_tied_table_may_be_stored_as_the_head(tmp_path):
    model = small_model("llama", tied=True)
    pretrained.save_pretrained(tmp_path, model)
    path = tmp_path / "model.safetensors"
    tensors = {name: x.read() for name, x in pretrained.read_safetensors(path).items()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    pretrained.write_safetensors(path, tensors)
    idx = torch.randint(0, 50, (2, 12))
    assert torch.equal(pretrained.load_pretrained(tmp_path)(idx), model(idx))


def test_a_config_that_calls_two_different_tables_tied_is_not_believed(tmp_path):
    """transformers 5 reads such files so, too: what was trained is in the files."""
    model = small_model("llama")
    pretrained.save_pretrained(tmp_path, model)
    edit_config(tmp_path, tie_word_embeddings=True)
    loaded = pretrained.load_pretrained(tmp_path)
    idx = torch.randint(0, 50, (2, 12))
    assert torch.equal(loaded(idx), model(idx)) and not loaded.config.tied
    assert loaded.head.weight is not loaded.wte.weight
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(idx).logits
    assert (theirs - model(idx)).abs().max() < 1e-4


def test_a_tied_table_that_is_stored_twice_is_one_table(tmp_path):
    model = small_model("gpt2", tied=True)
    pretrained.save_pretrained(tmp_path, model)
    tensors = {name: x.read() for name, x in pretrained.open_tensors(tmp_path).items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    pretrained.write_safetensors(tmp_path / "model.safetensors", tensors)
    loaded = pretrained.load_pretrained(tmp_path)
    assert loaded.config.tied and loaded.head.weight is loaded.wte.weight


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shards_of(folder, **extra):
    """Spread a folder's tensors over two files.  `extra` tensors go into the second; the index does not name them."""
    tensors = {name: x.read().clone() for name, x in pretrained.open_tensors(folder).items()}
    (folder / "model.safetensors").unlink()
    halves = {"a.safetensors": list(tensors)[::2], "b.safetensors": list(tensors)[1::2]}
    for file, names in halves.items():
        pretrained.write_safetensors(
            folder / file, {name: tensors[name] for name in names} | (extra if file[0] == "b" else {})
        )
    index = {name: file for file, names in halves.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_a_tensor_in_a_shard_that_the_index_does_not_name_is_not_passed_over(tmp_path):
    model = small_model("llama", tied=True)
    pretrained.save_pretrained(tmp_path, model)
    shards_of(tmp_path)
    idx = torch.randint(0, 50, (2, 12))
    assert torch.equal(pretrained.load_pretrained(tmp_path)(idx), model(idx))
    pretrained.save_pretrained(tmp_path, model)
    shards_of(tmp_path, surprise=torch.zeros(3))
    with pytest.raises(ValueError, match="has 1 tensors that this model has no place for, such as surprise"):
        pretrained.load_pretrained(tmp_path)


def test_an_adapter_beside_the_weights_is_not_passed_over(tmp_path):
    pretrained.save_pretrained(tmp_path, small_model("llama"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has adapter_config.json, an adapter that we do not apply"):
        pretrained.load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
                                  "pytorch_model.bin.index.json", "config.json"])  # fmt: skip
def test_a_git_lfs_pointer_in_place_of_a_file_is_named(name, tmp_path):
    pretrained.save_pretrained(tmp_path, small_model("llama"))
    if name != "config.json":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer, and not the file itself: run git lfs pull"):
        pretrained.load_pretrained(tmp_path)


def test_a_git_lfs_pointer_in_place_of_a_shard_is_named(tmp_path):
    pretrained.save_pretrained(tmp_path, small_model("llama"))
    shards_of(tmp_path)
    (tmp_path / "b.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="b.safetensors is a Git LFS pointer"):
        pretrained.load_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", *pretrained.LIKE_LLAMA])
def test_what_a_config_does_not_say_is_what_transformers_assumes(family, tmp_path):
    """Its sizes would fit other tensors, but a number of heads or an eps fits any."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    ours = pretrained.read_config(tmp_path / "config.json")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs.max_position_embeddings = min(
        theirs.max_position_embeddings, getattr(theirs, "sliding_window", None) or 10**9
    )
    for name, their_name in pretrained.CONFIG[ours.arch].items():
        if getattr(theirs, their_name, None) is not None:
            assert getattr(ours, name) == getattr(theirs, their_name), name
    assert ours.n_inner == (theirs.n_inner or 4 * 768 if family == "gpt2" else theirs.intermediate_size)
    if family != "gpt2":
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"num_attention_heads": True}, "num_attention_heads must be a positive whole number, got True"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive whole number, got 0"),
        ({"hidden_size": 32.0}, "hidden_size must be a positive whole number, got 32.0"),
        ({"vocab_size": 2**31}, "vocab_size must be a positive whole number"),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 4}, "no model can have the sizes of its config.json"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, got nan"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number, got '1e-5'"),
        ({"rope_theta": float("inf")}, "rope_theta must be a positive number, got inf"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor must be a positive number, got -1"),
        ({"rope_scaling": {"type": "linear"}}, "rotary scaling 'linear' without factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'; we have default, linear, llama3"),
        ({"rope_scaling": [1]}, "config.json: "),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; our decoder rotates all of a head"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; our decoder rotates"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
        ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        ({"num_key_value_heads": 3}, "n_head=4 is not a multiple of n_kv_head=3"),
        ({"model_type": "olmo2"}, "'olmo2', which needs norms behind attention and MLP; we have gpt2, llama, mistral"),
        ({"model_type": "t5"}, "model_type is 't5'; we have gpt2, llama, mistral, qwen2, qwen3, smollm3"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers is \\[1, 0\\]; our decoder leaves out each so many layers"),
        ({"model_type": "smollm3", "no_rope_layers": [0, 1]}, "no_rope_layers is \\[0, 1\\]"),
        ({"logits_scaling": 8.0}, "logits_scaling is 8.0; our decoder has None"),
        ({"residual_multiplier": 0.2}, "residual_multiplier is 0.2; our decoder has None"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types has 'linear_attention'; our decoder"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": "4"}, "sliding_window must be a"),
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_refused_by_name(changes, says, tmp_path):
    pretrained.save_pretrained(tmp_path, small_model("llama"))
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=says) as refused:
        pretrained.load_pretrained(tmp_path)
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)


def broken(tensors, fault):
    name = next(n for n in tensors if n.endswith("attn.c_proj.weight") or n.endswith("o_proj.weight"))
    if fault == "lacks":
        del tensors[name]
    if fault == "no place for":
        tensors["surprise"] = torch.zeros(3)
    if fault == "has shape":
        tensors[name] = tensors[name][:-1]
    return tensors


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("fault", ["lacks", "no place for", "has shape"])
def test_weights_that_half_fit_are_an_error(arch, fault, tmp_path):
    pretrained.save_pretrained(tmp_path, small_model(arch))
    path = tmp_path / "model.safetensors"
    pretrained.write_safetensors(
        path, broken({name: x.read() for name, x in pretrained.read_safetensors(path).items()}, fault)
    )
    with pytest.raises(ValueError, match=fault):
        pretrained.load_pretrained(tmp_path)


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
    pretrained.save_pretrained(tmp_path, small_model("gpt2"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=key):
        pretrained.load_pretrained(tmp_path)


def test_a_file_that_is_not_safetensors_or_was_cut_off_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    pretrained.write_safetensors(path, {"a": torch.randn(5, 3), "b": torch.randn(7)})
    content = path.read_bytes()
    for n in range(0, len(content), 7):
        path.write_bytes(content[:n])
        with pytest.raises(ValueError, match="safetensors"):
            pretrained.read_safetensors(path)
    for header in (b"[]", b"{}x", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}'):
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
        with pytest.raises(ValueError, match="x.safetensors"):
            pretrained.read_safetensors(path)


def test_the_fingerprint_is_of_the_weights_not_of_their_dtype(tmp_path):
    model = small_model("llama")
    pretrained.save_pretrained(tmp_path, model)
    assert pretrained.fingerprint(pretrained.load_pretrained(tmp_path).bfloat16()) == pretrained.fingerprint(model)
    with torch.no_grad():
        model.h[1].mlp.up.weight[0, 0] += 1
    assert pretrained.fingerprint(pretrained.load_pretrained(tmp_path)) != pretrained.fingerprint(model)


@pytest.mark.parametrize("second, size", [((0, 4), 4), ((2, 6), 6), ((8, 12), 12)])
def test_tensors_that_overlap_or_leave_a_hole_are_refused(second, size, tmp_path):
    tensors = {"a": (0, 4), "b": second}
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": at} for name, at in tensors.items()}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(ValueError, match="does not fit bytes"):
        pretrained.read_safetensors(tmp_path / "x.safetensors")
