"""Rows from files of any format, shape and name: each is used, refused or named, and none vanishes."""

import codecs
import csv
import io
import json
import os
import random

import pytest
from conftest import shared

from data import template
from data.files import from_known_format, load_splits, read_rows, split_by_instruction

LIMA = {"instruction": "what is the capital of peru ?", "input": "", "output": "lima"}
SAY = [{"instruction": f"say {i}", "output": f"w{i}"} for i in range(30)]


def written(path, content):
    """A file's path, after its content has been written."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_table(rows, **dialect):
    """Rows as a CSV writer writes them: what holds a separator or a quote is quoted."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


# -- Formats -----------------------------------------------------------------------------------------------------------


TRICKY = [
    {"instruction": 'what does "3" mean ?', "output": 'he said "w3"'},
    {"instruction": "two\nlines; a, b\tc", "output": '"all of it"'},
    {"instruction": "日本 ?", "output": "    indented\n        more"},
    *SAY,
]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", json.dumps(TRICKY)),
        ("a.json", json.dumps({"version": "1", "data": TRICKY}, indent=1)),
        ("a.json", lines(TRICKY)),
        ("a.JSONL", lines(TRICKY)),
        ("a.ndjson", lines(TRICKY).replace("\n", "\r")),
        ("a.jsonl", json.dumps(TRICKY)),
        ("a.jsonl", lines(TRICKY).encode("utf-16")),
        ("a.csv", as_table(TRICKY).encode("utf-8-sig")),
        ("a.csv", as_table(TRICKY).encode("utf-16")),
        ("a.CSV", as_table(TRICKY, delimiter=";")),
        ("a.csv", "sep=;\r\n" + as_table(TRICKY, delimiter=";")),
        ("a.csv", as_table(TRICKY, delimiter="\t")),
        ("a.csv", as_table(TRICKY, quoting=csv.QUOTE_ALL)),
        ("a.csv", "\n" + as_table(TRICKY) + ",\r\n,\r\n"),
        ("a.csv", as_table([{**row, "": "", "  ": ""} for row in TRICKY])),
        ("a.tsv", as_table(TRICKY, delimiter="\t")),
        ("a.tsv", as_table(TRICKY, delimiter="\t", quoting=csv.QUOTE_ALL)),
        ("a.tsv", as_table(TRICKY, delimiter="\t", lineterminator="\r", quoting=csv.QUOTE_ALL)),
    ],
)
def test_the_same_rows_come_from_every_format(tmp_path, capsys, name, content):
    assert read_rows(written(tmp_path / name, content)) == TRICKY
    assert capsys.readouterr().err == ("ignored columns: version\n" if b"version" in os.fsencode(content) else "")


def test_quotes_of_a_table_with_tabs_are_text_if_its_writer_did_not_quote(tmp_path):
    """As in GLUE's SST-2.  A few bad lines do not turn a quoted table into one of bare quotes, or the reverse."""
    bare = ['"wow', '"the film" is good', '"great"', 'it "was', "plain", '5" disk', 'end"']
    rows = [{"instruction": text, "output": str(i)} for i, text in enumerate(bare)]
    path = written(tmp_path / "a.tsv", "instruction\toutput\n" + "".join(f"{t}\t{i}\n" for i, t in enumerate(bare)))
    assert read_rows(path) == rows
    quoted = as_table([{"instruction": f'say "{i}"', "output": str(i)} for i in range(9)], delimiter="\t")
    path = written(tmp_path / "b.tsv", quoted + '"a" b\t1\r\n')
    with pytest.raises(ValueError, match="b.tsv, line 11: .* expected after"):
        read_rows(path)
    assert [row["instruction"] for row in read_rows(path, skip_bad=True)] == [f'say "{i}"' for i in range(9)]


def test_a_table_with_tabs_whose_cells_are_all_quoted_is_quoted(tmp_path):
    path = written(tmp_path / "a.tsv", as_table(SAY, delimiter="\t", quoting=csv.QUOTE_ALL))
    assert read_rows(path) == SAY


def test_two_bare_quotes_far_apart_do_not_swallow_the_lines_between_them(tmp_path):
    path = written(tmp_path / "a.tsv", 'instruction\toutput\n"wow\t1\nfine\t2\nhe said "\t3\n')
    assert [row["output"] for row in read_rows(path)] == ["1", "2", "3"]


