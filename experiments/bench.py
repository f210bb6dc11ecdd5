"""Benchmarks: what a training step and answers cost.

    python -m experiments.bench step            # a training step of each method, beside those of peft
    python -m experiments.bench serve           # many tenants in one batch, method by method
    python -m experiments.bench first           # the first token, of tenants that ask about one prompt
    python -m experiments.bench hidden          # one instruction, many inputs: its text in the cache, or soft tokens
    python -m experiments.bench generate        # answers, beside those of transformers and peft
    python -m experiments.bench gpu             # what is to be known of a GPU, in one go: GPU below
    python -m experiments.bench step --shapes llama-7B --methods iapt,lora --checkpoint --no-hub

Each prints a table and writes it to --out, as Markdown and as JSON.  Models are random, of the shapes in SHAPES: speed
does not depend on the weights.  transformers and peft are among the rivals where they are installed.

A machine's speed changes from second to second.  So rivals run in turn, in one process, and a figure is the median,
with the quartiles, of the ratio to another rival in the same round.
"""

import functools
import gc
import itertools
import os
import platform
import shlex
import statistics
import sys
import time
from argparse import ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from baselines import METHODS, build
from baselines.hooks import Hooked
from baselines.tenants import Tenants
from data import Batch
from data.instructions import read_instructions
from data.reads import Reads
from experiments.report import markdown
from model import NO_TUNER, Cache, Config, Decoder, Tuner
from plumbing.caches import change_rows, read_prefix
from plumbing.cli import Parser, add_device_options, at_least, pick_device, run
from plumbing.compiling import compile_parts, compiled_step
from plumbing.files import replacing, write_json
from plumbing.hub import find_model
from plumbing.pretrained import load_pretrained, write_config
from sample import generate, prefill
from train import batch_loss

# -- Timing ------------------------------------------------------------------------------------------------------------


def machine(device: str = "auto") -> str:
    """What figures of speed and memory depend on: the version of PyTorch, and the GPU or the CPU."""
    if device != "cpu" and torch.cuda.is_available():
        return f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}"
    name = platform.processor() or "a CPU"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    return f"PyTorch {torch.__version__}, {os.cpu_count()} cores of {name}"


def now(device: str) -> float:
    """Seconds on a clock, when the device has finished all its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(f: Callable, device: str) -> Callable[[], float]:
    """f as a function that calls it and returns the seconds that this took."""

    def seconds():
        begin = now(device)
        f()
        return now(device) - begin

    return seconds


def interleaved(rivals: dict[str, Callable], rounds: int, title: str) -> dict[str, list]:
    """Call each of {name: f} once to warm up, then all in turn: {name: what f returned in each round}."""
    results = {name: [] for name in rivals}
    for i in tqdm(range(rounds + 1), desc=title, unit="round", leave=False):
        for name, f in rivals.items():
            result = f()
            if i:
                results[name].append(result)
    return results


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> list[float]:
    """[median, lower, upper quartile] of the time of `name` as a multiple of that of `base`."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[base])]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return [middle, low, high]


def peak_memory(f: Callable, device: str) -> dict[str, str]:
    """On a GPU, two cells of a table: the memory at the peak of a call of f, and how much of it the call has allocated.

    The rest is that of the models of all rivals, and what each of them trains.
    """
    if not device.startswith("cuda"):
        return {}
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    f()
    peak = torch.cuda.max_memory_allocated(device)
    return {"peak MB": f"{peak / 1e6:,.0f}", "added MB": f"{(peak - before) / 1e6:,.0f}"}


def kept_bytes(forward: Callable[[], Tensor], without: Iterable[Tensor]) -> int:
    """Bytes that `forward` keeps for the backward pass, without the memory of some tensors: weights."""
    kept, others = {}, {x.untyped_storage().data_ptr() for x in without}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = forward()
    del y  # only now: what is kept must not be freed, and its place used again, before all is counted
    return sum(size for place, size in kept.items() if place not in others)


