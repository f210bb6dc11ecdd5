"""Whole runs on the shipped backbone, a few steps each: what they leave behind, and what they say when something is
wrong.
"""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, shared

import sample
import train
from baselines import load_tuner
from data import encode, load, prepare
from model import generate

SMALL = [
    "--steps",
    "6",
    "--eval-every",
    "3",
    "--batch-size",
    "8",
    "--val-rows",
    "16",
    "--test-rows",
    "8",
    "--device",
    "cpu",
]


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """tiny's instructions in a folder of their own."""
    folder = str(tmp_path_factory.mktemp("rows"))
    prepare.tiny(folder, corpus=10)
    return folder


@pytest.fixture(scope="session")
def trained(rows, tmp_path_factory):
    """A run of 60 steps."""
    out = str(tmp_path_factory.mktemp("run") / "iapt")
    train.main([*SMALL, "--steps", "60", "--eval-every", "30", "--batch-size", "32", "--data", rows, "--out", out])
    return out


def tensors(out):
    return load_tuner(os.path.join(out, "last.pt"))["tuner"]


def test_training_teaches_what_the_frozen_model_does_not_do(trained):
    log = [json.loads(line) for line in open(os.path.join(trained, "log.jsonl"))]
    assert log[-1]["step"] == 60 and log[-1]["val"] < 5  # the frozen model alone: above 9
    assert os.path.getsize(os.path.join(trained, "best.pt")) < 1_000_000


def test_the_same_seed_is_the_same_run_and_another_seed_another(rows, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        train.main([*SMALL, "--data", rows, "--out", str(tmp_path / name), "--seed", seed])
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


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
    model, tokenizer, tuner = sample.open_checkpoint(trained, device="cpu", dtype=torch.float32)
    examples = encode(load(rows)["test"][:60], tokenizer, 256)
    exact, _ = train.evaluate(model, examples, tuner, size=7)
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


def cli(script, *args):
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, script), *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "script, args, says",
    [
        ("train.py", ["--method", "foo"], "no method 'foo'. There are: iapt, static, lora, full, mine"),
        ("train.py", ["-o", "p=4"], "iapt has no option 'p'. It has: P=4, m=0, share=1"),
        ("train.py", ["-o", "P=four"], "option P takes a number, got 'four'"),
        ("train.py", ["-o", "P=0"], "P=0"),
        ("train.py", ["-o", "space=air"], "space can be kv, hidden; got 'air'"),
        ("train.py", ["-o", "static=maybe"], "static takes 0 or 1, got 'maybe'"),
        ("train.py", ["--init", "nowhere"], "no model at nowhere"),
        ("train.py", ["--data", "nowhere"], "no data at nowhere"),
        ("train.py", ["--init", "tests"], "no tests/config.json"),
        ("train.py", ["--block-size", "8"], "the model takes 8"),
        ("train.py", ["--resume", "--out", "nowhere"], "there is no run at nowhere"),
        ("train.py", ["--steps", "0"], "--steps must be at least 1, got 0"),
        ("sample.py", ["nowhere.pt", "x"], "no checkpoint at nowhere.pt. Run: python train.py"),
        ("sample.py", ["README.md", "x"], "README.md is not a checkpoint"),
    ],
)
def test_what_a_user_can_mend_is_one_line(script, args, says, tmp_path):
    out = [] if script == "sample.py" or "--out" in args else ["--out", str(tmp_path / "x")]
    status, text = cli(script, *args, *out, *(["--device", "cpu"]))
    assert status in (1, 2) and says in text and "Traceback" not in text
    assert text.strip().splitlines()[-1].count("error: ") == 1
    assert not (tmp_path / "x").exists()  # nothing half-written


def test_a_finished_run_is_not_overwritten_unasked(trained, rows):
    with pytest.raises(FileExistsError, match="--resume goes on with it, --force starts again"):
        train.main([*SMALL, "--data", rows, "--out", trained])


def test_resuming_with_other_settings_is_refused(trained, rows):
    with pytest.raises(ValueError, match="lr was 0.01"):
        train.main(
            [
                *SMALL,
                "--steps",
                "60",
                "--batch-size",
                "32",
                "--data",
                rows,
                "--out",
                trained,
                "--resume",
                "--lr",
                "1e-3",
            ]
        )


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_try(rows, tmp_path, monkeypatch):
    real = train.schedule
    monkeypatch.setattr(train, "schedule", lambda step, steps: float("nan") if step == 4 else real(step, steps))
    with pytest.raises(ValueError, match=r"loss is nan at step 5; .*best.pt is intact. Try --lr"):
        train.main([*SMALL, "--data", rows, "--out", str(tmp_path / "x")])
    assert load_tuner(str(tmp_path / "x" / "best.pt"))["step"] == 3
