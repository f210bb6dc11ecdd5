"""Plots show what is there."""

import builtins
import json
import os
import xml.etree.ElementTree as ET

import pytest
import torch
from conftest import ROOT, SMALL, right_padded, run_in, shake, small_model

import train
from baselines import build
from data import Batch
from experiments import plots


@pytest.fixture(scope="session")
def runs(short, rows, tmp_path_factory):
    """Folders of short runs: of IAPT, of the paper's form of it, and of LoRA."""
    folders = {"iapt": short}
    for method in ("paper-iapt", "lora"):
        folders[method] = str(tmp_path_factory.mktemp("runs") / method)
        train.main([*SMALL, "--data", rows, "--method", method, "--out", folders[method]])
    return folders


def small_batch():
    """Two rows of nine tokens; the instruction is the first four."""
    idx, t = torch.randint(10, 50, (2, 9)), torch.arange(9)
    targets = torch.where(t >= torch.tensor([[4], [6]]), idx, -1)
    return Batch(idx, targets, t.expand(2, -1) < 4)


def test_the_words_and_shades_are_those_of_the_pooling(tmp_path):
    weights = torch.tensor([[[0.36, 0.64], [1.0, 0.0]]])
    path = tmp_path / "x.svg"
    path.write_text("\n".join(plots.reads_svg(["<a", " & b"], weights, [1])))
    svg = "{http://www.w3.org/2000/svg}"
    texts = [node.text for node in ET.parse(path).iter(f"{svg}text")]
    assert texts == ["layer  1, token  1", "<a", "& b", "layer  1, token  2", "<a", "& b"]
    shades = [float(node.get("opacity")) for node in ET.parse(path).iter(f"{svg}rect")]
    assert shades == [0.6, 0.8, 1.0, 0.0]  # square roots of the weights


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("method, options", [("iapt", ["P=1", "repeat=3"]), ("paper-iapt", ["P=3"])])
def test_where_all_tokens_are_alike_the_soft_ones_share_attention_by_their_number(arch, method, options):
    """With queries of zero and values that are all the same, token t finds P of P + t + 1 in P soft tokens.  In a
    softmax of their own it finds as much as in all tokens.
    """
    model = small_model(arch)
    for block in model.h:
        for linear in (block.attn.q, block.attn.v):
            torch.nn.init.zeros_(linear.weight)
            linear.bias = torch.nn.Parameter(torch.full((linear.out_features,), float(linear is block.attn.v)))
    tuner, batch = build(method, model.config, options), small_batch()
    if method == "iapt":
        for values in tuner.values:
            torch.nn.init.ones_(values)
    share = plots.soft_share(model, tuner, batch)
    t = torch.arange(9)
    wanted = torch.tensor(0.5) if method == "iapt" else (3 / (3 + t + 1)).expand(2, -1)[batch.targets >= 0].mean()
    torch.testing.assert_close(share, wanted.expand_as(share))


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["iapt", "paper-iapt", "lora"])
def test_what_a_head_finds_is_what_attention_adds_up(arch, method):
    """Soft tokens and tokens together, computed from the blocks' inputs, are the input of the output projection."""
    model = small_model(arch)
    tuner, batch = shake(build(method, model.config)), small_batch()
    tuner.attach(model)
    blocks, projections = [], []
    for block in model.h:
        block.register_forward_pre_hook(lambda block, args: blocks.append((block, args)))
        block.attn.o.register_forward_pre_hook(lambda _, args: projections.append(args[0]))
    model.hidden(batch.idx, batch.instr, tuner)
    for (block, args), projected in zip(blocks, projections, strict=True):
        soft, tokens = plots.attention_results(block, *args)
        torch.testing.assert_close((soft + tokens).transpose(1, 2).flatten(2), projected)
        assert (soft.norm() > 0) == (method != "lora")


def test_inside_says_how_many_words_are_read_and_what_the_instruction_changes():
    """By hand where it is known: scores of zero read all n words alike; an up-projection of zero writes nothing."""
    model = small_model("gpt2")
    idx, instr = right_padded([8, 8, 8], 8)
    batch = Batch(idx, idx, instr)

    def first_layer(tuner):
        lines = [line.strip("| ").split(" | ") for line in plots.inside_table(model, tuner, batch)]
        assert len(lines) == 2 + model.config.n_layer
        return dict(zip(lines[0], lines[2], strict=True))

    tuner = build("iapt", model.config)
    for generator in tuner.generators:
        torch.nn.init.zeros_(generator.w_sa)
    alike = first_layer(tuner)
    x, _ = model.embed(idx, torch.arange(8))
    assert alike["length of H"] == f"{x.norm(dim=-1).mean():.1f}"
    assert alike["words read"] == "8.0, 8.0, 8.0, 8.0"
    assert alike["generated"] == alike["by instruction"] == "0.0"
    shaken = first_layer(shake(tuner, 0.3))
    assert shaken["by instruction"] != "0.0" and shaken["words read"] != alike["words read"]
    model.bfloat16()
    assert first_layer(tuner)["words read"]


