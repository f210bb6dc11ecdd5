"""experiments.hidden: what the frozen model keeps without training, what runs write, and the teacher's answers."""

import json
import re

import pytest
import torch
from conftest import run_in
from test_hidden_runs import HIDDEN, moods, run  # noqa: F401 (fixtures)

import train
from data.files import read_rows
from experiments import compare, hidden
from experiments.report import Scores


def test_rouge_l_is_the_share_of_a_longest_common_subsequence():
    """Of "a b c d" and "b x d" it is "b d": 2 of 4 words and 2 of 3, so 2 * 2 / 7."""
    assert hidden.rouge_l("a b c d".split(), "b x d".split()) == pytest.approx(4 / 7)
    assert hidden.rouge_l(["a"], ["a"]) == hidden.rouge_l([], []) == 1.0 and hidden.rouge_l(["a"], []) == 0.0


@pytest.mark.parametrize("P", [3, 9])
def test_a_cut_that_keeps_all_words_is_the_model_that_sees(model, P):
    """Rows of four and six words, the first of which always stays: three more are all of one, and not of the other."""
    idx = torch.randint(1, 50, (2, 12))
    instr = torch.arange(12) < torch.tensor([[4], [6]])
    cut, seeing = model(idx, instr, hidden.Cut(model.config, P)), model(idx)
    torch.testing.assert_close(cut[0, 4:], seeing[0, 4:], atol=1e-3, rtol=1e-3)
    assert ((cut[1, 6:] - seeing[1, 6:]).abs().max() < 1e-3) == (P >= 5)


def test_what_needs_no_training_is_scored_row_by_row(moods, tmp_path, capsys):  # noqa: F811
    out = str(tmp_path / "scores.npz")
    status, text = run_in(hidden, "untrained", "--init", "tiny", "--data", moods, "--P", "1", "2", "--out", out)
    assert status == 0, text
    scores = Scores(out)
    assert list(scores.seeds) == ["frozen", "blind", "cut-1", "means-1", "cut-2", "means-2"]
    seeing, blind = (scores.get(name, "test", "kl")[0] for name in ("frozen", "blind"))
    assert not seeing.any() and len(blind) == 64 and (blind > 0).all()
    status, text = run_in(hidden, "shares", out)
    assert status == 0 and re.search(r"\| frozen \| 0.000 \| 100.0% \(100.0% to 100.0%\)", text), text
    assert re.search(r"\| blind \| \d.\d+ \| 0.0% \(0.0% to 0.0%\)", text)
    means = 1 - scores.get("means-2", "test", "kl")[0].sum() / blind.sum()
    assert f"| {means:.1%} (" in next(line for line in text.splitlines() if line.startswith("| means-2 "))
    status, text = run_in(hidden, "shares", out, "--split", "val")
    assert status == 1 and "error: " in text


def test_what_a_run_writes_is_compared_with_the_model_that_sees(run, moods, tmp_path):  # noqa: F811
    out = str(tmp_path / "texts.json")
    status, text = run_in(hidden, "texts", run, "--data", moods, "--new", "4", "--out", out)
    assert status == 0 and f"{'frozen':30}  the same 100.0%  ROUGE-L 1.000" in text, text
    with open(out) as f:
        written = json.load(f)["written"]
    assert list(written) == ["frozen", "blind", run] and all(len(texts) == 64 for texts in written.values())


def test_rows_without_outputs_get_the_answers_of_the_model_that_sees_and_can_be_trained_on(tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", str(tmp_path / "answers")
    words = ["plural of mouse", "past of go", "young of dog", "capital of peru"]
    rows = [
        {"instruction": f"be {mood} :", "input": f"the {what} ?"}
        for what in words
        for mood in ("short", "rude", "slow")
    ]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    status, text = run_in(hidden, "answers", "--init", "tiny", "--data", str(prompts), "--new", "5", "--out", out)
    assert status == 0 and "train: " in text, text
    written = [row for split in ("train", "val", "test") for row in read_rows(f"{out}/{split}.jsonl")]
    assert {(row["instruction"], row["input"]) for row in written} <= {tuple(row.values()) for row in rows} and written
    assert all(row["output"].strip() for row in written)
    train.main([*HIDDEN, "--data", out, "--out", str(tmp_path / "run")])
    prompts.write_text('{"instruction": "x"}')
    status, text = run_in(hidden, "answers", "--init", "tiny", "--data", str(prompts), "--out", out)
    assert status == 1 and "line 1: input is None, and should be text" in text


def test_rows_are_chosen_by_their_input_and_their_length():
    row = {"instruction": "abc", "input": "de", "output": "f"}
    assert hidden.choose([row, {**row, "input": " "}, {**row, "output": "fg"}], 6) == [row]


def test_worked_examples_are_other_rows_of_the_task_and_of_training_where_it_has_some():
    row = lambda task, i: {"instruction": f"{task} {i}", "input": "", "output": f"{i} !", "task": task}
    splits = {"train": [row("a", i) for i in range(4)], "test": [row("a", 9)] + [row("b", i) for i in range(3)]}
    written = hidden.worked_examples(splits, 2, 99)
    assert [len(rows) for rows in written.values()] == [4, 4]
    for rows in written.values():
        for made in rows:
            shown = [text.split("\n") for text in made["instruction"].split("\n\n")]
            assert len(shown) == 2 and all(answer == f"{question[2:]} !" for question, answer in shown)
            questions = {question for question, _ in shown}
            assert len(questions) == 2 and made["input"] not in questions
            assert questions <= {row["instruction"] for row in splits["train" if made["task"] == "a" else "test"]}
            assert all(question.startswith(made["task"]) for question in questions)
    assert (
        hidden.worked_examples(splits, 3, 99)["test"][1:] == [] and hidden.worked_examples(splits, 2, 4)["train"] == []
    )


def test_a_wrong_split_or_row_is_one_line_and_nothing_is_written(moods, run, tmp_path):  # noqa: F811
    for args in (["untrained", "--init", "tiny"], ["texts", run]):
        status, text = run_in(hidden, *args, "--data", moods, "--split", "tst", "--out", str(tmp_path / "a" / "b"))
        assert status == 1 and "has no tst: --split can be train, val, test" in text and "Traceback" not in text
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"instruction": 5, "input": "x"}')
    status, text = run_in(hidden, "answers", "--init", "tiny", "--data", str(prompts), "--out", str(tmp_path / "c"))
    assert status == 1 and "instruction is 5, and should be text" in text and not (tmp_path / "c").exists()
    missing = str(tmp_path / "none.jsonl")  # noticed before the model is looked for
    status, text = run_in(hidden, "answers", "--init", "no model", "--data", missing, "--out", str(tmp_path / "c"))
    assert status == 1 and f"no data at {missing}" in text and not (tmp_path / "c").exists()


def test_a_method_that_cannot_act_on_a_table_s_rows_is_found_before_any_work(tmp_path):
    status, text = run_in(compare, "hidden", "--methods", "prompt", "--out", str(tmp_path / "x"))
    assert status == 2 and "prompt acts on the whole prompt: --hide-instruction is for" in text
    assert not (tmp_path / "x").exists()
