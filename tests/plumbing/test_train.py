"""Whole runs on the shipped model, a few steps each: what they leave behind, and what is said where
something is wrong.
"""

import dataclasses
import functools
import importlib
import inspect
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SHIPPED, SMALL, run_in, same_run, shared, tensors

import sample
import train
from baselines import METHODS, build
from data import TINY, Example, Tokenizer, collate, encode, load_splits, prepare, scores
from data.files import label_words
from data.scores import accuracy, evaluate, score_examples
from data.tokenizer import END
from iapt import IAPT
from model import Config, Tuner
from plumbing import cli, explain
from plumbing.checkpoint import RunFolder, load_checkpoint
from plumbing.compiling import compile_parts
from plumbing.files import copy_tokenizer
from plumbing.pretrained import save_pretrained

CPU = ["--device", "cpu"]

# -- What a run does ---------------------------------------------------------------------------------------------------


def test_training_teaches_what_the_frozen_model_does_not_do(trained):
    log = RunFolder(trained).read_log()
    assert log[-1]["step"] == 30 and log[-1]["val"] < 5  # the frozen model alone: above 9
    assert os.path.getsize(os.path.join(trained, "best.pt")) < 1_000_000


def test_the_same_seed_is_the_same_run_and_another_seed_another(rows, short, tmp_path):
    for seed, same in (("0", True), ("1", False)):
        out = str(tmp_path / seed)
        train.main([*SMALL, "--data", rows, "--out", out, "--seed", seed])
        assert same_run(out, short) == same


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("options", [slow(["--compile"]), ["--checkpoint"], slow(["--compile", "--checkpoint"])])
def test_compile_and_checkpoint_act_and_change_no_result(options, rows, short, tmp_path, monkeypatch):
    quick = functools.partial(compile_parts, backend="eager")  # traces, and generates no code
    monkeypatch.setattr(train, "compile_parts", quick)
    acted, real = [], train.add_gradients

    def spy(model, tuner, *args):
        parts = (*model.h, *tuner.generators)
        acted.append((all(part._compiled_call_impl for part in parts), model.checkpointing))
        return real(model, tuner, *args)

    monkeypatch.setattr(train, "add_gradients", spy)
    out = str(tmp_path / "run")
    train.main([*SMALL, "--data", rows, "--out", out, *options])
    assert set(acted) == {("--compile" in options, "--checkpoint" in options)}
    for mine, other in zip(RunFolder(out).read_log(), RunFolder(short).read_log(), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert mine["val"] == pytest.approx(other["val"], rel=1e-4)


def test_what_compile_compiles_is_what_trains(rows, tmp_path, monkeypatch):
    """In every method's tests, compiled equals eager."""
    compiled, trained, real = [], [], train.add_gradients
    monkeypatch.setattr(train, "compile_parts", lambda *parts: compiled.append(parts))
    monkeypatch.setattr(train, "check_compiler", lambda device: None)  # it would import what takes seconds
    monkeypatch.setattr(train, "add_gradients", lambda *args: trained.append(args[:2]) or real(*args))
    train.main([*SMALL, "--steps", "1", "--data", rows, "--out", str(tmp_path / "x"), "--compile"])
    assert compiled == trained


def test_a_cpu_computes_in_fp32_unless_asked_and_is_told_where_bf16_is_faster(monkeypatch):
    for name in ("avx512_bf16", "amx_bf16"):
        monkeypatch.setattr(cli, "cpu_capabilities", lambda name=name: {name: True})
        assert cli.pick_device("cpu") == ("cpu", torch.float32, "exact; for a large model --dtype bf16 is faster")
    monkeypatch.setattr(cli, "cpu_capabilities", dict)
    assert cli.pick_device("cpu").reason == "this processor is slow in bf16"
    assert cli.pick_device("cpu", "bf16")[:2] == ("cpu", torch.bfloat16)


def test_what_does_not_work_together_is_refused(monkeypatch, capsys):
    """In the backward pass FSDP hands over other strides than in the forward pass, so another graph would be taken."""
    monkeypatch.setattr(train.distributed, "WORLD_SIZE", 2)
    with pytest.raises(SystemExit):
        train.parse(["--shard", "--checkpoint", "--compile"])
    assert "--shard, --checkpoint and --compile do not work together" in capsys.readouterr().err
    train.parse(["--shard", "--checkpoint"])


def test_a_resumed_run_is_the_run_that_never_stopped(rows, short, tmp_path, monkeypatch):
    parts = str(tmp_path / "parts")
    real, calls = train.Batches.batch, []

    def interrupted(self, i):
        calls.append(i)
        if i == 4:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C in the middle of step 4
        return real(self, i)

    monkeypatch.setattr(train.Batches, "batch", interrupted)
    with pytest.raises(SystemExit, match="stopped after 5 steps, and saved"):
        train.main([*SMALL, "--data", rows, "--out", parts])
    train.main([*SMALL, "--data", rows, "--out", parts, "--resume"])
    assert calls == [0, 1, 2, 3, 4, 5]  # it goes on where it was stopped, not at the last validation
    assert same_run(parts, short)


def test_a_rate_of_zero_is_a_rate_and_not_the_method_s_default(rows, tmp_path):
    out = str(tmp_path / "x")
    train.main([*SMALL, "--steps", "1", "--data", rows, "--out", out, "--lr", "0", "--method", "capt"])
    torch.manual_seed(0)
    initial = build("capt", sample.open_model("tiny")[0].config).state_dict()
    assert all(torch.equal(x, initial[name]) for name, x in tensors(out).items())


@pytest.mark.parametrize("method", ["iapt", slow("lora"), slow("full")])
def test_a_warm_start_begins_with_what_another_run_has_trained_and_resumes_as_any_run(method, rows, tmp_path):
    first, second, third = str(tmp_path / "a"), str(tmp_path), str(tmp_path / "c")  # first is in second, and not it
    common = [*SMALL, "--steps", "2", "--data", rows, "--method", method]
    train.main([*common, "--out", first])
    train.main([*common, "--out", second, "--warm-start", first, "--lr", "0", "--seed", "1"])
    assert all(torch.equal(x, tensors(first)[name]) for name, x in tensors(second).items())
    train.main([*common, "--out", third, "--warm-start", first])
    assert not same_run(first, third)
    status, text = run_in(train, *common, "--out", third, "--resume")
    assert status == 1 and f"warm_start was {first!r}" in text
    shutil.rmtree(first)  # what it was trained from is in its checkpoints
    assert run_in(train, *common, "--out", third, "--resume", "--warm-start", first)[0] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--method", "capt"],
            "activation=rational, --act all, on tiny ({base}, template plain); this one is of capt ",
        ),
        (["--init", "{other}"], "rational, --act all, on {other} ("),
        (
            ["-o", "activation=gelu"],
            "; this one is of iapt P=4 m=0 repeat=3 activation=gelu, --act all, on tiny ({base}, template plain)",
        ),
        (["--warm-start", "{out}/best.pt"], "is where this run writes to: --out names another folder"),
        (["--warm-start", "nowhere"], "no checkpoint at nowhere"),
    ],
)
def test_a_warm_start_from_another_method_or_model_is_refused(options, message, short, rows, tmp_path):
    model, _ = sample.open_model("tiny")
    model.ln_f.weight.data += 0.1
    other = str(tmp_path / "other")
    os.makedirs(other)
    copy_tokenizer(TINY, other)
    save_pretrained(other, model)
    words = {"base": load_checkpoint(short)["meta"]["base"], "other": other, "out": str(tmp_path / "x")}
    options = [option.format(**words) for option in options]
    argv = [*SMALL, "--data", rows, "--warm-start", short, *options, "--out", str(tmp_path / "x")]
    status, text = run_in(train, *argv)
    assert status == 1 and message.format(**words) in text and text.count("error: ") == 1
    assert not os.path.exists(tmp_path / "x")


