#!/usr/bin/env bash
# tiktoken finds the shorter of two special tokens that begin alike, or the longer: a hash of all their names decides.
#
# Version     tiktoken 0.14.0, tokenizers 0.23.3.
# Expected    Where the names of two special tokens begin alike, such as <|im_start|> and <|im_start|>assistant, the longest
#             that fits is found, as in tokenizers, or at least the one that was given first.
# Seen        Of 100 pairs <tag0> and <tag0>:, <tag1> and ... tiktoken finds the longer one in 51 and the shorter in 49, after
#             which ":" is text.  Given in the other order, it is the longer one in 57.  With <|im_start|>, <|im_start|>user and
#             <|im_start|>assistant, the text "<|im_start|>assistant" is ten tokens; once <|im_start|>system is added as a
#             fourth, it is one.  tokenizers finds the longest in all cases.  Decoding gives the text back, so no
#             round trip shows it.
# Meaning     A vocabulary that was trained with tokenizers has other ids in tiktoken, and a new special token may change how
#             old ones are read.  Give names such that none begins another, or split the text by the longest name
#             yourself and call encode_ordinary on what lies between.
# Source      https://github.com/openai/tiktoken/blob/main/src/lib.rs (the names are joined in the order of a hash map)
# Here        tiktoken gets no special tokens at all: data/engines.py splits the text at the longest name that fits
#             (tests/plumbing/test_tokenizer.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tiktoken==0.14.0 tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import tiktoken
import tokenizers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

BYTES = {bytes([i]): i for i in range(256)}


def lengths(names, text):
    """How many tokens a text is in tiktoken and in tokenizers, with these special tokens beside the 256 bytes."""
    special = {name: 256 + i for i, name in enumerate(names)}
    ours = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=BYTES, special_tokens=special)
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    theirs = Tokenizer(models.BPE(vocab, []))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.add_special_tokens([AddedToken(name, special=True) for name in names])
    ids = ours.encode(text, allowed_special="all")
    assert ours.decode(ids) == text
    return len(ids), len(theirs.encode(text).ids)


print(f"tiktoken {tiktoken.__version__}, tokenizers {tokenizers.__version__}")
pairs = [(f"<tag{i}>", f"<tag{i}>:") for i in range(100)]
found = [lengths(pair, pair[1]) for pair in pairs]
longer = sum(ours == 1 for ours, theirs in found)
print(f"the longer name is found in {longer} of 100 pairs; by tokenizers in {sum(theirs == 1 for ours, theirs in found)}")
turned = [lengths(pair[::-1], pair[1]) for pair in pairs]
print("given in the other order:", sum(ours == 1 for ours, theirs in turned))
roles = ["<|im_start|>", "<|im_start|>user", "<|im_start|>assistant", "<|im_start|>system"]
three, four = lengths(roles[:3], roles[2]), lengths(roles, roles[2])
print(f"{roles[2]} is {three[0]} tokens among three names, {four[0]} among four; in tokenizers {three[1]} and {four[1]}")
assert 20 < longer < 80 and all(theirs == 1 for ours, theirs in found + turned), "this has changed"
assert three == (10, 1) and four == (1, 1), "this has changed"
PYTHON
