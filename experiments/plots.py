"""Plots of what was learned, as SVG files for light and dark pages.

    python -m experiments.plots reads out/iapt "what is the capital of peru ?"   # what each soft token reads
    python -m experiments.plots activations out/iapt         # the activation of each layer, beside GELU
    python -m experiments.plots attention out/iapt           # the share of the soft tokens in what attention finds
    python -m experiments.plots inside out/iapt              # a table of lengths, layer by layer
    python -m experiments.plots curves out/iapt out/lora     # validation loss, run beside run
    python -m experiments.plots serve out/bench/serve.json   # the cost of tenants, from experiments.bench serve
    python -m experiments.plots tasks out/tasks/tasks.json   # what reading is worth, from experiments.tasks

All but `reads` and `inside` need matplotlib.  Where rows are needed, they are 64 of those the run was validated on.
"""

import html
import os
from argparse import Namespace
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Batch, collate, encode, evenly_spaced, open_data
from iapt import IAPT, PaperIAPT, Rational
from model import Block, Decoder, Soft, Tuner
from plumbing.checkpoint import RunFolder, load_checkpoint
from plumbing.cli import Parser, UsageError, at_least, pick_device, run
from plumbing.files import read_json, replacing
from sample import Opened, generator_inputs, open_runs, reading_weights

GREY, COLORS = "#8b8b8b", ("#4c8dd0", "#e8833a", "#4fa84f", "#d9534f", "#9b6fc0", "#a0785a", "#d176b5", "#7a9a01")


def pyplot():
    """matplotlib.pyplot, drawing what can be read on white and on black."""
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
    """Write a figure of matplotlib to an SVG file, the same bytes each time."""
    with replacing(path, "wb") as f:
        figure.savefig(f, format="svg", bbox_inches="tight", metadata={"Date": None})


# -- Runs --------------------------------------------------------------------------------------------------------------


def open_iapt(path: str) -> Opened:
    """A run of IAPT, attached.  Raises UsageError for a run of another method."""
    device, dtype, _ = pick_device()
    opened = open_runs([path], device=device, dtype=dtype)
    (tuner,) = opened.tuners
    if not isinstance(tuner, (IAPT, PaperIAPT)):
        raise UsageError(f"{path} is not a run of IAPT: only that has generators to look into")
    tuner.attach(opened.model)
    return opened


def open_with_batch(path: str) -> tuple[Decoder, IAPT | PaperIAPT, Batch]:
    """(model, tuner, 64 of the rows that it was validated on) of a run of IAPT."""
    model, tokenizer, template, (tuner,) = open_iapt(path)
    meta = load_checkpoint(path)["meta"]
    try:
        rows = evenly_spaced(open_data(meta["data"], skip_bad=True)["val"], 64)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} was trained on {meta['data']}, and that is no longer there") from None
    examples = encode(rows, tokenizer, meta["block_size"], truncate=True, template=template)
    return model, tuner, collate(examples, meta["block_size"], model.wte.weight.device)


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


def plot_reads(args: Namespace, path: str):
    """The instruction, once for each soft token, its words shaded by how much the token reads of them."""
    model, tokenizer, template, (tuner,) = open_iapt(args.runs[0])
    prompt = template.prompt_ids({"instruction": args.runs[1], "input": args.input}, tokenizer)
    words, weights = reading_weights(model, tokenizer, tuner, prompt)
    layers = args.layers or list(range(1, len(weights) + 1))
    if max(layers) > len(weights):
        raise UsageError(f"--layers: there are {len(weights)}, got {max(layers)}")
    with replacing(path) as f:
        f.write("\n".join(reads_svg(words, weights[[l - 1 for l in layers]], layers)) + "\n")


# -- Activations, attention --------------------------------------------------------------------------------------------