def arguments(plot, runs, folder):
    """What a plot takes on the command line."""
    cells = {"shape": "small", "prompt": 8, "new": 8}
    table = [{**cells, "tenants": n, "method": m, plots.COST: [n, n / 2, 2 * n]} for n in (1, 4) for m in "ab"]
    (folder / "serve.json").write_text(json.dumps({"rows": table}))
    curves = {"iapt": [[[1, 2.0], [2, 1.0]]], "constants": [[[1, 2.0], [2, 1.5]]]}
    cell = {"steps": 2, "constants minus iapt": [0.5, 0.4, 0.6], "validation": curves}
    told = {"constants minus told": [0.7, 0.6, 0.8]}
    table = [{**cell, "model": model, "tasks": n, **(told if model == "a" else {})} for model in "ab" for n in (4, 64)]
    (folder / "tasks.json").write_text(json.dumps(table))
    special = {"reads": [runs["iapt"], "the past of go ?"], "curves": list(runs.values())}
    special |= {name: [str(folder / f"{name}.json")] for name in ("serve", "tasks")}
    return special.get(plot, [runs["iapt"]])


def test_reads_draws_the_layers_that_are_asked_for(runs, tmp_path):
    path = tmp_path / "x.svg"
    status, text = run_in(plots, "reads", runs["iapt"], "the past of go ?", "--layers", "4", "2", "--out", str(path))
    assert status == 0, text
    names = [x.text for x in ET.parse(path).getroot().iter() if x.get("class") == "name"]
    assert names == [f"layer {l:2}, token {p:2}" for l in (4, 2) for p in (1, 2, 3, 4)]


@pytest.mark.parametrize("plot", list(plots.PLOTS))
def test_a_plot_is_an_svg_file_and_the_same_each_time(plot, runs, tmp_path):
    if plot != "reads":
        pytest.importorskip("matplotlib", reason="plots but `reads` need matplotlib")
    content = []
    for name in "ab":
        path = tmp_path / f"{name}.svg"
        status, text = run_in(plots, plot, *arguments(plot, runs, tmp_path), "--out", str(path))
        assert status == 0, text
        assert ET.parse(path).getroot().tag.endswith("svg")
        content.append(path.read_bytes())
    assert content[0] == content[1]


@pytest.mark.parametrize("plot", ["activations", "attention", "reads"])
def test_the_paper_s_form_can_be_drawn_too(plot, runs, tmp_path):
    if plot != "reads":
        pytest.importorskip("matplotlib", reason="plots but `reads` need matplotlib")
    path = tmp_path / "x.svg"
    more = ["the past of go ?"] if plot == "reads" else []
    status, text = run_in(plots, plot, runs["paper-iapt"], *more, "--out", str(path))
    assert status == 0, text
    assert ET.parse(path).getroot().tag.endswith("svg")


def test_inside_prints_a_line_for_each_layer(runs):
    for method in ("iapt", "paper-iapt"):
        status, text = run_in(plots, "inside", runs[method])
        assert status == 0 and len(text.splitlines()) == 2 + 4, text


@pytest.mark.parametrize(
    "status, args, message",
    [
        (2, ["activations", "lora"], "only that has generators to look into"),
        (2, ["reads", "iapt"], "reads takes a run and an instruction, got 1"),
        (2, ["attention", "iapt", "lora"], "attention takes one run, got 2"),
        (2, ["curves", "iapt", "--input", "x"], "--input and --layers are for reads"),
        (2, ["reads", "iapt", "the past of go ?", "--layers", "2", "9"], "--layers: there are 4, got 9"),
        (1, ["curves", "nowhere"], "no nowhere/log.jsonl: curves are of folders of runs"),
        (1, ["activations", "nowhere"], "no checkpoint at nowhere"),
        (2, ["inside", "iapt"], "inside prints a table, and takes no --out"),
        (1, ["tasks", os.path.join(ROOT, "data", "tiny", "config.json")], "is not a tasks.json of experiments.tasks"),
        (1, ["tasks", "nowhere"], "there is no nowhere. Run: python -m experiments.tasks"),
        (1, ["serve", "nowhere"], "there is no nowhere. Run: python -m experiments.bench serve"),
        (2, ["dance", "iapt"], "invalid choice: 'dance'"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(status, args, message, runs, tmp_path):
    if args[0] in ("activations", "curves", "tasks", "serve"):
        pytest.importorskip("matplotlib", reason="these plots need matplotlib")
    result, text = run_in(plots, *(runs.get(arg, arg) for arg in args), "--out", str(tmp_path / "x.svg"))
    assert result == status and message in text and text.count("error: ") == 1
    assert not os.path.exists(tmp_path / "x.svg")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "is not a serve.json of experiments.bench"),
        ("[3]", "is not a serve.json of experiments.bench"),
        ("{", "is not JSON"),
        ([("a", 1), ("b", 2)], "varies shape and tenants: a plot is by tenants, prompt or new alone"),
    ],
)
def test_a_table_that_cannot_be_drawn_is_named(content, message, tmp_path):
    path = tmp_path / "serve.json"
    if isinstance(content, list):
        cells = {"prompt": 8, "new": 8, "method": "a", plots.COST: [1, 1, 1]}
        content = json.dumps({"rows": [{**cells, "shape": shape, "tenants": n} for shape, n in content]})
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        plots.read_serve(str(path))


def test_without_matplotlib_it_says_how_to_get_it(runs, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    status, text = run_in(plots, "curves", runs["iapt"], "--out", str(tmp_path / "x.svg"))
    assert status == 1 and text == "error: this plot needs matplotlib: pip install matplotlib\n"
