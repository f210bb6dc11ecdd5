"""From files of instructions to batches of tokens.

    template      one layout for every model and data set
    Tokenizer     of a model's folder: tiny's words, GPT-2's vocab.json, Llama 3's tokenizer.model, any tokenizer.json
    load          a folder or a file of rows -> {"train": [...], "val": [...], "test": [...]}
    Batches       rows -> tensors; batch i is a pure function of (seed, i), so that a run can be resumed exactly

A row is a dict with the keys of Alpaca: `instruction`, `input` (may be empty), `output`; others are kept and ignored.
A row with `prompt` in place of `instruction` is plain text, for pretraining.
"""

import base64
import codecs
import contextlib
import csv
import io
import json
import os
import random
import re
import sys
from collections.abc import Callable

import tiktoken
import torch
from torch import Tensor

END = "<|endoftext|>"


def template(row: dict) -> str:
    """The text that a model reads before it answers.  The answer follows as " " + output, then the end of text."""
    if "instruction" not in row:
        return row["prompt"]
    given = f"Input: {row['input']}\n" if row.get("input") else ""
    return f"Instruction: {row['instruction']}\n{given}Response:"


@contextlib.contextmanager
def replacing(path: str, mode: str = "w"):
    """Open `path` for writing, so that it holds the old content or all of the new one, whatever happens in between."""
    tmp = f"{path}.{os.getpid()}.tmp"
    try:
        with open(tmp, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


# -- Tokens ------------------------------------------------------------------------------------------------------------

# How text is cut into pieces, within which bytes are merged.  Whatever a pattern meets, some branch of it matches.
WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"  # tiny
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


class Tokenizer:
    """An encoding, with the ids that begin (None: nothing does) and end a text.

    `encoding` is a tiktoken.Encoding, or what has its n_vocab, encode_ordinary and decode.
    """

    def __init__(self, encoding, end, begin=None):
        self.encoding, self.end, self.begin = encoding, end, begin
        self.vocab_size = encoding.n_vocab

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.encoding.encode_ordinary(text)  # "<|endoftext|>" in a user's text is text

    def prompt(self, text: str) -> list[int]:
        """Ids of a text that something will follow: with the id that begins a text, where there is one; never none."""
        return [self.begin] * (self.begin is not None) + self.encode(text) or [self.end]

    def decode(self, ids: list[int]) -> str:
        """Ids -> text."""
        return self.encoding.decode([i for i in ids if i < self.vocab_size])  # a model's table may have spare rows

    @classmethod
    def load(cls, folder: str) -> "Tokenizer":
        """The tokenizer of a model's folder, by the files in it.  Raises OSError or ValueError if we can read none."""

        def path(*names):
            return next((p for p in (os.path.join(folder, name) for name in names) if os.path.exists(p)), None)

        words, vocab, whole = path("words.json"), path("vocab.json", "encoder.json"), path("tokenizer.json")
        ranks = path("tokenizer.model", os.path.join("original", "tokenizer.model"))
        if words:
            return cls.of_words(read_json(words))
        if vocab and (not whole or cuts_like_gpt2(whole)):
            return cls.of_gpt2(read_json(vocab), vocab)
        if ranks and (encoding := llama3_encoding(ranks)):
            return cls(encoding, encoding.encode_single_token(LLAMA3_END), encoding.encode_single_token(LLAMA3_BEGIN))
        if whole:
            return cls.of_hub(whole, os.path.join(folder, "config.json"))
        config = path("config.json")
        if config and read_json(config).get("model_type") == "gpt2":
            return cls.of_tiktoken("gpt2", folder)
        if ranks:
            raise ValueError(f"{ranks} is a SentencePiece model: we read the tokenizer.json that its hub page has, too")
        raise FileNotFoundError(f"no tokenizer in {folder}: it needs vocab.json, tokenizer.json or tokenizer.model")

    @classmethod
    def of_words(cls, words: list[str]) -> "Tokenizer":
        """A word a token: ids 0 to 255 are the bytes, then the words.

        tiktoken looks a whole piece up before it merges bytes, so a known word is one token, and an unknown one falls
        back on bytes (and on such short words as its bytes happen to spell): nothing is unencodable.
        """
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("words.json is not a list of words")
        ranks = {bytes([b]): b for b in range(256)}
        for word in words:
            ranks.setdefault(word.encode("utf-8"), len(ranks))
        end = len(ranks)
        return cls(encoding_of("words", WORDS, ranks, {END: end}), end, begin=end)

    @classmethod
    def of_gpt2(cls, vocab: dict, path: str = "vocab.json") -> "Tokenizer":
        """GPT-2's byte-level tokens from vocab.json's {token: id}, whose ids are the ranks of its merges."""
        of_char = {char: byte for byte, char in gpt2_chars().items()}
        try:
            ranks = {bytes(of_char[c] for c in token): i for token, i in vocab.items() if token != END}
            return cls(encoding_of("gpt2", GPT2, ranks, {END: vocab[END]}), vocab[END])
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path} is not a vocabulary of GPT-2's kind ({type(e).__name__}: {e})") from None

    @classmethod
    def of_tiktoken(cls, name: str, folder: str) -> "Tokenizer":
        """An encoding that tiktoken downloads, or has in TIKTOKEN_CACHE_DIR."""
        try:
            encoding = tiktoken.get_encoding(name)
        except OSError as e:
            why = f"tiktoken could not download it ({type(e).__name__})"
            raise FileNotFoundError(f"no vocab.json in {folder}, and {why}: put {name}'s vocab.json there") from None
        return cls(encoding, encoding.eot_token)

    @classmethod
    def of_hub(cls, path: str, config: str) -> "Tokenizer":
        """Any tokenizer.json, through the package `tokenizers`."""
        try:
            import tokenizers
        except ImportError:
            raise ModuleNotFoundError(f"{path} needs the package tokenizers: pip install tokenizers") from None
        try:
            encoding = HubEncoding(tokenizers.Tokenizer.from_file(path))
            plain, whole = encoding.hub.encode("x", add_special_tokens=False).ids, encoding.hub.encode("x").ids
            ends = read_json(config).get("eos_token_id")
            end = ends[0] if isinstance(ends, list) else ends
            if type(end) is not int or not 0 <= end < encoding.n_vocab:
                raise ValueError(f"{config} has eos_token_id {ends!r}")
        except Exception as e:  # tokenizers raises plain Exceptions
            raise ValueError(f"{path} cannot be read ({type(e).__name__}: {str(e)[:80]})") from None
        return cls(encoding, end, begin=whole[0] if len(whole) > len(plain) and whole[0] != plain[0] else None)


