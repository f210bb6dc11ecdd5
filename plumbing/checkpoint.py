"""What a run leaves on disk.

    save_tuner, load_checkpoint, load_into    a checkpoint: the trained tensors and what they are for, nothing frozen
    warm_start                                a new run begins where another one has ended
    RunFolder                                 a run's folder: best.pt, last.pt, previous.pt (last.pt before its last
                                              save), log.jsonl, and a lock that keeps other runs out

Every file is written completely or not at all.  Reading a checkpoint runs no code that is in it.
"""

import io
import json
import math
import os
import pathlib
import shutil
import sys
import zipfile

import torch

from model import Tuner
from plumbing import distributed
from plumbing.files import naming, refuse_adapter, refuse_lfs_pointer, replacing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCKS = {}  # path -> open file of every lock that this process holds


def save_tuner(path: str, tuner: Tuner, meta: dict, **more):
    """Write a checkpoint: the trained tensors, and `meta`, which says what they are.

    `more` is saved beside them.  torch.load must be able to read it without running code.  Of several processes of a
    run, the first one writes; so it is with the files of a RunFolder.
    """
    if distributed.RANK:
        return
    content = io.BytesIO()
    torch.save({"tuner": tuner.state_dict(), "meta": meta, **more}, content)
    with replacing(path, "wb") as f:  # torch.save(..., path) would hide the system's reason, such as a full disk
        f.write(content.getbuffer())


def load_checkpoint(path: str) -> dict:
    """The content of a checkpoint, or of best.pt in a run's folder: "tuner" {name: CPU tensor}, "meta", and what else
    was saved.

    Raises FileNotFoundError if there is none, ValueError for a file that is not a checkpoint.
    """
    path = os.path.join(path, "best.pt") if os.path.isdir(path) else path
    if not os.path.exists(path) or os.path.splitext(path)[1] != ".pt":
        refuse_adapter(os.path.dirname(path) or ".")
    if not os.path.exists(path):
        folder = os.path.dirname(path)
        if os.path.basename(path) == "best.pt" and RunFolder(folder).can_resume():
            stopped = f"the run in {folder} was stopped before its first validation, and has no best.pt yet"
            raise FileNotFoundError(f"{stopped}: continue it with the same command and --resume")
        raise FileNotFoundError(f"no checkpoint at {path}. Run: python train.py")
    refuse_lfs_pointer(path)
    try:
        with zipfile.ZipFile(path) as z:
            # torch.load ignores the checksums that torch.save wrote, and reads zeros for an entry marked as a folder.
            if z.testzip() or any(entry.external_attr for entry in z.infolist()):
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
        meta = content["meta"]
        for key, value in {"act": "all", "distill": 0.0}.items():  # which is what runs did before there was a choice
            meta.setdefault(key, value)
        if meta["method"] in ("prompt", "ptuning2") and not any(x.startswith("shift=") for x in meta["options"]):
            meta["options"] = [*meta["options"], "shift=0"]
        tensors = content["tuner"]
        texts = [meta["method"], meta["init"], meta["base"], *meta["options"], *tensors]
        if not all(isinstance(text, str) for text in texts) or not all(map(torch.is_tensor, tensors.values())):
            raise TypeError
    except Exception as e:  # torch.load raises many kinds of errors
        raise ValueError(f"{path} is not a checkpoint of train.py, or was cut off ({type(e).__name__})") from None
    return content


def load_into(tuner: Tuner, content: dict, path: str):
    """Copy a checkpoint's tensors into a tuner.  Raises ValueError, which names `path`, if they do not fit."""
    try:
        tuner.load_state_dict(renamed(content["tuner"]))
    except RuntimeError as e:
        raise ValueError(f"{path} does not fit this model: {str(e).splitlines()[-1].strip()[:200]}") from None


