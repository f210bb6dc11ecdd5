"""Pictures as SVG files, for light and dark pages.

    python -m experiments.plots reads out/iapt "what is the capital of peru ?"   # what each soft token reads
    python -m experiments.plots curves out/iapt out/lora     # validation loss, run beside run
    python -m experiments.plots bars "tiny=out/compare/tiny/scores.npz"      # rows answered exactly, group by group
    python -m experiments.plots shares out/untrained.npz out/compare/hidden/scores.npz  # of a hidden instruction

All but `reads` need matplotlib.
"""

import html
import os
from argparse import Namespace
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from experiments.hidden import gaps
from experiments.report import Scores, difference
from iapt import IAPT, PaperIAPT
from plumbing.checkpoint import RunFolder
from plumbing.cli import Parser, UsageError, at_least, pick_device, run
from plumbing.explain import reading_weights
from plumbing.files import replacing
from sample import open_runs

# -- What each soft token reads ----------------------------------------------------------------------------------------

STYLE = """<style>
text { font: 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #24292f }
.name { fill: #6e7781 }
rect { fill: #4c8dd0 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .name { fill: #8b949e } }
</style>"""


def reads_svg(words: list[str], weights: Tensor, layers: list[int]) -> Iterator[str]:
    """Lines of an SVG: for each soft token of L layers the words of the instruction, shaded by weights (L, P, T).

    The shade is the square root of the weight: over twenty words, most weights are below a tenth.
    """
    L, P, _ = weights.shape
    width, line, left = 7.9, 21, 158  # of a character, of a line, of the names
    size = f"{left + width * sum(map(len, words)) + 8:.0f} {line * P * L + 8 * L:.0f}"
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{size.split()[0]}">{STYLE}'
    for l, layer in enumerate(layers):
        for p in range(P):
            x, y = left, line * (l * P + p) + 8 * l + 15
            yield f'<text class="name" x="0" y="{y}">layer {layer:2}, token {p + 1:2}</text>'
            for word, w in zip(words, weights[l, p].sqrt().tolist()):
                box, text = width * len(word), word.lstrip()
                yield f'<rect x="{x:.1f}" y="{y - 14}" width="{box:.1f}" height="19" rx="3" opacity="{w:.2f}"/>'
                length = width * len(text)
                text = html.escape(text)
                yield f'<text x="{x + box - length:.1f}" y="{y}" textLength="{length:.1f}">{text}</text>'
                x += box
    yield "</svg>"


def plot_reads(args: Namespace):
    """The instruction, once for each soft token, its words shaded by how much the token reads of them."""
    device, dtype, _ = pick_device()
    model, tokenizer, template, (tuner,) = open_runs([args.run], device=device, dtype=dtype)
    if not isinstance(tuner, (IAPT, PaperIAPT)):
        raise UsageError(f"{args.run} is not a run of IAPT: only that has generators to look into")
    tuner.attach(model)
    hidden = tuner.act == "hidden"
    row = {"instruction": args.instruction, "input": "any" if hidden else ""}
    prompt = next(filter(None, template.parts(row, tokenizer, hidden)))
    words, weights = tokenizer.words(prompt), reading_weights(model, tuner, prompt)
    layers = args.layers or list(range(1, len(weights) + 1))
    if max(layers) > len(weights):
        raise UsageError(f"--layers: there are {len(weights)}, got {max(layers)}")
    with replacing(args.out) as f:
        f.write("\n".join(reads_svg(words, weights[[l - 1 for l in layers]], layers)) + "\n")


# -- Plots of matplotlib -----------------------------------------------------------------------------------------------

GREY, COLORS = "#8b8b8b", ("#4c8dd0", "#e8833a", "#4fa84f", "#d9534f", "#9b6fc0", "#a0785a", "#d176b5", "#7a9a01")


def pyplot():
    """matplotlib.pyplot, drawing what can be read on white and on black, the same bytes each time."""
    try:
        import matplotlib
    except ImportError:
        raise ModuleNotFoundError("this plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    text = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
    plt.rcParams.update({name: GREY for name in text} | {
        "axes.prop_cycle": matplotlib.cycler(color=COLORS), "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "savefig.transparent": True, "svg.hashsalt": "iapt", "font.size": 9,
    })  # fmt: skip
    return plt


def save(figure: object, path: str):
    """Write a figure of matplotlib to an SVG file."""
    with replacing(path, "wb") as f:
        figure.savefig(f, format="svg", bbox_inches="tight", metadata={"Date": None})


def plot_curves(args: Namespace):
    """Validation loss by step, of several runs."""
    figure, axis = pyplot().subplots(figsize=(6, 3.4))
    names = [os.path.basename(os.path.normpath(folder)) for folder in args.runs]
    names = names if len(set(names)) == len(names) else args.runs
    for folder, name in zip(args.runs, names):
        run_folder = RunFolder(folder)
        if not os.path.exists(run_folder.log):
            raise FileNotFoundError(f"no {run_folder.log}: curves are of folders of runs")
        try:
            points = [(row["step"], row["val"]) for row in run_folder.read_log()]
        except (KeyError, TypeError):
            raise ValueError(f"{run_folder.log} is not the log of a run") from None
        axis.plot(*zip(*points), label=name)
    axis.set(xlabel="step", ylabel="validation loss (nats per token)", yscale="log")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, args.out)


