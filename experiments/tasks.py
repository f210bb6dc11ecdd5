"""When does reading the instruction pay?  IAPT beside constants of its size, on more and more tasks, for two models.

    python -m experiments.tasks --jobs 2                     # all of it, some 90 runs of a minute; it can be continued
    python -m experiments.tasks --jobs 2 --tasks 64 --steps 2400 --seeds 3 --rates 2     # longer, at the best rates
    python -m experiments.plots tasks out/tasks/tasks.json   # the picture

A task is a question (a capital, a word in Spanish, the reverse of a list, ...) in a mood, which changes the answer:

    "be polite : what is the capital of peru ?"  ->  "please lima"

4, 16 and 64 tasks are 2 x 2, 4 x 4 and 8 x 8 questions and moods, the smaller sets part of the larger.  All have 6,400
rows and the same steps, so with fewer tasks each is seen more often.  Test rows ask about the same facts in other
words, or about other lists.

The two frozen models are the shipped one, which has never seen an answer ("never tuned"), and the same after full
fine-tuning on 64 other tasks, of other questions and other moods ("tuned on other tasks").
"""

import os
import random
import shutil
from argparse import Namespace
from collections.abc import Iterator

import numpy as np

import train
from data import TINY, open_data
from data.files import read_rows, write_rows
from data.world import FACTS, fact_row, skill_row
from experiments import compare
from experiments.report import Scores, difference, interval, markdown
from plumbing.checkpoint import RunFolder
from plumbing.cli import Parser, at_least, run
from plumbing.files import copy_tokenizer, read_json, write_json
from plumbing.pretrained import save_pretrained
from sample import open_runs

QUESTIONS = ["capital", "reverse", "spanish", "last", "plural", "copy", "young", "colour"]
MOODS = {"short": "{y}", "polite": "please {y}", "slow": "{y} {y}", "timid": "i think {y}", "long": "it is {y} .",
         "rude": "you know {y}", "generous": "take {y}", "quiet": "{y} end"}  # fmt: skip
OTHER_QUESTIONS = ["continent", "french", "opposite", "past", "comparative", "first", "second", "count"]
OTHER_MOODS = {"simple": "{y} .", "happy": "i like {y}", "sad": "i want {y}", "ancient": "once {y}",
               "innocent": "would it be {y} ?", "guilty": "it would be {y}", "selfish": "give me {y}",
               "loud": "say {y}"}  # fmt: skip
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


def write_tasks(folder: str, questions: list[str], moods: dict[str, str], statements: list[dict] = ()):
    """A data set of questions in moods: train, to which `statements` are added, val and test."""
    train_rows = rows_of("train", 6400, questions, moods)
    test = rows_of("test", 640, questions, moods, train_rows)
    val = rows_of("val", 320, questions, moods, train_rows + test)
    for name, rows in {"val": val, "test": test, "train": train_rows + list(statements)}.items():
        write_or_compare(os.path.join(folder, f"{name}.jsonl"), rows)


def write_or_compare(path: str, rows: list[dict]):
    """Write rows.  Raises ValueError if the file has others: finished runs were made with those."""
    if os.path.exists(path):
        if read_rows(path) != rows:
            raise ValueError(f"{path} was made by another version of experiments.tasks: --out names another folder")
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_rows(path, rows)


def tuned_on_other_tasks(folder: str) -> str:
    """The shipped model after full fine-tuning on the other tasks, as a model's folder; made once.

    Half of the rows are statements from its pretraining: without them it would forget the facts that are asked for.
    """
    model_folder, data, out = (os.path.join(folder, name) for name in ("tuned", "other", "tuning"))
    if os.path.exists(os.path.join(model_folder, "model.safetensors")):
        return model_folder
    open_data("tiny")  # makes the corpus, if it is not there
    statements = random.Random(0).sample(read_rows(os.path.join(TINY, "pretrain", "train.jsonl")), 6400)
    write_tasks(data, OTHER_QUESTIONS, OTHER_MOODS, statements)
    shutil.copy(os.path.join(TINY, "pretrain", "test_complete.jsonl"), data)  # what it knows, before and after
    how = "--resume" if RunFolder(out).can_resume() else "--force"
    train.main(["--method", "full", "--data", data, "--out", out, "--steps", "600", how])
    opened = open_runs([out])
    opened.tuners[0].attach(opened.model)
    os.makedirs(model_folder, exist_ok=True)
    copy_tokenizer(TINY, model_folder)
    save_pretrained(model_folder, opened.model)
    return model_folder


