"""Models by name, with the package huggingface_hub and without it, against a server on loopback that acts as a hub."""

import errno
import http.server
import json
import os
import runpy
import shutil
import sys
import threading
import urllib.parse

import pytest
import torch
from conftest import small_model

from plumbing import hub, pretrained

COMMIT = "0123abcd" * 5
INFO = "/api/models/owner/name/revision/main"
TREE = f"/api/models/owner/name/tree/{COMMIT}"
TOKENIZER = ["tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja", "original/tokenizer.model"]
UNUSED = ["README.md", "onnx/config.json", "model.onnx", "pytorch_model.bin"]


class Hub(http.server.ThreadingHTTPServer):
    """Serves `files` of owner/name.  `trouble` is what goes wrong with a file, `status` the number that a path gets."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.trouble, self.status, self.error_code, self.requests = files, {}, {}, "", []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def content(self, name):
        sizes = [(name, len(data)) for name, data in self.files.items()]
        info = {"id": "owner/name", "sha": COMMIT, "siblings": [dict(rfilename=n, size=k) for n, k in sizes]}
        lists = {INFO: info, TREE: [dict(type="file", path=n, size=k, oid=n) for n, k in sizes]}
        return json.dumps(lists[name]).encode() if name in lists else self.files.get(name)


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        name = urllib.parse.unquote(self.path.split("?")[0]).split(f"/resolve/{COMMIT}/")[-1]
        self.server.requests.append(name)
        content, trouble = self.server.content(name), self.server.trouble.get(name)
        status = self.server.status.get(name, 404 if content is None else 200)
        data = content if status == 200 else b""
        sent = data[: len(data) // 3] if trouble in ("cut", "short") else bytes(len(data)) if trouble else data
        self.send_response(status)
        headers = {"X-Error-Code": self.server.error_code, "X-Repo-Commit": COMMIT, "ETag": name.replace("/", "-")}
        for header, value in {**headers, "Content-Length": len(sent if trouble == "short" else data)}.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(sent)

    do_HEAD = do_GET


@pytest.fixture(params=["plain", "package"])
def either(request, tmp_path, monkeypatch):
    """A hub with a small model, and an empty cache: without the package, and with it."""
    pretrained.save_pretrained(tmp_path / "model", small_model("llama"))
    files = {name: (tmp_path / "model" / name).read_bytes() for name in os.listdir(tmp_path / "model")}
    server = Hub({**files, **{name: f"content of {name}".encode() for name in (*TOKENIZER, *UNUSED)}})
    clear_variables(monkeypatch)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails
    else:  # it read HF_ENDPOINT when it was imported
        constants = pytest.importorskip("huggingface_hub.constants", reason="pip install huggingface_hub")
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.ENDPOINT)
    yield server
    server.shutdown()


plain = pytest.mark.parametrize("either", ["plain"], indirect=True)
package = pytest.mark.parametrize("either", ["package"], indirect=True)


def clear_variables(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "XDG_")):
            monkeypatch.delenv(name)


def left(tmp_path):
    """The files under the cache that could be taken for a model's weights, for half of them, or for a reference."""
    names = [name for _, _, names in os.walk(tmp_path / "cache") for name in names]
    return [name for name in names if name == "main" or name.endswith((".safetensors", ".tmp", ".incomplete"))]


def same(folder, server, unused=UNUSED):
    """Whether a folder has the server's files, but not those that we do not read."""
    found = {name for name in server.files if os.path.exists(os.path.join(folder, name))}
    read = {name: open(os.path.join(folder, name), "rb").read() for name in found}
    return read == {name: data for name, data in server.files.items() if name not in unused}


def test_what_we_read_is_downloaded_once_and_then_found_without_the_network_or_the_package(either, monkeypatch):
    folder = hub.find_model("owner/name")
    assert same(folder, either)
    n = len(either.requests)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert runpy.run_path(hub.__file__)["find_model"]("owner/name") == folder and len(either.requests) == n
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.find_model("owner/name") == folder
    idx = torch.randint(0, 50, (1, 9))
    assert torch.equal(pretrained.load_pretrained(folder)(idx), small_model("llama")(idx))


