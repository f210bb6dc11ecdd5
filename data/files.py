"""Rows from files, and to files.

    load_splits(where)    {"train": rows, "val": rows, "test": rows, ...} of a folder or a file
    read_rows(path)       rows of one file; formats.py has the formats

A row is a dict of

    instruction, input, output    texts; input may be missing or empty
    history                       earlier turns, if any: [{"role": "system", "content": "be brief"}, ...]
    task                          the name of its task, if it has one
    end                           False if the text goes on after output

`from_known_format` makes such rows of other shapes.  A column that nothing uses is left out, and named once on standard
error.  So is a data file that nothing uses.
"""

import json
import os
import random
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

from data.formats import READABLE, READABLE_TEXT, read_records
from data.template import question
from plumbing import distributed
from plumbing.files import replacing

# -- Rows of a file ----------------------------------------------------------------------------------------------------


def read_rows(
    path: str, skip_bad: bool = False, reshape: Callable | None = None, ignored: set[str] | None = None
) -> list[dict]:
    """Rows of a file.

    skip_bad    leave out rows that cannot be used, and count them on standard error
    reshape     takes the place of `from_known_format`
    ignored     receives the names of unused columns.  Without it, they are printed

    Raises ValueError with the file and the line for what is not a row.
    """
    unused = set() if ignored is None else ignored
    rows, bad = [], Bad(skip_bad)
    records = read_records(path, KNOWN, unused)
    for place, record in distributed.progress(records, os.path.basename(path), unit="row", leave=False):
        try:
            rows.append(Row(as_row(record, reshape or from_known_format, unused)))
            rows[-1].place = path, place
        except (ValueError, RecursionError) as e:
            bad.note(f"{path}, {place}: {e}")
    if not rows and not bad.count:
        raise ValueError(f"{path} has no rows")
    bad.report(rows, path)
    if ignored is None:
        name_ignored(unused)
    return rows


class Row(dict):
    """A row that knows where it is from: (file, "line 3")."""

    __slots__ = ("place",)


class Bad:
    """Counts the rows that cannot be used: skip_bad leaves them out, else the first one raises ValueError."""

    def __init__(self, skip_bad: bool):
        self.skip_bad, self.count, self.first = skip_bad, 0, ""

    def note(self, error: str):
        """One that cannot be used."""
        if not self.skip_bad:
            raise ValueError(f"{error} (--skip-bad leaves such rows out)") from None
        self.count, self.first = self.count + 1, self.first or error

    def report(self, kept: list, where: str):
        """At the end, say how many there were.  Raises ValueError if nothing is left."""
        if not kept:
            raise ValueError(f"{where} has no row that can be used. The first: {self.first}")
        if self.count:
            warn(f"left out {self.count:,} of {self.count + len(kept):,} rows. The first: {self.first}")


