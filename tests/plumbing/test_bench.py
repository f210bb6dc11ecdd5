"""Benchmarks: what they compare is the same work, and what they print is what was measured."""

import json
from importlib.util import find_spec

import pytest
import torch
from conftest import run_in, small_model

from baselines import build
from experiments import bench
from model import NO_TUNER

HUB = find_spec("transformers") is not None and find_spec("peft") is not None
SIZES = dict(vocab_size=50, block_size=64, n_layer=2, n_head=4, n_embd=32)
SMALL_SHAPES = {"gpt2": SIZES, "llama": dict(arch="llama", n_kv_head=2, **SIZES)}


@pytest.fixture
def small(monkeypatch):
    """A shape that takes no time: its name."""
    monkeypatch.setitem(bench.SHAPES, "small", SMALL_SHAPES["llama"])
    return "small"


def saved_rows(folder, command):
    """The rows of a table that a benchmark has saved."""
    return json.loads((folder / f"{command}.json").read_text())["rows"]


# -- Timing ------------------------------------------------------------------------------------------------------------


def test_rivals_run_in_turn_and_the_first_round_is_not_counted():
    calls = []

    def rival(name):
        return lambda: calls.append(name) or len(calls)

    results = bench.interleaved({name: rival(name) for name in "ab"}, 2, "")
    assert calls == list("ababab")
    assert results == {"a": [3, 5], "b": [4, 6]}


def test_a_ratio_is_taken_round_by_round():
    seconds = {"a": [1.0, 10.0, 100.0], "b": [2.0, 30.0, 400.0]}
    assert bench.ratio(seconds, "b", "a") == [3, 2, 4]
    assert bench.ratio(seconds, "a", "a") == [1, 1, 1]
    assert bench.ratio({"a": [2.0], "b": [3.0]}, "b", "a") == [1.5] * 3


def test_peak_memory_is_that_of_one_call(monkeypatch):
    memory = {"now": 5_000_000, "peak": 90_000_000}

    def call():
        memory["peak"] = max(memory["peak"], memory["now"] + 3_000_000)

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: memory.update(peak=memory["now"]))
    assert bench.peak_memory(call, "cuda") == {"peak MB": "8", "added MB": "3"}
    assert bench.peak_memory(call, "cpu") == {}


def test_what_is_kept_for_the_backward_pass_is_counted_once_and_without_weights():
    x, w = (torch.randn(10, requires_grad=True) for _ in range(2))
    assert bench.kept_bytes(lambda: (x * w * x).sum(), without=[w]) == 2 * x.nbytes  # x, and x * w


def test_a_report_is_the_same_in_both_files_and_on_the_screen(tmp_path, capsys):
    args = bench.parse(["step", "--out", str(tmp_path), "--rounds", "3", "--device", "cpu"])
    bench.report(args, [{"step": "x", "time": [1.0, 0.5, 2.25], "tokens/s": "7"}])
    printed = capsys.readouterr().out
    assert (tmp_path / "step.md").read_text() == printed
    assert printed.splitlines()[:3] == [
        "| step | time | tokens/s |",
        "|---|---|---|",
        "| x | 1.00 (0.50 to 2.25) | 7 |",
    ]
    content = json.loads((tmp_path / "step.json").read_text())
    assert content["rows"] == [{"step": "x", "time": [1.0, 0.5, 2.25], "tokens/s": "7"}]
    assert content["command"] in printed and content["machine"] in printed


# -- The work that is timed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["iapt", "ptuning2", "lora", "adapter", "full"])
def test_our_steps_on_a_shared_model_are_those_of_each_method_alone(method):
    """The gradients are those of the method on a model of its own, and the model stays as it was."""
    idx = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    shared, before = small_model("llama"), small_model("llama").state_dict()
    steps = bench.our_steps(shared, idx, ["lora", "full", "iapt", "ptuning2", "adapter"])
    for step in steps.values():
        step()
    (step,) = (step for label, step in steps.items() if label.startswith(f"ours: {method}"))
    alone = small_model("llama")
    tuner = build(method, alone.config)
    tuner.load_state_dict(step.module.state_dict())
    tuner.attach(alone)
    targets, instr = bench.targets_of(idx)
    alone(idx, instr, tuner, targets).backward()
    step.optimizer.zero_grad()
    with step.attached():
        step.loss().backward()
    for p, q in zip(step.module.parameters(), tuner.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert shared.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in shared.state_dict().items())
    assert step.trained == sum(p.numel() for p in tuner.parameters())


def test_half_of_the_tokens_are_instruction_and_the_targets_are_the_next_tokens():
    idx = torch.arange(12).view(2, 6)
    targets, instr = bench.targets_of(idx)
    assert instr.tolist() == [[True] * 3 + [False] * 3] * 2
    assert targets.tolist() == [[-1, -1, 3, 4, 5, -1], [-1, -1, 9, 10, 11, -1]]
    targets, instr = bench.targets_of(idx, 2)
    assert instr.sum(1).tolist() == [4, 4] and targets.tolist() == [[-1] * 3 + [4, 5, -1], [-1] * 3 + [10, 11, -1]]


def test_a_served_answer_is_timed_in_both_parts():
    model = small_model("llama")
    first, later, size = bench.serve(model, [[1] * 4] * 2, NO_TUNER, 3)
    c = model.config
    assert first > 0 and later > 0
    assert size == 4 * 2 * c.n_layer * 2 * c.n_kv_head * c.head_dim * (4 + 3)  # keys and values of two rows, in fp32


