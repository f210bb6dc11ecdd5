"""Runs of --hide-instruction from the command line: training, asking, saved instructions, and what is refused."""

import os
import re

import pytest
import torch
from conftest import SMALL, log_without_speed, run_in, same_run, shared

import sample
import train
from data import encode, open_data
from data.files import write_rows
from data.scores import Score, score_table
from data.template import PLAIN, make_template
from data.tokenizer import Tokenizer
from experiments.tasks import apart, make_tasks
from plumbing.hub import TINY

HIDDEN = [*SMALL, "--hide-instruction", "--distill"]


@pytest.fixture(scope="module")
def moods(tmp_path_factory):
    """Rows whose instruction is a mood, and whose input a question."""
    folder = tmp_path_factory.mktemp("moods")
    for name, rows in make_tasks(4).items():
        write_rows(str(folder / f"{name}.jsonl"), [apart(row) for row in rows[:64]])
    return str(folder)


@pytest.fixture(scope="module")
def run(moods, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("hidden") / "run")
    train.main([*HIDDEN, "--data", moods, "--out", out])
    return out


def test_a_run_says_what_the_model_does_that_sees_and_that_is_blind_and_remembers_that_it_hides(
    moods, tmp_path, capsys
):
    out = str(tmp_path / "run")
    train.main([*HIDDEN, "--data", moods, "--out", out])
    text = capsys.readouterr().out
    assert "reads of all instructions: 0.00 GB, kept" in text
    assert "frozen, seeing" in text and "frozen, blind" in text and "with summary" in text and "divergence" in text
    assert f"try it: python sample.py {out} 'i want it" in text or "--input" in text
    _, _, _, (tuner,) = sample.open_runs([out])
    assert tuner.act == "hidden"


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_the_titles_of_a_table_end_where_their_columns_do(kl):
    columns = {
        "frozen, seeing": {"test": Score(0.5, 1.0, 0.0)},
        "with a-method-of-a-long-name-indeed": {"test": Score(0.5, 1.0, kl)},
    }
    titles, heads, row = score_table(columns, {"test": 10}, "exact match")
    last = "divergence" if kl else "nats/token"
    ends = [m.end() for m in re.finditer(last, heads)]
    assert ends == [titles.index("seeing") + len("seeing"), len(titles)] and len(row) == len(heads) == len(titles)
    assert not re.search(r"[a-z]exact", heads)


def test_a_resumed_run_is_the_run_that_never_stopped(moods, run, tmp_path, monkeypatch):
    out, steps, real = str(tmp_path / "run"), [], train.distributed.all_reduce_grads
    spy = lambda p, loss, n, stop: (steps.append(loss), (*real(p, loss, n, stop)[:2], len(steps) == 3))[1]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.distributed, "all_reduce_grads", spy)
        train.main([*HIDDEN, "--data", moods, "--out", out])
    train.main([*HIDDEN, "--data", moods, "--out", out, "--resume"])
    assert log_without_speed(out) == log_without_speed(run)
    same_run(out, run)


def test_reading_anew_at_each_step_changes_nothing(moods, run, tmp_path):
    train.main([*HIDDEN, "--data", moods, "--out", str(tmp_path / "run"), "--keep-reads", "0"])
    for a, b in zip(log_without_speed(str(tmp_path / "run")), log_without_speed(run)):
        assert a == pytest.approx(b, abs=1e-4)


def test_one_instruction_is_asked_of_several_inputs_saved_and_used_without_its_words(run, tmp_path, capsys):
    path, about = str(tmp_path / "polite.safetensors"), ["the plural of mouse ?", "the past of go ?"]
    inputs = [part for text in about for part in ("--input", text)]
    sample.main([run, "be polite :", *inputs, "--save", path])
    saved, *answers = capsys.readouterr().out.splitlines()
    assert saved == f"saved {path}: soft tokens of the instruction, to be kept as safely as its text"
    assert len(answers) == 2
    sample.main([run, f"@{path}", *inputs])
    assert capsys.readouterr().out.splitlines() == answers
    sample.main([run, "make it short :", f"@{path}", "--input", about[0]])
    assert capsys.readouterr().out.splitlines()[1] == answers[0]
    sample.main([run, f"@{path}", *inputs, "--batch-size", "1"])
    assert capsys.readouterr().out.splitlines() == answers
    status, text = run_in(sample, run, f"@{path}", *inputs[:2], "--system", "be brief")
    assert status == 1 and "has been read already, without --system" in text
    os.remove(path)
    sample.main([run, "be polite :", "--save", path])  # no question: it is saved all the same
    assert os.path.exists(path) and len(capsys.readouterr().out.splitlines()) == 1
    with open(path, "rb") as f:
        assert b"polite" not in f.read()


