"""Train a method on a frozen model, and show what it brought.

    python train.py                                        # IAPT on the shipped model and data: no download, no GPU
    python train.py --method lora -o r=4                   # another method, with its options
    python train.py --init FOLDER --data FOLDER_OR_FILE    # a Hugging Face folder of GPT-2 or LLaMA; your own rows
    python train.py --init scratch --data data/tiny/pretrain --method full     # pretrain a backbone

A run writes into --out: best.pt (what was trained, at the lowest validation loss), last.pt (to --resume), log.jsonl.

A map: `parse`, the command line; `open_model`; `evaluate`; `train`, the loop; `begin`, what a run needs;
`main`, which scores before and after.
"""

import json
import math
import os
import random
import shutil
import signal
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import hub
import parallel
import weights
from baselines import METHODS, build, complete, options
from checkpoint import FILES, claim, fill, keep_lines, load_tuner, replace_by_link, resumable, save_tuner
from cli import Parser, UsageError, run
from data import Batches, Tokenizer, collate, encode, label_words, load, shorten, split, template, world
from iapt import Tuner
from model import Config, Decoder, generate

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = os.path.join(HERE, "data", "tiny")
DEFINE = (
    "method", "init", "data", "seed", "steps", "lr", "batch_size", "weight_decay", "eval_every", "train_rows",
    "val_rows", "skip_bad", "truncate", "bilevel",
)  # fmt: skip  # options that make a run what it is: with others it cannot be resumed


def parse(argv: list[str] | None = None) -> Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add, or_ = parser.add_argument, "(default: %(default)s)"
    add("--init", default="tiny", help=f"the frozen model: tiny, scratch, a folder, gpt2, OWNER/NAME of the hub {or_}")
    add("--data", default="tiny", help=f"tiny, a folder with train.jsonl, or a .jsonl, .json or .csv file {or_}")
    add("--method", default="iapt", help=f"{', '.join(METHODS)} {or_}")
    add(
        "-o", nargs="+", default=[], action="extend", metavar="NAME=VALUE", help="the method's options (scratch: sizes)"
    )
    add("--out", help="folder of the run (default: out/METHOD)")
    add("--steps", type=int, default=1500, help=f"training steps {or_}")
    add("--lr", type=float, help="peak learning rate (default: the method's own)")
    add("--weight-decay", type=float, default=0.0, help=or_)
    add("--batch-size", type=int, default=32, help=f"rows a step {or_}")
    add("--grad-accum", type=int, default=1, help=f"compute a step's rows in so many parts: less memory {or_}")
    add("--block-size", type=int, help="longest row in tokens (default: what the model takes)")
    add("--skip-bad", action="store_true", help="leave out rows that cannot be used, and count them")
    add("--truncate", action="store_true", help="cut rows that are too long (default: refuse them)")
    add("--eval-every", type=int, default=100, help=f"steps between validations, each of which saves {or_}")
    add(
        "--save-every", type=int, default=0, help="save for --resume also after so many steps; 0: with validations only"
    )
    add("--train-rows", type=int, default=0, help=f"train on so many rows, drawn by --seed; 0: all {or_}")
    add("--val-rows", type=int, default=320, help=f"validate on at most so many rows; 0: all {or_}")
    add("--test-rows", type=int, default=0, help=f"test on at most so many rows of each test set; 0: all {or_}")
    add("--bilevel", action="store_true", help="the activations' coefficients learn on a fifth of the training rows,"
        " all else on the others, by turns")  # fmt: skip
    add("--device", default="auto", help=f"auto, cpu, cuda, cuda:1, ... {or_}")
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help=f"of the frozen weights {or_}")
    add("--seed", type=int, default=0, help=or_)
    add("--compile", action=BooleanOptionalAction, default=False, help="torch.compile the model")
    add("--shard", action="store_true", help="under torchrun: spread the frozen weights over the processes")
    add("--checkpoint", action="store_true", help="compute activations again for the backward pass: less memory")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--force", action="store_true", help="start again over the run in --out")
    args = parser.parse_args(argv)
    least = {"steps": 1, "batch_size": 1, "grad_accum": 1, "save_every": 0, "block_size": 2, "eval_every": 1,
             "train_rows": 0, "val_rows": 0, "test_rows": 0, "seed": 0, "weight_decay": 0}  # fmt: skip
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and not given >= value:  # nan is not
            parser.error(f"--{name.replace('_', '-')} must be at least {value}, got {given}")
    if args.lr is not None and not 0 < args.lr < math.inf:
        parser.error(f"--lr must be above 0, got {args.lr}")
    if args.resume and args.force:
        parser.error("--resume goes on with the run in --out, --force starts it again: give one of them")
    if args.batch_size % parallel.SIZE:
        parser.error(
            f"--batch-size {args.batch_size} cannot be shared by {parallel.SIZE} processes: make it a multiple"
        )
    if args.shard and (parallel.SIZE == 1 or args.method == "full"):
        parser.error("--shard is for torchrun with several processes, and for methods that leave the model frozen")
    args.out = args.out or os.path.join("out", args.method)
    return args