def test_spaces_behind_the_separators_of_the_first_line_are_not_part_of_the_cells(tmp_path):
    path = written(tmp_path / "a.csv", 'instruction, input, output\nsay 3, "a, b", w3\n')
    assert read_rows(path) == [{"instruction": "say 3", "input": "a, b", "output": "w3"}]


@pytest.mark.parametrize("long", ["y" * 200_000, "y\n" * 100_000, "a,b\n" * 50_000])
def test_a_cell_that_is_too_long_is_one_bad_row(tmp_path, capsys, long):
    path = written(tmp_path / "a.csv", as_table([*SAY[:3], {"instruction": "x", "output": long}, *SAY[3:]]))
    with pytest.raises(ValueError, match="a.csv, lines? 5.*: a field larger than 131,072"):
        read_rows(path)
    assert read_rows(path, skip_bad=True) == SAY
    assert "left out 1 of 31 rows" in capsys.readouterr().err
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize(
    "content, kind",
    [
        (b"PAR1\x15\x04", "a Parquet file: convert it first"),
        (b"\x1f\x8b\x08\x00", "compressed by gzip: unpack it first"),
        (b"PK\x03\x04\x14", "a zip archive or an Excel file"),
        (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_a_file_that_is_no_text_is_called_what_it_is(tmp_path, name, content, kind):
    with pytest.raises(ValueError, match=f"{name} is {kind}"):
        read_rows(written(tmp_path / name, content))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"question": "?"}\n', "line 1: it has question; it needs instruction and output"),
        ("a.jsonl", '{"instruction": "?", "output": "x"}\n\n[1]\n', "line 3: it has .1.; it needs"),
        ("a.jsonl", '{"instruction": null, "output": "x"}\n', "line 1: instruction is None, and should be text"),
        ("a.jsonl", '{"instruction": "?", "output": ["x"]}\n', "line 1: output is .'x'., and should be text"),
        ("a.jsonl", '{"question": "?", "answer": NaN}\n', "line 1: output is empty"),
        ("a.jsonl", '{"question": "?", "answer": ["x"]}\n', "line 1: output is .'x'., and should be text"),
        ("a.jsonl", '{"instruction": "?", "output": " "}\n', "line 1: output is empty"),
        ("a.jsonl", '{"instruction": "?", "output": "x", "output": "y"}\n', "line 1: it has the key 'output' twice"),
        (
            "a.jsonl",
            '{"instruction": "?", "output": "x", "Output ": "y"}\n',
            "line 1: it has the column 'output' twice",
        ),
        ("a.jsonl", '{"instruction": "?", "output": "x", "system": ["y"]}\n', "system is .'y'., and should be text"),
        ("a.jsonl", '{"instruction": "?", "output": "x", "history": "y"}\n', "history is 'y', and should be a list"),
        ("a.jsonl", "{", "a.jsonl, line 1: .*--skip-bad"),
        ("a.jsonl", b'{"instruction": "?", "output": "x"}\n\xff\xfe\n', "line 2: it is not UTF-8"),
        ("a.jsonl", "\n", "a.jsonl has no rows"),
        ("a.jsonl", "", "a.jsonl has no rows"),
        ("a.json", "[]", "a.json has no rows"),
        ("a.json", "3", "a.json cannot be read: it is '3', and should be a list of rows"),
        ("a.json", '{"instruction": "?"}', "row 1: it has instruction; it needs instruction and output"),
        ("a.json", '{"train": [{"a": 1}], "test": [{"a": 1}]}', "several lists, train, test: put each into a file"),
        ("a.json", "[" * 100_000, "a.json cannot be read"),
        ("a.json", '[\n{"instruction": "?"\n', "a.json cannot be read: Expecting"),
        (
            "a.json",
            b'[{"instruction": "\xe9", "output": "x"}]',
            "row 1: instruction has half of a character, or a byte",
        ),
        ("a.jsonl", b"\xff\xfe{\x00}", "a.jsonl cannot be read: 'utf-16"),
        ("a.txt", "instruction,output\nx,y\n", "a.txt has no name that tells its format. We read .jsonl, .ndjson"),
        ("a.csv", "instruction,output\nx\n", "line 2: output is empty"),
        ("a.csv", "instruction,output\nx,y,z\n", "line 2: it has more columns than the first line: ..z.."),
        ("a.csv", "instruction,output,Output\nx,y,z\n", "its first line names the column 'output' twice"),
        ("a.csv", 'instruction,output\nx,y\nx,"y' + "y" * 200 + "\n", "line 3: unexpected end of data"),
        ("a.csv", b"instruction,output\na,b\nx,caf\xe9\n", "line 3: it is not UTF-8"),
        ("a.csv", '"instruction,output\n', "a.csv cannot be read: its first line"),
        ("a.json", '[{"instruction": "?", "output": "x"}]', "too few different instructions"),
    ],
)
def test_what_is_not_rows_is_refused_with_its_file(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_splits(written(tmp_path / name, content))


def test_bad_rows_are_left_out_on_request_and_counted(tmp_path, capsys):
    json_lines = [json.dumps(row).encode() for row in SAY]
    json_lines[10:10] = [b"{", b'"\xff"', b'{"output": "x"}', b"[" * 100_000]
    path = written(tmp_path / "a.jsonl", codecs.BOM_UTF8 + b"\r\n".join(json_lines))
    with pytest.raises(ValueError, match="a.jsonl, line 11: "):
        read_rows(path)
    assert read_rows(path, skip_bad=True) == SAY
    assert "left out 4 of 34 rows. The first: " in capsys.readouterr().err


def test_no_file_of_any_bytes_raises_anything_but_a_named_valueerror(tmp_path):
    """Real files with a piece cut out, doubled or replaced, under each extension."""
    rng = random.Random(0)
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]}
    texts = [lines([*TRICKY[:3], chat]).encode(), as_table(TRICKY[:6], delimiter=";").encode("utf-16"),
             as_table(TRICKY[:6], delimiter="\t").encode(), json.dumps({"data": TRICKY[:4]}).encode()]  # fmt: skip
    refused = 0
    for _ in range(400):
        text = rng.choice(texts)
        start, stop = sorted(rng.sample(range(len(text)), 2))
        piece = rng.choice([b"", text[start:stop] * 2, rng.randbytes(3), b'"', b"null", b"{}", b"\t", b"[1]", b"\r"])
        path = tmp_path / f"a{rng.choice(['.jsonl', '.json', '.csv', '.tsv'])}"
        try:
            rows = read_rows(written(path, text[:start] + piece + text[stop:]), skip_bad=rng.random() < 0.5)
        except ValueError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            refused += 1
        else:
            assert all(isinstance(row["output"], str) and row["output"].strip() for row in rows)
            assert all(template(row) is not None for row in rows)
    assert 100 < refused < 390


