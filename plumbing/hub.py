"""Find a model by name: a folder, the ecosystem's cache, or a download into that cache.

The package huggingface_hub, where it is installed, downloads any model: gated ones too, and from mirrors.  Without it,
public models whose weights are safetensors are downloaded plainly, into the same cache.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import urllib.parse
import urllib.request
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

from tqdm import tqdm

from plumbing.files import FULL, CannotWrite, refuse_sentencepiece, replacing
from plumbing.pretrained import read_config, read_index

TINY = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data", "tiny")  # the shipped model
NAMES = {"distilgpt2": "distilbert/distilgpt2"}
NAMES.update({name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")})
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or the index of either, and its shards
VOCABULARIES = ("tokenizer.json", "vocab.json", "words.json", "tokenizer.model", "original/tokenizer.model")
SMALL = ["config.json", "generation_config.json", *VOCABULARIES, "merges.txt", "added_tokens.json",
         "special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja",
         *(f"{name}.index.json" for name in WEIGHTS)]  # fmt: skip
ENDPOINT = "https://huggingface.co"
TIMEOUT = 30.0  # seconds without a byte
env = os.environ.get


def find_model(name: str) -> str:
    """The folder of a model.  Raises OSError or ValueError in one line that says what to do."""
    if name == "tiny" or os.path.isdir(name):
        return TINY if name == "tiny" else name
    repo = NAMES.get(name, name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise FileNotFoundError(f"no model at {name}: it is no folder, none of {', '.join(NAMES)}, and no OWNER/NAME")
    cached = cached_model(repo) or cached_model(name)  # older caches have gpt2 under that name alone
    offline = (env("HF_HUB_OFFLINE") or env("TRANSFORMERS_OFFLINE") or "").upper() in ("1", "ON", "YES", "TRUE")
    if cached and (offline or any(os.path.exists(os.path.join(cached, file)) for file in VOCABULARIES)):
        return cached
    if offline:
        raise FileNotFoundError(f"no model {name} in {cache_folder()}, and HF_HUB_OFFLINE is set: give a folder")
    try:
        return download_model(repo)
    except Exception as e:  # the package's own, too, and those of the HTTP library that its version uses
        if cached:  # without a tokenizer, which may be elsewhere
            return cached
        if type(e) is ValueError:  # it cannot run here, or needs the package
            raise
        if getattr(e, "errno", None) in (*FULL, errno.EACCES, errno.EPERM, errno.EROFS) or isinstance(e, CannotWrite):
            raise CannotWrite(cache_folder(), e, "name another folder with HF_HOME") from None
        raise in_one_line(repo, e) from e


def cache_folder() -> str:
    """The folder of the cache of models, by huggingface_hub's variables, in which a quoted ~ or $NAME may be left."""
    home = env("HF_HOME") or os.path.join(env("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    folder = env("HF_HUB_CACHE") or env("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return os.path.expandvars(os.path.expanduser(folder))


def repo_path(repo: str, *path: str) -> str:
    """The path, in the cache, of something that belongs to a model."""
    return os.path.join(cache_folder(), "models--" + repo.replace("/", "--"), *path)


def cached_model(repo: str) -> str | None:
    """The folder of a model in the cache, if its config and all of its weights are there; else None."""
    with contextlib.suppress(OSError, ValueError):
        with open(repo_path(repo, "refs", "main"), encoding="utf-8") as f:
            folder = repo_path(repo, "snapshots", f.read().strip())
        files = [name for name in os.listdir(folder) if os.path.exists(os.path.join(folder, name))]  # no dead links
        if {"config.json", *weight_names(folder, files)} <= set(files):
            return folder
    return None


def weight_names(folder: str, files: list[str]) -> list[str]:
    """Those of a model's files that hold its weights.  An index is read in the folder.  ValueError: there are none."""
    for name in WEIGHTS:
        if name in files:
            return [name]
        if f"{name}.index.json" in files:
            return sorted(set(read_index(os.path.join(folder, f"{name}.index.json")).values()))
    raise ValueError(f"{folder} is no model that we can read: it has neither {' nor '.join(WEIGHTS)}")


def download_model(repo: str) -> str:
    """Download what a model needs into the cache, its reference last: without it, half a download is not found.

    Returns the folder.  Raises ValueError for a model that we cannot run, and the errors of the package or of urllib.
    """
    try:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=env("HF_ENDPOINT") or ENDPOINT)
    except ImportError:
        api = PlainApi()
    info = api.model_info(repo, revision="main", files_metadata=True)
    folder = repo_path(repo, "snapshots", info.sha)
    files = [file.rfilename for file in info.siblings]
    fetch = partial(api.hf_hub_download, repo, revision=info.sha, cache_dir=cache_folder())
    for name in filter(files.__contains__, SMALL):
        fetch(name)
    config = read_config(os.path.join(folder, "config.json"))  # refuse what we cannot run before gigabytes of it arrive
    vocabularies = [name for name in VOCABULARIES if os.path.exists(os.path.join(folder, name))]
    if not vocabularies and config.arch != "gpt2":  # whose own is known
        raise ValueError(f"{repo} has no tokenizer that we can read: none of {', '.join(VOCABULARIES)}")
    if vocabularies[:1] == ["tokenizer.model"]:
        refuse_sentencepiece(os.path.join(folder, "tokenizer.model"))
    names = weight_names(folder, files)
    if missing := [name for name in names if name not in files]:
        raise FileNotFoundError(f"{missing[0]} did not come: {repo} does not have it")
    for name in names:
        fetch(name)
    os.makedirs(repo_path(repo, "refs"), exist_ok=True)
    with replacing(repo_path(repo, "refs", "main")) as f:
        f.write(info.sha)
    return folder


def in_one_line(repo: str, error: Exception) -> OSError:
    """What the error of a download means, and what to do."""
    error = error.__cause__ or error
    response = getattr(error, "response", error)  # urllib's HTTPError is its own response
    code = getattr(response, "status_code", None) or getattr(response, "code", None)
    endpoint = env("HF_ENDPOINT") or ENDPOINT
    if code not in (401, 403, 404):
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return ConnectionError(f"no {repo} from {endpoint} ({reason}): try again, or give a folder")
    install = "" if find_spec("huggingface_hub") else "pip install huggingface_hub, "
    advice = f"accept its terms on {ENDPOINT}/{repo}, {install}and set HF_TOKEN to a token of yours"
    if response.headers.get("X-Error-Code") == "GatedRepo":
        return PermissionError(f"{repo} is gated: {advice}")
    public = f"{endpoint} has no public {repo} ({code}), and it is no folder"
    return FileNotFoundError(f"{public}. If the name is right: {advice}")


class PlainApi:
    """What `download_model` asks of huggingface_hub.HfApi, for public safetensors alone.  Raises urllib's errors."""

    def __init__(self):
        if name := next(filter(env, ("HF_ENDPOINT", "HF_TOKEN")), None):
            raise ValueError(f"to download a model with {name}, pip install huggingface_hub (or unset {name})")

    def model_info(self, repo: str, **_) -> SimpleNamespace:
        with urllib.request.urlopen(f"{ENDPOINT}/api/models/{repo}/revision/main?blobs=true", timeout=TIMEOUT) as f:
            self.info = json.load(f, object_hook=lambda fields: SimpleNamespace(**fields))
        return self.info

    def hf_hub_download(self, repo: str, name: str, revision: str, **_):
        if name.endswith(".bin"):
            raise ValueError(f"{repo} has no safetensors: for its pytorch_model.bin, pip install huggingface_hub")
        sizes = {file.rfilename: getattr(file, "size", None) for file in self.info.siblings}  # a mirror may not say it
        url = f"{ENDPOINT}/{repo}/resolve/{revision}/{urllib.parse.quote(name)}"
        download_file(url, repo_path(repo, "snapshots", revision, name), sizes.get(name))


def download_file(url: str, path: str, size: int | None = None, sha256: str = ""):
    """Download a file to `path`, unless it is there: whole, or not at all.  sha256 may be its first digits.

    Raises urllib's errors (OSError, http.client.HTTPException), and ValueError if it has another hash.
    """
    if os.path.exists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    name, digest = os.path.basename(path), hashlib.sha256()
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, replacing(path, "wb") as f:
        size = response.length if size is None else size  # None where the server does not say it, either
        with tqdm(total=size, unit="B", unit_scale=True, desc=name, dynamic_ncols=True) as bar:
            while chunk := response.read(1 << 20):
                digest.update(chunk)
                bar.update(f.write(chunk))
        if size not in (None, f.tell()):
            raise ConnectionError(f"{name} was cut off: {f.tell():,} of {size:,} bytes arrived")
        if not digest.hexdigest().startswith(sha256):
            raise ValueError(f"{name} arrived broken: its sha256 is {digest.hexdigest()}, and should be {sha256}")
