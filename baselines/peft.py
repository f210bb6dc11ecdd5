"""Take a run elsewhere, or bring an adapter here, in the format of the package peft, which need not be installed.

    python -m baselines.peft out/lora NEW             # then PeftModel.from_pretrained(model, "NEW")
    python -m baselines.peft out/lora NEW --merge     # then AutoModelForCausalLM.from_pretrained("NEW")
    python -m baselines.peft ADAPTER out/theirs       # what peft has written: now a run, to sample from or --warm-start

The format has a place for lora, ia3, prompt, prefix and ptuning2.  What would compute something else on the other side
is refused.  docs/SERVING.md says more.
"""

import os
import shlex
from argparse import Namespace
from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from baselines import METHODS, as_options, build
from baselines.hooks import IA3, LoRA, linear_layers
from baselines.prompts import PrefixTuning, PromptTuning, PTuning2
from model import Decoder, rotary, rotate
from plumbing import pretrained
from plumbing.checkpoint import load_checkpoint, load_into, save_tuner
from plumbing.cli import Parser, UsageError, run
from plumbing.files import copy_tokenizer, read_json, write_json
from plumbing.hub import NAMES, find_model

# Settings that are read below, or that change nothing of what trained tensors compute.  Every other one must be off.
KNOWN = """peft_type base_model_name_or_path revision target_modules exclude_modules feedforward_modules
    layers_to_transform layers_pattern r lora_alpha num_virtual_tokens token_dim num_layers num_attention_heads
    prefix_projection encoder_hidden_size fan_in_fan_out inference_mode peft_version auto_mapping lora_dropout
    eva_config init_ia3_weights init_weights prompt_tuning_init prompt_tuning_init_text tokenizer_kwargs
    tokenizer_name_or_path megatron_core qalora_group_size""".split()
VALUES = {"task_type": (None, "CAUSAL_LM"), "num_transformer_submodules": (None, 1), "use_rslora": (None, False, True),
          "init_lora_weights": (None, False, True, "gaussian", "orthogonal", "eva")}  # fmt: skip

Adapter = tuple[dict, dict[str, Tensor]]  # settings and tensors there, or options and tensors here


def linear_pairs(model: Decoder) -> Iterator[tuple[str, dict[str, nn.Linear]]]:
    """(name of a linear layer there, those of ours that it holds): GPT-2's c_attn holds q, k and v."""
    for theirs, ours, _ in pretrained.name_pairs(model.config, model.state_dict()):
        names = [name.removesuffix(".weight") for name in ours if name.startswith("h.") and name.endswith(".weight")]
        layers = {name: layer for name in names if isinstance(layer := model.get_submodule(name), nn.Linear)}
        if layers:
            yield f"base_model.model.{theirs.removesuffix('.weight')}", layers


def module_names(model: Decoder, on: list[str]) -> list[str]:
    """The modules that a tuner of the sites `on` ("attn.q") tunes, in its own order."""
    return [f"h.{l}.{site}" for l in range(len(model.h)) for site in on]


# -- There -------------------------------------------------------------------------------------------------------------


def hooks_to_peft(tuner: LoRA | IA3, model: Decoder) -> Adapter:
    """Scales of outputs alone; or A and B.  Where a layer there holds several updates, B has a block for each.

    All get the rank of the layer that has the most, the others' filled up with zeros: not every reader takes several.
    """
    lora, tensors = isinstance(tuner, LoRA), {}
    tuned = dict(zip(module_names(model, tuner.on), zip(tuner.A, tuner.B) if lora else tuner.gains))
    pairs = [(theirs, layers) for theirs, layers in linear_pairs(model) if tuned.keys() & layers.keys()]
    r = len(tuner.A[0]) * max(len(tuned.keys() & layers.keys()) for _, layers in pairs) if lora else 0
    for theirs, layers in pairs:
        if lora:
            As, Bs = zip(*(tuned.get(name, (x.weight[:0], x.weight[:, :0])) for name, x in layers.items()))
            A, B = torch.cat(As), torch.block_diag(*Bs)
            tensors[f"{theirs}.lora_A.weight"] = F.pad(A, (0, 0, 0, r - len(A)))
            tensors[f"{theirs}.lora_B.weight"] = F.pad(B, (0, r - len(A)))
        else:
            gains = [tuned.get(name, torch.zeros(x.out_features)) for name, x in layers.items()]
            tensors[f"{theirs}.ia3_l"] = 1 + torch.cat(gains)[:, None]
    settings = {"r": r, "lora_alpha": tuner.scale * r} if lora else {"feedforward_modules": []}
    targets = sorted({".".join(theirs.split(".")[-2:]) for theirs, _ in pairs})
    return {**settings, "target_modules": targets, "fan_in_fan_out": model.wpe is not None}, tensors


