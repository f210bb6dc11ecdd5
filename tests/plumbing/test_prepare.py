"""Data that people already have: public sets from a server on loopback, and files of any shape."""

import csv
import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import zipfile

import pytest
from conftest import ROOT, run_in, shared
from test_hub import COMMIT, Hub

from data import Tokenizer, collate, encode, load_splits, p3, prepare, template
from data.files import as_row

LIMA = {"instruction": "what is the capital of peru ?", "input": "", "output": "lima"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Public sets whose files come from here: "qa", two files, and "films", an archive."""
    qa = [json.dumps({"question": f"how much is {i} ?", "answer": i}).encode() + b"\n" for i in range(40)]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("in/train.tsv", "sentence\tlabel\n" + "".join(f'it "was {i}\t{i % 2}\n' for i in range(40)))
        z.writestr("in/dev.tsv", "sentence\tlabel\nfine\t1\n")
    files = {"train.jsonl": b"".join(qa[:30]), "test.jsonl": b"".join(qa[30:]), "films.zip": archive.getvalue()}
    sha = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    server = Hub(files)
    home = f"http://127.0.0.1:{server.server_port}/owner/name/resolve/{COMMIT}"
    monkeypatch.setitem(prepare.SOURCES, "qa", dataclasses.replace(
        prepare.SOURCES["gsm8k"], home=home, files={n: (f"{n}.jsonl", sha[f"{n}.jsonl"]) for n in ("train", "test")},
    ))  # fmt: skip
    films = {
        "train": ("films.zip", sha["films.zip"], "in/train.tsv"),
        "test": ("films.zip", sha["films.zip"], "in/dev.tsv"),
    }
    monkeypatch.setitem(prepare.SOURCES, "films", dataclasses.replace(prepare.SOURCES["sst2"], home=home, files=films))
    yield server
    server.shutdown()


def written(path, content):
    with open(path, "w", encoding="utf-8", newline="") as f:
        f.write(content)
    return str(path)


def test_a_public_set_is_downloaded_whole_and_only_once(server, tmp_path):
    out = str(tmp_path / "qa")
    server.trouble["train.jsonl"] = "cut"
    status, text = run_in(prepare, "qa", "--out", out)
    assert status == 1 and "train.jsonl was cut off" in text and os.listdir(tmp_path / "qa" / "raw") == []
    server.trouble.clear()
    assert run_in(prepare, "qa", "--out", out)[0] == 0
    rows = load_splits(out)
    assert (len(rows["train"]), len(rows["val"]), len(rows["test"])) == (27, 3, 10)
    assert {row["instruction"]: row["output"] for row in rows["test"]} == {
        f"how much is {i} ?": str(i) for i in range(30, 40)
    }
    requests = len(server.requests)
    assert run_in(prepare, "qa", "--out", out)[0] == 0 and len(server.requests) == requests


def test_a_public_file_that_is_not_what_it_was_is_refused_and_deleted(server, tmp_path):
    server.trouble["test.jsonl"] = "other content"
    status, text = run_in(prepare, "qa", "--out", str(tmp_path / "qa"))
    assert status == 1 and "/test.jsonl" in text and "arrived broken" in text and "--file" in text
    assert os.listdir(tmp_path / "qa" / "raw") == ["train.jsonl"] and not (tmp_path / "qa" / "train.jsonl").exists()


def test_a_server_that_refuses_is_one_line_that_names_another_way(server, tmp_path):
    status, text = run_in(prepare, "qa", "--out", ROOT + "/README.md")
    assert status == 2 and "is a file" in text
    server.status["train.jsonl"] = 404
    status, text = run_in(prepare, "qa", "--out", str(tmp_path / "qa"))
    assert status == 1 and "/train.jsonl (HTTPError: HTTP Error 404" in text and "Traceback" not in text
    assert "name it with --file" in text


def test_a_public_set_can_come_from_files_that_one_has(server, tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_bytes(server.files[name])
    for files in ([str(tmp_path)], [str(tmp_path / "test.jsonl"), str(tmp_path / "train.jsonl")]):
        assert run_in(prepare, "qa", "--out", str(tmp_path / "qa"), "--file", *files)[0] == 0
        assert len(load_splits(str(tmp_path / "qa"))["test"]) == 10
    assert server.requests == []
    status, text = run_in(prepare, "qa", "--out", str(tmp_path / "other"), "--file", str(tmp_path / "test.jsonl"))
    assert status == 1 and "no train.jsonl there. It takes test.jsonl, train.jsonl" in text


def test_an_archive_s_files_become_rows_with_label_words(server, tmp_path):
    status, text = run_in(prepare, "films", "--out", str(tmp_path / "films"))
    rows = load_splits(str(tmp_path / "films"))
    assert status == 0 and "Label words: negative, positive. It is scored by accuracy." in text
    assert rows["test"] == [
        {"instruction": "Is this review positive or negative?", "input": "fine", "output": "positive"}
    ]
    assert {'it "was 3', 'it "was 4'} <= {row["input"] for row in rows["train"] + rows["val"]}
    (tmp_path / "films.zip").write_bytes(b"PK nothing")
    status, text = run_in(prepare, "films", "--out", str(tmp_path / "f"), "--file", str(tmp_path / "films.zip"))
    assert status == 1 and "has no in/train.tsv" in text


def test_the_checksums_are_those_of_the_real_files():
    folder = shared("datasets", "e2e")
    for name, sha256 in (prepare.SOURCES["e2e"].files["val"], prepare.SOURCES["e2e"].files["test"]):
        with open(os.path.join(folder, name), "rb") as f:
            assert hashlib.sha256(f.read()).hexdigest() == sha256
    hashes = [
        sha256 for name, source in prepare.SOURCES.items() if name != "p3" for _, sha256, *_ in source.files.values()
    ]
    assert all(len(sha256) == 64 for sha256 in hashes)


def test_the_real_alpaca_rows_become_splits_without_a_row_too_many_or_too_few(tmp_path):
    path = shared("datasets", "alpaca", "alpaca_random_9k.json")
    status, text = run_in(prepare, "alpaca", "--file", path, "--out", str(tmp_path / "alpaca"))
    rows = load_splits(str(tmp_path / "alpaca"))
    with open(path) as f:
        good = [row for row in json.load(f) if row["output"].strip()]
    assert status == 0 and "left out" in text

    def key(row):
        return json.dumps([row["instruction"], row["input"], row["output"]])

    assert sorted(key(row) for split in rows.values() for row in split) == sorted(map(key, good))
    asked = [{template(row) for row in rows[name]} for name in ("train", "val", "test")]
    assert not asked[0] & asked[1] and not asked[0] & asked[2] and not asked[1] & asked[2]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "no answer of an assistant"),
        ({"input": "a", "output": "b"}, "it needs instruction and output"),
        ({"question": "a", "answer": None}, "output is empty"),
        ({"question": {"a": 1}, "answer": "b"}, "should be text"),
        ({"instruction": "half \ud800", "output": "b"}, "half of a character"),
    ],
)
def test_odd_rows_are_refused_with_their_line_and_can_be_left_out(tmp_path, row, message):
    rows = [{**LIMA, "instruction": f"q {i}"} for i in range(30)]
    path = written(tmp_path / "my.jsonl", "".join(json.dumps(r) + "\n" for r in [*rows[:3], row, *rows[3:]]))
    status, text = run_in(prepare, path, "--out", str(tmp_path / "my"))
    assert status == 1 and "my.jsonl, line 4: " in text and message in text and not (tmp_path / "my").exists()
    status, text = run_in(prepare, path, "--out", str(tmp_path / "my"), "--skip-bad")
    assert status == 0 and "left out 1 of 31 rows" in text


def test_unused_columns_are_named_and_those_of_a_mapping_are_used(tmp_path):
    rows = [{"id": i, "q": f"q {i}", "topic": "t", "role": "be brief", "a": "b"} for i in range(30)]
    path = written(tmp_path / "my.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    mapping = ["--map", "instruction={topic}: {q}", "output=a", "system=role"]
    status, text = run_in(prepare, path, *mapping, "--out", str(tmp_path / "my"))
    row = load_splits(str(tmp_path / "my"))["test"][0]
    assert status == 0 and text.count("ignored columns: id\n") == 1 and row["instruction"].startswith("t: q ")
    assert template(row) == f"Instruction: be brief\n{row['instruction']}\nResponse:"


def test_a_chat_is_written_as_rows_that_keep_its_turns(tmp_path):
    chat = [("system", "be brief"), ("user", "hi"), ("assistant", "yo"), ("user", "a ?"), ("assistant", "b")]
    rows = [{"messages": [{"role": r, "content": f"{c} {i}"} for r, c in chat], "id": i} for i in range(30)]
    path = written(tmp_path / "my.ndjson", "".join(json.dumps(row) + "\n" for row in rows))
    status, text = run_in(prepare, path, "--out", str(tmp_path / "my"), "--show", "1")
    splits = load_splits(str(tmp_path / "my"))
    assert status == 0 and text.count("ignored columns: id\n") == 1
    assert splits == load_splits(path)
    assert all(len(row["history"]) == 3 for rows in splits.values() for row in rows)
    assert re.search(r"System: be brief (\d+)\nUser: hi \1\nAssistant: yo \1\nUser: a \? \1\nResponse:\[", text)


def test_a_line_with_a_comma_too_many_is_no_row_whatever_is_mapped(tmp_path):
    path = written(tmp_path / "my.csv", "q,a\n" + "".join(f"q{i},a\n" for i in range(30)) + "hello 1, world,yes\n")
    for more in ([], ["--map", "instruction=q", "output=a"]):
        status, text = run_in(prepare, path, *more, "--out", str(tmp_path / "my"))
        assert status == 1 and ("line 32: it has more columns" in text or "it needs instruction and output" in text)
    assert prepare.parse_pairs(["0=bad,1=good,-1=awful"], "--labels") == {"0": "bad", "1": "good", "-1": "awful"}


def test_doubled_braces_of_a_mapping_are_braces():
    mapping = {"instruction": 'Reply with {{"label": 0}}: {text} {{text}}', "output": "stars"}
    row = prepare.map_columns({"text": "a", "stars": "1"}, None, mapping, {})
    assert row["instruction"] == 'Reply with {"label": 0}: a {text}'


def test_columns_of_messages_are_mapped_as_the_chat_that_they_are():
    user, answer, other = (
        {"role": role, "content": text} for role, text in zip(("user", "assistant", "assistant"), "abc")
    )
    record = {"prompt": "a", "chosen": [user, answer], "rejected": [user, other], "choices": ["x", "y"]}
    ignored = set()

    def read(**mapping):
        return as_row(record, lambda record, ignored: prepare.map_columns(record, ignored, mapping, {}), ignored)

    for question in ("prompt", "chosen"):
        assert read(instruction=question, output="chosen") == {"instruction": "a", "input": "", "output": "b"}
        assert "rejected" in ignored
    for text in ("{chosen}", "so: {chosen}"):
        with pytest.raises(ValueError, match="it has messages, .*: name their column alone, without braces"):
            read(instruction="prompt", output=text)
    with pytest.raises(ValueError, match="should be text .data.prepare --map 'output={COLUMN}'"):
        read(instruction="prompt", output="choices")
    assert read(instruction="prompt", output="{choices}")["output"] == '["x", "y"]'


def test_nan_is_a_cell_that_is_missing():
    mapping = {"instruction": "text", "input": "more", "output": "stars"}
    assert prepare.map_columns({"text": "a", "more": float("nan"), "stars": 1}, None, mapping, {})["input"] == ""
    with pytest.raises(ValueError, match="its stars is empty"):
        prepare.map_columns({"text": "a", "more": "", "stars": float("nan")}, None, mapping, {})


@pytest.mark.parametrize("ext", ["csv", "tsv", "json", "jsonl"])
def test_columns_of_any_file_can_be_mapped(tmp_path, ext):
    rows = [{"title": f"t{i}", "text": f'"quoted, a text {i}', "stars": str(i % 2), "none": ""} for i in range(40)]
    out = io.StringIO()
    if ext in ("csv", "tsv"):
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if ext == "tsv" else {}
        writer = csv.DictWriter(out, list(rows[0]), **dialect)
        writer.writeheader()
        writer.writerows(rows)
    else:
        out.write(json.dumps(rows) if ext == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    path = written(tmp_path / f"my.{ext}", out.getvalue())
    mapping = [
        "--map",
        "instruction=Is {title}, of all, good ?,input={text}",
        "output=stars",
        "--labels",
        "0=bad,1=good",
    ]
    status, text = run_in(prepare, path, *mapping, "--out", str(tmp_path / "my"))
    assert status == 0, text
    rows = [row for split in load_splits(str(tmp_path / "my")).values() for row in split]
    assert sorted((row["instruction"], row["input"], row["output"]) for row in rows) == sorted(
        (f"Is t{i}, of all, good ?", f'"quoted, a text {i}', ["bad", "good"][i % 2]) for i in range(40)
    )


@pytest.mark.parametrize(
    "status, args, message",
    [
        (1, [], "line 1: it has q, a; it needs instruction and output (python -m data.prepare FILE --map"),
        (1, ["--map", "instruction=x", "output=a"], "line 1: there is no column 'x' for instruction. It has: q, a"),
        (1, ["--map", "instruction=say {x} !", "output=a"], "there is no column 'x' for instruction"),
        (1, ["--map", "instruction=q", "output=a", "--labels", "7=seven"], "its output is '1', and --labels has 7"),
        (
            2,
            ["--map", "instruction"],
            "--map takes instruction or input or output or system or task=COLUMN, got 'instruction'",
        ),
        (2, ["--map", "answer=a"], "got 'answer=a'"),
        (2, ["--map", "output=a"], "--map needs at least instruction=... and output=..."),
        (2, ["--labels", "1=one"], "--labels needs --map"),
        (2, ["--file", "x"], "--file is for a public data set"),
        (1, ["--map", "instruction=Q", "output=a"], "there is no column 'Q'"),
        (1, ["--map", "instruction=q", "output=right answer"], "there is no column 'right answer' for output"),
        (1, ["--map", "instruction=q", "output=a", "--init", "nowhere"], "no model at nowhere"),
    ],
)
def test_what_cannot_be_prepared_is_one_line_and_leaves_nothing(tmp_path, status, args, message):
    path = written(tmp_path / "my.jsonl", "".join(f'{{"q": "q{i}", "a": {i + 1}}}\n' for i in range(30)))
    exited, text = run_in(prepare, path, *args, "--out", str(tmp_path / "my"))
    assert exited == status and message in text and text.count("error: ") == 1 and "Traceback" not in text
    assert not (tmp_path / "my").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_is_called_what_it_is_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    message = "pipe is a pipe or a device: save what it says in a file, such as my.jsonl"
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path / "pipe"))
    status, text = run_in(prepare, str(tmp_path / "pipe"), "--out", str(tmp_path / "out"))
    assert status == 1 and message in text and os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_what_cannot_be_written_is_named_with_what_to_do(tmp_path, monkeypatch, error):
    """And not as [Errno 13] and a temporary file that is not there."""

    rows = [json.dumps({**LIMA, "instruction": f"q {i}"}) for i in range(30)]
    my, real = written(tmp_path / "my.jsonl", "\n".join(rows)), open

    def refused(path, mode="r", **settings):
        if "w" in mode:
            raise OSError(error, os.strerror(error), path)
        return real(path, mode, **settings)

    monkeypatch.setattr("builtins.open", refused)
    status, text = run_in(prepare, my, "--out", str(tmp_path / "out"))
    path, space = tmp_path / "out" / "prepared.json", "free some space, or " if error == errno.ENOSPC else ""
    assert status == 1 and f"error: {path} cannot be written ({os.strerror(error)}): {space}name another place" in text


def test_a_folder_s_files_are_mapped_one_by_one_and_its_splits_stay(tmp_path):
    (tmp_path / "my").mkdir()
    sizes = {"train.csv": 30, "dev.tsv": 3, "test.jsonl": 4, "test_hard.JSON": 2}
    for name, n in sizes.items():
        rows = [{"text": f"{name} {i}", "label": i % 2, "id": i} for i in range(n)]
        lines = ["text\tlabel\tid" if "tsv" in name else "text,label,id"]
        lines += [("\t" if "tsv" in name else ",").join(map(str, row.values())) for row in rows]
        text = json.dumps(rows) if "JSON" in name else "\n".join(map(json.dumps, rows) if "jsonl" in name else lines)
        written(tmp_path / "my" / name, text)
    mapping = ["--map", "instruction=Is it good ? {text}", "output=label", "--labels", "0=bad", "1=good"]
    status, text = run_in(prepare, str(tmp_path / "my"), *mapping, "--out", str(tmp_path / "out"))
    assert status == 0 and text.count("ignored columns: id\n") == 1
    splits = load_splits(str(tmp_path / "out"))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 30, "val": 3, "test": 4, "test_hard": 2}
    assert splits["val"][1] == {"instruction": "Is it good ? dev.tsv 1", "input": "", "output": "good"}
    os.remove(tmp_path / "my" / "test_hard.JSON")  # nor does it stay in what is prepared again
    assert run_in(prepare, str(tmp_path / "my"), *mapping, "--out", str(tmp_path / "out"))[0] == 0
    assert sorted(load_splits(str(tmp_path / "out"))) == ["test", "train", "val"]
    status, text = run_in(prepare, str(tmp_path / "my"), *mapping, "--out", str(tmp_path / "my"))
    assert status == 1 and "is of another data set: name another folder with --out" in text


def test_exact_repeats_are_counted(tmp_path):
    rows = [json.dumps({**LIMA, "instruction": f"q {i % 25}"}) for i in range(30)]
    status, text = run_in(prepare, written(tmp_path / "my.jsonl", "\n".join(rows)), "--out", str(tmp_path / "out"))
    assert status == 0 and re.search(r"^Exact repeats of earlier rows: .*\d in train", text, re.MULTILINE)
    assert sum(map(int, re.findall(r"(\d+) in ", text))) == 5


@pytest.mark.parametrize("other", ["train.jsonl", "train.tsv", "test_hard.csv"])
def test_a_folder_with_other_data_is_left_alone(tmp_path, other):
    """Files of two sets would be mixed: a split of the one could be what the other trains on."""
    path = written(
        tmp_path / "my.jsonl", "".join(json.dumps({**LIMA, "instruction": f"q {i}"}) + "\n" for i in range(30))
    )
    (tmp_path / "data").mkdir()
    written(tmp_path / "data" / other, "precious")
    status, text = run_in(prepare, path, "--out", str(tmp_path / "data"))
    assert status == 1 and f"{other} is of another data set" in text
    assert os.listdir(tmp_path / "data") == [other] and (tmp_path / "data" / other).read_text() == "precious"


def test_the_same_file_can_be_prepared_again_and_another_of_its_name_cannot(tmp_path):
    rows = "".join(json.dumps({**LIMA, "instruction": f"q {i}"}) + "\n" for i in range(30))
    paths = []
    for folder in "ab":
        (tmp_path / folder).mkdir()
        paths.append(written(tmp_path / folder / "my.jsonl", rows))
    out = str(tmp_path / "out")
    assert [run_in(prepare, path, "--out", out)[0] for path in (paths[0], paths[0], paths[1])] == [0, 0, 1]


def test_the_tokens_shown_in_brackets_are_those_that_are_trained():
    tokenizer = Tokenizer.load(os.path.join(ROOT, "data", "tiny"))
    row = {**LIMA, "output": "lima , of course"}
    idx, targets, _ = collate(encode([row], tokenizer, 256), 256)
    trained = [tokenizer.decode([t]) for t in targets[0].tolist() if t >= 0]
    assert prepare.show(row, tokenizer) == template(row) + "".join(f"[{t}]" for t in trained)


def test_rows_counted_as_too_long_are_those_that_training_refuses(tmp_path):
    tokenizer = Tokenizer.load(os.path.join(ROOT, "data", "tiny"))
    rows = [{**LIMA, "input": "cat " * n} for n in range(200, 280)]
    refused = 0
    for row in rows:
        try:
            encode([row], tokenizer, 256)
        except ValueError:
            refused += 1
    line = [line for line in prepare.describe({"train": rows}, tokenizer, 256, "tiny") if line.startswith("train ")][0]
    assert 0 < refused < 80 and line.split()[-1] == str(refused)


# -- p3 ----------------------------------------------------------------------------------------------------------------


def test_p3_s_rows_are_chosen_by_its_rule(monkeypatch):
    """From templates of numbered rows, some too long, and two that also stand in training."""
    monkeypatch.setattr(p3, "check", lambda splits: None)

    def row(template, i):
        text = "x" * 700 if i % 10 == 0 else f" {template} {i}\n"
        return {"instruction": text, "input": "", "output": "yes<|endoftext|>"}

    rows = {name: [row(name, i) for i in range(120)] for names in p3.TEMPLATES.values() for name in names}
    train, unseen = p3.TEMPLATES["train"], p3.TEMPLATES["test_tasks"]
    rows[unseen[0]][1:3] = [row(train[0], 1), row(train[0], 2)]
    splits = p3.choose(rows)
    sizes = {split: len(part) for split, part in splits.items()}
    assert sizes == {
        "train": 98 * 60,
        "val": 98 * 4,
        "test": 98 * 6,
        "test_templates": 19 * 30,
        "test_tasks": 13 * 30 - 2,
    }
    first = [row for row in splits["train"] if row["task"] == train[0]]
    assert first[0] == {"instruction": f"{train[0]} 1", "input": "", "output": "yes", "task": train[0]}
    assert first[-1]["instruction"] == f"{train[0]} 66" and splits["val"][0]["instruction"] == f"{train[0]} 67"
    families = {split: {p3.family(row["task"]) for row in part} for split, part in splits.items()}
    assert families["test_templates"] < families["train"] and not families["test_tasks"] & families["train"]


def test_p3_that_is_not_ours_is_refused_and_the_files_that_are_missing_are_named(tmp_path):
    for name in p3.HASHES:
        rows = "".join(json.dumps({"prompt": f"{name} {i}", "completion": "yes"}) + "\n" for i in range(70))
        written(tmp_path / f"{name}.jsonl", rows)
    status, text = run_in(prepare, "p3", "--file", str(tmp_path), "--out", str(tmp_path / "p3"))
    assert status == 1 and "p3 does not give the rows of train that it should" in text
    assert not (tmp_path / "p3" / "train.jsonl").exists()
    os.remove(tmp_path / "qasc_is_correct_1.jsonl")
    status, text = run_in(prepare, "p3", "--file", str(tmp_path), "--out", str(tmp_path / "p3"))
    assert status == 1 and "no qasc_is_correct_1.jsonl there" in text and "and 127 more, or their folder" in text


def test_p3_s_checksums_are_those_of_the_rows_that_results_are_of():
    folder = shared("datasets", "p3")
    splits = load_splits(folder)
    p3.check(splits)
    templates = {row["task"] for rows in splits.values() for row in rows}
    assert templates == set(p3.HASHES) and len(p3.HASHES) == 130 and len(p3.FAMILIES) == 22
    splits["val"][0]["output"] += "."
    with pytest.raises(ValueError, match="the rows of val"):
        p3.check(splits)