# -- Columns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        LIMA,
        {"instruction": LIMA["instruction"], "context": "", "response": "lima"},
        {"question": LIMA["instruction"], "answer": "lima"},
        {"prompt": LIMA["instruction"], "completion": "lima"},
        {"query": LIMA["instruction"], "response": "lima"},
        {" Instruction": LIMA["instruction"], "INPUT": None, "Output ": "lima"},
        {"messages": [{"role": "user", "content": LIMA["instruction"]}, {"role": "assistant", "content": "lima"}]},
        {"conversations": [{"from": "human", "value": LIMA["instruction"]}, {"from": "gpt", "value": "lima"}]},
        {"Messages": [{"Role": "User", "Content": LIMA["instruction"]}, {"Role": "Assistant ", "Content": "lima"}]},
        {"messages": json.dumps([{"role": "user", "content": LIMA["instruction"]},
                                 {"role": "assistant", "content": "lima"}])},
        {"prompt": [{"role": "user", "content": LIMA["instruction"]}],
         "completion": [{"role": "assistant", "content": "lima"}]},
    ],
)  # fmt: skip
def test_rows_of_well_known_shapes_are_ours(row):
    ignored = set()
    row = from_known_format(row, ignored)
    assert {key: row.get(key, "") for key in LIMA} == LIMA and not ignored and "history" not in row


