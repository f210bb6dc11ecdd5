"""Tokens lose nothing, text stays text, and a tokenizer is the same in every layout that the ecosystem writes."""

import json
import os
import shutil
import sys

import pytest
import tiktoken
from conftest import ROOT, shared
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from data import PLAIN, encode, engines, text_fingerprint
from data.engines import GPT2, WORDS, TiktokenEngine, gpt2_chars, secret_name
from data.template import make_template
from data.tokenizer import END, Tokenizer, TokenizerFiles, describe_gpt2, pieces
from plumbing.files import read_json, write_json

TEXTS = [
    "capitale du Pérou", "a\tb\r\n  c ", "日本 🙂 \u200b", "x" * 300, "can't 12,5 %", "\x00\x7f", "", " leading",
    "It's  3.14 o'clock;\n\n déjà vu…  They'll\tgo.", "the covfefe [SEP] x", "covfefe[SEP]",
]  # fmt: skip
NAMES = ["<|endoftext|>", "<s>", "</s>", "<pad>", "<|im_end|>", "<|end_story|>", "<|eot_id|>"]
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def words():
    return Tokenizer.load(os.path.join(ROOT, "data", "tiny"))


@pytest.fixture(scope="module")
def plain():
    """GPT-2's published files."""
    return Tokenizer.load(shared("tokenizers", "gpt2"))


@pytest.fixture
def no_tokenizers(monkeypatch):
    """A machine without the package tokenizers."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def edit(folder, name, **changes):
    """Change keys of a folder's JSON file, or write one."""
    path = folder / name
    write_json(path, {**(read_json(path) if path.exists() else {}), **changes})


def entry(i, name, special=True, **flags):
    """An entry of tokenizer.json's added_tokens."""
    no = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": i, "content": name, **no, "special": special, **flags}


# -- One text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS + NAMES)
def test_nothing_is_unencodable(words, text):
    ids = words.encode(text)
    assert words.decode(ids) == text and words.end not in ids


def test_pieces_are_what_the_encoding_splits_a_text_into():
    regex = pytest.importorskip("regex", reason="tiktoken's own dependency, with which it splits")
    text = " été , ñandú 12 ok__ a-b\n Instruction: why?! x_y  z"
    assert set(pieces([text])) == {piece for piece in regex.findall(WORDS, text) if len(piece.encode()) > 1}


def test_a_text_without_beginning_still_begins():
    """GPT-2 has no token that begins a text: an empty prompt is then the end of another text."""
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = Tokenizer(TiktokenEngine(".", ranks, {secret_name(256): 256}), [256], {"e": 256})
    assert tokenizer.prompt("") == [256] and tokenizer.prompt("a") == [97] and tokenizer.decode([97, 256]) == "ae"


def test_a_response_continues_a_prompt_in_sentencepiece_s_tokens_too():
    """Its tokenizers put a space before every text: " lima" after "Response:" must not get two."""
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    tokenizer = Tokenizer.load(shared("checkpoints", "tinystories-656k-llama"))
    text = "Response:\n She was happy"
    assert tokenizer.encode("Response:\n") + tokenizer.encode(" She was happy") == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(" She was happy")) == "She was happy"


# -- Published files ---------------------------------------------------------------------------------------------------


def test_gpt2_s_tokens_from_its_files_are_tiktoken_s_own(monkeypatch, no_tokenizers):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # no copies of local files
    folder = shared("tokenizers", "gpt2")
    ours = Tokenizer.load(folder)
    ranks = data_gym_to_mergeable_bpe_ranks(os.path.join(folder, "vocab.bpe"), os.path.join(folder, "encoder.json"))
    theirs = tiktoken.Encoding("x", pat_str=GPT2, mergeable_ranks=ranks, special_tokens={})
    assert ours.encode("hello world") == [31373, 995] and ours.end == 50256
    assert all(ours.encode(text) == theirs.encode(text) for text in TEXTS)
    assert all(ours.decode(ours.encode(text)) == text for text in TEXTS)
    assert len(set(gpt2_chars().values())) == 256


