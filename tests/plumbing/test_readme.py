"""The code and the commands of README.md and docs/RESULTS.md are the project's."""

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
from conftest import ROOT

import iapt
from baselines.prompts import Mine, mean_state
from model import Tuner


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


README, RESULTS, HACKING = read("README.md"), read("docs/RESULTS.md"), read("docs/HACKING.md")
NUMBER = r"-?\b\d+\.?\d*(?:e-?\d+)?\b"


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", "docs/RESULTS.md", "docs/DATA.md", "docs/HACKING.md"])
def test_links_lead_to_files_and_headings(name):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", without_code(read(name))):
        file, _, anchor = link.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(name), file)) if file else name
        assert os.path.exists(os.path.join(ROOT, path)), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", without_code(read(path)), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], link


def block(beginning):
    """The code block of README.md or HACKING.md that begins like this."""
    (code,) = re.findall(rf"```python\n({re.escape(beginning)}.*?)```", README + HACKING, re.DOTALL)
    return code


def class_and_entry(name):
    """A page's class of a method, and its entry in METHODS."""
    code, entry = block(f"class {name}").split("METHODS[")
    return code.rstrip("# \n") + "\n", f"METHODS[{entry}"


def test_the_nine_lines_are_those_that_iapt_py_begins_with():
    """test_iapt.py runs them against what IAPT computes."""
    assert textwrap.indent(block("def soft_tokens"), "    ") in iapt.__doc__


def test_the_tests_that_hacking_names_are_there():
    tests = read("tests/method/test_iapt.py") + read("tests/method/test_every_method.py")
    named = re.findall(r"`(test_\w+)`", HACKING)
    assert len(named) > 5 and [name for name in named if f"def {name}(" not in tests] == []


def test_the_example_to_fork_is_the_one_in_baselines():
    names = {"Tuner": Tuner, "nn": nn, "mean_state": mean_state}
    ours, _ = class_and_entry("Mine")
    exec(ours, names)

    def code(text):
        text = re.sub(r'"""[^"]*"""|#.*', "", textwrap.dedent(text))
        return [line.strip() for line in text.splitlines() if line.strip()]

    assert code(ours) == code(inspect.getsource(Mine))


@pytest.fixture
def copy(tmp_path):
    """The project in a folder of its own, where commands may write."""
    skip = shutil.ignore_patterns(".git", "out", "__pycache__", ".pytest_cache", ".ruff_cache", "raw")
    folder = shutil.copytree(ROOT, tmp_path / "project", ignore=skip)
    for path in glob.glob(os.path.join(folder, "data", "tiny", "**", "*.jsonl"), recursive=True):
        os.remove(path)  # as in a fresh clone
    return folder


