"""What is left of an instruction that is hidden: rows to measure it on, what needs no training, and what is written.

    python -m data.prepare alpaca --skip-bad
    python -m experiments.hidden rows --data data/alpaca --out data/alpaca-input
    python -m experiments.hidden rows --data data/p3 --examples 3 --out data/p3-examples    # long instructions
    python -m experiments.hidden untrained --init HuggingFaceTB/SmolLM2-135M-Instruct --data data/alpaca-input
    python -m experiments.compare hidden --methods summary,summary-12,constants,iapt
    python -m experiments.hidden shares out/untrained.npz out/compare/hidden/scores.npz
    python -m experiments.hidden texts out/summary out/summary-12
    python -m experiments.hidden answers --data prompts.jsonl --out data/answers    # for rows without outputs

`rows` keeps the short rows that have an input.  The instructions of val and test are in no training row: data.prepare
sees to it.  With --examples, a row's instruction is a few other rows of its task, with their answers, and what the row
asks is its input.  `untrained` scores the frozen model: with the instruction in its context, without, with the
instruction cut to its first words, and with averages of its keys and values, by their number.  `texts` has runs write
greedy answers: how many are, word for word, those of the model that sees the instruction?  `answers` has that model
write the outputs of rows, which need none of their own: so --distill learns from prompts alone.
"""

import os
import random
from argparse import Namespace

import numpy as np
import torch
from torch import Tensor

import sample
import train
from data import load_splits
from data.files import write_rows
from data.scores import BLIND, Session, score_examples
from data.template import make_template
from experiments.bench import attached, machine, random_tuner
from experiments.report import Scores, markdown
from model import NO_TUNER, Block, Config, Soft, Tuner, rotary, rotate
from plumbing.cli import Parser, add_device_options, at_least, pick_device, run
from plumbing.files import replacing, write_json
from sample import answer, open_model, open_runs


def choose(rows: list[dict], longest: int) -> list[dict]:
    """Rows with an input, of at most `longest` characters."""
    return [row for row in rows if row.get("input", "").strip() and size(row) <= longest]


def size(row: dict) -> int:
    """Characters of what is read and learned."""
    return sum(len(row.get(key, "")) for key in ("instruction", "input", "output"))


def worked_examples(splits: dict[str, list[dict]], n: int, longest: int) -> dict[str, list[dict]]:
    """Rows whose instruction is n other rows of their task with their answers, of at most `longest` characters each.

    The others are training rows; of a task that training lacks, they are of the same split.
    """
    rng, written = random.Random(0), {}
    short = {name: [row for row in rows if size(row) <= longest] for name, rows in splits.items()}
    ask = lambda row: "\n".join(filter(None, (row["instruction"], row.get("input"))))
    for name, rows in short.items():
        written[name] = []
        for row in rows:
            others = [other for other in short["train"] if other["task"] == row["task"] and other is not row]
            others = others or [other for other in rows if other["task"] == row["task"] and other is not row]
            if len(others) >= n:
                shown = [f"{ask(other)}\n{other['output'].strip()}" for other in rng.sample(others, n)]
                about = {"input": ask(row), "output": row["output"], "task": row["task"]}
                written[name].append({"instruction": "\n\n".join(shown), **about})
    return written


def write(args: Namespace):
    """Choose rows of a data set."""
    splits = load_splits(args.data)
    if args.examples:
        if not all(row.get("task") for rows in splits.values() for row in rows):
            raise ValueError(f"--examples: the rows of {args.data} do not say their task, as those of p3 do")
        splits = worked_examples(splits, args.examples, args.longest)
    else:
        splits = {name: choose(rows, args.longest) for name, rows in splits.items()}
    os.makedirs(args.out, exist_ok=True)
    for name, rows in splits.items():
        write_rows(os.path.join(args.out, f"{name}.jsonl"), rows)
        print(f"{name}: {len(rows):,} rows")


def of_split(splits: dict[str, list], args: Namespace) -> list:
    """The split that --split names.  Raises ValueError if --data has no such split."""
    if args.split not in splits:
        raise ValueError(f"{args.data} has no {args.split}: --split can be {', '.join(splits)}")
    return splits[args.split]


# -- Without training --------------------------------------------------------------------------------------------------


