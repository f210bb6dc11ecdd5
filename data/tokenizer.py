"""The tokenizer of a model's folder.

    tokenizer = Tokenizer.load(folder)
    tokenizer.encode(text)        ids of a text.  The name of a special token in it is text like any other
    tokenizer.prompt(text)        the same, behind the token that begins a text, if the model has one
    tokenizer.decode(ids)         text, with the names of special tokens
    tokenizer.encode_chat(text)   ids of a rendered chat template, in which the names of special tokens are special

The first of these that a folder has describes its tokenizer:

    words.json                        tiny's words
    tokenizer.json                    any tokenizer, read by the package tokenizers (without it: GPT-2's kind)
    vocab.json, merges.txt            GPT-2's kind; OpenAI's own names for the files are encoder.json and vocab.bpe
    tokenizer.model                   Llama 3's ranks
    config.json with model_type gpt2  GPT-2's own vocabulary, which tiktoken downloads

Beside it, tokenizer_config.json, special_tokens_map.json and added_tokens.json may add tokens and say which are
special.  generation_config.json, config.json or tokenizer_config.json names the token that ends a text.
"""

import base64
import itertools
import os
import re
import secrets
from dataclasses import dataclass, field

import tiktoken

import data.engines as engines
from plumbing.files import read_json, read_text, refuse_lfs_pointer, refuse_sentencepiece

END = "<|endoftext|>"
PROTECTED = str(10**19 + secrets.randbelow(10**19))  # before the id of a special token whose name is text