def as_row(record: object, reshape: Callable, ignored: set[str]) -> dict:
    """A row from what a file holds.  Raises ValueError for what is not a row, or has nothing to learn."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"it has {str(record)[:80]}; it needs instruction and output")
    row = reshape(record, ignored)
    texts = [(key, row[key]) for key in ("instruction", "input", "output") if key in row]
    for name, text in texts + [(turn["role"], turn["content"]) for turn in row.get("history", [])]:
        if not isinstance(text, str):
            way = f" (data.prepare --map '{name}={{COLUMN}}' takes JSON)" if isinstance(text, list | dict) else ""
            raise ValueError(f"{name} is {text!r}"[:80] + f", and should be text{way}")
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{name} has half of a character, or a byte that is not UTF-8: {ascii(text)[:60]}")
    if not row["output"].strip():
        raise ValueError("output is empty: there is nothing to learn")
    return row


def column_names(columns: dict | list) -> str:
    """The names of columns, for a message of one line."""
    return ", ".join(str(name) if str(name).isprintable() else ascii(name) for name in columns) or "nothing"


def name_ignored(columns: set[str]):
    """Name unused columns on standard error."""
    if columns:
        warn(f"ignored columns: {column_names(sorted(columns))}")


def warn(message: str):
    """Print a line on standard error.  Of several processes, only the first one does."""
    if distributed.RANK == 0:
        print(message, file=sys.stderr)


def write_rows(path: str, rows: list[dict]):
    """Write rows to a .jsonl file, atomically."""
    to_json = json.JSONEncoder(ensure_ascii=False).encode
    with replacing(path) as f:
        f.writelines(to_json(row) + "\n" for row in rows)


# -- Columns -----------------------------------------------------------------------------------------------------------

TEXTS = {  # what others call the three texts.  Of several, the first that is not empty is used
    "instruction": ("instruction", "question", "query", "prompt"),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion"),
}
CHATS = ("messages", "conversations", "conversation")
SYSTEM = ("system", "system_prompt")
KNOWN = {*sum(TEXTS.values(), ()), *CHATS, *SYSTEM, "history", "task", "mr", "ref"}
ROLES = {"human": "user", "prompter": "user", "developer": "system"}
CALLS = ("tool_calls", "tool_call", "function_call", "function_calls")
ROLES |= {name: "assistant" for name in ("gpt", "chatgpt", "model", "bot", "chatbot", "ai")}


def from_known_format(record: dict, ignored: set[str] | None = None) -> dict:
    """A row from a record of a well-known shape.  Raises ValueError for any other.

    Names of columns are compared without case and outer spaces.  What is not used is added to `ignored`.
    """
    columns = fold_names(record)  # those that have not been used yet
    turns = [Turn("system", as_text(take(columns, SYSTEM)))]
    turns += read_turns(take(columns, ("history",)), "history", columns)
    chat = read_turns(take(columns, CHATS), "messages", columns) or read_two_sides(columns)
    turns = [turn for turn in turns + chat if turn.content or turn.role != "system"]
    row, turns = split_chat(turns) if chat else (take_texts(columns, record), turns)
    if turns:
        row["history"] = [{"role": turn.role, "content": turn.content} for turn in turns]
    if not is_empty(columns.get("task")) and not isinstance(columns["task"], list | dict):
        row["task"] = as_text(columns.pop("task"))
    if isinstance(columns.get("end"), bool):
        row["end"] = columns.pop("end")
    if ignored is not None:
        ignored.update(name for name, value in columns.items() if not is_empty(value))
    return row


def fold_names(record: dict) -> dict:
    """The same columns, their names without case and outer spaces."""
    columns = {}
    for key, value in record.items():
        name = str(key).strip().casefold()
        if name in columns:
            raise ValueError(f"it has the column {name[:80]!r} twice")
        columns[name] = None if value != value else value  # NaN: how pandas writes a cell that is missing
    return columns


def is_empty(value: object) -> bool:
    """Whether a column says nothing."""
    return value is None or value == "" or value == [] or value == {}


def take(columns: dict, names: tuple) -> object:
    """Remove the first of these columns that is not empty, and return its value; None if all are empty."""
    name = next((name for name in names if not is_empty(columns.get(name))), None)
    return columns.pop(name, None)


def as_text(value: object) -> object:
    """null, true and 3 as "", "true" and "3".  A list or an object stays what it is: it is not text."""
    return "" if value is None else value if isinstance(value, str | list | dict) else json.dumps(value)


def find_texts(columns: dict) -> dict[str, str | None]:
    """{key of a text: the name of its column, one that is not empty if there is, or None}."""
    present = {key: [name for name in names if name in columns] for key, names in TEXTS.items()}
    empty = lambda name: is_empty(columns[name])
    return {key: min(names, key=empty, default=None) for key, names in present.items()}


def to_text(value: object) -> str:
    """A value as text; a list or an object as JSON.  Raises ValueError for messages."""
    if find_messages(value):
        raise ValueError(f"it has messages, {str(value)[:60]}: name their column alone, without braces")
    value = as_text(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def take_texts(columns: dict, record: dict) -> dict:
    """Remove the columns of the three texts, and return them as a row."""
    names = find_texts(columns)
    if not any(names.values()) and "ref" in columns and re.search(r"\w\[.*\]", str(columns.get("mr"))):  # the E2E data
        output = columns.pop("ref")
        return {"instruction": "Describe the restaurant.", "input": columns.pop("mr"), "output": output}
    if not names["instruction"] or not names["output"]:
        advice = "python -m data.prepare FILE --map instruction=COLUMN output=COLUMN makes them of other columns"
        raise ValueError(f"it has {column_names(record)[:80]}; it needs instruction and output ({advice})")
    row = {key: columns.pop(name) for key, name in names.items() if name}
    return {key: as_text(value) if value is not None or key != "instruction" else None for key, value in row.items()}


# -- Chats -------------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What one side says in a chat.  An answer of weight 0 is read, but not learned."""

    role: str
    content: str
    weight: float = 1.0


