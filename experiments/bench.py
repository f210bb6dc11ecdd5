"""Benchmarks: what the activation, a training step and answers cost.

    python -m experiments.bench rational        # the activation, forward and backward, beside GELU
    python -m experiments.bench step            # a training step of each method, beside those of peft
    python -m experiments.bench serve           # many tenants in one batch, method by method
    python -m experiments.bench generate        # answers, beside those of transformers and peft
    python -m experiments.bench step --shapes smollm2-135M,gpt2-124M --device cuda --dtype bf16
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
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from baselines import METHODS, build
from baselines.hooks import Hooked
from baselines.tenants import Tenants
from iapt import Rational, RationalFunction, rational
from model import NO_TUNER, Config, Decoder, Embedded, Tuner
from plumbing.cli import Parser, add_device_options, at_least, pick_device, run
from plumbing.compiling import compile_parts, compiled_step
from plumbing.files import replacing, write_json
from plumbing.hub import find_model
from plumbing.pretrained import load_pretrained, write_config
from sample import generate

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


def timed(f: Callable, device: str, calls: int = 1) -> Callable[[], float]:
    """f as a function that calls it `calls` times and returns the seconds that the fastest call took."""

    def seconds():
        begin = now(device)
        f()
        return now(device) - begin

    return lambda: min(seconds() for _ in range(calls))


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


def report(args: Namespace, rows: list[dict], notes: Iterable[str] = ()):
    """Print rows (dicts of the same keys) as a Markdown table with notes after it, and save both."""

    def line(cells):
        return f"| {' | '.join(cells)} |"

    def text(cell):
        return "{:.2f} ({:.2f} to {:.2f})".format(*cell) if isinstance(cell, list) else str(cell)

    about = {"command": f"python -m experiments.bench {args.argv}", "machine": machine(args.device)}
    about["threads"] = torch.get_num_threads()
    lines = [line(rows[0]), "|" + "---|" * len(rows[0])]
    lines += [line(map(text, row.values())) for row in rows]
    lines += ["", *notes, f"Ratios of times: median (quartiles) of {args.rounds} rounds."]
    lines += [f"`{about['command']}`: {about['machine']}, {about['threads']} CPU threads."]
    print("\n".join(lines))
    path = os.path.join(args.out, args.command)
    write_json(f"{path}.json", {**about, "rows": rows}, indent=1)
    with replacing(f"{path}.md") as f:
        f.write("\n".join(lines) + "\n")


# -- The rational activation -------------------------------------------------------------------------------------------


def horner(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """R(x), computed in fp32 and left to autograd."""
    return rational(x.float(), a, b).to(x.dtype)


def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """R(x), with the gradients of iapt.py."""
    return RationalFunction.apply(x.float(), a, b).to(x.dtype)


def activations() -> dict[str, Callable]:
    """{name: f}, each y = f(x), or y = f(x, a, b) where its name begins with "rational"."""
    # y x + c may be one instruction, as it always is on a GPU: faster, and one rounding in place of two.
    options = {"cpp.enable_floating_point_contract_flag": "fast"}
    compiled = functools.partial(torch.compile, dynamic=False, fullgraph=True, options=options)
    return {
        "GELU, compiled": compiled(F.gelu),
        "GELU, tanh form, compiled": compiled(functools.partial(F.gelu, approximate="tanh")),
        "rational, ours, compiled": compiled(ours),
        "rational, Horner, compiled": compiled(horner),
        "GELU, eager": F.gelu,
        "rational, ours, eager": ours,
        "rational, Horner, eager": horner,
    }


def gradients(f: Callable, g: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Gradients of f(*inputs) with respect to its inputs, given g, that with respect to its value."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*inputs), inputs, g)


def saved_bytes(f: Callable, *inputs: Tensor) -> int:
    """Bytes that f keeps for the backward pass, without the coefficients."""
    return kept_bytes(lambda: f(*(x.detach().requires_grad_() for x in inputs)), without=inputs[1:])


def bench_rational(args: Namespace):
    """Time, memory and error of our activation, beside GELU and Horner's rule left to autograd."""
    on_gpu = args.device.startswith("cuda")
    shapes = [(64, 4, 256), (4096, 1024)] + [(16384, 4096)] * on_gpu  # the last does not fit a GPU's cache
    dtypes = [torch.float32] + [args.dtype] * (args.dtype != torch.float32)
    rivals = activations()
    rows = [row for dtype in dtypes for shape in shapes for row in activation_rows(rivals, shape, dtype, args)]
    report(args, rows)


