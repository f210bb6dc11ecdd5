"""Make a data set that train.py reads: a folder of .jsonl files with rows of instruction, input and output.

    python -m data.prepare tiny                                 # this project's own small world: data/world.py
    python -m data.prepare alpaca                               # from its public home; or e2e, gsm8k, boolq, sst2, p3
    python -m data.prepare alpaca --file alpaca_data.json       # from a file that you have
    python -m data.prepare my.csv --map instruction=question,output=answer
    python -m data.prepare my.tsv --map "instruction=Is this good or bad ?" input={title}:{text} output=stars \\
        --labels 0=bad,1=good
    python -m data.prepare my_folder --map instruction=text output=label   # train.csv, dev.csv, ...: its own splits
    python -m data.prepare chats.jsonl --init gpt2 --show 3     # GPT-2's tokens; three rows, as the model reads them

A .jsonl, .ndjson, .json, .csv or .tsv file, or a folder of them, may have Alpaca's columns, those of other well-known
sets, or chats; --map names the columns of any other, or makes a text of {columns}.  What is missing of train, val and
test is split off, a tenth each, so that no instruction stands on both sides.  docs/DATA.md has more.
"""

import functools
import http.client
import os
import re
import shlex
import statistics
import sys
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from data import TINY, Tokenizer, encode, encode_each, label_words, load_splits, p3, world
from data.files import column_names, fill_missing_splits, from_known_format, read_rows, split_name, to_text, write_rows
from data.template import PLAIN, TEMPLATES, Template, make_template, question, template
from plumbing import hub
from plumbing.cli import Parser, UsageError, at_least, run
from plumbing.files import naming, read_json, replacing, write_json
from plumbing.pretrained import read_config

KEYS = ("instruction", "input", "output", "system", "task")

# -- Where the public ones are -----------------------------------------------------------------------------------------


@dataclass
class Source:
    """A public data set: where its files are, and how their rows become ours."""

    about: str
    home: str
    files: dict  # part: (file, sha256 or its first digits), or (archive, sha256, file in it)
    map: dict = field(default_factory=dict)
    labels: dict = field(default_factory=dict)
    choose: Callable | None = None  # {part: rows} -> {split: rows}; without it, the parts are the splits


SOURCES = read_json(os.path.join(os.path.dirname(__file__), "sources.json"))
SOURCES = {name: Source(**entry) for name, entry in SOURCES.items()}
SOURCES["p3"].files = {name: (f"{name}.jsonl", sha256) for name, sha256 in p3.HASHES.items()}
SOURCES["p3"].choose = p3.choose


def locate_files(source: Source, files: list[str], folder: str) -> dict[str, str]:
    """{part: path} of a source's files: those of --file (files, or the folder that holds them), else downloaded."""
    paths = {os.path.basename(path): path for path in files}
    if len(files) == 1 and os.path.isdir(files[0]):
        paths = {name: os.path.join(files[0], name) for name in os.listdir(files[0])}
    elif len(files) == len(source.files) == 1:  # whatever its name
        paths = {next(iter(source.files.values()))[0]: files[0]}
    parts = {}
    for part, (name, sha256, *member) in source.files.items():
        path = paths.get(name) or os.path.join(folder, name)
        if files and name not in paths:
            names = sorted({file for file, *_ in source.files.values()})
            takes = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise FileNotFoundError(f"--file {' '.join(files)}: no {name} there. It takes {takes}, or their folder")
        url = f"{source.home}/{name}"
        try:
            if not files:
                hub.download_file(url, path, sha256=sha256)
        except (OSError, ValueError, http.client.HTTPException) as e:
            advice = "try again, or download it in another way and name it with --file"
            raise OSError(f"no {url} ({type(e).__name__}: {e}): {advice}") from e
        parts[part] = extract(path, *member, folder) if member else path
    return parts