@dataclass(eq=False)
class Tokenizer:
    """Text -> ids -> text, for one model.

    end, begin    the id that ends a text, and the one that begins it, or None
    vocab_size    how many ids there are for which the model has an embedding
    """

    engine: engines.TiktokenEngine | engines.HubEngine
    ends: list[int]  # all ids that end a text
    special: dict[str, int]  # {name: id} of the special tokens
    prefix: list[int] = ()  # the ids before a text
    rows: int | None = None  # of the model's table
    roles: dict[str, str] = field(default_factory=dict)  # {"bos_token": name, ...}, as tokenizer_config.json says
    chat_template: str | None = None  # in Jinja

    def __post_init__(self):
        self.end = self.ends[0]
        self.begin = self.prefix[0] if self.prefix else None
        self.vocab_size = min(self.engine.size, self.rows or self.engine.size)
        self._name_of = {i: name for name, i in self.special.items()}
        self._names = engines.any_of(self.special)
        self.bos_token = self.roles.get("bos_token") or self._name_of.get(self.begin)
        self.eos_token = self.roles.get("eos_token") or self._name_of.get(self.end)

    def encode(self, text: str) -> list[int]:
        """Ids of a text.  Raises ValueError for a token that the model has no embedding for."""
        return self._checked(self.engine.encode(text))

    def prompt(self, text: str) -> list[int]:
        """Ids of a text that something will follow, behind the token that begins a text.  There is at least one."""
        return self._checked([*self.prefix, *self.engine.encode(text)] or [self.end])

    def protect(self, text: str) -> str:
        """A user's text for a chat template: `encode_chat` will read it as text, whatever names are in it."""
        return self._names.sub(lambda m: f"{PROTECTED}:{self.special[m[0]]}.", text)

    def encode_chat(self, text: str) -> list[int]:
        """Ids of a rendered chat template: names of special tokens are special, except in texts from `protect`."""
        text = self._names.sub(lambda m: engines.secret_name(self.special[m[0]]), text)
        return self._checked(self.engine.encode(self._with_names(PROTECTED, text)))

    def decode(self, ids: list[int]) -> str:
        """Ids -> text.  Ids beyond the tokenizer's are left out: a model's table may have spare rows."""
        return self._with_names(engines.SECRET, self.engine.decode([i for i in ids if i < self.engine.size]))

    def words(self, ids: list[int]) -> list[str]:
        """The text of each id, on one line."""
        return [self.decode([i]).replace("\n", "\\n") for i in ids]

    def _with_names(self, number, text):
        """Put the names of special tokens where a number and their id stand for them."""
        return re.sub(rf"{number}:(\d+)\.", lambda m: self._name_of[int(m[1])], text)

    def _checked(self, ids):
        if self.vocab_size < self.engine.size and max(ids, default=0) >= self.vocab_size:
            i = max(ids)
            name = self.decode([i])
            raise ValueError(f"the text has the token {name[:80]!r}, id {i}, but the model only {self.vocab_size} ids")
        return ids

    @classmethod
    def load(cls, folder: str) -> "Tokenizer":
        """The tokenizer of a model's folder.  Raises OSError or ValueError if there is none that we can read."""
        files = TokenizerFiles(folder)
        vocab = files.path("tokenizer.json", "vocab.json", "encoder.json")
        ranks = files.path("tokenizer.model", os.path.join("original", "tokenizer.model"))
        if words := files.path("words.json"):
            return cls.of_words(read_json(words))
        if vocab:
            try:
                return cls.of_vocabulary(files, vocab)
            except ModuleNotFoundError:
                if not ranks or not read_ranks(ranks):
                    raise
        if ranks:
            return cls.of_llama3(files, ranks)
        if files.config.get("model_type") == "gpt2":
            return cls.of_tiktoken(files, "gpt2")
        raise FileNotFoundError(f"no tokenizer in {folder}: it needs tokenizer.json, vocab.json or tokenizer.model")

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
        engine = engines.TiktokenEngine(engines.WORDS, ranks, {engines.secret_name(end): end})
        return cls(engine, [end], {END: end}, [end])

    @classmethod
    def of_vocabulary(cls, files: "TokenizerFiles", path: str) -> "Tokenizer":
        """The tokenizer of tokenizer.json, or of GPT-2's vocab.json, and of the files beside it."""
        content = read_json(path)
        try:
            if os.path.basename(path) != "tokenizer.json":
                content = describe_gpt2(files, content)
            added = added_tokens(files, content)
            engine = engines.make_engine(content, added)
            prefix = engines.prefix_ids(content.get("post_processor"))
        except ModuleNotFoundError as e:
            raise ModuleNotFoundError(f"{path} {e}") from None
        except Exception as e:  # the package tokenizers raises plain Exceptions
            message = str(e) if type(e) is ValueError else f"{type(e).__name__}: {e}"
            raise ValueError(f"{path} cannot be read: {message}".replace("\n", " ")[:300]) from None
        special = {name: token["id"] for name, token in added.items() if token["special"]}
        return cls._of_files(files, engine, special, prefix, END)

    @classmethod
    def of_llama3(cls, files: "TokenizerFiles", path: str) -> "Tokenizer":
        """The tokenizer of Llama 3's tokenizer.model: lines of base64 and rank, then 256 special tokens.

        Names that tokenizer_config.json does not give are those of Llama 3.0; the others are reserved.
        """
        ranks = read_ranks(path)
        if ranks is None:
            refuse_sentencepiece(path)
            raise ValueError(f"{path} is broken: it has no lines of base64 and rank")
        special = {}
        reserved = (f"<|reserved_special_token_{i}|>" for i in itertools.count())
        for i in range(256):
            name = LLAMA3_SPECIAL.get(i) or next(reserved)
            token = files.decoder.get(str(len(ranks) + i), {"content": name})
            special[token["content"]] = len(ranks) + i
        names = {engines.secret_name(i): i for i in special.values()}
        try:
            engine = engines.TiktokenEngine(engines.LLAMA3, ranks, names)
        except ValueError as e:
            raise ValueError(f"{path} is broken: {e}") from None
        begin = special.get(LLAMA3_SPECIAL[0], len(ranks))
        return cls._of_files(files, engine, special, [begin], LLAMA3_SPECIAL[1])

    @classmethod
    def of_tiktoken(cls, files: "TokenizerFiles", name: str) -> "Tokenizer":
        """An encoding that tiktoken downloads, or has in TIKTOKEN_CACHE_DIR."""
        try:
            encoding = tiktoken.get_encoding(name)
        except OSError as e:
            missing = f"no vocab.json in {files.folder}, and tiktoken could not download it ({type(e).__name__})"
            raise FileNotFoundError(f"{missing}: put {name}'s vocab.json and merges.txt there") from None
        end = encoding.eot_token
        engine = engines.TiktokenEngine(engines.GPT2, encoding._mergeable_ranks, {engines.secret_name(end): end})
        return cls._of_files(files, engine, {END: end}, [], END)

    @classmethod
    def _of_files(cls, files, engine, special, prefix, default_end):
        """A tokenizer with the end, the roles and the chat template that a folder's files name."""
        rows = files.config.get("vocab_size")
        rows = rows if type(rows) is int and rows > 0 else None
        ends = find_ends(files, engine, special, min(engine.size, rows or engine.size), default_end)
        return cls(engine, ends, special, prefix, rows, files.roles(), files.chat_template())


