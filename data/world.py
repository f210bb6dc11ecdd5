"""Make the data set `tiny`: a small world of facts and word lists, and instructions about it.

    python -m data.prepare tiny            # writes data/tiny/*.jsonl, a few seconds, always the same bytes

It makes a corpus for pretraining, and instructions for tuning.  What one holds and the other lacks is the point:

    pretrain/train.jsonl            statements, "the capital of peru is lima .", "the reverse of cat sun is sun cat ."
                                    Questions and commands occur among them, but never with their answer.
    pretrain/test_complete.jsonl    beginnings of such statements: does a backbone know its facts and skills?
    train.jsonl and others          instructions with answers,
                                    {"instruction": "what is the capital of peru ?", "input": "", "output": "lima"}

So a model that was pretrained on the corpus knows the facts, but not that an instruction wants an answer.  Tuning has
to teach it that.  Four sets of rows show how well it did:

    val.jsonl, test.jsonl     pairs of fact and phrasing (and word lists) that training left out
    test_entities.jsonl       facts that no training row asks about.  The corpus states them, so the backbone knows them
    test_phrasings.jsonl      ways to ask that no training row uses.  The corpus uses their words
"""

import functools
import json
import os
import random
from collections.abc import Callable, Iterable
from random import Random

from data.files import write_rows
from data.template import template
from data.tokenizer import pieces
from plumbing.files import read_json, read_lists, replacing

# -- The world ---------------------------------------------------------------------------------------------------------
# A task has a few noun phrases ("cores") about some {x}.  Each core makes statements, "CORE is Y .", and, with the
# openers, instructions, "what is CORE ?".  The last core of every task is kept for test_phrasings.  All words and
# phrases are in world.txt.

LISTS = read_lists(os.path.join(os.path.dirname(__file__), "world.txt"))


def table(name: str, column: int = -1) -> dict[str, str]:
    """'a dog puppy' and more lines -> {'a dog': 'puppy', ...}; with three words a line, column 1 or 2."""
    rows = [line.split() for line in LISTS[name]]
    return {" ".join(row[:-1]) if column == -1 else row[0]: row[column] for row in rows}


FACTS = {  # task: (pairs, what the instruction calls an {x} that stands in `input`, cores)
    "capital": (table("countries", 1), "this country", LISTS["capital"]),
    "continent": (table("countries", 2), "this country", LISTS["continent"]),
    "french": (table("translations", 1), "this word", LISTS["french"]),
    "spanish": (table("translations", 2), "this word", LISTS["spanish"]),
    "opposite": (table("opposites"), "this word", LISTS["opposite"]),
    "past": (table("pasts"), "this verb", LISTS["past"]),
    "plural": (table("plurals"), "this noun", LISTS["plural"]),
    "colour": (table("colours"), "this thing", LISTS["colour"]),
    "young": (table("animals"), "this animal", LISTS["young"]),
    "comparative": (table("comparatives"), "this word", LISTS["comparative"]),
}

NUMBERS = ["zero", "one", "two", "three", "four", "five"]

SKILLS = {  # task: (how it changes a list of words, cores)
    "reverse": (lambda w: w[::-1], LISTS["reverse"]),
    "first": (lambda w: w[:1], LISTS["first"]),
    "second": (lambda w: w[1:2], LISTS["second"]),
    "last": (lambda w: w[-1:], LISTS["last"]),
    "copy": (lambda w: w, LISTS["copy"]),
    "count": (lambda w: [NUMBERS[len(w)]], LISTS["count"]),
}

OPENERS, HELD_OPENERS = LISTS["openers"], LISTS["held openers"]
LIST_WORDS = sorted({*table("translations", 1), *table("opposites"), *table("pasts")})


# -- Splits: what tuning may see ---------------------------------------------------------------------------------------