def compare(rivals: dict[str, Callable], bases: dict[str, str], tokens: int, title: str, args: Namespace) -> dict:
    """Of {name: f that returns seconds}, {name: cells of a table}: times as multiples, tokens per second, memory.

    bases {column: name} are the rivals to compare with, if they take part.
    """
    seconds = interleaved(rivals, args.rounds, title)
    bases = {column: base for column, base in bases.items() if base in rivals}
    cells = {name: {column: ratio(seconds, name, base) for column, base in bases.items()} for name in rivals}
    for name, f in rivals.items():
        cells[name]["tokens/s"] = f"{tokens / statistics.median(seconds[name]):,.0f}"
        cells[name] |= peak_memory(f, args.device)
    return cells


def report(args: Namespace, rows: list[dict]):
    """Print rows (dicts of the same keys) as a Markdown table, and save both."""

    def text(cell):
        return "{:.2f} ({:.2f} to {:.2f})".format(*cell) if isinstance(cell, list) else str(cell)

    about = {"command": f"python -m experiments.bench {args.argv}", "machine": machine(args.device)}
    about["threads"] = torch.get_num_threads()
    lines = [*markdown([*rows[0]], (map(text, row.values()) for row in rows))]
    lines += ["", f"Ratios of times: median (quartiles) of {args.rounds} rounds."]
    lines += [f"`{about['command']}`: {about['machine']}, {about['threads']} CPU threads."]
    path = os.path.join(args.out, args.command)
    write_json(f"{path}.json", {**about, "rows": rows}, indent=1)
    with replacing(f"{path}.md") as f:
        f.write("\n".join(lines) + "\n")
    print("\n".join(lines))


# -- Models ------------------------------------------------------------------------------------------------------------

SHAPES = {
    "gpt2-6x384": dict(vocab_size=50257, n_layer=6, n_head=6, n_embd=384),
    "llama-6x288": dict(arch="llama", vocab_size=32000, n_layer=6, n_head=6, n_embd=288, n_inner=768),
    "gpt2-124M": dict(vocab_size=50257),
    "smollm2-135M": dict(arch="llama", vocab_size=49152, block_size=8192, n_layer=30, n_head=9, n_kv_head=3, n_embd=576,
                         n_inner=1536),
    "llama-7B": dict(arch="llama", vocab_size=32000, block_size=4096, n_layer=32, n_head=32, n_embd=4096, n_inner=11008,
                     tied=False),
}  # fmt: skip


def our_model(name: str, args: Namespace) -> Decoder:
    """A frozen model: random, of one of SHAPES, or with the weights of a folder or of a name on the hub."""
    gc.collect()  # what an earlier model has left
    torch.compiler.reset()  # else a second shape is compiled for all sizes, and slower
    if name not in SHAPES:
        return load_pretrained(find_model(name), args.dtype, args.device).requires_grad_(False)
    torch.set_default_dtype(args.dtype)  # never all weights in fp32 first
    try:
        with torch.device(args.device):
            return Decoder(Config(**SHAPES[name])).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def random_tuner(method: str, model: Decoder, options: Iterable[str] = (), act: str = "all") -> Tuner:
    """A method's tuner at its start, on the model's device."""
    with torch.device(model.wte.weight.device):
        tuner = build(method, model.config, options, act)
    tuner.start(model)
    return tuner


@contextmanager
def attached(tuner: Tuner, model: Decoder) -> Iterator[None]:
    """A tuner is attached to the model, and then no longer: others share it."""
    tuner.attach(model)
    yield
    tuner.detach()


def hub_model(name: str, args: Namespace) -> nn.Module:
    """The same in transformers, without dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if name not in SHAPES:
        return AutoModelForCausalLM.from_pretrained(find_model(name), dtype=args.dtype).to(args.device).eval()
    config = AutoConfig.for_model(**write_config(Config(**SHAPES[name])))
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(config, dtype=args.dtype).eval()


def hub_lora(config: Config, **more):
    """peft's settings of a LoRA like ours: rank 8 on q and v (in GPT-2 one layer makes q, k and v)."""
    from peft import LoraConfig

    fused = config.arch == "gpt2"
    names = ["c_attn"] if fused else ["q_proj", "v_proj"]
    return LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=names, fan_in_fan_out=fused, **more)


# -- A training step ---------------------------------------------------------------------------------------------------

FLOOR = "floor: forward, backward for activations"


