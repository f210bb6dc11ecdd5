"""Plots show what is there."""

import builtins
import os
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, run_in

import train
from experiments import plots

P3_FROZEN = os.path.join(ROOT, "experiments", "results", "p3", "frozen-chat.npz")


@pytest.fixture(scope="session")
def runs(short, rows, tmp_path_factory):
    """Folders of short runs: of IAPT, of the paper's form of it, and of LoRA."""
    folders = {"iapt": short}
    for method in ("paper-iapt", "lora"):
        folders[method] = str(tmp_path_factory.mktemp("runs") / method)
        train.main([*SMALL, "--data", rows, "--method", method, "--out", folders[method]])
    return folders


def test_the_words_and_shades_are_those_of_the_pooling(tmp_path):
    weights = torch.tensor([[[0.36, 0.64], [1.0, 0.0]]])
    path = tmp_path / "x.svg"
    path.write_text("\n".join(plots.reads_svg(["<a", " & b"], weights, [1])))
    svg = "{http://www.w3.org/2000/svg}"
    texts = [node.text for node in ET.parse(path).iter(f"{svg}text")]
    assert texts == ["layer  1, token  1", "<a", "& b", "layer  1, token  2", "<a", "& b"]
    shades = [float(node.get("opacity")) for node in ET.parse(path).iter(f"{svg}rect")]
    assert shades == [0.6, 0.8, 1.0, 0.0]  # square roots of the weights


def arguments(plot, runs, folder):
    """What a plot takes on the command line."""
    return {
        "reads": [runs["iapt"], "the past of go ?"],
        "curves": list(runs.values()),
        "shares": [saved_divergences(folder)],
        "bars": [f"small={saved_scores(folder)}", f"P=4, again={saved_scores(folder)}"],
    }[plot]


def saved_scores(folder, methods=plots.BARS):
    """Two seeds of 50 rows: the first is right on all of them, the second on half."""
    wrong = {f"{m}/{seed}/test/wrong": np.arange(50) % (seed + 1) for m in methods for seed in (0, 1)}
    np.savez(folder / "scores.npz", **wrong, **{f"{m}/0/test/nats": np.ones(50) for m in methods})
    return str(folder / "scores.npz")


def saved_divergences(folder):
    """Of four rows: the blind model's, and those of methods whose soft tokens take a part of it away."""
    left = {"blind": 1.0, "summary": 0.2, "summary-8": 0.1, "means-1": 0.9, "cut-4": 0.7, "constants": 0.6}
    arrays = {f"{name}/0/test/kl": np.full(4, kl) for name, kl in left.items()}
    arrays |= {f"{name}/0/test/nats": np.ones(4) for name in ("frozen", *left)} | {"frozen/0/test/tokens": np.ones(4)}
    np.savez(folder / "divergences.npz", **arrays)
    return str(folder / "divergences.npz")


def test_shares_draws_each_method_by_its_number_of_soft_tokens_from_no_number_that_was_not_saved(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="plots but `reads` need matplotlib")
    drawn = {}
    axis = plots.pyplot().Axes
    monkeypatch.setattr(axis, "errorbar", lambda self, P, share, *_, label, **__: drawn.update({label: (P, share)}))
    monkeypatch.setattr(plots, "save", lambda figure, path: None)
    monkeypatch.setattr(axis, "legend", lambda *_, **__: None)
    plots.main(["shares", saved_divergences(tmp_path), "--out", str(tmp_path / "x.svg")])
    points = {label: list(zip(P, np.round(share))) for label, (P, share) in drawn.items()}
    wanted = {
        "soft tokens, trained": [(4, 80), (8, 90)],
        "averages, untrained": [(1, 10)],
        "the first words": [(4, 30)],
    }
    assert points == wanted


def test_a_bar_is_the_mean_over_seeds_and_its_interval_ends_at_100_percent(tmp_path):
    bars = plots.exact_rows(saved_scores(tmp_path))
    assert len(bars) == 3
    for mean, low, high in bars:
        assert mean == pytest.approx(75) and 20 < low < 60 and high == 100


@pytest.mark.parametrize("method", ["iapt", "paper-iapt"])
def test_reads_draws_the_layers_that_are_asked_for(method, runs, tmp_path):
    path = tmp_path / "x.svg"
    status, text = run_in(plots, "reads", runs[method], "the past of go ?", "--layers", "4", "2", "--out", str(path))
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


@pytest.mark.parametrize(
    "status, args, message",
    [
        (2, ["reads", "lora", "the past of go ?"], "only that has generators to look into"),
        (2, ["reads", "iapt"], "the following arguments are required: instruction"),
        (2, ["curves", "iapt", "--layers", "2"], "unrecognized arguments: --layers 2"),
        (2, ["reads", "iapt", "the past of go ?", "--layers", "2", "9"], "--layers: there are 4, got 9"),
        (1, ["reads", "nowhere", "the past of go ?"], "no checkpoint at nowhere"),
        (1, ["curves", "nowhere"], "no nowhere/log.jsonl: curves are of folders of runs"),
        (2, ["bars", "scores.npz"], "bars takes NAME=FILE, each with a scores.npz of experiments.compare"),
        (1, ["bars", f"x={os.path.join(ROOT, 'data', 'tiny', 'config.json')}"], "config.json is no scores.npz of"),
        (1, ["bars", f"x={P3_FROZEN}"], "frozen-chat.npz is no scores.npz of experiments.compare with lora-mlp, iapt"),
        (1, ["bars", "x=nowhere"], "nowhere is no scores.npz of experiments.compare"),
        (2, ["dance", "iapt"], "invalid choice: 'dance'"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(status, args, message, runs, tmp_path):
    if args[0] in ("curves", "bars"):
        pytest.importorskip("matplotlib", reason="these plots need matplotlib")
    result, text = run_in(plots, *(runs.get(arg, arg) for arg in args), "--out", str(tmp_path / "x.svg"))
    assert result == status and message in text and text.count("error: ") == 1
    assert not os.path.exists(tmp_path / "x.svg")


def test_without_matplotlib_it_says_how_to_get_it(runs, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    status, text = run_in(plots, "curves", runs["iapt"], "--out", str(tmp_path / "x.svg"))
    assert status == 1 and text == "error: this plot needs matplotlib: pip install matplotlib\n"