# -- The frozen model --------------------------------------------------------------------------------------------------


def pick_device(device: str = "auto", dtype: str = "auto") -> tuple[str, torch.dtype, str]:
    """The device, the dtype of frozen weights on it, and why."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device {device}: there is no such device. Take cpu, cuda, cuda:1, ...") from None
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: this PyTorch sees no CUDA device. Leave the option out to use the CPU")
    if dtype != "auto":
        return device, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], "as asked"
    if device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0):
        return device, torch.bfloat16, "this GPU computes in it"
    return device, torch.float32, "the safe choice on this device"


def open_model(
    init: str, given: list[str] | tuple = (), device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Decoder, Tokenizer]:
    """A frozen decoder and its tokenizer: the shipped one, a folder's, or (scratch) a new one with tiny's words."""
    if init == "scratch":
        tokenizer = Tokenizer.load(TINY)
        defaults = {"arch": "llama", "block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 128}
        try:
            model = Decoder(Config(tokenizer.vocab_size, **{**defaults, **options(Config, "the model", given)}))
        except ValueError as e:  # sizes that do not fit each other
            raise UsageError(str(e)) from None
    else:
        folder = TINY if init == "tiny" else hub.find(init)
        model, tokenizer = weights.load(folder, dtype, device), Tokenizer.load(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{init}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}"
        )
    return model.to(device, dtype).requires_grad_(False), tokenizer


def open_data(data: str, skip_bad: bool = False) -> dict[str, list[dict]]:
    """Rows by split of --data; tiny is made where it is not there yet."""
    if data != "tiny":
        return load(data, skip_bad)
    if not os.path.exists(os.path.join(TINY, "train.jsonl")):
        print("making the data set tiny, once (python data/prepare.py tiny)")
        if parallel.RANK == 0:
            world.tiny(TINY)
        parallel.wait()
    return load(TINY)


# -- Scores ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rate(model: Decoder, examples: list, tuner: Tuner | None = None, size: int = 64) -> tuple[Tensor, Tensor]:
    """Of each example, the nats of its whole response, and how many of its tokens are not the likeliest: (N,), (N,)."""
    if tuner is not None:
        tuner.eval()
    nats, wrong = torch.zeros(len(examples), dtype=torch.double), torch.zeros(len(examples), dtype=torch.long)
    order = sorted(range(len(examples)), key=lambda i: sum(map(len, examples[i])))
    for rows in (torch.tensor(order[i : i + size]) for i in range(0, len(order), size)):
        batch = [examples[i] for i in rows]
        idx, targets, instr = collate(batch, model.config.block_size, model.wte.weight.device)
        there = targets >= 0
        parts = (x.split(1024) for x in (model.hidden(idx, instr, tuner)[there], targets[there], there.nonzero()[:, 0]))
        for x, target, row in zip(*parts):  # never all logits at once: they can be larger than all the rest
            logits, row = model.head(x).float(), rows[row.cpu()]
            nats.index_add_(0, row, F.cross_entropy(logits, target, reduction="none").cpu().double())
            wrong.index_add_(0, row, (logits.argmax(-1) != target).long().cpu())
    return nats, wrong


def evaluate(model: Decoder, examples: list, tuner: Tuner | None = None) -> tuple[float, float]:
    """(exact match, nats per response token) over examples.

    Exact match is the share of rows of which greedy decoding would reproduce every token, the end included.  That
    needs no decoding: it is so exactly if each token of the response is the likeliest one after those before it.
    """
    nats, wrong = rate(model, examples, tuner)
    return (wrong == 0).double().mean().item(), nats.sum().item() / sum(len(response) for _, response in examples)


def accuracy(session: SimpleNamespace, name: str, tuner: Tuner | None = None, most: int = 0) -> float:
    """Share of rows of a split to which the model gives the right one of the label words (session.labels).

    That is the likeliest of them as a whole response, its end included.
    """
    rows, tokenizer = spread(session.rows[name], most), session.tokenizer
    words = [
        response for _, response in encode([{**rows[0], "output": word} for word in session.labels], tokenizer, 10**9)
    ]
    room, examples = session.meta["block_size"] - max(map(len, words)), []
    for row in rows:
        prompt = tokenizer.prompt(template(row))
        if len(prompt) > room:
            if not session.meta["truncate"]:
                raise ValueError(f"a row of {name} has no room for each label word (--truncate): {row}"[:300])
            prompt = shorten(prompt, room, tokenizer)  # the same for all words, or they could not be compared
        examples += [(prompt, word) for word in words]
    best = rate(session.model, examples, tuner)[0].view(len(rows), -1).argmin(1).tolist()
    return sum(session.labels[i] == row["output"].strip() for i, row in zip(best, rows)) / len(rows)


def answer(
    model: Decoder, tokenizer: Tokenizer, rows: list[dict], tuner: Tuner | None = None, max_new: int = 0,
    truncate: bool = False, **how,
) -> list[str]:  # fmt: skip
    """Answers to rows of instruction and input, as text.

    At most max_new tokens each; 0 means 64, or as many as there is room for, which truncate makes by cutting prompts.
    `how` goes to `generate`, which is greedy unless told otherwise.
    """
    prompts, most = [tokenizer.prompt(template(row)) for row in rows], model.config.block_size
    if truncate:
        prompts = [shorten(prompt, most - (max_new or min(64, most // 2)), tokenizer) for prompt in prompts]
    max_new = max_new or max(1, min(64, most - max(map(len, prompts))))
    return [tokenizer.decode(ids).strip() for ids in generate(model, prompts, tuner, max_new, tokenizer.end, **how)]


# -- The loop ----------------------------------------------------------------------------------------------------------


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over 6 % of the steps, linear decay to zero."""
    return min((step + 1) / max(1, 0.06 * steps), 1 - step / steps)


