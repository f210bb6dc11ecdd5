"""Pictures show what is there."""

import builtins
import json
import os
import xml.etree.ElementTree as ET

import pytest
import torch
from conftest import right_padded, shake, small_model
from test_train import SMALL, rows, run_in  # noqa: F401  (rows is a fixture)

import pictures
import train
from baselines import build


@pytest.fixture(scope="session")
def runs(rows, tmp_path_factory):  # noqa: F811
    """Folders of two short runs, of IAPT and of LoRA."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("iapt", "lora"):
        train.main([*SMALL, "--data", rows, "--method", method, "--out", str(folder / method)])
    return {method: str(folder / method) for method in ("iapt", "lora")}


def texts(path):
    return [node.text for node in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_the_words_and_shades_are_those_of_the_pooling(tmp_path):
    weights = torch.tensor([[[0.25, 0.75], [1.0, 0.0]]])
    path = tmp_path / "x.svg"
    path.write_text("\n".join(pictures.reads_svg(["<a", " & b"], weights)))
    assert texts(path) == ["layer  1, token  1", "<a", "& b", "layer  1, token  2", "<a", "& b"]
    shades = [float(node.get("opacity")) for node in ET.parse(path).iter("{http://www.w3.org/2000/svg}rect")]
    assert shades == weights.flatten().tolist()


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("apart", [0, 1])
def test_what_attention_finds_where_nothing_differs_is_of_soft_tokens_by_their_number(arch, apart):
    """With queries of zero and values that are all the same, token t finds P of P + t + 1 in P soft tokens, and as much
    as in all tokens if they are apart.
    """
    model = small_model(arch)
    for block in model.h:
        for linear in (block.attn.q, block.attn.v):
            torch.nn.init.zeros_(linear.weight)
            if linear.bias is not None:
                torch.nn.init.zeros_(linear.bias)
        block.attn.v.bias = torch.nn.Parameter(torch.ones(block.attn.v.out_features))
    tuner = build("iapt", model.config, ["P=3", "space=hidden", "static=1", f"apart={apart}"])
    idx, t = torch.randint(10, 50, (2, 9)), torch.arange(9)
    targets = torch.where(t[None] >= torch.tensor([[4], [6]]), idx, -1)
    before = model(idx, t[None] < 4, tuner)
    share = pictures.soft_share(model, tuner, idx, targets, t[None].expand(2, -1) < 4)
    wanted = (3 / (3 + t + 1)).expand(2, -1)[targets >= 0].mean() if not apart else torch.tensor(0.5)
    torch.testing.assert_close(share, wanted.expand_as(share))
    assert torch.equal(model(idx, t[None] < 4, tuner), before)  # and the model is as it was


def test_inside_says_how_many_words_are_read_and_what_the_instruction_changes():
    """By hand where it is known: of n words the mean reads n; a blind generator writes the same for every row."""
    model, cells = small_model("gpt2"), {}
    idx, instr = right_padded([8, 8, 8], 8)
    for pool in ("mean", "last", "none", "attention"):
        tuner = shake(build("iapt", model.config, [f"pool={pool}"]), 0.3)
        table = [line.strip("| ").split(" | ") for line in pictures.inside(model, tuner, idx, idx, instr)]
        cells[pool] = dict(zip(table[0], table[2], strict=True))
        assert len(table) == 2 + model.config.n_layer
    x, _ = model.embed(idx, torch.arange(8))
    assert cells["mean"]["length of H"] == f"{x.norm(dim=-1).mean():.1f}"
    assert cells["mean"]["words read"] == "8.0" and cells["last"]["words read"] == "1.0"
    assert cells["none"]["by instruction"] == "0.0" != cells["attention"]["by instruction"]
    assert len(list(pictures.inside(model.bfloat16(), tuner, idx, idx, instr))) == len(table)


@pytest.mark.parametrize("picture", list(pictures.PICTURES))
def test_a_picture_is_an_svg_file_and_the_same_each_time(picture, runs, tmp_path):
    if picture != "reads":
        pytest.importorskip("matplotlib", reason="pictures but `reads` want matplotlib")
    cost = "decode, of the frozen model's"
    same = {"shape": "small", "prompt": 8, "new": 8}
    table = [{**same, "tenants": n, "method": m, cost: [n, n / 2, 2 * n]} for n in (1, 4) for m in "ab"]
    (tmp_path / "serve.json").write_text(json.dumps({"rows": table}))
    given = {"reads": [runs["iapt"], "the past of go ?"], "curves": list(runs.values()),
             "serve": [str(tmp_path / "serve.json")]}.get(picture, [runs["iapt"]])  # fmt: skip
    content = []
    for name in "ab":
        path = tmp_path / f"{name}.svg"
        assert run_in(pictures, picture, *given, "--out", str(path))[0] == 0
        assert ET.parse(path).getroot().tag.endswith("svg")
        content.append(path.read_bytes())
    assert content[0] == content[1]


@pytest.mark.parametrize("options", ["one_act=1", "pool=mean", "share=2", "norm=0", "activation=tanh"])
def test_every_form_of_iapt_can_be_looked_into(options, rows, tmp_path):  # noqa: F811
    pytest.importorskip("matplotlib", reason="activations want matplotlib")
    train.main([*SMALL, "--data", rows, "--out", str(tmp_path / "run"), "-o", options])
    for picture, *more in (("activations",), ("reads", "the past of go ?"), ("attention",)):
        path = str(tmp_path / "x.svg")
        status, text = run_in(pictures, picture, str(tmp_path / "run"), *more, "--out", path)
        assert status == 0, text
        assert ET.parse(path).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    "status, args, says",
    [
        (2, ["activations", "lora"], "only that has generators to look into"),
        (2, ["reads", "iapt"], "reads takes a run and an instruction"),
        (1, ["curves", "nowhere"], "no nowhere/log.jsonl: curves are of folders of runs"),
        (1, ["activations", "nowhere"], "no checkpoint at nowhere"),
        (2, ["inside", "iapt"], "inside prints a table, and takes no --out"),
        (2, ["dance", "iapt"], "invalid choice: 'dance'"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(status, args, says, runs, tmp_path):
    if args[0] != "reads" and args[0] != "dance":
        pytest.importorskip("matplotlib", reason="pictures but `reads` want matplotlib")
    found, text = run_in(pictures, *(runs.get(arg, arg) for arg in args), "--out", str(tmp_path / "x.svg"))
    assert found == status and says in text and text.count("error: ") == 1
    assert not os.path.exists(tmp_path / "x.svg")


def test_without_matplotlib_it_says_how_to_get_it(runs, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    status, text = run_in(pictures, "curves", runs["iapt"], "--out", str(tmp_path / "x.svg"))
    assert status == 1 and text == "error: this picture needs matplotlib: pip install matplotlib\n"
