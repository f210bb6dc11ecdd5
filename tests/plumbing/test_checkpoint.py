"""A run's folder: what it holds, who may write into it, and what a run can go on from."""

import json
import os

import pytest
import torch

from baselines import build
from model import Config
from plumbing.checkpoint import LOCKS, RunFolder, load_checkpoint, load_into, save_tuner

CONFIG = Config(vocab_size=20, n_layer=1, n_head=2, n_embd=8)
META = {"method": "lora", "act": "all", "distill": 0.0, "options": ["r=2"], "init": "tiny", "base": "abc", "seed": 0}


def tuner(value=0.0):
    """A tuner all of whose parameters have this value."""
    made = build("lora", CONFIG, ["r=2"])
    with torch.no_grad():
        for p in made.parameters():
            p.fill_(value)
    return made


def value_of(content):
    """The value that all of a checkpoint's tensors have."""
    values = {x for tensor in content["tuner"].values() for x in tensor.flatten().tolist()}
    return values.pop() if len(values) == 1 else values


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    folder.lock()
    yield folder
    LOCKS.pop(os.path.abspath(os.path.join(folder.path, "lock")), None)


def save(folder, step, value):
    folder.save_last(tuner(value), META, optimizer={}, state={"step": step})


def test_a_checkpoint_holds_what_was_trained_and_goes_into_a_tuner_of_its_kind(tmp_path):
    path = str(tmp_path / "best.pt")
    save_tuner(path, tuner(3.0), META, step=7)
    for where in (path, str(tmp_path)):  # a folder stands for its best.pt
        content = load_checkpoint(where)
        assert (content["meta"], content["step"], value_of(content)) == (META, 7, 3.0)
    other = tuner()
    load_into(other, content, path)
    assert value_of({"tuner": other.state_dict()}) == 3.0
    with pytest.raises(ValueError, match="best.pt does not fit this model: .*size mismatch"):
        load_into(build("lora", CONFIG, ["r=3"]), content, path)
    assert os.listdir(tmp_path) == ["best.pt"]


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*best.pt. Run: python train.py"):
        load_checkpoint(str(tmp_path))
    (tmp_path / "best.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="best.pt is a Git LFS pointer"):
        load_checkpoint(str(tmp_path))
    torch.save({"tuner": {"a": torch.zeros(1)}, "meta": {**META, "options": [1]}}, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="best.pt is not a checkpoint of train.py"):
        load_checkpoint(str(tmp_path))


def test_the_last_checkpoint_is_kept_as_the_previous_one(folder):
    assert not any(map(os.path.exists, folder.files)) and not folder.can_resume()
    save(folder, 1, 1.0)
    assert os.path.exists(folder.last) and folder.can_resume() and not os.path.exists(folder.previous)
    save(folder, 2, 2.0)
    assert value_of(load_checkpoint(folder.last)) == 2.0 and value_of(load_checkpoint(folder.previous)) == 1.0
    os.remove(folder.last)
    assert folder.can_resume() and value_of(folder.load_for_resume(META)) == 1.0


def test_so_it_is_where_there_are_no_hard_links(folder, monkeypatch):
    def link(*paths):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", link)
    save(folder, 1, 1.0)
    save(folder, 2, 2.0)
    assert value_of(load_checkpoint(folder.last)) == 2.0 and value_of(load_checkpoint(folder.previous)) == 1.0


def test_a_damaged_last_checkpoint_is_replaced_by_the_previous_one_and_named(folder, capsys):
    save(folder, 1, 1.0)
    save(folder, 2, 2.0)
    with open(folder.last, "r+b") as f:
        f.truncate(500)
    assert value_of(folder.load_for_resume(META)) == 1.0
    assert f"was cut off (BadZipFile); going on from {folder.previous}, step 1" in capsys.readouterr().err
    os.remove(folder.previous)
    with pytest.raises(ValueError, match="last.pt is not a checkpoint of train.py, or was cut off"):
        folder.load_for_resume(META)


def test_a_run_that_differs_is_not_resumed(folder):
    save(folder, 1, 1.0)
    with pytest.raises(ValueError, match="--resume: seed was 0 in .*last.pt, now it is 1"):
        folder.load_for_resume({**META, "seed": 1})
    with pytest.raises(ValueError, match="--resume: the rows are not those of the run in .* \\(--data, --test-rows\\)"):
        folder.load_for_resume({**META, "rows": "f00"})
    save_tuner(folder.last, tuner(), META)
    with pytest.raises(ValueError, match="is a checkpoint without the optimizer's state: it cannot be resumed"):
        folder.load_for_resume(META)


def test_force_removes_the_run_and_nothing_else(folder):
    save(folder, 1, 1.0)
    save(folder, 2, 2.0)
    folder.append_log({"step": 1})
    save_tuner(folder.best, tuner(), META)
    with open(os.path.join(folder.path, "notes.txt"), "w") as f:
        f.write("mine")
    folder.lock(force=True)
    assert not any(map(os.path.exists, folder.files)) and sorted(os.listdir(folder.path)) == ["lock", "notes.txt"]


def test_a_folder_that_another_process_writes_to_is_refused(folder):
    save(folder, 1, 1.0)
    folder.lock()  # the process that has the lock may
    held = LOCKS.pop(os.path.abspath(os.path.join(folder.path, "lock")))  # as another process sees it
    with pytest.raises(FileExistsError, match="another run is writing to .*/run: --out names another folder"):
        folder.lock(force=True)
    assert folder.can_resume()
    held.close()
    folder.lock()


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(FileExistsError, match="run is a file, and not a folder: --out names another one"):
        RunFolder(str(tmp_path / "run")).lock()


def test_the_log_is_cut_back_to_a_step_and_an_unfinished_line_is_dropped(folder):
    assert folder.read_log() == []
    rows = [{"step": step, "loss": step / 3} for step in (10, 20, 30)]
    for row in rows:
        folder.append_log(row)
    with open(folder.log, "a") as f:
        f.write('{"step": 40, "lo')
    assert folder.read_log() == rows
    folder.truncate_log(20)
    assert folder.read_log() == rows[:2]
    folder.append_log(rows[2])
    with open(folder.log) as f:
        assert [json.loads(line) for line in f] == rows
    folder.truncate_log(0)
    assert folder.read_log() == [] and os.path.getsize(folder.log) == 0


def test_a_broken_log_is_named(folder):
    with open(folder.log, "w") as f:
        f.write("{\n")
    with pytest.raises(ValueError, match="log.jsonl has a broken line"):
        folder.truncate_log(10)


@pytest.mark.parametrize("path", [os.path.join(os.devnull, "x"), "a\0b"])
def test_a_folder_that_cannot_be_written_is_one_line_that_names_the_option(path):
    with pytest.raises(OSError, match="--out .* cannot be written"):
        RunFolder(path).lock()


def as_of_an_older_version(tensors):
    """What a generator's parts were called until 0b6e8b6: linear layers, whose weights are transposed."""
    old = {}
    for name, x in tensors.items():
        for today, then in (("W_down", "down.weight"), ("W_up", "up.weight"), ("W_sa", "w_sa"), ("R.", "act.")):
            if today in name:
                name, x = name.replace(today, then), x.T if "weight" in then else x
        old[name] = x
    return old


def test_a_run_of_an_older_version_is_used_but_not_resumed(tmp_path):
    today, loaded = (build("iapt", CONFIG, ["m=3"]) for _ in range(2))
    content = {"tuner": as_of_an_older_version(today.state_dict())}
    assert content["tuner"].keys().isdisjoint({"generators.0.W_up", "generators.0.R.a"})
    load_into(loaded, content, "best.pt")
    path = str(tmp_path / "old.pt")
    torch.save({**content, "meta": {name: x for name, x in META.items() if name != "act"}}, path)
    assert load_checkpoint(path)["meta"]["act"] == "all"  # there was no choice
    torch.save({**content, "meta": {**META, "method": "prompt", "options": ["P=4"]}}, path)
    assert load_checkpoint(path)["meta"]["options"] == ["P=4", "shift=0"]
    assert all(torch.equal(x, today.state_dict()[name]) for name, x in loaded.state_dict().items())
    folder = RunFolder(str(tmp_path))
    torch.save({**content, "meta": {**META, "method": "iapt"}, "optimizer": {}, "state": {}}, folder.last)
    with pytest.raises(ValueError, match="is of an older version: begin with --warm-start .*last.pt, and another"):
        folder.load_for_resume({**META, "method": "iapt"})
