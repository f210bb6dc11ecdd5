"""Ask a tuned model.

    python sample.py out/iapt "the plural of mouse ?" "the past of go ?"            # one instruction or several
    python sample.py out/iapt "tell me the reverse of these words ." --input "cat sun moon"
    python sample.py out/iapt < questions.txt                                       # a line each; without: a dialogue
    python sample.py out/iapt --json < rows.jsonl                                   # rows in JSON, with their answers
    python sample.py out/iapt "the past of go ?" --explain                          # what each soft token reads
    python sample.py --tenant out/iapt "the past of go ?" --tenant out/lora "the plural of mouse ?"     # one batch
A run of --hide-instruction reads an instruction once for all inputs, and can keep what it wrote:
    python sample.py out/summary "Translate to French." --input cheese --input bread --save french.safetensors
    python sample.py out/summary @french.safetensors "Give the plural." --input apple --input mouse

A map of this file: open_model, open_runs; generate, with prefill and sample_token; answer; main.
"""

import contextlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from baselines import build
from baselines.tenants import Tenants
from data import PLAIN, right_pad, text_fingerprint
from data.instructions import load_instruction, read_instructions, recall, save_instruction
from data.questions import Answer, make_batches, print_answers, read_question
from data.template import Template, make_template
from data.tokenizer import Tokenizer
from iapt import IAPT, PaperIAPT
from model import NO_TUNER, Cache, Decoder, Tuner
from plumbing.caches import beam_search, common_prefix, read_prefix
from plumbing.checkpoint import load_checkpoint, load_into, refuse_other_model
from plumbing.cli import Parser, UsageError, add_device_options, at_least, pick_device, run
from plumbing.compiling import check_compiler, compiled_step
from plumbing.decoding import check_room, sample_token
from plumbing.distributed import progress
from plumbing.explain import reading_weights, shade_words
from plumbing.hub import find_model
from plumbing.pretrained import fingerprint, init_weights, load_pretrained, read_config


def open_model(
    init: str, device: str = "cpu", dtype: torch.dtype = torch.float32, scratch: bool = False
) -> tuple[Decoder, Tokenizer]:
    """A frozen decoder and its tokenizer; from scratch, one of its size with random weights."""
    folder = find_model(init)
    if scratch:
        model = init_weights(Decoder(read_config(os.path.join(folder, "config.json")))).to(device, dtype)
    else:
        model = load_pretrained(folder, dtype, device)
    return model.requires_grad_(False), Tokenizer.load(folder)


class Opened(NamedTuple):
    """Runs of train.py, their tuners not attached, and what they were trained on."""

    model: Decoder
    tokenizer: Tokenizer
    template: Template
    tuners: list[Tuner]


