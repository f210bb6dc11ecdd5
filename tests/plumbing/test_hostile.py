"""Broken and hostile files: each loads correctly or is refused in one line, and nothing is allocated on its word.

Seeded.  The default suite tries a twentieth of the mutations, `pytest -m slow` all of them.  IAPT_FUZZ=20 tries twenty
times as many.
"""

import base64
import copy
import csv
import io
import json
import math
import os
import random
import shutil
import struct
import sys

import pytest
import torch
from parity import FOLDER

from baselines import build
from data import collate, encode
from data.engines import gpt2_chars
from data.files import read_rows
from data.tokenizer import END, Tokenizer
from model import Config, Decoder
from plumbing import pretrained
from plumbing.checkpoint import load_checkpoint, load_into, save_tuner

FACTOR = float(os.environ.get("IAPT_FUZZ", "1"))
ODD = [None, True, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, -1e9, float("nan"), "", "x", "F32", "F8_E4M3", [], {}, [[[]]]]


@pytest.fixture(params=[0.05, pytest.param(1.0, marks=pytest.mark.slow)], ids=["some", "all"])
def times(request):
    """times(n): how many of n mutations to try."""
    return lambda n: max(1, round(n * request.param * FACTOR))


def refused_or(load):
    """What `load` returns; None if it is refused as it should be: an error of ours, in one line of some length."""
    try:
        return load()
    except (ValueError, OSError, ModuleNotFoundError) as e:
        text = str(e)
        assert text and len(text) < 600 and "\n" not in text.strip(), text
        return None


@pytest.fixture
def allocated(monkeypatch):
    """Bytes of the largest tensor that reading a file asked for."""
    real, largest = pretrained.read_tensor, [0]

    def read_tensor(path, dtype, shape, start):
        largest[0] = max(largest[0], math.prod(shape) * dtype.itemsize)
        return real(path, dtype, shape, start)

    monkeypatch.setattr(pretrained, "read_tensor", read_tensor)
    return largest


