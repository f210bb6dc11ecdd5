"""Every method on the same work, at the same number of trained parameters: one command a table.

    python -m experiments.compare tiny                    # tiny, p3, e2e, hidden: TABLES below
    python -m experiments.compare p3 --jobs 2             # two methods side by side
    python -m experiments.compare p3 --methods iapt,constants,lora-mlp --seeds 5
    python -m experiments.compare p3 --steps 600          # options of train.py go to every run

The protocol, the same for every method:

    1. Its size is the one whose trained parameters are nearest to the budget.
    2. Its learning rate is the one of RATES (multiples of its own) with the lowest validation loss, seed 0.  If that is
       the lowest or the highest of them, the next one beyond is tried, too.
    3. All seeds are trained at that rate.
    4. Test rows are scored once, after that.  What was found on each row is saved, for each seed.
    5. A difference between two methods is taken on the same rows; its interval is a bootstrap over rows and seeds.

No choice sees a test row.  Some methods cannot spend the budget (prompt, dynamic, capt, ia3) or are larger (full): see
the column "trained".  Interrupted, the same command continues.  For more methods or seeds, name the old ones, too:
what is finished is not run again.

A map of this file: TABLES and ROWS; sized; the work of one process (train_one, score_one, and measure, which calls them
for a method); main.  report.py makes the tables.
"""

import contextlib
import functools
import os
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import train
from baselines import METHODS, build, spell_out
from baselines import method as find_method
from data import evenly_spaced, p3
from data.scores import plain_examples, score_examples
from experiments.ablations import ABLATIONS, HIDDEN, mean_output, swapped_instruction
from experiments.bench import machine
from experiments.report import DIVERGED, Scores, report
from model import Config, Tuner
from plumbing.checkpoint import Diverged, RunFolder, load_checkpoint, load_into
from plumbing.cli import Parser, at_least, pick_device, run
from plumbing.files import read_json, replacing, write_json
from plumbing.hub import find_model
from plumbing.pretrained import read_config

SMOLLM2 = "--init HuggingFaceTB/SmolLM2-135M-Instruct"
STEPS = "--steps 300 --batch-size 8 --eval-every 100"
TABLES = {  # options of train.py, and how many parameters are trained
    "tiny": ("--steps 800 --eval-every 200", 16_000),
    "p3": (f"{SMOLLM2} --data data/p3 --truncate --block-size 320 --val-rows 0 {STEPS}", 225_000),
    "e2e": (f"{SMOLLM2} --data data/e2e {STEPS}", 225_000),
    "hidden": (
        f"{SMOLLM2} --data data/alpaca-input --hide-instruction --distill --steps 100 --batch-size 12 --eval-every 50",
        440_000,
    ),
}


class Row(NamedTuple):
    """A row of a table: a method, its options, and the option that sets its size ("": it has one size)."""

    method: str
    options: str = ""
    size: str = ""
    largest: int = 10**6


ROWS = {
    "iapt": Row("iapt", "", "m"),
    "paper-iapt": Row("paper-iapt", "", "m"),
    "constants": Row("constants", "", "P"),  # IAPT without its generator: what is reading the instruction worth?
    "ptuning2": Row("ptuning2", "", "P"),
    "prefix": Row("prefix", "P=10", "hidden"),
    "prompt": Row("prompt", "", "P", 40),  # each soft token is one more position in every layer
    "dynamic": Row("dynamic", "pool=4", "P", 20),
    "capt": Row("capt"),
    "lora-qv": Row("lora", "on=q,v alpha=4", "r"),
    "lora-mlp": Row("lora", "on=mlp alpha=4", "r"),
    "lora-all": Row("lora", "on=all alpha=4", "r"),
    "adapter": Row("adapter", "", "m"),
    "ia3": Row("ia3"),
    "full": Row("full"),
    "repeat-1": Row("iapt", "repeat=1", "m"),
    "gelu": Row("iapt", "activation=gelu", "m"),
    "mine": Row("mine", "", "P"),
    "summary": Row("summary", "", "m"),  # for an instruction that is hidden
}
ROWS.update({f"summary-{P}": Row("summary", f"P={P}", "m") for P in (1, 2, 8, 12, 24)})
ROWS.update({f"summary-{R}": Row("summary", f"activation={R}", "m") for R in ("gelu", "identity")})
ROWS.update({name: Row(name, "", "m") for name in [*ABLATIONS, *HIDDEN] if name != "compressor"})
ROWS.update({f"compressor-{P}": Row("compressor", f"P={P}", "r") for P in (4, 12)})
RATES = (0.25, 0.5, 1.0, 2.0)


