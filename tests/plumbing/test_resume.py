"""Nothing is lost: killed runs, damaged checkpoints, full disks, two runs in one folder."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch
from conftest import SMALL, same_run, tensors

import sample
import train
from baselines import build
from plumbing.cli import run
from sample import open_model

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


def start(argv, die_at=None):
    process = multiprocessing.get_context("fork").Process(target=child, args=(argv, die_at))
    process.start()
    return process


def finish(argv, out):
    """Go on with what a killed run left, or start it if it had saved nothing yet."""
    process = start([*argv, "--resume" if os.path.exists(os.path.join(out, "last.pt")) else "--force"])
    process.join()
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """A run that nothing disturbs, and how long its training takes."""
    out = str(tmp_path_factory.mktemp("whole"))
    process, begin = start([*LONGER, "--data", rows, "--out", out]), time.monotonic()
    process.join()
    return out, time.monotonic() - begin


@pytest.mark.slow
def test_a_run_killed_at_random_moments_and_resumed_is_the_run_that_was_never_stopped(rows, whole, tmp_path):
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
        assert same_run(out, wanted), f"killed at moment {i}"
    assert killed > KILLS / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, files", [("iapt", (0, 1, 2, 3, 5, 8, 13, 21)), ("dynamic", (2, 8)), ("lora", (3, 13))]
)
def test_a_run_killed_while_it_saves_and_resumed_is_the_run_that_was_never_stopped(rows, method, files, tmp_path):
    """Between the writing of a file and its replacing the old one; dynamic prompting draws while it trains."""
    argv = [*LONGER, "--data", rows, "--method", method]
    finish([*argv, "--out", str(tmp_path / "whole")], str(tmp_path / "whole"))
    for die_at in files:
        out = str(tmp_path / str(die_at))
        process = start([*argv, "--out", out], die_at)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        finish([*argv, "--out", out], out)
        assert same_run(out, str(tmp_path / "whole")), f"killed at the file {die_at}"


@pytest.mark.slow
def test_two_runs_into_one_folder_are_refused(rows, tmp_path):
    out = str(tmp_path / "x")
    process = start([*SMALL, "--steps", "10000", "--eval-every", "10000", "--data", rows, "--out", out])
    try:
        while not os.path.exists(os.path.join(out, "log.jsonl")):
            assert process.is_alive()
            time.sleep(0.05)
        with pytest.raises(FileExistsError, match="another run is writing to"):
            train.main([*SMALL, "--data", rows, "--out", out, "--force"])
        assert os.path.exists(os.path.join(out, "log.jsonl"))  # the other run's
    finally:
        process.kill()
        process.join()


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(rows, short, tmp_path, capsys):
    argv = [*SMALL, "--data", rows, "--resume", "--out"]
    with open(os.path.join(short, "last.pt"), "rb") as f:
        content = f.read()
    for i, damaged in enumerate((b"", content[:2000] + b"\0" * 500 + content[2500:])):
        out = tmp_path / str(i)
        shutil.copytree(short, out)
        (out / "last.pt").write_bytes(damaged)
        train.main([*argv, str(out)])
        assert "previous.pt, step 3" in capsys.readouterr().err
        assert same_run(out, short)
    (out / "previous.pt").unlink()
    (out / "last.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="last.pt is not a checkpoint of train.py, or was cut off"):
        train.main([*argv, str(out)])


def test_a_full_disk_stops_the_run_and_the_last_good_checkpoint_is_intact(rows, short, tmp_path, monkeypatch):
    out, real, left = str(tmp_path / "x"), os.fsync, [6]

    def full(fd):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    argv = [*SMALL, "--save-every", "1", "--data", rows, "--out", out]
    with pytest.raises(OSError, match=r"x/\w+.pt cannot be written \(No space left on device\): free some space"):
        train.main(argv)
    monkeypatch.undo()
    assert sorted(os.listdir(out)) == sorted(["best.pt", "last.pt", "previous.pt", "log.jsonl", "lock"])
    train.main([*argv, "--resume"])
    assert same_run(out, short)


def test_a_run_that_was_stopped_before_its_first_validation_says_so_and_one_that_saved_nothing_starts_anew(
    rows, short, tmp_path, monkeypatch
):
    argv, real = [*SMALL, "--data", rows, "--out", str(tmp_path)], train.Batches.batch
    (tmp_path / "log.jsonl").touch()  # what a run leaves that was killed at once
    with pytest.raises(FileNotFoundError, match="--resume: there is no run at .* that has saved anything"):
        train.main([*argv, "--resume"])
    monkeypatch.setattr(train.Batches, "batch", lambda *args: signal.raise_signal(signal.SIGINT) or real(*args))
    with pytest.raises(SystemExit, match="stopped after 1 steps, and saved"):
        train.main(argv)
    with pytest.raises(FileNotFoundError, match="stopped before its first validation, and has no best.pt yet"):
        sample.main([str(tmp_path), "x", "--device", "cpu"])
    monkeypatch.undo()
    train.main([*argv, "--resume"])
    assert same_run(tmp_path, short)


def test_a_step_computed_in_micro_batches_is_the_step_computed_at_once(rows, short, tmp_path):
    """Rows have responses of different lengths: each target counts alike, whatever micro-batch it is in."""
    train.main([*SMALL, "--grad-accum", "3", "--data", rows, "--out", str(tmp_path / "x")])
    whole, parts = tensors(short), tensors(tmp_path / "x")
    torch.manual_seed(0)
    initial = build("iapt", open_model("tiny")[0].config).state_dict()
    moved = max((whole[name] - initial[name]).abs().max() for name in whole)
    assert max((whole[name] - parts[name]).abs().max() for name in whole) < 1e-3 * moved


@pytest.mark.parametrize(
    "error, says",
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "error: out of memory. Try a smaller --batch-size, "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: out of memory"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_what_a_machine_lacks_is_one_line(error, says, monkeypatch, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run(main)
    text = capsys.readouterr().err
    assert stopped.value.code == 1 and says in text and text.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug"])
    with pytest.raises(type(error)):
        run(main)


def test_a_fault_of_ours_is_not_dressed_up_as_the_user_s():
    def main():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run(main)
