"""Whole runs on the shipped backbone, a few steps each: what they leave behind, and what they say when something is
wrong.
"""

import contextlib
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, shared

import bench
import cli
import pictures
import sample
import train
from baselines import METHODS, build
from checkpoint import load_tuner
from data import encode, load, prepare, world
from iapt import Count, Space
from model import Config, generate

SMALL = "--steps 6 --eval-every 3 --batch-size 8 --val-rows 16 --test-rows 8 --device cpu".split()


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """tiny's instructions in a folder of their own."""
    folder = str(tmp_path_factory.mktemp("rows"))
    world.tiny(folder, corpus=10)
    return folder


@pytest.fixture(scope="session")
def trained(rows, tmp_path_factory):
    """A run of 100 steps."""
    out = str(tmp_path_factory.mktemp("run") / "iapt")
    longer = "--steps 100 --eval-every 50 --batch-size 32 --val-rows 64 --lr 1e-2".split()
    train.main([*SMALL, *longer, "--data", rows, "--out", out])
    return out


def tensors(out):
    return load_tuner(os.path.join(out, "last.pt"))["tuner"]


def test_training_teaches_what_the_frozen_model_does_not_do(trained):
    log = [json.loads(line) for line in open(os.path.join(trained, "log.jsonl"))]
    assert log[-1]["step"] == 100 and log[-1]["val"] < 5  # the frozen model alone: above 9
    assert os.path.getsize(os.path.join(trained, "best.pt")) < 1_000_000