class Cut(Tuner):
    """The instruction's first words: the keys and values of P of them, behind the one that stays anyway."""

    act = "hidden"

    def __init__(self, config: Config, P: int):
        super().__init__()
        self.config, self.P = config, P

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> Soft:
        words, place = block.soft_kv(x[:, 1 : self.P + 1]), torch.arange(x.shape[1], device=x.device)[1 : self.P + 1]
        rope = rotary(self.config, place) if self.config.arch == "llama" and block.attn.turns else None
        return Soft(rotate(words.k, rope), words.v, instr[:, None, None, 1 : self.P + 1])


def untrained(args: Namespace):
    """Score what needs no training on the rows of a split; leaves scores as `compare` does."""
    session = open_session(args)
    rivals = {"frozen": None, "blind": BLIND}
    for P in args.P:
        rivals[f"cut-{P}"] = Cut(session.model.config, P)
        rivals[f"means-{P}"] = random_tuner("summary", session.model, [f"P={P}", "m=1"], "hidden")
    examples, arrays = of_split(session.examples, args), {}
    tokens = np.array([len(e.response) for e in examples], np.int32)
    for label, tuner in rivals.items():
        scores = score_examples(session.model, examples, tuner)
        nats, kl = scores.nats.float().numpy(), scores.kl.float().numpy()
        key = f"{label}/0/{args.split}"
        arrays |= {f"{key}/nats": nats, f"{key}/kl": kl, f"{key}/tokens": tokens}
        arrays[f"{key}/wrong"] = scores.wrong.numpy().astype(np.int32)
        print(f"{label:10}  {kl.sum() / tokens.sum():.4f} divergence  {nats.sum() / tokens.sum():.4f} nats/token")
    with replacing(args.out, "wb") as f:
        np.savez_compressed(f, **arrays)
    print(f"saved {args.out}; {machine()}")


def open_session(args: Namespace) -> Session:
    device, dtype, _ = pick_device(args.device, args.dtype)
    options = ["--init", args.init, "--data", args.data, "--hide-instruction", "--val-rows", "0", "--test-rows", "0"]
    return train.open_session(train.parse(options), device, dtype)


# -- How much of it is left --------------------------------------------------------------------------------------------


def shares(args: Namespace):
    """How much of the divergence of the blind model each method takes away: 1 - divergence / blind divergence."""
    rows = []
    for name, (kl, nats, mean, low, high) in gaps(args.files, args.split).items():
        rows.append([name, f"{kl:.3f}", f"{mean:.1%} ({low:.1%} to {high:.1%})", f"{nats:.3f}"])
    print("\n".join(markdown(["method", "divergence", "taken away", "nats per token"], rows)))


def gaps(paths: list[str], split: str) -> dict[str, tuple[float, ...]]:
    """{method: (divergence, nats per token, share of the blind divergence that is gone, its 95 % interval)}.

    The files hold scores of the same rows, one of them those of "blind".  The bootstrap draws rows and seeds.
    """
    files = [Scores(path) for path in paths]
    runs = {name: scores for scores in files for name in scores.seeds}
    if "blind" not in runs or not runs["blind"].get("blind", split, "kl"):
        raise ValueError(f"{', '.join(paths)}: no scores of the blind model on {split}, which `untrained` writes")
    blind = runs["blind"].get("blind", split, "kl")[0]
    rng, rows = np.random.default_rng(0), {}
    weights = rng.multinomial(len(blind), np.full(len(blind), 1 / len(blind)), size=2000)
    for name, scores in runs.items():
        kl = np.stack(scores.get(name, split, "kl") or [np.zeros_like(blind)])
        if kl.shape[1] != len(blind):
            raise ValueError(f"{name} was scored on {kl.shape[1]} rows, the blind model on {len(blind)}")
        drawn = kl[rng.integers(len(kl), size=(2000, len(kl)))].mean(1)
        share, mean = 1 - (drawn * weights).sum(1) / (weights @ blind), kl.mean(0).sum()
        nats, tokens = np.mean(scores.get(name, split), 0).sum(), scores.tokens(split).sum()
        rows[name] = mean / tokens, nats / tokens, 1 - mean / blind.sum(), *np.quantile(share, (0.025, 0.975))
    return rows


# -- What is written ---------------------------------------------------------------------------------------------------


