"""The papers' claims, measured.

    python bench.py quality --budget 16000 --seeds 3 --out out/bench/tiny       # every method, on tiny: quality.py
    python bench.py quality --init FOLDER --data FOLDER --methods iapt,lora,ptuning2 --budget 32000 --metric bleu \\
        --steps 800 --batch-size 4                                              # options of train.py go to every run
    python bench.py rational                                                    # the activation, forward and backward
    python bench.py step                                                        # a training step, method by method
    python bench.py serve                                                       # many tenants in one batch

Rivals are timed in turn, in one process: a figure is the median, and the quartiles, of the ratio to the first of them
in the same round.  Machines change from second to second; such ratios hardly do.  Where transformers and peft are
installed they are among the rivals.
"""

import functools
import itertools
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import iapt
import quality
from baselines import build
from cli import Parser, run
from data import replacing
from iapt import Rational, RationalFunction, Tuner, compiled_once
from model import Config, Decoder, compiled_step, generate
from quality import machine, write
from tenants import Tenants
from train import pick_device


def interleaved(rivals: dict[str, Callable], rounds: int, device: str, title: str) -> dict[str, list[float]]:
    """Call each of {name: f} once to warm up, then all in turn: {name: seconds of each round}."""
    seconds = {name: [] for name in rivals}
    for i in tqdm(range(rounds + 1), desc=title, unit="round", leave=False):
        for name, f in rivals.items():
            begin = time.perf_counter()
            f()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            if i:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> list[float]:
    """[median, lower, upper quartile] of the time of `name` as a multiple of that of `base`."""
    each = [a / b for a, b in zip(seconds[name], seconds[base])]
    low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return [middle, low, high]


def shown(three: list[float]) -> str:
    """What `ratio` gives, as text."""
    return f"{three[0]:.2f} ({three[1]:.2f} to {three[2]:.2f})"


def report(args: Namespace, name: str, rows: list[dict], notes: Iterable[str] = ()):
    """Print rows (dicts of the same keys) as a Markdown table, and save them; the notes follow it."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += [
        "| " + " | ".join(shown(x) if isinstance(x, list) else str(x) for x in row.values()) + " |" for row in rows
    ]
    lines += [
        "",
        *notes,
        f"Ratios of times: median (quartiles) of {args.rounds} rounds. {machine()}, {args.threads} threads.",
    ]
    print("\n".join(lines))
    write(os.path.join(args.out, f"{name}.json"), {"machine": machine(), "threads": args.threads, "rows": rows})
    with replacing(os.path.join(args.out, f"{name}.md")) as f:
        f.write("\n".join(lines) + "\n")


# -- The rational activation -------------------------------------------------------------------------------------------


def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """R(x), as one would write it: Horner's rule, left to autograd."""
    n, s = torch.zeros_like(x), torch.zeros_like(x)
    for c in a.flip(0):
        n = n * x + c
    for c in b.flip(0):
        s = (s + c) * x
    return n / (1 + s.abs())


