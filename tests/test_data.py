"""tiny keeps knowledge and task apart; tokens lose nothing; batches are a pure function of seed and step."""

import csv
import json
import os
import re

import pytest
import tiktoken
import torch
from conftest import ROOT, shared
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from data import (
    GPT2,
    WORDS,
    Batches,
    Tokenizer,
    collate,
    encode,
    gpt2_chars,
    load,
    pieces,
    prepare,
    read_json,
    read_rows,
    split,
    template,
)

OPENERS = prepare.OPENERS + prepare.HELD_OPENERS
SHIPPED = os.path.join(ROOT, "data", "tiny", "words.json")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    prepare.tiny(str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.of_words(read_json(SHIPPED))


def test_the_generator_still_makes_the_vocabulary_of_the_shipped_backbone(tiny):
    """Another vocabulary would need another backbone: python train.py --init scratch, as in the README."""
    assert read_json(tiny / "words.json") == read_json(SHIPPED)


def test_it_makes_the_same_bytes_every_time(tiny, tmp_path):
    prepare.tiny(str(tmp_path), corpus=100)
    for name in ("train", "test", "test_entities", "test_phrasings"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (tiny / f"{name}.jsonl").read_bytes()


def test_the_world_is_large_enough():
    assert len(prepare.FACTS) >= 8 and all(len(pairs) >= 30 for pairs, _, _ in prepare.FACTS.values())
    assert len(prepare.OPENERS) >= 8 and all(len(cores) >= 4 for _, _, cores in [*prepare.FACTS.values()])


def test_the_corpus_never_answers_an_instruction(tiny):
    asked = {
        o.format(c=core.format(x=x)): y
        for pairs, _, cores in prepare.FACTS.values()
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
    for pairs, _, cores in prepare.FACTS.values():
        for x, y in pairs.items():
            assert any(f"{core.format(x=x)} is {y}" in text for core in cores), (x, y)


def asks_about(row):
    """The words that a row's instruction is about, with which core: found by trying them all."""
    if row["task"] in prepare.SKILLS:  # where the list is part of the sentence, its words are found in the answer
        copied = row["output"].split() if row["task"] != "count" else []
        return set(row["input"].split() + copied), prepare.SKILLS[row["task"]][1]
    pairs, _, cores = prepare.FACTS[row["task"]]
    return {x for x in pairs for core in cores if row["input"] == x or core.format(x=x) in row["instruction"]}, cores


def test_no_training_row_asks_for_a_held_out_entity_or_uses_a_held_out_phrasing(tiny):
    for row in read_rows(str(tiny / "train.jsonl")):
        about, cores = asks_about(row)
        assert not about & prepare.HELD_ENTITIES.get(row["task"], prepare.HELD_WORDS), row
        before, after = cores[-1].split("{x}")
        assert not (before.strip() and f" {before}" in row["instruction"] and after.strip() in row["instruction"]), row
        assert not any(row["instruction"].startswith(o.split("{c}")[0]) for o in prepare.HELD_OPENERS), row


def test_test_rows_are_new_and_of_the_kind_they_are_named_for(tiny):
    train = {template(row) for row in read_rows(str(tiny / "train.jsonl"))}
    for name in ("val", "test", "test_entities", "test_phrasings"):
        assert not train & {template(row) for row in read_rows(str(tiny / f"{name}.jsonl"))}
    for row in read_rows(str(tiny / "test_entities.jsonl")):
        if row["task"] in prepare.FACTS or row["input"]:
            assert asks_about(row)[0] & prepare.HELD_ENTITIES.get(row["task"], prepare.HELD_WORDS), row


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


def test_targets_are_the_response_and_its_end_and_the_instruction_is_the_rest(tokenizer):
    (example,) = encode(
        [{"instruction": "what is the plural of mouse ?", "input": "", "output": "mice"}], tokenizer, 64
    )
    idx, targets, instr = collate([example])
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
    a, b = Batches(examples, 8, seed=3), Batches(examples, 8, seed=3)
    in_order = [a.batch(i) for i in range(30)]
    for i in (29, 0, 15, 7, 28):  # out of order, across epochs
        assert all(torch.equal(x, y) for x, y in zip(b.batch(i), in_order[i]))
    assert not torch.equal(Batches(examples, 8, seed=4).batch(0)[0], in_order[0][0])
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


def test_json_and_csv_files_are_read_and_what_is_not_rows_is_refused(tmp_path):
    rows = [{"instruction": f"say {i}", "input": "", "output": str(i)} for i in range(30)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as f:
        csv.DictWriter(f, rows[0]).writeheader()
        csv.DictWriter(f, rows[0]).writerows(rows)
    assert load(str(tmp_path / "a.json")) == load(str(tmp_path / "a.csv"))
    (tmp_path / "b.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(ValueError, match="b.jsonl, row 1: it has question; it needs instruction and output"):
        load(str(tmp_path / "b.jsonl"))
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="c.jsonl has no rows"):
        load(str(tmp_path / "c.jsonl"))
    with pytest.raises(FileNotFoundError, match="no data at"):
        load(str(tmp_path / "none"))
    os.mkdir(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no train.jsonl"):
        load(str(tmp_path / "empty"))
