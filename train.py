"""Train a method on a frozen model, and show what it brought.

    python train.py                                        # IAPT on the shipped model and data: no download, no GPU
    python train.py --method lora -o r=4                   # another method, with its options
    python train.py --init gpt2 --data my.jsonl            # a real model, and rows of your own
    python train.py --scratch --method full --data data/tiny/pretrain --template text     # pretrain such a model anew

A run writes into --out: best.pt (what was trained, at the lowest validation loss), last.pt (to --resume), log.jsonl.
"""

import math
import os
import shlex
import time
from argparse import BooleanOptionalAction, Namespace

import torch
from torch import Tensor

from baselines import METHODS, build, spell_out
from data import Batch, Batches, Example, encode, evenly_spaced, open_rows, rows_fingerprint, text_fingerprint
from data.questions import as_arguments
from data.reads import Reads, Teacher, keep_reads
from data.scores import BLIND, Score, Session, before_and_after, evaluate, plain_examples, score_table
from data.template import TEMPLATES, make_template
from model import Decoder, Tuner
from plumbing import distributed
from plumbing.checkpoint import RunFolder, load_checkpoint, load_into, save_tuner, warm_start
from plumbing.cli import Parser, SignalGuard, UsageError, add_device_options, at_least, pick_device, run
from plumbing.compiling import check_compiler, compile_parts
from plumbing.files import copy_tokenizer
from plumbing.head_loss import head_loss
from plumbing.hub import find_model
from plumbing.pretrained import fingerprint, save_pretrained
from sample import answers, open_model

# Options that a checkpoint records, beside what new_tuner adds: with others a run cannot be resumed.
RUN_KEYS = ("method", "act", "distill", "init", "scratch", "data", "template", "seed", "steps", "lr", "batch_size",
            "weight_decay", "eval_every", "train_rows", "val_rows", "skip_bad", "truncate", "warm_start")  # fmt: skip


def parse(argv: list[str] | None = None) -> Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--init", default="tiny", help="the frozen model: tiny, a folder, gpt2, or OWNER/NAME on the hub")
    add("--scratch", action="store_true", help="forget the weights of --init: train a model of that size anew")
    add("--data", default="tiny", help="tiny, a folder with train.jsonl, or a file of rows")
    add("--template", default="plain", choices=TEMPLATES, help="layout of a row; chat: the model's own; text: none")
    add("--method", help=f"{', '.join(METHODS)} (default: iapt; summary, if the instruction is hidden)")
    add("-o", nargs="+", default=[], action="extend", metavar="NAME=VALUE", help="options of the method; -o help")
    acts = parser.add_mutually_exclusive_group()
    acts.add_argument("--act", default="all", choices=["all", "answer"], help="on all tokens, or on the answer alone")
    acts.add_argument("--hide-instruction", dest="act", action="store_const", const="hidden",
                      help="input and answer see soft tokens in place of the instruction")  # fmt: skip
    add("--distill", type=at_least(0.0, 1.0), nargs="?", const=1.0, default=0.0, metavar="SHARE",
        help="learn from the frozen model that sees the hidden instruction (share of the loss; default 1)")  # fmt: skip
    add("--keep-reads", type=at_least(0.0), default=2.0, metavar="GB", help="memory for prompts that are read once")
    add("--out", help="folder of the run (default: out/METHOD)")
    add("--warm-start", metavar="RUN", help="begin with what another run of the method has trained (its best.pt)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue the run in --out")
    start.add_argument("--force", action="store_true", help="start again over the run in --out")
    add("--steps", type=at_least(1), default=1000, help="training steps")
    add("--batch-size", type=at_least(1), default=32, help="rows a step")
    add("--lr", type=at_least(0.0), help="peak learning rate (default: the method's own)")
    add("--weight-decay", type=at_least(0.0), default=0.0, help="of AdamW")
    add("--seed", type=at_least(0), default=0, help="of the start, the order of rows, and what a method draws")
    add("--block-size", type=at_least(2), help="longest row in tokens (default: what the model takes)")
    add("--truncate", action="store_true", help="cut rows that are too long (default: refuse them)")
    add("--skip-bad", action="store_true", help="leave out rows that cannot be used, and count them")
    add("--train-rows", type=at_least(0), default=0, help="train on N rows, drawn by --seed; 0: all")
    add("--val-rows", type=at_least(0), default=320, help="validate on at most N rows; 0: all")
    add("--test-rows", type=at_least(0), default=5000, help="test on at most N rows of each test set; 0: all")
    add("--eval-every", type=at_least(1), default=100, help="steps between validations, each of which saves")
    add("--save-every", type=at_least(0), default=0, help="steps between further saves; 0: none")
    add_device_options(parser)
    add("--compile", action=BooleanOptionalAction, default=False, help="torch.compile blocks and generators")
    add("--grad-accum", type=at_least(1), default=1, help="split each step into N micro-batches: less memory")
    add("--checkpoint", action="store_true", help="recompute activations in the backward pass: less memory")
    add("--shard", action="store_true", help="under torchrun: spread the frozen weights over the processes")
    args = parser.parse_args(argv)
    args.method = args.method or ("summary" if args.act == "hidden" else "iapt")
    args.o = spell_out(args.method, args.o, args.act)  # a wrong option is found before anything is opened
    args.out = args.out or os.path.join("out", args.method)
    if args.scratch and args.method != "full":
        parser.error(f"--scratch leaves nothing frozen for {args.method} to tune: add --method full")
    if args.distill and args.act != "hidden":
        parser.error("--distill learns from the model that sees the instruction: it goes with --hide-instruction")
    if problem := distributed.problem(args):
        parser.error(problem)
    return args


