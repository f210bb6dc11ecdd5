"""What a comparison says: the scores of all runs, differences with intervals, and tables.

The statistics are paired: two methods are compared on the same rows, and seeds and rows are both drawn again by the
bootstrap, so an interval says what other rows and other seeds could have brought.
"""

import statistics
from collections.abc import Iterator

import numpy as np

DIVERGED = 1e9  # the validation loss of a run that diverged before it saved anything: it is scored as the frozen model


def per_token(nats: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Nats per token of rows drawn `weights` (K, N) times: nats (N,) -> (K,)."""
    return (weights @ nats) / (weights @ tokens)


def difference(
    a: list[np.ndarray], b: list[np.ndarray], tokens: np.ndarray, same_runs: bool = False, draws: int = 2000,
    groups: np.ndarray | None = None,
) -> tuple[float, float, float]:  # fmt: skip
    """Nats per token of method a minus those of method b, and a 95 % interval: (mean, low, high).

    a and b have an array of nats per row (N,) for each seed.  The bootstrap draws rows, the same ones for both, and
    seeds: for each method its own, unless a and b are the same runs.  With groups (N,), the names of what rows belong
    to, it draws groups: what would other tasks have brought?

    Where seeds are all that differs, such an interval covers 87 % with three seeds, and 90 % with five, not 95 %.
    """
    rng = np.random.default_rng(0)
    group = np.arange(len(tokens)) if groups is None else np.unique(groups, return_inverse=True)[1]
    n = group.max() + 1
    weights = rng.multinomial(n, np.full(n, 1 / n), size=draws)[:, group]  # how often each row is drawn
    means, seeds, ones = [], None, np.ones((1, len(tokens)))
    for x in (np.stack(a), np.stack(b)):
        S = len(x)
        if seeds is None or not same_runs:
            seeds = rng.integers(S, size=(draws, S))
        by_seed = np.stack([per_token(seed, tokens, weights) for seed in x])  # (S, draws)
        drawn, all_seeds = by_seed[seeds, np.arange(draws)[:, None]].mean(1), by_seed.mean(0)
        # S drawn seeds differ from their mean by less than seeds differ: the factor of an unbiased variance.
        drawn = all_seeds + (drawn - all_seeds) * (S / max(1, S - 1)) ** 0.5
        means.append((per_token(x.mean(0), tokens, ones)[0], drawn))
    low, high = np.quantile(means[0][1] - means[1][1], (0.025, 0.975))
    return means[0][0] - means[1][0], low, high


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

    def families(self, test: str) -> np.ndarray:
        return self.arrays[f"frozen/0/{test}/family"]

    def nats(self, method: str, test: str, what: str = "nats") -> float:
        """Nats per token, mean over seeds."""
        return float(np.mean([x.sum() / self.tokens(test).sum() for x in self.get(method, test, what)]))

    def exact(self, method: str, test: str) -> float:
        """Percent of rows answered exactly, mean over seeds."""
        return 100 * float(np.mean([(x == 0).mean() for x in self.get(method, test, "wrong")]))

    def macro(self, method: str, test: str) -> float:
        """Nats per token, mean over task families."""
        tokens, families = self.tokens(test), self.families(test)
        masks = [families == family for family in np.unique(families)]
        return float(np.mean([[x[m].sum() / tokens[m].sum() for m in masks] for x in self.get(method, test)]))


CONTROLS = {
    "swapped": "another row's instruction",
    "within": "the instruction of another row of the task",
    "mean": "the mean of what it writes",
}


def report(rows: list[dict], scores: Scores, reference: str) -> Iterator[str]:
    """Tables in Markdown: scores, differences to the reference method, and the controls."""
    tests, plain = scores.tests, bool(scores.get("frozen", "plain"))
    yield " | ".join(["| method", "trained", "rate", *tests, *["plain text"] * plain]) + " |"
    yield "|---|---|---|" + "---|" * (len(tests) + plain)
    order = sorted((row for row in rows if "lr" in row), key=lambda row: scores.nats(row["method"], tests[0]))
    for row in [*order, {"method": "frozen", "trainable": 0}]:
        name = row["method"]
        cells = [f"{scores.nats(name, t):.3f} ({scores.exact(name, t):.1f} %)" for t in tests]
        if plain:
            cells.append(f"{scores.nats(name, 'plain') - scores.nats('frozen', 'plain'):+.3f}")
        diverged = sum(val >= DIVERGED for val in row.get("val", []))
        name += f" ({diverged} of {len(row['val'])} seeds diverged)" if diverged else ""
        rate = f"{row['lr']:.1e}" if "lr" in row else ""
        yield f"| {name} | {row['trainable']:,} | {rate} | {' | '.join(cells)} |"
    yield "\nNats per token (rows answered exactly)."
    if plain:
        yield "Plain text: the rise of the loss on text that has nothing to do with the tasks."
    if not order:
        return
    yield f"\n| minus {reference} | " + " | ".join(tests) + f" | {tests[0]}, mean over tasks |"
    yield "|---|" + "---|" * (len(tests) + 1)
    for row in order:
        name = row["method"]
        if name == reference or reference not in scores.seeds:
            continue
        pairs = {t: (scores.get(name, t), scores.get(reference, t), scores.tokens(t)) for t in tests}
        macro = scores.macro(name, tests[0]) - scores.macro(reference, tests[0])
        yield f"| {name} | {' | '.join(interval(*difference(*pair)) for pair in pairs.values())} | {macro:+.3f} |"
        if any(len(np.unique(scores.families(t))) > 5 for t in tests):
            cells = [
                interval(*difference(*pair, groups=scores.families(t)))
                if len(np.unique(scores.families(t))) > 5
                else "–"
                for t, pair in pairs.items()
            ]
            yield f"| ... tasks drawn | {' | '.join(cells)} | |"
    yield "\nDifferences of nats per token on the same rows, with 95 % intervals: above 0, the reference is better."
    yield "Seeds and rows are drawn again; in the lines below, seeds and tasks.\n"
    yield "| at inference | " + " | ".join(tests) + " |"
    yield "|---|" + "---|" * len(tests)
    for name in (row["method"] for row in order):
        for what, label in CONTROLS.items():
            runs = {t: scores.get(name, t, what) for t in tests}
            if any(runs.values()):
                cells = [
                    interval(*difference(x, scores.get(name, t), scores.tokens(t), same_runs=True)) if x else "–"
                    for t, x in runs.items()
                ]
                yield f"| {name}: {label} | {' | '.join(cells)} |"
    written = {row["method"]: row["texts"] for row in rows if "texts" in row}
    if written:
        yield "\n| texts | " + " | ".join(f"{t}: BLEU | ROUGE-L" for t in tests) + " |"
        yield "|---|" + "---|---|" * len(tests)
    for name, seeds in written.items():
        cells = [f"{statistics.mean(seed[t][m] for seed in seeds):.1f}" for t in tests for m in ("BLEU", "ROUGE-L")]
        yield f"| {name} | {' | '.join(cells)} |"