class HubEncoding:
    """A tokenizers.Tokenizer with the methods of a tiktoken.Encoding."""

    def __init__(self, hub):
        self.hub, self.n_vocab = hub, hub.get_vocab_size()

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text, without those that begin or end one."""
        # SentencePiece puts a space before a text, but ours may go on from another: " lima" after "Response:".
        lead = "\n" if text.startswith(" ") else ""
        skipped = self.hub.encode(lead, add_special_tokens=False).ids
        return self.hub.encode(lead + text, add_special_tokens=False).ids[len(skipped) :]

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, with the names of special ones."""
        return self.hub.decode(ids, skip_special_tokens=False)


def encoding_of(name: str, pattern: str, ranks: dict, special: dict) -> tiktoken.Encoding:
    """A tiktoken.Encoding.  Raises ValueError for ranks at which tiktoken would panic, now or at the first odd byte."""
    ids = [*ranks.values(), *special.values()]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids) or len(set(ids)) < len(ids):
        raise ValueError("its ids are not different whole numbers")
    if not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError("it lacks some of the 256 bytes")
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def gpt2_chars() -> dict[int, str]:
    """GPT-2's files spell each byte as a printable character: itself where it is one, else the next from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    rest = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(rest)) for byte in range(256)}


def cuts_like_gpt2(path: str) -> bool:
    """Whether a tokenizer.json cuts text as GPT-2 does: other models have a vocab.json too, and cut otherwise."""
    whole = read_json(path)
    cut = whole.get("pre_tokenizer") if isinstance(whole, dict) else None
    return isinstance(cut, dict) and cut.get("type") == "ByteLevel" and not whole.get("normalizer")


LLAMA3_BEGIN, LLAMA3_END = "<|begin_of_text|>", "<|end_of_text|>"


def llama3_encoding(path: str) -> tiktoken.Encoding | None:
    """The tiktoken.Encoding of Llama 3's tokenizer.model: lines of base64 and rank; None if it is no such file.

    256 special tokens follow the ranks.  Those that a text may hold are named; the rest are reserved, by their number.
    """
    try:
        with open(path, "rb") as f:
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in map(bytes.split, f)}
    except ValueError:  # also binascii.Error, and lines of other than two words: a SentencePiece model
        return None
    named = {0: LLAMA3_BEGIN, 1: LLAMA3_END, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}
    special = {named.get(i, f"<|special_{i}|>"): len(ranks) + i for i in range(256)}
    try:
        return encoding_of("llama3", LLAMA3, ranks, special)
    except ValueError as e:
        raise ValueError(f"{path} is broken: {e}") from None


def pieces(texts: list[str]) -> list[str]:
    """Every piece of the texts that is longer than a byte, sorted: the words of a word-level vocabulary."""
    # WORDS in the dialect of the standard library, which has no \p{}
    pattern = re.compile(r" ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s")
    found = {piece for text in texts for piece in pattern.findall(text)}
    return sorted(piece for piece in found if len(piece.encode("utf-8")) > 1)


# -- Rows --------------------------------------------------------------------------------------------------------------


def read_json(path: str):
    """A JSON file's content.  Raises ValueError with its name if it is none."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            return json.load(f)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON ({str(e)[:80]})") from None


