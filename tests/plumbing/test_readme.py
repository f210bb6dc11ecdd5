"""The code and the commands of README.md and docs/RESULTS.md are the project's."""

import ast
import contextlib
import glob
import inspect
import io
import json
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
from data.engines import gpt2_chars
from model import Config, Decoder, Tuner
from plumbing.pretrained import save_pretrained


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


README, RESULTS, HACKING = read("README.md"), read("docs/RESULTS.md"), read("docs/HACKING.md")
QUICK = README + RESULTS + HACKING + read("docs/DATA.md")
NUMBER = r"-?\b\d+\.?\d*(?:e-?\d+)?\b"


PAGES = ["README.md", *(f"docs/{name}.md" for name in ("RESULTS", "PAPER", "SERVING", "DATA", "HACKING"))]


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def prose(text):
    """A page without code, tables, headings, pictures, the targets of its links and the numbers of papers."""
    text = re.sub(r"`[^`]*`|!\[.*?\]\(.*?\)", " ", without_code(text), flags=re.DOTALL)
    text = re.sub(r"^[|#].*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\b\d{4}\.\d{5}\b", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text))


def sentences(text):
    parts = re.split(r"\n\n|\n- |\n\d\. ", prose(text))
    return [sentence for part in parts for sentence in re.split(r"(?<=[.!?:;])\s+", " ".join(part.split()))]


COUNTED = r"(?<![\w-])\d[\d,.]*"  # a number, and not a part of a name as in GPT-2


@pytest.mark.parametrize("name", [page for page in PAGES if page != "docs/DATA.md"])
def test_no_sentence_has_more_than_two_numbers(name):
    assert [s for s in sentences(read(name)) if len(re.findall(COUNTED, s)) > 2] == []


def test_the_front_page_can_be_read_by_someone_who_knows_none_of_its_words():
    text = prose(README)
    assert len(re.findall(COUNTED, text)) <= 0.04 * len(text.split())
    assert len(README.splitlines()) <= 260
    (methods,) = re.findall(r"^\| name \|(?:.*\n\|)*", README, re.MULTILINE)
    rows = [line for line in README.replace(methods, "").splitlines() if line.startswith("| ")]
    heads = len(re.findall(r"^\|-", README.replace(methods, ""), re.MULTILINE))
    assert len(rows) - heads <= 20
    for word in (
        "soft token",
        "generator",
        "constants",
        "tenant",
    ):  # explained where it stands in * or ** for the first time
        before, _, _ = text.lower().partition(word)
        assert before.endswith("*"), word


def test_the_results_can_be_read_in_a_few_minutes():
    assert len(RESULTS.encode()) <= 20_000 and len(re.findall(COUNTED, prose(RESULTS))) <= 450
    sections = re.split(r"^## ", RESULTS, flags=re.MULTILINE)[1:]
    assert all(section.partition("\n")[0].endswith("?") for section in sections), "a heading is a reader's question"
    tables = re.findall(r"^\|-.*\n((?:\|.*\n)+)", RESULTS, re.MULTILINE)
    assert len(tables) > 5 and max(len(table.splitlines()) for table in tables) <= 7


@pytest.mark.parametrize("name", [*PAGES, "experiments/LOG.md"])
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


def small_gpt2_tokenizer():
    """The files of a tokenizer of GPT-2's kind without merges: a token for each byte, and the end."""
    vocab = {char: i for i, char in enumerate(gpt2_chars().values())}
    return {"vocab.json": json.dumps(vocab | {"<|endoftext|>": 256}), "merges.txt": "#version: 0.2\n"}


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
    blocks = re.findall(r"```sh quick\n(.*?)```", QUICK, re.DOTALL)
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
    blocks = re.findall(r"```console quick\n\$ (.*?)\n(.*?)```", QUICK, re.DOTALL)
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
@pytest.mark.parametrize("walk", [0, 1])
def test_the_walk_throughs_work_from_the_first_line_on(walk, copy):
    """A small random model stands in for the real one, and a few rows for what is downloaded."""
    block = re.findall(r"```sh walk\n(.*?)```", README, re.DOTALL)[walk]
    stand_in = os.path.join(copy, "model")
    torch.manual_seed(0)
    os.makedirs(stand_in)
    save_pretrained(stand_in, Decoder(Config(vocab_size=257, block_size=512, n_layer=2, n_head=2, n_embd=32)))
    for name, content in small_gpt2_tokenizer().items():
        with open(os.path.join(stand_in, name), "w", encoding="utf-8") as f:
            f.write(content)
    restaurants, alpaca = (os.path.join(copy, "data", *folder) for folder in (("e2e", "raw"), ("alpaca",)))
    os.makedirs(restaurants)
    os.makedirs(alpaca)
    with open(os.path.join(restaurants, "devset.csv"), "w", encoding="utf-8") as f:
        f.write("mr,ref\n" + "".join(f'"name[{i}], food[French]",{i} serves French food.\n' for i in range(40)))
    for split, n in (("train", 30), ("val", 6), ("test", 6)):
        with open(os.path.join(alpaca, f"{split}.jsonl"), "w", encoding="utf-8") as f:
            for i in range(n):
                f.write(json.dumps({"instruction": f"{split} {i}", "input": "a", "output": "b"}) + "\n")
    for line in block.splitlines():
        for command in line.partition("  #")[0].split(" && "):
            if "pip install" in command or re.search("data.prepare (e2e|alpaca)", command):
                continue  # downloads
            command = re.sub("HuggingFaceTB/SmolLM2-135M-Instruct", "model", command)
            printed = shell(re.sub(r"--steps \d+", "--steps 4", command), copy)
    assert len(printed.splitlines()) >= 1 + walk  # the last command answers: one question, or two inputs


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