def test_all_frozen_weights_are_the_same_after_a_run(rows, tmp_path, monkeypatch):
    models, real = [], train.open_model
    monkeypatch.setattr(train, "open_model", lambda *args: models.append(real(*args)) or models[-1])
    train.main([*SMALL, "--data", rows, "--out", str(tmp_path / "x")])
    fresh = real("tiny")[0].state_dict()
    assert all(torch.equal(x, fresh[name]) for name, x in models[0][0].state_dict().items())


def test_exact_match_is_what_decoding_gives(rows):
    """evaluate() never decodes; it must count what greedy decoding would have reproduced."""
    model, tokenizer, _, (tuner,) = sample.open_runs([SHIPPED])
    tuner.attach(model)
    examples = encode(load_splits(rows)["test_phrasings"][:60], tokenizer, 256)
    exact = (score_examples(model, examples, tuner, size=7).wrong == 0).double().mean().item()
    answers = sample.generate(model, [e.prompt for e in examples], tuner, max_new=12, stop=tokenizer.end)
    right = sum(new + [tokenizer.end] == response for new, (_, response, _) in zip(answers, examples))
    assert exact == right / 60 and 0 < exact < 1


TEXTS = [
    f"{a} {end} {b}" for end in ("<|endoftext|>", "</s>", "<|end_of_text|>") for a, b in (("red", "12"), ("  é", "."))
]


