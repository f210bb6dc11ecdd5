"""Pictures as SVG files, for light and dark pages.

    python -m experiments.plots reads out/iapt "what is the capital of peru ?"   # what each soft token reads
    python -m experiments.plots curves out/iapt out/lora     # validation loss, run beside run
    python -m experiments.plots tasks out/tasks/tasks.json   # what reading is worth, from experiments.tasks

All but `reads` need matplotlib.
"""

import html
import os
from argparse import Namespace
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from iapt import IAPT, PaperIAPT
from plumbing.checkpoint import RunFolder
from plumbing.cli import Parser, UsageError, at_least, pick_device, run
from plumbing.explain import reading_weights
from plumbing.files import read_json, replacing
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
    prompt = template.prompt_ids({"instruction": args.instruction}, tokenizer)
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


def plot_tasks(args: Namespace):
    """The loss of constants minus that of IAPT: against the number of tasks, and at 64 tasks against steps."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(8.4, 3), sharey=True)
    if not os.path.exists(args.file):
        raise FileNotFoundError(f"there is no {args.file}. Run: python -m experiments.tasks")
    cells = read_json(args.file)
    try:
        steps = min(cell["steps"] for cell in cells)
        models = list(dict.fromkeys(cell["model"] for cell in cells))
        longest = {c["model"]: c for c in sorted(cells, key=lambda c: c["steps"]) if c["tasks"] == 64}
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{args.file} is not a tasks.json of experiments.tasks") from None
    for model, color in zip(models, COLORS):
        own = sorted((c for c in cells if (c["model"], c["steps"]) == (model, steps)), key=lambda c: c["tasks"])
        tasks, (mean, low, high) = [c["tasks"] for c in own], np.array([c["constants minus iapt"] for c in own]).T
        left.errorbar(tasks, mean, (mean - low, high - mean), marker="o", capsize=3, color=color, label=model)
        if model in longest:
            iapt, constants = (mean_curve(longest[model]["validation"][name]) for name in ("iapt", "constants"))
            right.plot(list(iapt), [constants[step] - iapt[step] for step in iapt], marker="o", color=color)
    for axis in (left, right):
        axis.axhline(0, color=GREY, linewidth=0.8)
    left.set(xscale="log", xlabel=f"tasks ({steps} steps, test rows)", ylabel="nats below constants")
    left.set_xticks([4, 16, 64], ["4", "16", "64"])
    left.minorticks_off()
    left.legend(title="a model", loc="upper left")
    right.set(xlabel="steps (64 tasks, validation rows)")
    save(figure, args.out)


def mean_curve(curves: list[list[list[float]]]) -> dict[int, float]:
    """{step: loss}, the mean over curves of [step, loss], as far as all of them go."""
    return {points[0][0]: sum(loss for _, loss in points) / len(points) for points in zip(*curves)}


# -- The command line --------------------------------------------------------------------------------------------------

PLOTS = {"reads": plot_reads, "curves": plot_curves, "tasks": plot_tasks}


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__)
    commands, command = parser.add_subparsers(dest="plot", required=True), {}
    for name, plot in PLOTS.items():
        command[name] = commands.add_parser(name, help=plot.__doc__, description=plot.__doc__)
        command[name].add_argument("--out", default=os.path.join("out", f"{name}.svg"), help="the file")
    command["reads"].add_argument("run", help="folder of a run")
    command["reads"].add_argument("instruction")
    command["reads"].add_argument("--layers", type=at_least(1), nargs="+", help="which layers (default: all)")
    command["curves"].add_argument("runs", nargs="+", metavar="run", help="folders of runs")
    command["tasks"].add_argument("file", help="tasks.json")
    args = parser.parse_args(argv)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    PLOTS[args.plot](args)
    print(f"saved {args.out}")


if __name__ == "__main__":
    run(main)