def activation_rows(rivals: dict[str, Callable], shape: tuple, dtype: torch.dtype, args: Namespace) -> Iterator[dict]:
    """Rows of a table: each of `activations` on random numbers of one shape."""
    device, title = args.device, f"{shape} {str(dtype)[6:]}"
    x = torch.randn(shape, device=device, dtype=dtype)
    g = torch.rand_like(x)  # of one sign, so that the largest gradients are not sums that cancel
    coefficients = [c.detach().to(device) for c in Rational().parameters()]
    inputs = {name: [x] + coefficients * name.startswith("rational") for name in rivals}
    _, *exact = gradients(rational, g.double(), *(t.double() for t in (x, *coefficients)))
    # The fastest of three calls: the first may have to ask the system for memory that the rival before it gave back.
    calls = {name: timed(functools.partial(gradients, f, g, *inputs[name]), device, 3) for name, f in rivals.items()}
    seconds = interleaved(calls, args.rounds, title)
    gelu = min(("GELU, compiled", "GELU, tanh form, compiled"), key=lambda name: statistics.median(seconds[name]))
    copy = statistics.median(interleaved({"copy": timed(x.clone, device)}, 50, "copy")["copy"])
    for name, f in rivals.items():
        _, *computed = gradients(f, g, *inputs[name])
        errors = [((c - e).abs().max() / e.abs().max()).item() for c, e in zip(computed, exact)]
        row = {"shape": title, "forward and backward": name}
        row["time, of the faster compiled GELU's"] = ratio(seconds, name, gelu)
        row["time, of eager Horner's"] = ratio(seconds, name, "rational, Horner, eager")
        row["kept for backward, of x"] = f"{saved_bytes(f, *inputs[name]) / x.nbytes:.2f}"
        row["error of the coefficients' gradients, of the largest"] = f"{max(errors):.1e}" if errors else ""
        if device.startswith("cuda"):  # x is read, y written, x and g read, dx written: 2.5 times what a copy moves
            row["share of the copy bandwidth"] = f"{2.5 * copy / statistics.median(seconds[name]):.0%}"
        yield row


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
LARGEST_FULL = 1e9  # parameters; full fine-tuning takes 16 bytes for each


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


def random_tuner(method: str, model: Decoder, options: Iterable[str] = ()) -> Tuner:
    """A method's tuner at its start, on the model's device."""
    with torch.device(model.wte.weight.device):
        tuner = build(method, model.config, options)
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


def hub_lora(config: Config):
    """peft's settings of a LoRA like ours: rank 8 on q and v (in GPT-2 one layer makes q, k and v)."""
    from peft import LoraConfig

    fused = config.arch == "gpt2"
    names = ["c_attn"] if fused else ["q_proj", "v_proj"]
    return LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=names, fan_in_fan_out=fused)


# -- A training step ---------------------------------------------------------------------------------------------------

FLOOR = "floor: forward, backward for activations"


class Floor(Tuner):
    """What no method that tunes the first layer can be cheaper than: forward, and backward for activations alone."""

    def __init__(self, config: Config):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(config.n_embd))

    def embed(self, x: Tensor, instr: Tensor) -> Embedded:
        return Embedded(x + self.zero.to(x.dtype))


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


def bench_step(args: Namespace):
    """A training step of each method, on each shape."""
    rows = []
    for name in args.models:
        model = our_model(name, args)
        model.checkpointing = args.checkpoint
        idx = torch.randint(model.config.vocab_size, (args.rows, args.tokens), device=args.device)
        methods = methods_that_fit(name, model, args.methods)
        steps = floor_steps(model, idx) | our_steps(model, idx, methods)
        if args.compile:
            twin = our_model(name, args)  # a part is compiled in place
            twin.checkpointing = args.checkpoint
            steps |= our_steps(twin, idx, methods, compiled=True)
        if args.hub:
            steps |= hub_steps(name, model.config, idx, args)
        rivals = {label: timed(step, args.device) for label, step in steps.items()}
        bases = {"time, of the floor's": FLOOR, "time, of IAPT's": "ours: iapt"}
        for label, cells in compare(rivals, bases, idx.numel(), name, args).items():
            row = {"shape": f"{name}, {args.rows} x {args.tokens}", "step": label}
            row |= {"trained": f"{steps[label].trained:,}", "kept MB": f"{steps[label].kept() / 1e6:,.0f}"}
            rows.append(row | cells)
    notes = ["Half of the tokens are instruction, half response.  kept: by the forward pass for the backward pass."]
    if args.checkpoint:
        notes.append("Ours compute each layer again for the backward pass (--checkpoint), those of peft do not.")
    report(args, rows, notes)