@pytest.mark.parametrize(
    "where",
    [
        ["data", "tiny"],
        ["tokenizers", "gpt2"],
        slow(["tokenizers", "llama3"]),
        ["checkpoints", "tinystories-656k-llama"],
    ],
)
def test_exact_match_agrees_with_the_answers_for_every_kind_of_tokenizer_and_with_end_tokens_in_texts(where):
    """A small model learns some rows by heart, and others not: the share that is scored is the share that it says."""
    if where[-1] == "tinystories-656k-llama":
        pytest.importorskip("tokenizers", reason="pip install tokenizers")
    tokenizer = Tokenizer.load(TINY if where[0] == "data" else shared(*where))
    rows = [{"instruction": f"say {i}", "output": text} for i, text in enumerate(TEXTS)]
    if where[-1] == "tinystories-656k-llama":
        rows = [row for row in rows if not {"</s>", "é"} & {*row["output"].split()}]  # it has no tokens for < and é
    torch.manual_seed(0)
    model = sample.Decoder(Config(tokenizer.vocab_size, 96, n_layer=1, n_head=2, n_embd=16, arch="llama"))
    examples = encode(rows, tokenizer, 96)
    idx, targets, _ = collate(examples[: len(rows) // 2], 96)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(idx, targets=targets).backward()
        optimizer.step()
    exact = evaluate(model, examples).exact
    answers = sample.answer(model, tokenizer, rows, max_new=40)
    assert exact == sum(answer == row["output"] for answer, row in zip(answers, rows)) / len(rows)
    assert 0 < exact < 1


def test_label_words_are_those_that_are_trained_with_the_space_that_they_begin_with():
    """Older files of OpenAI's have such completions; without it, words are compared that were never trained."""
    rows = [{"instruction": f"{i} ?", "output": [" good", " bad\n"][i % 2]} for i in range(40)]
    assert label_words(rows) == [" bad", " good"]
    session = train.open_session(train.parse(["--data", "tiny"]), "cpu", torch.float32)
    examples, scored, real = encode(rows, session.tokenizer, 256), [], scores.score_examples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "score_examples", lambda model, given, tuner: scored.extend(given) or real(model, given))
        accuracy(session.model, session.tokenizer, rows, examples, label_words(rows))
    assert {tuple(e.response) for e in scored} == {tuple(e.response) for e in examples}


def test_answers_that_are_label_words_are_scored_by_accuracy_among_them(tmp_path, capsys):
    """A model that says something else first is not wrong yet: the likelier label counts, however long it is."""
    words, path = "red green blue yellow brown white".split(), str(tmp_path / "rows.jsonl")
    with open(path, "w") as f:
        for i in range(60):
            instruction = f"is {words[i % 6]} good or bad {words[i // 6 % 6]} ?"
            f.write(json.dumps({"instruction": instruction, "output": ["good", "bad one"][i % 2]}) + "\n")
    args = train.parse([*SMALL, "--data", path, "--out", str(tmp_path / "x")])
    session = train.open_session(args, "cpu", torch.float32)
    assert session.labels == ["bad one", "good"]
    subset = session.rows["train"][:3] + [row for row in session.rows["train"] if row["output"] == "good"][:5]
    right = []
    for row in subset:
        nats = []  # of each label as a whole
        for label in session.labels:
            (example,) = encode([{**row, "output": label}], session.tokenizer, 256)
            nats.append(evaluate(session.model, [example]).nats * len(example.response))
        right.append(session.labels[nats.index(min(nats))] == row["output"])
    examples = encode(subset, session.tokenizer, 256)
    assert accuracy(session.model, session.tokenizer, subset, examples, session.labels) == sum(right) / 8
    result = train.main([*SMALL, "--data", path, "--out", str(tmp_path / "x")])
    assert "accuracy nats/token" in capsys.readouterr().out
    assert result["before"] == session.scores()


def test_the_table_says_what_tuning_cost_on_text_that_no_row_is_about(rows, tmp_path, monkeypatch, capsys):
    text = [Example([5, 6, 7], [8, 9])] * 3
    monkeypatch.setattr(train, "plain_examples", lambda tokenizer: text)
    found = train.main([*SMALL, "--data", rows, "--out", str(tmp_path / "x")])
    model, _ = sample.open_model("tiny")
    before, after = (found[when]["plain text"] for when in ("before", "after"))
    assert before.nats == pytest.approx(scores.evaluate(model, text).nats) and after.nats != before.nats
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("plain text")]
    assert [x for x in line.split() if x != "–"] == ["plain", "text", "3", f"{before.nats:.3f}", f"{after.nats:.3f}"]
    both = {"test": scores.Score(0.5, 1.0), "plain text": before}
    *_, line = scores.score_table({"frozen": both}, {"test": 2, "plain text": 3}, "exact match")
    assert line.split() == ["plain", "text", "3", "–", f"{before.nats:.3f}"]


def test_plain_text_is_english_that_python_brings_and_not_for_a_tokenizer_that_knows_none():
    spelling = SimpleNamespace(vocab_size=6000, encode=lambda text: list(text.encode()))
    found = scores.plain_examples(spelling)
    assert len(found) == 16 and {(len(e.prompt), len(e.response)) for e in found} == {(64, 128)}
    assert scores.plain_examples(spelling, 64)[::4] == found
    assert scores.plain_examples(SimpleNamespace(vocab_size=1000)) == []


def test_accuracy_leaves_room_for_soft_tokens_that_take_positions(monkeypatch):
    model, tokenizer = sample.open_model("tiny")
    block_size, rows = model.config.block_size, [{"instruction": "the plural " * 200, "output": "mice"}]
    (whole,) = encode(rows, tokenizer, block_size, truncate=True)
    scored = []
    zeros = lambda model, examples, tuner: scored.extend(examples) or SimpleNamespace(nats=torch.zeros(len(examples)))
    monkeypatch.setattr(scores, "score_examples", zeros)
    for shift, room in ((0, block_size), (1, block_size - 8)):
        tuner, scored[:] = build("prompt", model.config, ["P=8", f"shift={shift}"]), []
        accuracy(model, tokenizer, rows, [whole], ["mice", "lima"], tuner)
        assert [len(e.prompt) + len(e.response) for e in scored] == [room] * 2


def test_training_from_scratch_begins_with_gpt2_s_small_weights():
    """PyTorch's own are larger: a model of many layers then starts with a loss far above that of a guess."""
    torch.manual_seed(0)
    model, _ = sample.open_model("tiny", scratch=True)
    block = model.h[0]
    for p, std in ((model.wte.weight, 0.02), (block.attn.q.weight, 0.02), (block.attn.o.weight, 0.02 / 8**0.5)):
        assert p.std().item() == pytest.approx(std, rel=0.05) and abs(p.mean().item()) < 0.01
    idx = torch.randint(1000, (4, 64))
    assert model(idx, targets=idx.roll(-1, 1)).item() == pytest.approx(math.log(1014), abs=0.1)


def test_a_model_trained_from_scratch_can_be_tuned_and_trains_in_fp32_whatever_is_asked_for(rows, tmp_path):
    out = str(tmp_path / "model")
    data = ["--data", os.path.join(rows, "pretrain"), "--template", "text"]
    scratch = ["--scratch", "--method", "full", *data, "--dtype", "bf16"]
    train.main([*SMALL, *scratch, "--out", out])
    assert {x.dtype for x in tensors(out).values()} == {torch.float32}
    result = train.main([*SMALL, "--init", out, "--data", rows, "--out", str(tmp_path / "iapt")])
    assert set(result["after"]) == {"test", "test_entities", "test_phrasings"}


