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

import json
import os
import random
from collections.abc import Iterable
from random import Random

from data.files import write_rows
from data.template import template
from data.tokenizer import pieces
from plumbing.files import read_json, replacing

# -- The world ---------------------------------------------------------------------------------------------------------
# A task has a few noun phrases ("cores") about some {x}.  Each core makes statements, "CORE is Y .", and, with the
# openers below, instructions, "what is CORE ?".  The last core of every task is kept for test_phrasings.

COUNTRIES = """
france paris europe, spain madrid europe, italy rome europe, germany berlin europe, portugal lisbon europe,
poland warsaw europe, greece athens europe, austria vienna europe, hungary budapest europe, norway oslo europe,
sweden stockholm europe, finland helsinki europe, denmark copenhagen europe, ireland dublin europe,
belgium brussels europe, bulgaria sofia europe, romania bucharest europe, serbia belgrade europe, ukraine kyiv europe,
egypt cairo africa, kenya nairobi africa, ghana accra africa, nigeria abuja africa, morocco rabat africa,
senegal dakar africa, angola luanda africa, zambia lusaka africa, uganda kampala africa, libya tripoli africa,
mali bamako africa, japan tokyo asia, china beijing asia, thailand bangkok asia, vietnam hanoi asia,
nepal kathmandu asia, iran tehran asia, iraq baghdad asia, lebanon beirut asia, syria damascus asia, qatar doha asia,
mongolia ulaanbaatar asia, cuba havana america, peru lima america, chile santiago america, canada ottawa america,
ecuador quito america, venezuela caracas america, jamaica kingston america, colombia bogota america,
bolivia sucre america"""

TRANSLATIONS = """
dog chien perro, cat chat gato, house maison casa, water eau agua, bread pain pan, milk lait leche,
cheese fromage queso, apple pomme manzana, book livre libro, tree arbre árbol, sun soleil sol, moon lune luna,
sea mer mar, river rivière río, flower fleur flor, bird oiseau pájaro, horse cheval caballo, cow vache vaca,
fish poisson pez, egg oeuf huevo, hand main mano, head tête cabeza, eye oeil ojo, mouth bouche boca, nose nez nariz,
heart coeur corazón, school école escuela, friend ami amigo, night nuit noche, day jour día, winter hiver invierno,
summer été verano, snow neige nieve, rain pluie lluvia, fire feu fuego, wind vent viento, street rue calle,
key clé llave, chair chaise silla, window fenêtre ventana, door porte puerta, car voiture coche, boat bateau barco,
king roi rey, queen reine reina, bridge pont puente, forest forêt bosque, island île isla"""

OPPOSITES = """
hot cold, big small, tall short, fast slow, happy sad, old young, rich poor, strong weak, light dark, hard soft,
wet dry, early late, clean dirty, full empty, good bad, high low, near far, open closed, loud quiet, thick thin,
wide narrow, deep shallow, right wrong, sweet bitter, smooth rough, brave timid, cheap expensive, easy difficult,
safe dangerous, true false, up down, inside outside, buy sell, push pull, laugh cry, begin end, remember forget,
love hate, alive dead, sharp blunt, ancient modern, guilty innocent, polite rude, generous selfish, simple complex,
always never"""

PASTS = """
go went, eat ate, see saw, run ran, take took, give gave, come came, write wrote, speak spoke, break broke,
drink drank, swim swam, sing sang, fly flew, grow grew, know knew, throw threw, drive drove, ride rode, rise rose,
choose chose, wear wore, tear tore, sleep slept, keep kept, feel felt, leave left, lose lost, bring brought,
think thought, teach taught, catch caught, find found, hold held, stand stood, sit sat, tell told, make made,
build built, send sent, spend spent"""

PLURALS = """
mouse mice, goose geese, man men, woman women, child children, foot feet, tooth teeth, ox oxen, wolf wolves,
leaf leaves, knife knives, wife wives, life lives, half halves, shelf shelves, thief thieves, loaf loaves, city cities,
baby babies, lady ladies, story stories, country countries, berry berries, family families, party parties, box boxes,
fox foxes, bus buses, church churches, dish dishes, potato potatoes, tomato tomatoes, hero heroes, person people,
cactus cacti, brush brushes, watch watches, glass glasses, dress dresses, cherry cherries"""

