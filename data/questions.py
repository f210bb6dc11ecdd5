"""Questions to a run, as sample.py takes them, and answers, as it prints them."""

import itertools
import json
import sys
from collections.abc import Callable
from typing import NamedTuple

from data import shorten
from data.files import CHATS, TEXTS, as_row, column_names, fold_names, from_known_format, read_turns, take
from data.formats import parse_json
from data.template import Template
from data.tokenizer import Tokenizer
from model import Cache
from plumbing.decoding import check_room


class Answer(NamedTuple):
    """What a model has written, or the error for which it was not asked.  cut: there was no room for the end of it."""

    text: str = ""
    cut: bool = False
    error: ValueError | None = None

    def __str__(self) -> str:
        return self.text + "..." * self.cut

    def as_record(self) -> dict:
        """As columns of a JSON object."""
        return {"error": str(self.error)} if self.error else {"output": self.text, "cut": self.cut}


def read_question(text: str, about: str, system: str, is_json: bool) -> tuple[dict, dict | ValueError]:
    """(record, row) of an instruction, an input and a system message; or of an object of such columns, where is_json.

    The row is a ValueError, if there is nothing that could be asked.
    """
    record = {"instruction": text, **{k: v for k, v in (("input", about), ("system", system)) if v}}
    try:
        if is_json and text.startswith("{"):
            content = parse_json(text)
            if isinstance(content, ValueError):
                raise ValueError(f"it begins as a row in JSON, and is none ({content})")
            del record["instruction"]
            record |= content
        return record, as_question(record)
    except ValueError as e:
        return record, e


def as_question(record: dict) -> dict:
    """The row of a record that needs no output: what stands there, and a last answer, is left out."""
    columns = fold_names(record)
    if not {*TEXTS["instruction"], *CHATS} & set(columns):
        raise ValueError(f"it has {column_names(record)[:80]}, and no instruction or messages")
    if chat := read_turns(take(columns, CHATS), "messages", {}):
        chat = chat[:-1] if chat[-1].role == "assistant" else chat
        columns["messages"] = [*(turn._asdict() for turn in chat), {"role": "assistant", "content": "?"}]
    return as_row({**columns, "output": "?"}, from_known_format, set())


def as_arguments(row: dict) -> list[str]:
    """What sample.py is to be given, behind the run, to ask what a row asks."""
    turns = row.get("history", [])
    texts = [row["instruction"], row.get("input", ""), "".join(turn["content"] for turn in turns)]
    is_plain = texts[0] and not any(text.startswith(("-", "@")) for text in texts)  # no option, and no file
    if not is_plain or [turn["role"] for turn in turns] not in ([], ["system"]):
        columns = ("instruction", "input", "history")
        return ["--json", json.dumps({name: row[name] for name in columns if name in row}, ensure_ascii=False)]
    instruction, *others = texts
    return [instruction, *(part for pair in zip(("--input", "--system"), others) for part in pair if pair[1])]


class Question(NamedTuple):
    """A row that can be asked."""

    place: int  # among all rows
    first: list[int] | Cache  # ids of its hidden instruction, or what has been read of it; none: nothing is hidden
    prompt: list[int]
    size: int  # tokens that are read, of both
    new: int  # most tokens to write


def make_batches(
    rows: list[dict | ValueError], tokenizer: Tokenizer, template: Template, limit: int, max_new: int, truncate: bool,
    hidden: bool, saved: dict[str, Cache], batch_size: int,
) -> tuple[list[Answer], list[list[Question]]]:  # fmt: skip
    """(answers, batches) for `answers` of sample.py: the errors of rows that cannot be asked, and those that can be.

    A batch has at most `batch_size` questions, of similar length, and all with the same `new`.  limit: tokens of a row.
    """
    answers, questions = [Answer()] * len(rows), []
    for i, row in enumerate(rows):
        try:
            if isinstance(row, ValueError):
                raise row
            first, prompt = template.parts(row, tokenizer, hidden)
            first = saved.get(row["instruction"], first)
            if isinstance(first, Cache) and row.get("history"):
                raise ValueError(f"{row['instruction']} has been read already, without --system: save it with it")
            if truncate and not hidden:
                prompt = shorten(prompt, limit - (max_new or min(64, limit // 2)), tokenizer, template)
            size = len(prompt) + (int(first.pos) if isinstance(first, Cache) else len(first))
            new = max_new or max(1, min(64, limit - size))
            check_room(size, new, limit)
            questions.append(Question(i, first, prompt, size, new))
        except ValueError as e:
            answers[i] = Answer(error=e)
    questions.sort(key=lambda question: question.size)  # so those with less room than others are the last
    parts = [list(part) for _, part in itertools.groupby(questions, key=lambda question: question.new)]
    return answers, [part[k : k + batch_size] for part in parts for k in range(0, len(part), batch_size)]


def print_answers(
    records: list[dict], rows: list[dict], answers: list[Answer], is_json: bool, explain: Callable | None = None
) -> bool:
    """Print an answer to each question of `read_question`, after the lines of `explain(row)`.  Whether all have one.

    An answer that is missing is a blank line among others, and its error stands on standard error.
    """
    for i, (record, row, answer) in enumerate(zip(records, rows, answers, strict=True), 1):
        if answer.error:
            name = repr(next(iter(record.values()), ""))[:40]
            which = f"question {i} of {len(answers)}, {name}: " if len(answers) > 1 else ""
            print(f"error: {which}{answer.error}", file=sys.stderr)
        elif explain:
            print(*explain(row), sep="\n")
        if is_json:
            print(json.dumps({**record, **answer.as_record()}, ensure_ascii=False))
        elif not answer.error or len(answers) > 1:
            print(answer)
    if cut := sum(answer.cut for answer in answers):
        print(f"{cut} of {len(answers)} answers were cut (--max-new, or a shorter prompt)", file=sys.stderr)
    return not any(answer.error for answer in answers)
