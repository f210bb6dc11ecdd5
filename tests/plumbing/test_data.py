"""tiny keeps knowledge and task apart; batches are a pure function of seed and step."""

import hashlib
import json
import os
import random
import re

import pytest
import torch
from conftest import ROOT

import data
import train
from data import Batches, Example, collate, encode, evenly_spaced, open_data, rows_fingerprint, template, world
from data.files import read_rows, write_rows
from data.formats import read_records
from data.tokenizer import Tokenizer
from plumbing.files import read_json

OPENERS = world.OPENERS + world.HELD_OPENERS
SHIPPED = os.path.join(ROOT, "data", "tiny", "words.json")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    world.tiny(str(folder), corpus=10_000)
    return folder


@pytest.fixture(scope="session")
def corpus(tiny):
    """The texts of the corpus."""
    return [row["output"] for row in read_rows(str(tiny / "pretrain/train.jsonl"))]


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.of_words(read_json(SHIPPED))


def test_the_data_set_tiny_is_made_once(tmp_path, monkeypatch):
    calls = []
    real = world.tiny
    monkeypatch.setattr(data, "TINY", str(tmp_path))
    monkeypatch.setattr(world, "tiny", lambda folder: calls.append(folder) or real(folder, corpus=100))
    splits = open_data("tiny")
    assert open_data("tiny") == splits == open_data(str(tmp_path)) and calls == [str(tmp_path)]
    assert list(splits) == ["train", "val", "test", "test_entities", "test_phrasings"]


def test_the_generator_still_makes_the_vocabulary_of_the_shipped_backbone(tiny):
    """Another vocabulary would need another backbone: python train.py --init scratch, as in the README."""
    assert read_json(tiny / "words.json") == read_json(SHIPPED)


BYTES = {  # file: the first digits of its sha256
    "train": "3c1fe08a3ac7f123",
    "val": "e53a8f96ad9934d3",
    "test": "75edaee50aa67569",
    "test_entities": "34b2669aa0674b3d",
    "test_phrasings": "6e7f3f585df6f092",
    "pretrain/train": "a6fe505d2246ef15",
    "pretrain/test_complete": "4cef78fc356c00ef",
}


def test_it_makes_the_same_bytes_every_time(tiny):
    """In every process, too: in each, strings hash otherwise and sets have another order."""
    made = {name: hashlib.sha256((tiny / f"{name}.jsonl").read_bytes()).hexdigest() for name in BYTES}
    assert {name: sha256[:16] for name, sha256 in made.items()} == BYTES


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


def test_the_corpus_never_answers_an_instruction(corpus):
    asked = {
        o.format(c=core.format(x=x)): y
        for pairs, _, cores in world.FACTS.values()
        for x, y in pairs.items()
        for core in cores
        for o in OPENERS
    }
    begins = re.compile(r"\b(?=(?:" + "|".join({o.split("{c}")[0] for o in OPENERS} - {""}) + "))")
    found = 0
    for text in corpus:
        assert "Response" not in text
        for m in begins.finditer(text):
            question, mark, after = re.match(r"(.*?)( [.?]|$)(.*)", text[m.start() :], re.DOTALL).groups()
            if question + mark in asked:
                found += 1
                assert after.split()[:1] != [asked[question + mark]], text
    assert found > 1000


def test_the_corpus_states_every_fact_also_the_held_out_ones(corpus):
    text = "\n".join(corpus)
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


def test_the_words_of_held_out_phrasings_occur_in_the_corpus(tiny, corpus):
    known = {w for text in corpus for w in text.split()}
    asked = {w for row in read_rows(str(tiny / "test_phrasings.jsonl")) for w in row["instruction"].split()}
    assert asked <= known


def test_every_word_of_the_world_is_one_token(tiny, tokenizer):
    for row in read_rows(str(tiny / "train.jsonl"))[:500]:
        text = " " + row["instruction"]
        assert len(tokenizer.encode(text)) == len(text.split())


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


def test_the_ids_of_a_row_are_those_of_the_shipped_runs(tokenizer):
    """Of an output that begins with no white space, which all rows of tiny do."""
    row = {"instruction": "what is the plural of mouse ?", "input": "", "output": "mice\n"}
    (example,) = encode([row], tokenizer, 64)
    assert example.prompt == tokenizer.prompt("Instruction: what is the plural of mouse ?\nResponse:")
    assert example.response == [*tokenizer.encode(" mice"), tokenizer.end]


