"""What turns text into ids: tiktoken, or the package tokenizers.

    engine.encode(text), engine.decode(ids)
    engine.size                               ids are smaller than this
    engine.id_of(name)                        the id of a token, or None

    TiktokenEngine                 bytes and merges of them: tiny's words, GPT-2, Llama 3
    HubEngine                      whatever a tokenizer.json describes
    make_engine(content, added)    the one for a tokenizer.json's content, with all of its added tokens

Engines know special tokens only under secret names, random numbers.  So no text contains one by accident.
"""

import functools
import hashlib
import json
import re
import secrets
from collections.abc import Iterable

import tiktoken

# How text is cut into pieces, within which bytes are merged.  Whatever a pattern meets, some branch of it matches.
WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"  # tiny
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

LONGEST_SPACE = 500_000  # characters in a row.  Not far beyond, tiktoken panics if its pattern looks ahead
SECRET = str(10**19 + secrets.randbelow(10**19))  # digits only: a chat template may change the case of letters


def secret_name(i: int) -> str:
    """The name under which the engines know special token i."""
    return f"{SECRET}:{i}."


def digest(content: object) -> str:
    """A hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def any_of(names: Iterable[str]) -> re.Pattern:
    """A pattern that finds these names, the longest first, as a group; nothing, if there are none."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


class TiktokenEngine:
    """Bytes merged by rank, and added tokens {name: id}.  ids {rank: id}: where a token's id is not its rank.

    Raises ValueError for ranks at which tiktoken would panic, now or at the first odd byte.
    """

    def __init__(self, pattern: str, ranks: dict[bytes, int], added: dict[str, int], ids: dict[int, int] | None = None):
        numbers = [*ranks.values(), *([] if ids else added.values())]
        if not all(type(i) is int and 0 <= i < 2**31 for i in numbers) or len(set(numbers)) < len(numbers):
            raise ValueError("its ids are not different whole numbers")
        if not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError("it lacks some of the 256 bytes")
        self.encoding = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.looks_ahead = "(?!" in pattern
        self.ids = ids
        self.added = added
        self.added_names = any_of(added)
        self.spelling = {ids[rank] if ids else rank: token for token, rank in ranks.items()}
        self.spelling.update({i: name.encode("utf-8") for name, i in added.items()})
        self.size = max(self.spelling) + 1

    @functools.cached_property
    def digest(self) -> str:
        """A hash of what it does."""
        return digest([self.encoding._pat_str, {token.hex(): i for token, i in self.encoding._mergeable_ranks.items()}])

    def encode(self, text: str) -> list[int]:
        if self.looks_ahead and len(text) > LONGEST_SPACE:
            longest = max(map(len, re.findall(r"\s+", text)), default=0)
            if longest > LONGEST_SPACE:
                raise ValueError(f"the text has {longest:,} characters of white space in a row: shorten it")
        ids = []
        for i, part in enumerate(self.added_names.split(text)):  # every second one is a name
            ids += [self.added[part]] if i % 2 else self._merge(part)
        return ids

    def _merge(self, text):
        ranks = self.encoding.encode_ordinary(text)
        return [self.ids[rank] for rank in ranks] if self.ids else ranks

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.spelling.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def id_of(self, name: str) -> int | None:
        spelling = name.encode("utf-8")
        return next((i for i, token in self.spelling.items() if token == spelling), None)


class HubEngine:
    """The package tokenizers, with a tokenizer.json's content and all added tokens {name: entry}.

    Truncation and padding, which the file may hold since somebody's last call, are left out, and so is dropout.
    """

    def __init__(self, tokenizers, content: dict, added: dict[str, dict]):
        secret = {name: secret_name(token["id"]) for name, token in added.items() if token["special"]}
        model = dict(content["model"])
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {secret.get(token, token): i for token, i in vocab.items()}
        else:
            model["vocab"] = [[secret.get(token, token), score] for token, score in vocab]
        if model.get("unk_token") in secret:
            model["unk_token"] = secret[model["unk_token"]]
        if "merges" in model:
            model["merges"] = [pair for pair in pairs_of(model) if not secret.keys() & {*pair, "".join(pair)}]
            model["dropout"] = None
        always = {"normalized": False, "single_word": False}  # found wherever a chat template writes it
        entries = [{**x, "content": secret[name], **always} if name in secret else x for name, x in added.items()]
        content = {**content, "model": model, "added_tokens": entries, "truncation": None, "padding": None}
        self.hub = tokenizers.Tokenizer.from_str(json.dumps(content))
        for name, token in added.items():
            if self.hub.token_to_id(secret.get(name, name)) != token["id"]:
                raise ValueError(f"the added token {name[:80]!r} has id {token['id']}, but ids before it are missing")
        self.size = max(self.hub.get_vocab().values()) + 1
        self.unknown = model.get("unk_id")  # what characters become that are in no token
        if model.get("unk_token"):
            self.unknown = self.hub.token_to_id(model["unk_token"])
        self.newline = self._ids("\n")
        self.adds_space = self._ids("\n x")[len(self.newline) :] != self._ids(" x")

    def _ids(self, text):
        return self.hub.encode(text, add_special_tokens=False).ids

    def encode(self, text: str) -> list[int]:
        if self.adds_space and text.startswith(" "):
            # SentencePiece puts a space before a text, but ours may go on from another: " lima" after "Response:".
            ids = self._ids("\n" + text)
            if ids[: len(self.newline)] == self.newline:
                return ids[len(self.newline) :]
        return self._ids(text)

    def decode(self, ids: list[int]) -> str:
        return self.hub.decode(ids, skip_special_tokens=False)

    def id_of(self, name: str) -> int | None:
        return self.hub.token_to_id(name)