def test_bf16_weights_and_rows_of_plain_text_train_an_fp32_method_and_a_run_says_that_they_are(rows, tmp_path, capsys):
    argv = [*SMALL, "--data", os.path.join(rows, "pretrain"), "--out", str(tmp_path / "x"), "--template", "text"]
    train.main([*argv, "--dtype", "bf16"])
    assert "as plain text: nothing stands around prompt and output" in capsys.readouterr().out
    assert {x.dtype for x in tensors(tmp_path / "x").values()} == {torch.float32}
    with pytest.raises(ValueError, match="dtype was 'torch.bfloat16'"):
        train.main([*argv, "--dtype", "fp32", "--resume"])


@pytest.mark.slow
def test_e2e_runs_on_a_real_model(tmp_path):
    init, data = shared("checkpoints", "tinystories-instruct-3m"), shared("datasets", "e2e")
    result = train.main([*SMALL, "--steps", "12", "--init", init, "--data", data, "--out", str(tmp_path / "e2e")])
    assert result["after"]["test"].nats < result["before"]["test"].nats


def test_adding_a_method_is_one_class_and_one_entry(rows, tmp_path, monkeypatch):
    """It trains, saves, answers, explains its options, and shows up in the help."""

    class Nudge(Tuner):
        def __init__(self, config, size: int = 2):
            super().__init__()
            self.rows = torch.nn.Parameter(torch.zeros(size, config.n_embd))

        def soft_tokens(self, l, x, instr):
            return self.rows.expand(len(x), -1, -1)

    monkeypatch.setitem(METHODS, "nudge", Nudge)
    out = str(tmp_path / "nudge")
    train.main([*SMALL, "--data", rows, "--out", out, "--method", "nudge", "-o", "size=3"])
    saved = load_checkpoint(out)
    assert saved["meta"]["options"] == ["size=3"] and saved["tuner"]["rows"].shape == (3, 128)
    assert saved["tuner"]["rows"].any()
    status, text = run_in(sample, out, "the plural of mouse ?", *CPU)
    assert status == 0 and len(text.splitlines()) == 1
    assert "nudge" in run_in(train, "--help")[1]
    asked = run_in(train, *SMALL, "--data", rows, "--out", out, "--force", "--method", "nudge", "-o", "x=1")
    assert asked == (2, "error: nudge has no option 'x'. It has: size=2\n")
    status, text = run_in(train, "--method", "nudge", "-o", "help")
    assert status == 0 and text.endswith("options:\n  size=2\n")


# -- What a run leaves -------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_overwritten_unasked(trained, rows):
    with pytest.raises(FileExistsError, match="--resume continues it, --force starts again"):
        train.main([*SMALL, "--data", rows, "--out", trained])


def test_resuming_with_other_settings_is_refused(short, rows):
    with pytest.raises(ValueError, match="--resume: steps was 6 in .*, now it is 60"):
        train.main([*SMALL, "--steps", "60", "--data", rows, "--out", short, "--resume"])


def test_what_cannot_be_resumed_is_refused_before_any_work(short, rows, tmp_path, monkeypatch):
    out, other = str(tmp_path / "run"), str(tmp_path / "rows")
    shutil.copytree(short, out)
    shutil.copytree(rows, other)
    with open(os.path.join(other, "train.jsonl"), "a") as f:
        f.write('{"instruction": "a", "output": "b"}\n')
    monkeypatch.setattr(train, "encode", lambda *args: pytest.fail("encoded first"))
    with pytest.raises(ValueError, match="--resume: the rows are not those of the run in .* .--data, --test-rows"):
        train.main([*SMALL, "--data", other, "--out", out, "--resume"])
    monkeypatch.setattr(train, "open_model", lambda *args: pytest.fail("opened first"))
    with pytest.raises(ValueError, match="--resume: seed was 0 in .*, now it is 1"):
        train.main([*SMALL, "--seed", "1", "--data", rows, "--out", out, "--resume"])