def read_turns(chat: object, column: str, columns: dict) -> list[Turn]:
    """Turns of a list of {role, content} or {from, value}, or of pairs [question, answer].

    Unused keys of the messages are added to `columns`, as "messages.name".
    """
    if isinstance(chat, str):  # a table's cell
        try:
            chat = json.loads(chat)
        except ValueError:
            raise ValueError(f"{column} is {chat[:60]!r}, and should be a list in JSON") from None
    if chat is not None and not isinstance(chat, list):
        raise ValueError(f"{column} is {str(chat)[:60]}, and should be a list")
    turns = []
    for message in chat or []:
        if isinstance(message, list) and len(message) == 2:
            turns += [Turn("user", as_text(message[0])), Turn("assistant", as_text(message[1]))]
            continue
        parts = fold_names(message) if isinstance(message, dict) else {}
        if calls := take(parts, CALLS):
            advice = "they are not read: write them into the content"
            raise ValueError(f"a message of its {column} has tool calls, {str(calls)[:60]}; {advice}")
        role = take(parts, ("role", "from"))
        content = join_parts(next((parts.pop(name) for name in ("content", "value") if name in parts), None))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"a turn of its {column} has no role and content, both text: {str(message)[:60]}")
        role = role.strip().casefold()
        weight = next((parts.pop(name) for name in ("weight", "train", "loss") if name in parts), None)
        try:
            weight = 1.0 if weight is None else float(weight)
        except (TypeError, ValueError):
            raise ValueError(f"a message has the weight {str(weight)[:40]!r}, and should have a number") from None
        turns.append(Turn(ROLES.get(role, role), content, weight))
        columns.update({f"{column}.{name}": value for name, value in parts.items() if not is_empty(value)})
    return turns


def find_messages(value: object) -> object:
    """A value that is a message, a list of them, or the text of such a list, as `read_turns` wants it; else None."""
    if isinstance(value, str):
        if not re.match(r"\s*\[\s*\{", value):
            return None
        try:
            return find_messages(json.loads(value))
        except (ValueError, RecursionError):  # as Python prints a list: `read_turns` says what is wrong
            return value if re.search(r"[{,]\s*'(role|from)'\s*:", value) else None
    value = [value] if isinstance(value, dict) else value

    def is_message(x):
        keys = {str(key).strip().casefold() for key in x} if isinstance(x, dict) else set()
        return keys & {"role", "from"} and keys & {"content", "value", *CALLS}

    return value if isinstance(value, list) and value and all(map(is_message, value)) else None


def read_two_sides(columns: dict) -> list[Turn]:
    """The chat of two columns, what comes before an answer and what from it on, of which one at least has messages.

    The second may repeat the first, or its end.  No turns if the row is one of texts, or has become one: an answer of
    one message.
    """
    before, after = (find_texts(columns)[key] for key in ("instruction", "output"))
    messages = {name: find_messages(columns[name]) for name in (before, after) if name}
    if not after or not any(messages.values()):
        return []
    answers = read_turns(messages[after] or [{"role": "assistant", "content": as_text(columns[after])}], after, columns)
    if before and not messages[before] and len(answers) == 1 and answers[0].weight:
        columns[after] = answers[0].content
        return []
    turns = [Turn("user", as_text(columns[before]))] if before and not is_empty(columns[before]) else []
    turns = read_turns(messages[before], before, columns) if before and messages[before] else turns
    repeated = max(k for k in range(min(len(turns), len(answers)) + 1) if turns[len(turns) - k :] == answers[:k])
    if turns and answers and not repeated and answers[0].role != "assistant":
        advice = "--map of data.prepare, with this column for both, reads it alone"
        raise ValueError(f"its {after} is a chat that begins otherwise than its {before} ({advice})")
    columns.pop(before, None)
    columns.pop(after)
    return turns + answers[repeated:]


def join_parts(content: object) -> object:
    """The text of a content that is a list of parts, [{"type": "text", "text": "..."}]; another content as it is."""
    if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
        return content
    for part in content:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"a message has a part of type {str(part['type'])[:40]!r}: we read text")
    return "".join(part["text"] for part in content)


def split_chat(turns: list[Turn]) -> tuple[dict, list[Turn]]:
    """(row, earlier turns) of a chat.  The last answer that counts is what is learned, what follows it is left out."""
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant" and i > 0]
    if not any(turn.role != "system" for turn in turns[: max(answers, default=0)]):
        roles = ", ".join(dict.fromkeys(turn.role for turn in turns))
        raise ValueError(f"its messages have no answer of an assistant to anything. Their roles: {roles[:80]}")
    answers = [i for i in answers if turns[i].weight != 0]
    if not answers:
        raise ValueError("each answer of its messages has weight 0: there is nothing to learn")
    *earlier, question, answer = turns[: answers[-1] + 1]
    if question.role != "user":
        return {"instruction": "", "input": "", "output": answer.content}, [*earlier, question]
    return {"instruction": question.content, "input": "", "output": answer.content}, earlier


# -- Splits ------------------------------------------------------------------------------------------------------------