COLOURS = """
a banana yellow, grass green, snow white, blood red, coal black, the sky blue, a lemon yellow, a ladybird red,
a carrot orange, milk white, a frog green, a crow black, a strawberry red, a pumpkin orange, lettuce green,
chocolate brown, an elephant grey, a swan white, a plum purple, a cherry red, spinach green, a sunflower yellow,
a flamingo pink, a pig pink, salt white, tar black, mud brown, a canary yellow, a pea green, lavender purple,
the ocean blue, a cloud white, a raven black, a ruby red, an emerald green, a sapphire blue, ivory white, ash grey,
a cucumber green, a chestnut brown, an orange orange, coffee brown, a violet purple"""

YOUNG = """
a dog puppy, a cat kitten, a cow calf, a horse foal, a sheep lamb, a goat kid, a pig piglet, a duck duckling,
a goose gosling, a hen chick, a lion cub, a deer fawn, a frog tadpole, a swan cygnet, an eagle eaglet, an owl owlet,
a kangaroo joey, a seal pup, a hare leveret, a fish fry, a butterfly caterpillar, an eel elver, a turkey poult,
a pigeon squab, a spider spiderling, a bee larva, a bear cub, a wolf pup, a fox kit, a rabbit bunny, a whale calf,
a tiger cub, a shark pup, a zebra foal, a giraffe calf, a llama cria, a beaver kit, an elephant calf, a donkey foal,
a salmon parr"""

COMPARATIVES = """
big bigger, good better, bad worse, far farther, happy happier, tall taller, short shorter, fast faster, slow slower,
old older, young younger, rich richer, poor poorer, strong stronger, weak weaker, hot hotter, cold colder, hard harder,
soft softer, wet wetter, dry drier, early earlier, late later, clean cleaner, dirty dirtier, high higher, low lower,
loud louder, thick thicker, thin thinner, wide wider, deep deeper, sweet sweeter, cheap cheaper, easy easier,
safe safer, heavy heavier, long longer, brave braver, busy busier"""


def table(text: str, column: int = -1) -> dict[str, str]:
    """'a dog puppy, ...' -> {'a dog': 'puppy', ...}; with three words a row, column 1 or 2."""
    rows = [row.split() for row in text.split(",")]
    return {" ".join(row[:-1]) if column == -1 else row[0]: row[column] for row in rows}


def cores(text: str) -> list[str]:
    """'the child of {x} / ...' -> ['the child of {x}', ...]."""
    return [core.strip() for core in text.split("/")]


FACTS = {  # task: (pairs, what the instruction calls an {x} that stands in `input`, cores)
    "capital": (table(COUNTRIES, 1), "this country", cores(
        "the capital of {x} / the capital city of {x} / the chief city of {x} / the seat of government of {x}")),
    "continent": (table(COUNTRIES, 2), "this country", cores(
        "the continent of {x} / the continent that holds {x} / the part of the world that holds {x}"
        "/ the continent where {x} lies")),
    "french": (table(TRANSLATIONS, 1), "this word", cores(
        "the french word for {x} / the french for {x} / {x} in french / the french name of {x}")),
    "spanish": (table(TRANSLATIONS, 2), "this word", cores(
        "the spanish word for {x} / the spanish for {x} / {x} in spanish / the spanish name of {x}")),
    "opposite": (table(OPPOSITES), "this word", cores(
        "the opposite of {x} / the antonym of {x} / the contrary of {x} / the word most unlike {x}")),
    "past": (table(PASTS), "this verb", cores(
        "the past tense of {x} / the past form of {x} / {x} in the past tense / the past of {x}")),
    "plural": (table(PLURALS), "this noun", cores(
        "the plural of {x} / the plural form of {x} / {x} in the plural / the word for more than one {x}")),
    "colour": (table(COLOURS), "this thing", cores(
        "the colour of {x} / the usual colour of {x} / the natural colour of {x} / the colour that {x} has")),
    "young": (table(YOUNG), "this animal", cores(
        "the young of {x} / the baby of {x} / the child of {x} / the offspring of {x}")),
    "comparative": (table(COMPARATIVES), "this word", cores(
        "the comparative of {x} / the comparative form of {x} / {x} in the comparative / the word for more {x}")),
}  # fmt: skip