# -- The content of a tokenizer.json -----------------------------------------------------------------------------------


FLAGS = ("normalized", "single_word", "special", "id", "lstrip", "rstrip")  # a special token has only the last four


def make_engine(content: dict, added: dict[str, dict]) -> TiktokenEngine | HubEngine:
    """The engine of a tokenizer.json's content and all added tokens {name: entry}.

    Raises ModuleNotFoundError without the package tokenizers, but for tokenizers of GPT-2's kind, which tiktoken does.
    """
    try:
        import tokenizers
    except ImportError:
        if not is_gpt2_kind(content, added):
            raise ModuleNotFoundError("needs the package tokenizers: pip install tokenizers") from None
        engine = gpt2_engine(content["model"], added)
    else:
        engine = HubEngine(tokenizers, content, added)
    engine.digest = digest(essence(content, added))
    return engine


def essence(content: dict, added: dict[str, dict]) -> list:
    """What of a tokenizer.json decides about the ids, the same for each layout of it and for each engine."""
    model = {key: x for key, x in content["model"].items() if x and key not in ("dropout", "merges")}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"].get("merges", [])]
    steps = [content.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    if is_gpt2_kind(content, added):  # also vocab.json and merges.txt
        model, steps = model["vocab"], []
    flags = {name: [token[flag] for flag in FLAGS[2 * token["special"] :]] for name, token in added.items()}
    return [model, merges, steps, flags]


def vocabulary(model: dict) -> dict[str, int]:
    """{token: id} of a tokenizer.json's model."""
    vocab = model["vocab"]
    return vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}


def pairs_of(model: dict) -> list[list[str]]:
    """The merges of a model, which a file has as "left right" or as [left, right]."""
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]


def ordinary_tokens(model: dict) -> set[str]:
    """Tokens that a model makes of ordinary text and whose names do not look special.

    If a file calls one of them special ("!" as padding, a line's end as the end), it is text all the same.
    """
    if "merges" in model:
        tokens = {*map("".join, pairs_of(model)), *(token for token in model["vocab"] if len(token) == 1)}
    elif isinstance(model["vocab"], list):
        tokens = {token for token, score in model["vocab"] if score < 0}  # SentencePiece's control symbols have 0
    else:
        tokens = set(model["vocab"])
    return {token for token in tokens if not re.search(r"[<\[{|].*[>\]}|]", token)}


def prefix_ids(post_processor: dict | None) -> list[int]:
    """The ids that a tokenizer.json puts before a text."""
    kind = (post_processor or {"type": "ByteLevel"})["type"]
    if kind == "Sequence":
        return [i for part in reversed(post_processor["processors"]) for i in prefix_ids(part)]
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [post_processor["cls"][1]]
    ids = []
    for item in post_processor["single"] if kind == "TemplateProcessing" else []:
        if "Sequence" in item:
            break
        ids += post_processor["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    return ids


# -- GPT-2's kind ------------------------------------------------------------------------------------------------------


def is_gpt2_kind(content: dict, added: dict[str, dict]) -> bool:
    """Whether a tokenizer.json cuts text as GPT-2 does, merges bytes within the pieces, and does nothing else."""
    model = content["model"]
    cut = content.get("pre_tokenizer") or {}
    flags = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    return (
        model.get("type") == "BPE"
        and cut.get("type") == "ByteLevel"
        and cut.get("use_regex", True)
        and not cut.get("add_prefix_space")
        and not content.get("normalizer")
        and not any(model.get(flag) for flag in flags)
        and not any(token[flag] for token in added.values() for flag in ("single_word", "lstrip", "rstrip"))
    )


def gpt2_engine(model: dict, added: dict[str, dict]) -> TiktokenEngine:
    """The TiktokenEngine of a tokenizer.json's model of GPT-2's kind.  Ranks follow the merges, whatever the ids."""
    byte_of = {char: byte for byte, char in gpt2_chars().items()}
    ranks, ids = {}, {}
    for token in [*byte_of, *map("".join, pairs_of(model))]:
        if not added.get(token, {"special": False})["special"]:
            rank = ranks.setdefault(bytes(byte_of[char] for char in token), len(ranks))
            ids[rank] = model["vocab"][token]
    names = {secret_name(x["id"]) if x["special"] else name: x["id"] for name, x in added.items()}
    engine = TiktokenEngine(GPT2, ranks, names, ids)
    for token, i in model["vocab"].items():  # also of tokens that no merge makes
        engine.spelling.setdefault(i, token.encode("utf-8"))
    engine.size = max(engine.spelling) + 1
    return engine


def gpt2_chars() -> dict[int, str]:
    """GPT-2's files spell each byte as a printable character: itself where it is one, else the next from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    rest = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(rest)) for byte in range(256)}
