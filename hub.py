"""Find a model by name: a folder, the ecosystem's cache, or a download into that cache.

    find("gpt2")                       the folder with its config.json, weights and tokenizer
    find("meta-llama/Llama-3.2-1B")    a gated model: it needs HF_TOKEN

The cache and its layout are those of the huggingface_hub package (HF_HUB_CACHE, or HF_HOME/hub), so nothing is
downloaded twice.  HF_ENDPOINT names another server, HF_HUB_OFFLINE=1 forbids the network.  A file is downloaded beside
its place, resumed after a break, checked against the size and hash that the hub gives, and only then moved into place.
"""

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import BinaryIO

from tqdm import tqdm

from data import replacing
from weights import read_config, read_index

try:
    import fcntl
except ImportError:  # Windows: there, two processes must not download the same model at once
    fcntl = None

NAMES = {"distilgpt2": "distilbert/distilgpt2"}
NAMES.update({name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")})
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or the index of either, and its shards
OTHERS = ("config.json", "vocab.json", "tokenizer.json", "tokenizer_config.json", "original/tokenizer.model")
TRIES, PAUSE, TIMEOUT = 5, 1.0, 30.0  # attempts without progress; seconds between them; seconds without a byte


def find(name: str) -> str:
    """The folder of a model.  Raises OSError or ValueError in one line that says what to do."""
    if os.path.isdir(name):
        return name
    repo = NAMES.get(name, name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise FileNotFoundError(f"no model at {name}: it is no folder, none of {', '.join(NAMES)}, and no OWNER/NAME")
    for known in (repo, name):  # older caches have gpt2 under that name alone
        folder = cached(known)
        if folder:
            return folder
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no", "off"):
        raise FileNotFoundError(f"{name} is not in {cache()}, and HF_HUB_OFFLINE forbids the network: unset it")
    return download(repo)


def cache() -> str:
    """The cache's folder: HF_HUB_CACHE, or HF_HOME/hub."""
    home = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    return os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")


def place(repo: str, *path: str) -> str:
    """Where the cache has, or would have, what belongs to a model."""
    return os.path.join(cache(), "models--" + repo.replace("/", "--"), *path)


def cached(repo: str) -> str | None:
    """The folder of the cache's `main`, if all of it is there; else None."""
    with contextlib.suppress(OSError, ValueError):
        with open(place(repo, "refs", "main"), encoding="utf-8") as f:
            folder = place(repo, "snapshots", f.read().strip())
        have = {name for name in os.listdir(folder) if os.path.exists(os.path.join(folder, name))}  # no dangling links
        kind = next((w for w in WEIGHTS if w in have or f"{w}.index.json" in have), None)
        if kind and "config.json" in have and (kind in have or shards(folder, kind) <= have):
            return folder
    return None


def shards(folder: str, kind: str) -> set[str]:
    """The files that the index of `kind`, one of WEIGHTS, names."""
    return set(read_index(os.path.join(folder, f"{kind}.index.json")).values())


# -- Download ----------------------------------------------------------------------------------------------------------


def download(repo: str) -> str:
    """Fetch what a model needs into the cache; what is whole already is left.  The reference to it is written last.

    Returns the folder.  Raises OSError or ValueError, as `find` does.
    """
    try:
        with request(f"api/models/{repo}/revision/main?blobs=true", repo) as answer:
            info = json.load(answer)
        commit, files = info["sha"], {f["rfilename"]: f for f in info["siblings"]}
        if not re.fullmatch(r"\w+", commit):
            raise ValueError(commit)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
        why = getattr(e, "reason", None) or e
        raise ConnectionError(
            f"no {repo} from {endpoint()} ({why}): try again, or give a folder that holds it"
        ) from None
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{endpoint()} gave no list of {repo}'s files ({type(e).__name__})") from None
    folder = place(repo, "snapshots", commit)
    kind = next((w for w in WEIGHTS if w in files or f"{w}.index.json" in files), None)
    if kind is None or "config.json" not in files:
        raise ValueError(f"{repo} has no config.json with {' or '.join(WEIGHTS)}: it is no model that we can read")
    for name in OTHERS:
        if name in files:
            fetch(repo, commit, files[name], folder)
    read_config(os.path.join(folder, "config.json"))  # what we could not run is refused before gigabytes of it
    if kind not in files:
        fetch(repo, commit, files[f"{kind}.index.json"], folder)
    for name in [kind] if kind in files else sorted(shards(folder, kind)):
        if name not in files:
            raise ValueError(f"{repo}: its index names {name}, which is not there")
        fetch(repo, commit, files[name], folder)
    os.makedirs(place(repo, "refs"), exist_ok=True)
    with replacing(place(repo, "refs", "main")) as f:
        f.write(commit)
    return folder


def endpoint() -> str:
    """The server: HF_ENDPOINT, or the hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def request(path: str, repo: str, start: int = 0) -> http.client.HTTPResponse:
    """Open a path of the hub, from byte `start` on.  Raises OSError: by name where the model is missing or gated."""
    query = urllib.request.Request(f"{endpoint()}/{path}", headers={"Range": f"bytes={start}-"} if start else {})
    token = os.environ.get("HF_TOKEN")
    if token:  # unredirected: the hub sends us on to other servers, which must not see it
        query.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        return urllib.request.urlopen(query, timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == 404 or e.headers.get("X-Error-Code") == "RepoNotFound":
            raise FileNotFoundError(
                f"{endpoint()} has no {repo}: is the name right? (HF_TOKEN, if it is private)"
            ) from None
        if e.code in (401, 403):
            how = "your HF_TOKEN does not open it" if token else "set HF_TOKEN to a token of yours"
            raise PermissionError(f"{repo} is gated: accept its terms on {endpoint()}/{repo}, and {how}") from None
        raise


def fetch(repo: str, commit: str, file: dict, folder: str):
    """One file of a snapshot, as the hub lists it: its size, and its hash, sha256 if it is large, git's sha1 if not."""
    name, size, sha256 = file["rfilename"], file["size"], (file.get("lfs") or {}).get("sha256")
    url = f"{repo}/resolve/{commit}/{urllib.parse.quote(name)}"

    def whole(path):
        if os.path.getsize(path) != size:
            return False
        return digest(path, b"" if sha256 else b"blob %d\0" % size) == (sha256 or file.get("blobId"))

    path, full = os.path.join(folder, *name.split("/")), f"{name} of {repo} from {endpoint()}"
    bring(path, lambda start: request(url, repo, start), whole, full, size)


def bring(path: str, ask: Callable, whole: Callable, name: str, size: int | None = None):
    """Download a file to `path`, unless it is there; two processes take turns.

    ask(start) opens it from a byte on, whole(path) says whether what came is right.  What has come stays beside `path`
    until all is there, and is where the next attempt goes on.  Raises OSError or ValueError, in one line.
    """
    part = f"{path}.part"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.exists(path):
        return
    with open(part, "ab") as f:
        if fcntl:
            fcntl.flock(f, fcntl.LOCK_EX)
        if os.path.exists(path):  # another process was faster; what we opened may be an empty new part
            with contextlib.suppress(OSError):
                os.remove(part)
            return
        try:
            receive(ask, f, size, name)
        except OSError as e:
            if e.errno == errno.ENOSPC:
                wanted = f"{size / 1e6:,.0f} MB wanted, " if size else ""
                raise OSError(f"no space for {path}: {wanted}{f.tell() / 1e6:,.0f} MB there") from None
            raise
        if not whole(part):
            os.remove(part)
            raise ValueError(f"{name} arrived broken: its hash is not the right one. It was deleted; try again")
        os.replace(part, path)


def receive(ask: Callable, f: BinaryIO, size: int | None, name: str):
    """Append to f what is missing of `size` bytes (None: as the server says).

    Goes on after breaks, and gives up after TRIES of them without a byte.
    """
    failed = 0
    with tqdm(total=size, initial=f.tell(), unit="B", unit_scale=True, desc=name.split()[0], dynamic_ncols=True) as bar:
        while size is None or f.tell() < size:
            before = f.tell()
            try:
                with ask(before) as answer:
                    if before and answer.status != 206:  # a server that cannot resume starts again
                        f.seek(f.truncate(0))
                        bar.reset()
                        before = 0
                    length = answer.headers["Content-Length"]
                    if size is None and length:
                        bar.total = size = before + int(length)
                    while chunk := answer.read1(min(1 << 20, size - f.tell()) if size else 1 << 20):
                        f.write(chunk)
                        bar.update(len(chunk))
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
                if isinstance(e, urllib.error.HTTPError) and e.code == 416:  # nothing is left to send
                    return
                if isinstance(e, urllib.error.HTTPError) and e.code < 500 and e.code != 429:
                    raise OSError(f"no {name}: the server answered {e.code}") from None
                cause = getattr(e, "reason", None) or e
            else:
                if size is None:  # it has not said how long it is, and this was all: the hash will tell
                    return
                cause = "it closed the connection"
            f.flush()
            failed = 0 if f.tell() > before else failed + 1
            if failed >= TRIES:
                raise ConnectionError(f"no {name}: {cause}. Try again: it will go on from here")
            if size is None or f.tell() < size:
                time.sleep(PAUSE * failed)


def digest(path: str, start: bytes = b"") -> str:
    """The sha256 of a file; of git's kind, sha1, if something stands before its bytes."""
    h = hashlib.sha1(start) if start else hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()