METHODS = ("iapt", "constants")
PARTS = ("constants minus iapt", "facts", "lists", "the 4 tasks in all", "another instruction")


def measured(folder: str) -> dict:
    """What a finished comparison says: the loss of each method, and what reading the instruction is worth.

    PARTS are differences of loss: all test rows; those about facts; about lists of words; of the four tasks that all
    numbers of tasks have; and what IAPT loses if it reads another row's instruction, which may be of the same task.
    """
    rows = [row for row in read_json(os.path.join(folder, "compare.json"))["rows"] if row["method"] != "frozen"]
    scores = Scores(os.path.join(folder, "scores.npz"))
    iapt, constants, tokens = scores.get("iapt", "test"), scores.get("constants", "test"), scores.tokens("test")
    question, mood = np.array([task.split() for task in scores.families("test")]).T
    facts = np.isin(question, list(FACTS))
    in_all = np.isin(question, QUESTIONS[:2]) & np.isin(mood, [*MOODS][:2])

    def reading_pays(where):
        return difference([nats[where] for nats in constants], [nats[where] for nats in iapt], tokens[where])

    parts = [reading_pays(where) for where in (tokens > 0, facts, ~facts, in_all)]
    parts.append(difference(scores.get("iapt", "test", "swapped"), iapt, tokens, same_runs=True))
    return {
        "trained": {row["method"]: row["trainable"] for row in rows},
        "lr": {row["method"]: row["lr"] for row in rows},
        "nats": {name: scores.nats(name, "test") for name in scores.seeds},
        "exact": {name: scores.exact(name, "test") for name in scores.seeds},
        **dict(zip(PARTS, parts)),
        "validation": {row["method"]: row["curves"] for row in rows},  # [step, loss] of each seed
    }


def table(cells: list[dict]) -> Iterator[str]:
    """The cells as a table in Markdown: nats per token (rows answered exactly), parts with 95 % intervals."""
    rows = []
    for cell in sorted(cells, key=lambda cell: (cell["model"], cell["steps"], cell["tasks"])):
        scores = [f"{cell['nats'][name]:.3f} ({cell['exact'][name]:.1f} %)" for name in METHODS]
        parts = [interval(*cell[part]) for part in PARTS]
        rows.append([cell["model"], str(cell["tasks"]), f"{cell['steps']:,}", *scores, *parts])
    return markdown(["a model", "tasks", "steps", *METHODS, *PARTS], rows)


def parse(argv: list[str] | None = None) -> Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--tasks", type=int, nargs="+", default=[4, 16, 64], choices=[4, 16, 64], help="numbers of tasks")
    add("--steps", type=at_least(1), default=800, help="training steps of a run")
    add("--seeds", type=at_least(1), default=5, help="runs at the chosen rate")
    add("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="multiples of a method's own rate to try")
    add("--jobs", type=at_least(1), default=1, help="methods side by side")
    add("--out", default=os.path.join("out", "tasks"), help="folder of the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse(argv)
    models = {"never tuned": "tiny", "tuned on other tasks": tuned_on_other_tasks(args.out)}
    path = os.path.join(args.out, "tasks.json")
    cells = read_json(path) if os.path.exists(path) else []
    for tasks in args.tasks:
        data, n = os.path.join(args.out, f"{tasks}-tasks"), round(tasks**0.5)
        write_tasks(data, QUESTIONS[:n], dict(list(MOODS.items())[:n]))
        for model, init in models.items():
            folder = os.path.join(args.out, f"{os.path.basename(init)}-{tasks}-tasks-{args.steps}-steps")
            print(f"\n{tasks} tasks, {args.steps} steps, a model {model}:\n")
            compare.main([
                "tiny", "--methods", ",".join(METHODS), "--rates", *map(str, args.rates), "--init", init,
                "--data", data, "--steps", str(args.steps), "--seeds", str(args.seeds), "--jobs", str(args.jobs),
                "--out", folder,
            ])  # fmt: skip
            where = {"model": model, "tasks": tasks, "steps": args.steps}
            cells = [cell for cell in cells if not where.items() <= cell.items()]
            cells.append({**where, "seeds": args.seeds, **measured(folder)})
            write_json(path, cells, indent=1)
    print("", *table(cells), sep="\n")


if __name__ == "__main__":
    run(main)