@torch.no_grad()
def plot_activations(args: Namespace, path: str):
    """R of each layer beside GELU, where it started, and a histogram of its inputs."""
    plt = pyplot()
    model, tuner, batch = open_with_batch(args.runs[0])
    inputs = generator_inputs(model, tuner, batch.idx, batch.instr)
    x = torch.linspace(-4, 4, 401)
    n = len(tuner.generators)
    columns = min(n, 4)
    rows = -(-n // columns)
    size = (2.3 * columns, 2.1 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[n:]:
        axis.set_visible(False)
    for l, (axis, generator) in enumerate(zip(axes.flat, tuner.generators)):
        histogram = axis.twinx()
        pooled = generator.pool(*inputs[l]).cpu().flatten().numpy()
        histogram.hist(pooled, bins=60, range=(-4, 4), color=GREY, alpha=0.25)
        histogram.set_yticks([])
        histogram.spines[:].set_visible(False)
        axis.fill([], [], color=GREY, alpha=0.25, label="its inputs")
        learned = isinstance(generator.act, Rational)
        if learned:
            axis.plot(x, F.gelu(x), "--", color=GREY, linewidth=1, label="GELU, its start")
        y = generator.act(x.to(batch.idx.device)).cpu()
        axis.plot(x, y, color=COLORS[0], label="learned" if learned else "fixed")
        axis.set_title(f"layer {l + 1}", fontsize=9)
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(max(low, -6), min(high, 12))  # of all layers: the axis is shared
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=3, bbox_to_anchor=(0.5, -0.12))
    save(figure, path)


@torch.no_grad()
def soft_share(model: Decoder, tuner: Tuner, batch: Batch) -> Tensor:
    """The share of the soft tokens in what a head finds, where a response is predicted: (L, H), 0 to 1.

    |soft| / (|soft| + |tokens|), the lengths of the two sums of weighted values.
    """
    inputs = []
    hooks = [block.register_forward_pre_hook(lambda _, args: inputs.append(args)) for block in model.h]
    model.hidden(batch.idx, batch.instr, tuner)
    for hook in hooks:
        hook.remove()
    shares = []
    for block, args in zip(model.h, inputs):
        soft, tokens = (values.norm(dim=-1) for values in attention_results(block, *args))  # (B, H, T)
        shares.append((soft / (soft + tokens)).transpose(1, 2)[batch.targets >= 0].mean(0).cpu())
    return torch.stack(shares)


def attention_results(
    block: Block, x: Tensor, rope: tuple | None, mask: Tensor | None, joined: Soft | None, separate: Soft | None
) -> tuple[Tensor, Tensor]:
    """What each head finds in soft tokens, and in tokens, for the arguments of Block.forward: two of (B, H, T, D)."""
    q, k, v = block.attn.qkv(block.ln_1(x), rope)
    T = x.shape[1]
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
    keys, values = (k, v) if joined is None else joined.join(k, v)  # the tokens' come first
    weights = attention_weights(q, keys, mask)
    tokens = weighted_values(weights[..., :T], values[:, :, :T])
    soft = weighted_values(weights[..., T:], values[:, :, T:])
    if separate is not None:
        keep = separate.kept()[:, None, None]  # (B, 1, 1, P)
        soft = soft + weighted_values(attention_weights(q, separate.k, keep), separate.v)
    return soft, tokens


def attention_weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) of q (B, H, T, D) and k (B, G, S, D) where mask (.., T, S) is True: (B, H, T, S)."""
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.float() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1)


def weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """Sums of v (B, G, S, D) with weights (B, H, T, S): (B, H, T, D)."""
    return weights @ v.float().repeat_interleave(weights.shape[1] // v.shape[1], 1)


def plot_attention(args: Namespace, path: str):
    """The share of the soft tokens in what attention finds, by layer and head."""
    plt = pyplot()
    share = soft_share(*open_with_batch(args.runs[0])).numpy()
    L, H = share.shape
    figure, axis = plt.subplots(figsize=(1.2 + 0.55 * H, 0.8 + 0.42 * L))
    image = axis.imshow(share, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for l in range(L):
        for h in range(H):
            color = "w" if share[l, h] > 0.5 else "#222222"
            axis.text(h, l, f"{share[l, h]:.0%}", ha="center", va="center", color=color)
    axis.set(xlabel="head", ylabel="layer", xticks=range(H), yticks=range(L))
    axis.set(xticklabels=range(1, H + 1), yticklabels=range(1, L + 1))
    figure.colorbar(image).set_label("found in soft tokens")
    save(figure, path)


# -- Numbers -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def inside_table(model: Decoder, tuner: IAPT | PaperIAPT, batch: Batch) -> Iterator[str]:
    """Lines of a Markdown table of what happens in each layer, over the rows of a batch.

    length of H      mean length of the instruction's hidden states
    words read       e^entropy of the pooling of each soft token: 1 is one word, n are n words alike
    Q, common        root mean square of the average of A^T Z over the rows
    Q, own           root mean square of the deviation from that
    into R           1 % and 99 % quantiles of the activation's inputs
    learned          mean length of a learned value
    generated        mean length of the average of what the generator writes
    by instruction   mean length of the deviation from that
    attention        share of the soft tokens in what attention finds, over heads
    """
    names = ["layer", "length of H", "words read", "Q, common", "Q, own", "into R", "learned", "generated",
             "by instruction", "attention"]  # fmt: skip
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    share = soft_share(model, tuner, batch)
    inputs = generator_inputs(model, tuner, batch.idx, batch.instr)
    for l, (generator, (x, here)) in enumerate(zip(tuner.generators, inputs)):
        z, weights = generator.read(x, here)
        q, pooled, s = weights @ z, generator.pool(x, here), generator(x, here)
        words = torch.special.entr(weights).sum(-1).exp().mean(0)
        cells = [
            f"{l + 1}",
            f"{x[here].norm(dim=-1).mean():.1f}",
            ", ".join(f"{n:.1f}" for n in words.tolist()),
            f"{q.mean(0).pow(2).mean().sqrt():.2f}",
            f"{(q - q.mean(0)).pow(2).mean().sqrt():.2f}",
            f"{pooled.quantile(0.01):.1f} to {pooled.quantile(0.99):.1f}",
            f"{tuner.values[l].norm(dim=-1).mean():.1f}" if isinstance(tuner, IAPT) else "",
            f"{s.mean(0).norm(dim=-1).mean():.1f}",
            f"{(s - s.mean(0)).norm(dim=-1).mean():.1f}",
            f"{share[l].min():.0%} to {share[l].max():.0%}",
        ]
        yield f"| {' | '.join(cells)} |"


def print_inside(args: Namespace):
    """Print that table for a run."""
    print("\n".join(inside_table(*open_with_batch(args.runs[0]))))


# -- Curves ------------------------------------------------------------------------------------------------------------


def plot_curves(args: Namespace, path: str):
    """Validation loss by step, of several runs."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.4))
    names = {folder: os.path.basename(os.path.normpath(folder)) for folder in args.runs}
    if len(set(names.values())) < len(args.runs):
        names = {folder: folder for folder in args.runs}
    for folder in args.runs:
        run_folder = RunFolder(folder)
        if not os.path.exists(run_folder.log):
            raise FileNotFoundError(f"no {run_folder.log}: curves are of folders of runs")
        try:
            points = [(row["step"], row["val"]) for row in run_folder.read_log()]
        except (KeyError, TypeError):
            raise ValueError(f"{run_folder.log} is not the log of a run") from None
        axis.plot(*zip(*points), label=names[folder])
    axis.set(xlabel="step", ylabel="validation loss (nats per token)", yscale="log")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