def read_rows(path: str, skip_bad: bool = False, reshape: Callable | None = None) -> list[dict]:
    """Rows of a .jsonl, .json (a list), .csv or .tsv file; reshape makes a row of another shape one of ours.

    Raises ValueError with the file and the line for what is not a row; with skip_bad such rows are left out, and
    counted on standard error.
    """
    rows, bad = [], []
    for where, raw in raw_rows(path):
        try:
            rows.append(as_row(raw, reshape))
        except (ValueError, RecursionError) as e:
            bad.append(f"{path}, {where}: {e}")
            if not skip_bad:
                raise ValueError(f"{bad[0]} (--skip-bad leaves such rows out)") from None
    if bad and not rows:
        raise ValueError(f"{path} has no row that can be used. The first: {bad[0]}")
    if bad:
        print(f"left out {len(bad):,} of {len(bad) + len(rows):,} rows. The first: {bad[0]}", file=sys.stderr)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def raw_rows(path: str) -> list[tuple[str, bytes | dict]]:
    """(where, bytes of JSON or a dict) of each row.  Raises ValueError for a file that has no rows to speak of."""
    with open(path, "rb") as f:
        content = f.read().removeprefix(codecs.BOM_UTF8)
    if path.endswith(".jsonl"):
        lines = content.split(b"\n")  # not splitlines: a JSON text may hold what Unicode calls a line's end
        return [(f"line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    try:
        text = content.decode()
        if path.endswith(".json"):
            whole = json.loads(text, object_pairs_hook=once)
            return [(f"row {i}", row) for i, row in enumerate(whole, 1)] if isinstance(whole, list) else []
        plain = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.endswith(".tsv") else {}
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, **plain)
        return [(f"line {reader.line_num}", row) for row in reader]
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{path}, line {line}: it is not UTF-8 ({e.reason}). Save it in that encoding") from None
    except csv.Error as e:
        raise ValueError(f"{path}, near line {reader.line_num}: {e}") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} cannot be read: {e}") from None


def once(pairs: list[tuple]) -> dict:
    """A JSON object as a dict.  Raises ValueError for a key that occurs twice: which of the two is meant?"""
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return out