def texts(args: Namespace):
    """Greedy answers of runs beside those of the frozen model that sees the instruction, and of the blind one."""
    device, dtype, _ = pick_device(args.device, args.dtype)
    model, tokenizer, template, tuners = open_runs(args.runs, args.init, False, device, dtype)
    rows = of_split(load_splits(args.data), args)
    rivals = {"frozen": None, "blind": BLIND, **dict(zip(args.runs, tuners, strict=True))}
    written = {}
    for label, tuner in rivals.items():
        with attached(tuner or NO_TUNER, model):
            written[label] = answer(model, tokenizer, rows, tuner, args.new, template=template, batch_size=args.batch)
        pairs = list(zip(written[label], written["frozen"], strict=True))
        same = np.mean([ours == theirs for ours, theirs in pairs])
        rouge = np.mean([rouge_l(ours.split(), theirs.split()) for ours, theirs in pairs])
        right = np.mean([ours == row["output"].strip() for ours, row in zip(written[label], rows)])
        print(f"{label:30}  the same {same:6.1%}  ROUGE-L {rouge:.3f}  the wanted answer {right:6.1%}")
    write_json(args.out, {"rows": rows, "written": written, "machine": machine()}, indent=1)
    print(f"saved {args.out}; {machine()}")


def rouge_l(a: list[str], b: list[str]) -> float:
    """The F measure of the longest common subsequence of two lists of words (Lin, 2004); 1 if both are empty."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b)) if a or b else 1.0


# -- The teacher's own answers -----------------------------------------------------------------------------------------


def answers(args: Namespace):
    """Rows with what the frozen model, which sees the instruction, answers; their own outputs, if any, are left out."""
    device, dtype, _ = pick_device(args.device, args.dtype)
    splits = read_prompts(args.data)
    model, tokenizer = open_model(args.init, device, dtype)
    template = make_template(args.template, tokenizer)
    os.makedirs(args.out, exist_ok=True)
    for name, rows in splits.items():
        found = sample.answers(model, tokenizer, rows, None, args.new, template=template, batch_size=args.batch)
        for row, one in zip(rows, found):
            row |= {"output": one.text, "end": not one.cut}
        kept = [row for row in rows if row["output"].strip()]
        write_rows(os.path.join(args.out, f"{name}.jsonl"), kept)
        print(f"{name}: {len(kept):,} rows, {len(rows) - len(kept):,} left out that the model has no answer to")


def read_prompts(data: str) -> dict[str, list[dict]]:
    """The splits of a folder, or of a file whose rows need no output."""
    prompt = lambda record, _: {"instruction": record.get("instruction"), "input": record.get("input"), "output": "?"}
    return load_splits(data, reshape=None if os.path.isdir(data) else prompt)


# -- The command line --------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__)
    commands, add = parser.add_subparsers(dest="command", required=True), {}
    for name, work in COMMANDS.items():
        command = commands.add_parser(name, help=work.__doc__)
        add[name] = command.add_argument
        if name in ("untrained", "texts", "answers"):
            add[name]("--data", default="data/alpaca-input", help="a folder of rows")
            add_device_options(command)
        if name in ("untrained", "texts", "shares"):
            add[name]("--split", default="test", help="which of its files")
    add["rows"]("--data", default="data/alpaca", help="a folder with train.jsonl, val.jsonl and test.jsonl")
    add["rows"]("--out", default="data/alpaca-input", help="folder to write to")
    add["rows"]("--longest", type=at_least(1), default=240, help="characters of instruction, input and output")
    add["rows"]("--examples", type=at_least(0), default=0, help="worked examples that are the instruction")
    add["untrained"]("--init", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the frozen model")
    add["untrained"]("--P", type=at_least(1), nargs="+", default=[1, 2, 4, 8, 12, 24], help="soft tokens, or words")
    add["untrained"]("--out", default="out/untrained.npz", help="file of the scores")
    add["shares"]("files", nargs="+", help="scores of `untrained` and of experiments.compare")
    add["texts"]("runs", nargs="+", help="folders of runs")
    add["texts"]("--init", help="the frozen model (default: the one of the first run)")
    add["texts"]("--new", type=at_least(1), default=32, help="most tokens to write")
    add["texts"]("--batch", type=at_least(1), default=32, help="rows of a batch")
    add["texts"]("--out", default="out/texts.json", help="file of the texts")
    add["answers"]("--init", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the frozen model")
    add["answers"]("--template", default="plain", choices=["plain", "chat"], help="layout of a row")
    add["answers"]("--new", type=at_least(1), default=40, help="most tokens to write")
    add["answers"]("--batch", type=at_least(1), default=32, help="rows of a batch")
    add["answers"]("--out", default="data/answers", help="folder to write to")
    args = parser.parse_args(argv)
    if args.command in ("untrained", "texts"):  # a folder that cannot be written fails before the work
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    COMMANDS[args.command](args)


COMMANDS = {"rows": write, "untrained": untrained, "shares": shares, "texts": texts, "answers": answers}


if __name__ == "__main__":
    run(main)
