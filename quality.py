"""Every method on the same work, at equal budget: what `python bench.py quality` does.

Each method gets the size whose trainable parameters are nearest to the budget, and the learning rate of the lowest
validation loss: from the method's own rate, twice and half of it, and on from the better end as long as that helps.
Then K seeds are trained at that rate and scored on the test sets, which no choice has seen.  Every run is a process
and a folder of its own: interrupted, the same command goes on; with more seeds or methods, it adds them.

A map: ROWS, the methods; `sized`; one run (`train_one`, `score_one`); `Quality`, all of them; `markdown`, the table.
"""

import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import SimpleNamespace

import torch
from tqdm import tqdm

import train
from baselines import build, complete
from checkpoint import claim, fill, load_tuner
from data import read_json, replacing, template
from iapt import Tuner
from model import Config

# IAPT before Q was measured from its mean, with the pooling, and the rates of constants and coefficients, of that time.
UNCENTRED = "unit=1 static_lr=20 pool=attention centre=0"
# A row of the comparison: the method, its options, the option that sets its size and the most we give it.
ROWS = {
    "iapt": ("iapt", "", "m", 10**6),
    # From ours to the paper's form, one thing less at a time: something generated in all soft tokens, Q from its mean,
    # shared projections, a softmax of their own, more soft tokens than four, keys and values, constants and norms.
    "iapt-beside": ("iapt", "static=1 beside=8", "m", 10**6),
    "iapt-uncentred": ("iapt", f"{UNCENTRED} static=1 beside=8", "m", 10**6),
    "iapt-unshared": ("iapt", f"{UNCENTRED} static=1 beside=8 share=1", "m", 10**6),
    "iapt-among": ("iapt", f"{UNCENTRED} static=1 beside=8 share=1 apart=0", "m", 10**6),
    "iapt-4-among": ("iapt", f"{UNCENTRED} static=1 share=1 apart=0", "m", 10**6),
    "iapt-hidden": ("iapt", f"{UNCENTRED} static=1 share=1 apart=0 space=hidden", "m", 10**6),
    "iapt-paper": ("iapt", f"{UNCENTRED} share=1 apart=0 space=hidden static=0 norm=0", "m", 10**6),
    "iapt-4": ("iapt", f"{UNCENTRED} static=1", "m", 10**6),
    "iapt-blind": ("iapt", "pool=none", "m", 10**6),  # all instructions are one to it
    "ptuning2": ("ptuning2", "", "P", 10**6),
    "ptuning2-apart": ("ptuning2", "apart=1", "P", 10**6),  # what IAPT's way to attend is worth without a generator
    "static": ("static", "", "P", 10**6),
    "ptuning2-4": ("ptuning2", "P=4", None, 0),  # the static part of iapt-4-among alone ...
    "static-4": ("static", "P=4", None, 0),  # ... and that of iapt-hidden
    "prefix": ("prefix", "P=10", "hidden", 10**6),
    "prefix-512": ("prefix", "P=10", None, 0),  # the paper's MLP, which goes after training, whatever it costs
    "prompt": ("prompt", "", "P", 40),  # each is one more position in every layer
    "dynamic": ("dynamic", "pool=4", "P", 20),
    "capt": ("capt", "", None, 0),  # one soft token a layer is what it is
    "lora": ("lora", "", "r", 10**6),
    "adapter": ("adapter", "", "m", 10**6),
    "full": ("full", "", None, 0),
    "mine": ("mine", "", "P", 10**6),
}
LEFT_OUT = (  # unless asked for
    "iapt-beside", "iapt-uncentred", "iapt-4", "iapt-4-among", "iapt-hidden", "iapt-blind", "ptuning2-4", "static-4",
    "mine",
)  # fmt: skip
METRICS = ("none", "exact", "accuracy", "bleu")


def options(parser: ArgumentParser):
    """Add the options of the comparison to a parser of arguments."""
    add, or_ = parser.add_argument, "(default: %(default)s)"
    add("--methods", default=",".join(name for name in ROWS if name not in LEFT_OUT), help=f"{', '.join(ROWS)} {or_}")
    add("--budget", type=int, default=16000, help=f"trainable parameters {or_}")
    add("--seeds", type=int, default=3, help=or_)
    add("--lr", type=float, help="this rate for all methods, in place of the search")
    add(
        "--rates",
        metavar="FILE",
        help="each method's rate from the quality.json of another run, in place of the search",
    )
    add("--metric", default="exact", choices=METRICS, help=f"beside the loss: {', '.join(METRICS)} {or_}")
    add("--texts", type=int, default=0, help="write at most so many texts of a test set for --metric bleu; 0: all")
    add("--beams", type=int, default=3, help=f"for the texts of --metric bleu {or_}")
    add("--jobs", type=int, default=1, help=f"runs side by side {or_}")
    add("--out", default="out/bench", help=or_)


