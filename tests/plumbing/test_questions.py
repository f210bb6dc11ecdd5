"""What sample.py is asked, in which batches, and how it prints the answers."""

import io
import json
import sys

import pytest
from conftest import SHIPPED, run_in

import sample
from data import PLAIN
from data.questions import Answer, as_arguments, read_question
from data.scores import before_and_after

CPU = ["--device", "cpu"]
REVERSE = "say the reverse of inside cat push light write ."
NEARLY_FULL = "cat " * 245  # of the 256 tokens that the shipped model takes
TOO_LONG = "cat " * 300


@pytest.fixture(scope="module")
def shipped():
    """(model, tokenizer, template, tuner) of the shipped run."""
    model, tokenizer, template, (tuner,) = sample.open_runs([SHIPPED])
    tuner.attach(model)
    return model, tokenizer, template, tuner


def asked(shipped, instructions, **settings):
    model, tokenizer, template, tuner = shipped
    rows = [{"instruction": text} for text in instructions]
    return sample.answers(model, tokenizer, rows, tuner, template=template, **settings)


# -- Batches -----------------------------------------------------------------------------------------------------------


def test_each_question_has_its_own_room(shipped):
    short, long = asked(shipped, [REVERSE, NEARLY_FULL])
    assert short == asked(shipped, [REVERSE])[0] and short.text == "write light push cat inside" and not short.cut
    assert long == asked(shipped, [NEARLY_FULL])[0] and long.text and not long.error


def test_a_question_that_is_too_long_is_refused_alone(capsys):
    with pytest.raises(SystemExit, match="1"):
        sample.main([SHIPPED, REVERSE, TOO_LONG, "the plural of mouse ?", *CPU])
    printed = capsys.readouterr()
    assert printed.out.split("\n") == ["write light push cat inside", "", "mice", ""]
    assert printed.err.startswith("error: question 2 of 3, 'cat cat ") and "this model has room for 256" in printed.err
    with pytest.raises(ValueError, match="room for 256"):
        sample.answer(*sample.open_model("tiny"), [{"instruction": TOO_LONG}])


def test_batches_are_of_similar_length_and_of_a_fixed_size_and_answers_in_the_order_of_the_questions(
    shipped, monkeypatch
):
    questions = [f"tell me the reverse of {'cat sun ' * (i * 7 % 12)}buy ." for i in range(12)] + [NEARLY_FULL]
    alone = [asked(shipped, [text])[0] for text in questions]
    sizes, real = [], sample.generate

    def spy(model, prompts, *args, **settings):
        sizes.append([len(prompt) for prompt in prompts])
        return real(model, prompts, *args, **settings)

    monkeypatch.setattr(sample, "generate", spy)
    assert asked(shipped, questions, batch_size=5) == alone
    assert [len(batch) for batch in sizes] == [5, 5, 2, 1] and sum(sizes, []) == sorted(sum(sizes, []))


def test_batches_draw_different_numbers(shipped):
    texts = [one.text for one in asked(shipped, ["tell me"] * 6, batch_size=1, temperature=2.0, max_new=8)]
    assert len(set(texts)) > 1
    again = asked(shipped, ["tell me"] * 6, batch_size=1, temperature=2.0, max_new=8)
    assert texts == [one.text for one in again]


# -- What is printed ---------------------------------------------------------------------------------------------------


def test_an_answer_that_was_cut_is_marked(capsys):
    sample.main([SHIPPED, REVERSE, "the plural of mouse ?", "--max-new", "2", *CPU])
    printed = capsys.readouterr()
    assert printed.out == "write light...\nmice\n"
    assert printed.err == "1 of 2 answers were cut (--max-new, or a shorter prompt)\n"
    for options in (["--max-new", "5"], ["--max-new", "6", "--beams", "2"]):  # five words, and then the end
        sample.main([SHIPPED, REVERSE, *options, *CPU])
        assert capsys.readouterr().out.endswith("...\n") == (options[1] == "5")


def test_so_it_is_where_a_run_shows_what_it_brought():
    rows, answers = (
        [{"instruction": "a ?", "output": "c" * 161}],
        {"x": [Answer("b\nb", True)], "y": [Answer("d" * 160)]},
    )
    question, cut, whole, wanted, _ = before_and_after(rows, answers, PLAIN)
    assert question == "Instruction: a ?" and cut.endswith(" b b...") and whole.endswith(" " + "d" * 160)
    assert wanted.endswith(" " + "c" * 157 + "...")


def test_rows_in_json_are_answered_by_rows_in_json_that_keep_their_columns(capsys, monkeypatch):
    questions = [
        {"id": 7, "instruction": "the plural of mouse ?", "answer": "wanted"},
        {"messages": [{"role": "user", "content": "the plural of mouse ?"}]},
        {"messages": [{"role": "user", "content": "the plural of mouse ?"}, {"role": "assistant", "content": "x"}]},
        {"question": "say the reverse of these words .", "context": "cat sun", "Output": None},
    ]
    texts = [
        *map(json.dumps, questions),
        "the plural of mouse ?",
        '{"broken',
        '{"id": 9}',
        json.dumps({"prompt": TOO_LONG}),
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts)))
    with pytest.raises(SystemExit, match="1"):
        sample.main([SHIPPED, "--json", *CPU])
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row.get("output") for row in rows] == ["mice", "mice", "mice", "sun cat", "mice", None, None, None]
    assert rows[0] == {**questions[0], "output": "mice", "cut": False} and len(rows[2]["messages"]) == 2
    assert [row["error"][:9] for row in rows[5:]] == ["it begins", "it has id", "a prompt "]
    assert printed.err.count("error: ") == 3 and "question 8 of 8" in printed.err
    status, text = run_in(sample, SHIPPED, "x", "--json", "--explain")
    assert status == 2 and "--json goes without --explain" in text


SYSTEM, USER, ANSWER = ({"role": role, "content": "x"} for role in ("system", "user", "assistant"))


@pytest.mark.parametrize(
    "row, options",
    [
        ({"instruction": "a ?"}, []),
        ({"instruction": "a ?", "input": "x\ny"}, ["--input"]),
        ({"instruction": " a ?", "history": [SYSTEM]}, ["--system"]),
        ({"instruction": "a ?", "input": "x", "history": [SYSTEM]}, ["--input", "--system"]),
        ({"instruction": "a ?", "history": [SYSTEM, USER, ANSWER]}, ["--json"]),
        ({"instruction": "a ?", "input": "é", "history": [USER, ANSWER]}, ["--json"]),
        ({"instruction": "", "input": "", "history": [USER, ANSWER, {"role": "tool", "content": "12"}]}, ["--json"]),
        ({"instruction": "a ?", "history": [SYSTEM, SYSTEM]}, ["--json"]),
        ({"instruction": "-5 + 3 ?"}, ["--json"]),
        ({"instruction": "a ?", "input": "-x"}, ["--json"]),
        ({"instruction": "@a"}, ["--json"]),
        ({"instruction": '{"a": 1}'}, []),
        ({"instruction": "", "input": "a"}, ["--json"]),
    ],
)
def test_the_printed_command_asks_what_the_table_was_made_with(row, options):
    arguments = as_arguments(row)
    assert [text for text in arguments if text.startswith("--")] == options
    args = sample.parse(["run", *arguments])
    _, again = read_question(args.prompts[0], (args.input or [""])[0], args.system, args.json)
    assert {key: again.get(key) or None for key in ("instruction", "input", "history")} == {
        key: row.get(key) or None for key in ("instruction", "input", "history")
    }
