#!/usr/bin/env bash
# torchmetrics' chrF gives a right answer of four letters 0.67 of 1: it is not sacrebleu's chrF, which gives 1.
#
# Version     torchmetrics 1.9.0, sacrebleu 2.6.0, torch 2.13.0.
# Expected    CHRFScore is said to follow sacrebleu.  So both give the same score (torchmetrics' times 100), and 100 where the
#             answer is the reference.
# Seen        "lima" against "lima": 66.7 and 100 as chrF, 62.5 and 100 as chrF++ (torchmetrics' default); "yes": 50 and 100;
#             "a": 16.7 and 100.  torchmetrics divides by all six orders of n-grams, sacrebleu by those that both texts are
#             long enough for.  From six letters on a right answer has 100 in both as chrF, but as chrF++ one word never
#             has more than 87.5 in torchmetrics, as it has no pair of words.  A wrong answer can be ahead of a right one:
#             "copenhagen" against "copenhague" has 73.5, "lima" against "lima" 66.7.
#             Over a set, counts are added up before they are divided, so one long row hides it: 100 in both.
# Meaning     A set of short answers (labels, words, numbers) cannot reach 100, nor can its scores be compared with published
#             ones, and sentence-level scores rank answers by their length.  Use sacrebleu's.
# Source      https://lightning.ai/docs/torchmetrics/stable/text/chrf_score.html,
#             https://github.com/mjpost/sacrebleu/issues/121 (orders that a text is too short for)
# Here        No chrF is computed: answers are compared as whole texts, their ends included (data/scores.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0 sacrebleu==2.6.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sacrebleu
import torch
import torchmetrics
from torchmetrics.text import CHRFScore

print(f"torchmetrics {torchmetrics.__version__}, sacrebleu {sacrebleu.__version__}, torch {torch.__version__}")


def scores(answers, references, word_order):
    """chrF (word_order 0) or chrF++ (2) of torchmetrics and sacrebleu, both in percent."""
    theirs = CHRFScore(n_word_order=word_order)(answers, [[text] for text in references]).item() * 100
    return round(theirs, 1), round(sacrebleu.corpus_chrf(answers, [references], word_order=word_order).score, 1)


right = {}
for text in "a", "yes", "lima", "london":
    right[text] = scores([text], [text], 0), scores([text], [text], 2)
    print(f"{text!r} against itself, torchmetrics and sacrebleu: chrF {right[text][0]}, chrF++ {right[text][1]}")
wrong = scores(["copenhagen"], ["copenhague"], 0)
print(f"'copenhagen' against 'copenhague': chrF {wrong}")
long = "the capital of peru is the city of lima"
together = scores(["lima", long], ["lima", long], 2)
print(f"'lima' and a long row, both right: chrF++ {together}")
short = scores(["lima", "yes"], ["lima", "yes"], 2)
print(f"'lima' and 'yes', both right: chrF++ {short}")
assert right["a"] == ((16.7, 100.0), (25.0, 100.0)) and right["yes"][0] == (50.0, 100.0), "this has changed"
assert right["lima"] == ((66.7, 100.0), (62.5, 100.0)), "this has changed"
assert right["london"] == ((100.0, 100.0), (87.5, 100.0)), "this has changed"
assert wrong == (73.5, 73.5) and together == (100.0, 100.0) and short == (62.5, 100.0), "this has changed"
PYTHON