# -- Sizes -------------------------------------------------------------------------------------------------------------


def count(config: Config, method: str, options: list[str]) -> int:
    """Trained parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(method, config, options).parameters())


def sized(config: Config, name: str, budget: int) -> tuple[list[str], int]:
    """A row's options, so that as nearly as possible `budget` parameters are trained, and how many are."""
    method, options, size, largest = ROWS[name]
    options = options.split()
    if not size:
        return options, count(config, method, options)

    def at(n):
        return count(config, method, [*options, f"{size}={n}"])

    step = at(2) - at(1)  # every method grows by the same number of parameters each time
    n = min(max(1, 1 + round((budget - at(1)) / step)), largest)
    return [*options, f"{size}={n}"], at(n)


# -- The work of one process -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def open_session(options: tuple[str, ...]) -> train.Session:
    """The model and the rows, opened once in a process."""
    args = train.parse(["--test-rows", "0", *options])
    device, dtype, _ = pick_device(args.device, args.dtype)
    return train.open_session(args, device, dtype)


def train_one(options: list[str], own: list[str], folder: str) -> dict:
    """Train, or continue; leaves trained.json.  `own` are the options of this run beside those of the table."""
    path = os.path.join(folder, "trained.json")
    if done := finished(path, [*options, *own]):
        return done
    session = open_session(tuple(options))
    files = RunFolder(folder)
    args = train.parse([*options, *own, "--out", folder, "--resume" if files.can_resume() else "--force"])
    files.lock(args.force)
    tuner, meta = train.new_tuner(args, session)
    clock = time.perf_counter()
    tuner.attach(session.model)
    try:
        train.train(session.model, tuner, session.examples, args, meta)
    except Diverged:  # a rate can be too high: what had been saved until then counts, if anything had
        pass
    finally:
        tuner.detach()
    val = load_checkpoint(files.best)["val"] if os.path.exists(files.best) else DIVERGED
    result = {
        "options": [*options, *own], "val": val, "curve": [[row["step"], row["val"]] for row in files.read_log()],
        "trainable": sum(p.numel() for p in tuner.parameters()), "seconds": time.perf_counter() - clock,
    }  # fmt: skip
    write_json(path, result)
    for name in (files.last, files.previous):  # the optimizer's state is twice the size of the rest
        if os.path.exists(name):
            os.remove(name)
    return result


def score_one(options: list[str], own: list[str], folder: str) -> str:
    """Score best.pt on every row of the test sets, or the frozen model if there is none; leaves scores.npz.

    Its arrays are named TEST/nats, /wrong (tokens that greedy decoding gets wrong) and /tokens; "plain" is the text
    that has nothing to do with the task.  A method that reads the instruction is scored again with another row's
    instruction (TEST/swapped), and with the mean of what it writes (TEST/mean).
    """
    path, options_file = os.path.join(folder, "scores.npz"), os.path.join(folder, "scored.json")
    if finished(options_file, [*options, *own]):  # written last
        return path
    arrays = {}
    with tuned(options, own, folder) as (session, tuner):
        model, sets = session.model, {name: session.examples[name] for name in session.tests}
        if session.plain:
            sets["plain"] = plain_examples(session.tokenizer, 64)
        for name, examples in sets.items():
            nats, wrong, kl = score_examples(model, examples, tuner)
            arrays |= {f"{name}/nats": nats.float().numpy(), f"{name}/wrong": wrong.numpy().astype(np.int32)}
            arrays |= {f"{name}/kl": kl.float().numpy()} if kl.any() else {}
            arrays[f"{name}/tokens"] = np.array([len(e.response) for e in examples], np.int32)
            arrays[f"{name}/family"] = np.array([p3.family(row.get("task", "")) for row in session.rows.get(name, [])])
        if len(getattr(tuner, "generators", ())):
            controls = {
                "swapped": swapped_instruction(tuner),
                "mean": mean_output(tuner, model, evenly_spaced(session.examples["val"], 256)),
            }
            for control, context in controls.items():
                with context:
                    for name in session.tests:
                        arrays[f"{name}/{control}"] = score_examples(model, sets[name], tuner).nats.float().numpy()
    os.makedirs(folder, exist_ok=True)
    with replacing(path, "wb") as f:
        np.savez_compressed(f, **arrays)
    write_json(options_file, {"options": [*options, *own]})
    return path


