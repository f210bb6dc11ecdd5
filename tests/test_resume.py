"""Nothing is lost: killed runs, damaged checkpoints, full disks, two runs in one folder."""

import errno
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_train import SMALL, rows, tensors  # noqa: F401  (rows is a fixture)

import train
from checkpoint import load_tuner
from cli import run

LONGER = [*SMALL, "--steps", "40", "--eval-every", "20", "--save-every", "3", "--val-rows", "8"]
KILLS = int(os.environ.get("IAPT_KILLS", 20))


def child(argv, die_at=None):
    """train.main in a process of its own, which it may leave with SIGKILL just before its n-th os.replace."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if die_at is not None:
        real, left = os.replace, [die_at]

        def replace(*args):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        os.replace = replace
    train.main(argv)


def start(argv, **how):
    process = multiprocessing.get_context("fork").Process(target=child, args=(argv,), kwargs=how)
    process.start()
    return process


def finish(argv, out):
    """Go on with what a killed run left, or start it if it had saved nothing yet."""
    process = start([*argv, *(["--resume"] if os.path.exists(os.path.join(out, "last.pt")) else ["--force"])])
    process.join()
    assert process.exitcode == 0


def log(out):
    """Its lines without the speed."""
    with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as f:
        return [line.split('"tokens_per_s"')[0] + line.split('"exact"')[1] for line in f]


def same(a, b):
    a_, b_ = tensors(a), tensors(b)
    return a_.keys() == b_.keys() and all(torch.equal(a_[k], b_[k]) for k in a_) and log(a) == log(b)


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):  # noqa: F811
    """A run that nothing disturbs, and how long its training takes."""
    out = str(tmp_path_factory.mktemp("whole"))
    process, begin = start([*LONGER, "--data", rows, "--out", out]), time.monotonic()
    process.join()
    return out, time.monotonic() - begin


@pytest.mark.slow
def test_a_run_killed_at_random_moments_and_resumed_is_the_run_that_was_never_stopped(rows, whole, tmp_path):  # noqa: F811
    wanted, seconds = whole
    rng, killed = random.Random(0), 0
    for i in range(KILLS):
        out = str(tmp_path / str(i))
        argv = [*LONGER, "--data", rows, "--out", out]
        process = start(argv)
        process.join(rng.uniform(0.1, 0.95) * seconds)
        killed += process.is_alive()
        process.kill()
        process.join()
        finish(argv, out)
        assert same(out, wanted), f"killed at moment {i}"
    assert killed > KILLS / 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["iapt", "dynamic", "lora"])
def test_a_run_killed_while_it_saves_and_resumed_is_the_run_that_was_never_stopped(rows, method, tmp_path):  # noqa: F811
    """Between the writing of a file and its replacing the old one; dynamic prompting draws while it trains."""
    argv = [*LONGER, "--data", rows, "--method", method]
    finish([*argv, "--out", str(tmp_path / "whole")], str(tmp_path / "whole"))
    for die_at in (0, 1, 2, 3, 5, 8, 13, 21):
        out = str(tmp_path / str(die_at))
        process = start([*argv, "--out", out], die_at=die_at)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        finish([*argv, "--out", out], out)
        assert same(out, str(tmp_path / "whole")), f"killed at the file {die_at}"


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(rows, tmp_path, capsys):  # noqa: F811
    out, reference = str(tmp_path / "a"), str(tmp_path / "b")
    argv = [*SMALL, "--steps", "8", "--save-every", "2", "--data", rows]
    train.main([*argv, "--out", out])
    train.main([*argv, "--out", reference])
    path = os.path.join(out, "last.pt")
    content = open(path, "rb").read()
    for damaged in (content[: len(content) // 2], b"", content[:2000] + b"\0" * 500 + content[2500:]):
        with open(path, "wb") as f:
            f.write(damaged)
        train.main([*argv, "--out", out, "--resume"])
        assert "going on from" in capsys.readouterr().err
        assert same(out, reference)
        with open(os.path.join(out, "previous.pt"), "wb") as f:  # as it was before the last save
            torch.save(load_tuner(path) | {"state": {"step": 8, "lowest": 0.0, "losses": []}}, f)
        torch.save({**load_tuner(os.path.join(reference, "previous.pt"))}, os.path.join(out, "previous.pt"))
    os.remove(os.path.join(out, "previous.pt"))
    with open(path, "wb") as f:
        f.write(b"")
    with pytest.raises(ValueError, match="last.pt is not a checkpoint of train.py, or was cut off"):
        train.main([*argv, "--out", out, "--resume"])


def test_a_full_disk_stops_the_run_and_the_last_good_checkpoint_is_intact(rows, tmp_path, monkeypatch):  # noqa: F811
    out, real, left = str(tmp_path / "x"), os.fsync, [6]

    def full(fd):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    argv = [*SMALL, "--save-every", "1", "--data", rows, "--out", out]
    with pytest.raises(OSError, match="No space left"):
        train.main(argv)
    monkeypatch.undo()
    assert sorted(os.listdir(out)) == sorted(["best.pt", "last.pt", "previous.pt", "log.jsonl", "lock"])
    train.main([*argv, "--resume"])
    train.main([*argv[:-1], str(tmp_path / "y")])
    assert same(out, str(tmp_path / "y"))


def test_two_runs_into_one_folder_are_refused(rows, tmp_path):  # noqa: F811
    out = str(tmp_path / "x")
    process = start([*SMALL, "--steps", "10000", "--eval-every", "10000", "--data", rows, "--out", out])
    try:
        while not os.path.exists(os.path.join(out, "log.jsonl")):
            assert process.is_alive()
            time.sleep(0.05)
        with pytest.raises(FileExistsError, match="another run writes to"):
            train.main([*SMALL, "--data", rows, "--out", out, "--force"])
    finally:
        process.kill()
        process.join()


def test_a_step_computed_in_parts_is_the_step_computed_at_once(rows, tmp_path):  # noqa: F811
    """Rows have responses of different lengths: each target counts alike, whatever part it is in."""
    for name, parts in (("a", "1"), ("b", "3")):
        train.main([*SMALL, "--grad-accum", parts, "--data", rows, "--out", str(tmp_path / name)])
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    start_ = train.build("iapt", train.open_model("tiny")[0].config).state_dict()
    moved = max((a[k] - start_[k]).abs().max() for k in a)
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-3 * moved


@pytest.mark.parametrize(
    "error, says",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "error: out of memory. Try a smaller --batch-size, --grad-accum",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: out of memory"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_what_a_machine_lacks_is_one_line(error, says, monkeypatch, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run(main)
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and says in said and said.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug"])
    with pytest.raises(type(error)):
        run(main)


def test_a_fault_of_ours_is_not_dressed_up_as_the_user_s():
    def main():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run(main)
    assert os.path.exists(os.path.join(ROOT, "train.py"))