def test_the_same_seed_is_the_same_run_and_another_seed_another(rows, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        train.main([*SMALL, "--data", rows, "--out", str(tmp_path / name), "--seed", seed])
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_explain_shows_weights_of_the_instruction_s_words(trained, capsys):
    sample.main([trained, "what is the capital of peru ?", "--explain", "--device", "cpu"])
    *lines, said = capsys.readouterr().out.splitlines()
    sample.main([trained, "what is the capital of peru ?", "--device", "cpu"])
    assert capsys.readouterr().out.splitlines() == [said]
    assert len(lines) == 4 * 4 and lines[0].startswith("layer  1, token 1:  ")
    model, tokenizer, (tuner,) = sample.open_checkpoints([trained], device="cpu", dtype=torch.float32)
    prompt = tokenizer.prompt("Instruction: what is the capital of peru ?\nResponse:")
    coloured = [
        re.sub(r"\x1b\[[0-9;]*m", "", line)
        for line in sample.explain(*sample.reads(model, tokenizer, tuner, prompt), True)
    ]
    assert all(line.endswith("what is the capital of peru ?\\nResponse:") for line in coloured)
    shown = [float(w) for w in re.findall(r"\d\.\d\d", lines[0])]
    assert shown == sorted(shown, reverse=True) and 0.3 < sum(shown) <= 1.02


def test_tenants_on_the_command_line_answer_as_each_does_alone(rows, trained, tmp_path):
    other = str(tmp_path / "lora")
    train.main([*SMALL, "--steps", "30", "--data", rows, "--out", other, "--method", "lora", "--lr", "2e-2"])
    asked = ["the plural of mouse ?", "what is the capital of peru ?"]
    _, a = run_in(sample, trained, asked[0], "--device", "cpu")
    _, b = run_in(sample, other, *asked, "--device", "cpu")
    _, both = run_in(sample, "--tenant", other, *asked, "--tenant", trained, asked[0], "--device", "cpu")
    assert both == b + a and a != b.splitlines()[0]


def test_bilevel_learns_the_coefficients_on_the_held_out_rows_and_all_else_on_the_others(rows, tmp_path, monkeypatch):
    """By turns: a step of either level leaves the parameters and the optimizer state of the other as they are."""
    seen, real = [], torch.optim.AdamW.step

    def step(optimizer):
        before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        real(optimizer)
        now = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append({id(p) for p, b in zip(now, before) if not torch.equal(p, b)})

    built, batches, real_build, real_batches = [], [], train.build, train.Batches
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(train, "build", lambda *args: built.append(real_build(*args)) or built[-1])
    monkeypatch.setattr(train, "Batches", lambda *args: batches.append(args[0]) or real_batches(*args))
    train.main([*SMALL, "--bilevel", "--data", rows, "--out", str(tmp_path / "x")])
    upper = {id(p) for p in built[0].upper()}
    assert len(seen) == 12 and all(changed == upper for changed in seen[1::2])
    assert all(changed and not changed & upper for changed in seen[0::2])
    lower_rows, upper_rows = batches
    assert len(upper_rows) * 4 == len(lower_rows) and not [e for e in upper_rows if any(e is x for x in lower_rows)]


def test_a_resumed_run_is_the_run_that_never_stopped(rows, tmp_path, monkeypatch):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    train.main([*SMALL, "--data", rows, "--out", whole])
    real, calls = train.Batches.batch, []

    def interrupted(self, i):
        calls.append(i)
        if i == 4:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C in the middle of step 4
        return real(self, i)

    monkeypatch.setattr(train.Batches, "batch", interrupted)
    with pytest.raises(SystemExit, match="stopped before step 5, and saved"):
        train.main([*SMALL, "--data", rows, "--out", parts])
    train.main([*SMALL, "--data", rows, "--out", parts, "--resume"])
    assert calls == [0, 1, 2, 3, 4, 5]  # it goes on where it was stopped, not at the last validation
    a, b = tensors(whole), tensors(parts)
    assert all(torch.equal(a[k], b[k]) for k in a)

    def log(out):
        return [
            {k: v for k, v in json.loads(line).items() if k != "tokens_per_s"}
            for line in open(os.path.join(out, "log.jsonl"))
        ]

    assert log(whole) == log(parts)


def test_exact_match_is_what_decoding_gives(trained, rows):
    """evaluate() never decodes; it must count what greedy decoding would have reproduced."""
    model, tokenizer, (tuner,) = sample.open_checkpoints([trained], device="cpu", dtype=torch.float32)
    tuner.attach(model)
    examples = encode(load(rows)["test"][:60], tokenizer, 256)
    exact = (train.rate(model, examples, tuner, size=7)[1] == 0).double().mean().item()
    new = generate(model, [prompt for prompt, _ in examples], tuner, max_new=12, stop=tokenizer.end)
    assert exact == sum(a + [tokenizer.end] == response for a, (_, response) in zip(new, examples)) / 60
    assert 0 < exact < 1


def test_a_sample_from_a_checkpoint_is_an_answer(trained, capsys, monkeypatch):
    sample.main([trained, "what is the capital of peru ?", "the plural of mouse ?", "--device", "cpu"])
    several = capsys.readouterr().out.splitlines()
    assert len(several) == 2
    sample.main([os.path.join(trained, "best.pt"), "the plural of mouse ?", "--device", "cpu"])
    assert capsys.readouterr().out.splitlines() == several[1:]
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is the capital of peru ?\n\nthe plural of mouse ?\n"))
    sample.main([trained, "--device", "cpu"])
    assert capsys.readouterr().out.splitlines() == several


def test_a_tuning_is_refused_on_another_model(trained, tmp_path):
    model, _ = train.open_model("scratch")
    train.weights.save(tmp_path, model)
    (tmp_path / "words.json").write_bytes(open(os.path.join(train.TINY, "words.json"), "rb").read())
    with pytest.raises(ValueError, match="was trained on tiny"):
        sample.main([trained, "x", "--init", str(tmp_path), "--device", "cpu"])
    sample.main([trained, "x", "--init", str(tmp_path), "--device", "cpu", "--force"])


def test_a_checkpoint_is_opened_as_it_was_made_even_where_a_default_has_changed(rows, trained, monkeypatch):
    class Other(METHODS["iapt"]):
        def __init__(self, config, P: int = 7, beside: Count = 1, m: Count = 0, space: Space = "hidden", **_):
            super().__init__(config, P=P, beside=beside, m=m, space=space)

    arguments = inspect.signature(METHODS["iapt"]).parameters.values()
    others = {"P": 7, "beside": 1, "space": "hidden"}
    Other.__signature__ = inspect.Signature([p.replace(default=others.get(p.name, p.default)) for p in arguments])
    monkeypatch.setitem(METHODS, "iapt", Other)
    _, _, (tuner,) = sample.open_checkpoints([trained])
    assert (tuner.generators[0].P, tuner.beside, tuner.space) == (4, 0, "kv")
    assert build("iapt", Config(vocab_size=9, n_layer=1, n_head=2, n_embd=16)).beside == 1


def test_a_backbone_pretrained_from_scratch_can_be_tuned(rows, tmp_path):
    out = str(tmp_path / "backbone")
    model = ["-o", "n_layer=2", "n_embd=32", "n_head=2"]
    train.main(
        [
            *SMALL,
            "--init",
            "scratch",
            "--method",
            "full",
            "--data",
            os.path.join(rows, "pretrain"),
            "--out",
            out,
            *model,
        ]
    )
    result = train.main([*SMALL, "--init", out, "--data", rows, "--out", str(tmp_path / "iapt")])
    assert set(result["after"]) == {"test", "test_entities", "test_phrasings"}


def test_e2e_runs_on_the_real_model(tmp_path):
    base, data = shared("checkpoints", "tinystories-instruct-3m"), shared("datasets", "e2e")
    result = train.main([*SMALL, "--steps", "12", "--init", base, "--data", data, "--out", str(tmp_path / "e2e")])
    assert result["after"]["test"][1] < result["before"]["test"][1]


def run_in(script, *args):
    """Exit status and output of a command, run in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            cli.run(lambda: script.main([*args]))
            status = 0
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 1
            if not isinstance(e.code, int):
                print(e.code)
    return status, out.getvalue()


def test_answers_that_are_label_words_are_scored_by_accuracy_among_them(tmp_path, capsys):
    """A model that says something else first is not wrong yet: the likelier label counts, however long it is."""
    words, path = "red green blue yellow brown white".split(), str(tmp_path / "rows.jsonl")
    with open(path, "w") as f:
        for i in range(60):
            row = {
                "instruction": f"is {words[i % 6]} good or bad {words[i // 6 % 6]} ?",
                "output": ["good", "bad one"][i % 2],
            }
            f.write(json.dumps(row) + "\n")
    args = train.parse([*SMALL, "--data", path, "--out", str(tmp_path / "x")])
    session = train.begin(args)
    assert session.labels == ["bad one", "good"]
    good = [row for row in session.rows["train"] if row["output"] == "good"]
    session.rows["some"] = session.rows["train"][:3] + good[:5]
    right = []
    for row in session.rows["some"]:
        nats = [
            train.evaluate(session.model, encode([{**row, "output": x}], session.tokenizer, 256))[1]
            for x in session.labels
        ]
        nats[0] *= len(session.tokenizer.encode(" bad one")) + 1
        nats[1] *= len(session.tokenizer.encode(" good")) + 1
        right.append(session.labels[nats.index(min(nats))] == row["output"])
    assert train.accuracy(session, "some") == sum(right) / 8
    result = train.main([*SMALL, "--data", path, "--out", str(tmp_path / "x")])
    assert "accuracy nats/token" in capsys.readouterr().out
    assert result["before"]["test"][0] == train.accuracy(session, "test")


@pytest.mark.parametrize(
    "status, script, args, says",
    [
        (2, train, ["--method", "foo"], "no method 'foo'. There are: iapt, static"),
        (2, train, ["-o", "p=4"], "iapt has no option 'p'. It has: P=4, m=0, share=0"),
        (2, train, ["-o", "P=four"], "option P takes a number, got 'four'"),
        (2, train, ["-o", "P=0"], "option P must be at least 1, got 0"),
        (2, train, ["-o", "space=air"], "space can be kv, hidden; got 'air'"),
        (2, train, ["-o", "norm=maybe"], "norm takes 0 or 1, got 'maybe'"),
        (2, train, ["-o", "static=maybe"], "static takes a number, got 'maybe'"),
        (1, train, ["--init", "nowhere"], "no model at nowhere"),
        (1, train, ["--data", "nowhere"], "no data at nowhere"),
        (1, train, ["--init", "tests"], "no tests/config.json"),
        (1, train, ["--block-size", "8"], "the model takes 8"),
        (1, train, ["--resume", "--out", "nowhere"], "there is no run at nowhere"),
        (2, train, ["--steps", "0"], "--steps must be at least 1, got 0"),
        (2, train, ["--resume", "--force"], "give one of them"),
        (2, train, ["--lr", "-1"], "--lr must be above 0, got -1.0"),
        (2, train, ["--val-rows", "-1"], "--val-rows must be at least 0, got -1"),
        (2, train, ["--device", "foo"], "--device foo: there is no such device"),
        (1, train, ["--out", "README.md"], "--out README.md is a file"),
        (2, train, ["--method", "lora", "-o", "r=0"], "lora's option r must be at least 1, got 0"),
        (2, train, ["--method", "lora", "-o", "on=q,w"], "takes some of q,k,v,o,gate,up,down, or all; got 'q,w'"),
        (2, train, ["-o", "m=-1"], "iapt's option m must be at least 0, got -1"),
        (2, train, ["-o", "static=-1"], "iapt's option static must be at least 0, got -1"),
        (2, train, ["-o", "unit=0"], "iapt's option unit must be at least 1, got 0"),
        (2, train, ["-o", "act_lr=-1"], "iapt's option act_lr must be a finite number of 0 or more, got -1"),
        (2, train, ["-o", "static_lr=nan"], "iapt's option static_lr must be a finite number of 0 or more, got nan"),
        (2, train, ["--method", "lora", "-o", "alpha=inf"], "lora's option alpha must be a finite number of 0 or more"),
        (2, train, ["--bilevel", "--method", "lora"], "--bilevel: lora with these options has no learned activation"),
        (2, sample, ["x.pt", "x", "--beams", "2", "--temperature", "1"], "goes without --temperature"),
        (2, train, ["--init", "scratch"], "add --method full"),
        (2, train, ["--init", "scratch", "--method", "full", "-o", "n_head=3"], "n_embd"),
        (1, sample, ["nowhere.pt", "x"], "no checkpoint at nowhere.pt. Run: python train.py"),
        (1, sample, ["README.md", "x"], "README.md is not a checkpoint"),
        (2, sample, [], "give a checkpoint, or several with --tenant"),
        (1, sample, ["x.pt", "x", "--explain"], "no checkpoint at x.pt"),
        (2, sample, ["--tenant", "x.pt"], "--tenant wants a checkpoint and at least one instruction"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2_if_it_is_the_command(status, script, args, says, tmp_path):
    out = [] if script is sample or "--out" in args else ["--out", str(tmp_path / "x")]
    exited, text = run_in(script, *(SMALL if script is train else []), *out, *args)
    assert exited == status and says in text and "Traceback" not in text
    assert text.count("error: ") == 1 and text.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "x").exists()  # nothing half-written


@pytest.mark.parametrize("script", [train, sample, bench, prepare, pictures], ids=lambda script: script.__name__)
def test_every_flag_refuses_nonsense_in_one_line(script, rows, trained, tmp_path, monkeypatch):
    flags = []

    def note(parser, *names, _add=cli.Parser.add_argument, **how):
        if names[0].startswith("-") and how.get("action", "append") in ("append", "extend"):
            flags.append((parser.prog.split()[1:], names[-1], how))
        return _add(parser, *names, **how)

    monkeypatch.setattr(cli.Parser, "add_argument", note)
    run_in(script, "--help")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    needed = {
        train: SMALL, bench: [], sample: [trained, "the past of go ?"], pictures: ["curves", trained],
        prepare: [os.path.join(rows, "val.jsonl"), "--out", "fine"],
    }[script]  # fmt: skip
    assert flags
    for command, flag, how in flags:
        number = how.get("type") in (int, float) or "choices" in how
        for value in ("", "x", "nan", "-1") if number else ("file/below", "nonsense\0"):
            if (script, flag) == (sample, "--input"):  # any text will do
                continue
            status, text = run_in(script, *command, *needed, flag, value)
            assert status in (1, 2), (command, flag, value, text)
            assert text.count("error: ") == 1 and "Traceback" not in text, (command, flag, value, text)


def test_a_command_that_is_wrong_prints_one_line_and_exits_with_2():
    command = [sys.executable, os.path.join(ROOT, "train.py"), "--method", "foo", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: no method 'foo'. There are: {', '.join(METHODS)}\n"


def test_an_over_long_question_is_one_line(trained):
    status, text = run_in(sample, trained, "word " * 300, "--device", "cpu")
    assert status == 1 and "this model has room for 256" in text and "Traceback" not in text


def test_all_frozen_weights_are_the_same_after_a_run(rows, tmp_path, monkeypatch):
    models, real = [], train.open_model
    monkeypatch.setattr(train, "open_model", lambda *args: models.append(real(*args)) or models[-1])
    train.main([*SMALL, "--data", rows, "--out", str(tmp_path / "x")])
    fresh = real("tiny")[0].state_dict()
    assert all(torch.equal(x, fresh[name]) for name, x in models[0][0].state_dict().items())


def test_a_truncated_checkpoint_is_one_line(trained, tmp_path):
    with open(os.path.join(trained, "best.pt"), "rb") as f:
        whole = f.read()
    (tmp_path / "best.pt").write_bytes(whole[: len(whole) // 2])
    status, text = run_in(sample, str(tmp_path), "x", "--device", "cpu")
    assert status == 1 and "is not a checkpoint of train.py, or was cut off" in text and "Traceback" not in text


def test_force_leaves_nothing_of_the_run_before(rows, tmp_path, monkeypatch):
    out = str(tmp_path / "x")
    train.main([*SMALL, "--data", rows, "--out", out])
    monkeypatch.setattr(train, "schedule", lambda step, steps: float("nan"))
    with pytest.raises(ValueError, match="nothing had been saved yet"):
        train.main([*SMALL, "--data", rows, "--out", out, "--force"])


def test_a_log_line_that_was_not_finished_does_not_keep_a_run_from_going_on(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 3}\n{"step": 6}\n{"step": 9, "lo')
    train.keep_lines(log, 3)
    assert log.read_text() == '{"step": 3}\n'


def test_bf16_weights_train_an_fp32_method(rows, tmp_path):
    out = str(tmp_path / "x")
    train.main([*SMALL, "--data", rows, "--out", out, "--dtype", "bf16"])
    assert {x.dtype for x in tensors(out).values()} == {torch.float32}
    with pytest.raises(ValueError, match="dtype was 'torch.bfloat16'"):
        train.main([*SMALL, "--data", rows, "--out", out, "--dtype", "fp32", "--resume"])


def test_full_fine_tuning_is_in_fp32_whatever_was_frozen(rows, tmp_path):
    out = str(tmp_path / "x")
    train.main([*SMALL, "--data", rows, "--out", out, "--dtype", "bf16", "--method", "full"])
    assert {x.dtype for x in tensors(out).values()} == {torch.float32}


def test_plain_text_rows_train_too(rows, tmp_path):
    """Rows with `prompt` in place of `instruction`, on a frozen model: nothing to ask at the end, and no error."""
    train.main([*SMALL, "--data", os.path.join(rows, "pretrain"), "--out", str(tmp_path / "x")])


def test_the_frozen_model_alone_and_an_input_can_be_asked_for(trained, capsys):
    ask = ["tell me the reverse of these words .", "--input", "cat sun", "--device", "cpu"]
    sample.main([trained, *ask, "--frozen"])
    frozen = capsys.readouterr().out
    sample.main([trained, *ask])
    assert capsys.readouterr().out != frozen and frozen.count("\n") == 1


def test_a_finished_run_is_not_overwritten_unasked(trained, rows):
    with pytest.raises(FileExistsError, match="--resume goes on with it, --force starts again"):
        train.main([*SMALL, "--data", rows, "--out", trained])


def test_resuming_with_other_settings_is_refused(trained, rows):
    with pytest.raises(ValueError, match="--resume: steps was 100 in .*, now it is 60"):
        train.main([*SMALL, "--steps", "60", "--data", rows, "--out", trained, "--resume"])


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_try(rows, tmp_path, monkeypatch):
    real = train.schedule
    monkeypatch.setattr(train, "schedule", lambda step, steps: float("nan") if step == 4 else real(step, steps))
    with pytest.raises(ValueError, match=r"loss is nan at step 5, .*; .*best.pt is intact. Try --lr"):
        train.main([*SMALL, "--data", rows, "--out", str(tmp_path / "x")])
    assert load_tuner(str(tmp_path / "x" / "best.pt"))["step"] == 3