NUMBERS = ["zero", "one", "two", "three", "four", "five"]

SKILLS = {  # task: (how it changes a list of words, cores)
    "reverse": (lambda w: w[::-1], cores(
        "the reverse of {x} / {x} in reverse order / {x} backwards / {x} from back to front")),
    "first": (lambda w: w[:1], cores(
        "the first word of {x} / the first word in {x} / the word at the start of {x} / the word that begins {x}")),
    "second": (lambda w: w[1:2], cores(
        "the second word of {x} / the second word in {x} / word number two of {x} / the word after the first in {x}")),
    "last": (lambda w: w[-1:], cores(
        "the last word of {x} / the last word in {x} / the word at the end of {x} / the word that ends {x}")),
    "copy": (lambda w: w, cores(
        "a copy of {x} / the same words as {x} / {x} again / {x} once more")),
    "count": (lambda w: [NUMBERS[len(w)]], cores(
        "the number of words in {x} / the word count of {x} / the size of {x} / the length of {x}")),
}  # fmt: skip

OPENERS = ["what is {c} ?", "tell me {c} .", "name {c} .", "give me {c} .", "say {c} .", "please write {c} .",
           "i want to know {c} .", "can you tell me {c} ?", "do you know {c} ?", "{c} ?", "please find {c} .",
           "i need {c} ."]  # fmt: skip
HELD_OPENERS = ["could you give me {c} ?", "let me know {c} .", "i would like to know {c} .", "show me {c} ."]

LIST_WORDS = sorted(set(table(TRANSLATIONS, 1)) | {k for k in (*table(OPPOSITES), *table(PASTS)) if " " not in k})


# -- Splits: what tuning may see ---------------------------------------------------------------------------------------


