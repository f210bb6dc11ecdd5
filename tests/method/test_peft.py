"""Runs in peft's format, and back: the same logits on both sides, or a refusal."""

import functools
import json
import os
import shlex
import shutil
from copy import deepcopy

import pytest
import torch
from conftest import run_in, shake, small_model

import sample
import train
from baselines import build, peft, spell_out
from plumbing import pretrained
from plumbing.checkpoint import load_checkpoint, load_into, save_tuner

IDX = torch.randint(1, 50, (2, 11), generator=torch.Generator().manual_seed(3))
TOLERANCE = 5e-5  # of logits up to 9, in fp32
RUNS = ["lora", "lora on=k,o,v,up r=3 alpha=4", "ia3 on=all", "prompt P=6 shift=1", "ptuning2 P=5 shift=1"]
CASES = [(arch, run) for arch in ("gpt2", "llama") for run in RUNS]
CASES += [("llama", "ptuning2 P=5"), ("llama", "prefix P=4 hidden=8"), ("smollm3", "ptuning2 P=5")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of small models: {name: path}."""
    folders = {}
    for arch in ("gpt2", "llama", "smollm3"):
        folders[arch] = str(tmp_path_factory.mktemp(arch))
        model = small_model("llama", no_rope=2) if arch == "smollm3" else small_model(arch)
        pretrained.save_pretrained(folders[arch], model)
        edit(folders[arch], "config.json", pad_token_id=0, eos_token_id=7)
        with open(os.path.join(folders[arch], "tokenizer_config.json"), "w") as f:
            f.write("{}")
    return folders


def edit(folder, name, **changes):
    path = os.path.join(folder, name)
    with open(path, encoding="utf-8") as f:
        content = {**json.load(f), **changes}
    with open(path, "w", encoding="utf-8") as f:
        json.dump(content, f)


def new_run(folder, base, run, act="all"):
    """A shaken run of a method with its options, such as "lora r=3"."""
    method, *options = run.split()
    model = pretrained.load_pretrained(base)
    torch.manual_seed(0)
    tuner = build(method, model.config, options, act)
    tuner.start(model)
    meta = {"method": method, "act": act, "options": spell_out(method, options, act), "template": "plain"}
    os.makedirs(folder)
    best = os.path.join(folder, "best.pt")
    save_tuner(best, shake(tuner, 0.2), {**meta, "init": base, "base": pretrained.fingerprint(model)})
    return str(folder)


@torch.no_grad()
def our_logits(run):
    content = load_checkpoint(run)
    meta = content["meta"]
    model = pretrained.load_pretrained(meta["init"])
    tuner = build(meta["method"], model.config, meta["options"], meta["act"]).eval()
    load_into(tuner, content, run)
    tuner.attach(model)
    return model(IDX, torch.ones_like(IDX, dtype=torch.bool), tuner)


@functools.cache
def opened(folder):
    return pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def their_logits(base, adapter):
    model = pytest.importorskip("peft", reason="pip install peft").PeftModel.from_pretrained(
        deepcopy(opened(base)), adapter
    )
    return model.eval()(input_ids=IDX).logits[:, -IDX.shape[1] :]  # those of prompt tuning's rows are before


def converted(*args):
    """The folder that the command has written."""
    status, text = run_in(peft, *map(str, args))
    assert status == 0, text
    return str(args[1])


@pytest.mark.parametrize("arch, run", CASES)
def test_a_run_gives_the_same_logits_in_peft_and_when_it_comes_back(arch, run, bases, tmp_path):
    ours = new_run(tmp_path / "run", bases[arch], run)
    wanted = our_logits(ours)
    adapter = converted(ours, tmp_path / "adapter")
    assert (their_logits(bases[arch], adapter) - wanted).abs().max() < TOLERANCE
    assert (our_logits(converted(adapter, tmp_path / "back")) - wanted).abs().max() < TOLERANCE
    assert (wanted - pretrained.load_pretrained(bases[arch])(IDX)).abs().max() > 0.5  # it acts


LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6}
SOFT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
THEIRS = [
    ("gpt2", "Lora", {**LORA, "use_rslora": True, "target_modules": ["c_attn", "c_fc"], "layers_to_transform": [1]}),
    ("llama", "Lora", {**LORA, "target_modules": "all-linear", "lora_dropout": 0.1, "init_lora_weights": "gaussian"}),
    ("gpt2", "IA3", {"target_modules": ["c_attn"], "feedforward_modules": []}),
    ("llama", "IA3", {"target_modules": ["k_proj", "up_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    ("gpt2", "PromptTuning", SOFT),
    ("llama", "PromptTuning", SOFT),
    ("gpt2", "PrefixTuning", SOFT),
    ("llama", "PrefixTuning", {**SOFT, "prefix_projection": True, "encoder_hidden_size": 8}),
]


@pytest.mark.parametrize("arch, kind, settings", THEIRS)
def test_what_peft_has_made_gives_the_same_logits_here(arch, kind, settings, bases, tmp_path):
    theirs = pytest.importorskip("peft", reason="pip install peft")
    config = getattr(theirs, f"{kind}Config")(**settings)
    model = theirs.get_peft_model(deepcopy(opened(bases[arch])), config).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p += 0.2 * torch.randn(p.shape, generator=g)
        wanted = model(input_ids=IDX).logits[:, -IDX.shape[1] :]
    model.save_pretrained(tmp_path / "theirs")
    ours = converted(tmp_path / "theirs", tmp_path / "ours", "--init", bases[arch])
    assert (our_logits(ours) - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("run", ["lora on=all r=3", "full"])
def test_a_merged_run_is_a_model_for_transformers_with_its_base_s_other_files(arch, run, bases, tmp_path):
    ours = new_run(tmp_path / "run", bases[arch], run)
    model = converted(ours, tmp_path / "model", "--merge")
    with torch.no_grad():
        logits = opened(model)(IDX).logits
    assert (logits - our_logits(ours)).abs().max() < TOLERANCE
    assert opened(model).config.eos_token_id == 7 and "tokenizer_config.json" in os.listdir(model)


def test_a_run_that_has_come_from_peft_goes_on_with_the_command_that_is_printed(bases, tmp_path):
    for run in ("lora on=q,up r=3 alpha=0.7", "ptuning2 P=5 shift=1"):
        folder = tmp_path / run.split()[0]
        adapter = converted(new_run(folder / "run", bases["llama"], run), folder / "adapter")
        status, text = run_in(peft, adapter, str(folder / "back"), "--template", "chat")
        words = shlex.split(text.splitlines()[-1].removeprefix("go on: python train.py"))
        args, meta = train.parse([*words[:-1], "rows.jsonl"]), load_checkpoint(str(folder / "back"))["meta"]
        assert (args.method, args.o, args.init, args.template) == (
            meta["method"], meta["options"], meta["init"], meta["template"])  # fmt: skip
        assert args.warm_start == str(folder / "back") and args.block_size == (59 if run[0] == "p" else None)


# -- Refusals ----------------------------------------------------------------------------------------------------------

PLACES = "has a place for lora, ia3, prompt, prefix, ptuning2"


@pytest.mark.parametrize(
    "run, act, options, says",
    [
        (
            "iapt",
            "all",
            "",
            "is a run of iapt, and peft has a place for lora, ia3, prompt, prefix, ptuning2: use sample.py",
        ),
        (
            "full",
            "all",
            "",
            "is a run of full, and peft has a place for lora, ia3, prompt, prefix, ptuning2: add --merge",
        ),
        (
            "ia3",
            "all",
            "--merge",
            "is a run of ia3, and --merge is for lora, full: use sample.py, or train one of these",
        ),
        ("lora", "answer", "", "is a run of lora --act answer, but there it would act on all tokens: train without"),
        ("lora", "answer", "--merge", "is a run of lora --act answer, but there"),
        ("ptuning2", "hidden", "", "is a run of ptuning2 --hide-instruction, but there"),
        ("ptuning2", "all", "", "this run's do not: train --method ptuning2 -o shift=1"),
        ("prefix", "all", "", "this run's do not: train --method ptuning2 -o shift=1"),
        ("prompt", "all", "", "this run's do not: train --method prompt -o shift=1"),
        ("lora", "all", "--template chat", "--merge is for a run, --template for a folder that peft has written"),
        ("lora", "all", "--init LLAMA", "is another model"),
        ("lora", "all", "--init /no/such", "no model at /no/such: it is no folder"),
    ],
)
def test_what_would_be_another_function_in_peft_is_refused(run, act, options, says, bases, tmp_path):
    ours, new = new_run(tmp_path / "run", bases["gpt2"], run, act), str(tmp_path / "new")
    status, text = run_in(peft, ours, new, *options.replace("LLAMA", bases["llama"]).split())
    assert status and says in text and text.count("\n") == 1
    assert not os.path.exists(new)


def test_a_folder_with_something_in_it_is_left_alone(bases, tmp_path):
    ours = new_run(tmp_path / "run", bases["gpt2"], "lora")
    status, text = run_in(peft, ours, ours)
    assert status and "is there already: name a new folder" in text and os.listdir(ours) == ["best.pt"]


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    return converted(new_run(folder / "run", bases["llama"], "lora r=4"), folder / "adapter")


def refused(adapter, folder, change):
    """What the command says of a changed copy of an adapter."""
    changed = shutil.copytree(adapter, folder / "changed")
    change(changed)
    status, text = run_in(peft, str(changed), str(folder / "new"))
    assert status and text.count("\n") == 1 and not os.path.exists(folder / "new")
    return text


@pytest.mark.parametrize(
    "name, x, says",
    [
        ("use_dora", True, "use_dora is 'True', for which our lora has no place"),
        ("bias", "lora_only", "bias is 'lora_only'"),
        ("lora_bias", True, "lora_bias is 'True'"),
        ("modules_to_save", ["lm_head"], "modules_to_save is"),
        ("rank_pattern", {"q_proj": 2}, "rank_pattern is"),
        ("alpha_pattern", {"q_proj": 2}, "alpha_pattern is"),
        ("layer_replication", [[0, 1]], "layer_replication is"),
        ("trainable_token_indices", [3], "trainable_token_indices is"),
        ("target_parameters", ["x"], "target_parameters is"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights is 'pissa_niter_4'"),
        ("a_setting_of_next_year", 0.5, "a_setting_of_next_year is '0.5'"),
        ("use_rslora", "yes", "use_rslora is 'yes'"),
        ("task_type", "SEQ_CLS", "task_type is 'SEQ_CLS'"),
        ("peft_type", "ADALORA", "peft_type is 'ADALORA'; we have LORA, IA3, PROMPT_TUNING, PREFIX_TUNING"),
        ("peft_type", ["LORA"], "peft_type is"),
        ("r", 5, "lora_A.weight has shape (4, 32); the model and adapter_config.json want (5, 32)"),
        ("r", "4", "r must be a positive number, got '4'"),
        ("lora_alpha", None, "lora_alpha must be a positive number, got 'None'"),
        ("revision", "v2", "revision 'v2': --init names the folder of that model"),
        ("base_model_name_or_path", None, "is for None, revision None: --init names the folder of that model"),
    ],
)
def test_a_setting_of_peft_that_we_do_not_have_is_refused_by_name(name, x, says, adapter, tmp_path):
    assert says in refused(adapter, tmp_path, lambda folder: edit(folder, "adapter_config.json", **{name: x}))


NAME = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda x: {**x, "base_model.model.lm_head.lora_A.weight": x[NAME]},
            "has base_model.model.lm_head.lora_A.weight",
        ),
        (lambda x: {**x, NAME: x[NAME][:, :2]}, f"{NAME} has shape (16, 2); the model and"),
        (lambda x: {name: t for name, t in x.items() if name != NAME}, f"{NAME} is missing"),
        (lambda x: {}, "has no tensors: our lora cannot take it"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, says, adapter, tmp_path):
    def edit_tensors(folder):
        path = os.path.join(folder, "adapter_model.safetensors")
        pretrained.write_safetensors(path, change(tensors_of(folder)))

    assert says in refused(adapter, tmp_path, edit_tensors)


def tensors_of(folder):
    path = os.path.join(folder, "adapter_model.safetensors")
    return {name: x.read().clone() for name, x in pretrained.read_safetensors(path).items()}


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_an_adapter_in_an_old_file_is_read_without_running_what_is_in_it(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = shutil.copytree(adapter, tmp_path / "old")
    content = tensors_of(old)
    os.remove(old / "adapter_model.safetensors")
    assert "has no adapter_model.safetensors" in refused(old, tmp_path, lambda folder: None)
    torch.save(content, old / "adapter_model.bin")
    assert load_checkpoint(converted(old, "back"))["meta"]["options"] == ["r=4", "alpha=16.0", "on=q,v"]
    torch.save({**content, "x": Code()}, old / "adapter_model.bin")
    status, text = run_in(peft, str(old), "again")
    assert status and "not a file of tensors alone" in text and not os.path.exists("ran")


def test_an_input_s_scale_is_refused_where_it_is_not_an_output_s(bases, tmp_path):
    """GPT-2 has a GELU between its up and its down."""
    folder = converted(new_run(tmp_path / "run", bases["gpt2"], "ia3 on=down"), tmp_path / "adapter")
    path = os.path.join(folder, "adapter_model.safetensors")
    pretrained.write_safetensors(path, {name: torch.ones(1, 128) for name in tensors_of(folder)})
    status, text = run_in(peft, folder, str(tmp_path / "new"))
    assert status and "mlp.c_proj.ia3_l scales an input; our ia3 scales outputs" in text


def test_where_a_run_or_a_model_is_wanted_an_adapter_is_called_one(adapter):
    command = f"python -m baselines.peft {shlex.quote(adapter)} NEW makes it a run"
    for where in (adapter, os.path.join(adapter, "best.pt"), os.path.join(adapter, "adapter_model.safetensors")):
        assert command in run_in(sample, where, "hello")[1]
    with pytest.raises(ValueError, match="an adapter that we do not apply: python -m baselines.peft"):
        pretrained.load_pretrained(adapter)