def rational(args: Namespace):
    """Time, memory and error of our activation, beside GELU and the plain form."""
    coefficients = [c.detach().to(args.device) for c in Rational().coefficients()]
    dtypes = [torch.float32, torch.bfloat16] if args.device.startswith("cuda") else [torch.float32]
    compiled = {
        "GELU": compiled_once(F.gelu),
        "GELU, tanh form": compiled_once(lambda x: F.gelu(x, approximate="tanh")),
        "Horner": compiled_once(plain),
    }

    def ours(large):
        def f(*inputs):
            iapt.LARGE = large
            return RationalFunction.apply(*inputs)

        return f

    rows = []
    for dtype in dtypes:
        for shape in ((64, 4, 256), (4096, 1024)):
            x, g = (torch.randn(shape, device=args.device, dtype=dtype) for _ in range(2))

            def gradients(f, *c, x=x, g=g):
                inputs = [t.detach().requires_grad_() for t in (x, *c)]
                f(*inputs).backward(g)
                return [t.grad for t in inputs]

            inputs = [t.double().requires_grad_() for t in (x, *coefficients)]
            plain(*inputs).backward(g.double())
            rivals = {
                "GELU, compiled": (compiled["GELU"], ()),
                "GELU, tanh form, compiled": (compiled["GELU, tanh form"], ()),
                "rational, ours, compiled": (ours(0), coefficients),
                "rational, Horner, compiled": (compiled["Horner"], coefficients),
                "GELU, eager": (F.gelu, ()),
                "rational, ours, eager": (ours(float("inf")), coefficients),
                "rational, Horner, eager": (plain, coefficients),
            }
            calls = {name: lambda f=f, c=c: gradients(f, *c) for name, (f, c) in rivals.items()}
            seconds = interleaved(calls, args.rounds, args.device, f"{tuple(shape)} {str(dtype)[6:]}")
            first = "GELU, compiled"
            if statistics.median(seconds["GELU, tanh form, compiled"]) < statistics.median(seconds[first]):
                first = "GELU, tanh form, compiled"
            copy = None
            if args.device.startswith("cuda"):
                copy = statistics.median(interleaved({"copy": x.clone}, 50, args.device, "copy")["copy"])
            for name, (f, c) in rivals.items():
                error = ""
                if c:
                    got = gradients(f, *c)[1:]
                    each = [((a.double() - t.grad).abs() / t.grad.abs()).max().item() for a, t in zip(got, inputs[1:])]
                    error = f"{max(each):.1e}"
                row = {"shape": f"{tuple(shape)} {str(dtype)[6:]}", "forward and backward": name}
                row["time, of the faster compiled GELU's"] = ratio(seconds, name, first)
                row["time, of eager Horner's"] = ratio(seconds, name, "rational, Horner, eager")
                row["kept for backward, of x"] = f"{kept(f, x, c):.2f}"
                row["error of the coefficients' gradients"] = error
                if copy:  # x is read, y written, x and g read, dx written: 2.5 times what a copy moves
                    row["share of the copy bandwidth"] = f"{2.5 * copy / statistics.median(seconds[name]):.0%}"
                rows.append(row)
    report(args, "rational", rows)


def kept(f: Callable, x: Tensor, coefficients: Sequence[Tensor]) -> float:
    """Bytes that f keeps for the backward pass, beside the coefficients, as a multiple of x's."""
    storages = {}

    def pack(t):
        if t.numel() > 100:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f(x.detach().requires_grad_(), *(c.detach().requires_grad_() for c in coefficients))
    del y
    return sum(storages.values()) / x.untyped_storage().nbytes()


# -- Models of these shapes, with random weights -----------------------------------------------------------------------

SHAPES = {
    "gpt2-6x384": dict(vocab_size=50257, n_layer=6, n_head=6, n_embd=384),
    "llama-6x288": dict(arch="llama", vocab_size=32000, n_layer=6, n_head=6, n_embd=288, n_inner=768),
    "gpt2-124M": dict(vocab_size=50257),
    "llama-7B": dict(arch="llama", vocab_size=32000, block_size=4096, n_layer=32, n_head=32, n_embd=4096, n_inner=11008,
                     tied=False),
}  # fmt: skip


HUB = find_spec("transformers") is not None and find_spec("peft") is not None  # rivals, where they are installed


def random_model(name: str, args: Namespace) -> Decoder:
    """A frozen model of one of SHAPES."""
    with torch.device(args.device):
        torch.set_default_dtype(args.dtype)
        model = Decoder(Config(**SHAPES[name])).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    return model


def hub_model(name: str, args: Namespace) -> nn.Module:
    """The same shape in transformers."""
    import transformers as hub

    c = Config(**SHAPES[name])
    if c.arch == "gpt2":
        config = hub.GPT2Config(vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
                                resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)  # fmt: skip
    else:
        config = hub.LlamaConfig(vocab_size=c.vocab_size, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
                                 hidden_size=c.n_embd, intermediate_size=c.n_inner, tie_word_embeddings=c.tied,
                                 max_position_embeddings=c.block_size)  # fmt: skip
    return hub.AutoModelForCausalLM.from_config(config, dtype=args.dtype).to(args.device)