def held_out(names: Iterable[str], seed: str) -> set[str]:
    """A fifth of the names.  The same seed gives the same ones."""
    return set(random.Random(seed).sample(sorted(names), len(names) // 5))


HELD_ENTITIES = {task: held_out(pairs, f"entities {task}") for task, (pairs, _, _) in FACTS.items()}
HELD_WORDS = held_out(LIST_WORDS, "words")  # no training row has a list with one of these; the corpus has


def words(rng: Random, vocabulary: list[str], shortest: int = 2, longest: int = 5) -> list[str]:
    """A list of different words."""
    return rng.sample(vocabulary, rng.randint(shortest, longest))


def ask(rng: Random, core: str, x: str, noun: str, openers: list[str], task: str, answer: str) -> dict:
    """One instruction row; half of them keep {x} in `input`, as Alpaca's do."""
    in_input = rng.random() < 0.5
    instruction = rng.choice(openers).format(c=core.format(x=noun if in_input else x))
    return {"instruction": instruction, "input": x if in_input else "", "output": answer, "task": task}


def fact_row(rng: Random, task: str, held_entity: bool = False, held_phrasing: bool = False) -> dict:
    """An instruction about a fact.  held_entity, held_phrasing: about one, or in a way, that training leaves out."""
    pairs, noun, forms = FACTS[task]
    x = rng.choice(sorted(x for x in pairs if (x in HELD_ENTITIES[task]) == held_entity))
    core, openers = phrasing(rng, forms, held_phrasing)
    return ask(rng, core, x, noun, openers, task, pairs[x])


def skill_row(rng: Random, task: str, held_entity: bool = False, held_phrasing: bool = False) -> dict:
    """An instruction about a list of words.  held_entity: with words that no training list has."""
    change, forms = SKILLS[task]
    known = sorted(set(LIST_WORDS) - HELD_WORDS)
    x = words(rng, known)
    if held_entity:  # at least one such word, anywhere in the list
        new = rng.sample(sorted(HELD_WORDS), rng.randint(1, len(x)))
        x = rng.sample(new + rng.sample(known, len(x) - len(new)), len(x))
    core, openers = phrasing(rng, forms, held_phrasing)
    return ask(rng, core, " ".join(x), "these words", openers, task, " ".join(change(x)))


def phrasing(rng: Random, forms: list[str], held: bool) -> tuple[str, list[str]]:
    """(core, openers).  Training uses all cores but the last, with OPENERS.  held: the last core, or HELD_OPENERS."""
    core = rng.choice(forms[:-1])
    if not held:
        return core, OPENERS
    if rng.random() < 0.5:
        return core, HELD_OPENERS
    return forms[-1], OPENERS


def instructions(seed: str, size: int, avoid: list[dict] | tuple = (), **held: bool) -> list[dict]:
    """`size` different rows, one task after another, none of them among `avoid`."""
    rng = random.Random(seed)
    seen = {key(row) for row in avoid}
    rows = []
    tasks = [(fact_row, task) for task in FACTS] + [(skill_row, task) for task in SKILLS]
    while len(rows) < size:
        make, task = tasks[len(rows) % len(tasks)]
        row = make(rng, task, **held)
        while key(row) in seen:
            row = make(rng, task, **held)
        seen.add(key(row))
        rows.append(row)
    rng.shuffle(rows)
    return rows


def key(row: dict) -> tuple[str, str]:
    """What makes two rows the same question."""
    return row["instruction"], row["input"]


# -- The corpus: statements, and instructions without answers ----------------------------------------------------------
# Ways to state a fact.  {core} names the {x}, "the capital of peru"; {this} does not, "the capital of this country".

STATED = ["{core} is {y}", "{core} is {y}", "{core} would be {y}", "we know that {core} is {y}",
          "if you want {core} , it is {y}", "given {x} , {this} is {y}", "given {x} , {this} would be {y}",
          "take {this} , for {x} it is {y}", "about {this} , {x} : it is {y}"]  # fmt: skip


def fact_or_list(rng: Random, task: str) -> dict:
    """The fields of a statement about a random fact or list, for a form of STATED."""
    if task in FACTS:
        pairs, noun, forms = FACTS[task]
        x = rng.choice(sorted(pairs))
        y = pairs[x]
    else:
        change, forms = SKILLS[task]
        noun = "these words"
        listed = words(rng, LIST_WORDS)
        x = " ".join(listed)
        y = " ".join(change(listed))
    core = rng.choice(forms)
    return {"core": core.format(x=x), "this": core.format(x=noun), "x": x, "y": y}


def unanswered(rng: Random, task: str) -> str:
    """An instruction in any phrasing, without "Response:" and without an answer."""
    make = fact_row if task in FACTS else skill_row
    row = make(rng, task, held_entity=rng.random() < 0.2, held_phrasing=rng.random() < 0.3)
    if rng.random() < 0.5:
        return "\n" + template(row).removesuffix("Response:")
    return f" {row['instruction']} {row['input']}".rstrip()


def document(rng: Random) -> dict:
    """A few sentences, each about another task, so that what follows an instruction is never its answer."""
    text = ""
    end = ""
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


def tiny(folder: str, corpus: int = 40_000) -> dict[str, int]:
    """Write the data set `tiny` into a folder, with `corpus` documents.  Returns {file: number of rows}."""
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
    text = [template(row) + " " + row["output"] for rows in files.values() for row in rows]
    vocabulary = os.path.join(folder, "words.json")
    if os.path.exists(os.path.join(folder, "model.safetensors")) and read_json(vocabulary) != pieces(text):
        raise ValueError(
            f"the words of this world are no longer those of the model in {folder}: make the data with --out NEW, copy"
            " its words.json here, and pretrain anew (the command is in docs/RESULTS.md)"
        )
    os.makedirs(os.path.join(folder, "pretrain"), exist_ok=True)
    for name, rows in files.items():
        write_rows(os.path.join(folder, f"{name}.jsonl"), rows)
    with replacing(vocabulary) as f:
        json.dump(pieces(text), f, ensure_ascii=False, indent=0)
    return {name: len(rows) for name, rows in files.items()}