def test_a_run_that_moved_with_its_data_and_its_model_goes_on_and_scores_the_frozen_model_no_more(
    rows, short, tmp_path, monkeypatch
):
    """Names do not decide about a model and its data, hashes do.  And it can go on in a thread."""
    for folder in ("a/rows", "a/model"):
        shutil.copytree(rows if "rows" in folder else TINY, tmp_path / folder, ignore=lambda *_: ["pretrain"])
    monkeypatch.chdir(tmp_path / "a")
    real, scored, batch = train.Session.scores, [], train.Batches.batch
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped after 5 steps"):
        patch.setattr(train.Batches, "batch", lambda self, i: batch(self, i if i < 4 else stop() or i))
        train.main([*SMALL, "--init", "model", "--data", "rows", "--out", "run"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # the lock of what would be moved is this process's
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.Session, "scores", lambda self, *t: scored.append(t) or real(self, *t))
    again, results = [*SMALL, "--init", "./b/model", "--data", "b/rows/", "--out", "b/run", "--resume"], []
    thread = threading.Thread(target=lambda: results.append(train.main(again)))  # which cannot handle signals
    thread.start()
    thread.join()
    assert same_run("b/run", short) and len(scored) == 1 and isinstance(scored[0][0], Tuner)
    assert all(score.nats > 5 for score in results[0]["before"].values()) and len(results[0]["before"]) == 3


def stop():
    """Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


def test_a_run_whose_template_was_edited_is_neither_resumed_nor_asked_but_one_that_writes_the_date_is(
    tmp_path, monkeypatch
):
    pytest.importorskip("jinja2", reason="pip install jinja2")
    out, real, now = str(tmp_path / "x"), Tokenizer.load, [{"word": "answer", "date": "1 May"}]

    def load(folder):
        tokenizer = real(folder)
        today = "{{ strftime_now('%d %B') }} {% for m in messages %}{{ m.role }} says {{ m.content }} . {% endfor %}"
        tokenizer.chat_template = today + f"the {now[0]['word']} :"
        return tokenizer

    clock = SimpleNamespace(now=lambda: SimpleNamespace(strftime=lambda layout: now[0]["date"]))
    monkeypatch.setattr(Tokenizer, "load", load)
    monkeypatch.setattr(sys.modules["data.template"], "datetime", SimpleNamespace(datetime=clock))
    with open(tmp_path / "my.jsonl", "w") as f:
        f.writelines(json.dumps({"instruction": f"say {i}", "output": "yes"}) + "\n" for i in range(30))
    argv = [*SMALL, "--steps", "1", "--template", "chat", "--data", str(tmp_path / "my.jsonl"), "--out", out]
    train.main(argv)
    question = "the plural of mouse ?", *CPU
    now[0] = {"word": "answer", "date": "2 May"}
    assert run_in(train, *argv, "--resume")[0] == 0 and run_in(sample, out, *question)[0] == 0
    now[0] = {"word": "word", "date": "1 May"}
    status, text = run_in(train, *argv, "--resume")
    assert status == 1 and f"the tokenizer or its chat template is not that of the run in {out} (--init)" in text
    status, text = run_in(sample, out, *question)
    assert status == 1 and f"{out} was trained with another tokenizer or chat template than tiny has now" in text
    assert run_in(sample, out, *question, "--force")[0] == 0
    for name in ("best.pt", "last.pt"):  # of a run that was made before this was known
        content = load_checkpoint(os.path.join(out, name))
        del content["meta"]["tokenizer"]
        torch.save(content, os.path.join(out, name))
    assert run_in(train, *argv, "--resume")[0] == 0 and run_in(sample, out, *question)[0] == 0


ALTERNATING = """{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }} says {{ m.content }} . {% endfor %}the word :"""


def test_a_row_that_the_chat_template_refuses_is_named_by_its_line_or_left_out(tmp_path, monkeypatch):
    """As Llama 2's refuses two turns of a user one after the other."""
    pytest.importorskip("jinja2", reason="pip install jinja2")
    real, path, out = Tokenizer.load, str(tmp_path / "chats.jsonl"), str(tmp_path / "out")
    monkeypatch.setattr(Tokenizer, "load", lambda folder: dataclasses.replace(real(folder), chat_template=ALTERNATING))
    with open(path, "w") as f:
        for i in range(40):
            turns = ["user"] * (1 + (i == 19)) + ["assistant"]
            f.write(json.dumps({"messages": [{"role": role, "content": f"say {i}"} for role in turns]}) + "\n")
    train_on = SimpleNamespace(main=lambda argv: train.open_session(train.parse(argv), "cpu", torch.float32))
    for script, argv in ((train_on, ["--data", path, "--out", out]), (prepare, [path, "--out", out])):
        status, text = run_in(script, *argv, "--template", "chat")
        assert status == 1 and text.splitlines()[-1].startswith(f"error: {path}, line 20: the model's chat template")
        assert "--skip-bad leaves such rows out" in text and not os.path.exists(out)
        status, text = run_in(script, *argv, "--template", "chat", "--skip-bad")
        assert status == 0 and text.count(f"The first: {path}, line 20: ") == 1
    assert sum(map(len, load_splits(out).values())) == 39


def test_what_a_run_works_on_is_said_before_the_frozen_model_is_scored(rows, tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError("scored now")

    monkeypatch.setattr(train.Session, "scores", fail)
    status, text = run_in(train, *SMALL, "--data", rows, "--out", str(tmp_path / "x"))
    assert status == 1 and re.search(r"parameters train .*\ntiny on cpu.*\n.*train 640, .* rows\n.*scored now", text)


def test_force_leaves_nothing_of_the_run_before(rows, short, tmp_path, monkeypatch):
    out = str(tmp_path / "x")
    shutil.copytree(short, out)
    monkeypatch.setattr(train, "schedule", lambda step, steps: float("nan"))
    with pytest.raises(ValueError, match="nothing had been saved yet"):
        train.main([*SMALL, "--data", rows, "--out", out, "--force"])


def no_memory(*args):
    raise torch.OutOfMemoryError("out of memory")


def interrupted(*args):
    raise KeyboardInterrupt  # as Ctrl-C does: its signal is ignored where tests run in the background


def no_compiler(*args):
    raise RuntimeError("no g++\nmore lines")


@pytest.mark.parametrize(
    "options, what, broken, says",
    [
        (["--device", "mps"], "open_session", None, "--device mps: there is no such device here. Try"),
        (["--compile"], "open_session", None, "--compile finds no compiler (no g++): install g++ or clang++, or"),
        ([], "open_session", interrupted, "stopped\n"),
        ([], "add_gradients", no_memory, "error: out of memory. Try a smaller --batch-size"),
    ],
)
def test_what_keeps_a_run_from_starting_is_one_line_and_force_removes_nothing(
    options, what, broken, says, rows, short, tmp_path, monkeypatch
):
    if "mps" in options and torch.backends.mps.is_available():
        pytest.skip("this machine has what the test wants to be missing")
    out = str(tmp_path / "x")
    shutil.copytree(short, out)
    monkeypatch.setattr(torch, "compile", lambda f: no_compiler)
    monkeypatch.setattr(train, what, broken or (lambda *args: pytest.fail("the model was opened first")))
    status, text = run_in(train, *SMALL, "--data", rows, "--out", out, "--force", *options)
    assert status in (1, 2, 130) and says in text and "Traceback" not in text
    assert same_run(out, short) and os.path.exists(os.path.join(out, "best.pt"))


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_try(rows, tmp_path, monkeypatch):
    real = train.schedule
    monkeypatch.setattr(train, "schedule", lambda step, steps: float("nan") if step == 4 else real(step, steps))
    with pytest.raises(ValueError, match=r"loss is nan at step 5, .*; .*best.pt is intact. Try --lr"):
        train.main([*SMALL, "--data", rows, "--out", str(tmp_path / "x")])
    assert load_checkpoint(str(tmp_path / "x"))["step"] == 3


def test_a_log_line_that_was_not_finished_does_not_keep_a_run_from_going_on(tmp_path):
    folder = RunFolder(str(tmp_path))
    (tmp_path / "log.jsonl").write_text('{"step": 3}\n{"step": 6}\n{"step": 9, "lo')
    folder.truncate_log(3)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 3}\n'


