"""Make a data set of many tasks: on how many does reading the instruction pay?

    python -m experiments.tasks 64 --out data/64-tasks               # 4, 16 or 64 tasks, always the same bytes
    python -m experiments.compare tiny --data data/64-tasks --methods iapt,constants,lora-mlp
    python -m experiments.tasks 64 --apart --out data/64-moods  # the mood is the instruction, the question the input:
    python -m experiments.compare tiny --data data/64-moods --hide-instruction --methods summary,iapt,constants

A task is a question (a capital, a word in Spanish, the reverse of a list, ...) in a mood, which changes the answer:

    "be polite : what is the capital of peru ?"  ->  "please lima"

4, 16 and 64 tasks are 2 x 2, 4 x 4 and 8 x 8 questions and moods, the smaller sets part of the larger.  All have 6,400
training rows, so with fewer tasks there are more of each.  Test rows ask about the same facts in other words, or about
other lists.
"""

import itertools
import os
import random

from data.files import read_rows, write_rows
from data.world import different, make_row
from plumbing.cli import Parser, run

QUESTIONS = ["capital", "reverse", "spanish", "last", "plural", "copy", "young", "colour"]
MOODS = {"short": "{y}", "polite": "please {y}", "slow": "{y} {y}", "timid": "i think {y}", "long": "it is {y} .",
         "rude": "you know {y}", "generous": "take {y}", "quiet": "{y} end"}  # fmt: skip
WAYS = ["be {mood} :", "make it {mood} :", "i want it {mood} :"]  # all of it in words that the shipped model knows


def in_mood(rng: random.Random, task: tuple[str, str]) -> dict:
    """A row of a task: a question in a mood."""
    question, mood = task
    row = make_row(rng, question)
    instruction = f"{rng.choice(WAYS).format(mood=mood)} {row['instruction']}"
    output = MOODS[mood].format(y=row["output"])
    return {**row, "instruction": instruction, "output": output, "task": f"{question} {mood}"}


def asked(row: dict) -> tuple[str, str, str]:
    """What makes two rows the same question, whatever words name the mood."""
    return row["task"], row["instruction"].split(" : ")[1], row["input"]


def apart(row: dict) -> dict:
    """The mood as the instruction, and the question as its input."""
    mood, question = row["instruction"].split(" : ")
    return {**row, "instruction": f"{mood} :", "input": f"{question} {row['input']}".strip()}


def make_tasks(tasks: int) -> dict[str, list[dict]]:
    """{split: rows} of 4, 16 or 64 tasks, as many questions as moods.  No row asks the same as another."""
    n, splits, seen = round(tasks**0.5), {}, []
    pairs = list(itertools.product(QUESTIONS[:n], list(MOODS)[:n]))
    for split, size in (("train", 6400), ("test", 640), ("val", 320)):
        splits[split] = different(split, size, pairs, in_mood, seen, asked)
        seen += splits[split]
    return splits


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__)
    parser.add_argument("tasks", type=int, choices=[4, 16, 64], help="how many")
    parser.add_argument("--apart", action="store_true", help="moods as instructions, questions as their inputs")
    parser.add_argument("--out", help="the folder (default: data/N-tasks, or data/N-moods)")
    args = parser.parse_args(argv)
    out = args.out or os.path.join("data", f"{args.tasks}-{'moods' if args.apart else 'tasks'}")
    os.makedirs(out, exist_ok=True)
    for name, rows in make_tasks(args.tasks).items():
        path = os.path.join(out, f"{name}.jsonl")
        rows = [apart(row) for row in rows] if args.apart else rows
        if os.path.exists(path) and read_rows(path) != rows:
            raise ValueError(f"{path} has other rows: --out names another folder")
        write_rows(path, rows)
    print(f"saved {out}. Train on it: python -m experiments.compare tiny --data {out}")


if __name__ == "__main__":
    run(main)