def test_a_column_that_is_empty_gives_way_to_another_of_its_kind():
    ignored = set()
    row = from_known_format({"instruction": "", "question": "a ?", "input": "", "context": "b", "output": "c"}, ignored)
    assert row == {"instruction": "a ?", "input": "b", "output": "c"} and not ignored
    row = from_known_format({**LIMA, "input": "x", "context": "y", "response": "z"}, ignored)
    assert row == {**LIMA, "input": "x"} and ignored == {"context", "response"}


def test_numbers_under_another_name_than_ours_are_text():
    assert from_known_format({"question": "1 + 2 ?", "answer": 3})["output"] == "3"
    assert from_known_format({"question": "is it ?", "answer": True})["output"] == "true"


@pytest.mark.parametrize("output", ["output", "response", "answer", "completion", " Output"])
def test_a_prompt_is_an_instruction_whatever_stands_beside_it(output):
    """Text is plain where --template text says so, never because of the names of two columns."""
    assert from_known_format({"prompt": "a", output: "b", "end": False}) == {
        "instruction": "a",
        "output": "b",
        "end": False,
    }
    assert from_known_format({"prompt": "a", "output": "b", "input": "c"})["instruction"] == "a"
    assert template(from_known_format({"prompt": "a", "output": "b", "system": "c"})) == "Instruction: c\na\nResponse:"


def test_an_instruction_is_read_even_where_a_row_has_a_prompt_too():
    assert template(from_known_format({**LIMA, "prompt": "Below is ... lima"})) == template(LIMA)


def test_unused_columns_are_named_once_for_all_files_and_not_where_they_are_empty(tmp_path, capsys):
    rows = [{"id": i, **row, "source": None, "Topic": "t" if i == 7 else "", "tags": []} for i, row in enumerate(SAY)]
    for name in ("train", "test", "val"):
        written(tmp_path / f"{name}.jsonl", lines(rows))
    splits = load_splits(str(tmp_path))
    assert capsys.readouterr().err == "ignored columns: id, topic\n"
    assert splits["val"] == SAY


def test_an_end_or_a_task_that_is_not_ours_is_a_column_like_others():
    ignored = set()
    row = from_known_format({**LIMA, "end": "12:30", "task": ["a"]}, ignored)
    assert row == LIMA and ignored == {"end", "task"}
    assert from_known_format({**LIMA, "task": 7})["task"] == "7"


@pytest.mark.parametrize(
    "header", ["instruction, input,output", "instruction,Input,output", "Instruction ,INPUT, Output"]
)
def test_a_first_line_s_spaces_and_case_lose_no_column(tmp_path, header):
    assert read_rows(written(tmp_path / "a.csv", f"{header}\nsay,three,w3\n")) == [
        {"instruction": "say", "input": "three", "output": "w3"}
    ]


# -- Chats -------------------------------------------------------------------------------------------------------------


def chat(*turns):
    return {"messages": [dict(zip(("role", "content", "weight"), turn)) for turn in turns]}


FRENCH = "Instruction: System: answer in french\nUser: say 3\nAssistant: ok\nUser: and 3 ?\nResponse:"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "and 3 ?", "output": "w3", "system": "answer in french", "history": [["say 3", "ok"]]},
        {"instruction": "and 3 ?", "output": "w3", "system_prompt": "answer in french", "input": "",
         "history": [{"role": "user", "content": "say 3"}, {"from": "gpt", "value": "ok"}]},
        {"question": "and 3 ?", "answer": "w3", "System": "answer in french", "history": '[["say 3", "ok"]]'},
        chat(("system", "answer in french"), ("user", "say 3"), ("assistant", "ok"), ("user", "and 3 ?"),
             ("assistant", "w3")),
        {"system": "answer in french", **chat(("user", "say 3"), ("assistant", "ok"), ("user", "and 3 ?"),
                                              ("assistant", "w3"), ("user", "thanks"))},
        {"system": "answer in french", "history": [["say 3", "ok"]], **chat(("user", "and 3 ?"), ("assistant", "w3"))},
    ],
)  # fmt: skip
def test_system_messages_and_earlier_turns_are_read_before_the_instruction(tmp_path, capsys, row):
    (row,) = read_rows(written(tmp_path / "a.jsonl", lines([row])))
    assert (template(row), row["output"]) == (FRENCH, "w3")
    assert (row["instruction"], row["history"][0]) == ("and 3 ?", {"role": "system", "content": "answer in french"})
    assert read_rows(written(tmp_path / "b.jsonl", lines([row]))) == [row] and not capsys.readouterr().err


