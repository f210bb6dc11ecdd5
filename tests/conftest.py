"""What the tests share: small random models of both architectures, shaken tuners of every method, a short run of
train.py, and the real models if they are present.
"""

import contextlib
import importlib.util
import inspect
import io
import os

import pytest
import torch

import train
from baselines import build
from data import world
from iapt import IAPT, Generator
from model import Config, Decoder
from plumbing import cli
from plumbing.checkpoint import RunFolder, load_checkpoint

torch.set_num_threads(1)  # the models here are small: more threads only wait for each other

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(os.path.dirname(ROOT), "shared")
ARCHS = ["gpt2", "llama"]

SHIPPED = os.path.join(ROOT, "experiments", "results", "runs", "iapt")  # a run of train.py with its defaults
# A run of train.py that takes a second.
SMALL = "--steps 6 --eval-every 3 --batch-size 8 --val-rows 16 --test-rows 8 --device cpu".split()


def shared(*path):
    """A file beside the project, or a reason to skip: real models and data are other people's, and not part of it."""
    where = os.path.join(SHARED, *path)
    if not os.path.exists(where):
        pytest.skip(f"needs {os.path.join('..', 'shared', *path)}")
    return where


# -- A reader's own generator ------------------------------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption("--generator", metavar="FILE", help="test IAPT with the class Generator of this file")


def pytest_configure(config):
    if path := config.getoption("--generator"):
        IAPT.generator = generator_of(path)


def generator_of(path):
    """The class of a file that is a reader's own: one called Generator, or else one derived from ours."""
    spec = importlib.util.spec_from_file_location("own_generator", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except OSError as e:
        raise pytest.UsageError(f"--generator {path}: {e.strerror}") from None
    classes = [x for x in vars(module).values() if inspect.isclass(x) and x.__module__ == "own_generator"]
    for cls in classes:
        if cls.__name__ == "Generator" or issubclass(cls, Generator):
            return cls
    names = ", ".join(cls.__name__ for cls in classes) or "no class"
    raise pytest.UsageError(f"--generator {path}: it has {names}, and should have one called Generator")


# -- Models and tuners -------------------------------------------------------------------------------------------------


def shake(module, scale=0.3, seed=1):
    """Add noise to every parameter: what starts at zero (biases, IAPT's up, LoRA's B) would hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, generator=g)
    return module


def small_model(arch, **config):
    """Two layers with every tensor random, LLaMA's with grouped queries; "qk-norm" has the norms of Qwen3's heads, too.

    The head is not tied, and large: so greedy continuations vary, and do not just repeat a token.
    """
    torch.manual_seed(0)
    sizes = {
        "tied": False,
        "vocab_size": 50,
        "block_size": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "n_kv_head": 4 if arch == "gpt2" else 2,
    }
    kind = {"arch": "llama", "qk_norm": True} if arch == "qk-norm" else {"arch": arch}
    return shake(Decoder(Config(**{**sizes, **kind, **config})), 0.3).requires_grad_(False)


def small_tuner(method, model, options=(), act="all"):
    """A shaken tuner, attached.  It acts visibly on the model, so that a test of its effect can fail."""
    torch.manual_seed(0)
    tuner = build(method, model.config, options, act)
    tuner.start(model)
    tuner.attach(model)
    return shake(tuner, 0.1).eval()


def right_padded(lengths, width, vocab=50, seed=0):
    """Random tokens idx (B, width) and the mask of the first `lengths` of each row."""
    g = torch.Generator().manual_seed(seed)
    idx = torch.randint(1, vocab, (len(lengths), width), generator=g)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return idx * mask, mask


@pytest.fixture(params=ARCHS)
def model(request):
    return small_model(request.param)


@pytest.fixture(scope="session", autouse=True)
def no_fsync():
    """A test's files need not survive a power cut, and a suite of them waits seconds for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


# -- Runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Some of tiny's instructions, in a folder of their own: to read all 8,640 takes longer than a few steps."""
    folder = tmp_path_factory.mktemp("rows")
    world.tiny(str(folder), corpus=10)
    for path in folder.glob("*.jsonl"):
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[: 640 if path.stem == "train" else 160]))
    return str(folder)


@pytest.fixture(scope="session")
def trained(rows, tmp_path_factory):
    """The folder of a run of 30 steps, after which the model begins to answer."""
    out = str(tmp_path_factory.mktemp("run") / "iapt")
    train.main([*SMALL, "--steps", "30", "--eval-every", "15", "--lr", "1e-2", "--data", rows, "--out", out])
    return out


@pytest.fixture(scope="session")
def short(rows, tmp_path_factory):
    """The folder of a run of a few steps."""
    out = str(tmp_path_factory.mktemp("run") / "short")
    train.main([*SMALL, "--data", rows, "--out", out])
    return out


def tensors(run):
    """The trained tensors that a run has saved last."""
    return load_checkpoint(os.path.join(run, "last.pt"))["tuner"]


def log_without_speed(run):
    """The rows of a run's log.jsonl, without what depends on the machine."""
    return [{key: x for key, x in row.items() if key != "tokens_per_s"} for row in RunFolder(run).read_log()]


def same_run(a, b):
    """Whether two runs have trained the same tensors and logged the same numbers."""
    ours, theirs = tensors(a), tensors(b)
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return same and log_without_speed(a) == log_without_speed(b)


def run_in(script, *args):
    """Exit status and output of a command, run in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            cli.run(lambda: script.main([*args]))
            status = 0
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 1
            if not isinstance(e.code, int):
                print(e.code)
    return status, out.getvalue()
