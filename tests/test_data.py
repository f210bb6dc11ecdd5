"""tiny keeps knowledge and task apart; tokens lose nothing; batches are a pure function of seed and step."""

import codecs
import csv
import json
import os
import random
import re
import subprocess
import sys

import pytest
import tiktoken
import torch
from conftest import ROOT, shared
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from data import (
    END,
    GPT2,
    WORDS,
    Batches,
    Tokenizer,
    collate,
    cuts_like_gpt2,
    encode,
    gpt2_chars,
    load,
    pieces,
    read_json,
    read_rows,
    split,
    template,
    world,
)

OPENERS = world.OPENERS + world.HELD_OPENERS
SHIPPED = os.path.join(ROOT, "data", "tiny", "words.json")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    world.tiny(str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.of_words(read_json(SHIPPED))


def test_the_generator_still_makes_the_vocabulary_of_the_shipped_backbone(tiny):
    """Another vocabulary would need another backbone: python train.py --init scratch, as in the README."""
    assert read_json(tiny / "words.json") == read_json(SHIPPED)


def test_it_makes_the_same_bytes_every_time(tiny, tmp_path):
    """Also in another process, where strings hash otherwise and sets have another order."""
    code = f"from data import world; world.tiny({str(tmp_path)!r}, corpus=200)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "7"}, check=True)
    for name in ("train", "val", "test", "test_entities", "test_phrasings"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (tiny / f"{name}.jsonl").read_bytes()
    corpus = (tmp_path / "pretrain/train.jsonl").read_bytes()
    assert (tiny / "pretrain/train.jsonl").read_bytes().startswith(corpus)


def test_a_world_with_other_words_than_the_model_beside_it_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "words.json").write_text('[" other"]')
    with pytest.raises(ValueError, match="no longer those of the model .* pretrain anew"):
        world.tiny(str(tmp_path), corpus=100)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "words.json"]


def test_every_sentence_of_a_document_is_about_another_task(monkeypatch):
    """So nothing that follows an instruction can be its answer, whatever its form."""
    tasks = []
    for name in ("fact_or_list", "unanswered"):
        real = getattr(world, name)
        monkeypatch.setattr(world, name, lambda rng, task, real=real: tasks.append(task) or real(rng, task))
    rng = random.Random(0)
    for _ in range(300):
        tasks.clear()
        world.document(rng)
        assert len(set(tasks)) == len(tasks) >= 2


def test_the_world_is_large_enough():
    assert len(world.FACTS) >= 8 and all(len(pairs) >= 30 for pairs, _, _ in world.FACTS.values())
    assert len(world.OPENERS) >= 8 and all(len(cores) >= 4 for _, _, cores in [*world.FACTS.values()])


def test_the_corpus_never_answers_an_instruction(tiny):
    asked = {
        o.format(c=core.format(x=x)): y
        for pairs, _, cores in world.FACTS.values()
        for x, y in pairs.items()
        for core in cores
        for o in OPENERS
    }
    begins = re.compile(r"\b(?=(?:" + "|".join({o.split("{c}")[0] for o in OPENERS} - {""}) + "))")
    found = 0
    for row in read_rows(str(tiny / "pretrain/train.jsonl")):
        text = row["output"]
        assert "Response" not in text
        for m in begins.finditer(text):
            question, mark, after = re.match(r"(.*?)( [.?]|$)(.*)", text[m.start() :], re.DOTALL).groups()
            if question + mark in asked:
                found += 1
                assert after.split()[:1] != [asked[question + mark]], text
    assert found > 1000


def test_the_corpus_states_every_fact_also_the_held_out_ones(tiny):
    text = "\n".join(row["output"] for row in read_rows(str(tiny / "pretrain/train.jsonl")))
    for pairs, _, cores in world.FACTS.values():
        for x, y in pairs.items():
            assert any(f"{core.format(x=x)} is {y}" in text for core in cores), (x, y)


def asks_about(row):
    """The words that a row's instruction is about: found by trying them all."""
    if row["task"] in world.SKILLS:  # where the list is part of the sentence, its words are found in the answer
        return set(row["input"].split() + (row["output"].split() if row["task"] != "count" else []))
    pairs, _, cores = world.FACTS[row["task"]]
    return {x for x in pairs for core in cores if row["input"] == x or core.format(x=x) in row["instruction"]}


