"""How well a model answers rows: loss, exact match, accuracy.  No answer is decoded.

Greedy decoding reproduces a response, its end included, exactly if each of its tokens is the likeliest one after those
before it.  So one forward pass says whether it would.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import PLAIN, Example, Template, Tokenizer, collate, evenly_spaced, shorten
from data.reads import seen
from model import NO_TUNER, Decoder, Tuner
from plumbing.distributed import progress

BLIND = Tuner()  # the frozen model where an instruction is hidden, and nothing stands in its place
BLIND.act = "hidden"


class Score(NamedTuple):
    """Of a test set: the share of rows answered exactly (or given the right label), and the loss per response token.

    kl: the divergence from the frozen model that sees the instruction, in nats per response token, where it is hidden.
    """

    exact: float
    nats: float
    kl: float = 0.0

    def loss(self, distill: float) -> float:
        """What `train.py --distill` makes smaller."""
        return distill * self.kl + (1 - distill) * self.nats


class RowScores(NamedTuple):
    """Of each of N examples (N,): nats, divergence, and how many tokens of its response are not the likeliest."""

    nats: Tensor
    wrong: Tensor
    kl: Tensor


def evaluate(model: Decoder, examples: list[Example], tuner: Tuner | None = None) -> Score:
    """Exact match, and nats and divergence per response token."""
    nats, wrong, kl = score_examples(model, examples, tuner)
    tokens = sum(len(e.response) for e in examples)
    return Score((wrong == 0).double().mean().item(), nats.sum().item() / tokens, kl.sum().item() / tokens)


@torch.no_grad()
def score_examples(model: Decoder, examples: list[Example], tuner: Tuner | None = None, size: int = 64) -> RowScores:
    """Score the responses of N examples, each given its prompt."""
    if tuner is not None:
        tuner.eval()
    hide, device = tuner is not None and tuner.act == "hidden", model.wte.weight.device
    nats, kl = torch.zeros(2, len(examples), dtype=torch.double)
    wrong = torch.zeros(len(examples), dtype=torch.long)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt) + len(examples[i].response))
    for i in progress(range(0, len(order), size), "score", unit="batch", leave=False):
        rows = torch.tensor(order[i : i + size])
        batch = collate([examples[i] for i in rows], model.config.block_size, device)
        has_target = batch.targets >= 0
        hidden = model.hidden(batch.idx, batch.instr, tuner, n=batch.used())[has_target]
        seeing = seen(model, batch.idx, tuner)[has_target] if hide else hidden
        parts = zip(hidden.split(1024), seeing.split(1024), batch.targets[has_target].split(1024),
                    has_target.nonzero()[:, 0].split(1024))  # fmt: skip
        for x, taught, target, row in parts:  # never all logits at once: they can be larger than everything else
            logits, row = model.head(x).float(), rows[row.cpu()]
            nats.index_add_(0, row, F.cross_entropy(logits, target, reduction="none").cpu().double())
            wrong.index_add_(0, row, (logits.argmax(-1) != target).long().cpu())
            if hide:
                log_q, log_p = logits.log_softmax(-1), model.head(taught).float().log_softmax(-1)
                kl.index_add_(0, row, F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1).cpu().double())
    return RowScores(nats, wrong, kl)


def accuracy(
    model: Decoder, tokenizer: Tokenizer, rows: list[dict], examples: list[Example], labels: list[str],
    tuner: Tuner | None = None, layout: Template = PLAIN,
) -> float:  # fmt: skip
    """Share of rows whose label is the likeliest of all label words, as a whole response.

    A prompt is shortened so that it has room for each word, the same for all: else they could not be compared.
    """
    words = [layout.response_ids({**rows[0], "output": word}, tokenizer) for word in labels]
    room = model.config.block_size - max(map(len, words)) - (tuner or NO_TUNER).first
    prompts = [(e.prompt if e.hidden else shorten(e.prompt, room, tokenizer, layout), e.hidden) for e in examples]
    nats = score_examples(model, [Example(ids, word, n) for ids, n in prompts for word in words], tuner).nats
    best = nats.view(len(prompts), -1).argmin(1).tolist()
    return sum(labels[i] == row["output"].rstrip() for i, row in zip(best, rows)) / len(rows)


class Session(NamedTuple):
    """What a run works on."""

    model: Decoder
    tokenizer: Tokenizer
    template: Template
    rows: dict[str, list[dict]]  # by split
    examples: dict[str, list[Example]]  # the same as token ids
    tests: list[str]  # the splits to test on
    labels: list[str]  # the label words, if the outputs are a few classes
    block_size: int
    hashes: dict[str, object]  # what a run is known by
    plain: list[Example] = []  # text that has nothing to do with the rows: what does tuning cost there?

    def counts(self) -> dict[str, int]:
        """The number of rows behind each of `scores`."""
        counts = {name: len(self.examples[name]) for name in self.tests}
        return {**counts, "plain text": len(self.plain)} if self.plain else counts

    def scores(self, tuner: Tuner | None = None) -> dict[str, Score]:
        """Scores of all test sets, with accuracy in place of exact match where the outputs are classes."""
        scores = {name: evaluate(self.model, self.examples[name], tuner) for name in self.tests}
        if self.labels:
            for name, score in scores.items():
                rows = self.rows[name], self.examples[name], self.labels
                scores[name] = score._replace(exact=accuracy(self.model, self.tokenizer, *rows, tuner, self.template))
        if self.plain:
            scores["plain text"] = evaluate(self.model, self.plain, tuner)._replace(exact=math.nan)
        return scores


def plain_examples(tokenizer: Tokenizer, n: int = 16) -> list[Example]:
    """Passages of English that no task asks about, n at most, of 64 tokens that are read and 128 that are predicted.

    They are Python's own help topics, which every Python has; another version may word some of them otherwise.  There
    are none for tiny's tokenizer, which knows no English.
    """
    from pydoc_data.topics import topics

    texts = [text for _, text in sorted(topics.items())] if tokenizer.vocab_size > 5000 else []
    ids = [tokenizer.encode(text[:2000]) for text in texts]
    return evenly_spaced([Example(text[:64], text[64:192]) for text in ids if len(text) >= 192][:64], n)


def score_table(columns: dict[str, dict[str, Score]], counts: dict[str, int], metric: str) -> Iterator[str]:
    """{column: {test set: Score}} as lines of text.

    Exact match is left out where answers are so long that there is none; the divergence, where nothing is hidden.
    """
    width, scores = max(map(len, counts)), [score for column in columns.values() for score in column.values()]
    shown, formats = (
        {"exact": metric, "nats": "nats/token", "kl": "divergence"},
        {"exact": ".1%", "nats": ".3f", "kl": ".3f"},
    )
    shown = {field: head for field, head in shown.items() if any(getattr(score, field) > 0 for score in scores)}
    wide = 2 + max(11 * len(shown), *map(len, columns))
    yield f"{'':{width}}  {'rows':>6}" + "".join(f"{name:>{wide}}" for name in columns)
    yield f"{'':{width}}  {'':>6}" + "".join(f"{head:>11}" for head in shown.values()).rjust(wide) * len(columns)
    for name, rows in counts.items():
        cells = [[f"{getattr(column[name], f):11{formats[f]}}" for f in shown] for column in columns.values()]
        cells = [[f"{'–':>11}" if "nan" in cell else cell for cell in column] for column in cells]
        yield f"{name:{width}}  {rows:6,}" + "".join("".join(cell).rjust(wide) for cell in cells)


def before_and_after(rows: list[dict], answers: dict[str, list], layout: Template) -> Iterator[str]:
    """What was asked, what the models of these names answer, and what was wanted, as lines ("...": it goes on)."""
    for i, row in enumerate(rows):
        yield "    ".join(layout.text(row).strip().splitlines()).removesuffix("Response:").strip()
        for name, text in {**{name: texts[i] for name, texts in answers.items()}, "wanted": row["output"]}.items():
            text = " ".join(str(text).split())
            yield f"    {name:15s} {text if len(text) <= 160 else text[:157] + '...'}"
        yield ""
