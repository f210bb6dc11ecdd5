"""What a run leaves on disk: best.pt, last.pt (and what it was before, previous.pt), log.jsonl.

    save_tuner, load_tuner, fill     a checkpoint: what was trained, for what, and nothing frozen
    claim                            a folder for one run, and for no other at the same time
    resumable                        what a run can go on from, damaged files left aside

Every file is the old one or the new one, never half of either (`replacing` in data/__init__.py); nothing that is read
is unpickled as code.
"""

import io
import json
import os
import shutil
import sys
import zipfile

import torch

from data import replacing
from iapt import Tuner

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FILES = ("last.pt", "best.pt", "log.jsonl", "previous.pt")
HELD = {}  # lock files, open, by path


def save_tuner(path: str, tuner: Tuner, meta: dict, **more):
    """Write a checkpoint: the trained tensors, nothing frozen, and `meta`, which says what they are.

    `more` goes in beside them, and must be such that torch.load reads it without running code.
    """
    content = io.BytesIO()
    torch.save({"tuner": tuner.state_dict(), "meta": meta, **more}, content)
    with replacing(path, "wb") as f:  # in one go: torch.save itself would hide why a disk refuses
        f.write(content.getbuffer())


def fill(tuner: Tuner, content: dict, path: str):
    """Put a checkpoint's tensors into a tuner.  Raises ValueError, which names `path`, if they do not fit it."""
    try:
        tuner.load_state_dict(content["tuner"])
    except RuntimeError as e:
        raise ValueError(f"{path} does not fit this model: {str(e).splitlines()[-1].strip()[:200]}") from None


def load_tuner(path: str) -> dict:
    """The content of a checkpoint (or of best.pt in a run's folder), on the CPU: `tuner`, its tensors by name, `meta`,
    and what else was saved.

    Never unpickles code.  Raises ValueError for what is not a checkpoint, FileNotFoundError if there is nothing.
    """
    path = os.path.join(path, "best.pt") if os.path.isdir(path) else path
    try:
        with zipfile.ZipFile(path) as z:
            # torch.load does not look at the checksums that torch.save wrote, and reads what is marked as a folder as
            # zeros.
            if z.testzip() or any(entry.external_attr for entry in z.infolist()):
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
        meta, tensors = content["meta"], content["tuner"]
        texts = [meta["method"], meta["init"], meta["base"], *meta["options"], *tensors]
        if not all(isinstance(text, str) for text in texts) or not all(map(torch.is_tensor, tensors.values())):
            raise TypeError
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {path}. Run: python train.py") from None
    except Exception as e:  # torch.load raises half a dozen kinds, and so does looking into what is something else
        raise ValueError(f"{path} is not a checkpoint of train.py, or was cut off ({type(e).__name__})") from None
    named = {option.partition("=")[0] for option in meta["options"]}
    if "act_lr" in named and "unit" not in named:  # train.py says all options; so it was before there was this one
        meta["options"] = [*meta["options"], "unit=1"]
    return content


def claim(folder: str, force: bool = False):
    """Make a folder and keep it for this process as long as it lives; with force, remove the run that is in it.

    Raises FileExistsError if another process has it.
    """
    os.makedirs(folder, exist_ok=True)
    path = os.path.abspath(os.path.join(folder, "lock"))
    if fcntl and path not in HELD:
        handle = open(path, "w")  # noqa: SIM115  (open until the process ends)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FileExistsError(f"another run writes to {folder} just now: --out names another folder") from None
        HELD[path] = handle
    for name in FILES:
        if force and os.path.exists(path := os.path.join(folder, name)):
            os.remove(path)


def resumable(path: str, previous: str, meta: dict) -> dict:
    """The content of last.pt, or of previous.pt if that is damaged.  Raises ValueError if it is of another run."""
    try:
        saved = load_tuner(path)
    except (ValueError, FileNotFoundError) as e:
        if not os.path.exists(previous):
            raise
        saved, path = load_tuner(previous), previous
        print(f"{e}; going on from {previous}, step {saved.get('state', {}).get('step')}", file=sys.stderr)
    if "optimizer" not in saved or "state" not in saved:
        raise ValueError(f"--resume: {path} is a checkpoint, but not of a run that can go on")
    for key, value in meta.items():
        if saved["meta"].get(key) != value:
            raise ValueError(f"--resume: {key} was {saved['meta'].get(key)!r} in {path}, now it is {value!r}")
    return saved


def keep_lines(log: str, step: int):
    """Drop from a log what was written after `step` (0: all of it), and a last line that was not finished."""
    lines = []
    if step and os.path.exists(log):
        with open(log, encoding="utf-8") as f:
            lines = [line for line in f if line.endswith("}\n") and json.loads(line)["step"] <= step]
    with replacing(log) as f:
        f.writelines(lines)


def replace_by_link(path: str, other: str):
    """Make `other` a second name of what `path` is now, whatever it was; a copy where there are no such links."""
    tmp = f"{other}.{os.getpid()}.tmp"
    try:
        os.link(path, tmp)
    except OSError:
        shutil.copy(path, tmp)
    os.replace(tmp, other)
