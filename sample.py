"""Ask a tuned model.

python sample.py out/iapt/best.pt "what is the capital of peru ?"               # greedy
python sample.py out/iapt/best.pt "the plural of mouse ?" "the past of go ?"    # several, in one batch
python sample.py out/iapt/best.pt "tell me the reverse of these words ." --input "cat sun moon"
python sample.py out/iapt/best.pt < questions.txt                               # a line each
python sample.py out/iapt/best.pt                                               # ask, read, ask again
python sample.py out/iapt "the past of go ?" --explain                          # what each soft token reads
python sample.py --tenant out/iapt "the past of go ?" --tenant out/lora "the plural of mouse ?"     # one batch
"""

import math
import sys
from argparse import Namespace
from collections.abc import Iterator

import torch
from torch import Tensor

import weights
from baselines import build
from checkpoint import fill, load_tuner
from cli import Parser, UsageError, run
from data import Tokenizer, template
from iapt import IAPT, Tuner
from model import Decoder, compiled_step
from tenants import Tenants
from train import answer, open_model, pick_device


def parse(argv: list[str] | None = None) -> Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="best.pt of a run, or the run's folder")
    add(
        "prompts",
        nargs="*",
        metavar="instruction",
        help="instructions (default: lines of standard input, or a dialogue)",
    )
    add(
        "--input",
        action="append",
        default=[],
        help="what an instruction is about; once for all instructions, or once for each",
    )
    add(
        "--tenant",
        action="append",
        nargs="+",
        default=[],
        metavar=("CHECKPOINT", "INSTRUCTION"),
        help="a checkpoint and what to ask it; several of these make one batch",
    )
    add("--init", help="the frozen model (default: the one of the training run)")
    add("--frozen", action="store_true", help="leave the tuning out: the frozen model alone")
    add("--max-new", type=int, default=0, help="most tokens to write (default: 64, or as many as fit)")
    add("--beams", type=int, default=1, help="width of a beam search; 1 is greedy (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int, default=0, help="sample from the k likeliest tokens; 0: all (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    add(
        "--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="of the frozen weights (default: %(default)s)"
    )
    add("--explain", action="store_true", help="show what each soft token of IAPT reads of the instruction")
    add("--compile", action="store_true", help="torch.compile the decode step: for long or many answers")
    add("--force", action="store_true", help="use the tuning even on a model that it was not trained for")
    args = parser.parse_args(argv)
    if bool(args.tenant) == bool(args.checkpoint):
        parser.error("give a checkpoint, or several with --tenant CHECKPOINT INSTRUCTION ...")
    if args.tenant and (args.frozen or min(map(len, args.tenant)) < 2):
        parser.error("--tenant wants a checkpoint and at least one instruction, and goes without --frozen")
    if args.tenant:
        args.prompts = [prompt for _, *prompts in args.tenant for prompt in prompts]
    if len(args.input) not in (0, 1, len(args.prompts)):
        parser.error(
            f"{len(args.input)} --input for {len(args.prompts)} instructions: give one for all, or one for each"
        )
    if args.beams < 1 or args.beams > 1 and args.temperature:
        parser.error("--beams is at least 1, and goes without --temperature")
    if min(args.max_new, args.top_k, args.seed) < 0 or not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        parser.error("--max-new, --temperature, --top-k and --seed are at least 0, --top-p above 0 and at most 1")
    return args


def open_checkpoints(
    paths: list[str],
    init: str | None = None,
    force: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Decoder, Tokenizer, list[Tuner]]:
    """(model, tokenizer, tuners) of checkpoints of train.py, not attached.

    Raises ValueError for one that was trained on another model.
    """
    contents = {path: load_tuner(path) for path in paths}
    init = init or contents[paths[0]]["meta"]["init"]
    model, tokenizer = open_model(init, (), device, dtype)
    found, tuners = weights.fingerprint(model), []
    for path in paths:
        content, meta = contents[path], contents[path]["meta"]
        if found != meta["base"] and not force:
            raise ValueError(
                f"{path} was trained on {meta['init']} ({meta['base']}); {init} is another model ({found}):"
                " name the right one with --init, or --force it"
            )
        tuners.append(build(meta["method"], model.config, meta["options"]).to(device).eval())
        fill(tuners[-1], content, path)
    return model, tokenizer, tuners


SHADES = ((0.4, "48;5;25;38;5;231"), (0.2, "48;5;68;38;5;231"), (0.1, "48;5;111;38;5;16"), (0.05, "48;5;153;38;5;16"))


@torch.no_grad()
def entering(model: Decoder, tuner: IAPT, idx: Tensor, instr: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each layer's generator is given, x (B, T, C) and instr (B, T), as the model reads idx (B, T)."""
    given = []
    hooks = [g.register_forward_pre_hook(lambda _, args: given.append(args)) for g in tuner.generators]
    model.hidden(idx, instr, tuner)
    for hook in hooks:
        hook.remove()
    return given


@torch.no_grad()
def reads(model: Decoder, tokenizer: Tokenizer, tuner: IAPT, prompt: list[int]) -> tuple[list[str], Tensor]:
    """The T words of a prompt (ids), and how much each soft token of each layer reads of each: (L, P, T).

    P is 1 where all soft tokens of a layer read the same.
    """
    idx = torch.tensor([prompt], device=model.wte.weight.device)
    given = entering(model, tuner, idx, torch.ones_like(idx, dtype=torch.bool))
    weights = [g.reads(*args)[1][0] for g, args in zip(tuner.generators, given)]
    return [tokenizer.decode([i]).replace("\n", "\\n") for i in prompt], torch.stack(weights)


def explain(words: list[str], weights: Tensor, color: bool) -> Iterator[str]:
    """What each soft token reads, weights (L, P, T), as lines of text: the words, darker where the weight is larger.

    Without color the words with a weight of a twentieth or more, and their weights.
    """
    for l, layer in enumerate(weights, 1):
        for p, row in enumerate(layer.tolist(), 1):
            if color:
                shades = [next((shade for least, shade in SHADES if w >= least), "0") for w in row]
                text = "".join(f"\x1b[{shade}m{word}\x1b[0m" for word, shade in zip(words, shades))
            else:
                most = sorted(zip(row, words), reverse=True)
                text = "  ".join(f"{word.strip()} {w:.2f}" for w, word in most if w >= SHADES[-1][0])
            yield f"layer {l:2}, token {p}:  {text}"


def main(argv: list[str] | None = None):
    """The command."""
    args = parse(argv)
    device, dtype, _ = pick_device(args.device, args.dtype)
    tenants = args.tenant or [[args.checkpoint, *args.prompts]]
    paths = list(dict.fromkeys(path for path, *_ in tenants))
    model, tokenizer, tuners = open_checkpoints(paths, args.init, args.force, device, dtype)
    tuner = None if args.frozen else tuners[0]
    if args.tenant:
        who = [paths.index(path) for path, *prompts in tenants for _ in prompts]
        tuner = Tenants(tuners, who).to(device)
    if args.explain and not isinstance(tuner, IAPT):
        raise UsageError("--explain shows what IAPT's soft tokens read: it wants a checkpoint of iapt")
    if tuner is not None:
        tuner.attach(model)
    if args.compile:
        model.step = compiled_step(model)

    def ask(instructions):
        """Lines to print: an answer to each instruction, with --explain after what was read for it."""
        inputs = args.input * len(instructions) if len(args.input) == 1 else args.input or [""] * len(instructions)
        rows = [{"instruction": text, "input": given} for text, given in zip(instructions, inputs)]
        how = dict(seed=args.seed, beams=args.beams, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
        for row, text in zip(rows, answer(model, tokenizer, rows, tuner, args.max_new, **how)):
            if args.explain:
                yield from explain(
                    *reads(model, tokenizer, tuner, tokenizer.prompt(template(row))), sys.stdout.isatty()
                )
            yield " ".join(text.split())

    if args.prompts or not sys.stdin.isatty():
        asked = args.prompts or [line.strip() for line in sys.stdin if line.strip()]
        if not asked:
            raise ValueError("nothing to answer: standard input is empty")
        print(*ask(asked), sep="\n")
        return
    print("Type an instruction, then Enter; Ctrl-D ends.")
    while True:
        try:
            text = input("> ").strip()
            if text:
                print(*ask([text]))
        except ValueError as e:  # too long a question, say: no reason to leave
            print(f"error: {e}")
        except (EOFError, KeyboardInterrupt):
            print()
            return


if __name__ == "__main__":
    run(main)