def soft_to_peft(tuner: PromptTuning | PrefixTuning | PTuning2, model: Decoder) -> Adapter:
    """Rows, without what GPT-2 adds to them at their positions; or the keys and values of all layers.

    There, words begin at position P.  If they do not here, keys turn with the words that look at them.
    """
    c, wpe, parts, prompt = model.config, model.wpe, [], isinstance(tuner, PromptTuning)
    if not tuner.first and (prompt or wpe is not None):
        name = "prompt" if prompt else "ptuning2"
        raise ValueError(f"peft's soft tokens take positions, and this run's do not: train --method {name} -o shift=1")
    if prompt:
        rows, sizes = tuner.rows, {"token_dim": c.n_embd, "num_attention_heads": c.n_head}
        rows = rows if wpe is None else rows - wpe.weight[: len(rows)]
    else:
        for l, block in enumerate(model.h):
            k, v, _ = tuner.kv(block, l, torch.zeros(1), None)  # (1, G, P, D)
            if not tuner.first and block.attn.turns:
                k = rotate(k, rotary(c, torch.full(k.shape[2:3], k.shape[2])))
            parts += [x[0].transpose(0, 1).flatten(1) for x in (k, v)]
        rows, sizes = torch.cat(parts, 1), {"token_dim": parts[0].shape[1], "num_attention_heads": c.n_kv_head}
    sizes |= {"num_virtual_tokens": len(rows), "num_layers": c.n_layer, "num_transformer_submodules": 1}
    return sizes, {"prompt_embeddings": rows}


# -- Here --------------------------------------------------------------------------------------------------------------


def read_adapter(folder: str) -> Adapter:
    """What peft has written.  Raises ValueError for settings that our methods have no place for."""
    path = os.path.join(folder, "adapter_config.json")
    settings = read_json(path)
    kind = settings.get("peft_type") if isinstance(settings, dict) else settings
    if kind not in list(METHODS_BY_TYPE):
        raise ValueError(f"{path}: peft_type is {str(kind)[:80]!r}; we have {', '.join(METHODS_BY_TYPE)}")
    for name, x in settings.items():
        if x not in VALUES[name] if name in VALUES else x and x != "none" and name not in KNOWN:
            raise ValueError(f"{path}: {name} is {str(x)[:80]!r}, for which our {METHODS_BY_TYPE[kind]} has no place")
    for name, read in (("safetensors", pretrained.read_safetensors), ("bin", pretrained.read_bin)):
        if os.path.exists(file := os.path.join(folder, f"adapter_model.{name}")):
            return settings, {key: x.read().float() for key, x in read(file).items()}
    raise FileNotFoundError(f"{folder} has no adapter_model.safetensors")


def number(settings: dict, name: str, *kinds: type) -> int | float:
    """A positive number among the settings."""
    if type(x := settings.get(name)) not in kinds or not 0 < x < 2**31:
        raise ValueError(f"adapter_config.json: {name} must be a positive number, got {str(x)[:80]!r}")
    return x


def take(tensors: dict[str, Tensor], name: str, *shape: int) -> Tensor:
    """Take the tensor of this name and shape out of an adapter's."""
    if name not in tensors or tensors[name].shape != shape:
        found = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is missing"
        raise ValueError(f"{name} {found}; the model and adapter_config.json want {shape}")
    return tensors.pop(name)


def covering(model: Decoder, found: dict) -> tuple[str, list[str]]:
    """The option `on` of a tuner that has at least these modules, and all that it then has."""
    on = [site for site in linear_layers(model.config, "all")[0] if found.keys() & {*module_names(model, [site])}]
    return ",".join(site.partition(".")[2] for site in on), module_names(model, on)


