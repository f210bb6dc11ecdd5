"""Make a data set of many tasks: on how many does reading the instruction pay?

    python -m experiments.tasks 64 --out data/64-tasks               # 4, 16 or 64 tasks, always the same bytes
    python -m experiments.compare tiny --data data/64-tasks --methods iapt,constants,lora-mlp

A task is a question (a capital, a word in Spanish, the reverse of a list, ...) in a mood, which changes the answer:

    "be polite : what is the capital of peru ?"  ->  "please lima"

4, 16 and 64 tasks are 2 x 2, 4 x 4 and 8 x 8 questions and moods, the smaller sets part of the larger.  All have 6,400
training rows, so with fewer tasks there are more of each.  Test rows ask about the same facts in other words, or about
other lists.
"""

import os
import random

from data.files import read_rows, write_rows
from data.world import FACTS, fact_row, skill_row
from plumbing.cli import Parser, run

QUESTIONS = ["capital", "reverse", "spanish", "last", "plural", "copy", "young", "colour"]
MOODS = {"short": "{y}", "polite": "please {y}", "slow": "{y} {y}", "timid": "i think {y}", "long": "it is {y} .",
         "rude": "you know {y}", "generous": "take {y}", "quiet": "{y} end"}  # fmt: skip
WAYS = ["be {mood} :", "make it {mood} :", "i want it {mood} :"]  # all of it in words that the shipped model knows


def rows_of(seed: str, size: int, questions: list[str], moods: dict[str, str], avoid: list[dict] = ()) -> list[dict]:
    """`size` rows: each question in each mood, in turn.  None asks the same as another, or as one of `avoid`."""
    rng = random.Random(seed)
    tasks = [(question, mood) for question in questions for mood in moods]
    seen, rows = {asked(row) for row in avoid}, []
    while len(rows) < size:
        question, mood = tasks[len(rows) % len(tasks)]
        row = (fact_row if question in FACTS else skill_row)(rng, question)
        instruction = f"{rng.choice(WAYS).format(mood=mood)} {row['instruction']}"
        row |= {"instruction": instruction, "output": moods[mood].format(y=row["output"]), "task": f"{question} {mood}"}
        if asked(row) not in seen:
            seen.add(asked(row))
            rows.append(row)
    rng.shuffle(rows)
    return rows


def asked(row: dict) -> tuple[str, str, str]:
    """What makes two rows the same question, whatever words name the mood."""
    return row["task"], row["instruction"].split(" : ")[1], row["input"]


def make_tasks(tasks: int) -> dict[str, list[dict]]:
    """{split: rows} of 4, 16 or 64 tasks, as many questions as moods."""
    n = round(tasks**0.5)
    questions, moods = QUESTIONS[:n], dict(list(MOODS.items())[:n])
    train = rows_of("train", 6400, questions, moods)
    test = rows_of("test", 640, questions, moods, train)
    return {"train": train, "val": rows_of("val", 320, questions, moods, train + test), "test": test}


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__)
    parser.add_argument("tasks", type=int, choices=[4, 16, 64], help="how many")
    parser.add_argument("--out", help="the folder (default: data/N-tasks)")
    args = parser.parse_args(argv)
    out = args.out or os.path.join("data", f"{args.tasks}-tasks")
    os.makedirs(out, exist_ok=True)
    for name, rows in make_tasks(args.tasks).items():
        path = os.path.join(out, f"{name}.jsonl")
        if os.path.exists(path) and read_rows(path) != rows:
            raise ValueError(f"{path} has other rows: --out names another folder")
        write_rows(path, rows)
    print(f"saved {out}. Train on it: python -m experiments.compare tiny --data {out}")


if __name__ == "__main__":
    run(main)