def test_a_folder_that_another_run_writes_to_is_refused_before_anything_is_scored(rows, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="no locks on Windows")
    monkeypatch.setattr(train.Session, "scores", lambda *args: pytest.fail("scored first"))
    with open(tmp_path / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="another run is writing to"):
            train.main([*SMALL, "--data", rows, "--out", str(tmp_path)])


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    """(file of rows, folder, output) of a run whose names and questions mean something to a shell."""
    folder = tmp_path_factory.mktemp("it's $HOME")
    path, out = str(folder / "my rows.jsonl"), str(folder / "a & b")
    with open(path, "w", encoding="utf-8") as f:
        for i in range(40):
            row = {"instruction": f'what costs $HOME or `echo {i}` or "{i}" ?', "input": "it's ñ; ls", "output": "no"}
            row["system"] = "it's `ls`"
            f.write(json.dumps(row) + "\n")
    status, text = run_in(train, *SMALL, "--data", path, "--out", out)
    assert status == 0, text
    return path, out, text


@pytest.mark.skipif(not shutil.which("sh"), reason="needs a shell")
def test_the_command_that_a_run_ends_with_can_be_pasted_into_a_shell(odd_run):
    _, out, text = odd_run
    (command,) = re.findall(r"^try it: (.*)$", text, re.MULTILINE)
    assert len(re.findall(r"^    (?:frozen alone|with iapt|wanted)  ", text, re.MULTILINE)) == 6  # of two rows
    shell = f"python() {{ printf '%s\\0' \"$@\"; }}\n{command}"  # what python would be given
    script, *args = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout.split("\0")
    assert script == "sample.py" and args[0] == out
    assert args[2:-1] == ["--input", "it's ñ; ls", "--system", "it's `ls`"]
    assert re.fullmatch(r'what costs \$HOME or `echo \d+` or "\d+" \?', args[1])
    assert run_in(sample, *args[:-1], *CPU)[0] == 0


def test_a_run_whose_data_file_was_edited_is_not_resumed(odd_run):
    path, out, _ = odd_run
    with open(path, encoding="utf-8") as f:
        lines = f.readlines()
    with open(path, "w", encoding="utf-8") as f:
        f.writelines([lines[0].replace('"no"', '"yes"'), *lines[1:]])
    status, text = run_in(train, *SMALL, "--data", path, "--out", out, "--resume")
    assert status == 1 and text.endswith(
        f"error: --resume: the rows are not those of the run in {out} (--data, --test-rows)\n"
    )


# -- Asking ------------------------------------------------------------------------------------------------------------


def test_a_sample_from_a_checkpoint_is_an_answer(capsys, monkeypatch):
    questions = ["the plural of mouse ?", "what is the capital of peru ?"]
    for run, asked in ((SHIPPED, questions), (os.path.join(SHIPPED, "best.pt"), questions[:1])):
        sample.main([run, *asked, *CPU])
        assert capsys.readouterr().out.splitlines() == ["mice", "lima"][: len(asked)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeff" + "\n\n".join(questions) + "\n"))  # with a byte order mark
    sample.main([SHIPPED, *CPU])
    assert capsys.readouterr().out.splitlines() == ["mice", "lima"]


def test_options_may_stand_before_instructions(trained):
    question = "the plural of mouse ?"
    assert run_in(sample, trained, "--max-new", "5", question, *CPU) == run_in(sample, trained, question, *CPU)
    assert run_in(sample, *CPU, trained, question, "--max-new", "5") == run_in(sample, trained, question, *CPU)


def test_explain_shows_weights_of_the_instruction_s_words(trained, capsys):
    sample.main([trained, "what is the capital of peru ?", "--explain", *CPU])
    legend, *lines, answer = capsys.readouterr().out.splitlines()
    assert legend.startswith("What each soft token reads (the words with a weight of 0.05 or more")
    sample.main([trained, "what is the capital of peru ?", *CPU])
    assert capsys.readouterr().out.splitlines() == [answer]
    assert len(lines) == 4 * 4 and lines[0].startswith("layer  1, token 1:  ")
    model, tokenizer, _, (tuner,) = sample.open_runs([trained])
    prompt = tokenizer.prompt("Instruction: what is the capital of peru ?\nResponse:")
    weights = explain.reading_weights(model, tuner, prompt)
    legend, *lines_in_color = explain.shade_words(tokenizer.words(prompt), weights, True)
    assert legend == "What each soft token reads (darker: more):"
    for line in lines_in_color:
        assert re.sub(r"\x1b\[[0-9;]*m", "", line).endswith("what is the capital of peru ?\\nResponse:")
    shown = [float(w) for w in re.findall(r"\d\.\d\d", lines[0])]
    assert shown == sorted(shown, reverse=True) and 0.3 < sum(shown) <= 1.02


def test_tenants_on_the_command_line_answer_as_each_does_alone(rows, tmp_path):
    other = str(tmp_path / "lora")
    train.main([*SMALL, "--steps", "30", "--data", rows, "--out", other, "--method", "lora", "--lr", "2e-2"])
    questions = ["what is the capital of peru ?", "the plural of mouse ?"]  # the longer one first: batches are sorted
    _, a = run_in(sample, SHIPPED, questions[1], *CPU)
    _, b = run_in(sample, other, *questions, *CPU)
    asked = ["--tenant", other, *questions, "--tenant", SHIPPED, questions[1], *CPU]
    assert run_in(sample, *asked) == (0, b + a) and a not in b
    assert run_in(sample, *asked, "--batch-size", "1") == (0, b + a)
    status, text = run_in(sample, *asked, "--batch-size", "1", "--compile")
    assert status == 2 and "these tenants make several batches" in text
    explained = run_in(sample, other, "the past of go ?", "--explain", *CPU)
    assert explained == (
        2,
        "error: --explain shows what IAPT's soft tokens read: it wants one run of iapt, no --frozen, no @FILE\n",
    )


@pytest.mark.parametrize(
    "name, asked", [("chat", "user says the plural of mouse ? . the word :"), ("text", "the plural of mouse ?")]
)
def test_a_run_is_asked_in_the_template_that_it_was_trained_with(name, asked, rows, trained, tmp_path, monkeypatch):
    if name == "chat":
        pytest.importorskip("jinja2", reason="pip install jinja2")
    out, prompts = str(tmp_path / "x"), []
    real_load, real_generate = Tokenizer.load, sample.generate

    def load(folder):  # the shipped model has no chat template of its own
        tokenizer = real_load(folder)
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }} says {{ m.content }} . {% endfor %}the word :"
        return tokenizer

    def generate(model, ids, *args, **settings):
        prompts.extend(ids)
        return real_generate(model, ids, *args, **settings)

    monkeypatch.setattr(Tokenizer, "load", load)
    train.main([*SMALL, "--template", name, "--data", rows, "--out", out])
    monkeypatch.setattr(sample, "generate", generate)
    sample.main([out, "the plural of mouse ?", *CPU])
    assert [load(TINY).decode(ids).removeprefix(END).strip() for ids in prompts] == [asked]
    status, text = run_in(sample, "--tenant", out, "x", "--tenant", trained, "x", *CPU)
    assert status == 1 and f"{trained} has another template than {out}" in text


