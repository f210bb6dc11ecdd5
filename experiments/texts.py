"""Texts that a model writes for a test set, and how they are scored where one instruction has several answers (E2E)."""

import itertools
import statistics

from data import template
from model import Tuner
from sample import answer
from train import Session


def distinct_instructions(rows: list[dict]) -> tuple[list[dict], list[list[str]]]:
    """A row for each different instruction, and all outputs that the rows have for it."""
    groups = {}
    for row in rows:
        groups.setdefault(template(row), []).append(row)
    return [group[0] for group in groups.values()], [[row["output"] for row in group] for group in groups.values()]


def write_answers(session: Session, rows: list[dict], tuner: Tuner | None, size: int = 32) -> list[str]:
    """Greedy answers, computed in batches."""
    texts = []
    for i in range(0, len(rows), size):
        batch = rows[i : i + size]
        texts += answer(session.model, session.tokenizer, batch, tuner, truncate=True, template=session.template)
    return texts


def import_metrics() -> tuple:
    """The packages that compute BLEU and ROUGE-L.  Raises ModuleNotFoundError, which says how to get them."""
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError as e:
        raise ModuleNotFoundError(f"BLEU and ROUGE-L need {e.name}: pip install sacrebleu rouge-score") from None
    return sacrebleu, rouge_scorer


def bleu_and_rouge(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU and ROUGE-L, 0 to 100, each text against all its references.

    BLEU is that of the E2E challenge: mteval's 13a tokens, lower case, several references.  ROUGE-L is the mean over
    texts of the best F1 among the references (the challenge's own script gives more weight to recall).
    """
    sacrebleu, rouge_scorer = import_metrics()
    columns = list(itertools.zip_longest(*references))  # all first references, all second ones, ...
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    rouge = [scorer.score_multi(refs, text)["rougeL"].fmeasure for text, refs in zip(texts, references)]
    bleu = sacrebleu.corpus_bleu(texts, columns, lowercase=True, tokenize="13a").score
    return {"BLEU": bleu, "ROUGE-L": 100 * statistics.mean(rouge)}