class Floor(Tuner):
    """What no method that tunes the first layer can be cheaper than: forward, and backward for activations alone."""

    def __init__(self, config: Config):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(config.n_embd))

    def around_blocks(self, model: Decoder, x: Tensor, rope: tuple | None, instr: Tensor, cache: None) -> Tensor:
        return super().around_blocks(model, x + self.zero.to(x.dtype), rope, instr, cache)


class TrainingStep:
    """Forward pass (`loss`), backward pass and AdamW, for a module that is a model or, given one, a tuner of it."""

    def __init__(self, module: nn.Module, loss: Callable[[], Tensor], model: Decoder | None = None):
        self.module, self.loss = module, loss
        self.weights = [*module.parameters(), *(model.parameters() if model else ())]
        self.attached = functools.partial(attached, module, model) if model else nullcontext
        parameters = [p for p in module.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in parameters)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def __call__(self):
        self.optimizer.zero_grad()
        with self.attached():
            self.loss().backward()
        self.optimizer.step()

    def kept(self) -> int:
        """Bytes that the forward pass keeps for the backward pass, without weights."""
        with self.attached():
            return kept_bytes(self.loss, self.weights)


def bench_step(args: Namespace, name: str, model: Decoder) -> Iterator[dict]:
    """A training step of each method.  Half of the tokens are instruction, or all but --answer.  kept: for backward."""
    model.checkpointing = args.checkpoint
    idx = torch.randint(model.config.vocab_size, (args.rows, args.tokens), device=args.device)
    steps = {FLOOR: our_step(model, Floor(model.config).to(idx.device), idx, args.answer)}
    steps |= our_steps(model, idx, args.methods, answer=args.answer)
    if args.compile:
        twin = our_model(name, args)  # a part is compiled in place
        twin.checkpointing = args.checkpoint
        steps |= our_steps(twin, idx, args.methods, True, args.answer)
    if args.hub:
        steps |= hub_steps(name, model.config, idx, args)
    rivals = {label: timed(step, args.device) for label, step in steps.items()}
    bases = {"time, of the floor's": FLOOR, "time, of IAPT's": "ours: iapt"}
    for label, cells in compare(rivals, bases, idx.numel(), name, args).items():
        row = {"shape": f"{name}, {args.rows} x {args.tokens}, answer {args.answer or args.tokens // 2}", "step": label}
        row |= {"trained": f"{steps[label].trained:,}", "kept MB": f"{steps[label].kept() / 1e6:,.0f}"}
        yield row | cells


def targets_of(idx: Tensor, answer: int = 0) -> tuple[Tensor, Tensor]:
    """Targets and instr, both (B, T), of tokens idx (B, T), of which the last `answer` are that (0: half of them)."""
    T = idx.shape[1]
    place, prompt = torch.arange(T, device=idx.device), T - (answer or T - T // 2)
    targets = torch.where((place >= prompt - 1) & (place < T - 1), idx.roll(-1, 1), -1)
    return targets, (place < prompt).expand(idx.shape)


def our_step(model: Decoder, tuner: Tuner, idx: Tensor, answer: int = 0, kept: bool = False) -> TrainingStep:
    """A step of train.py's loss; kept: prompts have been read before."""
    targets, instr = targets_of(idx, answer)
    batch = Batch(idx, targets, instr)
    reads = Reads(model, tuner) if kept else None

    return TrainingStep(tuner, lambda: batch_loss(model, tuner, batch, reads), model)


WAYS = {"": ("all", False), ", acting on the answer": ("answer", False), "..., prompts kept": ("answer", True)}


def our_steps(
    model: Decoder, idx: Tensor, methods: list[str], compiled: bool = False, answer: int = 0
) -> dict[str, TrainingStep]:
    """{label: step} of methods of ours, which share the model; compiled: as `train.py --compile` does it.

    Given the number of tokens of the answer, also of methods that act on them alone.
    """
    steps = {}
    for method, (way, (act, kept)) in itertools.product(methods, list(WAYS.items())[: 3 if answer else 1]):
        if act not in METHODS[method].acts:
            continue
        tuner = random_tuner(method, model, act=act)
        if compiled:
            with attached(tuner, model):
                compile_parts(model, tuner)
        label = f"ours: {method}{', in fp32' * (method == 'full')}{way}{', compiled' * compiled}"
        steps[label] = our_step(model, tuner, idx, answer, kept)
    return steps


def hub_steps(name: str, config: Config, idx: Tensor, args: Namespace) -> dict[str, TrainingStep]:
    """{label: step} of peft's prefix-tuning and LoRA."""
    import peft

    targets, _ = targets_of(idx)
    labels = F.pad(targets, (1, 0), value=-1)[:, :-1]  # transformers shifts them back
    inputs = {"input_ids": idx, "attention_mask": torch.ones_like(idx), "labels": labels.masked_fill(labels < 0, -100)}
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16)
    steps = {}
    for label, settings in (("peft: prefix-tuning", prefix), ("peft: LoRA", hub_lora(config))):
        tuned = peft.get_peft_model(hub_model(name, args), settings)
        steps[label] = TrainingStep(tuned, lambda tuned=tuned: tuned(**inputs).loss)
    return steps


