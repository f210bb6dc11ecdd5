"""What a comparison says: the scores of all runs, differences with intervals, and tables.

    python -m experiments.report FIRST.npz SECOND.npz     # what other options change, on the same test rows

The statistics are paired: two methods are compared on the same rows, and seeds and rows are both drawn again by the
bootstrap, so an interval says what other rows and other seeds could have brought.
"""

from collections.abc import Iterable, Iterator
from zipfile import BadZipFile

import numpy as np

from plumbing.cli import Parser, run

DIVERGED = 1e9  # the validation loss of a run that diverged before it saved anything: it is scored as the frozen model


def per_token(nats: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Nats per token of rows drawn `weights` (K, N) times: nats (N,) -> (K,)."""
    return (weights @ nats) / (weights @ tokens)


def difference(
    a: list, b: list, tokens: np.ndarray, same_runs: bool = False, groups: np.ndarray | None = None
) -> tuple[float, float, float]:
    """Nats per token of method a minus those of method b, and a 95 % interval: (mean, low, high).

    a and b have an array of nats per row (N,) for each seed.  The bootstrap draws rows, the same ones for both, and
    seeds: for each method its own, unless a and b are the same runs.  With groups (N,), the names of what rows belong
    to, it draws groups: what would other tasks have brought?

    Where seeds are all that differs, such an interval covers 87 % with three seeds, and 90 % with five, not 95 %.
    """
    rng, draws = np.random.default_rng(0), 2000
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
    """The arrays of a scores.npz, by method, seed and test set.  Raises ValueError if the file is none."""

    def __init__(self, path: str):
        try:
            self.arrays = dict(np.load(path))
            keys = [key.split("/") for key in self.arrays]
            self.seeds = {method: sorted({int(seed) for m, seed, *_ in keys if m == method}) for method, *_ in keys}
        except (OSError, EOFError, TypeError, ValueError, BadZipFile) as e:  # TypeError: a single array
            wanted = "a whole scores.npz, as python -m experiments.compare writes it"
            raise ValueError(f"{path} is not {wanted} ({type(e).__name__})") from e
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


CONTROLS = {"swapped": "another row's instruction", "mean": "the mean of what it writes"}


def markdown(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """Lines of a table in Markdown."""
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


def report(rows: list[dict], scores: Scores) -> Iterator[str]:
    """Lines of Markdown: scores, differences to IAPT (without it, to the best method), the controls."""
    tests, plain = scores.tests, ["plain text"] * bool(scores.get("frozen", "plain"))
    order = sorted((row for row in rows if "lr" in row), key=lambda row: scores.nats(row["method"], tests[0]))
    lines = (losses(row, scores) for row in [*order, {"method": "frozen", "trainable": 0}])
    yield from markdown(["method", "trained", "rate", *tests, *plain], lines)
    yield "\nNats per token (rows answered exactly)."
    if plain:
        yield "Plain text: the rise of the loss on text that has nothing to do with the tasks."
    if order:
        names = [row["method"] for row in order]
        reference = "iapt" if "iapt" in names else names[0]
        yield ""
        head = [f"minus {reference}", *tests, f"{tests[0]}, mean over tasks"]
        yield from markdown(head, differences(names, reference, scores))
        yield "\nDifferences of nats per token on the same rows, with 95 % intervals: above 0, the reference is better."
        yield "Seeds and rows are drawn again; in the lines below, seeds and tasks.\n"
        yield from markdown(["at inference", *tests], controls(names, scores))


def losses(row: dict, scores: Scores) -> list[str]:
    """A method's cells in the table of scores."""
    name = row["method"]
    cells = [f"{scores.nats(name, test):.3f} ({scores.exact(name, test):.1f} %)" for test in scores.tests]
    if scores.get("frozen", "plain"):
        cells.append(f"{scores.nats(name, 'plain') - scores.nats('frozen', 'plain'):+.3f}")
    diverged = sum(val >= DIVERGED for val in row.get("val", []))
    name += f" ({diverged} of {len(row['val'])} seeds diverged)" if diverged else ""
    return [name, f"{row['trainable']:,}", f"{row['lr']:.1e}" if "lr" in row else "", *cells]


def differences(names: list[str], reference: str, scores: Scores) -> Iterator[list[str]]:
    """Rows of a table: each method minus the reference, and again with tasks drawn where there are more than five."""
    tests, families = scores.tests, {test: scores.families(test) for test in scores.tests}
    several = [len(np.unique(families[test])) > 5 for test in tests]
    for name in names:
        if name == reference:
            continue
        pairs = [(scores.get(name, test), scores.get(reference, test), scores.tokens(test)) for test in tests]
        macro = scores.macro(name, tests[0]) - scores.macro(reference, tests[0])
        yield [name, *(interval(*difference(*pair)) for pair in pairs), f"{macro:+.3f}"]
        if any(several):
            drawn = zip(several, pairs, families.values())
            cells = [interval(*difference(*pair, groups=groups)) if many else "–" for many, pair, groups in drawn]
            yield ["... tasks drawn", *cells, ""]


def controls(names: list[str], scores: Scores) -> Iterator[list[str]]:
    """Rows of a table: what each method that reads the instruction loses where it reads something else."""
    for name in names:
        for what, label in CONTROLS.items():
            cells = []
            for test in scores.tests:
                other = scores.get(name, test, what)
                own = scores.get(name, test), scores.tokens(test)
                cells.append(interval(*difference(other, *own, same_runs=True)) if other else "–")
            if set(cells) != {"–"}:
                yield [f"{name}: {label}", *cells]


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__)
    for name in ("first", "second"):
        parser.add_argument(name, help="scores.npz of a comparison: the same test rows, other options")
    args = parser.parse_args(argv)
    first, second = Scores(args.first), Scores(args.second)
    tests = [test for test in first.tests if test in second.tests]
    scored = "frozen" in first.seeds and "frozen" in second.seeds
    if not tests or not scored or not all(np.array_equal(first.tokens(test), second.tokens(test)) for test in tests):
        raise ValueError(f"{args.first} and {args.second} are not about the same rows: there is nothing to compare")
    rows = []
    for name in [name for name in first.seeds if name in second.seeds and name != "frozen"]:
        cells = []
        for test in tests:
            runs, tokens = [scores.get(name, test) for scores in (second, first)], first.tokens(test)
            exact = [f"{scores.exact(name, test):.1f}" for scores in (first, second)]
            cells.append(f"{interval(*difference(*runs, tokens))}, {exact[0]} % and {exact[1]} %")
        rows.append([name, *cells])
    print("\n".join(markdown(["second minus first", *tests], rows)))


if __name__ == "__main__":
    run(main)