def as_row(raw: bytes | dict, reshape: Callable | None = None) -> dict:
    """A row from its line of JSON or its dict.  Columns `mr`, `ref` (the E2E data) become input and output.

    Raises ValueError for what is no row, or has nothing to learn.
    """
    row = json.loads(raw.decode(), object_pairs_hook=once) if isinstance(raw, bytes) else raw
    if isinstance(row, dict) and None in row:
        raise ValueError(f"it has more columns than the first line: {row[None]}"[:100])
    if reshape and isinstance(row, dict):
        row = reshape(row)
    if isinstance(row, dict) and "mr" in row:
        row = {"instruction": "Describe the restaurant.", "input": row["mr"], "output": row.get("ref")}
    if not isinstance(row, dict) or "output" not in row or not ("instruction" in row or "prompt" in row):
        has = columns(row) if isinstance(row, dict) else repr(row)
        raise ValueError(f"it has {has[:80]}; it needs instruction and output")
    for key in ("instruction" if "instruction" in row else "prompt", "output", "input"):
        text = row.get(key)
        if not isinstance(text, str) and not (key == "input" and text is None):
            raise ValueError(f"{key} is {text!r}"[:80] + ", and should be text")
        if text and any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"{key} has half of a character: {ascii(text)[:60]}")
    if not row["output"].strip():
        raise ValueError("output is empty: there is nothing to learn")
    return row


def columns(row: dict) -> str:
    """The names of a row's columns, for a message of one line."""
    return ", ".join(str(key) if str(key).isprintable() else ascii(key) for key in row) or "nothing"


def write_rows(path: str, rows: list[dict]):
    """Rows -> a .jsonl file, the whole of it or what was there before."""
    with replacing(path) as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def split(rows: list[dict], seed: int = 0, part: float = 0.1) -> tuple[list[dict], list[dict]]:
    """Rows -> (the rest, a part of them), such that the same instruction never stands on both sides."""
    groups = {}
    for row in rows:
        groups.setdefault(template(row) or row["output"], []).append(row)
    keys = list(groups)
    random.Random(seed).shuffle(keys)
    n = max(1, round(len(keys) * part))
    return [row for k in keys[n:] for row in groups[k]], [row for k in keys[:n] for row in groups[k]]


def load(where: str, skip_bad: bool = False) -> dict[str, list[dict]]:
    """Splits of a data set: {"train": rows, "val": rows, "test": rows, "test_...": rows}.

    A folder with train and, if there are, val, test, test_*, each .jsonl, .json, .csv or .tsv; or E2E's folder
    (trainset.csv and devset.csv, or devset.csv alone; testset_w_refs.csv); or one file.  What is missing of train, val
    and test is split off by instruction, a tenth each.
    """
    if os.path.isfile(where):
        found = {"train": read_rows(where, skip_bad)}
    elif os.path.isdir(where):
        alias = {"trainset": "train", "devset": "val", "testset_w_refs": "test"}
        if os.path.exists(os.path.join(where, "devset.csv")) and not os.path.exists(
            os.path.join(where, "trainset.csv")
        ):
            alias["devset"] = "train"
        found = {}
        for name in sorted(os.listdir(where)):
            stem, ext = os.path.splitext(name)
            stem = alias.get(stem, stem)
            if is_split(stem + ext):
                if stem in found:
                    raise ValueError(f"{where} has {stem} twice, as {name} and as another file: remove one of them")
                found[stem] = read_rows(os.path.join(where, name), skip_bad)
        if "train" not in found:
            raise FileNotFoundError(f"no data in {where}: no train.jsonl, .json, .csv or .tsv")
    else:
        raise FileNotFoundError(
            f"no data at {where}: --data takes tiny, a folder with train.jsonl, or a .jsonl, .json, .csv or .tsv file"
            " (python data/prepare.py makes one of alpaca, e2e, gsm8k, boolq, sst2, or of a file of yours)"
        )
    return complete(found, where)


def is_split(name: str) -> bool:
    """Whether a file of a data set's folder is taken for one of its splits."""
    stem, ext = os.path.splitext(name)
    named = stem in ("train", "val", "test") or stem.startswith("test_")
    return named and ext in (".jsonl", ".json", ".csv", ".tsv")


def complete(found: dict, where: str) -> dict:
    """Splits, with what is missing of train, val and test split off by instruction, a tenth each."""
    if not any(name.startswith("test") for name in found):
        found["train"], found["test"] = split(found["train"])
    if "val" not in found:
        found["train"], found["val"] = split(found["train"])
    if not all(found.values()):
        raise ValueError(f"{where} has too few different instructions to split off a tenth for each of val and test")
    return {name: found[name] for name in sorted(found, key=lambda name: (name.startswith("test"), name))}