# -- Many tenants ------------------------------------------------------------------------------------------------------

SERVED = {  # label: method and options
    "iapt": ("iapt", []),
    "ptuning2 P=16": ("ptuning2", ["P=16"]),
    "lora r=8 on q, v": ("lora", []),
    "lora r=64 on all": ("lora", ["r=64", "on=all"]),
}


def serve(
    model: Decoder, prompts: list[list[int]], tuner: Tuner, new: int, past: Cache | None = None
) -> tuple[float, float, int]:
    """Read prompts, write `new` tokens for each: seconds until the first, seconds of the others, bytes of the cache."""
    with attached(tuner, model):
        device = str(model.wte.weight.device)
        begin = now(device)
        logits, cache = prefill(model, prompts, None if tuner is NO_TUNER else tuner, new, past)
        middle = now(device)
        for _ in range(new - 1):
            logits = model.step(logits.argmax(-1), cache)
        end = now(device)
    soft = [soft for layer in cache.layers for soft in layer if soft is not None]
    return middle - begin, end - middle, sum(x.numel() * x.element_size() for s in soft for x in (s.k, s.v))


def random_tenants(
    method: str, options: list[str], model: Decoder, tenant_of_row: list[int], act: str = "all"
) -> Tenants:
    """A tenant of one method for each number in tenant_of_row (B,)."""
    tuners = [random_tuner(method, model, options, act).eval() for _ in set(tenant_of_row)]
    return Tenants(tuners, tenant_of_row).to(model.wte.weight.device)


def bench_serve(args: Namespace, name: str, model: Decoder) -> Iterator[dict]:
    """Many tenants in one batch, by method, beside the frozen model."""
    for n, T, new in itertools.product(args.tenants, args.tokens, args.new):
        tenant_of_row = [i % n for i in range(max(args.rows, n))]
        B = len(tenant_of_row)
        prompts = torch.randint(model.config.vocab_size, (B, T)).tolist()
        tuners = {"frozen": NO_TUNER}
        tuners |= {label: random_tenants(*spec, model, tenant_of_row) for label, spec in SERVED.items()}
        rivals = {label: functools.partial(serve, model, prompts, tuner, new) for label, tuner in tuners.items()}
        results = interleaved(rivals, args.rounds, f"{name}, {n} tenants")
        decode = {label: [later for _, later, _ in rounds] for label, rounds in results.items()}
        total = {label: [first + later for first, later, _ in rounds] for label, rounds in results.items()}
        for label, tuner in tuners.items():
            row = {"shape": name, "rows": B, "tenants": n, "prompt": T, "new": new, "method": label}
            row["decode, of the frozen model's"] = ratio(decode, label, "frozen")
            row["all, of the frozen model's"] = ratio(total, label, "frozen")
            row["all, of iapt's"] = ratio(total, label, "iapt")
            row["tokens/s"] = f"{B * new / statistics.median(total[label]):,.0f}"
            row["kB a tenant"] = f"{sum(p.numel() for p in tuner.parameters()) * 4 / 1000 / n:,.0f}"
            yield row | peak_memory(rivals[label], args.device)


# -- The first token ---------------------------------------------------------------------------------------------------