# -- A training step ---------------------------------------------------------------------------------------------------


class Floor(Tuner):
    """What no method that tunes at the first layer can be cheaper than: forward, and backward for activations alone."""

    def __init__(self, config: Config):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(config.n_embd))

    def embed(self, x: Tensor, instr: Tensor) -> tuple[Tensor, None, None]:
        return x + self.zero.to(x.dtype), None, None


def step(args: Namespace):
    """A training step of each method, on each shape asked for."""
    rows = [row for name in args.shapes.split(",") for row in steps(name, args)]
    report(args, "step", rows, ["Half of the tokens are instruction, half response."])


def steps(name: str, args: Namespace) -> Iterator[dict]:
    """Rows of a table: a training step of each rival on one shape, gradients and AdamW."""
    B, T, V = args.rows, args.tokens, SHAPES[name]["vocab_size"]
    idx = torch.randint(V, (B, T), device=args.device)
    instr = torch.arange(T, device=args.device).expand(B, T) < T // 2
    targets = torch.where(instr, -1, torch.randint(V, (B, T), device=args.device))
    labels = F.pad(targets, (1, 0), value=-1)[:, :T]  # transformers shifts them itself
    labels, mask = torch.where(labels < 0, -100, labels), torch.ones_like(idx)
    rivals, trained = {}, {}

    def rival(label, tuner, loss):
        parameters = [p for p in tuner.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6)

        def f():
            optimizer.zero_grad()
            loss(tuner).backward()
            optimizer.step()

        rivals[label], trained[label] = f, sum(p.numel() for p in parameters)

    def everywhere(tuner):
        logits = model(idx, instr, tuner).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-1)

    model = random_model(name, args)
    floor = Floor(model.config).to(args.device)
    rival("floor: forward, backward for activations", floor, lambda tuner: model(idx, instr, tuner, targets))
    rival("the floor with its head at every token", floor, everywhere)
    for method in ("iapt", "ptuning2", "lora", "full"):
        own = model if method in ("iapt", "ptuning2") else random_model(name, args)
        tuner = build(method, own.config).to(args.device)
        tuner.attach(own)
        label = "ours: full, in fp32" if method == "full" else f"ours: {method}"
        rival(label, tuner, lambda tuner, own=own: own(idx, instr, tuner, targets))
    for label, tuned in hub_tuners(name, args):
        rival(label, tuned, lambda tuned: tuned(input_ids=idx, attention_mask=mask, labels=labels).loss)
    seconds = interleaved(rivals, args.rounds, args.device, name)
    for label in rivals:
        yield {
            "shape": f"{name}, {B} x {T}", "step": label, "trained": f"{trained[label]:,}",
            "time, of the floor's": ratio(seconds, label, "floor: forward, backward for activations"),
            "time, of IAPT's": ratio(seconds, label, "ours: iapt"),
            "tokens/s": f"{B * T / statistics.median(seconds[label]):,.0f}",
        }  # fmt: skip


def hub_tuners(name: str, args: Namespace) -> Iterator[tuple[str, nn.Module]]:
    """peft's prefix-tuning and LoRA on the same shape, where it is installed."""
    if not HUB:
        return
    import peft

    c = Config(**SHAPES[name])
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16)
    yield "peft: prefix-tuning", peft.get_peft_model(hub_model(name, args), prefix)
    on = ["c_attn"] if c.arch == "gpt2" else ["q_proj", "v_proj"]
    yield "peft: LoRA", peft.get_peft_model(hub_model(name, args), peft.LoraConfig(task_type="CAUSAL_LM", r=8,
                                                                                   target_modules=on))  # fmt: skip


# -- Many tenants ------------------------------------------------------------------------------------------------------


