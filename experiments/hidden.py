"""What is left of an instruction that is hidden: rows to measure it on, and what needs no training.

    python -m data.prepare alpaca --skip-bad
    python -m experiments.hidden rows --data data/alpaca --out data/alpaca-input
    python -m experiments.compare hidden --methods summary,summary-12,constants,iapt

`rows` keeps the short rows that have an input.  The instructions of val and test are in no training row: data.prepare
sees to it.
"""

import os
from argparse import Namespace

from data import load_splits
from data.files import write_rows
from plumbing.cli import Parser, at_least, run


def choose(rows: list[dict], longest: int) -> list[dict]:
    """Rows with an input, of at most `longest` characters."""
    texts = ("instruction", "input", "output")
    return [row for row in rows if row.get("input", "").strip() and sum(len(row[key]) for key in texts) <= longest]


def write(args: Namespace):
    os.makedirs(args.out, exist_ok=True)
    for name, rows in load_splits(args.data).items():
        rows = choose(rows, args.longest)
        write_rows(os.path.join(args.out, f"{name}.jsonl"), rows)
        print(f"{name}: {len(rows):,} rows")


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    rows = commands.add_parser("rows", help="choose rows of a data set")
    rows.add_argument("--data", default="data/alpaca", help="a folder with train.jsonl, val.jsonl and test.jsonl")
    rows.add_argument("--out", default="data/alpaca-input", help="folder to write to")
    rows.add_argument("--longest", type=at_least(1), default=240, help="characters of instruction, input and output")
    rows.set_defaults(work=write)
    args = parser.parse_args(argv)
    args.work(args)


if __name__ == "__main__":
    run(main)