# -- What reading is worth, by the number of tasks ---------------------------------------------------------------------


def read_results(path: str, command: str):
    """The content of a JSON file that `command` writes."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no {path}. Run: {command}")
    return read_json(path)


def plot_tasks(args: Namespace, path: str):
    """The loss of constants minus that of IAPT: against the number of tasks, and at 64 tasks against steps.

    Dashed: constants minus the form that is told the task, where that was trained.
    """
    plt = pyplot()
    cells = read_results(args.runs[0], "python -m experiments.tasks")
    try:
        steps = min(cell["steps"] for cell in cells)
        models = list(dict.fromkeys(cell["model"] for cell in cells))
        longest = {c["model"]: c for c in sorted(cells, key=lambda c: c["steps"]) if c["tasks"] == 64}
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{args.runs[0]} is not a tasks.json of experiments.tasks") from None
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3), sharey=True)
    for model, color in zip(models, COLORS):
        own = sorted((c for c in cells if (c["model"], c["steps"]) == (model, steps)), key=lambda c: c["tasks"])
        for c in own:
            mean, low, high = c["constants minus iapt"]
            left.errorbar(c["tasks"], mean, [[mean - low], [high - mean]], marker="o", capsize=3, color=color)
        left.plot([c["tasks"] for c in own], [c["constants minus iapt"][0] for c in own], color=color, label=model)
        if told := [(c["tasks"], c["constants minus told"][0]) for c in own if "constants minus told" in c]:
            left.plot(*zip(*told), color=color, linestyle="--", marker="x")
        if model in longest:
            iapt, constants = (mean_curve(longest[model]["validation"][name]) for name in ("iapt", "constants"))
            right.plot(list(iapt), [constants[step] - iapt[step] for step in iapt], marker="o", color=color)
    for axis in (left, right):
        axis.axhline(0, color=GREY, linewidth=0.8)
    left.set(xscale="log", xlabel=f"tasks ({steps} steps, test rows)", ylabel="nats below constants")
    left.set_xticks([4, 16, 64], ["4", "16", "64"])
    left.minorticks_off()
    if any("constants minus told" in c for c in cells):
        left.plot([], [], color=GREY, linestyle="--", marker="x", label="told the task")
    left.legend(title="a model", loc="upper left")
    right.set(xlabel="steps (64 tasks, validation rows)")
    save(figure, path)


def mean_curve(curves: list[list[list[float]]]) -> dict[int, float]:
    """{step: loss}, the mean over curves of [step, loss], as far as all of them go."""
    return {points[0][0]: sum(loss for _, loss in points) / len(points) for points in zip(*curves)}


# -- The cost of serving -----------------------------------------------------------------------------------------------

COST = "decode, of the frozen model's"  # a column of serve.json: median, lower and upper quartile


def read_serve(path: str) -> tuple[str, list[dict]]:
    """The one column that varies in a serve.json (tenants, prompt or new), and its rows."""
    try:
        rows = [row for row in read_results(path, "python -m experiments.bench serve")["rows"] if row[COST]]
        varying = [x for x in ("shape", "tenants", "prompt", "new") if len({row[x] for row in rows}) > 1]
    except (KeyError, TypeError):
        raise ValueError(f"{path} is not a serve.json of experiments.bench") from None
    if len(varying) > 1 or "shape" in varying:
        raise ValueError(f"{path} varies {' and '.join(varying)}: a plot is by tenants, prompt or new alone")
    return (varying or ["tenants"])[0], rows


def plot_serve(args: Namespace, path: str):
    """Time to decode, of the frozen model's, by tenants, prompt length or new tokens: a panel for each serve.json."""
    plt = pyplot()
    n = len(args.runs)
    figure, axes = plt.subplots(1, n, figsize=(max(5.5, 3 * n), 2.8), sharey=True, squeeze=False)
    for axis, file in zip(axes[0], args.runs):
        column, rows = read_serve(file)
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            x = [row[column] for row in own]
            middle, low, high = zip(*(row[COST] for row in own))
            (line,) = axis.plot(x, middle, "o-", markersize=3, label=method)
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set(xlabel={"prompt": "tokens of a prompt", "new": "new tokens"}.get(column, "tenants in the batch"))
        axis.xaxis.set_major_formatter("{x:.0f}")
    axes[0, 0].set_ylabel("decoding, of the frozen model's time")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=5, bbox_to_anchor=(0.5, -0.16))
    save(figure, path)