def served(
    model: Decoder, tuner: Tuner, idx: Tensor, new: int, beams: int = 1, step: Callable | None = None
) -> tuple[float | None, float]:
    """Read prompts idx (B, T), write `new` tokens: seconds for the tokens (None with beams), and for all of it.

    step takes the place of the model's, if given.
    """
    step = step or model.step
    sync = (lambda: torch.cuda.synchronize(idx.device)) if idx.is_cuda else (lambda: None)
    length = torch.full((len(idx),), idx.shape[1], device=idx.device)
    sync()
    begin = time.perf_counter()
    if beams > 1:
        generate(model, idx.tolist(), tuner, new, beams=beams)
        sync()
        return None, time.perf_counter() - begin
    logits, cache = model.prefill(idx, length, tuner, new)
    sync()
    middle = time.perf_counter()
    for _ in range(new - 1):
        logits = step(logits.argmax(-1), cache)
    sync()
    end = time.perf_counter()
    return end - middle, end - begin


def serve(args: Namespace):
    """Batches of many tenants, on each shape asked for."""
    rows = []
    for name in args.shapes.split(","):
        model = random_model(name, args)
        for work in itertools.product(args.tenants, args.beams, args.tokens, args.new):
            rows += mixed(name, model, *work, args)
        rows += against_peft(name, model, args)
    report(args, "serve", rows)


def mixed(name: str, model: Decoder, n: int, beams: int, T: int, new: int, args: Namespace) -> Iterator[dict]:
    """Rows of a table: n tenants in one batch, prompts of T tokens, by method, against the frozen model."""
    B = max(args.rows, n)
    idx = torch.randint(model.config.vocab_size, (B, T), device=args.device)

    def tenants(method, *options):
        made = [build(method, model.config, options).to(args.device).eval() for _ in range(n)]
        return Tenants(made, [i % n for i in range(B)]).to(args.device)

    rivals = {
        "frozen": Tuner(), "iapt": tenants("iapt"), "ptuning2 P=16": tenants("ptuning2", "P=16"),
        "lora r=8 on q, v": tenants("lora"), "lora r=64 on all": tenants("lora", "r=64", "on=all"),
    }  # fmt: skip
    decode, whole = ({label: [] for label in rivals} for _ in range(2))
    for i in tqdm(range(args.rounds + 1), desc=f"{name}, {n} tenants, {beams} beams", leave=False):
        for label, tuner in rivals.items():
            tuner.attach(model)
            tokens, everything = served(model, tuner, idx, new, beams)
            tuner.detach()
            if i:
                decode[label].append(tokens)
                whole[label].append(everything)
    for label, tuner in rivals.items():
        yield {
            "shape": name, "rows": B, "tenants": n, "beams": beams, "prompt": T, "new": new, "method": label,
            "decode, of the frozen model's": ratio(decode, label, "frozen") if beams == 1 else "",
            "all, of the frozen model's": ratio(whole, label, "frozen"), "all, of iapt's": ratio(whole, label, "iapt"),
            "tokens/s": f"{B * new / statistics.median(whole[label]):,.0f}",
            "kB a tenant": f"{sum(p.numel() for p in tuner.parameters()) * 4 / 1000 / n:,.0f}",
        }  # fmt: skip