# -- A folder's files --------------------------------------------------------------------------------------------------


class TokenizerFiles:
    """The JSON files of a model's folder that say something about its tokenizer, each {} where it is missing."""

    def __init__(self, folder: str):
        self.folder = folder
        self.config = self.read("config.json")
        self.generation_config = self.read("generation_config.json")
        self.tokenizer_config = self.read("tokenizer_config.json")
        self.special_tokens_map = self.read("special_tokens_map.json")
        self.added = self.read("added_tokens.json")  # {name: id}
        self.decoder = self.tokenizer_config.get("added_tokens_decoder") or {}  # {id: {"content": name, ...}}
        entries = self.decoder.values() if isinstance(self.decoder, dict) else [None]
        if not all(isinstance(entry, dict) and isinstance(entry.get("content"), str) for entry in entries):
            raise ValueError(f"{folder}: added_tokens_decoder in tokenizer_config.json is not {{id: token}}")

    def path(self, *names: str) -> str | None:
        """The first of these files that is there."""
        paths = (os.path.join(self.folder, name) for name in names)
        return next((path for path in paths if os.path.exists(path)), None)

    def read(self, name: str) -> dict:
        """The content of a JSON file."""
        path = self.path(name)
        content = read_json(path) if path else {}
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not a JSON object")
        return content

    def roles(self) -> dict[str, str]:
        """{"bos_token": name, ...}: the tokens that have a role."""
        roles = {**self.special_tokens_map, **{k: v for k, v in self.tokenizer_config.items() if v is not None}}
        return {role: token_name(x) for role, x in roles.items() if role.endswith("_token") and token_name(x)}

    def special_names(self) -> set[str]:
        """The names of all tokens that are said to be special, except in tokenizer.json."""
        names = {entry["content"] for entry in self.decoder.values() if entry.get("special")}
        for source in (self.special_tokens_map, self.tokenizer_config):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                tokens = source.get(key) or []
                names.update(map(token_name, tokens.values() if isinstance(tokens, dict) else tokens))
        return {*names, *self.roles().values()} - {None}

    def chat_template(self) -> str | None:
        """The template of chat_template.jinja or tokenizer_config.json; of several, the one that is named "default"."""
        if path := self.path("chat_template.jinja"):
            return read_text(path)
        template = self.tokenizer_config.get("chat_template")
        if isinstance(template, list):
            templates = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = templates[0].get("template") if templates else None
        return template if isinstance(template, str) else None