def methods_that_fit(name: str, model: Decoder, methods: list[str]) -> list[str]:
    """The methods, without full fine-tuning if the model is large."""
    size = sum(p.numel() for p in model.parameters())
    if "full" in methods and size > LARGEST_FULL:
        print(f"{name}: full fine-tuning is left out, it takes {16 * size / 1e9:,.0f} GB")
        return [method for method in methods if method != "full"]
    return methods


def targets_of(idx: Tensor) -> tuple[Tensor, Tensor]:
    """Targets and instr, both (B, T), of tokens idx (B, T) of which the first half is the instruction."""
    T = idx.shape[1]
    instr = (torch.arange(T, device=idx.device) < T // 2).expand(idx.shape)
    return torch.where(instr, -1, idx.roll(-1, 1)), instr


def floor_steps(model: Decoder, idx: Tensor) -> dict[str, TrainingStep]:
    """{label: step} of the floor, and of the floor if it computed logits that have no target, too."""
    targets, instr = targets_of(idx)
    floor = Floor(model.config).to(idx.device)

    def loss_everywhere():
        logits = model(idx, instr, floor).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-1)

    return {
        FLOOR: TrainingStep(floor, lambda: model(idx, instr, floor, targets), model),
        "floor with its head at every token": TrainingStep(floor, loss_everywhere, model),
    }


def our_steps(model: Decoder, idx: Tensor, methods: list[str], compiled: bool = False) -> dict[str, TrainingStep]:
    """{label: step} of methods of ours, which share the model; compiled: as `train.py --compile` does it."""
    targets, instr = targets_of(idx)
    steps = {}
    for method in methods:
        tuner = random_tuner(method, model)
        if compiled:
            with attached(tuner, model):
                compile_parts(model, tuner)
        label = f"ours: {method}{', in fp32' * (method == 'full')}{', compiled' * compiled}"
        steps[label] = TrainingStep(tuner, functools.partial(model, idx, instr, tuner, targets), model)
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


class Seconds(NamedTuple):
    """How long answers took: the tokens after the first (None: a beam search, which does not say), and all of it."""

    decode: float | None
    total: float


def serve(model: Decoder, tuner: Tuner, idx: Tensor, new: int, beams: int) -> Seconds:
    """Read prompts idx (B, T), write `new` tokens for each."""
    with attached(tuner, model):
        device = str(idx.device)
        begin = now(device)
        if beams > 1:
            generate(model, idx.tolist(), tuner, new, beams=beams)
            return Seconds(None, now(device) - begin)
        logits, cache = model.prefill(idx, torch.full_like(idx[:, 0], idx.shape[1]), tuner, new)
        middle = now(device)
        for _ in range(new - 1):
            logits = model.step(logits.argmax(-1), cache)
        end = now(device)
        return Seconds(end - middle, end - begin)


def random_tenants(method: str, options: list[str], model: Decoder, tenant_of_row: list[int]) -> Tenants:
    """A tenant of one method for each number in tenant_of_row (B,)."""
    tuners = [random_tuner(method, model, options).eval() for _ in set(tenant_of_row)]
    return Tenants(tuners, tenant_of_row).to(model.wte.weight.device)


def bench_serve(args: Namespace):
    """Batches of many tenants, on each shape."""
    rows = []
    for name in args.models:
        model = our_model(name, args)
        for sizes in itertools.product(args.tenants, args.beams, args.tokens, args.new):
            rows += serve_rows(name, model, *sizes, args)
    report(args, rows)