def bench_first(args: Namespace, name: str, model: Decoder) -> Iterator[dict]:
    """The first token of an answer, of tenants that ask about one prompt, and act on the answer alone."""
    prompt = torch.randint(model.config.vocab_size, (args.tokens,)).tolist()
    past = read_prefix(model, prompt[:-1], 1)
    rivals = {}
    for method, n in itertools.product(args.methods, args.tenants):
        tenants = random_tenants(method, [], model, list(range(n)), act="answer")
        rivals[f"{method}, {n} tenants"] = functools.partial(first_token, model, tenants, [prompt] * n)
    for method in args.methods:
        tenants = random_tenants(method, [], model, [0], act="answer")
        rivals[f"{method}, another tenant"] = functools.partial(first_token, model, tenants, [prompt[-1:]], past)
    if args.hub:
        rivals["peft: activated LoRA, another tenant"] = hub_first_token(name, model.config, prompt, args)
    seconds = interleaved(rivals, args.rounds, name)
    base = f"{args.methods[0]}, {args.tenants[0]} tenants"
    for label in rivals:
        row = {"shape": name, "prompt": args.tokens, "asks": label, f"time, of {base}'": ratio(seconds, label, base)}
        yield row | {"ms": f"{1000 * statistics.median(seconds[label]):,.0f}"}


def first_token(model: Decoder, tenants: Tenants, prompts: list[list[int]], past: Cache | None = None) -> float:
    """Seconds until the first tokens of answers to prompts are known, which go on from `past`."""
    device = str(model.wte.weight.device)
    with attached(tenants, model):
        begin = now(device)
        prefill(model, prompts, tenants, 1, past)
        return now(device) - begin


def hub_first_token(name: str, config: Config, prompt: list[int], args: Namespace) -> Callable[[], float]:
    """The same of peft's activated LoRA (arXiv 2504.12397), of which another tenant goes on from the prompt's cache."""
    import peft

    settings = hub_lora(config, alora_invocation_tokens=prompt[-1:])  # it acts from the prompt's last token on
    tuned = peft.get_peft_model(hub_model(name, args), settings, adapter_name="0").eval()
    tuned.add_adapter("1", settings)
    idx = torch.tensor([prompt], device=args.device)
    with torch.no_grad(), tuned.disable_adapter():
        cache = tuned(input_ids=idx[:, :-1]).past_key_values
    turns = itertools.cycle("01")

    @torch.no_grad()
    def first_token() -> float:
        begin = now(args.device)
        tuned.set_adapter(next(turns))
        tuned(input_ids=idx[:, -1:], past_key_values=cache)
        seconds = now(args.device) - begin
        cache.crop(-1)
        return seconds

    return first_token


# -- A hidden instruction ----------------------------------------------------------------------------------------------


def bench_hidden(args: Namespace, name: str, model: Decoder) -> Iterator[dict]:
    """Many inputs of one instruction: its text in the cache, read once or for each, or soft tokens in its place."""
    words = lambda n: torch.randint(model.config.vocab_size, (n,)).tolist()
    for T, B in itertools.product(args.tokens, args.inputs):
        instruction, inputs = words(T), [words(args.input) for _ in range(B)]
        pasts = {"text, read once": read_prefix(model, instruction, B)}
        for P in args.P:
            tuner = random_tuner("summary", model, [f"P={P}", "m=1"], "hidden")
            pasts[f"{P} soft tokens"] = read_instructions(model, [instruction], tuner)
            change_rows(pasts[f"{P} soft tokens"], lambda x, B=B: x.expand(B, *x.shape[1:]))
        rivals = {
            label: functools.partial(serve, model, inputs, NO_TUNER, args.new, past) for label, past in pasts.items()
        }
        if B * T <= args.most:
            whole = [instruction + text for text in inputs]
            rivals["text, read for each"] = functools.partial(serve, model, whole, NO_TUNER, args.new)
        results = interleaved(rivals, args.rounds, f"{name}, {T} tokens, {B} inputs")
        first, decode = ({label: [s[i] for s in rounds] for label, rounds in results.items()} for i in (0, 1))
        for label in rivals:
            row = {"shape": name, "instruction": T, "inputs": B, "instruction as": label}
            row["first token, of text read once"] = ratio(first, label, "text, read once")
            row["decode, of text read once"] = ratio(decode, label, "text, read once")
            row["tokens/s"] = f"{B * (args.new - 1) / statistics.median(decode[label]):,.0f}"
            yield row | {"cache MB": f"{results[label][0][2] / 1e6:,.1f}"}