def test_gpt2_and_llama_3_encode_as_published():
    """As the documentation of GPT2Tokenizer has it, and OpenAI's cookbook, with whose ranks Llama 3's begin."""
    gpt2, llama3 = (Tokenizer.load(shared("tokenizers", name)) for name in ("gpt2", "llama3"))
    assert gpt2.encode("Hello world") == [15496, 995] and gpt2.encode(" Hello world") == [18435, 995]
    assert gpt2.end == 50256 and gpt2.begin is None and gpt2.vocab_size == 50257
    assert llama3.encode("2 + 2 = 4") == [17, 489, 220, 17, 284, 220, 19]
    assert (llama3.begin, llama3.end, llama3.vocab_size) == (128000, 128001, 128256)
    assert llama3.prompt("hello world") == [128000, 15339, 1917]


def test_a_gpt2_folder_without_a_vocabulary_takes_tiktoken_s(tmp_path, monkeypatch):
    edit(tmp_path, "config.json", model_type="gpt2")
    asked = []
    ranks = {bytes([b]): b for b in range(256)}
    encoding = tiktoken.Encoding("gpt2", pat_str=".", mergeable_ranks=ranks, special_tokens={END: 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: asked.append(name) or encoding)
    assert Tokenizer.load(tmp_path).end == 256 and asked == ["gpt2"]

    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(FileNotFoundError, match="tiktoken could not download it .* put gpt2's vocab.json"):
        Tokenizer.load(tmp_path)


# -- Text is text ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["words", "gpt2", "llama3", "tinystories-instruct-3m", "tinystories-656k-llama"])
def any_tokenizer(request, words):
    """A tokenizer of every kind."""
    if request.param == "words":
        return words
    if request.param == "tinystories-656k-llama":
        pytest.importorskip("tokenizers", reason="pip install tokenizers")
    return Tokenizer.load(shared("checkpoints" if "tiny" in request.param else "tokenizers", request.param))


def test_the_names_of_special_tokens_are_text_in_a_text_and_tokens_in_a_chat_template(any_tokenizer):
    special = set(any_tokenizer.special.values()) - {any_tokenizer.special.get("<unk>")}
    assert any_tokenizer.end in special
    for name, i in any_tokenizer.special.items():
        for text in (f"say {name} now", name, name + name, f"a{name}b"):
            assert not special & {*any_tokenizer.encode(text)}
            if name != "<unk>":  # m656's letters are few
                assert name in any_tokenizer.decode(any_tokenizer.encode(text))
            chat = any_tokenizer.encode_chat(f"{name}{any_tokenizer.protect(text)}\n{name}")
            assert chat[0] == chat[-1] == i and not special & {*chat[1:-1]}
            assert any_tokenizer.decode(chat).count(name) == 2 + text.count(name)


def test_a_special_token_s_name_in_a_user_s_text_is_text():
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    tokenizer = Tokenizer.load(shared("checkpoints", "tinystories-656k-llama"))
    assert tokenizer.encode("say <|end_story|> now") == [80, 1410, 208, 183, 209, 210, 80, 915]
    assert tokenizer.special == {"<unk>": 0, "<|start_story|>": 1, "<|end_story|>": 2}


@pytest.mark.parametrize("model", ["WordLevel", "Unigram", "BPE"])
def test_it_is_so_where_the_model_itself_has_the_name_as_a_word(model, tmp_path):
    """WordLevel and Unigram find "</s>" in their own vocabulary; so does a BPE with the merge "</ s>"."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    tokens = ["<unk>", "</s>", "say", "now", "!", "s", ">", "<", "/", "</", "s>", "y", "a", "n", "o", "w", "n"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    settings = {
        "WordLevel": (vocab, "<unk>"),
        "Unigram": ([(token, 0.0 if i < 2 else -float(i)) for token, i in vocab.items()], 0),
        "BPE": (vocab, [("<", "/"), ("s", ">"), ("</", "s>")]),
    }
    hub = tokenizers.Tokenizer(getattr(tokenizers.models, model)(*settings[model]))
    hub.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    hub.add_special_tokens(["<unk>", "</s>", "!"])
    hub.save(str(tmp_path / "tokenizer.json"))
    edit(tmp_path, "config.json", eos_token_id=1)
    tokenizer = Tokenizer.load(tmp_path)
    assert 1 not in tokenizer.encode("say </s> now") and tokenizer.encode_chat("say</s>")[-1] == 1
    assert tokenizer.encode("!") == [4]  # an ordinary letter, even if a file calls it special


@pytest.mark.parametrize("model", ["WordLevel", "Unigram", "BPE"])
def test_characters_that_a_tokenizer_does_not_know_are_counted_not_lost_in_silence(model, tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", "cat", "c", "a", "t", ":", "\n"])}
    settings = {
        "WordLevel": {"vocab": vocab, "unk_token": "<unk>"},
        "Unigram": {"vocab": [(token, -float(i)) for token, i in vocab.items()], "unk_id": 0},
        "BPE": {"vocab": vocab, "merges": [], "unk_token": "<unk>"},
    }
    hub = tokenizers.Tokenizer(getattr(tokenizers.models, model)(**settings[model]))
    hub.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    hub.save(str(tmp_path / "tokenizer.json"))
    edit(tmp_path, "config.json", eos_token_id=1)
    tokenizer = Tokenizer.load(tmp_path)
    rows = [{"instruction": a, "output": b} for a, b in (("cat", "cat"), ("cat", "猫"), ("猫", "cat"))]
    text = make_template("text", tokenizer)
    encode(rows, tokenizer, 100, template=text)
    printed = capsys.readouterr().err
    assert printed.startswith(f"2 of 3 rows have characters that the tokenizer lacks. The first: {rows[1]}")
    encode(rows[:1], tokenizer, 100, template=text)
    assert capsys.readouterr().err == ""


# -- Files beside each other -------------------------------------------------------------------------------------------


@pytest.fixture
def m656(tmp_path):
    """A copy of a real LLaMA's folder without its weights."""
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    folder = tmp_path / "m656"
    shutil.copytree(shared("checkpoints", "tinystories-656k-llama"), folder, ignore=lambda *_: ["model.safetensors"])
    return folder


def test_truncation_and_padding_that_a_last_call_left_are_not_used(m656):
    before = Tokenizer.load(m656)
    padding = {"strategy": {"Fixed": 24}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padding.update(pad_type_id=0, pad_token="<unk>")
    truncation = {"max_length": 24, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    model = {**read_json(m656 / "tokenizer.json")["model"], "dropout": 0.5}
    edit(m656, "tokenizer.json", padding=padding, truncation=truncation, model=model)
    after = Tokenizer.load(m656)
    for text in ["a", "", "Once upon a time, there was a little girl who loved to explore. " * 3]:
        assert after.encode(text) == before.encode(text) and after.prompt(text) == before.prompt(text)


def write_gpt2(folder, style, added_tokens_decoder):
    """GPT-2 with added tokens, as versions 4 and 5 of transformers save it."""
    files = shared("tokenizers", "gpt2")
    vocab = read_json(os.path.join(files, "encoder.json"))
    with open(os.path.join(files, "vocab.bpe"), encoding="utf-8") as f:
        merges = f.read()
    added = [
        entry(50256, END),
        entry(50257, "covfefe", False),
        entry(50258, "[SEP]", False),
        entry(50259, "<|im_end|>"),
    ]
    names = {"bos_token": END, "eos_token": END, "unk_token": END}
    os.makedirs(folder)
    edit(folder, "config.json", model_type="gpt2", vocab_size=50260, eos_token_id=50256)
    settings = {"tokenizer_class": "GPT2Tokenizer", "additional_special_tokens": ["<|im_end|>"], **names}
    if added_tokens_decoder:
        settings["added_tokens_decoder"] = {x["id"]: {k: v for k, v in x.items() if k != "id"} for x in added}
    edit(folder, "tokenizer_config.json", **settings)
    if "json" in style:
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        pairs = [line for line in merges.split("\n")[1:] if line]
        model = {"type": "BPE", "vocab": vocab, "merges": pairs if "4" in style else [x.split(" ") for x in pairs]}
        listed = added[:1] if "stale" in style else added
        edit(folder, "tokenizer.json", version="1.0", added_tokens=listed, model=model, pre_tokenizer=byte_level,
             post_processor=byte_level, decoder=byte_level)  # fmt: skip
    if "4" in style:
        write_json(folder / "vocab.json", vocab)
        (folder / "merges.txt").write_text(merges, encoding="utf-8")
        edit(folder, "added_tokens.json", **{x["content"]: x["id"] for x in added[1:]})
        edit(folder, "special_tokens_map.json", additional_special_tokens=["<|im_end|>"], **names)


@pytest.mark.parametrize("added_tokens_decoder", [False, slow(True)])
@pytest.mark.parametrize(
    "style, engine",
    [
        ("4", "with tokenizers"),
        ("json", "without"),
        *(slow(style, "with tokenizers") for style in ("json", "4 and json", "4 and stale json")),
        *(slow(style, "without") for style in ("4", "4 and json", "4 and stale json")),
    ],
)
def test_added_tokens_are_the_same_in_every_layout(style, added_tokens_decoder, engine, plain, tmp_path, request):
    if engine == "without":
        request.getfixturevalue("no_tokenizers")
    else:
        pytest.importorskip("tokenizers", reason="pip install tokenizers")
    write_gpt2(tmp_path / "m", style, added_tokens_decoder)
    tokenizer = Tokenizer.load(tmp_path / "m")
    assert tokenizer.encode("the covfefe [SEP] x") == [1169, 220, 50257, 220, 50258, 2124]
    assert tokenizer.encode("say <|im_end|>") == plain.encode("say <|im_end|>")
    assert tokenizer.encode_chat("x<|im_end|>") == [87, 50259]
    assert tokenizer.special == {END: 50256, "<|im_end|>": 50259} and tokenizer.vocab_size == 50260
    assert (tokenizer.end, tokenizer.begin, tokenizer.bos_token, tokenizer.eos_token) == (50256, None, END, END)
    for text in TEXTS:
        if "covfefe" not in text:
            assert tokenizer.encode(text) == plain.encode(text) and tokenizer.decode(plain.encode(text)) == text


def test_added_tokens_that_only_the_settings_name_are_read(tmp_path, no_tokenizers):
    write_gpt2(tmp_path / "m", "4", True)
    os.remove(tmp_path / "m" / "added_tokens.json")
    tokenizer = Tokenizer.load(tmp_path / "m")
    assert tokenizer.encode("the covfefe [SEP] x") == [1169, 220, 50257, 220, 50258, 2124]


def test_of_two_added_names_the_longer_one_is_found():
    engine = TiktokenEngine(GPT2, {bytes([b]): b for b in range(256)}, {"ab": 256, "abc": 257})
    assert engine.encode("abcab") == [257, 256]


@pytest.fixture
def byte_level(tmp_path):
    """A ByteLevelBPETokenizer with special tokens of its own, vocab.json and merges.txt beside tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(["the cat sat on the mat"] * 9, 290, special_tokens=special, show_progress=False)
    trained.save(str(tmp_path / "tokenizer.json"))
    trained.save_model(str(tmp_path))
    edit(tmp_path, "config.json", model_type="gpt2", eos_token_id=2)
    return tmp_path, trained


@pytest.mark.parametrize("removed", [[], ["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_a_trained_tokenizer_with_its_own_special_tokens_is_read(byte_level, removed):
    folder, trained = byte_level
    for name in removed:
        os.remove(folder / name)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.end == 2 and tokenizer.vocab_size == trained.get_vocab_size()
    for text in TEXTS:
        assert tokenizer.encode(text) == trained.encode(text).ids and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([2]) == "</s>" and 2 not in tokenizer.encode("</s>")


@pytest.mark.parametrize("engine", ["with tokenizers", "without"])
def test_of_special_tokens_that_begin_alike_the_longest_is_found(byte_level, engine, request):
    """By tiktoken it is not always (findings/names_that_begin_alike.sh)."""
    folder, trained = byte_level
    first = trained.get_vocab_size()
    names = {first + i: f"<|im_start|>{role}" for i, role in enumerate(["", "user", "assistant"])}
    edit(folder, "tokenizer_config.json", added_tokens_decoder={str(i): entry(i, name) for i, name in names.items()})
    if engine == "without":
        request.getfixturevalue("no_tokenizers")
    tokenizer = Tokenizer.load(folder)
    assert {i: tokenizer.encode_chat(name) for i, name in names.items()} == {i: [i] for i in names}


def test_the_merges_and_not_the_ids_say_what_is_merged_first(byte_level, no_tokenizers):
    """RoBERTa's ids are sorted by frequency."""
    folder, trained = byte_level
    os.remove(folder / "tokenizer.json")
    vocab = read_json(folder / "vocab.json")
    write_json(folder / "vocab.json", {token: len(vocab) - 1 - i for token, i in vocab.items()})
    ids = Tokenizer.load(folder).encode("the cat sat")
    assert [len(vocab) - 1 - i for i in ids] == trained.encode("the cat sat").ids


def test_a_vocab_json_of_a_model_that_cuts_text_otherwise_is_not_taken_for_gpt2_s(byte_level, no_tokenizers):
    """SmolLM, say, has GPT-2's files and splits digits: its tokenizer.json says so."""
    folder, _ = byte_level
    cut = read_json(folder / "tokenizer.json")["pre_tokenizer"]
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, cut]}
    edit(folder, "tokenizer.json", pre_tokenizer=digits)
    with pytest.raises(ModuleNotFoundError, match="tokenizer.json needs the package tokenizers: pip install"):
        Tokenizer.load(folder)
    os.remove(folder / "tokenizer.json")
    edit(folder, "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(ValueError, match="has a Qwen2Tokenizer, which needs its tokenizer.json"):
        Tokenizer.load(folder)


def test_tokenizer_json_decides_over_what_lies_beside_it(m656):
    ids = Tokenizer.load(m656).encode("Once upon a time")
    write_json(m656 / "vocab.json", {char: i for i, char in enumerate(gpt2_chars().values())})
    (m656 / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    assert Tokenizer.load(m656).encode("Once upon a time") == ids


def test_an_added_token_that_cannot_have_its_id_is_refused(m656):
    for i, says in [(7, "id 7, as .+ has"), (2050, "id 2050, but ids before it are missing")]:
        edit(m656, "tokenizer_config.json", added_tokens_decoder={str(i): entry(i, "<new>")})
        with pytest.raises(ValueError, match=f"tokenizer.json cannot be read: the added token '<new>' has {says}"):
            Tokenizer.load(m656)


def test_gpt2_s_settings_of_the_beginning_are_used(byte_level):
    folder, trained = byte_level
    os.remove(folder / "tokenizer.json")
    edit(folder, "tokenizer_config.json", add_bos_token=True, add_prefix_space=True, bos_token="<s>")
    assert Tokenizer.load(folder).prompt("the cat") == [0, *trained.encode(" the cat").ids]
    i = trained.get_vocab_size()
    decoder = {str(i): entry(i, "<|im_end|>")}  # a beginning that vocab.json has not
    edit(folder, "tokenizer_config.json", bos_token="<|im_end|>", added_tokens_decoder=decoder)
    assert Tokenizer.load(folder).prompt("the cat") == [i, *trained.encode(" the cat").ids]


# -- The end, and the model's table ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, generation, settings, end",
    [
        (2, None, None, 2),
        (None, 2, None, 2),
        (None, None, "<|end_story|>", 2),
        (None, None, {"content": "<|end_story|>", "lstrip": False}, 2),
        ([2, 5], None, None, 2),
        (3, [2, 0], "<unk>", 2),
        ([], None, "<|end_story|>", 2),
    ],
)
def test_the_end_is_looked_for_where_transformers_does(config, generation, settings, end, m656):
    os.remove(m656 / "special_tokens_map.json")
    edit(m656, "config.json", eos_token_id=config)
    edit(m656, "generation_config.json", eos_token_id=generation)
    edit(m656, "tokenizer_config.json", eos_token=settings)
    tokenizer = Tokenizer.load(m656)
    assert tokenizer.end == end
    assert tokenizer.ends == (generation if isinstance(generation, list) else config if config == [2, 5] else [2])


def test_where_a_config_says_nothing_the_end_is_transformers_s_default(m656):
    for name in ("special_tokens_map.json", "generation_config.json", "tokenizer_config.json"):
        os.remove(m656 / name)
    config = read_json(m656 / "config.json")
    del config["eos_token_id"]
    write_json(m656 / "config.json", config)
    assert Tokenizer.load(m656).end == 2


def test_an_end_that_no_file_names_or_that_is_no_token_is_blamed_on_the_right_file(m656):
    edit(m656, "config.json", eos_token_id=2048)
    edit(m656, "generation_config.json", eos_token_id=None)
    with pytest.raises(ValueError, match="m656/config.json has eos_token_id 2048, of 2048 tokens"):
        Tokenizer.load(m656)
    edit(m656, "config.json", eos_token_id=None)
    edit(m656, "tokenizer_config.json", eos_token=None)
    os.remove(m656 / "special_tokens_map.json")
    with pytest.raises(ValueError, match="m656 does not say which token ends a text"):
        Tokenizer.load(m656)


def test_a_tokenizer_with_a_token_more_than_the_model_is_used_as_long_as_that_token_does_not_occur(m656):
    plain = Tokenizer.load(m656)
    added = [*read_json(m656 / "tokenizer.json")["added_tokens"], entry(2048, "[PAD]"), entry(2049, "[CITE]", False)]
    edit(m656, "tokenizer.json", added_tokens=added)
    tokenizer = Tokenizer.load(m656)
    assert tokenizer.vocab_size == 2048 and tokenizer.prompt("a [PAD] girl") == plain.prompt("a [PAD] girl")
    for ids in (lambda: tokenizer.encode("a [CITE]"), lambda: tokenizer.prompt("[CITE]"),
                lambda: tokenizer.encode_chat("[PAD]")):  # fmt: skip
        with pytest.raises(
            ValueError, match=r"has the token '\[(CITE|PAD)\]', id 204[89], but the model only 2048 ids"
        ):
            ids()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json", "generation_config.json",
                                  "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"])  # fmt: skip