def check(args: Namespace, parser: ArgumentParser):
    """Stop with a line and status 2 if options of the comparison, or those of train.py after them, are wrong."""
    args.methods = args.methods.split(",")
    for name in args.methods:
        if name not in ROWS:
            parser.error(f"no method {name!r}. There are: {', '.join(ROWS)}")
    for name in ("budget", "seeds", "beams", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.texts < 0 or args.lr is not None and not 0 < args.lr < math.inf:
        parser.error(f"--texts must be at least 0 and --lr above 0, got {args.texts} and {args.lr}")
    given, left = train.parse([*args.rest, "--out", args.out]), train.parse(["--out", args.out])
    for own in ("method", "o", "seed", "resume", "force"):
        if getattr(given, own) != getattr(left, own):
            parser.error(f"-{'-' * (own != 'o')}{own} is for bench.py to set, run by run")


# -- Sizes -------------------------------------------------------------------------------------------------------------


def count(config: Config, method: str, options: list[str]) -> int:
    """Parameters that train."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(method, config, options).parameters())


def sized(config: Config, name: str, budget: int) -> tuple[list[str], int]:
    """A row's options, such that as nearly as possible `budget` parameters train, and how many do."""
    method, options, size, most = ROWS[name]
    options = options.split()
    if size is None:
        return options, count(config, method, options)

    def at(n):
        return count(config, method, [*options, f"{size}={n}"])

    step = at(2) - at(1)  # every method grows by the same number of parameters each time
    n = min(max(1, 1 + round((budget - at(1)) / step)), most)
    return [*options, f"{size}={n}"], at(n)


# -- One run, in a process of its own ----------------------------------------------------------------------------------


def peak_memory(device: str | torch.device) -> int:
    """Bytes at the peak of this process: of the GPU if it has used one, else resident."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train_one(argv: list[str], folder: str):
    """Train, or go on training; leaves trained.json."""
    path = os.path.join(folder, "last.pt")
    args = train.parse([*argv, "--out", folder, *(["--resume"] if os.path.exists(path) else ["--force"])])
    before = peak_memory(train.pick_device(args.device)[0])
    session = train.begin(args)
    session.tuner.attach(session.model)
    claim(folder, args.force)
    device = session.model.wte.weight.device
    try:
        val = train.train(session.model, session.tuner, session.examples, args, session.meta)["val"]
    except train.Diverged as e:  # a rate can be too high: what had been saved until then counts, if anything had
        print(e)
        best = os.path.join(folder, "best.pt")
        val = load_tuner(best)["val"] if os.path.exists(best) else 1e9
    with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as f:
        log = [json.loads(line) for line in f]
    write(os.path.join(folder, "trained.json"), {
        "argv": argv, "val": val,
        "trainable": sum(p.numel() for p in session.tuner.parameters()),
        "tokens_per_s": statistics.median([row["tokens_per_s"] for row in log] or [0]),
        "peak_bytes": peak_memory(device) - before,
    })  # fmt: skip
    for name in ("last.pt", "previous.pt"):  # the optimizer's state is twice the size of the rest
        if os.path.exists(path := os.path.join(folder, name)):
            os.remove(path)


def score_one(argv: list[str], folder: str, metric: str, texts: int, beams: int):
    """Score best.pt on the test sets, or the frozen model alone if there is none; leaves scores.json."""
    best = os.path.join(folder, "best.pt")
    args = train.parse([*argv, "--out", os.path.join(folder, "scores")])
    args.test_rows, most = 0, args.test_rows  # all of them: a text is compared with all its references
    session = train.begin(args)
    tuner = None
    if os.path.exists(best):
        tuner = session.tuner
        tuner.attach(session.model)
        fill(tuner, load_tuner(best), best)
        tuner.eval()
    scores = {}
    for name in session.tests:
        exact, nats = train.evaluate(session.model, train.spread(session.examples[name], most), tuner)
        scores[name] = {"nats": nats}
        if metric == "exact":
            scores[name]["exact %"] = 100 * exact
        if metric == "accuracy":
            if not session.labels:
                raise ValueError("--metric accuracy is for data whose outputs are a few label words")
            scores[name]["accuracy %"] = 100 * train.accuracy(session, name, tuner, most)
        if metric == "bleu":
            said, references = answers(session, name, tuner, texts, beams, args.truncate)
            scores[name].update(bleu_and_rouge(said, references))
            write(os.path.join(folder, f"{name}.texts.json"), said)
    write(os.path.join(folder, "scores.json"), {"how": [argv, metric, texts, beams], "scores": scores})


def answers(
    session: SimpleNamespace, name: str, tuner: Tuner | None, most: int, beams: int, truncate: bool = False,
    size: int = 32,
) -> tuple[list[str], list[list[str]]]:  # fmt: skip
    """An answer to each different prompt of a test set (to `most` of them), and all outputs that the set has for it."""
    groups = {}
    for row in session.rows[name]:
        groups.setdefault(template(row), []).append(row)
    rows, texts = train.spread([group[0] for group in groups.values()], most), []
    rows.sort(key=lambda row: len(template(row)))
    for i in range(0, len(rows), size):
        some = rows[i : i + size]
        texts += train.answer(session.model, session.tokenizer, some, tuner, truncate=truncate, beams=beams)
    return texts, [[row["output"] for row in groups[template(row)]] for row in rows]


def bleu_and_rouge(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU and ROUGE-L, 0 to 100, each text against all its references.

    BLEU is what the E2E challenge computes: mteval's 13a tokens, lower case, several references.  ROUGE-L is the mean
    over texts of the best F1 among the references, by the package rouge-score (the challenge's own script weighs recall
    more).
    """
    try:
        import sacrebleu
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as e:
        raise ModuleNotFoundError(f"--metric bleu needs {e.name}: pip install sacrebleu rouge-score") from None
    most = max(map(len, references))
    columns = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    bleu = sacrebleu.corpus_bleu(texts, columns, lowercase=True, tokenize="13a").score
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score_multi(refs, text)["rougeL"].fmeasure for text, refs in zip(texts, references)]
    return {"BLEU": bleu, "ROUGE-L": 100 * statistics.mean(rouge)}