@plain
def test_the_package_finds_what_was_downloaded_without_it(either, monkeypatch):
    folder = hub.find_model("owner/name")
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    library = pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")
    settings = {"cache_dir": hub.cache_folder(), "local_files_only": True}
    assert library.snapshot_download("owner/name", **settings) == folder
    assert library.hf_hub_download("owner/name", "config.json", **settings) == os.path.join(folder, "config.json")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_half_a_download_is_no_model_and_the_next_one_completes_it(either, tmp_path, monkeypatch, variable):
    either.status["model.safetensors"] = 403
    with pytest.raises(OSError, match="owner/name .*403"):
        hub.find_model("owner/name")
    assert left(tmp_path) == []
    n = len(either.requests)
    with monkeypatch.context() as m, pytest.raises(FileNotFoundError, match="in .*cache, and HF_HUB_OFFLINE is set"):
        m.setenv(variable, "YES")
        hub.find_model("owner/name")
    assert len(either.requests) == n
    either.status.clear()
    assert same(hub.find_model("owner/name"), either)


@plain
@pytest.mark.parametrize("trouble", ["cut", "short"])
def test_a_file_that_is_cut_off_or_shorter_than_listed_leaves_nothing(either, tmp_path, trouble):
    either.trouble["model.safetensors"] = trouble
    with pytest.raises(ConnectionError, match="model.safetensors was cut off: .* bytes arrived.*: try again"):
        hub.find_model("owner/name")
    assert left(tmp_path) == []


def test_a_mirror_that_does_not_say_sizes_is_believed(either, monkeypatch):
    """Without sizes, the package's own list of files fails; nor is that list needed."""
    real = either.content

    def content(name):
        return real(name).replace(b'"size"', b'"bytes"') if name in (INFO, TREE) else real(name)

    monkeypatch.setattr(either, "content", content)
    either.status[TREE] = 403
    assert same(hub.find_model("owner/name"), either)


def test_a_full_disk_is_not_blamed_on_the_hub(either, tmp_path, monkeypatch):
    def full(*args, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(shutil, "move", full)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\): free some space, or name .*HF_"):
        hub.find_model("owner/name")


@pytest.mark.parametrize(
    "path, status, code, error, says",
    [
        ("config.json", 401, "GatedRepo", PermissionError, "owner/name is gated: accept its terms on .*/owner/name, "),
        ("config.json", 403, "GatedRepo", PermissionError, "owner/name is gated: accept its terms on .*/owner/name, "),
        (INFO, 401, "", FileNotFoundError, r"http\S+ has no public owner/name \(401\)"),
        (INFO, 404, "RepoNotFound", FileNotFoundError, r"http\S+ has no public owner/name \(404\)"),
        (INFO, 500, "", ConnectionError, r"no owner/name from http\S+ \(.*500.*\): try again, or give a folder"),
    ],
)
def test_the_hub_s_refusals_say_what_to_do(either, tmp_path, path, status, code, error, says):
    either.status[path], either.error_code = status, code
    with pytest.raises(error, match=says) as raised:
        hub.find_model("owner/name")
    text, missing = str(raised.value), sys.modules["huggingface_hub"] is None
    assert "\n" not in text and left(tmp_path) == []
    assert ("set HF_TOKEN" in text, "pip install huggingface_hub" in text) == (status < 500, status < 500 and missing)


def test_no_network_and_an_answer_that_is_no_list_of_files_are_one_line(either, monkeypatch):
    monkeypatch.setattr(either, "content", lambda name: b"<html>")
    with pytest.raises(ConnectionError, match="no owner/name from http.*Expecting value.*: try again"):
        hub.find_model("owner/name")
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="no owner/name from http://127.0.0.1:9 .*refused.*give a folder"):
        hub.find_model("owner/name")


@plain
@pytest.mark.parametrize("variable", ["HF_TOKEN", "HF_ENDPOINT"])
def test_what_needs_the_package_is_refused_without_it(either, monkeypatch, variable):
    with monkeypatch.context() as m, pytest.raises(ValueError, match=f"with {variable}, pip install huggingface_hub"):
        m.setenv(variable, "http://127.0.0.1:9")
        hub.find_model("owner/name")
    del either.files["model.safetensors"]
    with pytest.raises(ValueError, match="owner/name has no safetensors: .* pip install huggingface_hub"):
        hub.find_model("owner/name")


@package
def test_the_package_brings_a_bin_file_where_there_is_no_safetensors(either):
    del either.files["model.safetensors"]
    assert same(hub.find_model("owner/name"), either, UNUSED[:-1])


