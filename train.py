"""Train a method on a frozen model, and show what it brought.

    python train.py                                        # IAPT on the shipped model and data: no download, no GPU
    python train.py --method lora -o r=4                   # another method, with its options
    python train.py --init FOLDER --data FOLDER_OR_FILE    # a Hugging Face folder of GPT-2 or LLaMA; your own rows
    python train.py --init scratch --data data/tiny/pretrain --method full     # pretrain a backbone

A run writes into --out: best.pt (what was trained, at the lowest validation loss), last.pt (to --resume), log.jsonl.

A map: `parse`, the command line; `open_model`; `evaluate`; `train`, the loop; `main`, which scores before and after.
"""

import argparse
import json
import math
import os
import shutil
import signal
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import hub
import weights
from baselines import METHODS, build, load_tuner, options, save_tuner
from data import Batches, Tokenizer, collate, encode, load, prepare, replacing, run, template
from model import Config, Decoder, generate

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = os.path.join(HERE, "data", "tiny")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--init",
        default="tiny",
        help="the frozen model: tiny, scratch, a folder, gpt2, ..., or OWNER/NAME of the hub (default: %(default)s)",
    )
    add(
        "--data",
        default="tiny",
        help="tiny, a folder with train.jsonl ..., or a .jsonl, .json, .csv file (default: %(default)s)",
    )
    add("--method", default="iapt", help=f"{', '.join(METHODS)} (default: %(default)s)")
    add(
        "-o",
        nargs="+",
        default=[],
        action="extend",
        metavar="NAME=VALUE",
        help="options of the method (with --init scratch: of the model)",
    )
    add("--out", help="folder of the run (default: out/METHOD)")
    add("--steps", type=int, default=1500, help="training steps (default: %(default)s)")
    add("--lr", type=float, help="peak learning rate (default: the method's own)")
    add("--weight-decay", type=float, default=0.0, help="(default: %(default)s)")
    add("--batch-size", type=int, default=32, help="rows a step (default: %(default)s)")
    add("--block-size", type=int, help="longest row in tokens (default: what the model takes)")
    add(
        "--eval-every",
        type=int,
        default=100,
        help="steps between validations, each of which saves (default: %(default)s)",
    )
    add("--val-rows", type=int, default=320, help="validate on at most so many rows; 0: all (default: %(default)s)")
    add(
        "--test-rows",
        type=int,
        default=0,
        help="test on at most so many rows of each test set; 0: all (default: %(default)s)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    add(
        "--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="of the frozen weights (default: %(default)s)"
    )
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile the model (default: %(default)s)",
    )
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--force", action="store_true", help="start again over the run in --out")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "eval_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    args.out = args.out or os.path.join("out", args.method)
    return args


# -- The frozen model --------------------------------------------------------------------------------------------------