# -- Answers -----------------------------------------------------------------------------------------------------------


def bench_generate(args: Namespace, name: str, model: Decoder) -> Iterator[dict]:
    """Greedy answers, ours and those of transformers and peft: of the frozen model, and with a tenant in each row."""
    idx = torch.randint(model.config.vocab_size, (args.rows, args.tokens), device=args.device)
    rivals = our_answers(name, model, idx, args)
    if args.hub:
        rivals |= hub_answers(name, model.config, idx, args)
    rivals = {label: timed(f, args.device) for label, f in rivals.items()}
    bases = {"time, of transformers'": "transformers", "time, of our frozen model's": "ours: frozen"}
    common = {"shape": name, "rows": args.rows, "prompt": args.tokens, "new": args.new}
    for label, cells in compare(rivals, bases, args.rows * args.new, name, args).items():
        yield {**common, "answers": label, **cells}


def our_answers(name: str, model: Decoder, idx: Tensor, args: Namespace) -> dict[str, Callable]:
    """{label: f}: each method, with the plain and with the compiled decode step."""
    rivals = {}
    for method in args.methods:
        own, tuner = model, NO_TUNER
        if method != "frozen":
            if issubclass(METHODS[method], Hooked):  # a compiled step contains the hooks that it was compiled with
                own = our_model(name, args)
            tuner = random_tenants(method, [], own, list(range(args.rows)))
            tuner.attach(own)
        f = functools.partial(generate, own, idx.tolist(), tuner, args.new)
        rivals[f"ours: {method}"] = f
        rivals[f"ours: {method}, step compiled"] = functools.partial(f, step=compiled_step(own))
    return rivals


def hub_answers(name: str, config: Config, idx: Tensor, args: Namespace) -> dict[str, Callable]:
    """{label: f}: the frozen model in transformers and, if lora is among the methods, peft's with an adapter a row."""
    import peft

    settings = {"max_new_tokens": args.new, "min_new_tokens": args.new, "do_sample": False, "pad_token_id": 0}
    settings |= {"input_ids": idx, "attention_mask": torch.ones_like(idx)}
    rivals = {"transformers": functools.partial(hub_model(name, args).generate, **settings)}
    if "lora" in args.methods:
        adapters = [f"tenant{i}" for i in range(args.rows)]
        tuned = peft.get_peft_model(hub_model(name, args), hub_lora(config), adapter_name=adapters[0])
        for adapter in adapters[1:]:
            tuned.add_adapter(adapter, hub_lora(config))
        rivals["peft: lora"] = functools.partial(tuned.eval().generate, adapter_names=adapters, **settings)
    return rivals


# -- The command line --------------------------------------------------------------------------------------------------