def against_peft(name: str, model: Decoder, args: Namespace) -> Iterator[dict]:
    """Rows of a table: peft's LoRA with an adapter for each row of a batch, its frozen model, our IAPT and LoRA."""
    n, T, new = args.rows, args.tokens[0], args.new[0]
    if not HUB:
        return
    import peft

    on = ["c_attn"] if model.config.arch == "gpt2" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=on)
    frozen, tuned = hub_model(name, args), peft.get_peft_model(hub_model(name, args), config, adapter_name="t0")
    for i in range(1, n):
        tuned.add_adapter(f"t{i}", config)
    tuned.eval()
    idx = torch.randint(model.config.vocab_size, (n, T), device=args.device)
    rivals = {}
    for label, method, own in (("iapt", "iapt", model), ("lora r=8 on q, v", "lora", random_model(name, args))):
        ours = Tenants([build(method, own.config).to(args.device).eval() for _ in range(n)], range(n)).to(args.device)
        ours.attach(own)
        serving = functools.partial(served, own, ours, idx, new)
        rivals[f"ours: {label}"] = serving
        rivals[f"ours: {label}, step compiled"] = functools.partial(serving, step=compiled_step(own))
    how = dict(attention_mask=torch.ones_like(idx), max_new_tokens=new, min_new_tokens=new, do_sample=False,
               pad_token_id=0)  # fmt: skip
    names = [f"t{i}" for i in range(n)]
    rivals["transformers: frozen"] = lambda: frozen.generate(idx, **how)
    rivals["peft: LoRA r=8 on q, v"] = lambda: tuned.generate(input_ids=idx, adapter_names=names, **how)
    with torch.no_grad():
        seconds = interleaved(rivals, args.rounds, args.device, f"{name}, peft")
    for label in rivals:
        yield {
            "shape": name, "rows": n, "tenants": n, "beams": 1, "prompt": T, "new": new, "method": label,
            "decode, of the frozen model's": "",
            "all, of the frozen model's": ratio(seconds, label, "transformers: frozen") if "ours" not in label else "",
            "all, of iapt's": ratio(seconds, label, "ours: iapt"),
            "tokens/s": f"{n * new / statistics.median(seconds[label]):,.0f}", "kB a tenant": "",
        }  # fmt: skip


# -- The command line --------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> Namespace:
    """The command line.  Stops with a line and status 2 if it asks for what there is not."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("quality", help="every method at equal budget", description=quality.__doc__)
    quality.options(compare)
    timed = {}
    for name, says in (("rational", "the activation"), ("step", "a training step"), ("serve", "many tenants")):
        timed[name] = commands.add_parser(name, help=says)
        add, or_ = timed[name].add_argument, "(default: %(default)s)"
        add("--rounds", type=int, default=15, help=f"rounds of timing {or_}")
        add("--device", default="auto", help=f"auto, cpu, cuda, ... {or_}")
        add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help=f"of frozen weights {or_}")
        add("--out", default="out/bench", help=or_)
    for name in ("step", "serve"):
        add = timed[name].add_argument
        shapes = "gpt2-6x384,llama-6x288" if name == "step" else "llama-6x288"
        add("--shapes", default=shapes, help=f"{', '.join(SHAPES)} {or_}")
        add("--rows", type=int, default=8, help=f"of a batch {or_}")
    timed["step"].add_argument("--tokens", type=int, default=128, help=f"of a row {or_}")
    add = timed["serve"].add_argument
    add("--tokens", type=int, nargs="+", default=[64], help=f"of a prompt {or_}")
    add("--new", type=int, nargs="+", default=[64], help=f"tokens to write {or_}")
    add("--tenants", type=int, nargs="+", default=[1, 8, 64], help=or_)
    add("--beams", type=int, nargs="+", default=[1], help=or_)
    args, args.rest = parser.parse_known_args(argv)
    if args.command == "quality":
        quality.check(args, compare)
        return args
    if args.rest:
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    for name, value in vars(args).items():
        if isinstance(value, (int, list)) and name != "rest" and min(value if isinstance(value, list) else [value]) < 1:
            timed[args.command].error(f"--{name} must be at least 1, got {value}")
    for shape in getattr(args, "shapes", "").split(","):
        if shape and shape not in SHAPES:
            timed[args.command].error(f"no shape {shape!r}. There are: {', '.join(SHAPES)}")
    return args


def main(argv: list[str] | None = None):
    """Measure what the command line asks for."""
    args = parse(argv)
    if args.command == "quality":
        return quality.main(args)
    args.device, args.dtype, _ = pick_device(args.device, args.dtype)
    args.threads = torch.get_num_threads()
    os.makedirs(args.out, exist_ok=True)  # what cannot be written fails before the work
    return {"rational": rational, "step": step, "serve": serve}[args.command](args)


if __name__ == "__main__":
    run(main)