def pick_device(device="auto", dtype="auto"):
    """The device, the dtype of frozen weights on it, and why."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this PyTorch sees no CUDA device. Leave the option out to use the CPU")
    if dtype != "auto":
        return device, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], "as asked"
    if device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0):
        return device, torch.bfloat16, "this GPU computes in it"
    return device, torch.float32, "the safe choice on this device"


def open_model(init, given=(), device="cpu", dtype=torch.float32):
    """A frozen decoder and its tokenizer: the shipped one, a folder's, or (scratch) a new one with tiny's words."""
    if init == "scratch":
        tokenizer = Tokenizer.load(TINY)
        defaults = {"arch": "llama", "block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 128}
        model = Decoder(Config(tokenizer.vocab_size, **{**defaults, **options(Config, "the model", given)}))
    else:
        folder = TINY if init == "tiny" else hub.find(init)
        model, tokenizer = weights.load(folder, dtype, device), Tokenizer.load(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{init}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}"
        )
    return model.to(device, dtype).requires_grad_(False), tokenizer


# -- Scores ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, examples, tuner=None, size=64):
    """(exact match, nats per response token) over examples.

    Exact match is the share of rows of which greedy decoding would reproduce every token, the end included.  That
    needs no decoding: it is so exactly if each token of the response is the likeliest one after those before it.
    """
    if tuner is not None:
        tuner.eval()
    nats, tokens, exact = 0.0, 0, 0
    order = sorted(examples, key=lambda e: len(e[0]) + len(e[1]))
    for i in range(0, len(order), size):
        idx, targets, instr = collate(order[i : i + size], model.wte.weight.device)
        there = targets >= 0
        logits = model.head(model.hidden(idx, instr, tuner)[there]).float()
        nats += F.cross_entropy(logits, targets[there], reduction="sum").item()
        tokens += len(logits)
        wrong = torch.zeros(len(idx), device=idx.device).index_add(
            0, there.nonzero()[:, 0], (logits.argmax(-1) != targets[there]).float()
        )
        exact += (wrong == 0).sum().item()
    return exact / len(examples), nats / tokens


def answer(model, tokenizer, rows, tuner=None, max_new=0, **how):
    """Answers to rows of instruction and input, as text.

    At most max_new tokens each; 0 means 64, or as many as there is room for.  `how` goes to `generate`, which is greedy
    unless told otherwise.
    """
    prompts = [tokenizer.prompt(template(row)) for row in rows]
    max_new = max_new or max(1, min(64, model.config.block_size - max(map(len, prompts))))
    return [tokenizer.decode(ids).strip() for ids in generate(model, prompts, tuner, max_new, tokenizer.end, **how)]


# -- The loop ----------------------------------------------------------------------------------------------------------


def schedule(step, steps):
    """Share of the peak learning rate: linear warm-up over 6 % of the steps, linear decay to zero."""
    return min((step + 1) / max(1, 0.06 * steps), 1 - step / steps)


def train(model, tuner, train_examples, val_examples, args, meta):
    """Train `tuner` and leave best.pt, last.pt and log.jsonl in args.out; returns the content of best.pt.

    With --resume it goes on as if it had never stopped: a step depends on the seed, its number and what the steps
    before it left.
    """
    last, best, log = (os.path.join(args.out, name) for name in ("last.pt", "best.pt", "log.jsonl"))
    optimizer = torch.optim.AdamW(tuner.groups(args.lr), weight_decay=args.weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    batches = Batches(train_examples, args.batch_size, args.seed, model.wte.weight.device)
    state = {"step": 0, "lowest": math.inf, "losses": []}  # losses since the last validation
    if args.resume:
        saved = resumable(last, meta)
        tuner.load_state_dict(saved["tuner"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    keep_lines(log, state["step"])

    def save():
        save_tuner(last, tuner, meta, optimizer=optimizer.state_dict(), state=state)

    stop = []  # signals, acted on between two steps: so what is saved is never half a step
    handlers = {s: signal.signal(s, lambda number, frame: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(
        range(state["step"], args.steps), initial=state["step"], total=args.steps, dynamic_ncols=True, unit="step"
    )
    tokens, clock = 0, time.perf_counter()
    try:
        for step in bar:
            if stop:
                save()
                raise SystemExit(f"stopped before step {step}, and saved. Go on with the same command and --resume")
            torch.manual_seed(
                args.seed * 1_000_003 + step
            )  # for methods that draw: their noise too is a function of the step
            tuner.train()
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * schedule(step, args.steps)
            idx, targets, instr = batches.batch(step)
            loss = model(idx, instr, tuner, targets)
            if not torch.isfinite(loss):
                kept = f"{best} is intact" if os.path.exists(best) else "nothing had been saved yet"
                raise ValueError(f"loss is {loss.item()} at step {step}; {kept}. Try --lr {args.lr / 4:.1g}")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(tuner.parameters(), 1.0)
            optimizer.step()
            state["step"] = step + 1
            state["losses"].append(loss.item())
            tokens += idx.numel()
            if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
                rate = tokens / (time.perf_counter() - clock)
                exact, val = evaluate(model, val_examples, tuner)
                mean = sum(state["losses"]) / len(state["losses"])
                bar.set_postfix_str(f"loss {mean:.3f}, val {val:.3f}, {rate:,.0f} tokens/s")
                with open(log, "a", encoding="utf-8") as f:
                    f.write(
                        json.dumps(
                            {"step": step + 1, "loss": mean, "val": val, "exact": exact, "tokens_per_s": round(rate)}
                        )
                        + "\n"
                    )
                if val < state["lowest"]:
                    state["lowest"] = val
                    save_tuner(best, tuner, meta, step=step + 1, val=val)
                state["losses"] = []
                save()
                tokens, clock = 0, time.perf_counter()
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return load_tuner(best)


def resumable(path, meta):
    """The content of last.pt.  Raises ValueError if that run was another one than this."""
    saved = load_tuner(path)
    for key, value in meta.items():
        if saved["meta"].get(key) != value:
            raise ValueError(f"--resume: {key} was {saved['meta'].get(key)!r} in {path}, now it is {value!r}")
    return saved


def keep_lines(log, step):
    """Drop from a log what was written after `step`; none is an empty log."""
    lines = []
    if step:
        with open(log, encoding="utf-8") as f:
            lines = [line for line in f if json.loads(line)["step"] <= step]
    with replacing(log) as f:
        f.writelines(lines)


# -- A run -------------------------------------------------------------------------------------------------------------


def spread(rows, n):
    """At most n of the rows, evenly spaced (neighbours are often alike); all of them if n is 0."""
    return rows if not n or n >= len(rows) else [rows[i * len(rows) // n] for i in range(n)]


def table(before, after, method, sizes):
    """Scores of the test sets as lines of text: exact match where answers are short enough for it to mean something."""
    short = any(exact for exact, _ in (*before.values(), *after.values()))
    width = max(map(len, before))
    yield f"{'':{width}}  {'rows':>6}  {'frozen alone':>20}  {'with ' + method:>20}"
    yield f"{'':{width}}  {'':>6}" + f"  {'exact match' if short else '':>11}{'nats/token':>11}" * 2
    for name in before:
        cells = [f"{exact:11.1%}" if short else " " * 11 for exact, _ in (before[name], after[name])]
        yield f"{name:{width}}  {sizes[name]:6,}  {cells[0]}{before[name][1]:11.3f}  {cells[1]}{after[name][1]:11.3f}"


def examples_before_and_after(rows, before, after, method):
    """What was asked, what either model says, and what was wanted, as lines of text."""
    for row, *said in zip(rows, before, after):
        yield "    ".join(template(row).strip().splitlines()).removesuffix("Response:").strip()
        for name, text in zip(("frozen alone", f"with {method}", "wanted"), (*said, row["output"])):
            yield f"    {name:15s} {' '.join(text.split())[:160]}"
        yield ""


def main(argv=None):
    args = parse(argv)
    device, dtype, why = pick_device(args.device, args.dtype)
    scratch = args.init == "scratch"
    if scratch and args.method != "full":
        raise ValueError(f"--init scratch has nothing frozen yet for {args.method} to tune: add --method full")
    files = [os.path.join(args.out, name) for name in ("last.pt", "best.pt", "log.jsonl")]
    if args.resume and not os.path.exists(files[0]):
        raise FileNotFoundError(f"--resume: there is no run at {args.out}")
    if any(map(os.path.exists, files)) and not (args.resume or args.force):
        raise FileExistsError(
            f"{args.out} holds a run: --resume goes on with it, --force starts again, --out names another folder"
        )

    # The model, the data, the method.
    torch.manual_seed(args.seed)
    where = TINY if args.data == "tiny" else args.data
    if where == TINY and not os.path.exists(os.path.join(TINY, "train.jsonl")):
        print("making the data set tiny, once (python data/prepare.py tiny)")
        prepare.tiny(TINY)
    model, tokenizer = open_model(args.init, args.o, device, dtype)
    block_size = min(args.block_size or model.config.block_size, model.config.block_size)
    rows = load(where)
    rows = {
        name: r if name == "train" else spread(r, args.val_rows if name == "val" else args.test_rows)
        for name, r in rows.items()
    }
    examples = {name: encode(r, tokenizer, block_size) for name, r in rows.items()}
    tests = [name for name in rows if name.startswith("test")] or ["val"]
    torch.manual_seed(args.seed)
    tuner = build(args.method, model.config, [] if scratch else args.o).to(device)
    args.lr = args.lr or tuner.lr
    meta = {"method": args.method, "options": args.o, "init": args.init, "base": weights.fingerprint(model),
            "data": args.data, "seed": args.seed, "steps": args.steps, "lr": args.lr, "batch_size": args.batch_size,
            "weight_decay": args.weight_decay}  # fmt: skip

    # Before: the frozen model alone.
    shown = [row for name in tests for row in spread(rows[name], 2)][:6]
    before = {name: evaluate(model, examples[name]) for name in tests}
    texts = [answer(model, tokenizer, shown)]

    tuner.attach(model)
    everything = {id(p): p for p in (*model.parameters(), *tuner.parameters())}.values()
    total, trained = sum(p.numel() for p in everything), sum(p.numel() for p in tuner.parameters())
    print(f"{args.method}: {trained:,} of {total / 1e6:.2f}M parameters train ({trained / total:.2%})")
    print(f"{args.init} on {device}, frozen in {str(dtype).removeprefix('torch.')} ({why})")
    print(f"{args.data}: {', '.join(f'{name} {len(r):,}' for name, r in rows.items())} rows")
    if args.compile:
        model.hidden = torch.compile(model.hidden)
    os.makedirs(args.out, exist_ok=True)
    best = train(model, tuner, examples["train"], examples["val"], args, meta)

    # After.
    tuner.load_state_dict(best["tuner"])
    after = {name: evaluate(model, examples[name], tuner) for name in tests}
    texts.append(answer(model, tokenizer, shown, tuner))
    path = os.path.join(args.out, "best.pt")
    size = os.path.getsize(path) / 1000
    print("\n" + "\n".join(table(before, after, args.method, {name: len(rows[name]) for name in tests})))
    print("\n" + "\n".join(examples_before_and_after(shown, *texts, args.method)))
    print(f"saved {path}: what was trained, nothing frozen (step {best['step']}, {size:,.0f} kB)")
    if scratch:  # in fp16: half the bytes, and rounding that is small beside what training leaves to chance
        weights.save(args.out, model, torch.float16)
        shutil.copy(os.path.join(TINY, "words.json"), args.out)
        print(f"saved the model, too, as a Hugging Face folder: python train.py --init {args.out}")
    else:
        given = f" --input {json.dumps(shown[0]['input'])}" if shown[0].get("input") else ""
        print(f"try it: python sample.py {path} {json.dumps(shown[0]['instruction'])}{given}")
    return {"before": before, "after": after, "path": path}


if __name__ == "__main__":
    run(main)