# -- The command line --------------------------------------------------------------------------------------------------

PLOTS = {
    "reads": plot_reads,
    "activations": plot_activations,
    "attention": plot_attention,
    "curves": plot_curves,
    "serve": plot_serve,
    "tasks": plot_tasks,
}
ARGUMENTS = {  # how many at least and at most, and what they are
    "reads": (2, 2, "a run and an instruction"),
    "curves": (1, len(COLORS), f"1 to {len(COLORS)} runs"),
    "serve": (1, 3, "1 to 3 files"),
    "tasks": (1, 1, "one file"),
}


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("plot", choices=[*PLOTS, "inside"], help="what to draw, or print")
    add("runs", nargs="+", metavar="run",
        help="folder of a run; curves: several; reads: also an instruction; serve, tasks: .json files")  # fmt: skip
    add("--input", default="", help="for reads: what the instruction is about")
    add("--layers", type=at_least(1), nargs="+", help="for reads: which layers (default: all)")
    add("--out", help="the file (default: out/PLOT.svg)")
    args = parser.parse_args(argv)
    fewest, most, wanted = ARGUMENTS.get(args.plot, (1, 1, "one run"))
    if not fewest <= len(args.runs) <= most:
        parser.error(f"{args.plot} takes {wanted}, got {len(args.runs)}")
    if (args.input or args.layers) and args.plot != "reads":
        parser.error("--input and --layers are for reads")
    if args.plot == "inside":
        if args.out:
            parser.error("inside prints a table, and takes no --out")
        return print_inside(args)
    path = args.out or os.path.join("out", f"{args.plot}.svg")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    PLOTS[args.plot](args, path)
    print(f"saved {path}")


if __name__ == "__main__":
    run(main)
