"""Find a model by name: a folder, the ecosystem's cache, or a download into that cache.

    find_model("gpt2")                       the folder with its config.json, weights and tokenizer
    find_model("meta-llama/Llama-3.2-1B")    a gated model: it needs HF_TOKEN

The cache and its variables are those of the package huggingface_hub, so nothing is downloaded twice:

    HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE      the cache's folder, or, if neither is set:
    HF_HOME                                  its subfolder hub (default: XDG_CACHE_HOME/huggingface, or ~/.cache/...)
    HF_TOKEN, HUGGING_FACE_HUB_TOKEN         a token for gated models, or the file HF_TOKEN_PATH (HF_HOME/token)
    HF_HUB_DISABLE_IMPLICIT_TOKEN=1          sends no token
    HF_HUB_OFFLINE=1, TRANSFORMERS_OFFLINE=1 forbids the network
    HF_ENDPOINT                              another server

A file is downloaded beside its final place, resumed after a break, checked against the size and hash that the hub
gives, and only then moved into place.
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

from plumbing.files import replacing
from plumbing.pretrained import read_config, read_index

try:
    import fcntl
except ImportError:  # Windows: there, two processes must not download the same model at the same time
    fcntl = None

TINY = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data", "tiny")  # the shipped model
NAMES = {"distilgpt2": "distilbert/distilgpt2"}
NAMES.update({name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")})
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or the index of either, and its shards
VOCABULARIES = ("tokenizer.json", "vocab.json", "words.json", "tokenizer.model", "original/tokenizer.model")
OTHERS = ("config.json", "generation_config.json", *VOCABULARIES, "merges.txt", "added_tokens.json",
          "special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja")  # fmt: skip
MAX_FAILURES = 5  # attempts in a row that bring nothing
PAUSE = 1.0  # seconds between them
TIMEOUT = 30.0  # seconds without a byte


def find_model(name: str) -> str:
    """The folder of a model.  Raises OSError or ValueError in one line that says what to do."""
    if name == "tiny" or os.path.isdir(name):
        return TINY if name == "tiny" else name
    repo = NAMES.get(name, name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise FileNotFoundError(f"no model at {name}: it is no folder, none of {', '.join(NAMES)}, and no OWNER/NAME")
    cached = cached_model(repo) or cached_model(name)  # older caches have gpt2 under that name alone
    if cached and (is_offline() or any(os.path.exists(os.path.join(cached, file)) for file in VOCABULARIES)):
        return cached
    if is_offline():
        raise FileNotFoundError(
            f"no model {name}: there is no such folder, it is not in {cache_folder()}, and HF_HUB_OFFLINE forbids the"
            " network"
        )
    try:
        return download_model(repo)
    except OSError:
        if cached:  # without a tokenizer, which may be elsewhere
            return cached
        raise


# -- The cache ---------------------------------------------------------------------------------------------------------


def variable(*names: str) -> str:
    """The first of these environment variables that is set and not empty, or ""."""
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def is_true(value: str) -> bool:
    """Whether huggingface_hub takes a variable's value for yes."""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def is_offline() -> bool:
    """Whether the network is forbidden."""
    return is_true(variable("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def expand(path: str) -> str:
    """A path from a variable, in which a quoted ~ or $NAME may be left."""
    return os.path.expandvars(os.path.expanduser(path))


def home_folder() -> str:
    """Hugging Face's folder: HF_HOME, or its default."""
    cache = variable("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return expand(variable("HF_HOME") or os.path.join(cache, "huggingface"))


def cache_folder() -> str:
    """The folder of the cache of models."""
    return expand(variable("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") or os.path.join(home_folder(), "hub"))


def access_token() -> str:
    """The user's token, or ""."""
    if is_true(variable("HF_HUB_DISABLE_IMPLICIT_TOKEN")):
        return ""
    token = variable("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    if not token:
        path = expand(variable("HF_TOKEN_PATH") or os.path.join(home_folder(), "token"))
        with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as f:
            token = f.read()
    return token.replace("\r", "").replace("\n", "").strip()


def repo_path(repo: str, *path: str) -> str:
    """The path, in the cache, of something that belongs to a model."""
    return os.path.join(cache_folder(), "models--" + repo.replace("/", "--"), *path)


def cached_model(repo: str) -> str | None:
    """The folder of a model in the cache, if its config and all of its weights are there; else None."""
    with contextlib.suppress(OSError, ValueError):
        with open(repo_path(repo, "refs", "main"), encoding="utf-8") as f:
            folder = repo_path(repo, "snapshots", f.read().strip())

        def has(name):
            return os.path.exists(os.path.join(folder, name))  # False for a link to nothing, too

        weights = next((name for name in WEIGHTS if has(name) or has(f"{name}.index.json")), None)
        if weights and has("config.json") and (has(weights) or all(map(has, shard_names(folder, weights)))):
            return folder
    return None


def shard_names(folder: str, weights: str) -> set[str]:
    """The files that the index of `weights`, one of WEIGHTS, names."""
    return set(read_index(os.path.join(folder, f"{weights}.index.json")).values())


# -- Download ----------------------------------------------------------------------------------------------------------


def download_model(repo: str) -> str:
    """Download what a model needs into the cache, except for what is there already.  Its reference is written last.

    Returns the folder.  Raises OSError or ValueError, as `find_model` does.
    """
    commit, files = list_files(repo)
    folder = repo_path(repo, "snapshots", commit)
    weights = next((name for name in WEIGHTS if name in files or f"{name}.index.json" in files), None)
    if weights is None or "config.json" not in files:
        raise ValueError(f"{repo} has no config.json with {' or '.join(WEIGHTS)}: it is no model that we can read")
    for name in OTHERS:
        if name in files:
            download_repo_file(repo, commit, files[name], folder)
    read_config(os.path.join(folder, "config.json"))  # refuse what we cannot run before gigabytes of it arrive
    if weights not in files:
        download_repo_file(repo, commit, files[f"{weights}.index.json"], folder)
    for name in [weights] if weights in files else sorted(shard_names(folder, weights)):
        if name not in files:
            raise ValueError(f"{repo}: its index names {name}, which it does not have")
        download_repo_file(repo, commit, files[name], folder)
    os.makedirs(repo_path(repo, "refs"), exist_ok=True)
    with replacing(repo_path(repo, "refs", "main")) as f:
        f.write(commit)
    return folder


def list_files(repo: str) -> tuple[str, dict[str, dict]]:
    """The commit of a model's main branch, and its files as the hub describes them, by name."""
    try:
        with request(f"api/models/{repo}/revision/main?blobs=true", repo) as response:
            info = json.load(response)
        commit = info["sha"]
        files = {file["rfilename"]: file for file in info["siblings"]}
        if not re.fullmatch(r"\w+", commit):
            raise ValueError(commit)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
        reason = getattr(e, "reason", None) or e
        raise ConnectionError(
            f"no {repo} from {endpoint()} ({reason}), and no folder of that name: try again, or give a folder"
        ) from None
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{endpoint()} gave no list of {repo}'s files ({type(e).__name__})") from None
    return commit, files


def endpoint() -> str:
    """The server: HF_ENDPOINT, or the hub."""
    return (variable("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def request(path: str, repo: str, start: int = 0) -> http.client.HTTPResponse:
    """Open a path of the hub, from byte `start` on.  Raises OSError, by name where the model is missing or gated."""
    query = urllib.request.Request(f"{endpoint()}/{path}", headers={"Range": f"bytes={start}-"} if start else {})
    token = access_token()
    if token:  # unredirected: the hub redirects to other servers, which must not see it
        query.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        return urllib.request.urlopen(query, timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == 404 or e.headers.get("X-Error-Code") == "RepoNotFound":
            raise FileNotFoundError(
                f"{endpoint()} has no {repo}, and there is no folder of that name: is it right? (HF_TOKEN, if private)"
            ) from None
        if e.code in (401, 403):
            advice = "your HF_TOKEN does not open it" if token else "set HF_TOKEN to a token of yours"
            raise PermissionError(f"{repo} is gated: accept its terms on {endpoint()}/{repo}, and {advice}") from None
        raise


def download_repo_file(repo: str, commit: str, file: dict, folder: str):
    """Download one file of a model.  The hub gives its size and its hash: sha256 for a large one, else git's sha1."""
    name = file["rfilename"]
    size = file["size"]
    sha256 = (file.get("lfs") or {}).get("sha256")
    url = f"{repo}/resolve/{commit}/{urllib.parse.quote(name)}"

    def is_intact(path):
        if os.path.getsize(path) != size:
            return False
        return file_hash(path, b"" if sha256 else b"blob %d\0" % size) == (sha256 or file.get("blobId"))

    def open_url(url, start):
        return request(url, repo, start)

    path = os.path.join(folder, *name.split("/"))
    download_file(url, path, is_intact, f"{name} of {repo} from {endpoint()}", size, open_url)


def open_at(url: str, start: int) -> http.client.HTTPResponse:
    """Open a URL from byte `start` on."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)


def download_file(
    url: str,
    path: str,
    is_intact: Callable[[str], bool],
    description: str = "",
    size: int | None = None,
    open_url: Callable[[str, int], http.client.HTTPResponse] = open_at,
):
    """Download a file to `path`, unless it is there.  Two processes take turns.

    is_intact(path) checks what arrived.  Until then the bytes are in a file beside `path`, from which the next attempt
    goes on.  Raises OSError or ValueError, in one line that names `description`.
    """
    description = description or f"{os.path.basename(path)} from {url}"
    if os.path.exists(path):
        return
    part = f"{path}.part"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(part, "ab") as f:
        if fcntl:
            fcntl.flock(f, fcntl.LOCK_EX)
        if os.path.exists(path):  # another process was faster; what we opened may be an empty new part
            with contextlib.suppress(OSError):
                os.remove(part)
            return
        try:
            _stream(lambda start: open_url(url, start), f, size, description)
        except OSError as e:
            if e.errno == errno.ENOSPC:
                needed = f"{size / 1e6:,.0f} MB needed, " if size else ""
                raise OSError(f"no space for {path}: {needed}{f.tell() / 1e6:,.0f} MB downloaded") from None
            raise
        if not is_intact(part):
            os.remove(part)
            raise ValueError(f"{description} arrived broken: its hash is not the right one. It was deleted; try again")
        os.replace(part, path)


def _stream(open_from: Callable, f: BinaryIO, size: int | None, description: str):
    """Append to f what is missing of `size` bytes (None: as many as the server says).  open_from(byte) is the response.

    Goes on after breaks, and gives up after MAX_FAILURES of them without a byte.
    """
    failures = 0
    label = description.split()[0]
    with tqdm(total=size, initial=f.tell(), unit="B", unit_scale=True, desc=label, dynamic_ncols=True) as bar:
        while size is None or f.tell() < size:
            start = f.tell()
            try:
                with open_from(start) as response:
                    if start and response.status != 206:  # a server that cannot resume starts again
                        f.seek(f.truncate(0))
                        bar.reset()
                        start = 0
                    length = response.headers["Content-Length"]
                    if size is None and length:
                        bar.total = size = start + int(length)
                    while chunk := response.read1(min(1 << 20, size - f.tell()) if size else 1 << 20):
                        f.write(chunk)
                        bar.update(len(chunk))
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
                if isinstance(e, urllib.error.HTTPError) and e.code == 416:  # nothing is left to send
                    return
                if isinstance(e, urllib.error.HTTPError) and e.code < 500 and e.code != 429:
                    raise OSError(f"no {description}: the server answered {e.code}") from None
                cause = getattr(e, "reason", None) or e
            else:
                if size is None:  # the server has not said how long it is, and this was all: the hash will tell
                    return
                cause = "it closed the connection"
            f.flush()
            failures = 0 if f.tell() > start else failures + 1
            if failures >= MAX_FAILURES:
                raise ConnectionError(f"no {description}: {cause}. Try again: it will go on from here")
            if size is None or f.tell() < size:
                time.sleep(PAUSE * failures)


def file_hash(path: str, prefix: bytes = b"") -> str:
    """The sha256 of a file; or, with git's prefix before its bytes, its sha1."""
    h = hashlib.sha1(prefix) if prefix else hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()
