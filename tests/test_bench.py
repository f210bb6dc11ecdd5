"""The comparison of methods: budgets, the search of rates, what it may see, and going on after a break."""

import json
import os
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_train import SMALL, rows  # noqa: F401  (a fixture)

import bench
import quality
import train
from baselines import complete
from data import read_json
from model import Config

CONFIGS = {
    "tiny": Config(arch="llama", vocab_size=1000, n_layer=4, n_head=4, n_embd=128),
    "gpt2": Config(vocab_size=14019, block_size=256, n_layer=8, n_head=16, n_embd=128),
}


@pytest.mark.parametrize("name", [name for name, row in quality.ROWS.items() if row[2]])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_size_is_the_one_nearest_to_the_budget(config, name):
    method, _, size, most = quality.ROWS[name]
    for budget in (1, 20_000, 100_000):
        options, n = quality.sized(config, name, budget)
        at = int(options[-1].removeprefix(f"{size}="))
        assert 1 <= at <= most
        for other in {max(1, at - 1), min(most, at + 1)}:
            there = quality.count(config, method, [*options[:-1], f"{size}={other}"])
            assert abs(there - budget) >= abs(n - budget)


@pytest.mark.parametrize("best", [0.01, 0.02, 0.005, 0.16, 0.000625])
def test_the_search_climbs_to_the_best_rate_and_the_rates_beside_it(best):
    """A valley in the rate, centred anywhere: it ends with a rate on either side of the lowest."""
    runs = object.__new__(quality.Quality)
    runs.args, runs.rates = SimpleNamespace(lr=None), {}
    runs.bar = SimpleNamespace(total=0)
    runs.trained = lambda name, lr, seed: {"val": max(lr / best, best / lr)}
    found = runs.search("iapt")
    lowest = min(found, key=found.get)
    assert lowest == pytest.approx(best) and min(found) < lowest < max(found)


def test_a_run_says_all_its_options_so_that_none_from_before_a_default_changed_is_taken_for_it():
    comparison = SimpleNamespace(args=SimpleNamespace(rest=["--steps", "3"]), sizes={"iapt": (["m=9"], 1)})
    argv = quality.Quality.argv(comparison, "iapt", 1e-3, 0)
    assert train.parse(argv).o == complete("iapt", ["m=9"]) and len(train.parse(argv).o) > 10


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"rows": [3]}'])
def test_a_table_that_is_damaged_is_one_line_and_not_overwritten(content, tmp_path, monkeypatch):
    (tmp_path / "quality.json").write_text(content)
    monkeypatch.setattr(quality.Quality, "frozen", lambda self: {})
    with pytest.raises(ValueError, match="quality.json is not"):
        bench.main(["quality", "--methods", "capt", "--out", str(tmp_path)])
    assert (tmp_path / "quality.json").read_text() == content