def label_words(rows: list[dict], most: int = 10) -> list[str]:
    """The outputs of rows, if they are so few, and so often the same, that they are classes; else none."""
    words = sorted({row["output"].strip() for row in rows})
    return words if 2 <= len(words) <= most and len(rows) >= 10 * len(words) else []


# -- Batches -----------------------------------------------------------------------------------------------------------


def encode(rows: list[dict], tokenizer: Tokenizer, block_size: int, truncate: bool = False) -> list[tuple]:
    """Rows -> (prompt ids, response ids).

    A row that does not fit raises ValueError; with truncate its prompt loses what stands before "Response:", and a
    response that takes more than half of the block its end.
    """
    examples = []
    for i, row in enumerate(rows):
        prompt = tokenizer.prompt(template(row))
        response = tokenizer.encode(" " + row["output"].strip()) + [tokenizer.end] * row.get("end", True)
        if len(prompt) + len(response) > block_size:
            if not truncate:
                raise ValueError(
                    f"row {i + 1} has {len(prompt) + len(response)} tokens, the model takes {block_size}"
                    f" (--truncate cuts such rows): {row}"[:300]
                )
            response = response[: block_size - min(len(prompt), block_size - block_size // 2)]
            prompt = shorten(prompt, block_size - len(response), tokenizer)
        examples.append((prompt, response))
    return examples


def shorten(prompt: list[int], room: int, tokenizer: Tokenizer) -> list[int]:
    """A prompt of at most `room` tokens: what stands before "Response:" loses its end."""
    tail = min(room, len(tokenizer.encode("\nResponse:")))
    return prompt if len(prompt) <= room else prompt[: room - tail] + prompt[len(prompt) - tail :]


def collate(
    examples: list[tuple], block_size: int, device: str | torch.device = "cpu", multiple: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Examples -> idx, targets, instr, each (B, T).

    Right-padded to a multiple of `multiple`, or to block_size, so that few shapes occur.  targets[t] is the token after
    idx[t] where that is part of the response (its end included), else -1; instr is True on the prompt.
    """
    T = max(len(p) + len(r) for p, r in examples) - 1
    T = min(-(-T // multiple) * multiple, block_size)
    idx = torch.zeros(len(examples), T, dtype=torch.long)
    targets = torch.full_like(idx, -1)
    instr = torch.zeros_like(idx, dtype=torch.bool)
    for row, (p, r) in enumerate(examples):
        ids = torch.tensor(p + r)
        n = len(ids) - 1
        idx[row, :n] = ids[:-1]
        targets[row, max(len(p) - 1, 0) : n] = ids[max(len(p), 1) :]
        instr[row, : len(p)] = True
    return idx.to(device), targets.to(device), instr.to(device)


class Batches:
    """Endless shuffled training batches: batch(i) is a pure function of (examples, size, seed, i).

    Rows of like length go together, to pad less: an epoch's order is shuffled, sorted by length within stretches of 16
    batches, cut into batches, and the batches are shuffled.
    """

    def __init__(self, examples, size, seed, block_size, device="cpu"):
        self.examples, self.size, self.seed = examples, min(size, len(examples)), seed
        self.block_size, self.device = block_size, device
        self.epoch, self.chunks = None, None

    def batch(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Batch i: idx, targets, instr, each (B, T)."""
        epoch, k = divmod(i, len(self.examples) // self.size)
        if epoch != self.epoch:
            self.epoch, self.chunks = epoch, self._order(random.Random(f"{self.seed} {epoch}"))
        return collate([self.examples[j] for j in self.chunks[k]], self.block_size, self.device)

    def _order(self, rng):
        order = rng.sample(range(len(self.examples)), len(self.examples))
        stretch = 16 * self.size
        order = [j for s in range(0, len(order), stretch) for j in sorted(order[s : s + stretch], key=self._length)]
        chunks = [order[s : s + self.size] for s in range(0, len(order) - self.size + 1, self.size)]
        rng.shuffle(chunks)
        return chunks

    def _length(self, j):
        return sum(map(len, self.examples[j]))
