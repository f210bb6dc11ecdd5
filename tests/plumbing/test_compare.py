"""The comparison of methods: equal sizes, what chooses a rate, what is saved, differences, controls."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, right_padded, run_in, shake, small_tuner

import train
from baselines import METHODS
from data import TINY, load_splits
from data.tokenizer import pieces
from experiments import ablations, compare, tasks
from experiments import report as report_script
from experiments.compare import ROWS, count, sized
from experiments.report import Scores, difference, report
from model import Config
from plumbing.files import read_json, write_json

CONFIGS = {
    "tiny": Config(arch="llama", vocab_size=1000, n_layer=4, n_head=4, n_embd=128),
    "smollm2": Config(arch="llama", vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536),
}


@pytest.mark.parametrize("name", {row.method: name for name, row in ROWS.items() if row.size}.values())
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_size_is_the_one_nearest_to_the_budget(config, name):
    method, _, size, largest = ROWS[name]
    for budget in (1, 20_000, 300_000):
        options, n = sized(config, name, budget)
        at = int(options[-1].removeprefix(f"{size}="))
        assert 1 <= at <= largest
        for other in {max(1, at - 1), min(largest, at + 1)}:
            assert abs(count(config, method, [*options[:-1], f"{size}={other}"]) - budget) >= abs(n - budget)


def test_constants_are_iapt_without_its_generator():
    """At the size that makes them its control, and attended to in the same way."""
    config = CONFIGS["tiny"]
    (options, n), (_, wanted) = sized(config, "constants", 16_000), sized(config, "iapt", 16_000)
    tuner = METHODS["constants"](config, P=int(options[-1].removeprefix("P=")))
    assert tuner.separate and abs(n - wanted) < 0.05 * wanted and not hasattr(tuner, "generators")


@pytest.fixture(autouse=True)
def ablations_are_methods(monkeypatch):
    for name, cls in (ablations.ABLATIONS | ablations.HIDDEN).items():
        monkeypatch.setitem(METHODS, name, cls)


@pytest.fixture
def jobs(monkeypatch):
    """Stands in for the work: notes what is to be done, and pretends to have done it.  jobs.best is the best rate."""
    jobs = SimpleNamespace(trained=[], scored=[], best=None)

    def train_one(options, own, folder):
        jobs.trained.append(os.path.basename(folder))
        rate = float(own[own.index("--lr") + 1])
        val = max(rate / jobs.best, jobs.best / rate)
        return {"val": val, "trainable": 1, "curve": [], "seconds": 1}

    monkeypatch.setattr(compare, "train_one", train_one)
    monkeypatch.setattr(compare, "score_one", lambda options, own, folder: jobs.scored.append(os.path.basename(folder)))
    return jobs


def measured(tmp_path, method, *options):
    """A row of a table."""
    return compare.measure(compare.parse(["tiny", "--methods", method, *options, "--out", str(tmp_path)]), method)


def test_the_rate_with_the_lowest_validation_loss_is_chosen_and_only_its_runs_are_scored(tmp_path, jobs):
    own = METHODS["ptuning2"].lr
    jobs.best = own / 2
    row = measured(tmp_path, "ptuning2", "--seeds", "2")
    assert row["lr"] == own / 2 and set(row["search"]) == {own * multiple for multiple in compare.RATES}
    chosen = [f"ptuning2-lr{own / 2:.2e}-seed{seed}" for seed in (0, 1)]
    tried = {f"ptuning2-lr{own * multiple:.2e}-seed0" for multiple in compare.RATES}
    assert set(jobs.trained) == tried | set(chosen) and jobs.scored == chosen


def test_without_scoring_no_test_row_is_touched(tmp_path, jobs):
    jobs.best = 1e-2
    assert measured(tmp_path, "capt", "--validate-only")["scores"] == []
    assert jobs.trained and not jobs.scored


def test_the_search_goes_on_while_the_best_rate_is_at_the_edge(tmp_path, jobs):
    own = METHODS["capt"].lr
    for best, tried in ((8 * own, (0.25, 0.5, 1, 2, 4, 8, 16)), (own / 8, (0.0625, 0.125, 0.25, 0.5, 1, 2))):
        jobs.best = best
        row = measured(tmp_path, "capt", "--seeds", "1", "--validate-only")
        assert row["lr"] == best and sorted(row["search"]) == [own * x for x in tried]


@pytest.fixture
def run(rows, tmp_path):
    """A short run of IAPT by the comparison, scored: its options and its folder."""
    options, own = [*SMALL, "--data", rows], ["--method", "iapt", "--seed", "0", "--lr", "0.01"]
    folder = str(tmp_path / "run")
    compare.open_session.cache_clear()
    result = compare.train_one(options, own, folder)
    compare.score_one(options, own, folder)
    return options, own, folder, result


def test_a_run_of_the_comparison_is_the_run_of_train_py(run, tmp_path):
    options, own, folder, result = run
    after = train.main([*options, *own, "--out", str(tmp_path / "other")])["after"]
    arrays = np.load(os.path.join(folder, "scores.npz"))
    for name, score in after.items():
        assert arrays[f"{name}/nats"].sum() / arrays[f"{name}/tokens"].sum() == pytest.approx(score.nats, rel=1e-5)
        assert (arrays[f"{name}/wrong"] == 0).mean() == score.exact
    assert result["val"] == read_json(os.path.join(folder, "trained.json"))["val"]


def test_a_finished_run_is_not_trained_again_and_one_with_other_options_is_not_taken_for_it(run, monkeypatch):
    options, own, folder, result = run
    monkeypatch.setattr(train, "train", None)
    assert compare.train_one(options, own, folder) == result
    with pytest.raises(ValueError, match="is of a run with other options"):
        compare.train_one([*options, "--steps", "7"], own, folder)


def test_scores_of_other_options_are_not_taken_for_these(run):
    """The frozen model's scores had been reused for other test rows."""
    options, own, folder, _ = run
    assert compare.score_one(options, own, folder) == os.path.join(folder, "scores.npz")
    with pytest.raises(ValueError, match="is of a run with other options"):
        compare.score_one([*options, "--test-rows", "2"], own, folder)


