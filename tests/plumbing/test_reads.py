"""Prompts that are read once, for the whole of training: what is kept is what the frozen model makes of them."""

import pytest
import torch
from conftest import SMALL, log_without_speed, right_padded, small_model, small_tuner

import train
from baselines import METHODS
from data import Example, collate
from data.reads import Reads, keep_reads
from model import NO_TUNER


def examples(lengths=(6, 4, 9, 4)):
    idx, instr = right_padded(lengths, 12)
    return [Example(ids[:n].tolist(), [7, 8, i]) for i, (ids, n) in enumerate(zip(idx, lengths))]


def test_what_is_kept_is_what_is_read(model):
    rows = examples()
    batch = collate(rows, 64)
    reads = Reads(model, NO_TUNER)
    reads(collate(rows[:2], 64))
    kept = reads(batch)
    length = batch.instr.sum(1)
    read = model.read(batch.idx[:, :9], length)
    assert torch.equal(kept.at, read.at) and torch.equal(kept.pos, read.pos) and torch.equal(kept.instr, read.instr)
    for l in range(2):
        assert torch.equal(kept.layers[l].joined.keep, read.layers[l].joined.keep)
        for row, n in enumerate(length):
            for ours, theirs in zip(kept.layers[l].joined[:2], read.layers[l].joined[:2]):
                torch.testing.assert_close(ours[row, :, :n], theirs[row, :, :n])
            torch.testing.assert_close(kept.states[l][row, :n], read.states[l][row, :n])


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if "answer" in cls.acts])
def test_a_step_has_the_same_gradient_whether_prompts_are_read_then_or_before(method):
    model = small_model("llama")
    tuner = small_tuner(method, model, act="answer")
    rows = examples()
    batch = collate(rows, 64)
    reads = Reads(model, tuner)
    grads = []
    for kept in (None, reads):
        tuner.zero_grad()
        train.add_gradients(model, tuner, batch, 2, kept)
        grads.append([p.grad.clone() for p in tuner.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert a.abs().sum() > 0


def test_reads_that_are_too_large_are_not_kept_and_it_says_how_large(model, capsys):
    c = model.config
    size = 2 * (2 * c.n_kv_head * c.head_dim + 32) * (6 + 4 + 9 + 4) * 4 / 1e9
    assert keep_reads(model, NO_TUNER, examples(), 0.9 * size) is None
    assert keep_reads(model, NO_TUNER, examples(), 1.1 * size) is not None
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("reads of all prompts: 0.00 GB, read anew each step (--keep-reads ")
    assert second.startswith("reads of all prompts: 0.00 GB, kept (--keep-reads ")


def test_a_run_is_the_same_with_reads_kept_and_resumes_as_it_would_have_gone_on(rows, tmp_path):
    anew, kept, resumed = (str(tmp_path / name) for name in ("anew", "kept", "resumed"))
    common = [*SMALL, "--data", rows, "--act", "answer"]
    train.main([*common, "--keep-reads", "0", "--out", anew])
    train.main([*common, "--out", kept])
    for a, b in zip(log_without_speed(anew), log_without_speed(kept)):
        assert a == pytest.approx(b, abs=1e-4)
    with pytest.raises(SystemExit):
        stop_after_three(common, resumed)
    train.main([*common, "--out", resumed, "--resume"])
    assert log_without_speed(resumed) == log_without_speed(kept)


def stop_after_three(common, out):
    """A run that is asked to stop after three steps."""
    real = train.distributed.all_reduce_grads
    steps = []

    def stopping(parameters, loss, n, stop):
        steps.append(loss)
        return (*real(parameters, loss, n, stop)[:2], len(steps) == 3)

    train.distributed.all_reduce_grads = stopping
    try:
        train.main([*common, "--out", out])
    finally:
        train.distributed.all_reduce_grads = real