def open_runs(
    paths: list[str], init: str | None = None, force: bool = False, device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Opened:  # fmt: skip
    """Open runs, or their checkpoints.  Raises ValueError for one trained on another model, unless force."""
    checkpoints = {path: load_checkpoint(path) for path in paths}
    first = checkpoints[paths[0]]["meta"]
    try:
        model, tokenizer = open_model(init or first["init"], device, dtype)
    except OSError as e:
        if init:
            raise
        place = f"{paths[0]} was trained on --init {first['init']}"
        raise FileNotFoundError(f"{place}: {e} (--init names its place now)") from None
    template, tuners = make_template(first["template"], tokenizer), []
    known = {"base": fingerprint(model), "tokenizer": text_fingerprint(tokenizer, template)}
    for path, content in checkpoints.items():
        meta = content["meta"]
        if meta["template"] != first["template"]:
            raise ValueError(f"{path} has another template than {paths[0]}: ask them one after the other")
        if not force:
            refuse_other_model(path, meta, init or first["init"], known)
        tuners.append(build(meta["method"], model.config, meta["options"], meta["act"]).to(device).eval())
        load_into(tuners[-1], content, path)
    return Opened(model, tokenizer, template, tuners)


@torch.no_grad()
def generate(
    model: Decoder, prompts: list[list[int]], tuner: Tuner | None = None, max_new: int = 64, stop: int | None = None,
    beams: int = 1, length_penalty: float = 1.0, seed: int = 0, step: Callable[[Tensor, Cache], Tensor] | None = None,
    past: Cache | None = None, **sampling: float,
) -> list[list[int]]:  # fmt: skip
    """Continue several prompts at once.  Returns the new tokens, a list per prompt.

    prompts    lists of token ids, of any lengths
    max_new    new tokens a row, at most
    stop       id at which a row ends (it is left out of the result); None: no such id
    beams      width of a beam search, see `beam_search`; 1: none
    step       takes the place of model.step, see plumbing/compiling.py
    past       what the prompts go on from, such as hidden instructions (plumbing/caches.py)
    sampling   temperature, top_k, top_p of `sample_token`
    """
    if not prompts or not all(prompts):
        raise ValueError("an empty prompt: there is nothing to continue")
    before = (tuner or NO_TUNER).first if past is None else int(past.pos.max())
    check_room(before + max(map(len, prompts)), max_new, model.config.block_size)
    if beams < 1 or beams > 1 and sampling.get("temperature"):
        raise ValueError(f"a beam search draws nothing: give {beams} beams or a temperature, not both")
    training = tuner is not None and tuner.training
    tuner = tuner.eval() if training else tuner
    logits, cache = prefill(model, prompts, tuner, max_new, past)
    if training:
        tuner.train()
    step = step or model.step
    if beams > 1:
        return beam_search(step, logits, cache, beams, max_new, stop, length_penalty)
    generator = torch.Generator(logits.device).manual_seed(seed)
    out, done = [[] for _ in prompts], [False] * len(prompts)
    for i in range(max_new):
        new = sample_token(logits, generator=generator, **sampling)
        for row, token in enumerate(new.tolist()):
            done[row] = done[row] or token == stop
            if not done[row]:
                out[row].append(token)
        if all(done) or i == max_new - 1:
            break
        logits = step(new, cache)
    return out


def prefill(
    model: Decoder, prompts: list[list[int]], tuner: Tuner | None, room: int, past: Cache | None = None
) -> tuple[Tensor, Cache]:
    """`model.prefill` of lists of ids.  What they all begin with is read once, if the tuner leaves it as it is.

    past: what they go on from, kept from an earlier question about the same text (`read_prefix`).
    """
    if tuner is not None and (tuner.act == "hidden" or past is not None and tuner.act == "all"):
        raise ValueError("only a tuner that acts on the answer alone can go on here; see read_instructions")
    n = common_prefix(prompts) if len(prompts) > 1 and past is None else 0
    if n >= 16 and tuner is not None and tuner.act == "answer":
        with tuner.silent():
            past = read_prefix(model, prompts[0][:n], len(prompts))
        prompts = [prompt[n:] for prompt in prompts]
    idx, length = right_pad(prompts, model.wte.weight.device)
    return model.prefill(idx, length, tuner, room, past)


def answer(*args, **settings) -> list[str]:
    """`answers` as texts.  Raises the first error among them."""
    found = answers(*args, **settings)
    if errors := [one.error for one in found if one.error]:
        raise errors[0]
    return [one.text for one in found]


def answers(
    model: Decoder, tokenizer: Tokenizer, rows: list[dict | ValueError], tuner: Tuner | None = None, max_new: int = 0,
    truncate: bool = False, template: Template = PLAIN, saved: dict[str, Cache] | None = None, batch_size: int = 32,
    seed: int = 0, **settings,
) -> list[Answer]:  # fmt: skip
    """Answers to rows of instruction and input, each as it is alone; `settings` go to `generate`, greedy by default.

    A row that is an error, or too long, has an error as answer.  Rows of similar length share a batch.

    tuner       attached to the model, but for Tenants, which are attached batch by batch
    max_new     tokens; 0 means 64, or as many as a row has room for
    truncate    make room by shortening prompts
    saved       hidden instructions, by the text in a row that stands for them, such as "@FILE"
    """
    hidden, is_mixed = tuner is not None and tuner.act == "hidden", isinstance(tuner, Tenants)
    how = model.config.block_size - (tuner or NO_TUNER).first, max_new, truncate, hidden, saved or {}, batch_size
    found, batches = make_batches(rows, tokenizer, template, *how)
    if is_mixed and len(batches) > 1 and settings.get("step"):
        raise UsageError("--compile: these tenants make several batches, each of other weights: leave the option out")
    for k, batch in enumerate(progress(batches, "answers", unit="batch", leave=False)):
        places, firsts, prompts, _, (new, *_) = map(list, zip(*batch))
        with tuner.attached(model, places) if is_mixed else contextlib.nullcontext(tuner) as own:
            past = (read_instructions if is_mixed else recall)(model, firsts, own) if hidden else None
            settings |= {"seed": seed + 1_000_003 * k, "past": past}
            ids = generate(model, prompts, None if hidden else own, new, template.end_id(tokenizer), **settings)
        for i, new_ids in zip(places, ids):
            found[i] = Answer(template.answer_text(new_ids, tokenizer, rows[i]), cut=len(new_ids) == new)
    return found


# -- The command line --------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", nargs="?", help="folder of a run, or its best.pt")
    add("prompts", nargs="*", metavar="instruction", help="instructions (default: lines of standard input, a dialogue)")
    add("--input", action="append", default=[], help="what an instruction is about: one for all, or each; many for one")
    add("--save", metavar="FILE", help="keep the soft tokens of a hidden instruction, to be used as @FILE")
    add("--tenant", action="append", nargs="+", default=[], help="a run and what to ask it; several make one batch")
    add("--system", default="", help="a system message before each instruction")
    add("--json", action="store_true", help="a line of JSON for each answer; a question may be a row in JSON, too")
    add("--init", help="the frozen model (default: the one of the training run)")
    add("--frozen", action="store_true", help="leave the tuning out: the frozen model alone")
    add("--batch-size", type=at_least(1), default=32, help="questions at a time")
    add("--max-new", type=at_least(0), default=0, help="most tokens to write (default: 64, or as many as fit)")
    add("--beams", type=at_least(1), default=1, help="width of a beam search; 1 is greedy")
    add("--temperature", type=at_least(0.0), default=0.0, help="0 is greedy")
    add("--top-k", type=at_least(0), default=0, help="sample from the k likeliest tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass")
    add("--seed", type=at_least(0), default=0, help="seed of the sampling")
    add("--explain", action="store_true", help="show what each soft token of IAPT reads of the instruction")
    add("--compile", action="store_true", help="torch.compile the decode step: for long or many answers")
    add("--force", action="store_true", help="use the tuning even on a model that it was not trained for")
    add_device_options(parser)
    args = parser.parse_intermixed_args(argv)
    if bool(args.tenant) == bool(args.run):
        parser.error("give a run, or several with --tenant RUN INSTRUCTION ...")
    if args.tenant:
        args.prompts = [prompt for _, *prompts in args.tenant for prompt in prompts]
        if args.frozen or min(map(len, args.tenant)) < 2:
            parser.error("--tenant wants a run and at least one instruction, and goes without --frozen")
    if len(args.prompts) == 1 and len(args.input) > 1 and not args.tenant:
        args.prompts *= len(args.input)
    if len(args.input) not in (0, 1, len(args.prompts)):
        parser.error(f"{len(args.input)} --input for {len(args.prompts)} instructions: give one for all, or one each")
    if args.json and (args.explain or args.save):
        parser.error("--json goes without --explain and without --save: their lines are no JSON")
    if args.beams > 1 and args.temperature:
        parser.error("--beams goes without --temperature")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top-p must be above 0 and at most 1, got {args.top_p}")
    return args


def main(argv: list[str] | None = None):
    args = parse(argv)
    device, dtype, _ = pick_device(args.device, args.dtype)
    if args.compile:
        check_compiler(device)
    tenants = args.tenant or [[args.run, *args.prompts]]
    paths = list(dict.fromkeys(path for path, *_ in tenants))
    model, tokenizer, template, tuners = open_runs(paths, args.init, args.force, device, dtype)
    tuner = None if args.frozen else tuners[0]
    if args.tenant:
        tenant_of_row = [paths.index(path) for path, *prompts in tenants for _ in prompts]
        tuner = Tenants(tuners, tenant_of_row).to(device)
    elif tuner is not None:
        tuner.attach(model)
    hidden = tuner is not None and tuner.act == "hidden"
    saved = any(text.startswith("@") and (hidden or os.path.exists(text[1:])) for text in args.prompts)
    if args.explain and (not isinstance(tuner, (IAPT, PaperIAPT)) or saved):
        raise UsageError(
            "--explain shows what IAPT's soft tokens read: it wants one run of iapt, no --frozen, no @FILE"
        )
    if (args.save or saved) and (not hidden or args.tenant or args.save and len(set(args.prompts)) != 1):
        raise UsageError("--save (one instruction) and @FILE are for one run of --hide-instruction, without --frozen")
    settings = {name: getattr(args, name) for name in "batch_size max_new seed beams temperature top_k top_p".split()}
    settings |= {"template": template, "step": compiled_step(model) if args.compile else None}

    def ask(texts: list[str]) -> bool:
        """Print an answer to each question, with --explain after what was read for it.  Whether all have one."""
        inputs = args.input * len(texts) if len(args.input) == 1 else args.input or [""] * len(texts)
        records, rows = zip(*(read_question(*question, args.system, args.json) for question in zip(texts, inputs)))
        caches = {text: load_instruction(text[1:], model, tuner) for text in {*texts} if hidden and text[:1] == "@"}
        if args.save:
            first, _ = template.split_ids({**rows[0], "input": "any"}, tokenizer)
            save_instruction(args.save, recall(model, [caches.get(texts[0], first)], tuner), model, tuner)
            print(f"saved {args.save}: soft tokens of the instruction, to be kept as safely as its text")
            if not args.input:
                return True
        found = answers(model, tokenizer, rows, tuner, saved=caches, **settings)
        return print_answers(records, rows, found, args.json, args.explain and explain)

    def explain(row: dict) -> Iterator[str]:
        prompt = next(filter(None, template.parts(row, tokenizer, hidden)))
        return shade_words(tokenizer.words(prompt), reading_weights(model, tuner, prompt), sys.stdout.isatty())

    if args.prompts or not sys.stdin.isatty():
        lines = args.prompts or [line for line in (line.strip("\ufeff\r\n\t ") for line in sys.stdin) if line]
        if not lines:
            raise ValueError("nothing to answer: standard input is empty")
        return ask(lines) or sys.exit(1)
    print("Type an instruction, then Enter; Ctrl-D ends.")
    while True:
        try:
            if text := input("> ").strip():
                ask([text])
        except ValueError as e:  # a file that is no instruction, say: no reason to leave
            print(f"error: {e}")
        except (EOFError, KeyboardInterrupt):
            return print()


if __name__ == "__main__":
    run(main)