def lora_from_peft(settings: dict, tensors: dict[str, Tensor], model: Decoder) -> Adapter:
    """A and B of a layer without an update are zeros, and stay zeros in training."""
    r, alpha, found, ours = number(settings, "r", int), number(settings, "lora_alpha", int, float), {}, {}
    for theirs, layers in linear_pairs(model):
        if f"{theirs}.lora_A.weight" in tensors:
            sizes = [x.out_features for x in layers.values()]
            A = take(tensors, f"{theirs}.lora_A.weight", r, next(iter(layers.values())).in_features)
            B = take(tensors, f"{theirs}.lora_B.weight", sum(sizes), r)
            found |= {name: (A, rows) for name, rows in zip(layers, B.split(sizes))}
    on, names = covering(model, found)
    for i, name in enumerate(names):
        n_out, n_in = model.get_submodule(name).weight.shape
        ours[f"A.{i}"], ours[f"B.{i}"] = found.get(name, (torch.zeros(r, n_in), torch.zeros(n_out, r)))
    return {"r": r, "alpha": float(alpha * r**0.5 if settings.get("use_rslora") else alpha), "on": on}, ours


def ia3_from_peft(settings: dict, tensors: dict[str, Tensor], model: Decoder) -> Adapter:
    """What scales the input of LLaMA's down is a scale of up's output: the two are multiplied with one another."""
    found = {}
    for theirs, layers in linear_pairs(model):
        if (name := f"{theirs}.ia3_l") in tensors:
            sizes = [x.out_features for x in layers.values()]
            if tensors[name].shape[:-1] == (1,):  # of an input
                if not theirs.endswith(".down_proj"):
                    raise ValueError(f"{name} scales an input; our ia3 scales outputs, and for LLaMA's down_proj up's")
                layers, sizes = [key.replace("down", "up") for key in layers], [model.config.n_inner]
                tensors[name] = tensors[name].T
            for key, scale in zip(layers, take(tensors, name, sum(sizes), 1)[:, 0].split(sizes)):
                found[key] = found.get(key, 1) * scale
    on, names = covering(model, found)
    scales = [found.get(name, torch.ones(model.get_submodule(name).out_features)) for name in names]
    return {"on": on}, {f"gains.{i}": scale - 1 for i, scale in enumerate(scales)}


def soft_from_peft(settings: dict, tensors: dict[str, Tensor], model: Decoder) -> Adapter:
    """Rows, with what GPT-2 adds to them at their positions; or the keys and values of all layers."""
    c, P, prompt = model.config, number(settings, "num_virtual_tokens", int), settings["peft_type"] == "PROMPT_TUNING"
    rows = take(tensors, "prompt_embeddings", P, c.n_embd if prompt else c.n_layer * 2 * c.n_kv_head * c.head_dim)
    if P >= c.block_size:
        raise ValueError(f"num_virtual_tokens is {P}, and the model has room for {c.block_size} tokens")
    if prompt:
        return {"P": P, "shift": True}, {"rows": rows if model.wpe is None else rows + model.wpe.weight[:P]}
    return {"P": P, "shift": True}, {f"constants.{l}": part for l, part in enumerate(rows.chunk(c.n_layer, 1))}


FORMATS = {  # method: its type there, and how to get there and back
    "lora": ("LORA", hooks_to_peft, lora_from_peft),
    "ia3": ("IA3", hooks_to_peft, ia3_from_peft),
    "prompt": ("PROMPT_TUNING", soft_to_peft, soft_from_peft),
    "prefix": ("PREFIX_TUNING", soft_to_peft, soft_from_peft),
    "ptuning2": ("PREFIX_TUNING", soft_to_peft, soft_from_peft),
}
METHODS_BY_TYPE = {kind: method for method, (kind, *_) in FORMATS.items()}  # ptuning2, not prefix


# -- The command line --------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="FROM", help="a run of train.py, or a folder that peft has written")
    parser.add_argument("new", metavar="TO", help="a new folder")
    parser.add_argument("--init", help="the frozen model (default: the one that FROM names)")
    parser.add_argument("--merge", action="store_true", help="from a run: write the tuned model itself, in fp32")
    parser.add_argument("--template", choices=["plain", "chat"], help="from peft: the prompts' layout (default: plain)")
    args = parser.parse_args(argv)
    args.theirs = os.path.exists(os.path.join(args.source, "adapter_config.json"))
    if args.merge if args.theirs else args.template:
        parser.error(f"--merge is for a run, --template for a folder that peft has written: {args.source} is the other")
    return args


def main(argv: list[str] | None = None):
    args = parse(argv)
    if os.path.exists(args.new) and (not os.path.isdir(args.new) or os.listdir(args.new)):
        raise FileExistsError(f"{args.new} is there already: name a new folder")
    (bring_here if args.theirs else take_there)(args)