def write(path: str, content: object):
    """Write what json can, in one go."""
    with replacing(path) as f:
        json.dump(content, f, indent=1)


def comparison(path: str) -> tuple[dict, dict]:
    """A quality.json: all of it, and its rows by method but the frozen model's.  Raises ValueError if it is not one."""
    content = read_json(path)
    try:
        return content, {row["method"]: row for row in content["rows"] if row["lr"]}
    except (KeyError, TypeError):
        raise ValueError(f"{path} is not the quality.json of a comparison") from None


def the_same(path: str, how: list, key: str) -> dict:
    """A run's file.  Raises ValueError if it is of a run with other options, which must not be taken for this one."""
    content = read_json(path)
    if content.get(key) != how:
        raise ValueError(f"{path} is of a run with other options: --out names another folder, or remove it")
    return content


def alone(f: Callable, folder: str, threads: int, *args):
    """Call f(*args) in a process of its own; what it says goes to the folder's output.txt.

    Raises ValueError, with the last line of that, if it fails.
    """
    os.makedirs(folder, exist_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=quietly, args=(f, folder, threads, *args))
    process.start()
    process.join()
    if process.exitcode:
        path = os.path.join(folder, "output.txt")
        with open(path, encoding="utf-8") as file:
            lines = file.read().strip().splitlines()
        raise ValueError(f"a run failed: {lines[-1] if lines else 'without a word'} ({path})")


def quietly(f: Callable, folder: str, threads: int, *args):
    """What `alone` runs, in that process."""
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = open(os.path.join(folder, "output.txt"), "a", encoding="utf-8")  # noqa: SIM115
    f(*args)


# -- All of them -------------------------------------------------------------------------------------------------------