def test_a_question_in_a_batch_is_answered_as_it_is_alone_and_as_training_scores_it(run, moods):
    model, tokenizer, template, (tuner,) = sample.open_runs([run])
    rows = open_data(moods)["test"][:8]
    together = sample.answer(model, tokenizer, rows, tuner, template=template)
    assert together == [sample.answer(model, tokenizer, [row], tuner, template=template)[0] for row in rows]
    assert together == sample.answer(model, tokenizer, rows, tuner, template=template, batch_size=3)
    long = {**rows[0], "input": "cat " * 300}
    refused, found = sample.answers(model, tokenizer, [long, rows[1]], tuner, template=template)
    assert "room for 256" in str(refused.error) and found.text == together[1]
    (example,) = encode(rows[:1], tokenizer, 256, hide=True)
    idx = torch.tensor([example.prompt])
    instr = torch.arange(idx.shape[1])[None] < example.hidden
    first = model(idx, instr, tuner)[0, -1].argmax().item()
    assert together[0].startswith(tokenizer.decode([first]).strip())


@pytest.mark.parametrize(
    "args, says",
    [
        (["be polite :"], "a hidden instruction wants an input behind it (--input; "),
        (["@nowhere", "--input", "x"], "nowhere"),
        (["@{run}/best.pt", "--input", "x"], "is not a safetensors file"),
        (["be polite :", "be rude :", "--save", "x"], "--save (one instruction) and @FILE are for one run"),
        (["be polite :", "--save", "x", "--frozen"], "--save (one instruction) and @FILE are for one run"),
    ],
)
def test_what_a_hidden_run_cannot_be_asked_is_one_line(run, args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text = run_in(sample, run, *(arg.format(run=run) for arg in args))
    assert status and says in text and text.splitlines()[-1].startswith("error: ") and not os.listdir(tmp_path)


def test_a_run_that_hides_nothing_neither_saves_nor_takes_an_instruction(trained, run, tmp_path, capsys):
    sample.main([run, "be polite :", "--save", str(tmp_path / "x")])
    for args in (["be polite :", "--save", str(tmp_path / "y")], [f"@{tmp_path / 'x'}"]):
        status, text = run_in(sample, trained, *args)
        assert status == 2 and "--save (one instruction) and @FILE are for one run of --hide-instruction" in text


def test_rows_without_an_input_are_refused_by_number_or_left_out_and_counted(moods, tmp_path, capsys):
    rows = open_data(moods)
    rows["train"][3]["input"] = ""
    for name, split in rows.items():
        write_rows(str(tmp_path / f"{name}.jsonl"), split)
    out = str(tmp_path / "run")
    status, text = run_in(train, *HIDDEN, "--data", str(tmp_path), "--out", out)
    wants = "train.jsonl, line 4: a hidden instruction wants an input behind it (--input; or --skip-bad, in training)"
    assert status == 1 and wants in text
    assert not os.path.exists(out)
    train.main([*HIDDEN, "--data", str(tmp_path), "--out", out, "--skip-bad"])
    assert "train: left out 1 of 64 rows, which have no input" in capsys.readouterr().err


def test_distilling_without_hiding_and_hiding_from_what_acts_on_all_are_refused(moods, tmp_path):
    out = ["--data", moods, "--out", str(tmp_path / "x")]
    status, text = run_in(train, *SMALL, *out, "--distill")
    assert status == 2 and "it goes with --hide-instruction" in text
    status, text = run_in(train, *HIDDEN, *out, "--method", "prompt")
    assert status == 2 and "prompt acts on the whole prompt: --hide-instruction is for iapt, summary" in text
    status, text = run_in(train, *HIDDEN, *out, "--act", "answer")
    assert status == 2 and "not allowed with argument" in text
    status, text = run_in(train, *SMALL, *out, "--hide-instruction", "--distill", "1.5")
    assert status == 2 and "argument --distill: must be from 0.0 to 1.0, got 1.5" in text


# -- Where an instruction ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("about", ["a cat", "Input: a cat\nResponse:", " Input: x "])
def test_the_two_halves_of_a_prompt_are_the_prompt_and_the_first_does_not_depend_on_the_input(about):
    tokenizer = Tokenizer.load(TINY)
    row = {"instruction": "be polite : Input: x", "input": about, "output": "b"}
    first, rest = PLAIN.split_ids(row, tokenizer)
    assert first + rest == PLAIN.prompt_ids(row, tokenizer)
    assert first == PLAIN.split_ids({**row, "input": "another thing"}, tokenizer)[0]
    (example,) = encode([row], tokenizer, 256, hide=True)
    assert example.prompt == first + rest and example.hidden == len(first)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("about", ["a cat", "assistant", "  a cat \n"])
def test_in_a_chat_the_input_and_all_behind_it_follow_the_instruction(about, tmp_path):
    pytest.importorskip("jinja2")
    tokenizer = Tokenizer.load(shared("tokenizers", "gpt2"))
    tokenizer.chat_template = CHATML
    template = make_template("chat", tokenizer)
    row = {"instruction": "Name it.", "input": about, "output": "b"}
    first, rest = template.split_ids(row, tokenizer)
    assert tokenizer.decode(first).rstrip().endswith("Name it.") and about.strip() in tokenizer.decode(rest)
    assert tokenizer.decode(rest).endswith("<|im_start|>assistant\n")


def test_explain_shows_the_words_of_the_hidden_instruction_alone(run, capsys):
    sample.main([run, "be polite :", "--input", "the plural of mouse ?", "--explain"])
    text = capsys.readouterr().out
    assert "polite" in text and "plural" not in text
