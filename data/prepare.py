"""Make a data set that train.py reads: a folder of .jsonl files with rows of instruction, input and output.

    python data/prepare.py tiny                                 # this project's own small world: data/world.py
    python data/prepare.py alpaca                               # from its public home; or e2e, gsm8k, boolq, sst2
    python data/prepare.py alpaca --file alpaca_data.json       # from a file you have
    python data/prepare.py my.csv --map instruction=question,output=answer
    python data/prepare.py my.tsv --map "instruction=Is this good or bad ?" input={title}:{text} output=stars \\
        --labels 0=bad,1=good
    python data/prepare.py chats.jsonl --init gpt2 --show 3     # tokens as GPT-2's; three rows, as the model reads them

A .json, .jsonl, .csv or .tsv file may have Alpaca's keys, those of a few other well-known sets, or chats of messages;
--map names the columns of any other, or makes a text of {them}.  What is missing of train, val and test is split off, a
tenth each, so that no instruction stands on both sides.
"""

import functools
import json
import os
import re
import statistics
import sys
import urllib.request
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field

HERE = os.path.dirname(os.path.abspath(__file__))
# Run as a script, this file's own folder is on the path, and not the project's.
sys.path.insert(0, os.path.dirname(HERE))

from tqdm import tqdm  # noqa: E402

import hub  # noqa: E402
from cli import Parser, UsageError, run  # noqa: E402
from data import (  # noqa: E402
    Tokenizer,
    columns,
    complete,
    encode,
    is_split,
    label_words,
    load,
    read_json,
    read_rows,
    replacing,
    template,
    world,
    write_rows,
)  # fmt: skip
from weights import read_config  # noqa: E402

TINY = os.path.join(HERE, "tiny")
KEYS = ("instruction", "input", "output", "task")


# -- Where the public ones are -----------------------------------------------------------------------------------------


@dataclass
class Source:
    """A public data set: where its files are, their sha256, and how a row of them becomes one of ours."""

    home: str
    files: dict  # split: (file, sha256), or (archive, sha256, file in it)
    map: dict = field(default_factory=dict)
    labels: dict = field(default_factory=dict)