def token_name(token: str | dict | None) -> str | None:
    """The name of a token in tokenizer_config.json, which is a string, or {"content": name, ...}."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) and name else None


def find_ends(files: TokenizerFiles, engine: object, special: dict[str, int], size: int, default: str) -> list[int]:
    """The ids that end a text, where transformers looks for them.  Raises ValueError if no file names one.

    The order: generation_config.json, config.json, the eos_token of tokenizer_config.json, the name `default`, and what
    transformers assumes for a config.json that says nothing.
    """
    for content, file in ((files.generation_config, "generation_config.json"), (files.config, "config.json")):
        ends = content.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        if ends and ends != [None]:
            if not all(type(end) is int and 0 <= end < size for end in ends):
                path = os.path.join(files.folder, file)
                raise ValueError(f"{path} has eos_token_id {str(content['eos_token_id'])[:80]}, of {size} tokens")
            return ends
    eos = files.roles().get("eos_token", default)
    end = special.get(eos, engine.id_of(eos))
    if end is None and "eos_token_id" not in files.config:
        end = {"gpt2": 50256, "llama": 2}.get(files.config.get("model_type"))
    if end is None or end >= size:
        missing = f"there is no {eos[:80]}, and no eos_token_id in generation_config.json or config.json"
        raise ValueError(f"{files.folder} does not say which token ends a text: {missing}")
    return [end]


def added_tokens(files: TokenizerFiles, content: dict) -> dict[str, dict]:
    """{name: entry} of all added tokens, as in tokenizer.json: those listed there, and those of the files beside it.

    tokenizer.json decides about ids, tokenizer_config.json about what is special.
    """
    vocab = engines.vocabulary(content["model"])
    special = files.special_names()
    listed = {entry["content"]: entry for entry in content.get("added_tokens") or []}
    others = {name: {"id": i} for name, i in files.added.items()}
    others.update({entry["content"]: {**entry, "id": int(i)} for i, entry in files.decoder.items()})
    for name in special & vocab.keys():
        others.setdefault(name, {"id": vocab[name]})
    added = {}
    owner = {i: token for token, i in vocab.items()}
    for name in {**listed, **others}:
        known = listed.get(name, {})
        entry = {"normalized": name not in special, "special": False, **known, **others.get(name, {}), "content": name}
        entry["id"] = known.get("id", vocab.get(name, entry["id"]))
        entry["special"] = entry["special"] or name in special
        for flag in ("single_word", "lstrip", "rstrip"):
            entry.setdefault(flag, False)
        if not isinstance(name, str) or not name or type(entry["id"]) is not int:
            raise ValueError(f"{str(name)[:80]!r} with id {str(entry['id'])[:80]} is no added token")
        if owner.setdefault(entry["id"], name) != name:
            raise ValueError(f"the added token {name[:80]!r} has id {entry['id']}, as {owner[entry['id']][:80]!r} has")
        added[name] = entry
    for name in engines.ordinary_tokens(content["model"]):
        if name in added and added[name]["special"]:
            del added[name]
    return dict(sorted(added.items(), key=lambda item: item[1]["id"]))


# -- GPT-2's kind ------------------------------------------------------------------------------------------------------


def describe_gpt2(files: TokenizerFiles, vocab: dict[str, int]) -> dict:
    """What a tokenizer.json would hold for vocab.json and merges.txt."""
    settings = files.tokenizer_config
    kind = str(settings.get("tokenizer_class") or "GPT2Tokenizer")
    if kind.removesuffix("Fast") not in ("GPT2Tokenizer", "PreTrainedTokenizer", "TokenizersBackend"):
        raise ValueError(f"{files.folder} has a {kind[:80]}, which needs its tokenizer.json")
    ids = {i for i in vocab.values() if type(i) is int and 0 <= i < 2**31} if isinstance(vocab, dict) else set()
    if len(ids) < len(vocab):
        raise ValueError("it is not {token: id}, with different whole numbers")
    if not all(char in vocab for char in engines.gpt2_chars().values()):
        raise ValueError("it lacks some of the 256 bytes: it is no vocabulary of GPT-2's kind")
    sequence = [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {}
    if settings.get("add_bos_token") is True:
        bos = files.roles().get("bos_token", END)
        i = next((i for i, token in files.decoder.items() if token["content"] == bos), None)
        special = {bos: {"id": bos, "ids": [int({**files.added, **vocab}.get(bos, i))], "tokens": [bos]}}
        sequence.insert(0, {"SpecialToken": {"id": bos, "type_id": 0}})
    prefix = {"type": "TemplateProcessing", "single": sequence, "pair": sequence, "special_tokens": special}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": vocab[END], "content": END, "special": True}] if END in vocab else [],
        "pre_tokenizer": {**byte_level, "add_prefix_space": settings.get("add_prefix_space") is True},
        "post_processor": prefix,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": read_merges(files, vocab)},
    }


def read_merges(files: TokenizerFiles, vocab: dict[str, int]) -> list[list[str]]:
    """The merges of merges.txt, the first one first.  Without that file, a token's id says how early it was merged."""
    if path := files.path("merges.txt", "vocab.bpe"):
        lines = read_text(path).split("\n")
        return [line.split(" ") for line in lines if line and not line.startswith("#version")]
    tokens = sorted(vocab.keys() - files.special_names() - {END}, key=vocab.get)
    pairs = ([token[:i], token[i:]] for token in tokens for i in range(1, len(token)))
    return [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]


# -- Llama 3's kind ----------------------------------------------------------------------------------------------------

LLAMA3_SPECIAL = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>",
                  9: "<|eot_id|>"}  # fmt: skip


def read_ranks(path: str) -> dict[bytes, int] | None:
    """{bytes: rank} of Llama 3's tokenizer.model, lines of base64 and rank.  None for a SentencePiece model."""
    refuse_lfs_pointer(path)
    try:
        with open(path, "rb") as f:
            return {base64.b64decode(token, validate=True): int(rank) for token, rank in map(bytes.split, f)}
    except ValueError:  # also binascii.Error, and lines of other than two words
        return None


def pieces(texts: list[str]) -> list[str]:
    """Every piece of the texts that is longer than a byte, sorted: the words of a word-level vocabulary."""
    # WORDS in the dialect of the standard library, which has no \p{}
    pattern = re.compile(r" ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s")
    words = {piece for text in texts for piece in pattern.findall(text)}
    return sorted(word for word in words if len(word.encode("utf-8")) > 1)