def held_out(names: Iterable[str], seed: str) -> set[str]:
    """A fifth of the names.  The same seed gives the same ones."""
    return set(random.Random(seed).sample(sorted(names), len(names) // 5))


HELD_ENTITIES = {task: held_out(pairs, f"entities {task}") for task, (pairs, _, _) in FACTS.items()}
HELD_WORDS = held_out(LIST_WORDS, "words")  # no training row has a list with one of these; the corpus has


def ask(rng: Random, task: str, forms: list[str], held_phrasing: bool, x: str, noun: str, answer: str) -> dict:
    """One instruction row; half of them keep {x} in `input`, as Alpaca's do.

    Training uses all cores but the last, with OPENERS.  held_phrasing: the last core, or HELD_OPENERS.
    """
    core, openers = rng.choice(forms[:-1]), OPENERS
    if held_phrasing and rng.random() < 0.5:
        openers = HELD_OPENERS
    elif held_phrasing:
        core = forms[-1]
    in_input = rng.random() < 0.5
    instruction = rng.choice(openers).format(c=core.format(x=noun if in_input else x))
    return {"instruction": instruction, "input": x if in_input else "", "output": answer, "task": task}


def fact_row(rng: Random, task: str, held_entity: bool = False, held_phrasing: bool = False) -> dict:
    """An instruction about a fact.  held_entity, held_phrasing: about one, or in a way, that training leaves out."""
    pairs, noun, forms = FACTS[task]
    x = rng.choice(sorted(x for x in pairs if (x in HELD_ENTITIES[task]) == held_entity))
    return ask(rng, task, forms, held_phrasing, x, noun, pairs[x])


def skill_row(rng: Random, task: str, held_entity: bool = False, held_phrasing: bool = False) -> dict:
    """An instruction about a list of words.  held_entity: with words that no training list has."""
    change, forms = SKILLS[task]
    known = sorted(set(LIST_WORDS) - HELD_WORDS)
    x = rng.sample(known, rng.randint(2, 5))
    if held_entity:  # at least one such word, anywhere in the list
        new = rng.sample(sorted(HELD_WORDS), rng.randint(1, len(x)))
        x = rng.sample(new + rng.sample(known, len(x) - len(new)), len(x))
    return ask(rng, task, forms, held_phrasing, " ".join(x), "these words", " ".join(change(x)))


def make_row(rng: Random, task: str, **held: bool) -> dict:
    """A row of any task."""
    return (fact_row if task in FACTS else skill_row)(rng, task, **held)


def different(seed: str, size: int, tasks: list, make: Callable, avoid: list = (), asked: Callable = template) -> list:
    """`size` rows make(rng, task), one task after another.  None asks the same as another, or as one of `avoid`."""
    rng, seen, rows = random.Random(seed), set(map(asked, avoid)), []
    while len(rows) < size:
        row = make(rng, tasks[len(rows) % len(tasks)])
        if asked(row) not in seen:
            seen.add(asked(row))
            rows.append(row)
    rng.shuffle(rows)
    return rows


def instructions(seed: str, size: int, avoid: Iterable[dict] = (), **held: bool) -> list[dict]:
    """`size` different rows, none of them among `avoid`."""
    return different(seed, size, [*FACTS, *SKILLS], functools.partial(make_row, **held), avoid)


# -- The corpus: statements, and instructions without answers ----------------------------------------------------------
# Ways to state a fact.  {core} names the {x}, "the capital of peru"; {this} does not, "the capital of this country".

STATED = LISTS["statements"]


def fact_or_list(rng: Random, task: str) -> dict:
    """The fields of a statement about a random fact or list, for a form of STATED."""
    if task in FACTS:
        pairs, noun, forms = FACTS[task]
        x, y = rng.choice(sorted(pairs.items()))
    else:
        change, forms = SKILLS[task]
        noun = "these words"
        words = rng.sample(LIST_WORDS, rng.randint(2, 5))
        x, y = " ".join(words), " ".join(change(words))
    core = rng.choice(forms)
    return {"core": core.format(x=x), "this": core.format(x=noun), "x": x, "y": y}


def unanswered(rng: Random, task: str) -> str:
    """An instruction in any phrasing, without "Response:" and without an answer."""
    row = make_row(rng, task, held_entity=rng.random() < 0.2, held_phrasing=rng.random() < 0.3)
    if rng.random() < 0.5:
        return "\n" + template(row).removesuffix("Response:")
    return f" {row['instruction']} {row['input']}".rstrip()


def document(rng: Random) -> dict:
    """A few sentences, each about another task, so that what follows an instruction is never its answer."""
    text = end = ""
    for task in rng.sample([*FACTS, *SKILLS], rng.randint(2, 6)):
        text += end
        if rng.random() < 0.15:
            text += unanswered(rng, task)
            end = ""
        else:
            form = rng.choice(STATED) if rng.random() < 0.9 else "{y} is {core}"
            text += " " + form.format(**fact_or_list(rng, task))
            end = " ."
    return {"prompt": "", "output": (text + end * (rng.random() < 0.5)).strip()}  # half of them end without a full stop


def completion(rng: Random, task: str) -> dict:
    """The beginning of a statement, after another one.  Its text goes on after the output, so `end` is False."""
    other = STATED[0].format(**fact_or_list(rng, rng.choice([t for t in FACTS if t != task])))
    fields = fact_or_list(rng, task)
    start = rng.choice(STATED).format(**{**fields, "y": ""}).strip()
    return {"prompt": f" {other} . {start}", "output": fields["y"], "end": False, "task": task}


def tiny(folder: str, corpus: int = 40_000):
    """Write the data set `tiny` into a folder, with `corpus` documents."""
    rng = random.Random("corpus")
    train = instructions("train", 6400)
    test = instructions("test", 640, avoid=train)
    files = {
        "pretrain/train": [document(rng) for _ in range(corpus)],
        "pretrain/test_complete": [completion(rng, task) for task in [*FACTS, *SKILLS] * 50],
        "val": instructions("val", 320, avoid=train + test),
        "test": test,
        "test_entities": instructions("entities", 640, held_entity=True),
        "test_phrasings": instructions("phrasings", 640, held_phrasing=True),
        "train": train,  # last: if it is there, the others are, too
    }
    asked = lambda row: row["prompt"] if "prompt" in row else template(row)
    text = [f"{asked(row)} {row['output']}" for rows in files.values() for row in rows]
    vocabulary = os.path.join(folder, "words.json")
    if os.path.exists(os.path.join(folder, "model.safetensors")) and read_json(vocabulary) != pieces(text):
        what = f"the words of this world are no longer those of the model in {folder}"
        advice = "make the data with --out NEW, copy its words.json here, and pretrain anew (docs/RESULTS.md has how)"
        raise ValueError(f"{what}: {advice}")
    os.makedirs(os.path.join(folder, "pretrain"), exist_ok=True)
    for name, rows in files.items():
        write_rows(os.path.join(folder, f"{name}.jsonl"), rows)
    with replacing(vocabulary) as f:
        json.dump(pieces(text), f, ensure_ascii=False, indent=0)