# What a generator's parts were called until 0b6e8b6; its matrices were those of linear layers, which are transposed.
OLD_NAMES = {"down.weight": "W_down", "up.weight": "W_up", "w_sa": "W_sa", "act.a": "R.a", "act.b": "R.b"}


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, those of an older one as they are called today."""
    new = {}
    for name, x in tensors.items():
        generator, l, part = (*name.split(".", 2), "", "")[:3]
        if generator == "generators" and part in OLD_NAMES:
            name, x = f"generators.{l}.{OLD_NAMES[part]}", x.T if part.endswith("weight") else x
        new[name] = x
    return new


def warm_start(tuner: Tuner, path: str, meta: dict, out: str):
    """Start a tuner, of the run that `meta` describes and that writes to `out`, from what another run has trained.

    Raises ValueError if that one has another method, other options, another model or template, or is in `out` itself.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if os.path.realpath(folder) == os.path.realpath(out):
        raise ValueError(f"--warm-start {path} is where this run writes to: --out names another folder")
    content = load_checkpoint(path)
    if any(content["meta"][key] != meta[key] for key in ("method", "act", "options", "base", "template")):
        theirs, ours = (
            f"{run['method']} {' '.join(run['options'])}, --act {run['act']}, on {run['init']}"
            f" ({run['base']}, template {run['template']})"
            for run in (content["meta"], meta)
        )
        raise ValueError(f"--warm-start {path} is a run of {theirs}; this one is of {ours}")
    load_into(tuner, content, path)


def refuse_other_model(path: str, meta: dict, init: str, known: dict[str, str]):
    """Raise ValueError if the run at `path` was trained on another model than `init`, or on other tokens of its text.

    known: the hashes of `init` that `meta` has of the run's model.
    """
    if known["base"] != meta["base"]:
        other = f"{path} was trained on {meta['init']} ({meta['base']}); {init} is another model ({known['base']})"
        raise ValueError(f"{other}: name the right one with --init, or --force it")
    if meta.get("tokenizer", known["tokenizer"]) != known["tokenizer"]:  # older runs say nothing of it
        edited = f"{path} was trained with another tokenizer or chat template than {init} has now"
        raise ValueError(f"{edited}: put its files back, name another folder with --init, or --force it")


class Diverged(ValueError):
    """The loss is no longer a finite number."""


# The hashes that a run is known by, and what is said of another one.
HASHED = {"base": ("the model is not that", "--init"), "rows": ("the rows are not those", "--data, --test-rows"),
          "tokenizer": ("the tokenizer or its chat template is not that", "--init")}  # fmt: skip