def open_base(args: Namespace, name: str) -> tuple[str, Decoder]:
    """The model that --init names, or else FROM, and its folder."""
    try:
        folder = find_model(args.init or name)
        return folder, pretrained.load_pretrained(folder).requires_grad_(False)
    except OSError as e:
        raise FileNotFoundError(f"{args.source} is for {name}: {e} (--init names its place now)") from None


def take_there(args: Namespace):
    """Write a run as an adapter of peft, or as a model."""
    content = load_checkpoint(args.source)
    meta, whole = content["meta"], [name for name, cls in METHODS.items() if hasattr(cls, "merge")]
    method, init, run_of = meta["method"], args.init or meta["init"], f"{args.source} is a run of {meta['method']}"
    if method not in (able := whole if args.merge else list(FORMATS)):
        place = "--merge is" if args.merge else "peft has a place"
        advice = "add --merge" if method in whole else "use sample.py, or train one of these"
        raise UsageError(f"{run_of}, and {place} for {', '.join(able)}: {advice}")
    if meta["act"] != "all":
        option = "--hide-instruction" if meta["act"] == "hidden" else "--act answer"
        raise UsageError(f"{run_of} {option}, but there it would act on all tokens: train without, or use sample.py")
    folder, model = open_base(args, meta["init"])
    if (base := pretrained.fingerprint(model)) != meta["base"]:
        raise ValueError(f"{run_of} on {meta['init']} ({meta['base']}); {init} is another model ({base}): use --init")
    tuner = build(method, model.config, meta["options"]).requires_grad_(False).eval()
    load_into(tuner, content, args.source)
    if args.merge:
        tuner.merge(model)
        config = read_json(os.path.join(folder, "config.json"))  # with what it says beside sizes, such as eos_token_id
        config |= {"tie_word_embeddings": model.config.tied, "dtype": "float32"}
        os.makedirs(args.new, exist_ok=True)
        copy_tokenizer(folder, args.new)
        pretrained.save_pretrained(args.new, model)
        write_json(os.path.join(args.new, "config.json"), {k: x for k, x in config.items() if k != "torch_dtype"}, 2)
        use = f"AutoModelForCausalLM.from_pretrained({args.new!r})"
    else:
        kind, to_peft, _ = FORMATS[method]
        settings, tensors = to_peft(tuner, model)
        base = folder if init == "tiny" else NAMES.get(init, init)
        settings |= {"peft_type": kind, "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
        os.makedirs(args.new, exist_ok=True)
        pretrained.write_safetensors(os.path.join(args.new, "adapter_model.safetensors"), tensors)
        write_json(os.path.join(args.new, "adapter_config.json"), {**settings, "inference_mode": True}, indent=2)
        use = f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {args.new!r})"
    print(f"saved {args.new}: {use}", f"its prompts are those of --template {meta['template']}", sep="\n")


def bring_here(args: Namespace):
    """Write an adapter of peft as a run."""
    settings, tensors = read_adapter(args.source)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not args.init and (not base or not isinstance(base, str) or revision not in (None, "", "main")):
        raise UsageError(f"{args.source} is for {base!r}, revision {revision!r}: --init names the folder of that model")
    method, init, template = METHODS_BY_TYPE[settings["peft_type"]], args.init or base, args.template or "plain"
    _, model = open_base(args, base)
    options, ours = FORMATS[method][2](settings, tensors, model)
    if tensors or not ours:
        raise ValueError(f"{args.source} has {min(tensors, default='no tensors')[:120]}: our {method} cannot take it")
    tuner = build(method, model.config, options := as_options(options))
    load_into(tuner, {"tuner": ours}, args.source)
    meta = {"method": method, "act": "all", "distill": 0.0, "options": options, "init": init, "template": template}
    os.makedirs(args.new, exist_ok=True)
    save_tuner(os.path.join(args.new, "best.pt"), tuner, {**meta, "base": pretrained.fingerprint(model)})
    train = ["--init", init, "--template", template, "--method", method, "-o", *options, "--warm-start", args.new]
    train += ["--block-size", str(model.config.block_size - tuner.first)] * (tuner.first > 0)
    print(f"saved {os.path.join(args.new, 'best.pt')}: a run of {method}")
    print("try it:", shlex.join(["python", "sample.py", args.new, "an instruction"]))
    print("go on:", shlex.join(["python", "train.py", *train, "--out", f"{args.new}-2", "--data"]), "...")


if __name__ == "__main__":
    run(main)