def test_a_system_message_before_a_single_question_needs_no_names():
    row = from_known_format(chat(("system", "be brief"), ("user", "hello"), ("assistant", "hi")))
    assert template(row) == "Instruction: be brief\nhello\nResponse:"
    row = from_known_format({**LIMA, "input": "x", "system": "be brief"})
    assert template(row) == f"Instruction: be brief\n{LIMA['instruction']}\nInput: x\nResponse:"
    assert "history" not in from_known_format(chat(("system", ""), ("user", "a ?"), ("assistant", "b")))


def test_an_answer_to_another_than_a_user_is_kept_in_order():
    row = from_known_format(chat(("user", "a ?"), ("assistant", "search"), ("tool", "12"), ("assistant", "b")))
    assert template(row) == "Instruction: User: a ?\nAssistant: search\nTool: 12\nResponse:" and row["output"] == "b"


@pytest.mark.parametrize("zero", [0, 0.0, "0", False])
def test_the_last_answer_with_a_weight_is_learned(zero):
    row = from_known_format(chat(("user", "a ?"), ("assistant", "b", 1), ("user", "c ?"), ("assistant", "d", zero)))
    assert (row["instruction"], row["output"]) == ("a ?", "b")
    row = from_known_format(chat(("user", "a ?"), ("assistant", "b", zero), ("user", "c ?"), ("assistant", "d", None)))
    assert row["output"] == "d" and "Assistant: b" in template(row)


def test_unused_keys_of_messages_are_named(tmp_path, capsys):
    row = {"id": 1, **chat(("user", "a ?"), ("assistant", "b"))}
    row["messages"][0] |= {"name": "bob", "tool_calls": []}
    read_rows(written(tmp_path / "a.jsonl", lines([row])))
    assert capsys.readouterr().err == "ignored columns: id, messages.name\n"


TOOL_CALLS = [
    {"content": None, "tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": "{}"}}]},
    {"content": "", "tool_calls": [{"name": "look_up"}]},
    {"content": "wait", "Tool_Calls": [{"name": "look_up"}]},
    {"tool_calls": [{"name": "look_up"}]},
    {"content": None, "function_call": {"name": "look_up", "arguments": "{}"}},
]


def chat_with_call(call):
    """A chat whose first answer calls a tool."""
    record = chat(("user", "a ?"), ("assistant", ""), ("tool", "12"), ("assistant", "b"))
    record["messages"][1] = {"role": "assistant", **call}
    return record


def test_tools_that_are_only_offered_are_a_column_that_is_named():
    ignored = set()
    record = {**chat(("user", "a ?"), ("assistant", "b")), "tools": [{"name": "look_up"}]}
    record["messages"][1] |= {"tool_calls": None, "function_call": {}}
    assert from_known_format(record, ignored)["output"] == "b" and ignored == {"tools"}


@pytest.mark.parametrize(
    "row, message",
    [
        *((chat_with_call(call), "a message of its messages has tool calls, .*'look_up'") for call in TOOL_CALLS),
        ({"history": chat_with_call(TOOL_CALLS[0])["messages"], "instruction": "a", "output": "b"}, "has tool calls"),
        ({"prompt": "a ?", "completion": chat_with_call(TOOL_CALLS[1])["messages"][1:2]}, "has tool calls"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a message has a part of type 'text'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]}, "part of type 'image'"),
        ({"messages": [{"role": 7, "content": "a"}]}, "no role and content, both text"),
        ({"messages": ["hello"]}, "no role and content, both text: hello"),
        ({"messages": {"role": "user"}}, "messages is .*, and should be a list"),
        ({"messages": "[{'role': 'user'}]"}, "should be a list in JSON"),
        (chat(("user", "a")), "no answer of an assistant to anything. Their roles: user"),
        (chat(("Narrator", "a"), ("hero", "b")), "Their roles: narrator, hero"),
        (chat(("assistant", "a")), "no answer of an assistant"),
        (chat(("system", "a"), ("assistant", "b")), "no answer of an assistant"),
        (chat(("user", "a"), ("assistant", "b", 0)), "each answer of its messages has weight 0"),
        (chat(("user", "a"), ("assistant", "b", "much")), "has the weight 'much', and should have a number"),
        (chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "")), "output is empty"),
        (chat(("user", "half \ud800"), ("assistant", "b")), "half of a character"),
        (chat(("system", "half \ud800"), ("user", "a"), ("assistant", "b")), "system has half of a character"),
    ],
)
def test_a_chat_without_an_answer_to_learn_is_a_bad_row(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"a.jsonl, line 1: .*{message}"):
        read_rows(written(tmp_path / "a.jsonl", lines([row, *SAY])))
    assert read_rows(str(tmp_path / "a.jsonl"), skip_bad=True) == SAY


