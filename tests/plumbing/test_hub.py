"""Models by name, against a server on loopback that behaves as the hub does, and as it should not."""

import errno
import hashlib
import http.server
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest
import torch
from conftest import small_model

from plumbing import hub, pretrained

COMMIT = "0123abcd" * 5
TOKENIZER = ["tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
             "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]  # fmt: skip


class Hub(http.server.ThreadingHTTPServer):
    """Serves `files` of owner/name.  `trouble` maps a file to what goes wrong with it."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.trouble, self.requests, self.status = files, {}, [], {}
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def listing(self):
        siblings = []
        for name, data in self.files.items():
            row = {"rfilename": name, "size": len(data)}
            if name.endswith((".safetensors", ".bin")):
                row["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            else:
                row["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            siblings.append(row)
        return json.dumps({"sha": COMMIT, "siblings": siblings}).encode()


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, path = self.server, urllib.parse.unquote(self.path.split("?")[0])
        name = path.split(f"/resolve/{COMMIT}/")[-1]
        server.requests.append((name, dict(self.headers)))
        trouble = server.trouble.get(name)
        if server.status.get(name):
            self.send_response(server.status[name])
            self.end_headers()
            return
        if trouble and trouble[0] == "redirect":
            self.send_response(302)
            self.send_header("Location", trouble[1] + self.path)
            self.end_headers()
            return
        listing = path == "/api/models/owner/name/revision/main"
        if not listing and name not in server.files:
            self.send_response(404)
            self.end_headers()
            return
        data = server.listing() if listing else server.files[name]
        if trouble and trouble[0] == "other content":
            data = bytes(len(data))
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if trouble and trouble[0] == "no ranges":
            start = 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        stop = len(data)
        if trouble and trouble[0] in ("cut", "no ranges") and trouble[1] > 0:
            trouble[1] -= 1
            stop = min(len(data), start + len(data) // 3)
        if trouble and trouble[0] == "stall":
            self.wfile.write(data[start : start + 100])
            time.sleep(1.0)
            return
        self.wfile.write(data[start:stop])


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    pretrained.save_pretrained(folder, small_model("llama"))
    for name in TOKENIZER:
        (folder / name).write_text(f"content of {name}")
    server = Hub({name: (folder / name).read_bytes() for name in os.listdir(folder)})
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "PAUSE", 0.0)
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    yield server
    server.shutdown()


def left(tmp_path):
    """The files under the cache: what a failed download leaves behind."""
    return sorted(name for _, _, names in os.walk(tmp_path / "cache") for name in names)


def same(folder, server):
    return all(open(os.path.join(folder, name), "rb").read() == data for name, data in server.files.items())


def test_a_model_is_downloaded_once_and_then_found_without_the_network(server, monkeypatch):
    folder = hub.find_model("owner/name")
    assert same(folder, server)
    n = len(server.requests)
    assert hub.find_model("owner/name") == folder and len(server.requests) == n
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.find_model("owner/name") == folder
    idx = torch.randint(0, 50, (1, 9))
    assert torch.equal(pretrained.load_pretrained(folder)(idx), small_model("llama")(idx))


@pytest.mark.parametrize("trouble", ["cut", "no ranges"])
def test_a_download_that_breaks_is_resumed(server, trouble):
    server.trouble["model.safetensors"] = [trouble, 2]
    assert same(hub.find_model("owner/name"), server)
    ranges = [h.get("Range") for name, h in server.requests if name == "model.safetensors"]
    n = len(server.files["model.safetensors"]) // 3
    assert ranges == [None, f"bytes={n}-", f"bytes={2 * n if trouble == 'cut' else n}-"]


def test_a_killed_download_goes_on_where_it_was(server, tmp_path):
    part = tmp_path / "cache" / "models--owner--name" / "snapshots" / COMMIT / "model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(server.files["model.safetensors"][:1000])
    assert same(hub.find_model("owner/name"), server)
    assert [h.get("Range") for name, h in server.requests if name == "model.safetensors"] == ["bytes=1000-"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_has_another_hash_is_refused_and_deleted(server, tmp_path, name):
    server.trouble[name] = ["other content"]
    with pytest.raises(ValueError, match=f"{name} of owner/name from http.* arrived broken"):
        hub.find_model("owner/name")
    assert name not in left(tmp_path) and f"{name}.part" not in left(tmp_path)
    server.trouble.clear()
    assert same(hub.find_model("owner/name"), server)


@pytest.mark.parametrize(
    "status, token, error, says",
    [
        (401, None, PermissionError, "owner/name is gated: .* set HF_TOKEN"),
        (403, "secret", PermissionError, "owner/name is gated: .* your HF_TOKEN does not open it"),
        (404, None, FileNotFoundError, "has no owner/name, and there is no folder of that name"),
        (500, None, ConnectionError, "no owner/name from .*no folder of that name: try again, or give a folder"),
    ],
)
def test_the_hub_s_refusals_say_what_to_do(server, tmp_path, monkeypatch, status, token, error, says):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    server.status["/api/models/owner/name/revision/main"] = status
    with pytest.raises(error, match=says):
        hub.find_model("owner/name")
    assert left(tmp_path) == []


def test_a_file_that_never_comes_leaves_a_part_to_go_on_from(server, tmp_path):
    server.status["model.safetensors"] = 503
    with pytest.raises(ConnectionError, match="no model.safetensors of owner/name .* Try again"):
        hub.find_model("owner/name")
    assert "model.safetensors" not in left(tmp_path) and "main" not in left(tmp_path)


def test_a_server_that_stalls_is_given_up_only_when_nothing_comes(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.1)
    server.files["model.safetensors"] = server.files["model.safetensors"][:450]
    server.trouble["model.safetensors"] = ["stall"]  # 100 bytes, then silence: every attempt brings a little more
    assert same(hub.find_model("owner/name"), server)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_no_network_is_one_line(variable, server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="no owner/name from http://127.0.0.1:9 .*give a folder"):
        hub.find_model("owner/name")
    monkeypatch.setenv(variable, "1")
    with pytest.raises(FileNotFoundError, match="no such folder, it is not in .*cache, and HF_HUB_OFFLINE forbids"):
        hub.find_model("owner/name")


def test_a_full_disk_says_how_much_is_wanted_and_leaves_no_model(server, tmp_path, monkeypatch):
    def stream(open_from, f, size, description):
        f.write(b"x" * 10)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "_stream", stream)
    with pytest.raises(OSError, match="no space for .*config.json: 0 MB needed"):
        hub.find_model("owner/name")
    assert "config.json" not in left(tmp_path)


def test_two_processes_at_once_both_find_the_model(server):
    server.trouble["model.safetensors"] = ["cut", 2]
    context = multiprocessing.get_context("fork")
    folders = context.Queue()
    run = [context.Process(target=lambda: folders.put(hub.find_model("owner/name"))) for _ in range(2)]
    for p in run:
        p.start()
    folders = [folders.get(timeout=60) for _ in run]
    assert folders[0] == folders[1] and same(folders[0], server)
    fetched = [h.get("Range") for name, h in server.requests if name == "model.safetensors"]
    assert fetched.count(None) == 1  # the second one waited, and took what the first had fetched
    assert not any(name.endswith(".part") for name in os.listdir(folders[0]))


def test_the_ecosystem_s_cache_of_links_is_used(server, tmp_path):
    folder = hub.find_model("owner/name")
    root = tmp_path / "cache" / "models--openai-community--gpt2"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "snapshots" / COMMIT).mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for name in os.listdir(folder):
        shutil.copy(os.path.join(folder, name), root / "blobs" / name)
        os.symlink(os.path.join("..", "..", "blobs", name), root / "snapshots" / COMMIT / name)
    n = len(server.requests)
    assert hub.find_model("gpt2") == str(root / "snapshots" / COMMIT) and len(server.requests) == n
    os.remove(root / "blobs" / "model.safetensors")  # half a snapshot is none, though the link is still there
    with pytest.raises(FileNotFoundError, match="has no openai-community/gpt2"):
        hub.find_model("gpt2")


def test_shards_are_all_fetched(server):
    data = server.files.pop("model.safetensors")
    half = {"a.safetensors": data, "b.safetensors": data}
    server.files.update(half)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    server.files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert same(hub.find_model("owner/name"), server)
    assert hub.find_model("owner/name")


def test_the_token_is_sent_to_the_hub_and_to_nobody_it_sends_us_to(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    other = Hub(server.files)
    server.trouble["model.safetensors"] = ["redirect", f"http://localhost:{other.server_port}"]
    assert same(hub.find_model("owner/name"), server)
    assert all(h.get("Authorization") == "Bearer secret" for _, h in server.requests)
    assert len(other.requests) == 1 and "Authorization" not in other.requests[0][1]
    other.shutdown()


def test_a_model_that_we_cannot_run_is_refused_before_its_weights_come(server):
    config = json.loads(server.files["config.json"])
    server.files["config.json"] = json.dumps({**config, "model_type": "bert"}).encode()
    with pytest.raises(ValueError, match="model_type is 'bert'"):
        hub.find_model("owner/name")
    assert not any(name == "model.safetensors" for name, _ in server.requests)


HOME = "/home/me"
VARIABLES = [
    {},
    {"XDG_CACHE_HOME": "/xdg"},
    {"XDG_CACHE_HOME": "~/xdg"},
    {"XDG_CACHE_HOME": "/xdg", "HF_HOME": "/hf"},
    {"HF_HOME": "~/hf"},
    {"HF_HOME": "$HOME/hf"},
    {"HUGGINGFACE_HUB_CACHE": "/old"},
    {"HUGGINGFACE_HUB_CACHE": "~/old", "HF_HOME": "/hf"},
    {"HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "${HOME}/new"},
    {"HF_HUB_CACHE": "~/new", "HF_HOME": "/hf", "XDG_CACHE_HOME": "/xdg"},
    {"HF_HUB_OFFLINE": "1"},
    {"HF_HUB_OFFLINE": "on"},
    {"HF_HUB_OFFLINE": "2"},
    {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"},
    {"TRANSFORMERS_OFFLINE": "YES"},
    {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "true"},
    {"HF_TOKEN": " a\n"},
    {"HUGGING_FACE_HUB_TOKEN": "b"},
    {"HF_TOKEN": "a", "HUGGING_FACE_HUB_TOKEN": "b"},
    {"HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": "b"},
    {"HF_HOME": "TMP"},  # which holds a file called token
    {"HF_HOME": "TMP", "HF_TOKEN": "a"},
    {"HF_TOKEN_PATH": "TMP/other"},
    {"HF_HOME": "TMP", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"},
    {"HF_ENDPOINT": "http://mirror/"},
]
LIBRARY = """
import json, os, sys
for variables in json.load(sys.stdin):
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "XDG_")):
            del os.environ[name]
    os.environ.update(variables)
    for name in list(sys.modules):
        if name.startswith("huggingface_hub"):
            del sys.modules[name]
    from huggingface_hub import constants
    from huggingface_hub.utils._headers import get_token_to_send
    token = get_token_to_send(None) or ""
    print(json.dumps([constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE, token, constants.ENDPOINT]))