def mutated(rng, value):
    """A JSON value with one thing changed somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        change = rng.random()
        if change < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if change < 0.2:
            return {(rng.choice(["", "x", "__metadata__", "../x"]) if k == key else k): v for k, v in value.items()}
        return {**value, key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return value[:i] + [mutated(rng, value[i])] * rng.choice([0, 1, 1, 1, 2]) + value[i + 1 :]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-1000, -4, -1, 1, 4, 1000])
    return rng.choice(ODD)


def safetensors(rng, header, body):
    """A mutated safetensors file, as bytes."""
    change = rng.randrange(10)
    if change < 4:
        header = mutated(rng, header)
    text = json.dumps(header).encode()
    if change == 4:  # a name twice
        name, entry = rng.choice([item for item in header.items() if item[0] != "__metadata__"])
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}".encode()
    if change == 5:  # bytes of the header
        text = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            text[rng.randrange(len(text))] = rng.randrange(256)
    if change == 6:  # a deep header, an odd one, none
        text = rng.choice([b"[" * 100_000, b'{"a":' * 50_000, b"", b"null", b"[]", b"3", b'"x"', b"{}", b"\xff\xfe{}"])
    n = len(text) if change != 7 else rng.choice([0, 1, len(text) - 1, len(text) + 1, 2**31, 2**40, 2**64 - 1])
    data = struct.pack("<Q", n) + bytes(text) + body
    if change == 8:
        data = data[: rng.randrange(len(data))]
    if change == 9:
        data += bytes(rng.randint(1, 64))
    return data


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_mutated_safetensors_files(times, name, tmp_path, allocated):
    n = times(2500)
    shutil.copytree(os.path.join(FOLDER, name), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    intact = path.read_bytes()
    start = 8 + struct.unpack("<Q", intact[:8])[0]
    header, body = json.loads(intact[8:start]), intact[start:]
    rng, read = random.Random(name), 0
    for _ in range(n):
        data = safetensors(rng, header, body)
        path.write_bytes(data)
        tensors = refused_or(lambda: pretrained.read_safetensors(path))
        if tensors is not None:
            read += 1
            for x in tensors.values():
                x.read()
            model = refused_or(lambda: pretrained.load_pretrained(tmp_path / "m"))
            assert model is None or isinstance(model, Decoder)
    assert allocated[0] <= len(intact) and 0 < read < n


def test_flipped_bytes_of_a_body_are_read_as_they_are(tmp_path):
    shutil.copytree(os.path.join(FOLDER, "llama"), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    intact = bytearray(path.read_bytes())
    intact[-1] ^= 1
    path.write_bytes(intact)
    assert pretrained.fingerprint(pretrained.load_pretrained(tmp_path / "m"))


@pytest.mark.parametrize("name", ["gpt2", "llama-llama3", "llama-llama3-old"])
def test_mutated_configs(times, name, tmp_path, allocated):
    n = times(200)
    shutil.copytree(os.path.join(FOLDER, name), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config, rng, loaded = json.loads(path.read_text()), random.Random(name), 0
    idx = torch.zeros(1, 3, dtype=torch.long)
    for _ in range(n):
        path.write_text(json.dumps(mutated(rng, config)))
        model = refused_or(lambda: pretrained.load_pretrained(tmp_path / "m"))
        if model is not None:
            loaded += 1
            assert model(idx).shape == (1, 3, 24)  # what loads, runs
    assert allocated[0] < 10_000 and 0 < loaded < n


def test_mutated_indexes(times, tmp_path):
    n = times(200)
    shutil.copytree(os.path.join(FOLDER, "llama-shards"), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors.index.json"
    index, rng = json.loads(path.read_text()), random.Random(0)
    for _ in range(n):
        path.write_text(json.dumps(mutated(rng, index)))
        refused_or(lambda: pretrained.load_pretrained(tmp_path / "m"))
    path.write_text(json.dumps({"weight_map": {"x": "../../secret"}}))
    with pytest.raises(ValueError, match="no weight_map of tensor names and files beside it"):
        pretrained.load_pretrained(tmp_path / "m")


def small_vocab():
    chars = gpt2_chars()
    vocab = {chars[b]: b for b in range(256)}
    for token in ("Ġa", "th", "the", "Ġthe"):
        vocab[token] = len(vocab)
    return {**vocab, END: len(vocab)}


def write_tokenizer(folder, kind):
    """The files of a small tokenizer: {name: JSON}, or text for merges.txt and the chat template."""
    if kind == "words":
        return {"words.json": [" a", " the", " lima"]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    files = {
        "config.json": {"model_type": "gpt2", "vocab_size": 270, "eos_token_id": 260},
        "generation_config.json": {"eos_token_id": [260, 261]},
        "tokenizer_config.json": {
            "bos_token": END, "eos_token": {"content": END}, "add_bos_token": False, "chat_template": [{"name": "x"}],
            "added_tokens_decoder": {"260": {"content": END, **flags}}, "additional_special_tokens": ["<x>"]},
        "special_tokens_map.json": {"eos_token": END, "pad_token": {"content": "<x>"}},
        "added_tokens.json": {"<x>": 261},
        "merges.txt": "#version: 0.2\nĠ a\nt h\nth e\nĠ the\n",
        "chat_template.jinja": "{{ 'é' }}",
    }  # fmt: skip
    if kind == "gpt2":
        return {**files, "vocab.json": small_vocab()}
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    model = tokenizers.models.BPE(small_vocab(), [("Ġ", "a"), ("t", "h"), ("th", "e"), ("Ġ", "the")])
    hub = tokenizers.Tokenizer(model)
    hub.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hub.decoder = tokenizers.decoders.ByteLevel()
    hub.post_processor = tokenizers.processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 260)])
    hub.add_special_tokens([END, "<x>"])
    hub.enable_truncation(9)
    hub.enable_padding(length=9)
    return {**files, "tokenizer.json": json.loads(hub.to_str())}


@pytest.mark.parametrize("kind", ["words", "gpt2", "hub", "gpt2 without tokenizers", "hub without tokenizers"])
def test_mutated_tokenizers(times, kind, tmp_path, monkeypatch):
    """What loads encodes and decodes any text: tiktoken must not panic later, at a byte that it does not know."""
    files = write_tokenizer(tmp_path, kind.split()[0])
    if "without" in kind:
        monkeypatch.setitem(sys.modules, "tokenizers", None)

    def write(name, content):
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else json.dumps(content).encode())

    for name, content in files.items():
        write(name, content)
    assert Tokenizer.load(tmp_path).decode(Tokenizer.load(tmp_path).encode("the a")) == "the a"
    loaded = 0
    for file, content in files.items():
        rng, text = random.Random(f"{kind} {file}"), "the a ñ\x00 日本"
        n = times(200)
        for _ in range(n):
            if isinstance(content, str):
                (tmp_path / file).write_bytes(spoiled(rng, content.encode()))
            else:
                write(file, mutated(rng, copy.deepcopy(content)))
            tokenizer = refused_or(lambda: Tokenizer.load(tmp_path))
            if tokenizer is not None:
                loaded += 1
                refused_or(lambda t=tokenizer, text=text: t.decode(t.prompt(text)))
                refused_or(lambda t=tokenizer, text=text: t.encode_chat(END + t.protect(END + text)))
                tokenizer.decode([0, 260, 261, 10**6])
        write(file, content)
    assert 0 < loaded < len(files) * n


def test_mutated_tiktoken_files(times, tmp_path):
    n = times(200)
    lines = [base64.b64encode(bytes([b])).decode() + f" {b}" for b in range(256)] + ["dGg= 256", "dGhl 257"]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines) + "\n")
    assert Tokenizer.load(tmp_path).encode("the") == [257]
    rng = random.Random(0)
    for _ in range(n):
        data = bytearray("\n".join(lines).encode())
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.choice(b"0123456789 =Aaz\n\x00\xff")
        (tmp_path / "tokenizer.model").write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        tokenizer = refused_or(lambda: Tokenizer.load(tmp_path))
        if tokenizer is not None:
            assert tokenizer.decode(tokenizer.encode("the ñ")) == "the ñ"


def usable(rows):
    """Rows become tokens, and tokens batches."""
    tokenizer = Tokenizer.of_words([" a", " the"])
    idx, targets, _ = collate(encode(rows, tokenizer, 64, truncate=True), 64)
    assert idx.shape == targets.shape and (targets >= 0).any(1).all()


def spoiled(rng, data):
    """Bytes with a few of them changed, and perhaps the end cut off."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.choice(b'0123456789{}[]",:\\\n\r\x00\xff\xc3 aZ')
    return bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])