def shell(command, folder):
    """What a command prints."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # other tests run beside it
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_commands_marked_quick_run_and_leave_the_pictures_as_they_are(copy):
    pytest.importorskip("matplotlib", reason="pictures want matplotlib")
    blocks = re.findall(r"```sh quick\n(.*?)```", README + RESULTS, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) >= 4
    for command in commands:
        printed = shell(command, copy)
        picture = re.search(r"--out (docs/\S+)", command)
        if picture:  # what the page shows is what its command draws, if not to the last digit
            old, new = (open(os.path.join(where, picture[1]), encoding="utf-8").read() for where in (ROOT, copy))
            assert re.sub(NUMBER, "", new) == re.sub(NUMBER, "", old)
            old, new = (torch.tensor(list(map(float, re.findall(NUMBER, text)))) for text in (old, new))
            torch.testing.assert_close(new, old, rtol=0.02, atol=0.5)
        else:
            assert printed.splitlines() == ["lima", "mice"]


@pytest.mark.slow
def test_console_blocks_marked_quick_are_what_the_commands_print(copy):
    blocks = re.findall(r"```console quick\n\$ (.*?)\n(.*?)```", README + RESULTS, re.DOTALL)
    assert blocks
    for command, printed in blocks:
        assert shell(command, copy) == printed


def test_the_lines_for_a_notebook_train_a_method():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block("import torch\n"), {})
    assert printed.getvalue() == "['rome', 'havana']\n"


@pytest.mark.slow
def test_the_walk_through_for_a_new_idea_works_from_the_first_line_on(copy):
    """Our own example is taken out first: one class and one entry bring it back."""
    mine, entry = class_and_entry("Mine")
    edit(os.path.join(copy, "baselines", "prompts.py"), inspect.getsource(Mine), mine)
    edit(os.path.join(copy, "baselines", "__init__.py"), '    "mine": Mine,\n', "", after=entry)
    (steps,) = re.findall(r"```sh\n(python train.py --method mine.*?)```", README, re.DOTALL)
    train, test, *_ = steps.splitlines()
    table = shell(f"{train} --device cpu", copy)
    before, after = re.search(r"^test .*?% +([\d.]+) .*?% +([\d.]+)$", table, re.MULTILINE).groups()
    assert float(after) < float(before) / 2
    generic = os.path.join("tests", "method", "test_every_method.py")
    ours, others = (shell(f"python -m pytest -k {name} --collect-only -q {generic}", copy) for name in ("mine", "capt"))
    assert test == "python -m pytest -k mine" and "llama-mine" in ours and "gpt2-mine" in ours
    assert re.findall(r"::(\w+)\[", ours) == re.findall(r"::(\w+)\[", others)
    shell(f"{test} -q {generic}", copy)


@pytest.mark.slow
def test_the_walk_through_for_a_change_of_iapt_works(copy):
    gated, entry = class_and_entry("Gated")
    with open(os.path.join(copy, "baselines", "__init__.py"), "a", encoding="utf-8") as f:
        f.write(f"\n\nfrom iapt import Generator  # noqa: E402\n\n\n{gated}\n\n{entry}")
    table = shell("python train.py --method gated --steps 300 --device cpu", copy)
    before, after = re.search(r"^test .*?% +([\d.]+) .*?% +([\d.]+)$", table, re.MULTILINE).groups()
    assert float(after) < float(before) / 8
    generic = os.path.join("tests", "method", "test_every_method.py")
    assert "passed" in shell(f"python -m pytest -k gated -q {generic}", copy)


def edit(path, old, new, after=""):
    """Replace what occurs once in a file, and add something at its end."""
    with open(path, encoding="utf-8") as f:
        text = f.read()
    assert text.count(old) == 1
    with open(path, "w", encoding="utf-8") as f:
        f.write(text.replace(old, new) + after)


def functions(nodes, name):
    """(name, node) of each function and method without an underscore, in classes too."""
    for node in nodes:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            if isinstance(node, ast.ClassDef):
                yield from functions(node.body, f"{name}.{node.name}")
            else:
                yield f"{name}.{node.name}", node


def test_every_public_function_names_the_types_of_its_arguments():
    """But for `Mine`, as short as in the README, and for autograd functions, whose arguments PyTorch prescribes."""
    exempt = (".Mine.", ".RationalFunction.", ".HeadLoss.")
    bare = []
    for pattern in ("*.py", "baselines/*.py", "data/*.py", "experiments/*.py", "plumbing/*.py"):
        for file in glob.glob(pattern, root_dir=ROOT):
            with open(os.path.join(ROOT, file), encoding="utf-8") as f:
                tree = ast.parse(f.read())
            for name, node in functions(tree.body, file):
                args = [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if not a.annotation]
                if not any(part in name for part in exempt):
                    bare += [f"{name}: {arg} has no type" for arg in args if arg not in ("self", "cls")]
    assert bare == []


def test_ci_runs_the_readme_s_own_test_command():
    with open(os.path.join(ROOT, ".ci", "run"), encoding="utf-8") as f:
        assert "pip install -r requirements.txt && python -m pytest\n" in f.read()
    assert "```sh\npip install -r requirements.txt && python -m pytest\n```" in README