"""


def test_the_variables_mean_what_they_mean_to_huggingface_hub(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")
    (tmp_path / "token").write_text("from a file\n")
    (tmp_path / "other").write_text("\nfrom another\r\n")
    cases = [{k: v.replace("TMP", str(tmp_path)) for k, v in case.items()} for case in VARIABLES]
    env = {**os.environ, "HOME": HOME}
    library = subprocess.run([sys.executable, "-c", LIBRARY], input=json.dumps(cases), env=env, capture_output=True,
                             text=True, check=True)  # fmt: skip
    for case, line in zip(cases, library.stdout.splitlines(), strict=True):
        with monkeypatch.context() as m:
            for name in os.environ:
                if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "XDG_")):
                    m.delenv(name)
            for name, value in {"HOME": HOME, **case}.items():
                m.setenv(name, value)
            ours = [hub.cache_folder(), hub.is_offline(), hub.access_token(), hub.endpoint()]
        assert ours == json.loads(line), case


def test_a_model_in_the_cache_that_lacks_a_tokenizer_is_completed_or_used_as_it_is(server, monkeypatch):
    folder = hub.find_model("owner/name")
    for name in TOKENIZER:
        os.remove(os.path.join(folder, name))
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    assert hub.find_model("owner/name") == folder  # its loader will say what is missing
    monkeypatch.delenv("TRANSFORMERS_OFFLINE")
    assert hub.find_model("owner/name") == folder and same(folder, server)
    os.remove(os.path.join(folder, "tokenizer.json"))
    os.remove(os.path.join(folder, "vocab.json"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.find_model("owner/name") == folder


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "../x", "~/model", "owner/"])
def test_what_is_no_name_is_not_looked_up(server, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # none of these is a folder here; beside a checkout there may be an x
    with pytest.raises(FileNotFoundError, match="no model at"):
        hub.find_model(name)
    assert not server.requests