@pytest.mark.skipif(not HUB, reason="needs transformers and peft")
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_the_model_in_transformers_has_the_same_shape(arch, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "small", SMALL_SHAPES[arch])
    args = bench.parse(["step"])
    args.device, args.dtype = "cpu", torch.bfloat16
    ours, theirs = bench.our_model("small", args), bench.hub_model("small", args)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    assert {p.dtype for p in (*ours.parameters(), *theirs.parameters())} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


# -- Commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, count",
    [
        (["step", "--no-hub", "--methods", "iapt,lora", "--checkpoint"], 3),
        (["step", "--no-hub", "--methods", "iapt,lora,prompt", "--answer", "2"], 8),
        (["first", "--no-hub", "--tenants", "1", "2", "--methods", "iapt,lora"], 6),
        (["hidden", "--inputs", "1", "2", "--P", "1", "2", "--new", "2", "--input", "3", "--most", "6"], 7),
        (["serve", "--tenants", "1", "2", "--new", "3"], 10),
    ],
)
def test_a_benchmark_leaves_a_row_for_each_rival(argv, count, small, tmp_path):
    sizes = ["--shapes", small, "--rows", "2", "--tokens", "6", "--rounds", "1", "--device", "cpu"]
    status, text = run_in(bench, *argv, *sizes, "--out", str(tmp_path))
    assert status == 0, text
    assert len(saved_rows(tmp_path, argv[0])) == count


@pytest.mark.parametrize("options", [[], ["--checkpoint"]])
def test_checkpoint_is_for_our_model(options, small, monkeypatch, tmp_path):
    models, our_steps = [], bench.our_steps
    monkeypatch.setattr(
        bench, "our_steps", lambda model, *args, **more: models.append(model) or our_steps(model, *args, **more)
    )
    sizes = ["--shapes", small, "--rows", "2", "--tokens", "6", "--rounds", "1", "--device", "cpu"]
    status, text = run_in(bench, "step", "--no-hub", "--methods", "iapt", *options, *sizes, "--out", str(tmp_path))
    assert status == 0, text
    assert [model.checkpointing for model in models] == [bool(options)]


@pytest.mark.slow
@pytest.mark.skipif(not HUB, reason="needs transformers and peft")
@pytest.mark.parametrize(
    "command, arch", [("step", "gpt2"), ("step", "llama"), ("generate", "llama"), ("first", "llama")]
)
def test_rivals_from_the_hub_take_part(command, arch, monkeypatch, tmp_path):
    monkeypatch.setitem(bench.SHAPES, "small", SMALL_SHAPES[arch])
    sizes = ["--shapes", "small", "--rows", "2", "--tokens", "6", "--rounds", "1", "--device", "cpu"]
    status, text = run_in(bench, command, *sizes, "--out", str(tmp_path), *["--new", "3"] * (command == "generate"))
    assert status == 0, text
    labels = [
        next(row[kind] for kind in ("step", "answers", "asks") if kind in row) for row in saved_rows(tmp_path, command)
    ]
    assert len(labels) == {"step": 7, "generate": 8, "first": 10}[command] and any("peft" in label for label in labels)


@pytest.mark.slow
def test_a_compiled_step_is_measured_beside_the_plain_one(small, tmp_path):
    sizes = ["--shapes", small, "--rows", "2", "--tokens", "6", "--rounds", "1", "--device", "cpu"]
    methods = ["--methods", "iapt,full", "--no-hub"]
    status, text = run_in(bench, "step", "--compile", *methods, *sizes, "--out", str(tmp_path))
    assert status == 0, text
    ours = [row["step"] for row in saved_rows(tmp_path, "step") if row["step"].startswith("ours")]
    assert ours == ["ours: iapt", "ours: full, in fp32", "ours: iapt, compiled", "ours: full, in fp32, compiled"]


def test_a_model_of_a_folder_takes_the_place_of_a_shape():
    assert bench.parse(["generate", "--init", "tiny"]).models == ["tiny"]
    assert bench.parse(["generate"]).models == ["llama-6x288"]
    assert bench.parse(["step"]).models == ["gpt2-6x384", "llama-6x288"]


def test_the_benchmarks_of_a_gpu_are_there_and_one_that_fails_does_not_keep_others_back(monkeypatch, tmp_path, capsys):
    asked = {name: bench.parse([*line.split(), "--device", "cuda"]) for name, line in bench.GPU.items()}
    assert {args.command for args in asked.values()} <= set(bench.BENCHMARKS)
    monkeypatch.setattr(bench, "pick_device", lambda *_: ("cpu", torch.float32, ""))
    done, plain = [], bench.main

    def main(argv):
        done.append(argv)
        if len(done) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "main", main)
    plain(["gpu", "--out", str(tmp_path)])
    assert [argv[-1] for argv in done] == [str(tmp_path / name) for name in bench.GPU]
    assert "OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["step", "--rows", "0"], "--rows: must be from 1"),
        (["serve", "--tenants", "2", "0"], "--tenants: must be from 1"),
        (["step", "--rounds", "0"], "--rounds: must be from 1"),
        (["step", "--shapes", "gpt2-124M,gpt3"], "there is no 'gpt3'. There are: gpt2-6x384"),
        (["step", "--methods", "lore"], "there is no 'lore'. There are: iapt, "),
        (["quality"], "invalid choice: 'quality'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_a_wrong_option_is_named(argv, message):
    status, text = run_in(bench, *argv)
    assert status == 2 and message in text and text.count("\n") == 1