GITHUB = "https://raw.githubusercontent.com"
SST2 = "SST-2.zip", "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"
SOURCES = {
    "alpaca": Source(  # 52,002 rows, CC BY-NC 4.0
        f"{GITHUB}/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a",
        {"train": ("alpaca_data.json", "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419")},
    ),
    "e2e": Source(  # restaurants in words, arXiv 1706.09254, CC BY-SA 4.0
        f"{GITHUB}/tuetschek/e2e-dataset/master",
        {
            "train": ("trainset.csv", "f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6"),
            "val": ("devset.csv", "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9"),
            "test": ("testset_w_refs.csv", "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd"),
        },
    ),
    "gsm8k": Source(  # school arithmetic, arXiv 2110.14168, MIT
        f"{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data",
        {
            "train": ("train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
            "test": ("test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
        },
        {"instruction": "question", "output": "answer"},
    ),
    "boolq": Source(  # yes or no, by a passage, arXiv 1905.10044, CC BY-SA 3.0; the labels of its own test are secret
        "https://storage.googleapis.com/boolq",
        {
            "train": ("train.jsonl", "cc7a79d44479867e8323a7b0c5c1d82edf516ca34912201f9384c3a3d098d8db"),
            "test": ("dev.jsonl", "ebc29ea3808c5c611672384b3de56e83349fe38fc1fe876fd29b674d81d0a80a"),
        },
        {"instruction": "{question}?", "input": "passage", "output": "answer"},
        {"true": "yes", "false": "no"},
    ),
    "sst2": Source(  # films, as GLUE has them, arXiv 1804.07461; the labels of its own test are secret
        "https://dl.fbaipublicfiles.com/glue/data",
        {"train": (*SST2, "SST-2/train.tsv"), "test": (*SST2, "SST-2/dev.tsv")},
        {"instruction": "Is this review positive or negative?", "input": "sentence", "output": "label"},
        {"0": "negative", "1": "positive"},
    ),
}


def obtain(source: Source, given: list[str], folder: str) -> dict:
    """{split: path} of a source's files: those given (files, or the folder that holds them), else downloaded."""
    have = {os.path.basename(path): path for path in given}
    if len(given) == 1 and os.path.isdir(given[0]):
        have = {name: os.path.join(given[0], name) for name in os.listdir(given[0])}
    elif len(given) == len(source.files) == 1:  # whatever its name
        have = {next(iter(source.files.values()))[0]: given[0]}
    found = {}
    for split, (name, sha256, *member) in source.files.items():
        path = have.get(name) or os.path.join(folder, name)
        if given and name not in have:
            wanted = ", ".join(sorted({file for file, *_ in source.files.values()}))
            raise FileNotFoundError(f"--file {' '.join(given)}: no {name} there. It takes {wanted}, or their folder")
        if not given:
            download(f"{source.home}/{name}", sha256, path)
        found[split] = extract(path, *member, folder) if member else path
    return found


def download(url: str, sha256: str, path: str):
    """A file by its address, unless it is there: resumed after a break, and checked."""

    def ask(start):
        ranges = {"Range": f"bytes={start}-"} if start else {}
        return urllib.request.urlopen(urllib.request.Request(url, headers=ranges), timeout=hub.TIMEOUT)

    try:
        hub.bring(path, ask, lambda part: hub.digest(part) == sha256, f"{os.path.basename(path)} from {url}")
    except (OSError, ValueError) as e:
        raise type(e)(f"{e}. Or get it otherwise, and name it with --file") from None


def extract(archive: str, member: str, folder: str) -> str:
    """The path of an archive's file, unpacked into a folder."""
    path = os.path.join(folder, os.path.basename(member))
    os.makedirs(folder, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as z, replacing(path, "wb") as f:
            f.write(z.read(member))
    except (zipfile.BadZipFile, zlib.error, KeyError, RuntimeError) as e:  # RuntimeError: it wants a password
        raise ValueError(f"{archive} has no {member} ({e})") from None
    return path


# -- Rows of any shape -------------------------------------------------------------------------------------------------

# What others call instruction, input and output.
NAMES = (
    ("instruction", "input", "response"),
    ("instruction", "context", "response"),
    ("question", "context", "answer"),
    ("prompt", "input", "completion"),
    ("prompt", "input", "response"),
    ("prompt", "input", "output"),
)
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def recognise(row: dict) -> dict:
    """A row of a well-known shape -> one of ours.  Raises ValueError for any other."""
    chat = row.get("messages") or row.get("conversations")
    if isinstance(chat, list):
        return from_chat(chat)
    if {"instruction", "output"} <= set(row) or "mr" in row:  # Alpaca's and E2E's, which train.py reads itself
        return row
    for instruction, given, output in NAMES:
        if instruction in row and output in row:
            return {"instruction": row[instruction], "input": text(row.get(given)), "output": text(row[output])}
    raise ValueError(f"it has {columns(row)[:80]}: say what is what, --map instruction=COLUMN output=COLUMN")


def from_chat(chat: list) -> dict:
    """A list of {role, content} -> a row: the last answer is what is learned, all before it the instruction."""
    try:
        turns = [(m["role"], m["content"]) if "role" in m else (m["from"], m["value"]) for m in chat]
        if not all(isinstance(part, str) for turn in turns for part in turn):
            raise TypeError
    except (KeyError, TypeError):
        raise ValueError("its messages have no role and content, both text") from None
    turns = [(ROLES.get(role, role), said) for role, said in turns if said]
    last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=0)
    if last == 0:
        raise ValueError("its messages have no answer of an assistant to anything")
    before = turns[:last]
    if sum(role != "system" for role, _ in before) == 1:  # one question: nobody need be named
        instruction = "\n".join(said for _, said in before)
    else:
        instruction = "\n".join(f"{role.capitalize()}: {said}" for role, said in before)
    return {"instruction": instruction, "input": "", "output": turns[last][1]}


def mapped(row: dict, how: dict, labels: dict) -> dict:
    """A row made of another's columns: of each of our keys a column's name, or a text with {columns}."""
    out = {"input": ""}
    for key, made in how.items():
        if made in row:
            if row[made] is None and key != "input":
                raise ValueError(f"its {made} is empty")
            out[key] = text(row[made])
            continue
        names = re.findall(r"\{([^{}]*)\}", made)
        folded = {str(column).casefold().strip() for column in row}
        if not names and (key == "output" or " " not in made or made.casefold().strip() in folded):
            names = [made]  # a text that no column is part of: a slip, unless it is a sentence that all rows share
        for name in names:
            if name not in row:
                raise ValueError(f"there is no column {name!r} for {key}. It has: {columns(row)}")
        out[key] = re.sub(r"\{([^{}]*)\}", lambda m: text(row[m[1]]), made)
    if labels:
        if out.get("output") not in labels:
            raise ValueError(f"its output is {out.get('output')!r}, and --labels has {', '.join(labels)}")
        out["output"] = labels[out["output"]]
    return out


def text(value: object) -> str:
    """A column's value as text: JSON's true, 3 and null become "true", "3" and ""."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def pairs(texts: list[str], option: str, known: tuple = ()) -> dict:
    """["a=b,c=d", ...] -> {"a": "b", "c": "d"}; a comma that no known key follows is part of a value."""
    out = {}
    for part in texts:
        for pair in re.split(rf",(?=(?:{'|'.join(known) or '[^,=]+'})=)", part):
            key, equals, value = pair.partition("=")
            if not equals or not value or known and key not in known:
                wanted = f"{' or '.join(known)}=COLUMN" if known else "VALUE=WORD"
                raise UsageError(f"{option} takes {wanted}, got {pair!r}")
            out[key] = value
    return out


# -- What it is like ---------------------------------------------------------------------------------------------------


def describe(rows: dict, tokenizer: Tokenizer, block_size: int, name: str) -> Iterator[str]:
    """Statistics of splits, as lines of text."""
    yield f"{'':12} {'rows':>8} {'prompt':>14} {'response':>14} {'too long':>10}"
    long = 0
    for split, some in rows.items():
        sizes = [tuple(map(len, encode([row], tokenizer, sys.maxsize)[0])) for row in tqdm(some, split, leave=False)]
        prompts, responses = zip(*sizes)
        cut = sum(p + r > block_size for p, r in sizes)
        long += cut
        cells = [f"{statistics.median_low(x):,} (to {max(x):,})" for x in (prompts, responses)]
        yield f"{split:12} {len(some):8,} {cells[0]:>14} {cells[1]:>14} {cut:10,}"
    yield f"Median and longest, in tokens of {name}, which takes {block_size:,}."
    if long:
        yield f"train.py refuses rows that are too long, or cuts them with --truncate: {long:,} of these."
    if labels := label_words(rows["train"]):
        yield f"Label words: {', '.join(labels)}. It is scored by accuracy."


def show(row: dict, tokenizer: Tokenizer) -> str:
    """A row as a model reads it, what is trained in brackets, token by token."""
    ((_, response),) = encode([row], tokenizer, sys.maxsize)
    return template(row) + "".join(f"[{tokenizer.decode([i])}]" for i in response)


def parse(argv: list[str] | None = None) -> Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("dataset", help=f"tiny, {', '.join(SOURCES)}, or a .json, .jsonl, .csv or .tsv file")
    add("--out", help="folder to write to (default: data/NAME)")
    add("--file", nargs="+", default=[], help="the files of a public data set, or their folder: no download")
    add("--map", nargs="+", default=[], metavar="KEY=COLUMN", help="what makes instruction, input and output")
    add("--labels", nargs="+", default=[], metavar="VALUE=WORD", help="words for the values of output")
    add("--skip-bad", action="store_true", help="leave out rows that cannot be used, and count them")
    add(
        "--init",
        default="tiny",
        help="whose tokens to count: tiny, a folder, or a name of the hub (default: %(default)s)",
    )
    add("--show", type=int, default=0, metavar="N", help="print N rows")
    args = parser.parse_args(argv)
    args.map, args.labels = pairs(args.map, "--map", KEYS), pairs(args.labels, "--labels")
    public = args.dataset in SOURCES
    if not public and args.dataset != "tiny" and not os.path.isfile(args.dataset):
        parser.error(f"no data set {args.dataset!r} and no such file. There are: tiny, {', '.join(SOURCES)}")
    if args.file and not public or (args.map or args.labels) and (public or args.dataset == "tiny"):
        parser.error("--file is for a public data set, --map and --labels for a file of your own")
    if args.labels and "output" not in args.map or args.map and not {"instruction", "output"} <= set(args.map):
        parser.error("--map wants at least instruction=... and output=..., and --labels wants --map")
    if args.show < 0:
        parser.error(f"--show must be at least 0, got {args.show}")
    name = os.path.splitext(os.path.basename(args.dataset))[0]
    if not args.out and name in ("tiny", *SOURCES) and args.dataset != name:
        parser.error(f"data/{name} is for the data set of that name: give this one's folder with --out")
    args.out = args.out or os.path.join(HERE, name)
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        parser.error(f"--out {args.out} is a file, and not a folder")
    return args


def main(argv: list[str] | None = None):
    """The command."""
    args = parse(argv)
    folder = TINY if args.init == "tiny" else hub.find(args.init)
    tokenizer, config = Tokenizer.load(folder), read_config(os.path.join(folder, "config.json"))
    vacant(args)
    if args.dataset == "tiny":
        world.tiny(args.out)
    else:
        source = SOURCES.get(args.dataset) or Source("", {}, args.map, args.labels)
        files = obtain(source, args.file, os.path.join(args.out, "raw")) if source.files else {"train": args.dataset}
        reshape = functools.partial(mapped, how=source.map, labels=source.labels) if source.map else recognise
        skip = args.skip_bad or args.dataset in SOURCES  # some of Alpaca's outputs are empty
        rows = complete({split: read_rows(path, skip, reshape) for split, path in files.items()}, args.dataset)
        os.makedirs(args.out, exist_ok=True)
        for split in reversed(rows):  # train last: where it is, the others are
            write_rows(os.path.join(args.out, f"{split}.jsonl"), rows[split])
    if args.out != TINY:
        with replacing(os.path.join(args.out, "prepared.json")) as f:
            json.dump({"from": origin(args)}, f)
    rows = load(args.out)
    print(*describe(rows, tokenizer, config.block_size, args.init), sep="\n")
    for row in rows["train"][: args.show]:
        print(f"\n{show(row, tokenizer)}")
    init = "" if args.init == "tiny" else f" --init {args.init}"
    where = "" if args.out == TINY else f" --data {os.path.relpath(args.out)}"
    print(f"\nsaved {os.path.relpath(args.out)}. Train on it: python train.py{init}{where}")


def origin(args: Namespace) -> str:
    """What a folder's data set was made from."""
    return args.dataset if args.dataset in ("tiny", *SOURCES) else os.path.abspath(args.dataset)


def vacant(args: Namespace):
    """Raise ValueError if --out holds a data set of another origin: it would be lost, or mixed with this one."""
    marker = os.path.join(args.out, "prepared.json")
    ours = args.out == TINY or os.path.exists(marker) and read_json(marker) == {"from": origin(args)}
    there = [name for name in os.listdir(args.out) if is_split(name)] if os.path.isdir(args.out) else []
    if there and not ours:
        raise ValueError(f"{os.path.join(args.out, there[0])} is of another data set: --out names another folder")


if __name__ == "__main__":
    run(main)