# -- Splits ------------------------------------------------------------------------------------------------------------


def folder_of(tmp_path, *names):
    for name in names:
        content = lines({"instruction": f"{name} {i}", "output": "x"} for i in range(30))
        written(tmp_path / name, content)
    return str(tmp_path)


@pytest.mark.parametrize(
    "name", ["validation.jsonl", "valid.jsonl", "dev.ndjson", "val.json", "Validation.JSONL", "eval.jsonl"]
)
def test_a_validation_file_of_any_name_is_the_validation_set(tmp_path, capsys, name):
    splits = load_splits(folder_of(tmp_path, "train.jsonl", "test.jsonl", name))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 30, "val": 30, "test": 30}
    assert splits["val"][0]["instruction"].startswith(name) and not capsys.readouterr().err


def test_data_files_that_are_not_used_are_named(tmp_path, capsys):
    used = ["training.jsonl", "test_hard.jsonl", "dev.jsonl"]
    harmless = ["README.md", "prepared.json", ".train.jsonl", "train.py", "LICENSE", "model.safetensors"]
    others = ["more.csv", "validation.parquet", "test.jsonl.gz", "test.txt", "data.xlsx"]
    splits = load_splits(folder_of(tmp_path, *used, *harmless, *others))
    assert sorted(splits) == ["test_hard", "train", "val"]
    assert capsys.readouterr().err.startswith(f"not used: {', '.join(sorted(others))} (")


def test_a_split_that_is_there_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has val twice, as dev.jsonl and val.jsonl: remove one"):
        load_splits(folder_of(tmp_path, "train.jsonl", "val.jsonl", "dev.jsonl"))


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data at"):
        load_splits(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="no data in .*: no train.jsonl.* It has nothing"):
        load_splits(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="It has train.parquet, validation.jsonl"):
        load_splits(folder_of(tmp_path, "train.parquet", "validation.jsonl"))


def test_a_split_never_has_an_instruction_on_both_sides():
    rows = [{"instruction": f"q{i // 3}", "output": str(i)} for i in range(90)]
    rest, share = split_by_instruction(rows)
    assert len(rest) + len(share) == 90 and len(share) == 9
    assert not {row["instruction"] for row in rest} & {row["instruction"] for row in share}


def test_e2e_s_folder_is_split_by_meaning_and_keeps_its_test_file():
    rows = load_splits(shared("datasets", "e2e"))
    assert sorted(rows) == ["test", "train", "val"] and len(rows["test"]) == 4693
    assert len(rows["train"]) + len(rows["val"]) == 4672
    assert not {row["input"] for row in rows["train"]} & {row["input"] for row in rows["val"]}


@pytest.mark.parametrize("question, answer", [("question", "answer"), ("instruction", "output")])
def test_nan_is_a_value_that_is_missing_and_no_word(question, answer, tmp_path):
    record = {question: "?", answer: float("nan")}
    with pytest.raises(ValueError, match="line 1: output is empty"):
        read_rows(written(tmp_path / "a.jsonl", lines([record])))
    row = from_known_format({**LIMA, "input": float("nan"), "history": float("nan"), "system": float("nan")})
    assert not row.get("input") and "history" not in row


@pytest.mark.parametrize("value, text", [(3, "3"), (True, "true"), (0.5, "0.5")])
def test_a_number_is_text_under_any_name(value, text):
    assert from_known_format({"instruction": "?", "output": value})["output"] == text
    assert from_known_format({"question": "?", "answer": value})["output"] == text