SPLITS = {"training": "train", "trainset": "train", "testset_w_refs": "test"}  # E2E's names, and others
SPLITS |= {name: name for name in ("train", "val", "test")}
SPLITS |= {name: "val" for name in ("valid", "validation", "dev", "devset", "eval")}
BINARY = (".parquet", ".arrow", ".feather", ".h5", ".db", ".sqlite", ".xls", ".xlsx", ".ods", ".pkl", ".npz")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz")
OURS = ("prepared.json", "config.json", "words.json")  # in a folder beside the rows


def load_splits(where: str, skip_bad: bool = False, reshape: Callable | None = None) -> dict[str, list[dict]]:
    """The splits of a data set: {"train": rows, "val": rows, "test": rows, "test_...": rows}; reshape: of `read_rows`.

    `where` is a file, or a folder with a file for train and, if there are, val, test and test_*.  E2E's folder may have
    devset.csv alone, which is then train.  What is missing of train, val and test is split off, a tenth each.
    """
    if not os.path.exists(where):
        takes = f"tiny, a folder with train.jsonl, or a {READABLE_TEXT} file"
        advice = "python -m data.prepare makes a folder of a public data set, or of a file of yours"
        raise FileNotFoundError(f"no data at {where}: --data takes {takes} ({advice})")
    paths, ignored = find_splits(where) if os.path.isdir(where) else {"train": where}, set()
    splits = {split: read_rows(path, skip_bad, reshape, ignored) for split, path in paths.items()}
    name_ignored(ignored)
    return fill_missing_splits(splits, where)


def find_splits(folder: str) -> dict[str, str]:
    """{split: path} of a folder.  Data files that are none of a split are named on standard error."""
    names = sorted(os.listdir(folder))
    paths, unused = {}, []
    only_devset = "devset.csv" in names and "train" not in map(split_name, names)
    for name in names:
        split = "train" if only_devset and name == "devset.csv" else split_name(name)
        if split is None or not os.path.isfile(os.path.join(folder, name)):
            unused += [name] * looks_like_data(name)
        elif split in paths:
            other = os.path.basename(paths[split])
            raise ValueError(f"{folder} has {split} twice, as {other} and {name}: remove one of them")
        else:
            paths[split] = os.path.join(folder, name)
    if "train" not in paths:
        content = column_names(names[:20])
        raise FileNotFoundError(f"no data in {folder}: no train.jsonl, .ndjson, .json, .csv or .tsv. It has {content}")
    if unused:
        warn(f"not used: {column_names(unused)} (of {folder}, which has {column_names(list(paths))})")
    return paths


def split_name(name: str) -> str | None:
    """The split that a file holds, by its name; None if it is no split that we can read."""
    stem, extension = os.path.splitext(name.lower())
    if extension not in READABLE:
        return None
    return SPLITS.get(stem, stem if stem.startswith("test_") else None)


def looks_like_data(name: str) -> bool:
    """Whether a file's name is that of data: by its extension, or because it is called train, validation, ..."""
    first, extension = name.lower().split(".")[0], os.path.splitext(name.lower())[1]
    if name in OURS or name.startswith(".") or extension in (".tmp", ".part", ".py", ".sh", ".md"):
        return False
    return extension in (*READABLE, *BINARY, *COMPRESSED) or first in SPLITS


def fill_missing_splits(splits: dict[str, list[dict]], where: str) -> dict[str, list[dict]]:
    """Splits, with what is missing of train, val and test split off from train by instruction, a tenth each."""
    splits = dict(splits)
    if not any(name.startswith("test") for name in splits):
        splits["train"], splits["test"] = split_by_instruction(splits["train"])
    if "val" not in splits:
        splits["train"], splits["val"] = split_by_instruction(splits["train"])
    if not all(splits.values()):
        raise ValueError(f"{where} has too few different instructions to split off a tenth for each of val and test")
    return {name: splits[name] for name in sorted(splits, key=lambda name: (name.startswith("test"), name))}


def split_by_instruction(rows: list[dict], seed: int = 0, share: float = 0.1) -> tuple[list[dict], list[dict]]:
    """(the rest, a share) of rows, so that the same instruction never stands on both sides."""
    groups = {}
    for row in rows:
        groups.setdefault(hash(question(row) or row["output"]), []).append(row)  # the texts would take much memory
    keys = list(groups)
    random.Random(seed).shuffle(keys)
    n = max(1, round(len(keys) * share))
    return [row for key in keys[n:] for row in groups[key]], [row for key in keys[:n] for row in groups[key]]


def label_words(rows: list[dict], limit: int = 10) -> list[str]:
    """The outputs of rows, if they are so few, and so often the same, that they are classes; else none."""
    words = sorted({row["output"].rstrip() for row in rows})
    return words if 2 <= len(words) <= limit and len(rows) >= 10 * len(words) else []