@contextlib.contextmanager
def tuned(options: list[str], own: list[str], folder: str) -> Iterator[tuple[train.Session, Tuner | None]]:
    """The session, and the tuner of the run in a folder, attached; None if there is no run: the frozen model."""
    session, tuner = open_session(tuple(options)), None
    if os.path.exists(best := os.path.join(folder, "best.pt")):
        tuner, _ = train.new_tuner(train.parse([*options, *own, "--out", folder, "--resume"]), session)
        load_into(tuner, load_checkpoint(best), best)
        tuner.attach(session.model)
        tuner.eval()
    try:
        yield session, tuner
    finally:
        if tuner is not None:
            tuner.detach()


def finished(path: str, options: list[str]) -> dict | None:
    """What a run has left, if it has.  Raises ValueError if it is of other options: it must not stand for this one."""
    if not os.path.exists(path):
        return None
    content = read_json(path)
    if content.get("options") != options:
        raise ValueError(f"{path} is of a run with other options: --out names another folder, or remove it")
    return content


def start_process(threads: int):
    """Before a process of the pool works: its share of the cores, and no progress bars."""
    METHODS.update(ABLATIONS | HIDDEN)
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def measure(args: Namespace, name: str) -> dict:
    """A row of the table: a method's rate, runs and scores, or the frozen model's scores."""
    if name == "frozen":
        return {"method": name, "scores": [score_one(args.options, [], os.path.join(args.out, "runs", name))]}
    method, config = ROWS[name].method, open_config(args)
    options, _ = sized(config, name, args.budget)
    spelled = spell_out(method, options)  # all of them, so that no run from before a default changed stands for this

    def run_of(work, rate, seed):
        own = ["--method", method, "--seed", str(seed), "--lr", repr(rate), *(["-o", *spelled] if spelled else [])]
        return work(args.options, own, os.path.join(args.out, "runs", f"{name}-lr{rate:.2e}-seed{seed}"))

    with torch.device("meta"):
        lr = build(method, config, options).lr
    vals = {lr * multiple: run_of(train_one, lr * multiple, 0)["val"] for multiple in args.rates}
    while (rate := min(vals, key=vals.get)) in (min(vals), max(vals)) and 1 < len(vals) < 8:
        beyond = 2 * rate if rate == max(vals) else rate / 2  # the best is not at the edge of what was tried
        vals[beyond] = run_of(train_one, beyond, 0)["val"]
    runs = [run_of(train_one, rate, seed) for seed in range(args.seeds)]
    return {
        "method": name, "options": " ".join(options), "trainable": runs[0]["trainable"], "lr": rate, "search": vals,
        "val": [r["val"] for r in runs], "curves": [r["curve"] for r in runs],
        "seconds": statistics.median(r["seconds"] for r in runs), "seeds": len(runs),
        "scores": [] if args.validate_only else [run_of(score_one, rate, seed) for seed in range(args.seeds)],
    }  # fmt: skip


def open_config(args: Namespace) -> Config:
    """The frozen model's configuration."""
    return read_config(os.path.join(find_model(train.parse(args.options).init), "config.json"))


# -- All of it ---------------------------------------------------------------------------------------------------------


