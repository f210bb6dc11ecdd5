"""Files that are written completely or not at all, and JSON whose errors name the file."""

import contextlib
import errno
import json
import os
import shlex
import shutil
import statistics

FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
ELSEWHERE = "name another place (--out, --save)"


class CannotWrite(OSError):
    """A file or a folder that cannot be written: its path, the system's reason, and what to do."""

    def __init__(self, path: str, error: OSError, advice: str = ELSEWHERE):
        self.reason = getattr(error, "reason", None) or error.strerror or str(error)
        space = "free some space, or " if error.errno in FULL else ""
        super().__init__(f"{path} cannot be written ({self.reason}): {space}{advice}")
        self.errno = error.errno


@contextlib.contextmanager
def naming(path: str, advice: str = ELSEWHERE):
    """Raise CannotWrite for the system's errors about `path`, or a file whose name begins so, and for a full disk."""
    try:
        yield
    except OSError as e:
        if e.errno in (*FULL, errno.EIO) or str(e.filename or "").startswith(os.fspath(path)):
            raise CannotWrite(path, e, advice) from None
        raise


@contextlib.contextmanager
def replacing(path: str, mode: str = "w"):
    """Open `path` for writing.  After a crash it holds all of the old content or all of the new.

    Raises CannotWrite.
    """
    tmp = f"{path}.{os.getpid()}.tmp"
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with naming(path):
            with open(tmp, mode, **text) as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, path)
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def read_text(path: str) -> str:
    """The text of a file.  Raises ValueError, with the file's name, if it is not UTF-8."""
    refuse_lfs_pointer(path)
    try:
        with open(path, encoding="utf-8-sig") as f:
            return f.read()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 ({e.reason})") from None


def read_json(path: str):
    """The content of a JSON file.  Raises ValueError, with the file's name, if it is not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON ({str(e)[:80]})") from None


def write_json(path: str, content: object, indent: int | None = None):
    """Write `content` as JSON, atomically."""
    with replacing(path) as f:
        json.dump(content, f, indent=indent, ensure_ascii=False)
        f.write("\n")


def read_lists(path: str) -> dict[str, list[str]]:
    """{name: lines} of a text file of lists.  Each is its name, its lines, and an empty line before the next one."""
    return {name: lines for name, *lines in map(str.splitlines, read_text(path).split("\n\n"))}


def refuse_lfs_pointer(path: str):
    """Raise ValueError for a Git LFS pointer, the three lines that a clone without git-lfs has for a large file."""
    with open(path, "rb") as f:
        if f.read(64).startswith(b"version https://git-lfs.github.com/spec/"):
            raise ValueError(f"{path} is a Git LFS pointer, and not the file itself: run git lfs pull in its folder")


def refuse_adapter(folder: str):
    """Raise ValueError for a folder that the package peft has written."""
    if os.path.exists(os.path.join(folder, "adapter_config.json")):
        command = f"python -m baselines.peft {shlex.quote(str(folder))} NEW"
        raise ValueError(f"{folder} has adapter_config.json, an adapter that we do not apply: {command} makes it a run")


def refuse_sentencepiece(path: str):
    """Raise ValueError, with what to type, for a SentencePiece model.  Llama 3's tokenizer.model is lines of text."""
    with open(path, "rb") as f:
        if f.read(1) == b"\n":  # a first field of a protocol buffer
            at = f"({os.path.dirname(path)!r})"
            make = f"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained{at}.save_pretrained{at}"
            needs = f"{path} is a SentencePiece model: it needs tokenizer.json beside it, which transformers makes"
            raise ValueError(f"{needs} (pip install transformers sentencepiece): python -c {shlex.quote(make)}")


def no_duplicate_keys(pairs: list[tuple]) -> dict:
    """A JSON object as a dict, for json's object_pairs_hook.  Raises ValueError if a key occurs twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = statistics.mode(key for key, _ in pairs)
        raise ValueError(f"it has the key {twice[:80]!r} twice")
    return content


def copy_tokenizer(source: str, folder: str):
    """Copy the files of a model's folder that describe its tokenizer."""
    for name in os.listdir(source):
        kind = os.path.splitext(name)[1]
        if kind in (".json", ".model", ".txt", ".jinja") and "config.json" != name and "index" not in name:
            shutil.copy(os.path.join(source, name), folder)