class Quality:
    """The runs of one comparison, and what is known of them."""

    def __init__(self, args: Namespace):
        self.args, self.stopped = args, threading.Event()
        self.threads = max(1, torch.get_num_threads() // args.jobs)
        model, _ = train.open_model(train.parse([*args.rest, "--out", args.out]).init)
        self.sizes = {name: sized(model.config, name, args.budget) for name in args.methods}
        self.rates = {}
        if args.rates:
            self.rates = {name: row["lr"] for name, row in comparison(args.rates)[1].items()}

    def argv(self, name: str, lr: float, seed: int) -> list[str]:
        """The options of train.py for one run."""
        method, (options, _) = ROWS[name][0], self.sizes[name]
        every = complete(method, options)  # spelled out, lest a run from before a default changed be taken for this one
        given = ["-o", *every] if every else []
        return [*self.args.rest, "--method", method, "--seed", str(seed), "--lr", repr(lr), *given]

    def trained(self, name: str, lr: float, seed: int) -> dict:
        """The content of a run's trained.json, after the run if there is none yet."""
        folder = os.path.join(self.args.out, name, f"lr{lr:.3g}-seed{seed}")
        path = os.path.join(folder, "trained.json")
        argv = self.argv(name, lr, seed)
        if not os.path.exists(path):
            self.go(train_one, folder, argv, folder)
            self.bar.update()
        return the_same(path, argv, "argv")

    def scored(self, name: str, lr: float, seed: int) -> dict:
        """What `scores` says of a run."""
        return self.scores(os.path.join(self.args.out, name, f"lr{lr:.3g}-seed{seed}"), self.argv(name, lr, seed))

    def scores(self, folder: str, argv: list[str]) -> dict:
        """{test set: {metric: value}} of a run's best.pt, or of the frozen model if it has none."""
        path, how = os.path.join(folder, "scores.json"), [self.args.metric, self.args.texts, self.args.beams]
        if not os.path.exists(path):
            self.go(score_one, folder, argv, folder, *how)
        return the_same(path, [argv, *how], "how")["scores"]

    def go(self, f: Callable, folder: str, *args):
        """`alone`, unless the comparison was stopped: then InterruptedError."""
        if self.stopped.is_set():
            raise InterruptedError
        alone(f, folder, self.threads, *args)

    def search(self, name: str) -> dict[float, float]:
        """Validation loss by learning rate: the method's own, twice and half of it, and on from the better end."""
        own = train.METHODS[ROWS[name][0]].lr
        if self.args.lr or name in self.rates:
            lr = self.args.lr or self.rates[name]
            return {lr: self.trained(name, lr, 0)["val"]}
        found = {}
        for factor in (1, 2, 0.5):
            found[own * factor] = self.trained(name, own * factor, 0)["val"]
        for end, factor in ((max, 2), (min, 0.5)):
            while end(found) == (best := min(found, key=found.get)) and len(found) < 10:
                self.bar.total += 1
                found[best * factor] = self.trained(name, best * factor, 0)["val"]
        return found

    def row(self, name: str) -> dict:
        """A line of the table, with all that it rests on."""
        found = self.search(name)
        lr = min(found, key=found.get)
        runs = [self.trained(name, lr, seed) for seed in range(self.args.seeds)]
        scores = [self.scored(name, lr, seed) for seed in range(self.args.seeds)]
        return {
            "method": name, "options": " ".join(self.sizes[name][0]), "trainable": runs[0]["trainable"], "lr": lr,
            "off_budget": runs[0]["trainable"] / self.args.budget - 1, "search": found,
            "val": mean_and_sd([r["val"] for r in runs]),
            "tokens_per_s": statistics.median(r["tokens_per_s"] for r in runs),
            "peak_mb": max(r["peak_bytes"] for r in runs) / 1e6,
            "scores": {test: {key: mean_and_sd([s[test][key] for s in scores]) for key in scores[0][test]}
                       for test in scores[0]},
        }  # fmt: skip

    def frozen(self) -> dict:
        """The line of the model without any method."""
        scores = self.scores(os.path.join(self.args.out, "frozen"), self.args.rest)
        scores = {test: {key: mean_and_sd([x]) for key, x in s.items()} for test, s in scores.items()}
        return {"method": "frozen", "options": "", "trainable": 0, "lr": None, "scores": scores}

    def all(self) -> list[dict]:
        """All rows, and those that an earlier command has left here; what is there is saved after each."""
        rows, lock = {"frozen": self.frozen(), **self.earlier()}, threading.Lock()

        def table():
            return [rows[name] for name in ("frozen", *ROWS) if name in rows]

        def one(name):
            row = self.row(name)
            with lock:
                rows[name] = row
                self.save(table())

        runs = (1 if self.args.lr or self.args.rates else 3) + self.args.seeds - 1
        with tqdm(total=runs * len(self.args.methods), unit="run", dynamic_ncols=True) as self.bar:
            with ThreadPoolExecutor(self.args.jobs) as pool:
                try:
                    for done in as_completed([pool.submit(one, name) for name in self.args.methods]):
                        done.result()
                except BaseException:  # Ctrl-C has reached the runs, too: they save, and no other begins
                    self.stopped.set()
                    raise
        return table()

    def how(self) -> dict:
        """What all rows of a table have in common."""
        common = ("budget", "seeds", "metric", "texts", "beams")
        return {"options": " ".join(self.args.rest), **{key: getattr(self.args, key) for key in common}}

    def earlier(self) -> dict:
        """Rows of other methods that the same comparison has left here."""
        path = os.path.join(self.args.out, "quality.json")
        content, rows = comparison(path) if os.path.exists(path) else ({}, {})
        same = all(content.get(key) == value for key, value in self.how().items())
        return {name: row for name, row in rows.items() if same and name not in self.args.methods}

    def save(self, rows: list[dict]):
        """Write rows, and what they depend on: quality.json, and quality.md as a table."""
        how = {**self.how(), "machine": machine(), "jobs": self.args.jobs}
        write(os.path.join(self.args.out, "quality.json"), {**how, "rows": rows})
        with replacing(os.path.join(self.args.out, "quality.md")) as f:
            f.write("\n".join([*markdown(rows), "", f"{self.args.seeds} seeds, {machine()}", ""]))


def machine() -> str:
    """What figures of speed and memory depend on."""
    name = platform.processor() or "a CPU"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores of {name}"
    return f"PyTorch {torch.__version__}, {device}"


def mean_and_sd(values: list[float]) -> list:
    """[mean, standard deviation]; the latter None for a single value."""
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]