def test_a_row_that_does_not_fit_is_named(tokenizer):
    with pytest.raises(ValueError, match="row 2 has .* the model takes 20"):
        encode([{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "word " * 30}], tokenizer, 20)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    examples = [Example([i] * (1 + i % 7), [i]) for i in range(1, 90)]
    a, b = Batches(examples, 8, 3, 64), Batches(examples, 8, 3, 64)
    in_order = [a.batch(i) for i in range(30)]
    for i in (29, 0, 15, 7, 28):  # out of order, across epochs
        assert all(torch.equal(x, y) for x, y in zip(b.batch(i), in_order[i]))
    assert not torch.equal(Batches(examples, 8, 4, 64).batch(0)[0], in_order[0][0])
    seen = [int(x) for i in range(11) for x in in_order[i][0][:, 0]]  # 11 batches of 8: an epoch, each row once at most
    assert len(set(seen)) == len(seen) == 88


@pytest.mark.parametrize("block_size", [12, 20, 40])
def test_a_row_that_is_too_long_is_cut_on_request_and_still_asks(tokenizer, block_size):
    rows = [{"instruction": "word " * n, "output": "word " * k} for n in (1, 5, 60) for k in (1, 5, 60)]
    for row, (prompt, response, _) in zip(rows, encode(rows, tokenizer, block_size, truncate=True)):
        whole = len(tokenizer.prompt(template(row))) + len(row["output"].split()) + 1
        assert len(prompt) + len(response) == min(whole, block_size) and response
        assert tokenizer.decode(prompt).endswith("Response:") and len(response) >= min(2, block_size // 2)
    (plain,) = encode(rows[:1], tokenizer, block_size)
    assert plain == encode(rows[:1], tokenizer, block_size, truncate=True)[0]


def test_rows_are_never_padded_beyond_what_the_model_takes():
    assert collate([Example([1] * 20, [2] * 5)], 64)[0].shape == (1, 32)
    assert collate([Example([1] * 20, [2] * 5)], 30)[0].shape == (1, 30)


def test_a_batch_s_length_is_a_multiple_and_its_rows_are_the_same_with_any():
    rows = [Example([1] * 9, [2] * 5), Example([3], [4])]
    short, long = (Batches(rows, 2, 0, 64, multiple=n).batch(0) for n in (7, 16))
    assert short.idx.shape == (2, 14) and long.idx.shape == (2, 16)
    assert all(torch.equal(x, y[:, : x.shape[1]]) for x, y in zip(short, long))


def test_fewer_rows_than_a_batch_are_all_of_it():
    idx, _, _ = Batches([Example([1, 2], [3]), Example([4], [5])], 8, 0, 64).batch(5)
    assert len(idx) == 2


def test_any_change_to_the_rows_changes_their_fingerprint():
    splits = {"train": [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}], "val": []}
    known = rows_fingerprint(splits)
    assert known == rows_fingerprint({"val": [], "train": [dict(reversed(row.items())) for row in splits["train"]]})
    others = [
        {"train": splits["train"][::-1], "val": []},
        {"train": splits["train"][:1], "val": splits["train"][1:]},
        {"train": [{**splits["train"][0], "output": "b "}, splits["train"][1]], "val": []},
        {"train": [{**splits["train"][0], "history": []}, splits["train"][1]], "val": []},
    ]
    assert len({known, *map(rows_fingerprint, others)}) == 5
    whole = hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()  # as before it came in pieces
    assert whole.startswith(known)


def test_of_a_large_test_set_5000_rows_are_tested_on_and_a_line_says_so(tmp_path, capsys):
    for name, n in (("train", 20), ("val", 5), ("test", 6000), ("test_small", 7)):
        write_rows(str(tmp_path / f"{name}.jsonl"), [{"instruction": f"say {i}", "output": "b"} for i in range(n)])
    for options, n in (([], 5000), (["--test-rows", "0"], 6000)):
        rows, _ = data.open_rows(train.parse(["--data", str(tmp_path), *options]))
        assert [len(rows[name]) for name in ("train", "val", "test", "test_small")] == [20, 5, n, 7]
    assert capsys.readouterr().out == "test: 5,000 of 6,000 rows, evenly spaced (--test-rows 0: all)\n"


def test_a_large_file_takes_little_more_memory_than_its_text(tmp_path, tokenizer):
    """Its records are read one at a time, and an id is one object wherever it stands."""
    path = tmp_path / "my.csv"
    path.write_text("instruction,output\n" + "say the plural of mouse ?,mice\n" * 50)
    records = read_records(str(path))
    assert iter(records) is records and next(records)[0] == "line 2"
    rows = read_rows(str(path))
    one, *others = encode(rows, tokenizer, 256)
    assert max(one.prompt) > 256
    assert all(x is y for e in others for x, y in zip(e.prompt + e.response, one.prompt + one.response, strict=True))


def test_some_rows_of_many_are_evenly_spaced():
    assert evenly_spaced(list(range(10)), 3) == [0, 3, 6]
    assert evenly_spaced([1, 2], 0) == evenly_spaced([1, 2], 5) == [1, 2]