def serve_rows(name: str, model: Decoder, n: int, beams: int, T: int, new: int, args: Namespace) -> Iterator[dict]:
    """Rows of a table: n tenants in one batch, by method, beside the frozen model."""
    tenant_of_row = [i % n for i in range(max(args.rows, n))]
    B = len(tenant_of_row)
    idx = torch.randint(model.config.vocab_size, (B, T), device=args.device)
    tuners = {label: random_tenants(*spec, model, tenant_of_row) for label, spec in SERVED.items()}
    tuners = {"frozen": NO_TUNER, **tuners}
    rivals = {label: functools.partial(serve, model, tuner, idx, new, beams) for label, tuner in tuners.items()}
    results = interleaved(rivals, args.rounds, f"{name}, {n} tenants, {beams} beams")
    decode = {label: [seconds.decode for seconds in rounds] for label, rounds in results.items()}
    total = {label: [seconds.total for seconds in rounds] for label, rounds in results.items()}
    for label, tuner in tuners.items():
        row = {"shape": name, "rows": B, "tenants": n, "beams": beams, "prompt": T, "new": new, "method": label}
        row["decode, of the frozen model's"] = ratio(decode, label, "frozen") if beams == 1 else ""
        row["all, of the frozen model's"] = ratio(total, label, "frozen")
        row["all, of iapt's"] = ratio(total, label, "iapt")
        row["tokens/s"] = f"{B * new / statistics.median(total[label]):,.0f}"
        row["kB a tenant"] = f"{sum(p.numel() for p in tuner.parameters()) * 4 / 1000 / n:,.0f}"
        yield row | peak_memory(rivals[label], args.device)


# -- Answers -----------------------------------------------------------------------------------------------------------


def bench_generate(args: Namespace):
    """Greedy answers, ours and those of transformers and peft: of the frozen model, and with a tenant in each row."""
    rows = []
    for name in args.models:
        model = our_model(name, args)
        idx = torch.randint(model.config.vocab_size, (args.rows, args.tokens), device=args.device)
        rivals = our_answers(name, model, idx, args)
        if args.hub:
            rivals |= hub_answers(name, model.config, idx, args)
        rivals = {label: timed(f, args.device) for label, f in rivals.items()}
        bases = {"time, of transformers'": "transformers", "time, of our frozen model's": "ours: frozen"}
        common = {"shape": name, "rows": args.rows, "prompt": args.tokens, "new": args.new}
        for label, cells in compare(rivals, bases, args.rows * args.new, name, args).items():
            rows.append({**common, "answers": label, **cells})
    report(args, rows)


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
    commands = parser.add_subparsers(dest="command", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.__doc__, description=benchmark.__doc__)
        add = command.add_argument
        add("--rounds", type=at_least(1), help="rounds of timing (default: 15, on a GPU 5)")
        add("--out", default="out/bench", help="folder for the table")
        add_device_options(command)
        if name == "rational":
            continue
        shapes = "gpt2-6x384,llama-6x288" if name == "step" else "llama-6x288"
        several = {"nargs": "+"} if name == "serve" else {}
        add("--shapes", type=among(SHAPES), default=shapes, help=f"random models: {', '.join(SHAPES)}")
        add("--init", help="a folder or a name on the hub, in place of --shapes")
        add("--rows", type=at_least(1), default=8, help="rows of a batch")
        add(
            "--tokens",
            type=at_least(2),
            default={"step": 128, "serve": [64]}.get(name, 64),
            help="tokens of a row",
            **several,
        )
        if name == "step":
            add("--methods", type=among(METHODS), default="iapt,ptuning2,lora,full", help="which of ours")
            add("--checkpoint", action="store_true", help="ours compute activations again in the backward pass")
            add("--compile", action="store_true", help="ours once more, compiled")
        else:
            add("--new", type=at_least(1), default=[64] if name == "serve" else 64, help="tokens to write", **several)
        if name == "generate":
            add("--methods", type=among(["frozen", *METHODS]), default="frozen,iapt,lora", help="which of ours")
        if name == "serve":
            add("--tenants", type=at_least(1), nargs="+", default=[1, 8, 64], help="tenants in a batch")
            add("--beams", type=at_least(1), nargs="+", default=[1], help="width of a beam search")
        else:
            add("--hub", action=BooleanOptionalAction, default=True, help="transformers and peft among the rivals")
    args = parser.parse_args(argv)
    args.argv = shlex.join(argv)
    if args.command != "rational":
        args.models = [args.init] if args.init else args.shapes
    return args


BENCHMARKS = {"rational": bench_rational, "step": bench_step, "serve": bench_serve, "generate": bench_generate}


def main(argv: list[str] | None = None):
    args = parse(sys.argv[1:] if argv is None else argv)
    args.device, args.dtype, _ = pick_device(args.device, args.dtype)
    args.rounds = args.rounds or (5 if args.device.startswith("cuda") else 15)
    if getattr(args, "hub", False) and not (find_spec("transformers") and find_spec("peft")):
        print("transformers or peft is not installed: ours alone")
        args.hub = False
    os.makedirs(args.out, exist_ok=True)  # a folder that cannot be written fails before the work
    BENCHMARKS[args.command](args)


if __name__ == "__main__":
    run(main)