def test_a_rate_that_diverges_is_a_bad_rate_and_no_failure(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "head_loss", lambda model, x, targets: x.sum() * float("nan"))
    compare.open_session.cache_clear()
    own = ["--method", "ptuning2", "--seed", "0", "--lr", "0.01"]
    assert compare.train_one([*SMALL, "--data", rows], own, str(tmp_path / "x"))["val"] == 1e9


def test_a_difference_is_taken_on_the_same_rows():
    """Rows differ a thousand times more than the two methods; a constant difference is found without doubt."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 9, 200)
    hard = rng.exponential(10, 200) * tokens
    a, b = [hard + 0.01 * tokens] * 3, [hard] * 3
    mean, low, high = difference(a, b, tokens)
    assert mean == pytest.approx(0.01) and low == pytest.approx(0.01) and high == pytest.approx(0.01)
    noisy = [hard + rng.normal(0, 1, 200) * tokens for _ in range(3)]
    mean, low, high = difference(noisy, b, tokens)
    assert low < 0 < high and low < mean < high


def test_the_interval_knows_that_seeds_differ():
    tokens = np.ones(1000)
    a = [np.full(1000, 1.0), np.full(1000, 2.0), np.full(1000, 3.0)]
    _, low, high = difference(a, [np.full(1000, 2.0)] * 3, tokens)
    assert low < -0.3 and high > 0.3
    assert difference(a, [x - 1 for x in a], tokens, same_runs=True) == pytest.approx((1, 1, 1))


def test_an_interval_over_tasks_is_wider_where_tasks_differ():
    """One of ten tasks carries the whole difference: rows show it without doubt, other tasks might not."""
    tokens, tasks = np.ones(1000), np.repeat(np.arange(10), 100)
    a, b = [np.where(tasks < 1, 1.0, 0.0)] * 3, [np.zeros(1000)] * 3
    mean, low, high = difference(a, b, tokens)
    assert mean == pytest.approx(0.1) and low > 0.07
    mean, low, high = difference(a, b, tokens, groups=tasks)
    assert mean == pytest.approx(0.1) and low == 0 and high > 0.2


def test_scores_are_means_over_seeds_rows_and_families(tmp_path):
    arrays = {}
    for name, shift in (("frozen", 1.0), ("a", 0.0)):
        for seed in (0, 1):
            arrays[f"{name}/{seed}/test/nats"] = np.array([1.0, 2.0, 9.0]) + shift + seed
            arrays[f"{name}/{seed}/test/wrong"] = np.array([0, 1, seed])
            arrays[f"{name}/{seed}/test/tokens"] = np.array([1, 1, 2])
            arrays[f"{name}/{seed}/test/family"] = np.array(["x", "x", "y"])
    np.savez(tmp_path / "scores.npz", **arrays)
    scores = Scores(str(tmp_path / "scores.npz"))
    assert scores.tests == ["test"] and scores.seeds["a"] == [0, 1]
    assert scores.nats("a", "test") == pytest.approx((12 + 15) / 2 / 4)
    assert scores.exact("a", "test") == pytest.approx(100 * (2 / 3 + 1 / 3) / 2)
    assert scores.macro("a", "test") == pytest.approx(((3 / 2 + 9 / 2) / 2 + (5 / 2 + 10 / 2) / 2) / 2)


def test_the_controls_are_what_they_are_called_and_leave_nothing_behind(model):
    """Two rows with swapped instructions; and where all rows have one instruction, its output is the mean."""
    tuner = small_tuner("iapt", model)
    idx, instr = right_padded([6, 6], 9)
    x = torch.randn(2, 9, 32)
    _, own = tuner.generators[0](x, instr)
    with ablations.swapped_instruction(tuner):
        assert torch.allclose(tuner.generators[0](x, instr)[1], own.flip(0))
    examples = [train.Example([3, 1, 4, 1], [5, 9]), train.Example([2, 7, 1, 8], [2, 8])]
    with ablations.mean_output(tuner, model, examples):
        a, b = tuner.generators[0](x, instr)[1]
        assert torch.equal(a, b)
    same = [examples[0], examples[0]._replace(response=[7, 7])]
    before = model(idx, instr, tuner)
    prompt = torch.tensor([examples[0].prompt])
    every = torch.ones_like(prompt, dtype=torch.bool)
    wanted = model(prompt, every, tuner)
    with ablations.mean_output(tuner, model, same):
        torch.testing.assert_close(model(prompt, every, tuner), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(idx, instr, tuner), before)


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_a_form_of_iapt_differs_from_it_in_one_thing_and_trains_all_that_it_has(model, name):
    """All of them start as the frozen model, but for those whose point it is not to."""
    torch.manual_seed(0)
    tuner = METHODS[name](model.config)
    tuner.start(model)
    tuner.attach(model)
    idx, instr = right_padded([6, 4], 9)
    starts_as_frozen = torch.allclose(model(idx, instr, tuner), model(idx), atol=1e-5)
    others = ("random-start", "joined", "paper-random-start")  # in joined, keys alone take attention from the words
    assert starts_as_frozen == (name not in others)
    shake(tuner, 0.1)
    model.loss(model.hidden(idx, instr, tuner), idx).backward()
    silent = {key for key, p in tuner.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert silent == set()
    own_rates = [p for group in tuner.groups(1.0) for p in group["params"]]
    assert {id(p) for p in own_rates} == {id(p) for p in tuner.parameters()}
    assert len(own_rates) == len(set(map(id, own_rates)))
    tuner.detach()
    plain = METHODS["iapt"](model.config)
    assert not torch.allclose(model(idx, instr, tuner), model(idx, instr, shake(plain, 0.1)))


@pytest.mark.parametrize("name", ablations.HIDDEN)
def test_a_form_for_a_hidden_instruction_reads_it_and_trains_all_but_what_it_does_without(model, name):
    torch.manual_seed(0)
    tuner = METHODS[name](model.config)
    tuner.act = "hidden"
    tuner.start(model)
    tuner.attach(model)
    shake(tuner, 0.1)
    idx, instr = right_padded([6, 4], 9)
    hidden = model.hidden(idx, instr, tuner)
    torch.testing.assert_close(model.hidden(idx[1:], instr[1:], tuner)[:, 4:], hidden[1:, 4:], atol=1e-4, rtol=1e-4)
    other = idx.clone()
    other[0, 3] += 1  # a word of the first row's instruction, and not its first, which stays anyway
    assert (model.hidden(other, instr, tuner) - hidden)[0, 6:].abs().max() > 1e-4
    with tuner.silent():
        plain = model(idx)
    assert torch.equal(model(idx), plain), "what acts while it reads is silent at all other times"
    model.loss(hidden, idx).backward()
    silent = {key.split(".", 2)[-1] for key, p in tuner.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    without = {"summary-fixed-parts": {"W_sa"}, "summary-uncorrected": {"W_up", "R.a", "R.b"}}
    assert silent == without.get(name, set()) or name == "compressor" and len(silent) == 1  # q of the last layer
    tuner.detach()


def test_the_table_says_who_is_better_on_the_same_rows(tmp_path):
    arrays = {}
    for name, nats in (("frozen", 3.0), ("iapt", 1.0), ("constants", 1.5)):
        for what, value in (("nats", nats), ("wrong", 0), ("tokens", 1)):
            arrays[f"{name}/0/test/{what}"] = np.full(50, value)
        arrays[f"{name}/0/test/family"] = np.array(["x"] * 50)
    arrays["iapt/0/test/swapped"] = np.full(50, 1.25)
    np.savez(tmp_path / "scores.npz", **arrays)
    rows = [{"method": name, "trainable": 5, "lr": 0.1} for name in ("iapt", "constants")]
    lines = list(report(rows, Scores(str(tmp_path / "scores.npz"))))
    assert any(line.startswith("| constants | +0.500 (+0.500 to +0.500)") for line in lines)
    assert any(line.startswith("| iapt: another row's instruction | +0.250") for line in lines)


def test_a_control_that_a_test_set_lacks_is_a_dash(tmp_path):
    arrays = {}
    for test in ("test", "test_new"):
        for name in ("frozen", "iapt"):
            for what, value in (("nats", 1.0), ("wrong", 0), ("tokens", 1)):
                arrays[f"{name}/0/{test}/{what}"] = np.full(50, value)
            arrays[f"{name}/0/{test}/family"] = np.array(["x"] * 50)
    arrays["iapt/0/test_new/swapped"] = np.full(50, 1.5)
    np.savez(tmp_path / "scores.npz", **arrays)
    rows = [{"method": "iapt", "trainable": 5, "lr": 0.1}]
    *_, line = report(rows, Scores(str(tmp_path / "scores.npz")))
    assert line == "| iapt: another row's instruction | – | +0.500 (+0.500 to +0.500) |"


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--methods", "iapt,lore"], "no method 'lore'"),
        (["--seeds", "0"], "--seeds: must be from 1"),
        (["--seed", "3"], "--seed is set run by run"),
        (["-oP=2"], "-o is set run by run"),
        (["--stepz", "3"], "unrecognized arguments: --stepz 3"),
        (["--rates", "0"], "--rates must be above 0"),
        (["--act", "answer"], "prompt acts on the whole prompt: --act answer is for iapt"),
    ],
)
def test_a_wrong_option_is_named(argv, says):
    status, text = run_in(compare, "tiny", *argv)
    assert status == 2 and says in text


def test_after_an_interruption_no_other_method_begins(tmp_path, monkeypatch):
    begun = []

    def stopped(args, name):
        begun.append(name)
        raise SystemExit("stopped")

    monkeypatch.setattr(compare, "measure", stopped)
    monkeypatch.setattr(compare, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
    with pytest.raises(SystemExit):
        compare.rows_of_table(
            compare.parse(["tiny", "--methods", "capt,ia3,iapt", "--jobs", "2", "--out", str(tmp_path)])
        )
    assert begun == ["frozen", "capt"]


@pytest.mark.slow
def test_the_frozen_model_alone_is_a_table(rows, tmp_path, capsys):
    compare.main(["tiny", "--methods", "frozen", *SMALL, "--data", rows, "--out", str(tmp_path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 3 and lines[2].startswith("| frozen | 0 |  | ")
    assert Scores(str(tmp_path / "scores.npz")).seeds == {"frozen": [0]}


@pytest.mark.slow
def test_the_whole_command_continues_where_it_was(rows, tmp_path, capsys):
    argv = ["tiny", "--methods", "capt", "--seeds", "1", "--rates", "1", *SMALL, "--data", rows, "--out", str(tmp_path)]
    compare.main(argv)
    table = capsys.readouterr().out
    for name in ("compare.json", "compare.md", "scores.npz"):
        os.remove(tmp_path / name)
    write_json(tmp_path / "runs" / "capt-lr5.00e-02-seed0" / "kept.json", {})
    compare.main(argv)
    assert capsys.readouterr().out == table and "| capt |" in table


def test_tasks_are_questions_in_moods_and_no_row_is_in_two_splits(tmp_path, capsys):
    out = str(tmp_path / "x")
    tasks.main(["4", "--out", out])
    assert f"compare tiny --data {out}" in capsys.readouterr().out
    splits = load_splits(out)
    assert {row["task"] for row in splits["train"]} == {row["task"] for row in splits["test"]}
    assert len({row["task"] for row in splits["train"]}) == 4
    polite = next(row for row in splits["train"] if row["task"] == "capital polite")
    assert "polite" in polite["instruction"] and polite["output"].startswith("please ")
    rows = [tasks.asked(row) for split in splits.values() for row in split]
    assert len(rows) == len(set(rows)) == 6400 + 640 + 320


def test_tasks_have_only_words_that_the_shipped_model_knows():
    words = set(read_json(os.path.join(TINY, "words.json")))
    for row in tasks.make_tasks(64)["test"]:
        assert set(pieces([f"Instruction: {row['instruction']} {row['output']}"])) <= words, row


def test_rows_of_tasks_are_those_of_the_saved_results_and_take_no_others_place(tmp_path):
    """The digest is of what was written at 0b6e8b6."""
    tasks.main(["4", "--out", str(tmp_path)])
    tasks.main(["4", "--out", str(tmp_path)])
    test = tmp_path / "test.jsonl"
    assert hashlib.sha256(test.read_bytes()).hexdigest()[:16] == "d8c7f0007ac52955"
    with pytest.raises(ValueError, match="train.jsonl has other rows: --out names another folder"):
        tasks.main(["16", "--out", str(tmp_path)])


def test_two_tables_are_compared_on_the_same_rows(tmp_path, capsys):
    for name, nats in (("a", 1.0), ("b", 1.5)):
        arrays = {}
        for method in ("frozen", "iapt", f"only-{name}"):
            for what, value in (("nats", nats), ("wrong", name == "b"), ("tokens", 1)):
                arrays[f"{method}/0/test/{what}"] = np.full(50, value)
        np.savez(tmp_path / f"{name}.npz", **arrays)
    report_script.main([str(tmp_path / "a.npz"), str(tmp_path / "b.npz")])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| second minus first | test |"
    assert rows == ["| iapt | +0.500 (+0.500 to +0.500), 100.0 % and 0.0 % |"]
    np.savez(tmp_path / "c.npz", **{name: x[:40] for name, x in arrays.items()})
    with pytest.raises(ValueError, match="are not about the same rows"):
        report_script.main([str(tmp_path / "a.npz"), str(tmp_path / "c.npz")])


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut off", "one array", "other arrays"])
def test_a_file_that_holds_no_scores_is_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "scores.npz"
    if damage == "one array":
        with open(path, "wb") as f:
            np.save(f, np.zeros(3))
    elif damage != "missing":
        np.savez(path, a=np.zeros(300))
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "text": b"nats", "cut off": whole[:-30]}.get(damage, whole))
    with pytest.raises(ValueError, match=r"^\S+scores\.npz is not a whole scores\.npz, .*compare writes it \(\w+\)$"):
        Scores(str(path))