def test_a_date_is_text_also_where_all_rows_have_one(tmp_path):
    rows = [{"instruction": "when ?", "output": date} for date in ("1969-07-20", "2024-05-01T10:00:00Z")]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, content in ("a.jsonl", lines), ("a.json", json.dumps(rows)), ("a.csv", as_table(rows)):
        assert read_rows(written(tmp_path / name, content)) == rows


@pytest.mark.parametrize("name", ["weight", "train", "loss"])
def test_an_answer_that_is_marked_as_not_to_be_learned_is_read_alone(name):
    record = chat(("user", "a ?"), ("assistant", "b"), ("user", "c ?"), ("assistant", "d"))
    record["messages"][3][name] = False
    assert from_known_format(record)["output"] == "b"
    record["messages"][3][name] = True
    assert from_known_format(record)["output"] == "d"


def test_parts_of_a_message_that_are_text_are_one_text():
    record = chat(("user", [{"type": "text", "text": "a "}, {"type": "text", "text": "?"}]), ("assistant", "b"))
    assert from_known_format(record)["instruction"] == "a ?"


def test_a_column_that_is_called_as_e2e_s_is_one_only_where_nothing_else_says_what_is_asked():
    row = from_known_format({"instruction": "Summarize.", "output": "b", "mr": 12, "ref": "main"})
    assert (row["instruction"], row["output"]) == ("Summarize.", "b")
    assert from_known_format({"mr": "name[x]", "ref": "b"})["instruction"] == "Describe the restaurant."
    for others in ({"input": "a", "output": "b"}, {"output": "b"}, {"title": "a"}):  # a merge request's, and no E2E's
        with pytest.raises(ValueError, match="it has mr, ref, .*; it needs instruction and output"):
            from_known_format({"mr": 12, "ref": "main", **others})


USER, ANSWER, SYSTEM = ({"role": role, "content": text} for role, text in zip(("user", "assistant", "system"), "abs"))


@pytest.mark.parametrize(
    "row, history",
    [
        ({"prompt": "a", "completion": [ANSWER]}, []),
        ({"prompt": "a", "completion": [USER, ANSWER]}, []),
        ({"prompt": "a", "response": ANSWER}, []),
        ({"prompt": [USER], "completion": "b"}, []),
        ({"prompt": "a", "completion": json.dumps([USER, ANSWER])}, []),
        ({"output": [USER, ANSWER]}, []),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM]),
        ({"prompt": [SYSTEM, USER], "completion": [USER, ANSWER]}, [SYSTEM]),
        ({"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"prompt": [SYSTEM, USER], "completion": [SYSTEM, USER, ANSWER]}, [SYSTEM]),
    ],
)
def test_messages_in_place_of_a_text_are_a_chat(row, history):
    row = from_known_format(row)
    assert [row["instruction"], row.get("input", ""), row["output"], row.get("history", [])] == ["a", "", "b", history]


def test_an_answer_of_one_message_leaves_the_other_columns_what_they_are():
    assert from_known_format({"instruction": "a", "input": "x", "output": [ANSWER]})["input"] == "x"


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"prompt": "c", "completion": [USER, ANSWER]},
            "its completion is a chat that begins otherwise than its prompt",
        ),
        ({"prompt": "a", "completion": str([USER, ANSWER])}, "completion is .*, and should be a list in JSON"),
        ({"prompt": [USER, ANSWER, USER], "completion": ""}, "output is empty"),
        ({"prompt": [USER, ANSWER]}, "it needs instruction and output"),
        (
            {"prompt": "a", "completion": {"b": 1}},
            "should be text .data.prepare --map 'output={COLUMN}' takes JSON",
        ),
    ],
)
def test_messages_that_are_not_a_text_s_chat_are_a_bad_row(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_rows(written(tmp_path / "a.jsonl", lines([row])))


@pytest.mark.parametrize(
    "output", ['[{"value": 3, "unit": "kg"}]', '[{"from": "a", "to": "b"}]', "[{'value': 3}]", "[{x"]
)
def test_json_that_is_no_chat_is_text(output):
    assert from_known_format({"instruction": "a", "output": output})["output"] == output
