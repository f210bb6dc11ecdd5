"""What the training loop does at each step: rates, clipping, weight decay, modes, random draws, and what it keeps."""

import pytest
import torch

import sample
import train
from baselines.prompts import Dynamic
from data import open_data
from data.files import write_rows
from plumbing.checkpoint import load_checkpoint

LOOP = "--steps 8 --eval-every 4 --batch-size 4 --val-rows 8 --test-rows 4 --device cpu --lr 0.01".split()


@pytest.fixture
def spied(monkeypatch):
    """The optimizers that a run makes, and what each had at its steps: rates, gradients' length, weight decay."""
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self, *args):
            parameters = [p for group in self.param_groups for p in group["params"]]
            length = torch.stack([p.grad.norm() for p in parameters]).norm().item()
            seen.append(([g["lr"] for g in self.param_groups], length, [g["weight_decay"] for g in self.param_groups]))
            return super().step(*args)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    return seen


def test_rates_rise_over_six_percent_of_the_steps_and_fall_to_zero():
    shares = [train.schedule(step, 100) for step in (0, 2, 5, 6, 50, 99)]
    assert shares == pytest.approx([1 / 6, 1 / 2, 0.95, 0.94, 0.5, 0.01])
    assert train.schedule(0, 1) == 1.0


def test_each_group_follows_the_schedule_at_its_own_rate_and_gradients_are_clipped_to_one(rows, tmp_path, spied):
    train.main([*LOOP, "--data", rows, "--out", str(tmp_path / "run")])
    for step, (rates, length, _) in enumerate(spied):
        assert rates == pytest.approx([x * train.schedule(step, 8) for x in (0.01, 0.16, 0.002)])
        assert length <= 1.0001
    assert max(length for _, length, _ in spied) > 0.99  # some were longer


def test_weight_decay_reaches_the_optimizer_but_not_constants_and_coefficients(rows, tmp_path, spied):
    train.main([*LOOP, "--data", rows, "--out", str(tmp_path / "run"), "--weight-decay", "0.1"])
    assert all(decay == [0.1, 0.0, 0.0] for _, _, decay in spied)


def test_best_pt_is_the_state_with_the_lowest_validation_loss_and_not_the_last(rows, tmp_path):
    """Eight rows, learned by heart: the loss on others falls, and rises again."""
    few = open_data(rows)
    for name, split in few.items():
        write_rows(str(tmp_path / f"{name}.jsonl"), split[:8] if name == "train" else split[:40])
    out = str(tmp_path / "run")
    options = "--steps 60 --eval-every 6 --batch-size 8 --test-rows 4 --device cpu --lr 0.05".split()
    train.main([*options, "--data", str(tmp_path), "--out", out])
    log = train.RunFolder(out).read_log()
    vals = [row["val"] for row in log]
    lowest = log[vals.index(min(vals))]
    assert lowest["step"] < 60 and max(vals[-3:]) > min(vals) + 0.1
    best = load_checkpoint(out)
    assert (best["step"], best["val"]) == (lowest["step"], lowest["val"])
    model, tokenizer, _, (tuner,) = sample.open_runs([out])
    examples = train.encode(open_data(str(tmp_path))["val"], tokenizer, 256)
    assert train.evaluate(model, examples, tuner).nats == pytest.approx(best["val"], abs=1e-4)


def test_a_method_trains_in_training_mode_after_each_validation_and_draws_anew_at_each_step(
    rows, tmp_path, monkeypatch
):
    """Also after --resume, as the run that was never stopped would have drawn."""
    modes, draws, real = [], [], Dynamic.embed

    def embed(self, x, instr):
        if torch.is_grad_enabled():
            modes.append(self.training)
            state = torch.get_rng_state()
            draws.append(torch.rand(1).item())
            torch.set_rng_state(state)
        return real(self, x, instr)

    monkeypatch.setattr(Dynamic, "embed", embed)
    common = [*LOOP, "--data", rows, "--method", "dynamic", "-o", "P=4", "--out"]
    train.main([*common, str(tmp_path / "whole")])
    assert modes == [True] * 8 and len(set(draws)) == 8
    whole, draws[:], steps, reduce = list(draws), [], [], train.distributed.all_reduce_grads
    stop = lambda p, loss, n, asked: (steps.append(0), (*reduce(p, loss, n, asked)[:2], len(steps) == 5))[1]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.distributed, "all_reduce_grads", stop)
        train.main([*common, str(tmp_path / "resumed")])
    train.main([*common, str(tmp_path / "resumed"), "--resume"])
    assert draws == whole