def test_the_frozen_model_alone_and_an_input_can_be_asked_for(trained, capsys):
    question = ["tell me the reverse of these words .", "--input", "cat sun", *CPU]
    sample.main([trained, *question, "--frozen"])
    frozen = capsys.readouterr().out
    sample.main([trained, *question])
    assert capsys.readouterr().out != frozen and frozen.count("\n") == 1


def test_a_tuning_is_refused_on_another_model(trained, tmp_path):
    model, _ = sample.open_model("tiny", scratch=True)
    save_pretrained(tmp_path, model)
    shutil.copy(os.path.join(TINY, "words.json"), tmp_path)
    with pytest.raises(ValueError, match="was trained on tiny"):
        sample.main([trained, "x", "--init", str(tmp_path), *CPU])
    sample.main([trained, "x", "--init", str(tmp_path), *CPU, "--force"])


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub that does not answer, and an empty cache."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path))


@pytest.mark.parametrize("place", ["/nowhere/story", "story", "models/story"])
def test_where_the_model_s_folder_has_moved_the_option_that_names_it_is_named(place, trained, tmp_path, no_hub):
    """models/story could be a name on the hub, which is not to be blamed."""
    if place == "models/story":
        pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub: other hubs are reached through it")
    content = load_checkpoint(trained)
    content["meta"]["init"] = place
    torch.save(content, tmp_path / "best.pt")
    question = "the plural of mouse ?", *CPU
    status, text = run_in(sample, str(tmp_path), *question)
    assert status == 1 and f"was trained on --init {place}" in text and "--init names its place now" in text
    assert run_in(sample, str(tmp_path), *question, "--init", TINY) == run_in(sample, trained, *question)


def test_a_checkpoint_is_opened_as_it_was_made_even_where_a_default_has_changed(trained, monkeypatch):
    class Other(IAPT):
        def __init__(self, config, P: int = 7, m: int = 0, repeat: int = 1, activation: str = "gelu"):
            super().__init__(config, P, m, repeat, activation)

    monkeypatch.setitem(METHODS, "iapt", Other)
    assert inspect.signature(IAPT).parameters.keys() == inspect.signature(Other).parameters.keys()
    *_, (tuner,) = sample.open_runs([trained])
    assert (tuner.generators[0].W_sa.shape[1], tuner.repeat) == (4, 3)
    assert build("iapt", Config(vocab_size=9, n_layer=1, n_head=2, n_embd=16)).repeat == 1


