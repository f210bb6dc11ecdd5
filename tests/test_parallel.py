"""Several processes give what one gives: data parallel, and with the frozen weights sharded (FSDP2), over gloo."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_resume import log
from test_train import SMALL, rows, run_in, tensors  # noqa: F401  (rows is a fixture)

import parallel
import train

pytestmark = pytest.mark.slow
ARGV = [*SMALL, "--steps", "20", "--eval-every", "10", "--lr", "1e-3"]


def process(rank, size, port, argv):
    """What torchrun does to each process; forked, so that PyTorch need not be imported anew."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    parallel.RANK, parallel.SIZE = rank, size
    train.main(argv)


def together(size, argv):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(rank, size, port, argv)) for rank in range(size)]
    for p in processes:
        p.start()
    return processes


def ended(processes, seconds=120):
    for p in processes:
        p.join(seconds)
    codes = [p.exitcode for p in processes]
    for p in processes:
        p.kill()
    return codes


@pytest.fixture(scope="module")
def alone(rows, tmp_path_factory):  # noqa: F811
    """method and options -> the trained tensors of one process (forked: gloo's threads must not be inherited)."""
    known = {}

    def f(*options):
        if options not in known:
            out = str(tmp_path_factory.mktemp("alone") / "x")
            assert ended(together(1, [*ARGV, "--data", rows, "--out", out, *options])) == [0]
            known[options] = tensors(out)
        return known[options]

    return f


@pytest.mark.parametrize("how", [[], ["--shard"]], ids=["replicated", "sharded"])
@pytest.mark.parametrize(
    "size, options",
    [  # all at one rate: Adam turns the rounding of a gradient near zero into a step of about the rate
        (2, ["--method", "iapt", "-o", "static_lr=1"]), (4, ["--method", "iapt", "-o", "static_lr=1"]),
        (2, ["--method", "iapt", "-o", "space=hidden", "static_lr=1"]),
        (2, ["--method", "ptuning2"]), (2, ["--method", "lora"]),
    ],
    ids=["iapt", "iapt-4", "iapt-hidden", "ptuning2", "lora"],
)  # fmt: skip
def test_several_processes_train_what_one_trains(options, size, how, alone, rows, tmp_path):  # noqa: F811
    out = str(tmp_path / "x")
    assert ended(together(size, [*ARGV, "--data", rows, "--out", out, *options, *how])) == [0] * size
    wanted, got = alone(*options), tensors(out)
    assert wanted.keys() == got.keys()
    assert max((wanted[k] - got[k]).abs().max() for k in got) < 1e-5


def test_a_killed_process_ends_the_job_and_the_job_can_be_resumed(rows, tmp_path):  # noqa: F811
    out, whole = str(tmp_path / "x"), str(tmp_path / "whole")
    argv = [*ARGV, "--steps", "300", "--save-every", "5", "--eval-every", "100", "--data", rows]
    assert ended(together(2, [*argv, "--out", whole])) == [0, 0]
    processes = together(2, [*argv, "--out", out])
    while not os.path.exists(os.path.join(out, "previous.pt")):
        assert all(p.is_alive() for p in processes)
        time.sleep(0.02)
    processes[1].kill()
    codes = ended(processes)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)  # neither finished nor waiting for ever
    assert ended(together(2, [*argv, "--out", out, "--resume"])) == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(tensors(out).values(), tensors(whole).values()))
    assert log(out) == log(whole)


def test_torchrun_prints_once_and_stops_all_processes_together(rows, tmp_path):  # noqa: F811
    """One SIGTERM to the launcher: the run is saved between two steps, and goes on from there."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", os.path.join(ROOT, "train.py")]
    argv = [*ARGV, "--steps", "300", "--eval-every", "100", "--data", rows, "--out", str(tmp_path / "x")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as p:
        while not os.path.exists(tmp_path / "x" / "log.jsonl"):
            assert p.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        p.terminate()
        said = p.communicate()[0]
    assert p.returncode != 0 and said.count("parameters train") == 1
    assert os.path.exists(tmp_path / "x" / "last.pt")
    done = subprocess.run([*command, *argv, "--resume"], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.count("saved ") == 1


def test_what_cannot_be_shared_is_said(rows, monkeypatch):  # noqa: F811
    assert run_in(train, "--shard")[1].count("--shard is for torchrun") == 1
    monkeypatch.setattr(parallel, "SIZE", 3)
    assert run_in(train, "--batch-size", "8")[1].count("--batch-size 8 cannot be shared by 3 processes") == 1
