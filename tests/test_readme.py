"""The README's code is the project's code."""

import ast
import contextlib
import glob
import inspect
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, shake

import baselines
from iapt import IAPT, Tuner
from model import Config

README = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()


NUMBER = r"-?\b\d+\.?\d*(?:e-?\d+)?\b"


def block(begins):
    """The README's code block with this first line."""
    (code,) = re.findall(rf"```python\n({re.escape(begins)}.*?)```", README, re.DOTALL)
    return code


def test_the_idea_in_ten_lines_is_what_iapt_computes():
    names = {"torch": torch}
    exec(block("def soft_tokens"), names)
    config = Config(vocab_size=10, n_embd=32, n_head=4, n_layer=1)
    tuner = shake(IAPT(config, pool="attention", space="hidden", static=0, centre=False, norm=False))
    x, instr, g = torch.randn(1, 7, 32), torch.arange(7)[None] < 4, tuner.generators[0]
    matrices = g.down.weight.T, g.w_sa, *g.act.coefficients(), g.up.weight.T
    torch.testing.assert_close(names["soft_tokens"](x[0], instr[0], *matrices), tuner.prompt(0, x, instr)[0])


def test_the_example_to_fork_is_the_one_in_baselines():
    names = {"Tuner": Tuner, "nn": nn}
    exec(block("class Mine"), names)

    def code(text):
        text = re.sub(r'"""[^"]*"""|#.*', "", textwrap.dedent(text))
        return [line.strip() for line in text.splitlines() if line.strip()]

    assert code(block("class Mine")) == code(inspect.getsource(baselines.Mine))


@pytest.fixture
def copy(tmp_path):
    """The project in a folder of its own, where commands may write."""
    skip = shutil.ignore_patterns(".git", "out", "__pycache__", ".pytest_cache", "raw")
    folder = shutil.copytree(ROOT, tmp_path / "project", ignore=skip)
    for path in glob.glob(os.path.join(folder, "data", "tiny", "**", "*.jsonl"), recursive=True):
        os.remove(path)  # as in a fresh clone
    return folder


def shell(command, folder):
    """What a command of the README prints."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_commands_marked_quick_run_and_leave_the_pictures_as_they_are(copy):
    pytest.importorskip("matplotlib", reason="pictures want matplotlib")
    commands = [line for code in re.findall(r"```sh quick\n(.*?)```", README, re.DOTALL) for line in code.splitlines()]
    assert len(commands) >= 5
    for command in commands:
        said = shell(command, copy)
        picture = re.search(r"--out (docs/\S+)", command)
        if picture:  # what the README shows is what its command draws, if not to the last digit
            old, new = (open(os.path.join(where, picture[1]), encoding="utf-8").read() for where in (ROOT, copy))
            assert re.sub(NUMBER, "", new) == re.sub(NUMBER, "", old)
            old, new = (torch.tensor(list(map(float, re.findall(NUMBER, text)))) for text in (old, new))
            torch.testing.assert_close(new, old, rtol=0.02, atol=0.5)
        else:
            assert said.splitlines() == ["lima", "mice"]


@pytest.mark.slow
def test_console_blocks_marked_quick_are_what_the_commands_print(copy):
    blocks = re.findall(r"```console quick\n\$ (.*?)\n(.*?)```", README, re.DOTALL)
    assert blocks
    for command, printed in blocks:
        assert shell(command, copy) == printed


def test_the_lines_for_a_notebook_train_a_method():
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(block("import torch\nfrom data"), {})
    assert said.getvalue() == "['rome', 'havana']\n"


@pytest.mark.slow
def test_the_walk_through_for_a_new_idea_works_from_the_first_line_on(copy):
    path = os.path.join(copy, "baselines.py")
    with open(path, encoding="utf-8") as f:
        code = f.read().replace(inspect.getsource(baselines.Mine), "").replace('"mine": Mine,', "")
    assert "Mine" not in code
    where = code.index("def options(")
    with open(path, "w", encoding="utf-8") as f:
        f.write(f"{code[:where]}{block('class Mine')}\n\n{block('METHODS[')}\n\n{code[where:]}")
    (steps,) = re.findall(r"```sh\n(python train.py --method mine.*?)```", README, re.DOTALL)
    train, test, compare = steps.splitlines()
    table = shell(f"{train} --device cpu", copy)
    before, after = re.search(r"^test .*?% +([\d.]+) .*?% +([\d.]+)$", table, re.MULTILINE).groups()
    assert float(after) < float(before) / 2
    # With m left out by our own example, every generic test runs for it, on both architectures.
    listed = shell(f"{test} --collect-only -q tests/test_every_method.py", copy)
    generic = set(
        re.findall(r"::(\w+)\[", shell("python -m pytest -k lora --collect-only -q tests/test_every_method.py", copy))
    )
    assert generic == set(re.findall(r"::(\w+)\[", listed)) and "llama" in listed and "gpt2" in listed
    shell(f"{test} -q tests/test_every_method.py", copy)


def test_the_file_list_names_every_file_and_its_length_within_a_tenth():
    listed = dict(re.findall(r"^\| \[([\w/\\]+\.py)\].*?\| (\d+) \|", README.replace("\\_", "_"), re.MULTILINE))
    there = [f for f in os.listdir(ROOT) if f.endswith(".py")] + [
        f"data/{name}.py" for name in ("__init__", "prepare", "world")
    ]
    assert sorted(listed) == sorted(there)
    for name, lines in listed.items():
        with open(os.path.join(ROOT, name), encoding="utf-8") as f:
            assert abs(len(f.readlines()) - int(lines)) <= 0.1 * int(lines), name


def public(nodes, name, bases=()):
    """(name, node, whether it overrides something) of each class, function and method without an underscore."""
    for node in nodes:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            yield f"{name}.{node.name}", node, bool(bases)
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{name}.{node.name}", node.bases)


def test_every_public_name_says_what_it_is_and_what_it_takes():
    """Methods that override one may leave the words to it; `Mine` is as short as in the README."""
    bare = []
    for file in sorted(
        f for f in [*os.listdir(ROOT), *(f"data/{f}" for f in os.listdir(f"{ROOT}/data"))] if f.endswith(".py")
    ):
        with open(os.path.join(ROOT, file), encoding="utf-8") as f:
            tree = ast.parse(f.read())
        for name, node, overrides in public(tree.body, file):
            if not ast.get_docstring(node) and not overrides:
                bare.append(f"{name} has no docstring")
            as_given = any(f".{owner}." in name for owner in ("Mine", "RationalFunction", "HeadLoss", "Centre"))
            if isinstance(node, ast.FunctionDef) and not as_given:
                args = [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if not a.annotation]
                bare += [f"{name}: {arg} has no type" for arg in args if arg not in ("self", "cls")]
    assert bare == []


def test_every_method_and_its_options_are_in_the_readme():
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]*\|(.*)\|$", README, re.MULTILINE))
    for name, cls in baselines.METHODS.items():
        shown = rows[name].replace("m=C/8", "m=0").strip(" `").split()
        assert {option.split("=")[0] for option in shown} == set(inspect.signature(cls).parameters) - {"config"}
        assert baselines.complete(name, shown) == baselines.complete(name, [])  # and they are the defaults


def test_ci_runs_the_readme_s_own_test_command():
    with open(os.path.join(ROOT, ".ci", "run"), encoding="utf-8") as f:
        assert "pip install -r requirements.txt && python -m pytest\n" in f.read()
    assert "```sh\npip install -r requirements.txt && python -m pytest\n```" in README
