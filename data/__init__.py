"""From rows of text to batches of tokens.

    open_data("tiny")     {"train": rows, "val": rows, "test": rows, ...}
    encode(rows, ...)     a list of Example: the ids of the prompt, and those of the response
    Batches(...)          batch(i) is a pure function of seed and i, so that a run can be resumed exactly

A row is a dict with the keys of Alpaca: `instruction`, `input` (may be missing or empty) and `output`.  files.py lists
the other keys.
"""

import hashlib
import json
import os
import random
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data.engines import digest
from data.files import Bad, label_words, load_splits, warn
from data.template import PLAIN, ChatTemplate, Template, make_template, template
from data.tokenizer import Tokenizer
from plumbing import distributed
from plumbing.files import CannotWrite
from plumbing.hub import TINY

__all__ = ["Tokenizer", "label_words", "load_splits", "make_template", "template"]  # for train.py and sample.py


class Example(NamedTuple):
    """A row as token ids.  The response includes the token that ends it."""

    prompt: list[int]
    response: list[int]
    hidden: int = 0  # tokens of the prompt, its instruction, that only generators see; 0: all of it is visible


class Batch(NamedTuple):
    """What a training step reads: three tensors (B, T).

    targets[b, t] is the token after idx[b, t] if it belongs to the response, else -1.  instr is True on what generators
    read: the prompt, or of a row with a hidden instruction that one alone.
    """

    idx: Tensor
    targets: Tensor
    instr: Tensor

    def used(self) -> int:
        """How many tokens of a row there are, at most, from the last that generators read to the last with a target."""
        places = torch.arange(self.idx.shape[1], device=self.idx.device)
        last = torch.where(self.targets >= 0, places, 0).amax(1)
        return max(1, int((last - self.instr.sum(1)).max()) + 2)


# -- Rows --------------------------------------------------------------------------------------------------------------


def open_data(data: str, skip_bad: bool = False) -> dict[str, list[dict]]:
    """The splits of --data.  "tiny" is made first, by one process, if it has not been made yet."""
    if data != "tiny":
        return load_splits(data, skip_bad)
    if not os.path.exists(os.path.join(TINY, "train.jsonl")):
        print("making the data set tiny, once (python -m data.prepare tiny)")
        if distributed.RANK == 0:
            from data import world  # only here: it is long, and needed once

            try:
                world.tiny(TINY)
            except OSError as e:
                advice = "make it elsewhere: python -m data.prepare tiny --out FOLDER, then train.py --data FOLDER"
                raise CannotWrite(TINY, e, advice) from None
        distributed.barrier()
    return load_splits(TINY)


def open_rows(args: Namespace) -> tuple[dict[str, list[dict]], list[str]]:
    """The rows that the options of train.py ask for, by split, and the label words, if the outputs are classes."""
    rows, limits = open_data(args.data, args.skip_bad), {"train": 0, "val": args.val_rows}
    if args.act == "hidden" and args.skip_bad:
        rows = {name: with_input(split, name) for name, split in rows.items()}
    labels, chosen = label_words(rows["train"]), {}
    for name, split in rows.items():
        chosen[name] = evenly_spaced(split, limits.get(name, args.test_rows))
        if len(chosen[name]) < len(split) and name != "val":
            print(f"{name}: {len(chosen[name]):,} of {len(split):,} rows, evenly spaced (--test-rows 0: all)")
    if 0 < args.train_rows < len(rows["train"]):
        chosen["train"] = random.Random(args.seed).sample(rows["train"], args.train_rows)
    return chosen, labels


def rows_fingerprint(rows: dict[str, list[dict]]) -> str:
    """A hash of all splits.  A run stores it, so that it is never resumed with other rows."""
    whole, to_json = hashlib.sha256(), json.JSONEncoder(sort_keys=True).encode
    for i, name in enumerate(sorted(rows)):  # the JSON of all, piece by piece, because it would take much memory
        whole.update(f"{', ' if i else '{'}{to_json(name)}: [".encode())
        for j, row in enumerate(rows[name]):
            whole.update(f"{', ' if j else ''}{to_json(row)}".encode())
        whole.update(b"]")
    whole.update(b"}")
    return whole.hexdigest()[:16]


def text_fingerprint(tokenizer: Tokenizer, template: Template) -> str:
    """A hash of all that makes tokens of a text, but for the date that a chat template may write."""
    parts = [tokenizer.engine.digest, tokenizer.special, [*tokenizer.prefix], template.end_id(tokenizer)]
    if isinstance(template, ChatTemplate):
        source = tokenizer.chat_template
        parts += [source, {role: name for role, name in template.names.items() if role in source}]
    return digest(parts)


def with_input(rows: list[dict], name: str) -> list[dict]:
    """The rows of a split that have an input, as a hidden instruction needs one.  The others are counted."""
    kept = [row for row in rows if row.get("input", "").strip()]
    if len(kept) < len(rows):
        warn(f"{name}: left out {len(rows) - len(kept)} of {len(rows)} rows, which have no input")
    if not kept:
        raise ValueError(f"no row of {name} has an input: there is nothing to ask behind a hidden instruction")
    return kept


