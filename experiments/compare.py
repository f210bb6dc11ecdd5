"""Every method on the same work, at the same number of trained parameters: one command a table.

    python -m experiments.compare tiny                    # tiny, p3, e2e, alpaca: TABLES below
    python -m experiments.compare p3 --jobs 2             # two runs side by side
    python -m experiments.compare p3 --methods iapt,constants,lora-mlp --seeds 5
    python -m experiments.compare p3 --steps 600          # options of train.py go to every run
    python -m experiments.compare tiny --data my --out out/my --warm-start out/compare/tiny    # each from its run there

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

A map of this file: TABLES and ROWS; sized; the work of one process (train_one, score_one, write_one); Comparison, which
runs all of it.  report.py makes the tables.
"""

import contextlib
import functools
import os
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import train
from baselines import METHODS, build, spell_out
from data import Example, evenly_spaced, p3
from data.scores import score_examples
from data.tokenizer import Tokenizer
from experiments.ablations import ABLATIONS, ToldTheTask, mean_output, swapped_instruction, swapped_within_tasks
from experiments.bench import machine
from experiments.report import DIVERGED, Scores, report
from experiments.texts import bleu_and_rouge, distinct_instructions, import_metrics, write_answers
from model import Config, Tuner
from plumbing.checkpoint import Diverged, RunFolder, load_checkpoint, load_into
from plumbing.cli import Parser, at_least, pick_device, run
from plumbing.files import read_json, replacing, write_json
from plumbing.hub import find_model
from plumbing.pretrained import read_config


class Table(NamedTuple):
    """The work of one table."""

    options: str  # of train.py
    budget: int  # trained parameters
    texts: bool = False  # whether texts are written, too, and scored by BLEU and ROUGE-L