def extract(archive: str, member: str, folder: str) -> str:
    """Unpack one file of a zip archive into a folder.  Returns its path."""
    path = os.path.join(folder, os.path.basename(member))
    os.makedirs(folder, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as z, replacing(path, "wb") as f:
            f.write(z.read(member))
    except (zipfile.BadZipFile, zlib.error, KeyError, RuntimeError) as e:  # RuntimeError: it has a password
        raise ValueError(f"{archive} has no {member} ({e})") from None
    return path


# -- Rows of any columns -----------------------------------------------------------------------------------------------


def map_columns(record: dict, ignored: set[str] | None, mapping: dict[str, str], labels: dict[str, str]) -> dict:
    """A row made of any columns.

    mapping    {a key of ours: the name of a column, or a text with {columns}}
    labels     {value of the output: the word that takes its place}
    """
    row = {"input": ""}
    record = {name: None if value != value else value for name, value in record.items()}  # NaN: missing, as in pandas
    unused = set(record)
    for key, text in mapping.items():
        if text in record:
            row[key] = record[text]
            if record[text] is None and key in ("instruction", "output"):
                raise ValueError(f"its {text} is empty")
            unused.discard(text)
            continue
        names = re.findall(r"\{([^{}]*)\}", re.sub(r"\{\{|\}\}", "", text))
        folded = {str(column).casefold().strip() for column in record}
        if not names and (key == "output" or " " not in text or text.casefold().strip() in folded):
            names = [text]  # no column is part of it: a slip, unless it is a sentence that all rows share
        for name in names:
            if name not in record:
                raise ValueError(f"there is no column {name!r} for {key}. It has: {column_names(record)}")
        row[key] = re.sub(
            r"\{\{|\}\}|\{([^{}]*)\}", lambda m: to_text(record[m[1]]) if m[1] is not None else m[0][0], text
        )
        unused.difference_update(names)
    row = from_known_format(row, ignored)
    if labels:
        if row["output"] not in labels:
            raise ValueError(f"its output is {row['output']!r}, and --labels has {', '.join(labels)}")
        row["output"] = labels[row["output"]]
    if ignored is not None:
        ignored.update(unused)
    return row


def parse_pairs(texts: list[str], option: str, keys: tuple = ()) -> dict[str, str]:
    """["a=b,c=d", ...] -> {"a": "b", "c": "d"}.  A comma that none of the keys follows is part of a value."""
    pairs = {}
    for text in texts:
        for pair in re.split(rf",(?=(?:{'|'.join(keys) or '[^,=]+'})=)", text):
            key, equals, value = pair.partition("=")
            if not equals or not value or keys and key not in keys:
                form = f"{' or '.join(keys)}=COLUMN" if keys else "VALUE=WORD"
                raise UsageError(f"{option} takes {form}, got {pair!r}")
            pairs[key] = value
    return pairs


# -- What a data set is like -------------------------------------------------------------------------------------------


def describe(
    splits: dict, tokenizer: Tokenizer, room: int, model: str, layout: Template = PLAIN, skip_bad: bool = False
) -> Iterator[str]:
    """Statistics of splits as lines of text, with lengths in tokens of a model, which takes `room` of them.

    skip_bad takes the rows that the layout refuses out of the splits.
    """
    yield f"{'':12} {'rows':>8} {'prompt':>14} {'response':>14} {'too long':>10}"
    total, repeats = 0, {}
    for split, rows in splits.items():
        examples = encode_each(rows, tokenizer, sys.maxsize, template=layout, skip_bad=skip_bad, name=split)
        lengths = [(len(e.prompt), len(e.response)) for e in examples]
        too_long = sum(sum(pair) > room for pair in lengths)
        total += too_long
        cells = [f"{statistics.median_low(column):,} (to {max(column):,})" for column in zip(*lengths)]
        yield f"{split:12} {len(rows):8,} {cells[0]:>14} {cells[1]:>14} {too_long:10,}"
        repeats[split] = len(rows) - len({hash((question(row), row["output"])) for row in rows})
    yield f"Median and longest, in tokens of {model}, which takes {room:,}."
    if total:
        yield f"train.py refuses rows that are too long ({total:,}): --truncate cuts them, --skip-bad leaves them out."
    if any(repeats.values()):
        yield f"Exact repeats of earlier rows: {', '.join(f'{n:,} in {split}' for split, n in repeats.items() if n)}."
    if labels := label_words(splits["train"]):
        yield f"Label words: {', '.join(labels)}. It is scored by accuracy."


def show(row: dict, tokenizer: Tokenizer, layout: Template = PLAIN) -> str:
    """A row as a model reads it, with the tokens that are learned in brackets."""
    ((prompt, response, _),) = encode([row], tokenizer, sys.maxsize, template=layout)
    text = template(row) if layout is PLAIN else tokenizer.decode(prompt)
    return text + "".join(f"[{tokenizer.decode([i])}]" for i in response)


# -- The command -------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("dataset", help=f"tiny, {', '.join(SOURCES)}, a .jsonl, .ndjson, .json, .csv or .tsv file, or a folder of such")
    add("--out", help="folder to write to (default: data/NAME)")
    add("--file", nargs="+", default=[], help="the files of a public data set, or their folder, instead of a download")
    add("--map", nargs="+", default=[], metavar="KEY=COLUMN", help=f"the columns that make {', '.join(KEYS)}")
    add("--labels", nargs="+", default=[], metavar="VALUE=WORD", help="words for the values of output")
    add("--skip-bad", action="store_true", help="leave out rows that cannot be used, and count them")
    add("--init", default="tiny", help="the model whose tokens to count: tiny, a folder, or a name on the hub")
    add("--template", default="plain", choices=TEMPLATES, help="layout in which to count and show them")
    add("--show", type=at_least(0), default=0, metavar="N", help="print N rows")
    args = parser.parse_args(argv)
    args.map = parse_pairs(args.map, "--map", KEYS)
    args.labels = parse_pairs(args.labels, "--labels")
    public = args.dataset in SOURCES
    if not public and args.dataset != "tiny" and not os.path.exists(args.dataset):
        parser.error(f"no data set {args.dataset!r} and no such file or folder. There are: tiny, {', '.join(SOURCES)}")
    if args.file and not public or (args.map or args.labels) and (public or args.dataset == "tiny"):
        parser.error("--file is for a public data set, --map and --labels for a file or folder of your own")
    if args.labels and "output" not in args.map or args.map and not {"instruction", "output"} <= set(args.map):
        parser.error("--map needs at least instruction=... and output=..., and --labels needs --map")
    args.origin = {"from": args.dataset if args.dataset in ("tiny", *SOURCES) else os.path.abspath(args.dataset)}
    name = os.path.basename(os.path.abspath(args.dataset))
    name = name if os.path.isdir(args.dataset) else os.path.splitext(name)[0]
    if not args.out and name in ("tiny", *SOURCES) and args.dataset != name:
        parser.error(f"data/{name} is for the data set of that name: name another folder with --out")
    args.out = args.out or os.path.join(os.path.dirname(TINY), name)
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        parser.error(f"--out {args.out} is a file, and not a folder")
    return args


def main(argv: list[str] | None = None):
    args = parse(argv)
    folder = hub.find_model(args.init)
    tokenizer = Tokenizer.load(folder)
    config = read_config(os.path.join(folder, "config.json"))
    layout = make_template(args.template, tokenizer)
    refuse_other_data(args)
    if args.dataset == "tiny":
        world.tiny(args.out)
    splits = load_splits(args.out) if args.dataset == "tiny" else make_splits(args)
    about = list(describe(splits, tokenizer, config.block_size, args.init, layout, args.skip_bad))
    if args.out != TINY:
        with naming(args.out):
            os.makedirs(args.out, exist_ok=True)
        write_json(os.path.join(args.out, "prepared.json"), args.origin)
    if args.dataset != "tiny":
        for split in reversed(splits):  # train last: if it is there, the others are, too
            write_rows(os.path.join(args.out, f"{split}.jsonl"), splits[split])
        for name in os.listdir(args.out):  # what the same data had when they were prepared before
            if split_name(name) and split_name(name) not in splits:
                os.remove(os.path.join(args.out, name))
    print(*about, sep="\n")
    for row in splits["train"][: args.show]:
        print(f"\n{show(row, tokenizer, layout)}")
    options = "" if args.init == "tiny" else f" --init {shlex.quote(args.init)}"
    options += "" if args.out == TINY else f" --data {shlex.quote(os.path.relpath(args.out))}"
    options += "" if args.template == "plain" else f" --template {args.template}"
    print(f"\nsaved {os.path.relpath(args.out)}. Train on it: python train.py{options}")


def make_splits(args: Namespace) -> dict[str, list[dict]]:
    """The splits of files of any columns, or of a public data set, which is downloaded or in --file."""
    source = SOURCES.get(args.dataset)
    own = source or args  # both have a map and labels
    reshape = functools.partial(map_columns, mapping=own.map, labels=own.labels) if own.map else from_known_format
    if not source:
        return load_splits(args.dataset, args.skip_bad, reshape)
    files = locate_files(source, args.file, os.path.join(args.out, "raw"))
    # skip_bad: some of Alpaca's outputs are empty.  ignored: what we do not use of these, we know
    splits = {part: read_rows(path, skip_bad=True, reshape=reshape, ignored=set()) for part, path in files.items()}
    return fill_missing_splits(source.choose(splits) if source.choose else splits, args.dataset)


def refuse_other_data(args: Namespace):
    """Raise ValueError if --out holds a data set of another origin: it would be lost, or mixed with this one."""
    marker = os.path.join(args.out, "prepared.json")
    is_ours = args.out == TINY or os.path.exists(marker) and read_json(marker) == args.origin
    names = [name for name in os.listdir(args.out) if split_name(name)] if os.path.isdir(args.out) else []
    if names and not is_ours:
        raise ValueError(f"{os.path.join(args.out, names[0])} is of another data set: name another folder with --out")


if __name__ == "__main__":
    run(main)