def evenly_spaced(rows: list, n: int) -> list:
    """At most n of the rows, evenly spaced, because neighbours are often alike.  All rows if n is 0."""
    return rows if not n or n >= len(rows) else [rows[i * len(rows) // n] for i in range(n)]


# -- Tokens ------------------------------------------------------------------------------------------------------------


def encode(
    rows: list[dict], tokenizer: Tokenizer, block_size: int, truncate: bool = False, template: Template = PLAIN,
    hide: bool = False, skip_bad: bool = False, name: str = "",
) -> list[Example]:  # fmt: skip
    """Token ids of rows; hide: their instructions are to be hidden; name: of their split, for a bar.

    A row longer than block_size raises ValueError.  With truncate, the response is cut to what the prompt leaves of the
    block, or to half of it, and then the prompt is shortened.  skip_bad removes rows that cannot be used from `rows`.
    """
    ids = list(range(tokenizer.engine.size))  # one object for each id: a tokenizer makes a new one at each place
    examples = encode_each(rows, tokenizer, block_size, truncate, template, hide, skip_bad, name)
    return [Example(*([ids[i] for i in part] for part in e[:2]), e.hidden) for e in examples]


def encode_each(
    rows: list[dict], tokenizer: Tokenizer, block_size: int, truncate: bool = False, template: Template = PLAIN,
    hide: bool = False, skip_bad: bool = False, name: str = "",
) -> Iterator[Example]:  # fmt: skip
    """`encode`, one row at a time."""
    unknown = getattr(tokenizer.engine, "unknown", None)  # of one that has no bytes to fall back on
    kept, bad, lost = [], Bad(skip_bad), []
    for i, row in enumerate(distributed.progress(rows, f"encode {name}", unit="row", leave=False), 1):
        try:
            first, rest = template.parts(row, tokenizer, hide)
            prompt = first + rest
            response = template.response_ids(row, tokenizer)
            size, error = len(prompt) + len(response), ""
            if size > block_size and (not truncate or hide):
                error = f" has {size} tokens, the model takes {block_size}"
                error += "" if hide else " (--truncate cuts such rows)"
        except ValueError as e:
            error = f": {e}"
        if error:
            bad.note(f"{', '.join(getattr(row, 'place', [f'row {i}']))}{error}: {row}"[:300])
            continue
        if size > block_size:
            response = response[: block_size - min(len(prompt), block_size - block_size // 2)]
            prompt = shorten(prompt, block_size - len(response), tokenizer, template)
        if unknown is not None and (unknown in prompt or unknown in response):
            lost.append(row)
        kept.append(row)
        yield Example(prompt, response, len(first))
    if rows:
        bad.report(kept, name or "what was given")
    if bad.count:
        rows[:] = kept
    if lost:
        warn(f"{len(lost)} of {len(rows)} rows have characters that the tokenizer lacks. The first: {lost[0]}"[:300])


def shorten(prompt: list[int], room: int, tokenizer: Tokenizer, template: Template = PLAIN) -> list[int]:
    """A prompt of at most `room` tokens.  It keeps its last part, "Response:", and loses what stands before that."""
    if len(prompt) <= room:
        return prompt
    kept = min(room, template.tail_size(tokenizer))
    return prompt[: room - kept] + prompt[len(prompt) - kept :]


# -- Batches -----------------------------------------------------------------------------------------------------------


def collate(examples: list[Example], block_size: int, device: str | torch.device = "cpu", multiple: int = 16) -> Batch:
    """A batch of examples, padded on the right to a multiple of `multiple` (or to block_size), so that shapes recur."""
    T = max(len(e.prompt) + len(e.response) for e in examples) - 1
    T = min(-(-T // multiple) * multiple, block_size)
    idx = torch.zeros(len(examples), T, dtype=torch.long)
    targets = torch.full_like(idx, -1)
    instr = torch.zeros_like(idx, dtype=torch.bool)
    for b, (prompt, response, hidden) in enumerate(examples):
        ids = torch.tensor(prompt + response)
        n = len(ids) - 1
        idx[b, :n] = ids[:-1]
        targets[b, max(len(prompt) - 1, 0) : n] = ids[max(len(prompt), 1) :]
        instr[b, : hidden or len(prompt)] = True
    return Batch(idx.to(device), targets.to(device), instr.to(device))


def right_pad(prompts: Sequence[Sequence[int]], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Prompts as ids (B, T), padded on the right to the longest, and their lengths (B,)."""
    longest = max(map(len, prompts))
    idx = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    return idx, torch.tensor([len(prompt) for prompt in prompts], device=device)


class Batches:
    """Endless shuffled training batches: batch(i) is a pure function of (examples, size, seed, i).

    To save padding, rows of similar length share a batch: each epoch's order is shuffled, sorted by length within
    stretches of 16 batches, cut into batches, and the batches are shuffled.  Their length is a multiple of `multiple`:
    where nothing is compiled, few shapes are worth less than little padding (a CPU: 4 takes 0.79 of the time of 16).
    """

    def __init__(
        self, examples: list[Example], size: int, seed: int, block_size: int, device: str | torch.device = "cpu",
        multiple: int = 16,
    ):  # fmt: skip
        self.examples = examples
        self.size = min(size, len(examples))
        self.seed = seed
        self.block_size = block_size
        self.device, self.multiple = device, multiple
        self.epoch = self.chunks = None  # the chunks of an epoch: indices of examples

    def batch(self, i: int) -> Batch:
        """Batch i, (size, T)."""
        epoch, k = divmod(i, len(self.examples) // self.size)
        if epoch != self.epoch:
            self.chunks = self._order(random.Random(f"{self.seed} {epoch}"))
            self.epoch = epoch
        return collate([self.examples[j] for j in self.chunks[k]], self.block_size, self.device, self.multiple)

    def _order(self, rng: random.Random) -> list[list[int]]:
        order = rng.sample(range(len(self.examples)), len(self.examples))
        length = lambda j: sum(map(len, self.examples[j][:2]))
        stretch = 16 * self.size
        order = [j for s in range(0, len(order), stretch) for j in sorted(order[s : s + stretch], key=length)]
        chunks = [order[s : s + self.size] for s in range(0, len(order) - self.size + 1, self.size)]
        rng.shuffle(chunks)
        return chunks