def markdown(rows: list[dict]) -> Iterator[str]:
    """The table of rows, of which the first is the frozen model: lowest loss first, mean ± standard deviation."""
    tests = rows[0]["scores"]
    top = next(iter(tests))  # the loss of the first test set is enough beside a metric of all
    columns = [(t, key) for t in tests for key in tests[t] if t == top or key != "nats" or len(tests[t]) == 1]
    short = {test: test.removeprefix("test_") for test in tests}
    names = [f"{key} {short[test]}" if len(tests) > 1 else key for test, key in columns]
    lora = next((row["scores"] for row in rows if row["method"] == "lora"), None)
    gained = ["of LoRA's gain"] if lora else []
    yield " | ".join(["| method", "options", "trainable", "lr", *names, *gained, "tokens/s", "peak MB |"])
    yield "|" + "---|" * (len(columns) + len(gained) + 6)

    def cell(mean, sd, digits):
        return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if sd is not None else "")

    first = columns[0]
    for row in sorted(rows, key=lambda row: row["scores"][first[0]][first[1]][0]):
        scores = [cell(*row["scores"][test][key], 3 if key == "nats" else 1) for test, key in columns]
        cost = [f"{row['tokens_per_s']:,.0f}", f"{row['peak_mb']:,.0f}"] if row["lr"] else ["", ""]
        rate = f"{row['lr']:.2g}" if row["lr"] else ""
        if lora:  # the share of what LoRA takes off the frozen model's loss
            ours, best, nothing = (r[first[0]][first[1]][0] for r in (row["scores"], lora, rows[0]["scores"]))
            scores.append(f"{(nothing - ours) / (nothing - best):.1%}")
        yield "| " + " | ".join([row["method"], row["options"], f"{row['trainable']:,}", rate, *scores, *cost]) + " |"


def main(args: Namespace):
    """Run the comparison, or what is left of it; print its table."""
    rows = Quality(args).all()
    print("\n".join(markdown(rows)))
    for row in rows:
        if abs(row.get("off_budget", 0)) > 0.05:
            print(f"{row['method']} cannot match the budget: {row['trainable']:,} parameters, {row['off_budget']:+.0%}")
    jobs = f", {args.jobs} runs side by side" if args.jobs > 1 else ""
    print(f"\n{args.seeds} seeds; {machine()}{jobs}; saved {os.path.join(args.out, 'quality.json')} and .md")
