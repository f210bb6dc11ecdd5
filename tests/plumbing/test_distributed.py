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
from conftest import ROOT, SMALL, run_in, same_run, tensors

import train
from data import Batch
from iapt import IAPT
from model import Config, Decoder, Tuner
from plumbing import distributed

ARGV = [*SMALL, "--steps", "20", "--eval-every", "10", "--lr", "1e-3"]


def test_every_row_of_a_batch_goes_to_one_process(monkeypatch):
    batch = Batch(*(torch.arange(7)[:, None] + 10 * i for i in range(3)))
    monkeypatch.setattr(distributed, "WORLD_SIZE", 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "RANK", rank)
        parts.append(distributed.local_rows(batch))
    assert all(isinstance(part, Batch) and part.instr[0, 0] - part.idx[0, 0] == 20 for part in parts)
    assert sorted(torch.cat([part.idx for part in parts]).flatten().tolist()) == list(range(7))


def test_processes_draw_other_numbers_and_a_step_draws_the_same_each_time(monkeypatch):
    """A CPU's generator takes the low 32 bits of a seed: a process's number in higher ones had no effect."""
    draws = []
    for rank, step in ((0, 5), (1, 5), (2, 5), (0, 6), (1, 5)):
        monkeypatch.setattr(distributed, "RANK", rank)
        distributed.seed_step(3, step)
        draws.append(torch.rand(1).item())
    assert len(set(draws[:4])) == 4 and draws[4] == draws[1]


def test_one_process_needs_no_others():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    assert distributed.init("cpu") == "cpu" and tuple(distributed.all_reduce_grads([parameter], 1.5, 2)) == (1.5, 2)
    assert parameter.grad.tolist() == [1, 1]
    distributed.barrier()
    distributed.shutdown()


def test_a_batch_that_cannot_be_shared_evenly_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 3)
    status, output = run_in(train, "--batch-size", "8")
    assert status == 2 and "--batch-size 8 is not a multiple of the 3 processes" in output


# -- Whole runs --------------------------------------------------------------------------------------------------------


def process(work, rank, size, port, *args):
    """What torchrun does to each process; forked, so that PyTorch need not be imported anew."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    distributed.RANK, distributed.WORLD_SIZE = rank, size
    work(*args)


def train_at_one_rate(argv):
    IAPT.groups = Tuner.groups  # Adam turns a rounding error near zero into a step of about the rate
    train.main(argv)


def count_weights(counts):
    """How many of the blocks' weights this process holds, before and after they are spread."""
    device, model = distributed.init("cpu"), Decoder(Config(vocab_size=50, n_layer=2, n_head=4, n_embd=32))
    before = sum(p.numel() for p in model.h.parameters())
    distributed.shard(model, device)
    counts.put((before, sum(p.to_local().numel() for p in model.h.parameters())))
    distributed.shutdown()


def start(size, *args, work=train_at_one_rate):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(work, rank, size, port, *args)) for rank in range(size)]
    for p in processes:
        p.start()
    return processes


def exit_codes(processes, seconds=120):
    for p in processes:
        p.join(seconds)
    codes = [p.exitcode for p in processes]
    for p in processes:
        p.kill()
    return codes


@pytest.fixture(scope="module")
def alone(rows, tmp_path_factory):
    """method, act -> the trained tensors of one process (forked: gloo's threads must not be inherited)."""
    known = {}

    def run(method, act):
        if (method, act) not in known:
            out = str(tmp_path_factory.mktemp("alone") / "x")
            argv = [*ARGV, "--data", rows, "--out", out, "--method", method, "--act", act]
            assert exit_codes(start(1, argv)) == [0]
            known[method, act] = tensors(out)
        return known[method, act]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--shard"]], ids=["replicated", "sharded"])
@pytest.mark.parametrize(
    "method, act, size",
    [("iapt", "all", 2), ("iapt", "all", 4), ("paper-iapt", "all", 2), ("ptuning2", "all", 2), ("lora", "all", 2),
     ("iapt", "answer", 2), ("lora", "answer", 2)],
)  # fmt: skip
def test_several_processes_train_what_one_trains(method, act, size, options, alone, rows, tmp_path):
    out = str(tmp_path / "x")
    argv = [*ARGV, "--data", rows, "--out", out, "--method", method, "--act", act, *options]
    assert exit_codes(start(size, argv)) == [0] * size
    wanted, trained = alone(method, act), tensors(out)
    assert wanted.keys() == trained.keys()
    assert max((wanted[name] - trained[name]).abs().max() for name in trained) < 1e-5


@pytest.mark.slow
def test_sharding_leaves_each_process_its_share_of_the_frozen_weights():
    counts = multiprocessing.get_context("fork").Queue()
    assert exit_codes(start(2, counts, work=count_weights)) == [0, 0]
    for _ in range(2):
        whole, share = counts.get(timeout=5)
        assert whole / 2 <= share <= 1.01 * whole / 2


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_the_job_can_be_resumed(rows, tmp_path):
    out, whole = str(tmp_path / "x"), str(tmp_path / "whole")
    argv = [*ARGV, "--steps", "300", "--save-every", "5", "--eval-every", "100", "--data", rows]
    assert exit_codes(start(2, [*argv, "--out", whole])) == [0, 0]
    processes = start(2, [*argv, "--out", out])
    while not os.path.exists(os.path.join(out, "previous.pt")):
        assert all(p.is_alive() for p in processes)
        time.sleep(0.02)
    processes[1].kill()
    codes = exit_codes(processes)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)  # neither finished nor waiting for ever
    assert exit_codes(start(2, [*argv, "--out", out, "--resume"])) == [0, 0]
    assert same_run(out, whole)


@pytest.mark.slow
def test_torchrun_prints_once_and_stops_all_processes_together(rows, tmp_path):
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
        output = p.communicate()[0]
    assert p.returncode != 0 and output.count("parameters train") == 1
    assert os.path.exists(tmp_path / "x" / "last.pt")
    done = subprocess.run([*command, *argv, "--resume"], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.count("saved ") == 1