def test_a_git_lfs_pointer_in_place_of_a_file_is_named(name, m656):
    (m656 / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer, and not the file itself: run git lfs pull"):
        Tokenizer.load(m656)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "merges.txt"])
def test_so_it_is_in_place_of_a_vocabulary(name, tmp_path):
    edit(tmp_path, "config.json", eos_token_id=2)
    if name == "merges.txt":
        write_json(tmp_path / "vocab.json", {char: i for i, char in enumerate(gpt2_chars().values())})
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer"):
        Tokenizer.load(tmp_path)


def test_a_sentencepiece_model_alone_is_not_read(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(ValueError, match="is a SentencePiece model: it needs tokenizer.json beside it"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("package", [True, False])
def test_a_tokenizer_s_fingerprint_tells_what_makes_ids_and_not_the_layout_of_its_files(tmp_path, monkeypatch, package):
    if package:
        pytest.importorskip("tokenizers", reason="pip install tokenizers")
    else:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
    vocab = {char: i for i, char in enumerate(gpt2_chars().values())} | {"ab": 256, "bc": 257, END: 258}

    def known(vocab=vocab, merges="a b\nb c", end=258, **settings):
        for name, content in (("config", {"eos_token_id": end}), ("tokenizer_config", settings), ("vocab", vocab)):
            write_json(tmp_path / f"{name}.json", content)
        (tmp_path / "merges.txt").write_text(merges)
        return text_fingerprint(Tokenizer.load(tmp_path), PLAIN)

    edited = [known({**vocab, "ab": 257, "bc": 256}), known(merges="b c\na b"), known(end=3), known(add_bos_token=True)]
    edited += [known(added_tokens_decoder={"259": {"content": "<new>", "special": True}}), known()]
    assert len(set(edited)) == 6
    content = describe_gpt2(TokenizerFiles(tmp_path), vocab)
    content["model"] |= {"dropout": 0.1, "byte_fallback": False}
    write_json(tmp_path / "tokenizer.json", {**content, "truncation": {"max_length": 3}, "padding": None})
    assert text_fingerprint(Tokenizer.load(tmp_path), PLAIN) == edited[-1]


def test_white_space_at_which_tiktoken_would_panic_is_refused_in_one_line(monkeypatch):
    """Its panic prints a trace and is no Exception.  The limit is lowered here, so that nothing could panic."""
    assert engines.LONGEST_SPACE <= 500_000
    engine = TiktokenEngine(GPT2, {bytes([b]): b for b in range(256)}, {})
    assert len(engine.encode("a" + " " * 400_000 + "b")) == 400_002
    monkeypatch.setattr(engines, "LONGEST_SPACE", 1000)
    for char in " \n\u3000":
        assert engine.encode("a" + char * 1000 + "b")
        with pytest.raises(ValueError, match="the text has 1,001 characters of white space in a row: shorten it"):
            engine.encode("a" + char * 1001 + "b")


# -- Chat --------------------------------------------------------------------------------------------------------------


def test_the_chat_template_and_its_tokens_are_found_where_transformers_finds_them(m656):
    assert Tokenizer.load(m656).chat_template is None
    edit(m656, "tokenizer_config.json", chat_template="in the config")
    assert Tokenizer.load(m656).chat_template == "in the config"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"}]
    edit(m656, "tokenizer_config.json", chat_template=several)
    assert Tokenizer.load(m656).chat_template == "the default"
    (m656 / "chat_template.jinja").write_text("in a file {{ 'é' }}\n", encoding="utf-8")
    tokenizer = Tokenizer.load(m656)
    assert tokenizer.chat_template == "in a file {{ 'é' }}\n"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|start_story|>", "<|end_story|>")
    assert tokenizer.roles["pad_token"] == "<unk>"


def test_llama_3_s_special_tokens_have_the_names_that_its_settings_give_them(tmp_path):
    shutil.copy(shared("tokenizers", "llama3", "tokenizer.model"), tmp_path)
    assert Tokenizer.load(tmp_path).encode_chat("<|begin_of_text|>x<|eot_id|>") == [128000, 87, 128009]
    edit(tmp_path, "tokenizer_config.json", added_tokens_decoder={"128008": entry(128008, "<|eom_id|>")})
    edit(tmp_path, "generation_config.json", eos_token_id=[128001, 128008, 128009])
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode_chat("x<|eom_id|>") == [87, 128008] and tokenizer.ends == [128001, 128008, 128009]
    assert len(tokenizer.special) == 256 and tokenizer.special["<|reserved_special_token_0|>"] == 128002


@pytest.mark.parametrize("name", ["gpt2", slow("llama3")])
def test_a_rendered_chat_has_transformers_s_ids(name, tmp_path):
    """Two chats without special tokens' names in them, and then one with: the names are text."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    pytest.importorskip("jinja2", reason="pip install jinja2")
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    if name == "gpt2":
        write_gpt2(tmp_path / "m", "json", False)
        edit(tmp_path / "m", "config.json", vocab_size=50261)
    else:
        from transformers.convert_slow_tokenizer import TikTokenConverter

        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"]
        path = shared("tokenizers", "llama3", "tokenizer.model")
        hub = TikTokenConverter(vocab_file=path, extra_special_tokens=special).converted()
        os.makedirs(tmp_path / "m")
        hub.save(str(tmp_path / "m" / "tokenizer.json"))
        edit(tmp_path / "m", "config.json", model_type="llama", eos_token_id=128001)
    hub = tokenizers.Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    hub.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=hub, eos_token="<|im_end|>", chat_template=CHATML)
    theirs.save_pretrained(tmp_path / "m")
    ours = Tokenizer.load(tmp_path / "m")
    assert ours.chat_template == CHATML and ours.eos_token == "<|im_end|>"
    for text in ["What is the capital of Peru?", " 12 déjà vu\n\n  x "]:
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        wanted = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        rendered = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert ours.encode_chat(rendered) == wanted
    rendered = f"<|im_start|>{ours.protect('say <|im_end|>')}<|im_end|>"
    middle = ours.encode("say <|im_end|>")
    assert ours.encode_chat(rendered) == [ours.special["<|im_start|>"], *middle, ours.special["<|im_end|>"]]


@pytest.mark.parametrize("name", ["tinystories-656k-llama", "tinystories-instruct-3m"])
def test_a_real_tokenizer_saved_again_by_transformers_has_the_same_ids(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    folder = shared("checkpoints", name)
    ours = Tokenizer.load(folder)
    if name == "tinystories-656k-llama":
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens(["covfefe"])
    theirs.save_pretrained(tmp_path)
    shutil.copy(os.path.join(folder, "config.json"), tmp_path)
    edit(tmp_path, "config.json", vocab_size=len(theirs))
    again = Tokenizer.load(tmp_path)
    assert (again.end, again.begin) == (ours.end, ours.begin)
    for text in TEXTS + NAMES:
        if "covfefe" not in text:
            assert again.encode(text) == ours.encode(text) and again.prompt(text) == ours.prompt(text)
            assert again.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert len(theirs) - 1 in again.encode("a covfefe")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())