def rows_of_table(args: Namespace) -> list[dict]:
    """The rows, as they are finished; saved after each."""
    rows, waiting, running = [], args.methods[::-1] + ["frozen"] * (not args.validate_only), set()
    threads = max(1, torch.get_num_threads() // args.jobs)
    with (
        ProcessPoolExecutor(args.jobs, get_context("spawn"), start_process, (threads,)) as pool,
        tqdm(total=len(waiting), unit="method", dynamic_ncols=True) as bar,
    ):
        while waiting or running:
            while waiting and len(running) < args.jobs:  # no more: Ctrl-C reaches all that run, and no other begins
                running.add(pool.submit(measure, args, waiting.pop()))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                rows.append(future.result())
                save(rows, args)
                bar.update()
    return rows


def save(rows: list[dict], args: Namespace):
    """Write what is known: compare.json, and scores.npz with the arrays of all runs, named METHOD/SEED/..."""
    common = {"table": args.table, "options": " ".join(args.options), "machine": machine()}
    public = [{key: x for key, x in row.items() if key != "scores"} for row in rows]  # those are paths
    write_json(os.path.join(args.out, "compare.json"), {**common, "rows": public}, indent=1)
    if not args.validate_only:
        arrays = {}
        for row in rows:
            for seed, path in enumerate(row["scores"]):
                arrays |= {f"{row['method']}/{seed}/{key}": x for key, x in np.load(path).items()}
        with replacing(os.path.join(args.out, "scores.npz"), "wb") as f:
            np.savez_compressed(f, **arrays)


def parse(argv: list[str] | None = None) -> Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("table", choices=list(TABLES), help="which work")
    add("--methods", default="iapt,paper-iapt,constants,ptuning2,prefix,prompt,lora-qv,lora-mlp,lora-all,adapter",
        help=", ".join([*ROWS, "frozen"]))  # fmt: skip
    add("--seeds", type=at_least(1), default=3, help="runs at the chosen rate")
    add("--rates", type=float, nargs="+", default=list(RATES), help="multiples of a method's own learning rate to try")
    add("--budget", type=at_least(1), help="trained parameters (default: the table's)")
    add("--validate-only", action="store_true", help="choose rates; score no test row")
    add("--jobs", type=at_least(1), default=1, help="methods side by side")
    add("--out", help="folder of the results (default: out/compare/TABLE)")
    args, args.rest = parser.parse_known_args(argv)
    args.out = args.out or os.path.join("out", "compare", args.table)
    options, budget = TABLES[args.table]
    args.options = [*options.split(), *args.rest]
    args.budget = args.budget or budget
    args.methods = [name for name in args.methods.split(",") if name != "frozen"]  # that one is always scored
    for name in args.methods:
        if name not in ROWS:
            parser.error(f"no method {name!r}. There are: {', '.join(ROWS)}, frozen")
    if not all(0 < rate < 1e6 for rate in args.rates):
        parser.error(f"--rates must be above 0, got {args.rates}")
    passed_on = train.parse([*args.rest, "--out", args.out])
    defaults = train.parse(["--hide-instruction"] * (passed_on.act == "hidden") + ["--out", args.out])
    for name in args.methods:
        find_method(ROWS[name].method, train.parse(args.options).act)  # one that cannot is found before any work
    for own in ("method", "o", "seed", "lr", "resume", "force"):
        if getattr(passed_on, own) != getattr(defaults, own):
            parser.error(f"-{'-' * (own != 'o')}{own} is set run by run")
    return args


def main(argv: list[str] | None = None):
    METHODS.update(ABLATIONS | HIDDEN)  # here, and in the processes that do the work
    args = parse(argv)
    open_config(args)  # a model that has to be downloaded is so once, and not by each process
    os.makedirs(args.out, exist_ok=True)
    rows = rows_of_table(args)
    if args.validate_only:
        for row in sorted(rows, key=lambda row: row["val"][0]):
            search = ", ".join(f"{rate:.1e}: {val:.3f}" for rate, val in row["search"].items())
            print(f"{row['method']:20} {row['trainable']:9,}  {row['val'][0]:.4f}   {search}   {row['options']}")
        return
    lines = list(report(rows, Scores(os.path.join(args.out, "scores.npz"))))
    lines.append(f"\n{f'{args.seeds} seeds, ' if args.methods else ''}{machine()}.")
    with replacing(os.path.join(args.out, "compare.md")) as f:
        f.write("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
