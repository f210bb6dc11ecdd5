"""How well a model answers rows: loss, exact match, accuracy.  No answer is decoded.

Greedy decoding reproduces a response, its end included, exactly if each of its tokens is the likeliest one after those
before it.  So one forward pass says whether it would.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import PLAIN, Example, Template, Tokenizer, collate, shorten, template
from model import Decoder, Tuner


class Score(NamedTuple):
    """Of a test set: the share of rows answered exactly (or given the right label), and the loss per response token."""

    exact: float
    nats: float


def evaluate(model: Decoder, examples: list[Example], tuner: Tuner | None = None) -> Score:
    """Exact match and nats per response token."""
    nats, wrong = score_examples(model, examples, tuner)
    tokens = sum(len(response) for _, response in examples)
    return Score((wrong == 0).double().mean().item(), nats.sum().item() / tokens)


@torch.no_grad()
def score_examples(
    model: Decoder, examples: list[Example], tuner: Tuner | None = None, size: int = 64
) -> tuple[Tensor, Tensor]:
    """Of each of N examples, the nats of its response, and how many of its tokens are not the likeliest: (N,), (N,)."""
    if tuner is not None:
        tuner.eval()
    nats = torch.zeros(len(examples), dtype=torch.double)
    wrong = torch.zeros(len(examples), dtype=torch.long)
    order = sorted(range(len(examples)), key=lambda i: sum(map(len, examples[i])))
    for rows in (torch.tensor(order[i : i + size]) for i in range(0, len(order), size)):
        idx, targets, instr = collate([examples[i] for i in rows], model.config.block_size, model.wte.weight.device)
        has_target = targets >= 0
        hidden = model.hidden(idx, instr, tuner, n=int(has_target.sum(1).max()))[has_target]
        parts = zip(hidden.split(1024), targets[has_target].split(1024), has_target.nonzero()[:, 0].split(1024))
        for x, target, row in parts:  # never all logits at once: they can be larger than everything else
            logits, row = model.head(x).float(), rows[row.cpu()]
            nats.index_add_(0, row, F.cross_entropy(logits, target, reduction="none").cpu().double())
            wrong.index_add_(0, row, (logits.argmax(-1) != target).long().cpu())
    return nats, wrong


def accuracy(
    model: Decoder, tokenizer: Tokenizer, rows: list[dict], examples: list[Example], labels: list[str],
    tuner: Tuner | None = None, layout: Template = PLAIN,
) -> float:  # fmt: skip
    """Share of rows whose label is the likeliest of all label words, as a whole response.

    A prompt is shortened so that it has room for each word, the same for all: else they could not be compared.
    """
    words = [layout.response_ids({**rows[0], "output": word}, tokenizer) for word in labels]
    room = model.config.block_size - max(map(len, words))
    prompts = [shorten(prompt, room, tokenizer, layout) for prompt, _ in examples]
    nats, _ = score_examples(model, [Example(prompt, word) for prompt in prompts for word in words], tuner)
    best = nats.view(len(prompts), -1).argmin(1).tolist()
    return sum(labels[i] == row["output"].strip() for i, row in zip(best, rows)) / len(rows)


def score_table(before: dict, after: dict, counts: dict, method: str, metric: str) -> Iterator[str]:
    """{test set: Score} before and after training as lines of text.

    Exact match is left out where answers are so long that there is none.
    """
    width = max(map(len, before))
    short = any(score.exact for score in (*before.values(), *after.values()))
    yield f"{'':{width}}  {'rows':>6}  {'frozen alone':>20}  {'with ' + method:>20}"
    yield f"{'':{width}}  {'':>6}" + f"  {metric if short else '':>11}{'nats/token':>11}" * 2
    for name in before:
        cells = [f"{s.exact:11.1%}{s.nats:11.3f}" if short else f"{s.nats:22.3f}" for s in (before[name], after[name])]
        yield f"{name:{width}}  {counts[name]:6,}  {cells[0]}  {cells[1]}"


def before_and_after(rows: list[dict], before: list[str], after: list[str], method: str) -> Iterator[str]:
    """What was asked, what either model answers, and what was wanted, as lines of text."""
    for row, *answers in zip(rows, before, after):
        yield "    ".join(template(row).strip().splitlines()).removesuffix("Response:").strip()
        for name, text in zip(("frozen alone", f"with {method}", "wanted"), (*answers, row["output"])):
            yield f"    {name:15s} {' '.join(text.split())[:160]}"
        yield ""