# -- The loop ----------------------------------------------------------------------------------------------------------


def train(model: Decoder, tuner: Tuner, examples: dict[str, list[Example]], args: Namespace, meta: dict,
          before: dict | None = None) -> dict:  # fmt: skip
    """Train `tuner`, which is attached, on examples["train"].  Returns best.pt's content; last.pt keeps `before`.

    A step depends only on the seed, its number, and what the steps before it left: a resumed run is the one that was
    never stopped.
    """
    folder = RunFolder(args.out)
    device, multiple = model.wte.weight.device, 16 if args.compile or model.wte.weight.is_cuda else 4
    batches = Batches(examples["train"], args.batch_size, args.seed, model.config.block_size, device, multiple)
    optimizer = torch.optim.AdamW(tuner.groups(args.lr), weight_decay=args.weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    state = {"step": 0, "lowest": math.inf, "losses": [], "before": before}  # losses since the last validation
    if args.resume:
        saved = folder.load_for_resume(meta)
        load_into(tuner, saved, folder.last)
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"] | {"before": before}
    first = state["step"]
    model.checkpointing = args.checkpoint
    if args.compile:
        compile_parts(model, tuner)
    reads = keep_reads(model, tuner, examples["train"], args.keep_reads) if tuner.act != "all" else None
    teacher = Teacher(model, tuner, examples["train"], args.distill, args.keep_reads) if args.distill else None

    def save():
        folder.save_last(tuner, meta, optimizer=optimizer.state_dict(), state=state)

    tokens, clock, stop = 0, time.perf_counter(), False
    bar = distributed.progress(delay=0, initial=state["step"], total=args.steps, unit="step")
    with SignalGuard() as guard, bar:
        for step in range(state["step"], args.steps):
            if stop:
                save()
                raise SystemExit(f"stopped after {step} steps, and saved. Continue with the same command and --resume")

            # 1. This step's learning rates, and its own random numbers, for methods that draw: the same after --resume.
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * schedule(step, args.steps)
            distributed.seed_step(args.seed, step)
            tuner.train()
            tuner.progress(step / args.steps)

            # 2. The gradient, summed over micro-batches and processes; if one of them is to stop, all do.
            optimizer.zero_grad()
            loss, n = add_gradients(model, tuner, batches.batch(step), args.grad_accum, reads, teacher)
            loss, n, stop = distributed.all_reduce_grads(tuner.parameters(), loss, n, guard.stop_requested)
            folder.assert_finite(loss, step, args.lr)
            if step == first:  # with --force, what was there goes only now that the run is known to work
                folder.lock(args.force)
                folder.truncate_log(first)

            # 3. The update.
            torch.nn.utils.clip_grad_norm_(tuner.parameters(), 1.0)
            optimizer.step()
            state["step"] = step + 1
            state["losses"].append(loss)
            tokens += n
            bar.update()

            # 4. From time to time: validate, log, save.
            if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
                row = {"step": step + 1, "loss": sum(state["losses"]) / len(state["losses"])}
                row["tokens_per_s"] = round(tokens / (time.perf_counter() - clock))
                score = evaluate(model, examples["val"], tuner)
                row["exact"], row["val"] = score.exact, score.loss(args.distill)
                bar.set_postfix_str("loss {loss:.3f}, val {val:.3f}, {tokens_per_s:,} tokens/s".format(**row))
                folder.assert_finite(row["val"], step, args.lr)
                if row["val"] < state["lowest"]:
                    save_tuner(folder.best, tuner, meta, step=step + 1, val=row["val"])
                folder.append_log(row)
                state |= {"lowest": min(row["val"], state["lowest"]), "losses": []}
                save()
                tokens, clock = 0, time.perf_counter()
            elif args.save_every and (step + 1) % args.save_every == 0:
                save()
    distributed.barrier()
    return load_checkpoint(folder.best)


def schedule(step: int, steps: int) -> float:
    """Share of --lr: the smaller of a linear warm-up over 6 % of the steps and a linear decay to zero."""
    return min((step + 1) / max(1, 0.06 * steps), 1 - step / steps)


def add_gradients(model: Decoder, tuner: Tuner, batch: Batch, parts: int, *kept: Reads | Teacher | None
                  ) -> tuple[float, int]:  # fmt: skip
    """Add this process's share of a batch's gradient; return that of the mean loss, and how many tokens it has read."""
    targets_in_batch, loss = (batch.targets >= 0).sum(), 0.0
    batch = distributed.local_rows(batch)
    for micro in map(Batch, *(x.chunk(parts) for x in batch)):
        share = (micro.targets >= 0).sum() / targets_in_batch  # the loss is the mean over this micro-batch
        part = batch_loss(model, tuner, micro, *kept) * share
        part.backward()
        loss += part.item()
    return loss, (batch.targets >= 0).flip(1).cummax(1).values.sum().item()


def batch_loss(
    model: Decoder, tuner: Tuner, batch: Batch, reads: Reads | None = None, teacher: Teacher | None = None
) -> Tensor:
    """Mean loss of a batch's responses, in nats per token; reads: its prompts, if they have been read."""
    x = model.hidden(batch.idx, batch.instr, tuner, reads and reads(batch), batch.used())
    if teacher is None:
        return head_loss(model, x, batch.targets)
    return head_loss(model, x, batch.targets, teacher(batch), teacher.share)


# -- A run -------------------------------------------------------------------------------------------------------------


def open_session(args: Namespace, device: str, dtype: torch.dtype, saved: dict | None = None) -> Session:
    """Open the model and the rows that the command line names.  saved: a run's meta, which they must fit."""
    torch.manual_seed(args.seed)
    model, tokenizer = open_model(args.init, "cpu" if args.shard else device, dtype, args.scratch)
    model.requires_grad_(False)  # the model is frozen: what trains are a tuner's own parameters
    block_size, template = args.block_size or model.config.block_size, make_template(args.template, tokenizer)
    if block_size > model.config.block_size:
        raise UsageError(f"--block-size {block_size}: {args.init} takes at most {model.config.block_size} tokens")
    rows, labels = open_rows(args)
    hashes = {"base": fingerprint(model), "dtype": str(model.wte.weight.dtype), "block_size": block_size}
    hashes |= {"tokenizer": text_fingerprint(tokenizer, template), "rows": rows_fingerprint(rows)}
    if saved:
        RunFolder(args.out).refuse_other(saved, hashes)
    how = tokenizer, block_size, args.truncate, template, args.act == "hidden", args.skip_bad
    examples = {name: encode(split, *how, name) for name, split in rows.items()}
    tests = [name for name in rows if name.startswith("test")]
    plain = plain_examples(tokenizer) if args.act != "hidden" and block_size >= 192 else []
    return Session(model, tokenizer, template, rows, examples, tests, labels, block_size, hashes, plain)


def new_tuner(args: Namespace, session: Session) -> tuple[Tuner, dict]:
    """A tuner at its start, not attached, and what its checkpoints say of the run.  Sets args.lr if it was left out."""
    torch.manual_seed(args.seed)
    tuner = build(args.method, session.model.config, args.o, args.act).to(session.model.wte.weight.device)
    if session.block_size > (most := session.model.config.block_size - tuner.first):
        raise UsageError(f"--block-size {session.block_size}: {args.method}'s soft tokens leave room for {most} tokens")
    tuner.start(session.model)
    args.lr = tuner.lr if args.lr is None else args.lr
    meta = {name: getattr(args, name) for name in RUN_KEYS} | {"options": args.o} | session.hashes
    if args.warm_start and not args.resume:
        warm_start(tuner, args.warm_start, meta, args.out)
    return tuner, meta


def main(argv: list[str] | None = None) -> dict:
    """Returns {"before": {test set: Score}, "after": the same, "path": of best.pt}."""
    args = parse(argv)
    folder = RunFolder(args.out)
    folder.refuse_unless(args.resume, args.force)
    device, dtype, reason = pick_device(args.device, args.dtype)
    device = distributed.init(device)
    given = {name: x for name in RUN_KEYS if (x := getattr(args, name)) is not None} | {"options": args.o}
    saved, before = folder.peek(given) if args.resume else (None, None)  # refuses before any work
    if args.compile:
        check_compiler(device)
    session = open_session(args, device, dtype, saved)
    model, tokenizer, template, rows = session.model, session.tokenizer, session.template, session.rows
    tuner, meta = new_tuner(args, session)
    if args.shard:
        distributed.shard(model, device)
        tuner.to(device)
    folder.lock()

    trained, frozen = (sum(p.numel() for p in part.parameters()) for part in (tuner, model))
    total = trained + frozen * (args.method != "full")
    print(f"{args.method}: {trained:,} of {total / 1e6:.2f}M parameters train ({trained / total:.2%})")
    how = "all of it trains, in float32" if args.method == "full" else f"frozen in {str(dtype)[6:]} ({reason})"
    print(f"{args.init} on {model.wte.weight.device}, {how}")
    print(f"{args.data}: {', '.join(f'{name} {len(split):,}' for name, split in rows.items())} rows{template.remark}")

    shown = [row for name in session.tests for row in evenly_spaced(rows[name], 2)][:6]
    models = {"frozen, seeing": None, "frozen, blind": BLIND} if args.act == "hidden" else {"frozen alone": None}
    alone, *_ = models
    before = before or {  # as a checkpoint can hold it
        "scores": {name: {test: tuple(x) for test, x in session.scores(t).items()} for name, t in models.items()},
        "answers": [str(x) for x in answers(model, tokenizer, shown, truncate=args.truncate, template=template)],
    }
    scores = {name: {test: Score(*x) for test, x in column.items()} for name, column in before["scores"].items()}
    written = {alone: before["answers"]}
    tuner.attach(model)
    best = train(model, tuner, session.examples, args, meta, before)

    load_into(tuner, best, folder.best)
    name = f"with {args.method}"
    scores[name] = session.scores(tuner)
    written[name] = answers(model, tokenizer, shown, tuner, truncate=args.truncate, template=template)
    print("", *score_table(scores, session.counts(), "accuracy" if session.labels else "exact match"), sep="\n")
    print("", *before_and_after(shown, written, template), sep="\n")
    size = f"step {best['step']}, {os.path.getsize(folder.best) / 1000:,.0f} kB"
    print(f"saved {folder.best}: what was trained, nothing frozen ({size})")
    if args.scratch:
        if distributed.RANK == 0:  # in fp16: half the bytes, and rounding small beside what training leaves to chance
            save_pretrained(args.out, model, torch.float16)
            copy_tokenizer(find_model(args.init), args.out)
        print(f"saved the model as a Hugging Face folder, too: python train.py --init {shlex.quote(args.out)}")
    else:
        print("try it:", shlex.join(["python", "sample.py", args.out, *as_arguments(shown[0])]))
    distributed.shutdown()
    return {"before": scores[alone], "after": scores[name], "path": folder.best}


if __name__ == "__main__":
    run(main)
