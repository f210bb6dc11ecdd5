"""The data set p3: many tasks, each asked in several ways.

    python -m data.prepare p3

Its prompts are those of P3, the training mixture of T0 (arXiv 2110.08207), as the repository yizhongw/self-instruct has
them: 22 data sets (families), 130 templates (wordings), a file for each.  The rows of five splits are chosen by a rule:

    train, val, test    rows 1 to 60, 61 to 64 and 65 to 70 of a template
    test_templates      30 rows each of wordings that training leaves out, of families that it has
    test_tasks          30 rows each of families that training leaves out

Only rows of at most 640 characters count, in the file's order.  Rows whose prompt is in train are left out of the other
splits.
A row's `task` is its template; `family` says to which data set it belongs.
"""

import hashlib
import json
import os

from plumbing.files import read_lists

# {family: lines of a wording and the first digits of the sha256 of its file}
LISTS = read_lists(os.path.join(os.path.dirname(__file__), "p3.txt"))
RESULTS = dict(map(str.split, LISTS.pop("results")))  # {split: sha256 of the file that comes out}
FAMILIES = list(LISTS)
UNSEEN_FAMILIES = ("quartz", "sciq")
ROWS = {"train": (0, 60), "val": (60, 64), "test": (64, 70)}
LONGEST = 640  # characters of prompt and completion together


def read_wordings() -> tuple[dict[str, str], dict[str, list[str]]]:
    """({template: first digits of its file's sha256}, {split: templates})."""
    hashes = {}
    splits = {"train": [], "test_templates": [], "test_tasks": []}
    for family, lines in LISTS.items():
        for line in lines:
            wording, sha256 = line.split()
            template = f"{family}_{wording.lstrip('*')}"  # *: a wording that training leaves out
            hashes[template] = sha256
            unseen = "test_templates" if wording.startswith("*") else "train"
            splits["test_tasks" if family in UNSEEN_FAMILIES else unseen].append(template)
    return hashes, splits


HASHES, TEMPLATES = read_wordings()


def family(template: str) -> str:
    """The data set that a template asks about; of another task, the task itself."""
    return next((name for name in FAMILIES if template.startswith(f"{name}_")), template)


def choose(rows: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """{template: rows} -> {split: rows}, by the rule above."""
    short = {}
    for template, subset in rows.items():
        subset = [clean(row, template) for row in subset]
        short[template] = [row for row in subset if len(row["instruction"]) + len(row["output"]) <= LONGEST]
    splits = {split: [row for t in TEMPLATES["train"] for row in short[t][a:b]] for split, (a, b) in ROWS.items()}
    for split in ("test_templates", "test_tasks"):
        splits[split] = [row for template in TEMPLATES[split] for row in short[template][:30]]
    seen = {row["instruction"] for row in splits["train"]}
    for split in splits.keys() - {"train"}:
        splits[split] = [row for row in splits[split] if row["instruction"] not in seen]
    check(splits)
    return splits


def clean(row: dict, template: str) -> dict:
    """A row of a template's file as one of ours: without outer spaces, and without the name of the end token."""
    output = row["output"].strip().removesuffix("<|endoftext|>").strip()
    return {"instruction": row["instruction"].strip(), "input": "", "output": output, "task": template}


def check(rows: dict[str, list[dict]]):
    """Raise ValueError if the files that these rows make are not those that we know."""
    for split, sha256 in RESULTS.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split])
        if hashlib.sha256(text.encode()).hexdigest() != sha256:
            raise ValueError(f"p3 does not give the rows of {split} that it should: --file names other files than ours")
