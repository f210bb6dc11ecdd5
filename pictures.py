"""Pictures of what was learned, as SVG files for light and dark pages.

    python pictures.py reads out/iapt "what is the capital of peru ?"   # what each soft token reads of an instruction
    python pictures.py activations out/iapt                             # the activation of each layer, beside GELU
    python pictures.py attention out/iapt                               # how much of what attention finds is theirs
    python pictures.py inside out/iapt                                  # a table of lengths, layer by layer
    python pictures.py curves out/iapt out/lora out/ptuning2            # validation loss, run beside run
    python pictures.py serve out/bench/serve.json                       # what tenants cost, from bench.py serve

All but `reads` and `inside` want matplotlib.  Where rows are needed, they are 64 of those the run was validated on.
"""

import html
import json
import os
from argparse import Namespace
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import load_tuner
from cli import Parser, UsageError, run
from data import Tokenizer, collate, encode, read_json, replacing, template
from iapt import IAPT, Rational, Tuner
from model import Decoder, slot_mask
from sample import entering, open_checkpoints, reads
from train import open_data, pick_device, spread

GREY, COLORS = "#8b8b8b", ("#4c8dd0", "#e8833a", "#4fa84f", "#d9534f", "#9b6fc0", "#a0785a", "#d176b5", "#7a9a01")


