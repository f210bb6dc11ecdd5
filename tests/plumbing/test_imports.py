"""The project's files import one another in one direction, and the top level stays small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MAY_IMPORT = {
    "model": [],
    "iapt": ["model"],
    "plumbing": ["model"],
    "data": ["model", "plumbing"],
    "baselines": ["model", "iapt", "plumbing"],
    "sample": ["model", "iapt", "plumbing", "data", "baselines"],
    "train": ["model", "iapt", "plumbing", "data", "baselines", "sample"],
    "experiments": ["model", "iapt", "plumbing", "data", "baselines", "sample", "train"],
}


def modules_of(part):
    """{module: what it imports}, of a file at the top or of a folder."""
    found = {}
    for path in [*Path(ROOT).glob(f"{part}.py"), *Path(ROOT, part).glob("*.py")]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = set(imports(ast.parse(path.read_text(encoding="utf-8"))))
    return found


def imports(tree):
    """The full names of what is imported, wherever in a file; of `from a import b` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{name.name}" for name in node.names))


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_go_one_way(part):
    modules = modules_of(part)
    assert modules
    for module, names in modules.items():
        ours = {name.split(".")[0] for name in names} & {"tests", *MAY_IMPORT}
        assert ours <= {part, *MAY_IMPORT[part]}, module


def test_no_modules_import_one_another_in_a_circle():
    modules = {module: names for part in MAY_IMPORT for module, names in modules_of(part).items()}
    modules = {module: names & modules.keys() - {module} for module, names in modules.items()}
    while modules:
        free = {module for module, names in modules.items() if not names & modules.keys()}
        assert free, f"a circle among {sorted(modules)}"
        modules = {module: names for module, names in modules.items() if module not in free}


def test_the_top_level_has_four_files_of_code_and_at_most_17_entries():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in listed.stdout.splitlines()}
    assert sorted(name for name in top if name.endswith(".py")) == ["iapt.py", "model.py", "sample.py", "train.py"]
    assert len(top) <= 17, sorted(top)


def test_a_model_is_opened_without_pytorch_s_compiler():
    """Importing it takes as long as the rest of an answer."""
    code = "import sys, sample; sample.open_model('tiny'); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
