"""What a comparison says: the scores of all runs, differences with intervals, and tables.

The statistics are paired: two methods are compared on the same rows, and seeds and rows are both drawn again by the
bootstrap, so an interval says what other rows and other seeds could have brought.
"""

import statistics
from collections.abc import Iterator

import numpy as np


def per_token(nats: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Nats per token of rows drawn `weights` (K, N) times: nats (N,) -> (K,)."""
    return (weights @ nats) / (weights @ tokens)


def difference(
    a: list[np.ndarray], b: list[np.ndarray], tokens: np.ndarray, same_runs: bool = False, draws: int = 2000
) -> tuple[float, float, float]:
    """Nats per token of method a minus those of method b, and a 95 % interval: (mean, low, high).

    a and b have an array of nats per row (N,) for each seed.  The bootstrap draws rows, the same ones for both, and
    seeds: for each method its own, unless a and b are the same runs.
    """
    rng = np.random.default_rng(0)
    a, b = np.stack(a), np.stack(b)
    n = len(tokens)
    ones = np.ones((1, n))
    mean = per_token(a.mean(0), tokens, ones)[0] - per_token(b.mean(0), tokens, ones)[0]
    weights = rng.multinomial(n, np.full(n, 1 / n), size=draws)  # how often each row is drawn
    means, seeds = [], None
    for x in (a, b):
        if seeds is None or not same_runs:
            seeds = rng.integers(len(x), size=(draws, len(x)))
        by_seed = np.stack([per_token(seed, tokens, weights) for seed in x])  # (seeds, draws)
        means.append(by_seed[seeds, np.arange(draws)[:, None]].mean(1))
    low, high = np.quantile(means[0] - means[1], (0.025, 0.975))
    return mean, low, high


def interval(mean: float, low: float, high: float) -> str:
    """A `difference` as text."""
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


class Scores:
    """The arrays of a scores.npz, by method, seed and test set."""

    def __init__(self, path: str):
        self.arrays = dict(np.load(path))
        keys = [key.split("/") for key in self.arrays]
        self.seeds = {method: sorted({int(seed) for m, seed, *_ in keys if m == method}) for method, *_ in keys}
        self.tests = list(dict.fromkeys(test for *_, test, what in keys if what == "nats" and test != "plain"))

    def get(self, method: str, test: str, what: str = "nats") -> list[np.ndarray]:
        """An array of N rows for each seed; none if the method was not scored so."""
        keys = [f"{method}/{seed}/{test}/{what}" for seed in self.seeds[method]]
        return [self.arrays[key] for key in keys if key in self.arrays]

    def tokens(self, test: str) -> np.ndarray:
        return self.arrays[f"frozen/0/{test}/tokens"]

    def nats(self, method: str, test: str, what: str = "nats") -> float:
        """Nats per token, mean over seeds."""
        return float(np.mean([x.sum() / self.tokens(test).sum() for x in self.get(method, test, what)]))

    def exact(self, method: str, test: str) -> float:
        """Percent of rows answered exactly, mean over seeds."""
        return 100 * float(np.mean([(x == 0).mean() for x in self.get(method, test, "wrong")]))

    def macro(self, method: str, test: str) -> float:
        """Nats per token, mean over task families."""
        tokens, families = self.tokens(test), self.arrays[f"frozen/0/{test}/family"]
        masks = [families == family for family in np.unique(families)]
        return float(np.mean([[x[m].sum() / tokens[m].sum() for m in masks] for x in self.get(method, test)]))


def report(rows: list[dict], scores: Scores, reference: str) -> Iterator[str]:
    """Tables in Markdown: scores, differences to the reference method, and the controls."""
    tests, plain = scores.tests, bool(scores.get("frozen", "plain"))
    yield " | ".join(["| method", "trained", "rate", *tests, *["plain text"] * plain]) + " |"
    yield "|---|---|---|" + "---|" * (len(tests) + plain)
    order = sorted((row for row in rows if "lr" in row), key=lambda row: scores.nats(row["method"], tests[0]))
    for row in [*order, {"method": "frozen", "trainable": 0, "lr": 0}]:
        name = row["method"]
        cells = [f"{scores.nats(name, t):.3f} ({scores.exact(name, t):.1f} %)" for t in tests]
        if plain:
            cells.append(f"{scores.nats(name, 'plain') - scores.nats('frozen', 'plain'):+.3f}")
        yield f"| {name} | {row['trainable']:,} | {row['lr']:.1e} | {' | '.join(cells)} |"
    yield "\nNats per token (rows answered exactly); plain text: the rise of the loss on text without a task.\n"
    yield f"| minus {reference} | " + " | ".join(tests) + " | mean over families |"
    yield "|---|" + "---|" * (len(tests) + 1)
    for row in order:
        name = row["method"]
        if name == reference or reference not in scores.seeds:
            continue
        pairs = [(scores.get(name, t), scores.get(reference, t), scores.tokens(t)) for t in tests]
        cells = [interval(*difference(*pair)) for pair in pairs]
        t = tests[0]
        macro = scores.macro(name, t) - scores.macro(reference, t)
        yield f"| {name} | {' | '.join(cells)} | {macro:+.3f} |"
    yield "\nDifferences of nats per token on the same rows, with 95 % intervals: above 0, the reference is better.\n"
    yield "| at inference | " + " | ".join(tests) + " |"
    yield "|---|" + "---|" * len(tests)
    for name in (row["method"] for row in order):
        for what, label in (("swapped", "another row's instruction"), ("mean", "the mean of what it writes")):
            if scores.get(name, tests[0], what):
                pairs = [(scores.get(name, t, what), scores.get(name, t), scores.tokens(t)) for t in tests]
                cells = [interval(*difference(*pair, same_runs=True)) for pair in pairs]
                yield f"| {name}: {label} | {' | '.join(cells)} |"
    written = {row["method"]: row["texts"] for row in rows if "texts" in row}
    if written:
        yield "\n| texts | " + " | ".join(f"{t}: BLEU | ROUGE-L" for t in tests) + " |"
        yield "|---|" + "---|---|" * len(tests)
    for name, seeds in written.items():
        cells = [f"{statistics.mean(seed[t][m] for seed in seeds):.1f}" for t in tests for m in ("BLEU", "ROUGE-L")]
        yield f"| {name} | {' | '.join(cells)} |"