def plots():
    """matplotlib.pyplot, drawing what can be read on white and on black."""
    try:
        import matplotlib
    except ImportError:
        raise ModuleNotFoundError("this picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    of_text = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
    plt.rcParams.update({name: GREY for name in of_text} | {
        "axes.prop_cycle": matplotlib.cycler(color=COLORS), "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "savefig.transparent": True, "svg.hashsalt": "iapt", "font.size": 9,
    })  # fmt: skip
    return plt


def save(figure: object, path: str):
    """Write a figure of matplotlib to an SVG file, the same bytes each time."""
    with replacing(path, "wb") as f:
        figure.savefig(f, format="svg", bbox_inches="tight", metadata={"Date": None})


# -- What each soft token reads ----------------------------------------------------------------------------------------

STYLE = """<style>
text { font: 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #24292f }
.name { fill: #6e7781 }
rect { fill: #4c8dd0 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .name { fill: #8b949e } }
</style>"""


def reads_svg(words: list[str], weights: Tensor) -> Iterator[str]:
    """Lines of an SVG: for each soft token the words of the instruction, shaded by weights (L, P, T)."""
    L, P, _ = weights.shape
    width, line, left = 7.9, 21, 158  # of a character; of a line; of what names it
    size = f"{left + width * sum(map(len, words)) + 8:.0f} {line * P * L + 8 * L:.0f}"
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{size.split()[0]}">{STYLE}'
    for l in range(L):
        for p in range(P):
            x, y = left, line * (l * P + p) + 8 * l + 15
            yield f'<text class="name" x="0" y="{y}">layer {l + 1:2}, token {p + 1:2}</text>'
            for word, w in zip(words, weights[l, p].tolist()):
                wide, shown = width * len(word), word.lstrip()
                yield f'<rect x="{x:.1f}" y="{y - 14}" width="{wide:.1f}" height="19" rx="3" opacity="{w:.2f}"/>'
                at, wide_shown = x + wide - width * len(shown), width * len(shown)
                yield f'<text x="{at:.1f}" y="{y}" textLength="{wide_shown:.1f}">{html.escape(shown)}</text>'
                x += wide
    yield "</svg>"


def picture_reads(args: Namespace, path: str):
    """The instruction, once for each soft token, its words shaded by their weight in the pooling."""
    model, tokenizer, tuner = opened(args.runs[0])
    row = {"instruction": args.runs[1], "input": args.input}
    words, weights = reads(model, tokenizer, tuner, tokenizer.prompt(template(row)))
    with replacing(path) as f:
        f.write("\n".join(reads_svg(words, weights)) + "\n")


# -- Activations, attention --------------------------------------------------------------------------------------------


def opened(path: str) -> tuple[Decoder, Tokenizer, IAPT]:
    """(model, tokenizer, tuner) of a checkpoint of IAPT, attached."""
    device, dtype, _ = pick_device()
    model, tokenizer, (tuner,) = open_checkpoints([path], device=device, dtype=dtype)
    if not isinstance(tuner, IAPT):
        raise UsageError(f"{path} is no checkpoint of iapt: only that has generators to look into")
    tuner.attach(model)
    return model, tokenizer, tuner


def batch(path: str, model: Decoder, tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """64 rows of the data that a checkpoint was validated on: idx, targets, instr, each (B, T)."""
    meta = load_tuner(path)["meta"]
    try:
        rows = spread(open_data(meta["data"], skip_bad=True)["val"], 64)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} was trained on {meta['data']}, and that is no longer there") from None
    size = meta["block_size"]
    return collate(encode(rows, tokenizer, size, truncate=True), size, model.wte.weight.device)


@torch.no_grad()
def picture_activations(args: Namespace, path: str):
    """R of each layer beside GELU, where it started, and where its inputs lie."""
    plt = plots()
    model, tokenizer, tuner = opened(args.runs[0])
    idx, _, instr = batch(args.runs[0], model, tokenizer)
    given = entering(model, tuner, idx, instr)
    seen = [g.pooled(*args).cpu().flatten() for g, args in zip(tuner.generators, given)]
    x = torch.linspace(-4, 4, 401)
    n = len(tuner.generators)
    columns = min(n, 4)
    shape = -(-n // columns), columns
    figure, axes = plt.subplots(
        *shape, figsize=(2.3 * columns, 2.1 * shape[0]), sharex=True, sharey=True, squeeze=False
    )
    for l, axis in enumerate(axes.flat):
        if l >= n:
            axis.set_visible(False)
            continue
        inputs = axis.twinx()
        inputs.hist(seen[l].numpy(), bins=60, range=(-4, 4), color=GREY, alpha=0.25)
        axis.fill([], [], color=GREY, alpha=0.25, label="its inputs")
        inputs.set_yticks([])
        inputs.spines[:].set_visible(False)
        act = tuner.generators[l].act
        learned = isinstance(act, Rational)
        if learned:
            axis.plot(x, F.gelu(x), "--", color=GREY, linewidth=1, label="GELU, its start")
        axis.plot(x, act(x.to(idx.device)).cpu(), color=COLORS[0], label="learned" if learned else "fixed")
        axis.set_title(f"layer {l + 1}", fontsize=9)
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(max(low, -6), min(high, 12))  # of all: the axis is shared, and what lies beyond is rare
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=3, bbox_to_anchor=(0.5, -0.12))
    save(figure, path)


@torch.no_grad()
def soft_share(model: Decoder, tuner: Tuner, idx: Tensor, targets: Tensor, instr: Tensor) -> Tensor:
    """How much of what a head finds comes from soft tokens, where a response is predicted: (L, H), 0 to 1.

    |soft| / (|soft| + |tokens|), the lengths of the sums of weighted values that it finds there and here.
    """
    predicts, shares = targets >= 0, []

    def looks(q, k, mask):
        """Attention weights (B, H, T, S)."""
        k = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = q.float() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)

    def found(weights, v):
        return weights @ v.float().repeat_interleave(weights.shape[1] // v.shape[1], 1)

    def watched(attn):
        def mix(q, k, v, mask=None, apart=None):
            T, P = q.shape[2], k.shape[2] - q.shape[2]
            weights = looks(q, k, slot_mask(T, P + T, None, q.device) if mask is None else mask)
            soft, tokens = found(weights[..., :P], v[:, :, :P]), found(weights[..., P:], v[:, :, P:])
            if apart is not None:
                keep = apart[2] if apart[2] is None else apart[2][:, None, None]
                soft = soft + found(looks(q, apart[0], keep), apart[1])
            soft, tokens = soft.norm(dim=-1), tokens.norm(dim=-1)  # (B, H, T)
            shares.append((soft / (soft + tokens)).transpose(1, 2)[predicts].mean(0).cpu())
            return type(attn).mix(attn, q, k, v, mask, apart)

        return mix

    for block in model.h:
        block.attn.mix = watched(block.attn)
    try:
        model.hidden(idx, instr, tuner)
    finally:
        for block in model.h:
            del block.attn.mix
    return torch.stack(shares)


def picture_attention(args: Namespace, path: str):
    """How much of what attention finds comes from soft tokens, by layer and head."""
    plt = plots()
    model, tokenizer, tuner = opened(args.runs[0])
    share = soft_share(model, tuner, *batch(args.runs[0], model, tokenizer)).numpy()
    L, H = share.shape
    figure, axis = plt.subplots(figsize=(1.2 + 0.55 * H, 0.8 + 0.42 * L))
    shown = axis.imshow(share, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for l in range(L):
        for h in range(H):
            color = "w" if share[l, h] > 0.5 else "#222222"
            axis.text(h, l, f"{share[l, h]:.0%}", ha="center", va="center", color=color)
    axis.set(xlabel="head", ylabel="layer", xticks=range(H), yticks=range(L))
    axis.set(xticklabels=range(1, H + 1), yticklabels=range(1, L + 1))
    figure.colorbar(shown).set_label("found in soft tokens")
    save(figure, path)


# -- Numbers -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def inside(model: Decoder, tuner: IAPT, idx: Tensor, targets: Tensor, instr: Tensor) -> Iterator[str]:
    """A table of what happens in each layer, over the rows of a batch."""
    names = ["layer", "length of H", "words read", "Q, common", "Q, own", "into R", "constants", "generated",
             "by instruction", "attention"]  # fmt: skip
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    share = soft_share(model, tuner, idx, targets, instr)
    for l, (g, (x, here)) in enumerate(zip(tuner.generators, entering(model, tuner, idx, instr))):
        z, weights = g.reads(x, here)
        read = weights @ z
        common, rest = read.mean(0), read - read.mean(0)
        words = torch.special.entr(weights).sum(-1).exp().mean(0)  # e^entropy: 1 is one word, n are n words alike
        q, s = g.pooled(x, here), g(x, here)
        middle, own = s.mean(0), s - s.mean(0)
        cells = [
            f"{l + 1}", f"{x[here].norm(dim=-1).mean():.1f}", ", ".join(f"{n:.1f}" for n in words.tolist()),
            f"{common.pow(2).mean().sqrt():.2f}", f"{rest.pow(2).mean().sqrt():.2f}",
            f"{q.quantile(0.01):.1f} to {q.quantile(0.99):.1f}",
            f"{tuner.static[l].norm(dim=-1).mean():.1f}" if len(tuner.static) else "",
            f"{middle.norm(dim=-1).mean():.1f}", f"{own.norm(dim=-1).mean():.1f}",
            f"{share[l].min():.0%} to {share[l].max():.0%}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def print_inside(args: Namespace):
    """Print that table for a run."""
    model, tokenizer, tuner = opened(args.runs[0])
    print("\n".join(inside(model, tuner, *batch(args.runs[0], model, tokenizer))))


# -- Curves ------------------------------------------------------------------------------------------------------------


def picture_curves(args: Namespace, path: str):
    """Validation loss by step, of several runs."""
    plt = plots()
    figure, axis = plt.subplots(figsize=(6, 3.4))
    names = {folder: os.path.basename(os.path.normpath(folder)) for folder in args.runs}
    if len(set(names.values())) < len(args.runs):
        names = {folder: folder for folder in args.runs}
    for folder in args.runs:
        log = os.path.join(folder, "log.jsonl")
        if not os.path.exists(log):
            raise FileNotFoundError(f"no {log}: curves are of folders of runs")
        with open(log, encoding="utf-8") as f:
            lines = f.read().splitlines()
        try:
            points = [(row["step"], row["val"]) for row in map(json.loads, lines)]
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{log} is no log of a run, or was cut off ({e})") from None
        axis.plot(*zip(*points), label=names[folder])
    axis.set(xlabel="step", ylabel="validation loss (nats per token)", yscale="log")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


# -- What serving costs ------------------------------------------------------------------------------------------------


def picture_serve(args: Namespace, path: str):
    """Time to decode, of the frozen model's, by what varies in a serve.json: tenants, prompt length or new tokens."""
    plt = plots()
    figure, axes = plt.subplots(
        1, len(args.runs), figsize=(max(5.5, 3 * len(args.runs)), 2.8), sharey=True, squeeze=False
    )
    for axis, file in zip(axes[0], args.runs):
        try:
            rows = [row for row in read_json(file)["rows"] if row["decode, of the frozen model's"]]
            varied = [x for x in ("shape", "tenants", "prompt", "new") if len({row[x] for row in rows}) > 1] or [
                "tenants"
            ]
        except (KeyError, TypeError):
            raise ValueError(f"{file} is no serve.json of bench.py") from None
        if len(varied) > 1 or varied == ["shape"]:
            raise ValueError(f"{file} varies {' and '.join(varied)}: a plot is by tenants, prompt or new alone")
        x = varied[0]
        for method in dict.fromkeys(row["method"] for row in rows):
            some = [row for row in rows if row["method"] == method]
            middle, low, high = zip(*(row["decode, of the frozen model's"] for row in some))
            (line,) = axis.plot([row[x] for row in some], middle, "o-", markersize=3, label=method)
            axis.fill_between([row[x] for row in some], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set(xlabel={"prompt": "tokens of a prompt", "new": "new tokens"}.get(x, "tenants in the batch"))
        axis.xaxis.set_major_formatter("{x:.0f}")
    axes[0, 0].set_ylabel("decoding, of the frozen model's time")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=5, bbox_to_anchor=(0.5, -0.16))
    save(figure, path)


PICTURES = {
    "reads": picture_reads, "activations": picture_activations, "attention": picture_attention,
    "curves": picture_curves, "serve": picture_serve,
}  # fmt: skip


def main(argv: list[str] | None = None):
    """The command."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("picture", choices=[*PICTURES, "inside"], help="what to draw, or print")
    add(
        "runs",
        nargs="+",
        metavar="run",
        help="folder of a run, or several for curves; for reads, then an instruction; for serve, serve.json",
    )
    add("--input", default="", help="for reads: what the instruction is about")
    add("--out", help="the file (default: out/PICTURE.svg)")
    args = parser.parse_args(argv)
    wanted = {"reads": (2, 2), "curves": (1, len(COLORS)), "serve": (1, 3)}.get(args.picture, (1, 1))
    if not wanted[0] <= len(args.runs) <= wanted[1]:
        parser.error(
            f"{args.picture} takes {'a run and an instruction' if wanted == (2, 2) else f'up to {wanted[1]} runs'}"
        )
    if args.input and args.picture != "reads":
        parser.error("--input is for reads")
    if args.picture == "inside":
        if args.out:
            parser.error("inside prints a table, and takes no --out")
        return print_inside(args)
    path = args.out or os.path.join("out", f"{args.picture}.svg")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    PICTURES[args.picture](args, path)
    print(f"saved {path}")


if __name__ == "__main__":
    run(main)