def among(names: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of an option that takes some of these names, separated by commas."""

    def parse_names(text):
        for name in text.split(","):
            if name not in names:
                raise ArgumentTypeError(f"there is no {name!r}. There are: {', '.join(names)}")
        return text.split(",")

    return parse_names


def parse(argv: list[str]) -> Namespace:
    parser = Parser(description=__doc__)
    commands, add = parser.add_subparsers(dest="command", required=True), {}
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.__doc__, description=benchmark.__doc__)
        add[name] = command.add_argument
        add[name]("--rounds", type=at_least(1), help="rounds of timing (default: 15, on a GPU 5)")
        add[name]("--out", default="out/bench", help="folder for the table")
        add_device_options(command)
        shapes = "gpt2-6x384,llama-6x288" if name == "step" else "llama-6x288"
        add[name]("--shapes", type=among(SHAPES), default=shapes, help=f"random models: {', '.join(SHAPES)}")
        add[name]("--init", help="a folder or a name on the hub, in place of --shapes")
        add[name]("--rows", type=at_least(1), default=8, help="rows of a batch")
    step, serve, first, hidden, generate = (add[name] for name in BENCHMARKS)
    gpu = commands.add_parser("gpu", help="what is to be known of a GPU, in one go", description=bench_gpu.__doc__)
    gpu.add_argument("--device", default="cuda", help="cuda, cuda:1, ...")
    gpu.add_argument("--out", default="out/bench/gpu", help="folder for the tables")
    hidden("--tokens", type=at_least(2), nargs="+", default=[32, 128, 512, 2048], help="tokens of the instruction")
    hidden("--inputs", type=at_least(1), nargs="+", default=[1, 8, 64], help="inputs of a batch")
    hidden("--input", type=at_least(1), default=32, help="tokens of an input")
    hidden("--P", type=at_least(1), nargs="+", default=[4, 12], help="soft tokens in the instruction's place")
    hidden("--new", type=at_least(2), default=16, help="tokens to write")
    hidden("--most", type=at_least(0), default=8192, help="tokens that are read for each input, at most")
    first("--tokens", type=at_least(2), default=512, help="tokens of the prompt")
    first("--methods", type=among(METHODS), default="iapt,ptuning2,lora", help="which of ours")
    first("--tenants", type=at_least(1), nargs="+", default=[1, 8], help="tenants in a batch")
    step("--tokens", type=at_least(2), default=128, help="tokens of a row")
    step("--answer", type=at_least(0), default=0, help="tokens of the answer: also of what acts on them alone")
    step("--methods", type=among(METHODS), default="iapt,ptuning2,lora,full", help="which of ours")
    step("--checkpoint", action="store_true", help="ours compute activations again in the backward pass")
    step("--compile", action="store_true", help="ours once more, compiled")
    serve("--tokens", type=at_least(2), nargs="+", default=[64], help="tokens of a prompt")
    serve("--new", type=at_least(1), nargs="+", default=[64], help="tokens to write")
    serve("--tenants", type=at_least(1), nargs="+", default=[1, 8, 64], help="tenants in a batch")
    generate("--tokens", type=at_least(2), default=64, help="tokens of a prompt")
    generate("--new", type=at_least(1), default=64, help="tokens to write")
    generate("--methods", type=among(["frozen", *METHODS]), default="frozen,iapt,lora", help="which of ours")
    for option in (step, first, generate):
        option("--hub", action=BooleanOptionalAction, default=True, help="transformers and peft among the rivals")
    args = parser.parse_args(argv)
    args.argv = shlex.join(argv)
    if args.command != "gpu":
        args.models = [args.init] if args.init else args.shapes
    return args


GPU = {  # folder of the table: benchmark, on a GPU in bf16
    "step": "step --shapes smollm2-135M,gpt2-124M --compile",
    "answer": "step --shapes smollm2-135M,gpt2-124M --tokens 90 --answer 10 --methods iapt,lora --no-hub",
    "serve": "serve --shapes smollm2-135M --tenants 1 8",
    "hidden": "hidden --shapes smollm2-135M --inputs 8",
    "generate": "generate --shapes smollm2-135M",
    "7B": "step --shapes llama-7B --methods iapt,lora --no-hub --rounds 3",
    "7B-checkpoint": "step --shapes llama-7B --methods iapt,lora --no-hub --rounds 3 --checkpoint",
}


def bench_gpu(args: Namespace):
    """The benchmarks of GPU, one after the other: each leaves a table, and one that fails does not keep others back."""
    for name, line in GPU.items():
        own = [*line.split(), "--device", args.device, "--dtype", "bf16", "--out", os.path.join(args.out, name)]
        try:
            main(own)
        except (RuntimeError, ValueError, ImportError) as e:  # out of memory, or a rival's own
            print(f"{name}: {type(e).__name__}: {e}"[:300])


BENCHMARKS = {"step": bench_step, "serve": bench_serve, "first": bench_first, "hidden": bench_hidden,
              "generate": bench_generate}  # fmt: skip


def main(argv: list[str] | None = None):
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.command == "gpu":
        pick_device(args.device)  # without a GPU it ends here
        return bench_gpu(args)
    args.device, args.dtype, _ = pick_device(args.device, args.dtype)
    args.rounds = args.rounds or (5 if args.device.startswith("cuda") else 15)
    if getattr(args, "hub", False) and not (find_spec("transformers") and find_spec("peft")):
        print("transformers or peft is not installed: ours alone")
        args.hub = False
    os.makedirs(args.out, exist_ok=True)  # a folder that cannot be written fails before the work
    benchmark = BENCHMARKS[args.command]
    report(args, [row for name in args.models for row in benchmark(args, name, our_model(name, args))])


if __name__ == "__main__":
    run(main)