def test_the_ecosystem_s_cache_of_links_is_used(either, tmp_path):
    root = tmp_path / "cache" / "models--openai-community--gpt2"
    folder = root / "snapshots" / COMMIT
    shutil.copytree(hub.find_model("owner/name"), root / "blobs")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    folder.mkdir(parents=True)
    for name in os.listdir(root / "blobs"):
        os.symlink(os.path.join("..", "..", "blobs", name), folder / name)
    n = len(either.requests)
    assert hub.find_model("gpt2") == str(folder) and len(either.requests) == n
    os.remove(root / "blobs" / "model.safetensors")  # half a snapshot is none, though the link is still there
    with pytest.raises(FileNotFoundError, match="has no public openai-community/gpt2"):
        hub.find_model("gpt2")


@pytest.mark.parametrize("whole", [True, False])
def test_shards_are_all_fetched_and_one_that_is_missing_is_named(either, whole):
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    either.files |= {"model.safetensors.index.json": json.dumps(index).encode(), "a.safetensors": b"a"}
    either.files["b.safetensors" if whole else "c.safetensors"] = either.files.pop("model.safetensors")
    if whole:
        folder = hub.find_model("owner/name")
        assert same(folder, either) and hub.cached_model("owner/name") == folder
        os.remove(os.path.join(folder, "b.safetensors"))
    else:
        with pytest.raises(OSError, match="b.safetensors did not come"):
            hub.find_model("owner/name")
    assert hub.cached_model("owner/name") is None


@pytest.mark.parametrize(
    "trouble, says",
    [
        ("model_type", "model_type is 'bert'"),
        ("weights", "it has neither model"),
        ("tokenizer", "tokenizer.model is a SentencePiece model: .*AutoTokenizer.from_pretrained.*save_pretrained"),
        ("no tokenizer", "owner/name has no tokenizer that we can read: none of tokenizer.json"),
    ],
)
def test_a_model_that_we_cannot_run_is_refused_before_its_weights_come(either, trouble, says):
    if trouble == "weights":
        del either.files["model.safetensors"], either.files["pytorch_model.bin"]
    elif "tokenizer" in trouble:
        for name in set(hub.VOCABULARIES) & set(either.files):
            del either.files[name]
        either.files |= {} if trouble == "no tokenizer" else {"tokenizer.model": b"\n\x0e\n\x05<unk>"}
    else:
        either.files["config.json"] = either.files["config.json"].replace(b'"llama"', b'"bert"')
    with pytest.raises(ValueError, match=says):
        hub.find_model("owner/name")
    assert "config.json" in either.requests and "model.safetensors" not in either.requests


VARIABLES = """
XDG_CACHE_HOME=~/xdg
XDG_CACHE_HOME=/xdg HF_HOME=/hf
HF_HOME=$HOME/hf
HUGGINGFACE_HUB_CACHE=/old HF_HOME=/hf
HUGGINGFACE_HUB_CACHE=/old HF_HUB_CACHE=${HOME}/new
HF_HUB_CACHE=~/new HF_HOME=/hf XDG_CACHE_HOME=/xdg"""


@pytest.mark.parametrize("variables", VARIABLES.split("\n"))
def test_the_variables_mean_what_they_mean_to_huggingface_hub(variables, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants", reason="pip install huggingface_hub")
    clear_variables(monkeypatch)
    for variable in ["HOME=/home/me", *variables.split()]:
        monkeypatch.setenv(*variable.split("="))
    assert hub.cache_folder() == runpy.run_path(constants.__file__)["HF_HUB_CACHE"]


def test_a_model_in_the_cache_that_lacks_a_tokenizer_is_completed_or_used_as_it_is(either, monkeypatch):
    folder = hub.find_model("owner/name")
    paths = [os.path.join(folder, name) for name in TOKENIZER if name in hub.VOCABULARIES]
    for path in paths:
        os.remove(path)
    with monkeypatch.context() as offline:
        offline.setenv("TRANSFORMERS_OFFLINE", "1")
        assert hub.find_model("owner/name") == folder and not os.path.exists(paths[0])  # its loader will say so
    assert hub.find_model("owner/name") == folder and same(folder, either)
    for path in paths:
        os.remove(path)
    either.status[INFO] = 500
    assert hub.find_model("owner/name") == folder


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "../x", "~/model", "owner/"])
def test_what_is_no_name_is_not_looked_up(either, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # none of these is a folder here; beside a checkout there may be an x
    with pytest.raises(FileNotFoundError, match="no model at"):
        hub.find_model(name)
    assert not either.requests