def train(model: Decoder, tuner: Tuner, examples: dict, args: Namespace, meta: dict) -> dict:
    """Train `tuner` on examples["train"], with --bilevel its coefficients on examples["upper"].

    Leaves best.pt, last.pt and log.jsonl in args.out.
    Returns the content of best.pt.

    With --resume it goes on as if it had never stopped: a step depends on the seed, its number and what the steps
    before it left.
    """
    last, best, log, previous = (os.path.join(args.out, name) for name in FILES)
    optimizer = torch.optim.AdamW(tuner.groups(args.lr), weight_decay=args.weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    upper = {id(p) for p in tuner.upper()} if args.bilevel else set()
    levels = [
        Batches(examples[name], args.batch_size, args.seed, model.config.block_size, model.wte.weight.device)
        for name in ("train", "upper")
        if name in examples
    ]
    for level in levels:
        if level.size % parallel.SIZE:
            raise ValueError(f"{level.size} rows a step cannot be shared by {parallel.SIZE} processes")
    state = {"step": 0, "lowest": math.inf, "losses": []}  # losses since the last validation
    if args.resume:
        saved = resumable(last, previous, meta)
        fill(tuner, saved, last)
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    parallel.wait()  # for all to have read what one goes on to write
    if parallel.RANK == 0:
        keep_lines(log, state["step"])

    def save():
        if parallel.RANK:
            return
        if os.path.exists(last):
            replace_by_link(last, previous)
        save_tuner(last, tuner, meta, optimizer=optimizer.state_dict(), state=state)

    def check(loss, step):
        if not math.isfinite(loss):
            kept = f"{best} is intact" if os.path.exists(best) else "nothing had been saved yet"
            raise Diverged(f"loss is {loss} at step {step}, --lr {args.lr:g}; {kept}. Try --lr {args.lr / 4:.1g}")
        return loss

    model.checkpointing = args.checkpoint
    if args.compile:  # on a first batch, so that its time is not counted as training
        clock, model.hidden = time.perf_counter(), torch.compile(model.hidden)
        gradients(model, tuner.train(), levels[0].batch(state["step"]), args.grad_accum)
        print(f"compiled in {time.perf_counter() - clock:.0f} s")

    tokens, clock = 0, time.perf_counter()
    asked, how = False, {"dynamic_ncols": True, "unit": "step", "disable": parallel.RANK > 0 or None}
    with Stop() as stop, tqdm(initial=state["step"], total=args.steps, **how) as bar:
        for step in range(state["step"], args.steps):
            if asked:
                save()
                raise SystemExit(f"stopped before step {step}, and saved. Go on with the same command and --resume")
            torch.manual_seed(args.seed * 1_000_003 + step)  # for methods that draw: their noise is the step's own
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * schedule(step, args.steps)
            tuner.train()
            tuner.progress(step / args.steps)
            for level, batches in enumerate(levels):
                optimizer.zero_grad()
                loss, read = gradients(model, tuner, batches.batch(step), args.grad_accum)
                if upper:  # AdamW leaves alone what has no gradient
                    for p in tuner.parameters():
                        p.grad = p.grad if (id(p) in upper) == (level == 1) else None
                loss, read, asked = parallel.summed(tuner.parameters(), loss, read, stop.asked)
                state["losses"] += [check(loss, step)] if level == 0 else []
                torch.nn.utils.clip_grad_norm_(tuner.parameters(), 1.0)
                optimizer.step()
                tokens += read
            state["step"] = done = step + 1
            bar.update()
            if done % args.eval_every == 0 or done == args.steps:
                row = {"step": done, "loss": sum(state["losses"]) / len(state["losses"])}
                row["tokens_per_s"] = round(tokens / (time.perf_counter() - clock))
                row["exact"], row["val"] = evaluate(model, examples["val"], tuner)
                bar.set_postfix_str("loss {loss:.3f}, val {val:.3f}, {tokens_per_s:,} tokens/s".format(**row))
                lower = check(row["val"], step) < state["lowest"]
                state["lowest"] = min(row["val"], state["lowest"])
                if parallel.RANK == 0:
                    if lower:
                        save_tuner(best, tuner, meta, step=done, val=row["val"])
                    with open(log, "a", encoding="utf-8") as f:
                        f.write(json.dumps(row) + "\n")
                state["losses"] = []
                save()
                tokens, clock = 0, time.perf_counter()
            elif args.save_every and done % args.save_every == 0:
                save()
    parallel.wait()
    return load_tuner(best)


def gradients(model: Decoder, tuner: Tuner, batch: tuple[Tensor, ...], parts: int = 1) -> tuple[float, int]:
    """Add this process's share of the gradient of a batch's mean loss, computed in parts.

    Returns its share of the loss, and how many tokens it has read, without the padding.
    """
    total, loss = (batch[1] >= 0).sum(), 0.0
    idx, targets, instr = parallel.mine(batch)
    for i, t, s in zip(*(x.chunk(parts) for x in (idx, targets, instr))):
        part = model(i, s, tuner, t) * ((t >= 0).sum() / total)  # a mean over the part's targets, of all targets
        part.backward()
        loss += part.item()
    return loss, (instr | (targets >= 0)).sum().item()


class Diverged(ValueError):
    """The loss is no finite number any more."""


class Stop:
    """Notes Ctrl-C and SIGTERM, for a loop to act on between two steps; the second time they act at once."""

    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.asked = True
        signal.signal(number, self.before[number])

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# -- A run -------------------------------------------------------------------------------------------------------------


def spread(rows: list, n: int) -> list:
    """At most n of the rows, evenly spaced (neighbours are often alike); all of them if n is 0."""
    return rows if not n or n >= len(rows) else [rows[i * len(rows) // n] for i in range(n)]


def table(before: dict, after: dict, method: str, sizes: dict, first: str = "exact match") -> Iterator[str]:
    """Scores of the test sets as lines of text: exact match where answers are short enough for it to mean something."""
    short = any(exact for exact, _ in (*before.values(), *after.values()))
    width = max(map(len, before))
    yield f"{'':{width}}  {'rows':>6}  {'frozen alone':>20}  {'with ' + method:>20}"
    yield f"{'':{width}}  {'':>6}" + f"  {first if short else '':>11}{'nats/token':>11}" * 2
    for name in before:
        cells = [f"{exact:11.1%}" if short else " " * 11 for exact, _ in (before[name], after[name])]
        yield f"{name:{width}}  {sizes[name]:6,}  {cells[0]}{before[name][1]:11.3f}  {cells[1]}{after[name][1]:11.3f}"


def examples_before_and_after(rows: list[dict], before: list[str], after: list[str], method: str) -> Iterator[str]:
    """What was asked, what either model says, and what was wanted, as lines of text."""
    for row, *said in zip(rows, before, after):
        yield "    ".join(template(row).strip().splitlines()).removesuffix("Response:").strip()
        for name, text in zip(("frozen alone", f"with {method}", "wanted"), (*said, row["output"])):
            yield f"    {name:15s} {' '.join(text.split())[:160]}"
        yield ""


def begin(args: Namespace) -> SimpleNamespace:
    """Open what a run needs, and check it.

    Returns a namespace: model, tokenizer, tuner (not attached yet), rows and examples (by split), tests (names of
    splits), labels (the words of classes, if the rows are of some), meta (what a checkpoint says of the run), why (the
    weights have their dtype).  Sets args.lr where it was left to the method.
    """
    device, dtype, why = pick_device(args.device, args.dtype)
    device = parallel.join(device)
    scratch = args.init == "scratch"
    if scratch and args.method != "full":
        raise UsageError(f"--init scratch has nothing frozen yet for {args.method} to tune: add --method full")
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise FileExistsError(f"--out {args.out} is a file, and not a folder")
    files = [os.path.join(args.out, name) for name in FILES]
    if args.resume and not (os.path.exists(files[0]) or os.path.exists(files[3])):
        raise FileNotFoundError(f"--resume: there is no run at {args.out}")
    if any(map(os.path.exists, files)) and not (args.resume or args.force):
        raise FileExistsError(
            f"{args.out} holds a run: --resume goes on with it, --force starts again, --out names another folder"
        )
    torch.manual_seed(args.seed)  # for a model from scratch; below again, for a method's start to be its own
    model, tokenizer = open_model(args.init, args.o, "cpu" if args.shard else device, dtype)
    block_size = min(args.block_size or model.config.block_size, model.config.block_size)
    rows = open_data(args.data, args.skip_bad)
    labels, most = label_words(rows["train"]), {"val": args.val_rows, "train": 0}
    rows = {name: spread(r, most.get(name, args.test_rows)) for name, r in rows.items()}
    if 0 < args.train_rows < len(rows["train"]):
        rows["train"] = random.Random(args.seed).sample(rows["train"], args.train_rows)
    if args.bilevel:  # no instruction stands on both sides
        rows["train"], rows["upper"] = split(rows["train"], args.seed, 0.2)
        if not rows["train"]:
            raise ValueError("--bilevel: all training rows have the same instruction, so none can be held out")
    examples = {name: encode(r, tokenizer, block_size, args.truncate) for name, r in rows.items()}
    torch.manual_seed(args.seed)
    tuner = build(args.method, model.config, [] if scratch else args.o).to(device)
    tuner.start(model)
    if args.bilevel and not tuner.upper():
        raise UsageError(f"--bilevel: {args.method} with these options has no learned activation")
    args.lr = tuner.lr if args.lr is None else args.lr
    meta = {name: getattr(args, name) for name in DEFINE}
    said = args.o if scratch else complete(args.method, args.o)
    meta.update(options=said, base=weights.fingerprint(model), block_size=block_size, dtype=str(dtype))
    if args.shard:  # layer by layer, so that the whole of it never has to fit
        parallel.shard(model, device)
        model.to(device)
    tests = [name for name in rows if name.startswith("test")]
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, tuner=tuner, rows=rows, examples=examples, tests=tests,
        labels=labels, meta=meta, why=why,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> dict:
    """The command; returns {"before", "after": {test set: (exact match or accuracy, nats)}, "path"}."""
    args = parse(argv)
    if parallel.RANK:  # the first process speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    session = begin(args)
    model, tokenizer, tuner, rows, examples, tests = (
        session.model, session.tokenizer, session.tuner, session.rows, session.examples, session.tests
    )  # fmt: skip
    device, dtype = model.wte.weight.device, model.wte.weight.dtype

    # Before: the frozen model alone.
    shown = [row for name in tests for row in spread(rows[name], 2)][:6]

    def score(tuner=None):
        scores = {name: evaluate(model, examples[name], tuner) for name in tests}
        if session.labels:
            scores = {name: (accuracy(session, name, tuner), nats) for name, (_, nats) in scores.items()}
        return scores

    before = score()
    texts = [answer(model, tokenizer, shown, truncate=args.truncate)]

    tuner.attach(model)
    everything = {id(p): p for p in (*model.parameters(), *tuner.parameters())}.values()
    total, trained = sum(p.numel() for p in everything), sum(p.numel() for p in tuner.parameters())
    print(f"{args.method}: {trained:,} of {total / 1e6:.2f}M parameters train ({trained / total:.2%})")
    kept = "all of it trains, in float32" if args.method == "full" else f"frozen in {str(dtype)[6:]} ({session.why})"
    print(f"{args.init} on {device}, {kept}")
    print(f"{args.data}: {', '.join(f'{name} {len(r):,}' for name, r in rows.items())} rows")
    if parallel.RANK == 0:
        claim(args.out, args.force)
    best = train(model, tuner, examples, args, session.meta)

    # After.
    path = os.path.join(args.out, "best.pt")
    fill(tuner, best, path)
    after = score(tuner)
    texts.append(answer(model, tokenizer, shown, tuner, truncate=args.truncate))
    size, first = os.path.getsize(path) / 1000, "accuracy" if session.labels else "exact match"
    print("\n" + "\n".join(table(before, after, args.method, {name: len(rows[name]) for name in tests}, first)))
    print("\n" + "\n".join(examples_before_and_after(shown, *texts, args.method)))
    print(f"saved {path}: what was trained, nothing frozen (step {best['step']}, {size:,.0f} kB)")
    if args.init == "scratch":
        if parallel.RANK == 0:  # in fp16: half the bytes, and rounding small beside what training leaves to chance
            weights.save(args.out, model, torch.float16)
            shutil.copy(os.path.join(TINY, "words.json"), args.out)
        print(f"saved the model, too, as a Hugging Face folder: python train.py --init {args.out}")
    elif "instruction" in shown[0]:
        given = f" --input {json.dumps(shown[0]['input'])}" if shown[0].get("input") else ""
        print(f"try it: python sample.py {path} {json.dumps(shown[0]['instruction'])}{given}")
    parallel.leave()
    return {"before": before, "after": after, "path": path}


if __name__ == "__main__":
    run(main)
