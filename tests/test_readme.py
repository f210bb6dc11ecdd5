"""The README's code is the project's code."""

import inspect
import os
import re
import textwrap

import torch
import torch.nn as nn
from conftest import ROOT, shake

import baselines
from iapt import IAPT, Tuner
from model import Config

README = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()


def block(begins):
    """The README's code block with this first line."""
    (code,) = re.findall(rf"```python\n({re.escape(begins)}.*?)```", README, re.DOTALL)
    return code


def test_the_idea_in_ten_lines_is_what_iapt_computes():
    names = {"torch": torch}
    exec(block("def soft_tokens"), names)
    tuner = shake(IAPT(Config(vocab_size=10, n_embd=32, n_head=4, n_layer=1), space="hidden", static=False, norm=False))
    x, instr, g = torch.randn(1, 7, 32), torch.arange(7)[None] < 4, tuner.generators[0]
    matrices = g.down.weight.T, g.w_sa, g.act.a, g.act.b, g.up.weight.T
    torch.testing.assert_close(names["soft_tokens"](x[0], instr[0], *matrices), tuner.prompt(0, x, instr)[0])


def test_the_example_to_fork_is_the_one_in_baselines():
    names = {"Tuner": Tuner, "nn": nn}
    exec(block("class Mine"), names)

    def code(text):
        text = re.sub(r'"""[^"]*"""|#.*', "", textwrap.dedent(text))
        return [line.strip() for line in text.splitlines() if line.strip()]

    assert code(block("class Mine")) == code(inspect.getsource(baselines.Mine))


def test_the_file_list_names_every_file_and_its_length_within_a_tenth():
    listed = dict(re.findall(r"^\| \[([\w/\\]+\.py)\].*?\| (\d+) \|", README.replace("\\_", "_"), re.MULTILINE))
    there = [f for f in os.listdir(ROOT) if f.endswith(".py")] + ["data/__init__.py", "data/prepare.py"]
    assert sorted(listed) == sorted(there)
    for name, lines in listed.items():
        with open(os.path.join(ROOT, name), encoding="utf-8") as f:
            assert abs(len(f.readlines()) - int(lines)) <= 0.1 * int(lines), name


def test_every_method_and_its_options_are_in_the_readme():
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]*\|(.*)\|$", README, re.MULTILINE))
    for name, cls in baselines.METHODS.items():
        shown = rows[name].strip(" `").split()
        assert {option.split("=")[0] for option in shown} <= set(inspect.signature(cls).parameters)


def test_ci_runs_the_readme_s_own_test_command():
    with open(os.path.join(ROOT, ".ci", "run"), encoding="utf-8") as f:
        assert "pip install -r requirements.txt && python -m pytest\n" in f.read()
    assert "```sh\npip install -r requirements.txt && python -m pytest\n```" in README