def test_no_training_row_asks_for_a_held_out_entity_or_uses_a_held_out_phrasing(tiny):
    for row in read_rows(str(tiny / "train.jsonl")):
        assert not asks_about(row) & world.HELD_ENTITIES.get(row["task"], world.HELD_WORDS), row
        assert not held_phrasing(row), row


def held_phrasing(row):
    """Whether a row's instruction has an opener or a core that training never uses."""
    cores = (world.FACTS.get(row["task"]) or world.SKILLS[row["task"]])[-1]
    core = re.escape(cores[-1]).replace(re.escape("{x}"), r"\w+( \w+)*")
    openers = [o.split("{c}")[0] for o in world.HELD_OPENERS]
    return bool(re.search(rf"\b{core} [.?]$", row["instruction"])) or row["instruction"].startswith(tuple(openers))


def test_test_rows_are_new_and_of_the_kind_they_are_named_for(tiny):
    seen = set()
    for name in ("train", "val", "test"):
        rows = {template(row) for row in read_rows(str(tiny / f"{name}.jsonl"))}
        assert not seen & rows
        seen |= rows
    for name in ("test_entities", "test_phrasings"):
        assert not seen & {template(row) for row in read_rows(str(tiny / f"{name}.jsonl"))}
    for row in read_rows(str(tiny / "test_entities.jsonl")):
        if row["task"] in world.FACTS or row["input"]:
            assert asks_about(row) & world.HELD_ENTITIES.get(row["task"], world.HELD_WORDS), row

    assert all(held_phrasing(row) for row in read_rows(str(tiny / "test_phrasings.jsonl")))


def test_the_words_of_held_out_phrasings_occur_in_the_corpus(tiny):
    known = {w for row in read_rows(str(tiny / "pretrain/train.jsonl")) for w in row["output"].split()}
    asked = {w for row in read_rows(str(tiny / "test_phrasings.jsonl")) for w in row["instruction"].split()}
    assert asked <= known


def test_every_word_of_the_world_is_one_token(tiny, tokenizer):
    for row in read_rows(str(tiny / "train.jsonl"))[:500]:
        text = " " + row["instruction"]
        assert len(tokenizer.encode(text)) == len(text.split())


@pytest.mark.parametrize(
    "text",
    ["capitale du Pérou", "a\tb\r\n  c ", "日本 🙂 \u200b", "x" * 300, "<|endoftext|>", "can't 12,5 %", "\x00\x7f"],
)
def test_nothing_is_unencodable(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.end not in ids


def test_pieces_are_what_the_encoding_splits_a_text_into():
    regex = pytest.importorskip("regex", reason="tiktoken's own dependency, with which it splits")
    text = " été , ñandú 12 ok__ a-b\n Instruction: why?! x_y  z"
    assert set(pieces([text])) == {piece for piece in regex.findall(WORDS, text) if len(piece.encode()) > 1}


def test_gpt2_s_tokens_from_a_vocab_json_are_tiktoken_s_own(monkeypatch):
    """The published files, read in our way and in tiktoken's."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # no copies of local files
    folder = shared("tokenizers", "gpt2")
    vocab = read_json(os.path.join(folder, "encoder.json"))
    ours = Tokenizer.of_gpt2(vocab)
    ranks = data_gym_to_mergeable_bpe_ranks(os.path.join(folder, "vocab.bpe"), os.path.join(folder, "encoder.json"))
    assert ours.encoding._mergeable_ranks == ranks
    assert ours.encode("hello world") == [31373, 995] and ours.end == 50256
    text = "It's  3.14 o'clock;\n\n déjà vu…  They'll\tgo."
    assert ours.encode(text) == tiktoken.Encoding("x", pat_str=GPT2, mergeable_ranks=ranks, special_tokens={}).encode(
        text
    )
    assert ours.decode(ours.encode(text)) == text
    assert len(set(gpt2_chars().values())) == 256


def test_gpt2_and_llama_3_encode_as_published():
    """As the documentation of GPT2Tokenizer has it, and OpenAI's cookbook, with whose ranks Llama 3's begin."""
    gpt2, llama3 = (Tokenizer.load(shared("tokenizers", name)) for name in ("gpt2", "llama3"))
    assert gpt2.encode("Hello world") == [15496, 995] and gpt2.encode(" Hello world") == [18435, 995]
    assert gpt2.end == 50256 and gpt2.begin is None and gpt2.vocab_size == 50257
    assert llama3.encode("2 + 2 = 4") == [17, 489, 220, 17, 284, 220, 19]
    assert (llama3.begin, llama3.end, llama3.vocab_size) == (128000, 128001, 128256)
    assert llama3.prompt("hello world") == [128000, 15339, 1917]
    assert llama3.encode("<|begin_of_text|>")[0] != 128000  # in a user's text it is text


def test_a_gpt2_folder_without_a_vocabulary_takes_tiktoken_s(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    asked = []
    encoding = tiktoken.Encoding("gpt2", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={END: 1})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: asked.append(name) or encoding)
    assert Tokenizer.load(tmp_path).end == 1 and asked == ["gpt2"]

    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(FileNotFoundError, match="tiktoken could not download it .* put gpt2's vocab.json there"):
        Tokenizer.load(tmp_path)


def test_a_vocab_json_of_a_model_that_cuts_text_otherwise_is_not_taken_for_gpt2_s(tmp_path):
    """SmolLM, say, has GPT-2's files and splits digits: its tokenizer.json says so."""
    (tmp_path / "tokenizer.json").write_text('{"pre_tokenizer": {"type": "Sequence"}}')
    assert not cuts_like_gpt2(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"pre_tokenizer": {"type": "ByteLevel"}}')
    assert cuts_like_gpt2(tmp_path / "tokenizer.json")


def test_a_response_continues_a_prompt_in_sentencepiece_s_tokens_too():
    """Its tokenizers put a space before every text: " lima" after "Response:" must not get two."""
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    tokenizer = Tokenizer.load(shared("checkpoints", "tinystories-656k-llama"))
    text = "Response:\n She was happy"
    assert tokenizer.encode("Response:\n") + tokenizer.encode(" She was happy") == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(" She was happy")) == "She was happy"