class RunFolder:
    """The files of one run: `best`, `last`, `previous` and `log` are their paths."""

    def __init__(self, path: str):
        self.path = path
        names = ("best.pt", "last.pt", "previous.pt", "log.jsonl")
        self.best, self.last, self.previous, self.log = self.files = [os.path.join(path, name) for name in names]

    def can_resume(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return os.path.exists(self.last) or os.path.exists(self.previous)

    def refuse_unless(self, resume: bool, force: bool):
        """Raise FileExistsError if there is a run that would be lost, FileNotFoundError if there is none to resume."""
        if resume and not self.can_resume():
            raise FileNotFoundError(f"--resume: there is no run at {self.path} that has saved anything: start it anew")
        saved = [path for path in self.files if os.path.exists(path) and os.path.getsize(path)]  # a log may be empty
        if saved and not (resume or force):
            go_on = "--resume continues it, " if self.can_resume() else ""
            raise FileExistsError(f"{self.path} holds a run: {go_on}--force starts again, --out names another folder")

    def lock(self, force: bool = False):
        """Make the folder and lock it until this process ends.  With `force`, remove the run that is in it.

        Of several processes of a run, the first one does.  Raises OSError if the folder cannot be written,
        FileExistsError if another run has locked it.
        """
        if distributed.RANK:
            return
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise FileExistsError(f"{self.path} is a file, and not a folder: --out names another one")
        path = os.path.abspath(os.path.join(self.path, "lock"))
        try:
            os.makedirs(self.path, exist_ok=True)
            handle = open(path, "a")  # noqa: SIM115  (stays open until the process ends)
        except (OSError, ValueError) as e:  # ValueError: a null byte
            reason = getattr(e, "strerror", None) or e
            raise OSError(f"--out {self.path!r} cannot be written ({reason}): name another folder") from None
        if not fcntl or path in LOCKS:
            handle.close()
        else:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.close()
                raise FileExistsError(f"another run is writing to {self.path}: --out names another folder") from None
            LOCKS[path] = handle
        if force:
            for path in self.files:
                pathlib.Path(path).unlink(missing_ok=True)

    def save_last(self, tuner: Tuner, meta: dict, **more):
        """Write last.pt.  What it was before becomes previous.pt."""
        if distributed.RANK:
            return
        if os.path.exists(self.last):
            tmp = f"{self.previous}.{os.getpid()}.tmp"
            try:
                os.link(self.last, tmp)
            except OSError:  # a file system without hard links
                with naming(self.previous):
                    shutil.copy(self.last, tmp)
            os.replace(tmp, self.previous)
        save_tuner(self.last, tuner, meta, **more)

    def load_for_resume(self, meta: dict) -> dict:
        """The content of last.pt, or of previous.pt if last.pt is damaged.

        Raises ValueError if the run that saved it differs from this one in any entry of `meta`.
        """
        path = self.last
        try:
            content = load_checkpoint(path)
        except (ValueError, FileNotFoundError) as e:
            path = self.previous
            if not os.path.exists(path):
                raise
            content = load_checkpoint(path)
            print(f"{e}; going on from {path}, step {content.get('state', {}).get('step')}", file=sys.stderr)
        if renamed(content["tuner"]).keys() != content["tuner"].keys():
            advice = f"begin with --warm-start {path}, and another --out"
            raise ValueError(f"--resume: {path} is of an older version: {advice}")
        if "optimizer" not in content or "state" not in content:
            raise ValueError(f"--resume: {path} is a checkpoint without the optimizer's state: it cannot be resumed")
        self.refuse_other(content["meta"], meta)
        return content

    def peek(self, meta: dict) -> tuple[dict, dict | None]:
        """The meta that `load_for_resume` would load, and its state's `before`: no tensor stays in memory."""
        content = self.load_for_resume(meta)
        return content["meta"], content["state"].get("before")

    def refuse_other(self, saved: dict, meta: dict):
        """Raise ValueError if this run is another than the `saved` one, in any entry of `meta`.

        Not names but hashes decide about model, data and tokenizer: folders may have moved.  Of what is trained from
        --warm-start, all is in the checkpoint.
        """
        for key, value in meta.items():
            was = saved.get(key, value if key == "tokenizer" else None)  # older runs say nothing of that
            if was == value or key in ("init", "data") or key == "warm_start" and was and value:
                continue
            if key in HASHED:
                what, options = HASHED[key]
                raise ValueError(f"--resume: {what} of the run in {self.path} ({options})")
            raise ValueError(f"--resume: {key} was {was!r} in {self.last}, now it is {value!r}")

    def read_log(self) -> list[dict]:
        """The rows of log.jsonl; none if there is no log.  A last line that was not finished is left out."""
        if not os.path.exists(self.log):
            return []
        with open(self.log, encoding="utf-8") as f:
            lines = [line for line in f if line.endswith("\n")]
        try:
            return [json.loads(line) for line in lines]
        except ValueError as e:
            raise ValueError(f"{self.log} has a broken line ({e})") from None

    def append_log(self, row: dict):
        """Add a row to log.jsonl."""
        if distributed.RANK:
            return
        with naming(self.log), open(self.log, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def assert_finite(self, loss: float, step: int, lr: float):
        """Raise Diverged if the loss is no finite number: nothing of this step is saved."""
        if not math.isfinite(loss):
            saved = f"{self.best} is intact" if os.path.exists(self.best) else "nothing had been saved yet"
            raise Diverged(f"loss is {loss} at step {step}, --lr {lr:g}; {saved}. Try --lr {lr / 4:.1g}")

    def truncate_log(self, step: int):
        """Drop the rows of log.jsonl that were written after `step`; at step 0, all of them."""
        if distributed.RANK:
            return
        rows = [row for row in self.read_log() if row["step"] <= step] if step else []
        with replacing(self.log) as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