BARS = {"lora-mlp": "LoRA on the MLP", "iapt": "IAPT", "constants": "IAPT without its generator"}


def plot_bars(args: Namespace):
    """Percent of the test rows that LoRA, IAPT and IAPT without its generator answer exactly, with 95 % intervals."""
    figure, axis = pyplot().subplots(figsize=(8, 3.4))
    names, _, paths = zip(*(group.rpartition("=") for group in args.groups))
    if not all(names):
        raise UsageError(f"bars takes NAME=FILE, each with a scores.npz of experiments.compare, got {args.groups}")
    groups = np.array([exact_rows(path) for path in paths])  # (groups, bars, 3)
    for i, (label, color) in enumerate(zip(BARS.values(), (COLORS[1], COLORS[0], COLORS[0] + "80"))):
        height, low, high = groups[:, i].T
        style = {"width": 0.27, "color": color, "ecolor": GREY, "capsize": 3, "label": label}
        bars = axis.bar(np.arange(len(names)) + 0.29 * (i - 1), height, yerr=(height - low, high - height), **style)
        axis.bar_label(bars, fmt="%.0f", padding=2)
    axis.set(ylabel="rows answered exactly, %", title="Test rows answered exactly, by methods of about the same size")
    axis.set_xticks(range(len(names)), names)
    axis.legend()
    save(figure, args.out)


def exact_rows(path: str) -> list[tuple[float, float, float]]:
    """(percent of rows answered exactly, mean over seeds, and its 95 % interval) of each method of BARS, from a file.

    Raises ValueError if the file has not the scores of all of them.
    """
    try:
        scores = Scores(path)
        right = [[wrong == 0 for wrong in scores.get(method, scores.tests[0], "wrong")] for method in BARS]
    except (IndexError, KeyError, OSError, TypeError, ValueError):
        raise ValueError(f"{path} is no scores.npz of experiments.compare with {', '.join(BARS)}") from None
    ones = np.ones(len(right[0][0]))  # a row counts once, as a token does
    return [tuple(np.clip(difference(seeds, [0 * ones], ones), 0, 1) * 100) for seeds in right]


SHARES = {"summary": "soft tokens, trained", "compressor": "learned tokens and LoRA", "cut": "the first words",
          "means": "averages, untrained"}  # fmt: skip


def plot_shares(args: Namespace):
    """How much of a hidden instruction is left, by the number of soft tokens, with 95 % intervals."""
    lines = {label: [] for label in SHARES.values()}
    for name, (_, _, *share) in gaps(args.files, args.split).items():
        kind, _, P = name.partition("-")
        if kind in SHARES and (P.isdigit() or not P):
            lines[SHARES[kind]].append((int(P or 4), *(100 * x for x in share)))  # `summary` has four
    figure, axis = pyplot().subplots(figsize=(6.4, 3.4))
    for (label, points), color in zip(lines.items(), COLORS[1::-1] + (GREY, COLORS[2])):
        if points:
            P, share, low, high = np.array(sorted(points)).T
            axis.errorbar(P, share, (share - low, high - share), label=label, color=color, marker="o", ms=4, capsize=2)
    axis.set(
        xlabel="soft tokens in a layer, or words",
        ylabel="of what the instruction changes, %",
        xscale="log",
        ylim=(0, 100),
    )
    ticks = sorted({int(point[0]) for points in lines.values() for point in points})
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, args.out)


# -- The command line --------------------------------------------------------------------------------------------------

PLOTS = {"reads": plot_reads, "curves": plot_curves, "bars": plot_bars, "shares": plot_shares}


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__)
    commands, command = parser.add_subparsers(dest="plot", required=True), {}
    for name, plot in PLOTS.items():
        command[name] = commands.add_parser(name, help=plot.__doc__.replace("%", "%%"), description=plot.__doc__)
        command[name].add_argument("--out", default=os.path.join("out", f"{name}.svg"), help="the file")
    command["reads"].add_argument("run", help="folder of a run")
    command["reads"].add_argument("instruction")
    command["reads"].add_argument("--layers", type=at_least(1), nargs="+", help="which layers (default: all)")
    command["curves"].add_argument("runs", nargs="+", metavar="run", help="folders of runs")
    command["bars"].add_argument("groups", nargs="+", metavar="name=file", help="a scores.npz of experiments.compare")
    command["shares"].add_argument("files", nargs="+", help="scores of experiments.hidden and of experiments.compare")
    command["shares"].add_argument("--split", default="test", help="which of the splits they hold")
    args = parser.parse_args(argv)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    PLOTS[args.plot](args)
    print(f"saved {args.out}")


if __name__ == "__main__":
    run(main)