def test_mutated_data_rows(times, tmp_path, capsys):
    n = times(2000)
    rng, loaded = random.Random(0), 0
    good = [{"instruction": "say ñ", "input": "日本", "output": "the a"}, {"mr": "name[x]", "ref": "y"}]
    for i in range(n):
        row = mutated(rng, copy.deepcopy(rng.choice(good)))
        lines = [
            json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "replace"),
            json.dumps(good[0]).encode(),
        ]
        if i % 2:
            lines[0] = spoiled(rng, lines[0])
        path = str(tmp_path / "a.jsonl")
        with open(path, "wb") as f:
            f.write(rng.choice([b"\n", b"\r\n"]).join(lines))
        rows = refused_or(lambda path=path: read_rows(path))
        if rows is not None:
            loaded += 1
            usable(rows)
        usable(read_rows(path, skip_bad=True))  # the good one is always left
    assert 0.05 < loaded / n < 0.95


@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_mutated_data_files(times, name, tmp_path):
    n = times(1000)
    rows = [{"instruction": f'say "{i}", please', "input": "x\ny", "output": "the a"} for i in range(4)]
    text = io.StringIO()
    csv.DictWriter(text, rows[0]).writeheader()
    csv.DictWriter(text, rows[0]).writerows(rows)
    intact = (text.getvalue() if name == "a.csv" else json.dumps(rows)).encode()
    rng, loaded = random.Random(name), 0
    for _ in range(n):
        (tmp_path / name).write_bytes(spoiled(rng, intact))
        read = refused_or(lambda: read_rows(str(tmp_path / name)))
        if read is not None:
            loaded += 1
            usable(read)
    assert 0 < loaded < n


def test_mutated_checkpoints(times, tmp_path):
    """What loads is the tuner as it was saved, or one of another description that fits: never half of one."""
    n = times(1000)
    config = Config(vocab_size=20, n_layer=1, n_head=2, n_embd=8)
    tuner, path = build("iapt", config, ["P=2"]), tmp_path / "best.pt"
    meta = {"method": "iapt", "options": ["P=2"], "init": "tiny", "base": "abc"}
    save_tuner(path, tuner, meta)
    intact, rng, loaded = path.read_bytes(), random.Random(0), 0

    def load():
        content = load_checkpoint(path)
        other = build(content["meta"]["method"], config, content["meta"]["options"])
        load_into(other, content, path)
        return other

    for i in range(n):
        if i % 2:
            path.write_bytes(spoiled(rng, intact))
        else:
            content = mutated(rng, {"tuner": tuner.state_dict(), "meta": copy.deepcopy(meta)})
            torch.save(content, path)
        other = refused_or(load)
        if other is not None:
            loaded += 1
            assert all(torch.equal(a, b) for a, b in zip(other.parameters(), tuner.parameters()))
    assert 0 < loaded < n


def test_a_tensor_marked_as_a_folder_is_refused(tmp_path):
    """One flipped byte in a zip's directory, under no checksum, and PyTorch reads zeros."""
    path = tmp_path / "best.pt"
    config = Config(vocab_size=20, n_layer=1, n_head=2, n_embd=8)
    save_tuner(path, build("iapt", config), {"method": "iapt", "options": [], "init": "tiny", "base": "abc"})
    intact = path.read_bytes()
    entries = [i for i in range(len(intact)) if intact.startswith(b"PK\x01\x02", i)]
    assert len(entries) > 10
    for i in entries:
        path.write_bytes(intact[: i + 38] + b"\xff" + intact[i + 39 :])
        with pytest.raises(ValueError, match="is not a checkpoint of train.py"):
            load_checkpoint(path)


def test_a_pickle_that_runs_code_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "went off"),)

    torch.save({"tuner": Bomb(), "meta": Bomb()}, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of train.py"):
        load_checkpoint(tmp_path / "best.pt")
    shutil.copytree(os.path.join(FOLDER, "gpt2-bin"), tmp_path / "m")
    path = tmp_path / "m" / "pytorch_model.bin"
    for old in (False, True):
        torch.save({"transformer.wte.weight": Bomb()}, path, _use_new_zipfile_serialization=not old)
        with pytest.raises(ValueError, match="not a file of tensors alone"):
            pretrained.load_pretrained(tmp_path / "m")
    intact = open(os.path.join(FOLDER, "gpt2-bin", "pytorch_model.bin"), "rb").read()
    for n in range(0, len(intact), len(intact) // 40):
        path.write_bytes(intact[:n])
        assert refused_or(lambda: pretrained.load_pretrained(tmp_path / "m")) is None
    assert not (tmp_path / "went off").exists()