def test_targets_are_the_response_and_its_end_and_the_instruction_is_the_rest(tokenizer):
    (example,) = encode(
        [{"instruction": "what is the plural of mouse ?", "input": "", "output": "mice"}], tokenizer, 64
    )
    idx, targets, instr = collate([example], 64)
    text = [tokenizer.decode([i]) for i in targets[0][targets[0] >= 0].tolist()]
    assert text == [" mice", "<|endoftext|>"]
    first = (targets[0] >= 0).nonzero()[0].item()
    assert (
        tokenizer.decode(idx[0, : first + 1].tolist())
        == "<|endoftext|>Instruction: what is the plural of mouse ?\nResponse:"
    )
    assert instr[0].nonzero().max().item() == first and idx.shape[1] % 16 == 0


def test_a_row_that_does_not_fit_is_named(tokenizer):
    with pytest.raises(ValueError, match="row 2 has .* the model takes 20"):
        encode([{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "word " * 30}], tokenizer, 20)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    examples = [([i] * (1 + i % 7), [i]) for i in range(1, 90)]
    a, b = Batches(examples, 8, 3, 64), Batches(examples, 8, 3, 64)
    in_order = [a.batch(i) for i in range(30)]
    for i in (29, 0, 15, 7, 28):  # out of order, across epochs
        assert all(torch.equal(x, y) for x, y in zip(b.batch(i), in_order[i]))
    assert not torch.equal(Batches(examples, 8, 4, 64).batch(0)[0], in_order[0][0])
    seen = [int(x) for i in range(11) for x in in_order[i][0][:, 0]]  # 11 batches of 8: an epoch, each row once at most
    assert len(set(seen)) == len(seen) == 88


def test_a_split_never_has_an_instruction_on_both_sides():
    rows = [{"instruction": f"q{i // 3}", "output": str(i)} for i in range(90)]
    rest, part = split(rows)
    assert len(rest) + len(part) == 90 and len(part) == 9
    assert not {row["instruction"] for row in rest} & {row["instruction"] for row in part}


def test_e2e_s_folder_is_split_by_meaning_and_keeps_its_test_file():
    rows = load(shared("datasets", "e2e"))
    assert sorted(rows) == ["test", "train", "val"] and len(rows["test"]) == 4693
    assert len(rows["train"]) + len(rows["val"]) == 4672
    assert not {row["input"] for row in rows["train"]} & {row["input"] for row in rows["val"]}