TABLES = {
    "tiny": Table("--steps 800 --eval-every 200", 16_000),
    "p3": Table(
        "--init HuggingFaceTB/SmolLM2-135M-Instruct --data data/p3 --truncate --block-size 320 --val-rows 0"
        " --steps 300 --batch-size 8 --eval-every 100",
        225_000,
    ),
    "e2e": Table(
        "--init HuggingFaceTB/SmolLM2-135M-Instruct --data data/e2e --steps 300 --batch-size 8 --eval-every 100",
        225_000,
        texts=True,
    ),
    "alpaca": Table(
        "--init HuggingFaceTB/SmolLM2-135M-Instruct --data data/alpaca --truncate --block-size 320 --steps 300"
        " --batch-size 8 --eval-every 100",
        225_000,
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
}
ROWS.update({name: Row(name, "", "m") for name in ABLATIONS})
ROWS["told-fixed"] = Row("told-the-task", "learned=0", "m")
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
    args = train.parse(list(options))
    device, dtype, _ = pick_device(args.device, args.dtype)
    return train.open_session(args, device, dtype)


def new_tuner(args: Namespace, session: train.Session) -> tuple[Tuner, dict]:
    """train.new_tuner; the form that is told the task of each row learns here which row has which."""
    tuner, meta = train.new_tuner(args, session)
    if isinstance(tuner, ToldTheTask):
        tuner.tell(session.rows, session.examples)
    return tuner, meta


def train_one(options: list[str], own: list[str], folder: str) -> dict:
    """Train, or continue; leaves trained.json.  `own` are the options of this run beside those of the table."""
    path = os.path.join(folder, "trained.json")
    if os.path.exists(path):
        return same_run(path, [*options, *own])
    session = open_session(tuple(options))
    files = RunFolder(folder)
    args = train.parse([*options, *own, "--out", folder, "--resume" if files.can_resume() else "--force"])
    files.lock(args.force)
    tuner, meta = new_tuner(args, session)
    if session.model.wte.weight.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    clock = time.perf_counter()
    tuner.attach(session.model)
    try:
        train.train(session.model, tuner, session.examples, args, meta)
    except Diverged:  # a rate can be too high: what had been saved until then counts, if anything had
        pass
    finally:
        tuner.detach()
    val = load_checkpoint(files.best)["val"] if os.path.exists(files.best) else DIVERGED
    log = files.read_log()
    result = {
        "options": [*options, *own], "val": val, "curve": [[row["step"], row["val"]] for row in log],
        "trainable": sum(p.numel() for p in tuner.parameters()), "seconds": time.perf_counter() - clock,
        "tokens_per_s": statistics.median([row["tokens_per_s"] for row in log] or [0]),
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if session.model.wte.weight.is_cuda else None,
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
    instruction (TEST/swapped), with that of another row of the same task (TEST/within), and with the mean of what it
    writes (TEST/mean).
    """
    path, options_file = os.path.join(folder, "scores.npz"), os.path.join(folder, "scored.json")
    if os.path.exists(path) and os.path.exists(options_file):
        same_run(options_file, [*options, *own])
        return path
    arrays = {}
    with tuned(options, own, folder) as (session, tuner):
        model, sets = session.model, {name: session.examples[name] for name in session.tests}
        if session.tokenizer.vocab_size > 5000:  # tiny's model has never seen English
            sets["plain"] = plain_examples(session.tokenizer)
        for name, examples in sets.items():
            nats, wrong = score_examples(model, examples, tuner)
            arrays |= {f"{name}/nats": nats.float().numpy(), f"{name}/wrong": wrong.numpy().astype(np.int32)}
            arrays[f"{name}/tokens"] = np.array([len(response) for _, response in examples], np.int32)
            arrays[f"{name}/family"] = np.array([p3.family(row.get("task", "")) for row in session.rows.get(name, [])])
        if len(getattr(tuner, "generators", ())):
            controls = {
                "swapped": swapped_instruction(tuner),
                "mean": mean_output(tuner, model, evenly_spaced(session.examples["val"], 256)),
            }
            for control, context in controls.items():
                with context:
                    for name in session.tests:
                        arrays[f"{name}/{control}"] = score_examples(model, sets[name], tuner)[0].float().numpy()
            for name in session.tests:
                tasks = arrays[f"{name}/family"]
                if len(set(tasks)) > 1:  # of one task, that would be TEST/swapped again
                    arrays[f"{name}/within"] = swapped_within_tasks(tuner, model, sets[name], tasks).numpy()
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
        tuner, _ = new_tuner(train.parse([*options, *own, "--out", folder, "--resume"]), session)
        load_into(tuner, load_checkpoint(best), best)
        tuner.attach(session.model)
        tuner.eval()
    try:
        yield session, tuner
    finally:
        if tuner is not None:
            tuner.detach()


def write_one(options: list[str], own: list[str], folder: str) -> dict[str, dict[str, float]]:
    """Greedy answers to every different instruction of the test sets, and their BLEU and ROUGE-L; leaves texts.json."""
    path = os.path.join(folder, "texts.json")
    if os.path.exists(path):
        return same_run(path, [*options, *own])["scores"]
    texts, scores = {}, {}
    with tuned(options, own, folder) as (session, tuner):
        for name in session.tests:
            rows, references = distinct_instructions(session.rows[name])
            texts[name] = write_answers(session, rows, tuner)
            scores[name] = bleu_and_rouge(texts[name], references)
    os.makedirs(folder, exist_ok=True)
    write_json(path, {"options": [*options, *own], "scores": scores, "texts": texts})
    return scores


def plain_examples(tokenizer: Tokenizer) -> list[Example]:
    """Up to 64 passages of English that no task asks about, of 64 tokens that are read and 128 that are predicted.

    They are Python's own help topics, which every Python has; another version may word some of them otherwise.
    """
    from pydoc_data.topics import topics

    ids = [tokenizer.encode(text) for _, text in sorted(topics.items())]
    return [Example(text[:64], text[64:192]) for text in ids if len(text) >= 192][:64]


def same_run(path: str, options: list[str]) -> dict:
    """A run's trained.json or scored.json.  Raises ValueError if it is of other options: it must not stand for this."""
    content = read_json(path)
    if content.get("options") != options:
        raise ValueError(f"{path} is of a run with other options: --out names another folder, or remove it")
    return content


def start_process(threads: int):
    """Before a process of the pool works: its share of the cores, and no progress bars."""
    METHODS.update(ABLATIONS)
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


# -- All of it ---------------------------------------------------------------------------------------------------------


def rates_chosen(out: str, methods: list[str], seeds: int) -> dict[str, float]:
    """The learning rate of each method in a finished table.  Raises ValueError if a method or a seed is not in it."""
    path = os.path.join(out, "compare.json")
    if not os.path.exists(path):
        raise FileNotFoundError(f"--warm-start: there is no {path}. It takes the --out of a finished comparison")
    rows = {row["method"]: row for row in read_json(path)["rows"] if "lr" in row}
    for name in methods:
        if name not in rows:
            raise ValueError(f"--warm-start: {path} has no {name}. It has: {', '.join(rows)}")
        if rows[name]["seeds"] < seeds:
            raise ValueError(f"--warm-start: {path} has {rows[name]['seeds']} seeds of {name}, --seeds is {seeds}")
    return {name: rows[name]["lr"] for name in methods}


class Comparison:
    """The runs of one table."""

    def __init__(self, args: Namespace):
        self.args = args
        table = TABLES[args.table]
        self.options = [*table.options.split(), *args.rest]
        model_args = train.parse(self.options)
        self.config = read_config(os.path.join(find_model(model_args.init), "config.json"))
        self.sizes = {name: sized(self.config, name, args.budget or table.budget) for name in args.methods}
        self.frozen_texts = None
        self.warm_rates = rates_chosen(args.warm_start, args.methods, args.seeds) if args.warm_start else {}

    def folder(self, name: str, rate: float = 0.0, seed: int = 0, out: str | None = None) -> str:
        return os.path.join(out or self.args.out, "runs", f"{name}-lr{rate:.2e}-seed{seed}" if rate else name)

    def own(self, name: str, rate: float, seed: int) -> list[str]:
        """A run's options, all of them spelled out, so that no run from before a default changed stands for it."""
        method = ROWS[name].method
        own = ["--method", method, "--seed", str(seed), "--lr", repr(rate)]
        if self.args.warm_start:
            own += ["--warm-start", self.folder(name, self.warm_rates[name], seed, self.args.warm_start)]
        options = spell_out(method, self.sizes[name][0])
        return own + (["-o", *options] if options else [])

    def measure(self, name: str, pool: ProcessPoolExecutor, bar: tqdm) -> dict:
        """A method's rate, runs and scores."""

        def submit(rate, seed):
            future = pool.submit(train_one, self.options, self.own(name, rate, seed), self.folder(name, rate, seed))
            future.add_done_callback(lambda _: bar.update())
            return future

        with torch.device("meta"):
            lr = build(ROWS[name].method, self.config, self.sizes[name][0]).lr
        trials = {lr * multiple: submit(lr * multiple, 0) for multiple in self.args.rates}
        vals = {rate: future.result()["val"] for rate, future in trials.items()}
        while (rate := min(vals, key=vals.get)) in (min(vals), max(vals)) and 1 < len(vals) < 8:
            beyond = 2 * rate if rate == max(vals) else rate / 2  # the best is not at the edge of what was tried
            trials[beyond] = submit(beyond, 0)
            vals[beyond] = trials[beyond].result()["val"]
        runs = [trials[rate], *(submit(rate, seed) for seed in range(1, self.args.seeds))]
        runs = [future.result() for future in runs]
        row = {
            "method": name, "options": " ".join(self.sizes[name][0]), "trainable": runs[0]["trainable"], "lr": rate,
            "search": vals, "val": [r["val"] for r in runs], "curves": [r["curve"] for r in runs],
            "tokens_per_s": statistics.median(r["tokens_per_s"] for r in runs),
            "seconds": statistics.median(r["seconds"] for r in runs), "peak_mb": runs[0]["peak_mb"], "seeds": len(runs),
        }  # fmt: skip
        if not self.args.validate_only:
            seeds = range(self.args.seeds)
            jobs = [(self.options, self.own(name, rate, seed), self.folder(name, rate, seed)) for seed in seeds]
            row["scores"] = [future.result() for future in [pool.submit(score_one, *job) for job in jobs]]
            if TABLES[self.args.table].texts:
                row["texts"] = [future.result() for future in [pool.submit(write_one, *job) for job in jobs]]
        return row

    def run(self) -> list[dict]:
        """Rows of the table; what is finished is saved after each."""
        threads = max(1, torch.get_num_threads() // self.args.jobs)
        runs = (len(self.args.rates) + self.args.seeds - 1) * len(self.args.methods)
        rows = []
        with ProcessPoolExecutor(self.args.jobs, get_context("spawn"), start_process, (threads,)) as pool:
            with tqdm(total=runs, unit="run", dynamic_ncols=True) as bar:
                frozen = None
                if not self.args.validate_only:
                    frozen = pool.submit(score_one, self.options, [], self.folder("frozen"))
                    if TABLES[self.args.table].texts:
                        self.frozen_texts = pool.submit(write_one, self.options, [], self.folder("frozen"))
                with ThreadPoolExecutor(len(self.args.methods) or 1) as threads_of_methods:
                    futures = [threads_of_methods.submit(self.measure, name, pool, bar) for name in self.args.methods]
                    try:
                        for future in as_completed(futures):
                            rows.append(future.result())
                            self.save(rows, frozen)
                        if self.frozen_texts is not None:
                            rows.append({"method": "frozen", "texts": [self.frozen_texts.result()]})
                        self.save(rows, frozen)
                    except BaseException:  # Ctrl-C has reached the runs, too: they save, and no other begins
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise
        return rows

    def save(self, rows: list[dict], frozen: Future | None):
        """Write what is known: compare.json, and scores.npz with the arrays of all runs, named METHOD/SEED/..."""
        common = {"table": self.args.table, "options": " ".join(self.options), "machine": machine()}
        public = [{key: x for key, x in row.items() if key != "scores"} for row in rows]  # those are paths
        write_json(os.path.join(self.args.out, "compare.json"), {**common, "rows": public}, indent=1)
        if frozen is not None:
            arrays = {f"frozen/0/{key}": x for key, x in np.load(frozen.result()).items()}
            for row in rows:
                for seed, path in enumerate(row.get("scores", [])):
                    arrays |= {f"{row['method']}/{seed}/{key}": x for key, x in np.load(path).items()}
            with replacing(os.path.join(self.args.out, "scores.npz"), "wb") as f:
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
    add("--reference", help="the method that differences are taken to (default: iapt, or the first)")
    add(
        "--warm-start",
        metavar="FOLDER",
        help="--out of another table: each run starts from that method's best, seed by seed",
    )
    add("--validate-only", action="store_true", help="choose rates; score no test row")
    add("--jobs", type=at_least(1), default=1, help="runs side by side")
    add("--out", help="folder of the results (default: out/compare/TABLE)")
    args, args.rest = parser.parse_known_args(argv)
    args.out = args.out or os.path.join("out", "compare", args.table)
    args.methods = [name for name in args.methods.split(",") if name != "frozen"]  # that one is always scored
    for name in args.methods:
        if name not in ROWS:
            parser.error(f"no method {name!r}. There are: {', '.join(ROWS)}, frozen")
    args.reference = args.reference or next((name for name in ("iapt", *args.methods) if name in args.methods), None)
    if args.reference not in (*args.methods, None):
        parser.error(f"--reference {args.reference} is none of --methods {','.join(args.methods)}")
    if args.warm_start and os.path.realpath(args.warm_start) == os.path.realpath(args.out):
        parser.error(f"--warm-start {args.warm_start} is where this comparison writes to: --out names another folder")
    if not all(0 < rate < 1e6 for rate in args.rates):
        parser.error(f"--rates must be above 0, got {args.rates}")
    passed_on, defaults = train.parse([*args.rest, "--out", args.out]), train.parse(["--out", args.out])
    for own in ("method", "o", "seed", "lr", "resume", "force"):
        if getattr(passed_on, own) != getattr(defaults, own):
            parser.error(f"-{'-' * (own != 'o')}{own} is set run by run")
    return args


def main(argv: list[str] | None = None):
    METHODS.update(ABLATIONS)  # here, and in the processes that do the work
    args = parse(argv)
    if TABLES[args.table].texts and not args.validate_only:
        import_metrics()  # before any work, and not after hours of it
    comparison = Comparison(args)
    os.makedirs(args.out, exist_ok=True)
    rows = comparison.run()
    if args.validate_only:
        for row in sorted(rows, key=lambda row: row["val"][0]):
            search = ", ".join(f"{rate:.1e}: {val:.3f}" for rate, val in row["search"].items())
            print(f"{row['method']:20} {row['trainable']:9,}  {row['val'][0]:.4f}   {search}   {row['options']}")
        return
    lines = list(report(rows, Scores(os.path.join(args.out, "scores.npz")), args.reference))
    lines.append(f"\n{f'{args.seeds} seeds, ' if rows else ''}{machine()}.")
    with replacing(os.path.join(args.out, "compare.md")) as f:
        f.write("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