def test_a_comparison_scores_the_chosen_rate_alone_and_goes_on_after_a_break(tmp_path, monkeypatch, capsys):
    calls, stop = [], 6

    def pretend(f, folder, threads, *args):
        calls.append((f.__name__, os.path.relpath(folder, tmp_path)))
        if len(calls) == stop:
            raise KeyboardInterrupt
        os.makedirs(folder, exist_ok=True)
        if f is quality.train_one:
            lr = float(args[0][args[0].index("--lr") + 1])
            made = {"val": abs(lr - 0.1), "argv": args[0], "trainable": 100, "tokens_per_s": 1, "peak_bytes": 1}
            quality.write(os.path.join(folder, "trained.json"), made)
        else:
            scores = {"how": [args[0], *args[2:]], "scores": {"test": {"nats": float(len(calls))}}}
            quality.write(os.path.join(folder, "scores.json"), scores)

    monkeypatch.setattr(quality, "alone", pretend)
    argv = ["quality", "--methods", "ptuning2,capt", "--budget", "4096", "--seeds", "2", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        bench.main(argv)
    stop, before = None, len(calls)
    bench.main(argv)
    assert calls[before] == calls[5]  # it goes on with what was interrupted, and does nothing else again
    assert len(calls) - 1 == len(set(calls))
    with open(tmp_path / "quality.json", encoding="utf-8") as f:
        written = json.load(f)["rows"]
    for row in written[1:]:
        scored = [p.parent.name for p in tmp_path.glob(f"{row['method']}/*/scores.json")]
        assert row["lr"] == 0.1 and sorted(scored) == ["lr0.1-seed0", "lr0.1-seed1"]
    assert "capt cannot match the budget: 100 parameters, -98%" in capsys.readouterr().out
    count = len(calls)
    bench.main([*argv, "--seeds", "3"])
    assert len(calls) == count + 4  # a third seed of two methods, trained and scored

    def methods():
        return [row["method"] for row in read_json(tmp_path / "quality.json")["rows"]]

    bench.main([*argv, "--seeds", "3", "--methods", "static"])
    assert methods() == ["frozen", "ptuning2", "static", "capt"]  # a method more
    bench.main([*argv, "--methods", "static"])
    assert methods() == ["frozen", "static"]  # of two seeds: no table for rows of three
    for other in (["--steps", "7"], ["--metric", "bleu"], ["--budget", "9000"]):  # never other runs' figures
        with pytest.raises(ValueError, match="is of a run with other options"):
            bench.main([*argv, *other])


def test_a_run_of_the_comparison_is_the_run_of_train_py(rows, tmp_path):  # noqa: F811
    argv = [*SMALL, "--data", rows, "--method", "ptuning2", "-o", "P=2", "--lr", "0.05"]
    told = train.main([*argv, "--out", str(tmp_path / "a")])
    os.makedirs(tmp_path / "b")
    quality.train_one(argv, str(tmp_path / "b"))
    quality.score_one(argv, str(tmp_path / "b"), "exact", 0, 1)
    scores = read_json(tmp_path / "b" / "scores.json")["scores"]
    for name, (exact, nats) in told["after"].items():
        assert scores[name] == {"nats": nats, "exact %": 100 * exact}
    assert read_json(tmp_path / "b" / "trained.json")["trainable"] == 2 * 4 * 256
    os.makedirs(tmp_path / "none")
    quality.score_one(argv, str(tmp_path / "none"), "exact", 0, 1)
    frozen = read_json(tmp_path / "none" / "scores.json")["scores"]
    assert {name: s["nats"] for name, s in frozen.items()} == {name: nats for name, (_, nats) in told["before"].items()}


def test_a_rate_that_diverges_is_a_bad_rate_and_no_failure(rows, tmp_path, monkeypatch):  # noqa: F811
    argv = [*SMALL, "--data", rows, "--method", "ptuning2", "-o", "P=2", "--lr", "0.05"]
    real = train.Decoder.forward
    for after, name in ((0, "at once"), (4, "later")):
        left = [after]

        def forward(*args, left=left):
            left[0] -= 1
            return real(*args) * (float("nan") if left[0] < 0 else 1)

        monkeypatch.setattr(train.Decoder, "forward", forward)
        os.makedirs(tmp_path / name)
        quality.train_one(argv, str(tmp_path / name))
        val = read_json(tmp_path / name / "trained.json")["val"]
        assert val == 1e9 if after == 0 else 1 < val < 20
        monkeypatch.undo()


def test_the_search_ends_where_every_higher_rate_is_better():
    runs = object.__new__(quality.Quality)
    runs.args, runs.rates, runs.bar = SimpleNamespace(lr=None), {}, SimpleNamespace(total=0)
    runs.trained = lambda name, lr, seed: {"val": -lr}
    assert len(runs.search("iapt")) <= 10


def test_a_failed_run_is_one_line_with_its_reason(tmp_path):
    with pytest.raises(ValueError, match="a run failed: .*no data at nowhere"):
        quality.alone(quality.train_one, str(tmp_path / "run"), 1, ["--data", "nowhere"], str(tmp_path / "run"))


def test_bleu_and_rouge_take_the_best_of_several_references():
    pytest.importorskip("sacrebleu", reason="pip install sacrebleu rouge-score")
    pytest.importorskip("rouge_score", reason="pip install sacrebleu rouge-score")
    refs = [["a pub by the river in the city centre .", "The Mill is a pub by the river ."], ["no , not at all ."]]
    right = quality.bleu_and_rouge(["the mill is a pub by the river .", "no , not at all ."], refs)
    assert right["BLEU"] == pytest.approx(100) and right["ROUGE-L"] == pytest.approx(100)
    wrong = quality.bleu_and_rouge(["the river is a mill by the pub .", "yes ."], refs)
    assert wrong["BLEU"] < 50 and wrong["ROUGE-L"] < 50


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--methods", "iapt,lore"], "no method 'lore'"),
        (["--budget", "0"], "--budget must be at least 1"),
        (["--seed", "3"], "--seed is for bench.py to set"),
        (["--seed=3"], "--seed is for bench.py to set"),
        (["-oP=2"], "-o is for bench.py to set"),
        (["--meth", "lora"], "unrecognized arguments: --meth lora"),
        (["--stepz", "3"], "unrecognized arguments: --stepz 3"),
    ],
)
def test_a_wrong_option_is_named(argv, says, capsys):
    with pytest.raises(SystemExit) as e:
        bench.main(["quality", *argv])
    assert e.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("content, says", [(None, "No such file"), ("{", "not JSON"), ("{}", "not the quality.json")])
def test_rates_from_a_file_that_has_none_are_refused(tmp_path, content, says):
    path = tmp_path / "quality.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises((OSError, ValueError), match=says):
        bench.main(["quality", "--rates", str(path), "--methods", "capt", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "argv", [["step", "--rows", "0"], ["serve", "--tenants", "2", "0"], ["rational", "--rounds", "0"]]
)
def test_a_size_below_one_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as e:
        bench.main(argv)
    assert e.value.code == 2 and f"{argv[1]} must be at least 1" in capsys.readouterr().err


def test_every_method_but_the_example_is_in_the_comparison():
    from baselines import METHODS

    assert {row[0] for row in quality.ROWS.values()} == set(METHODS)
    assert os.path.exists(os.path.join(ROOT, "bench.py"))