def test_json_and_csv_files_are_read_alike(tmp_path):
    rows = [{"instruction": f"say {i}", "input": "", "output": str(i)} for i in range(30)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as f:
        csv.DictWriter(f, rows[0]).writeheader()
        csv.DictWriter(f, rows[0]).writerows(rows)
    assert load(str(tmp_path / "a.json")) == load(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.jsonl", '{"question": "?"}\n', "line 1: it has question; it needs instruction and output"),
        ("a.jsonl", '{"instruction": "?", "output": "x"}\n\n[1]\n', "line 3: it has .1.; it needs"),
        ("a.jsonl", '{"instruction": "?", "output": 3}\n', "line 1: output is 3, and should be text"),
        ("a.jsonl", '{"instruction": null, "output": "x"}\n', "line 1: instruction is None, and should be text"),
        ("a.jsonl", '{"instruction": "?", "output": "x", "input": 5}\n', "line 1: input is 5, and should be text"),
        ("a.jsonl", '{"instruction": "?", "output": " "}\n', "line 1: output is empty"),
        ("a.jsonl", '{"instruction": "?", "output": "x", "output": "y"}\n', "line 1: it has the key 'output' twice"),
        ("a.jsonl", "{", "a.jsonl, line 1: .*--skip-bad"),
        ("a.jsonl", b'{"instruction": "?", "output": "x"}\n\xff\xfe\n', "line 2: .* can't decode"),
        ("a.jsonl", "\n", "a.jsonl has no rows"),
        ("a.jsonl", "", "a.jsonl has no rows"),
        ("a.json", '{"instruction": "?"}', "a.json has no rows"),
        ("a.json", "[" * 100_000, "a.json cannot be read"),
        ("a.csv", "instruction,output\nx\n", "line 2: output is None"),
        ("a.csv", "instruction,output\nx,y,z\n", "line 2: it has more columns than the first line: ..z.."),
        ("a.csv", 'instruction,output\nx,y\nx,"y' + "y" * 200 + "\n", "near line 2: unexpected end of data"),
        ("a.csv", "instruction,output\nx," + "y" * 200_000 + "\n", "near line [12]: field larger"),
        ("a.csv", b"instruction,output\na,b\nx,caf\xe9\n", "line 3: it is not UTF-8"),
        ("a.json", '[{"instruction": "?", "output": "x"}]', "too few different instructions"),
    ],
)
def test_what_is_not_rows_is_refused_with_its_file(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says):
        load(str(tmp_path / name))


def test_bad_rows_are_left_out_on_request_and_counted(tmp_path, capsys):
    good = [{"instruction": f"say {i}", "output": str(i)} for i in range(30)]
    lines = [json.dumps(row).encode() for row in good]
    lines[10:10] = [b"{", b"\xff", b'{"output": "x"}', b"[" * 100_000]
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b"\r\n".join(lines))
    with pytest.raises(ValueError, match="a.jsonl, line 11: "):
        read_rows(str(tmp_path / "a.jsonl"))
    assert read_rows(str(tmp_path / "a.jsonl"), skip_bad=True) == good
    assert "left out 4 of 34 rows. The first: " in capsys.readouterr().err


@pytest.mark.parametrize("block_size", [12, 20, 40])
def test_a_row_that_is_too_long_is_cut_on_request_and_still_asks(tokenizer, block_size):
    rows = [{"instruction": "word " * n, "output": "word " * k} for n in (1, 5, 60) for k in (1, 5, 60)]
    for row, (prompt, response) in zip(rows, encode(rows, tokenizer, block_size, truncate=True)):
        whole = len(tokenizer.prompt(template(row))) + len(row["output"].split()) + 1
        assert len(prompt) + len(response) == min(whole, block_size) and response
        assert tokenizer.decode(prompt).endswith("Response:") and len(response) >= min(2, block_size // 2)
    (plain,) = encode(rows[:1], tokenizer, block_size)
    assert plain == encode(rows[:1], tokenizer, block_size, truncate=True)[0]


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data at"):
        load(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="no data in .*: no train.jsonl"):
        load(str(tmp_path))


def test_rows_are_never_padded_beyond_what_the_model_takes():
    assert collate([([1] * 20, [2] * 5)], 64)[0].shape == (1, 32)
    assert collate([([1] * 20, [2] * 5)], 30)[0].shape == (1, 30)


def test_fewer_rows_than_a_batch_are_all_of_it():
    idx, _, _ = Batches([([1, 2], [3]), ([4], [5])], 8, 0, 64).batch(5)
    assert len(idx) == 2


def test_a_text_without_beginning_still_begins():
    """GPT-2 has no token that begins a text: an empty prompt is then the end of another text."""
    tokenizer = Tokenizer(
        tiktoken.Encoding("x", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={"e": 1}), end=1
    )
    assert tokenizer.prompt("") == [1] and tokenizer.prompt("a") == [0]