def test_a_truncated_checkpoint_is_one_line(trained, tmp_path):
    with open(os.path.join(trained, "best.pt"), "rb") as f:
        whole = f.read()
    (tmp_path / "best.pt").write_bytes(whole[: len(whole) // 2])
    status, text = run_in(sample, str(tmp_path), "x", *CPU)
    assert status == 1 and "is not a checkpoint of train.py, or was cut off" in text and "Traceback" not in text


def test_an_over_long_question_is_one_line(trained):
    status, text = run_in(sample, trained, "word " * 300, *CPU)
    assert status == 1 and "this model has room for 256" in text and "Traceback" not in text


# -- What a user can mend ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "status, script, args, says",
    [
        (2, train, ["--method", "foo"], "no method 'foo'. There are: iapt, summary, paper-iapt, "),
        (2, train, ["-o", "p=4"], "iapt has no option 'p'. It has: P=4, m=0, repeat=3, activation=rational"),
        (2, train, ["-o", "P=0"], "iapt's option P must be from 1 to "),
        (2, train, ["-o", "activation=tan"], "option activation can be rational, gelu, relu, identity; got 'tan'"),
        (2, train, ["--method", "lora", "-o", "on=q,w"], "the option on takes some of q,k,v,o,gate,up,down, "),
        (1, train, ["--init", "nowhere"], "no model at nowhere"),
        (1, train, ["--data", "nowhere"], "no data at nowhere"),
        (1, train, ["--init", os.path.join(ROOT, "tests")], "no " + os.path.join(ROOT, "tests", "config.json")),
        (1, train, ["--block-size", "8"], "the model takes 8"),
        (2, train, ["--block-size", "100000"], "--block-size 100000: tiny takes at most 256 tokens"),
        (2, train, ["--method", "prompt", "-o", "shift=1"], "prompt's soft tokens leave room for 236 tokens"),
        (1, train, ["--resume", "--out", "nowhere"], "there is no run at nowhere"),
        (1, train, ["--out", os.path.join(ROOT, "README.md")], "README.md is a file, and not a folder"),
        (2, train, ["--resume", "--force"], "argument --force: not allowed with argument --resume"),
        (2, train, ["--steps", "0"], "argument --steps: must be from 1 to 2^40, got 0"),
        (2, train, ["--steps", "x"], "argument --steps: invalid whole number value: 'x'"),
        (2, train, ["--seed", "9" * 20], f"argument --seed: must be from 0 to 2^40, got {'9' * 20}"),
        (2, train, ["--lr", "-1"], "argument --lr: must be from 0.0 to 2^40, got -1"),
        (2, train, ["--lr", "nan"], "argument --lr: must be from 0.0 to 2^40, got nan"),
        (2, train, ["--val-rows", "-1"], "argument --val-rows: must be from 0 to 2^40, got -1"),
        (2, train, ["--device", "foo"], "--device foo: there is no such device"),
        (2, train, ["--scratch"], "--scratch leaves nothing frozen for iapt to tune: add --method full"),
        (2, train, ["--shard"], "--shard is for torchrun with several processes"),
        (1, sample, ["nowhere.pt", "x"], "no checkpoint at nowhere.pt. Run: python train.py"),
        (1, sample, [os.path.join(ROOT, "README.md"), "x"], "README.md is not a checkpoint"),
        (2, sample, [], "give a run, or several with --tenant"),
        (2, sample, ["--tenant", "x.pt"], "--tenant wants a run and at least one instruction"),
        (2, sample, ["x.pt", "x", "y", "--input", "a", "--input", "b", "--input", "c"], "3 --input for 2 instructions"),
        (2, sample, ["x.pt", "x", "--beams", "2", "--temperature", "1"], "goes without --temperature"),
        (2, sample, ["x.pt", "x", "--temperature", "nan"], "argument --temperature: must be from 0.0 to 2^40, got nan"),
        (2, sample, ["x.pt", "x", "--top-p", "0"], "--top-p must be above 0 and at most 1, got 0.0"),
        (2, sample, ["x.pt", "x", "--seed", "9" * 20], f"argument --seed: must be from 0 to 2^40, got {'9' * 20}"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2_if_it_is_the_command(status, script, args, says, rows, tmp_path):
    if script is train:
        data = [] if "--data" in args else ["--data", rows]
        out = [] if "--out" in args else ["--out", str(tmp_path / "x")]
        args = [*SMALL, *data, *out, *args]
    exited, text = run_in(script, *args)
    assert exited == status and says in text and "Traceback" not in text
    assert text.count("error: ") == 1 and text.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "x").exists()  # nothing half-written


@pytest.mark.parametrize(
    "name", ["train", "sample", "data.prepare", slow("experiments.bench"), slow("experiments.plots")]
)
def test_every_flag_refuses_nonsense_in_one_line(name, rows, trained, tmp_path, no_hub, monkeypatch):
    script = importlib.import_module(name)
    needed = {
        "train": [*SMALL, "--data", rows],
        "sample": [trained, "the past of go ?"],
        "data.prepare": [os.path.join(rows, "val.jsonl"), "--out", "fine"],
        "experiments.bench": [],
        "experiments.plots": [trained],
    }[name]
    flags = []

    def note(parser, *names, _add=cli.Parser.add_argument, **settings):
        if names[0].startswith("-") and settings.get("action", "append") in ("append", "extend"):
            command = parser.prog.removeprefix("python -m ").split()[1:]  # one of several, in bench
            flags.append((command, names[-1], "type" in settings or "choices" in settings))
        return _add(parser, *names, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(cli.Parser, "add_argument", note)
        run_in(script, "--help")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    assert flags
    for command, flag, is_number in flags:
        for value in ("", "x", "nan", "-1") if is_number else ("file/below", "nonsense\0"):
            if name == "sample" and flag in ("--input", "--system"):  # any text will do
                continue
            status, text = run_in(script, *command, *needed, flag, value)
            assert status in (1, 2), (command, flag, value, text)
            assert text.count("error: ") == 1 and "Traceback" not in text, (command, flag, value, text)
            assert "unrecognized" not in text, (command, flag, value, text)


def test_a_console_that_lacks_a_character_shows_its_code_and_loses_nothing(monkeypatch):
    """PYTHONIOENCODING=cp1252: a run had trained and saved, and then failed at printing a row."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="\n")
    monkeypatch.setattr(sys, "stdout", console)
    cli.run(lambda: print("é 北京\nsaved"))
    console.flush()
    assert console.buffer.getvalue() == b"\xe9 \\u5317\\u4eac\nsaved\n"


def test_a_command_that_is_wrong_prints_one_line_and_exits_with_2(monkeypatch, capsys):
    """Run as a script, not by its main()."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "0"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(os.path.join(ROOT, "train.py"), run_name="__main__")
    wanted = "error: argument --steps: must be from 1 to 2^40, got 0 (train.py --help shows the options)\n"
    assert stopped.value.code == 2 and capsys.readouterr() == ("", wanted)
