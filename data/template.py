"""The text that a model reads and continues: one plain layout for every model, or the chat template of its tokenizer.

template(row)                      the plain layout, as text
make_template("plain", tokenizer)  the plain layout, as token ids
make_template("chat", tokenizer)   the layout that an instruction-tuned model knows: its tokenizer's Jinja template
make_template("text", tokenizer)   no layout: the output goes on where the instruction ends, as in a corpus
"""

import datetime
import importlib.metadata
import json
import re
import sys
from collections.abc import Callable

from data.tokenizer import Tokenizer

SEPARATOR = " "  # between "Response:" and the answer


def template(row: dict) -> str:
    """The plain layout: what a model reads before it answers.  " " + output follows, then the end of the text.

    Earlier turns stand before the instruction.  Their authors are named, unless there is just one question.
    """
    text = row["instruction"]
    if row.get("history"):
        turns = [(turn["role"], turn["content"]) for turn in row["history"]] + [("user", text)] * bool(text)
        single = sum(role != "system" for role, _ in turns) == 1
        text = "\n".join(content if single else f"{role.capitalize()}: {content}" for role, content in turns)
    middle = f"Input: {row['input']}\n" if row.get("input") else ""
    return f"Instruction: {text}\n{middle}Response:"


def question(row: dict) -> str:
    """What a row asks: its earlier turns, instruction and input, without any layout."""
    texts = [turn["content"] for turn in row.get("history", [])] + [row["instruction"], row.get("input")]
    return "\n".join(text for text in texts if text)


class Template:
    """The plain layout as token ids.  A subclass is another layout.  ValueError: the row asks nothing."""

    remark = ""  # what train.py says of it
    about = "Input: {}\nResponse:"  # how the input stands at a prompt's end

    def text(self, row: dict) -> str:
        """What is read, as text; a subclass may have ids alone."""
        if not question(row):
            raise ValueError("it asks nothing (--template text learns outputs as plain text, of a corpus say)")
        return template(row)

    def prompt_ids(self, row: dict, tokenizer: Tokenizer) -> list[int]:
        """Ids of what is read: everything before the answer."""
        return tokenizer.prompt(self.text(row))

    def split_ids(self, row: dict, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """`prompt_ids` in two parts, the instruction and what follows it.  The first does not depend on the second.

        Raises ValueError for a row without an input: nothing would follow.
        """
        if not row.get("input", "").strip():
            raise ValueError("a hidden instruction wants an input behind it (--input; or --skip-bad, in training)")
        first, rest = self._halves(row, tokenizer)
        whole = self.prompt_ids(row, tokenizer)
        return first, whole[len(first) :] if whole[: len(first)] == first else rest

    def parts(self, row: dict, tokenizer: Tokenizer, hide: bool) -> tuple[list[int], list[int]]:
        """(the instruction that is to be hidden, what follows it), or ([], `prompt_ids`) if nothing is."""
        return self.split_ids(row, tokenizer) if hide else ([], self.prompt_ids(row, tokenizer))

    def _halves(self, row: dict, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        text, rest = self.text(row), self.about.format(row["input"]).rstrip(" ")
        return tokenizer.prompt(text.removesuffix(rest)), tokenizer.encode(rest)

    def response_ids(self, row: dict, tokenizer: Tokenizer) -> list[int]:
        """Ids of what is learned: the row's output, and the id that ends it."""
        return tokenizer.encode(SEPARATOR + row["output"].rstrip()) + [self.end_id(tokenizer)] * row.get("end", True)

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The id that ends an answer."""
        return tokenizer.end

    def tail_size(self, tokenizer: Tokenizer) -> int:
        """How many tokens stand after a prompt's last text.  They stay when a prompt is shortened."""
        return len(tokenizer.encode("\nResponse:"))

    def answer_text(self, ids: list[int], tokenizer: Tokenizer, row: dict | None = None) -> str:
        """The answer to a row in generated ids, as `output` would have it: its indentation stays."""
        return decode_after(":", ids, tokenizer).removeprefix(SEPARATOR).rstrip()


class TextTemplate(Template):
    """No layout: an output goes on where the prompt ends, with a space between two words.

    The last spaces of a prompt belong to the output: in most vocabularies a space begins a word.
    """

    remark = ", as plain text: nothing stands around prompt and output (--template text)"
    about = "{}"

    def text(self, row: dict) -> str:
        return question(row).rstrip(" ")

    def response_ids(self, row: dict, tokenizer: Tokenizer) -> list[int]:
        output = row["output"].rstrip()
        ids = encode_after(":", self._gap(row, output) + output, tokenizer)
        return ids + [self.end_id(tokenizer)] * row.get("end", True)

    def _gap(self, row: dict, output: str = "") -> str:
        """What stands between the prompt's text and an output."""
        asked = question(row)
        is_apart = asked[-1:].isspace() or output[:1].isspace()
        return asked[len(self.text(row)) :] or SEPARATOR * (not is_apart)

    def tail_size(self, tokenizer: Tokenizer) -> int:
        return sys.maxsize  # a long prompt loses its beginning: its end is what the output follows

    def answer_text(self, ids: list[int], tokenizer: Tokenizer, row: dict | None = None) -> str:
        gap = self._gap(row) if row else SEPARATOR
        return decode_after(":", ids, tokenizer).removeprefix(gap).rstrip()


class ChatTemplate(Template):
    r"""The tokenizer's chat template.  Raises ValueError if there is none, or if it cannot be used.

    Names of special tokens are special where the template writes them, and text where a row has them.

    end     id of the first special token that the template writes after an answer
    lead    text that it writes between the prompt and an answer, if any ("<think>\n\n</think>\n\n")
    close   text between an answer and its end, if any
    tail    text between the user's last word and an answer
    """

    def __init__(self, tokenizer: Tokenizer):
        if not tokenizer.chat_template:
            raise ValueError("--template chat: this model's tokenizer has no chat template. Leave the option out")
        names = {**tokenizer.roles, "bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        self.names = {role: name for role, name in names.items() if name}
        self.jinja = compile_jinja(tokenizer.chat_template)
        question = [{"role": "user", "content": "QUESTION"}]
        asked = self._render(question, True, tokenizer)
        answered = self._render([*question, {"role": "assistant", "content": "ANSWER"}], False, tokenizer)
        before, found, after = answered.rpartition("ANSWER")
        if not found or "QUESTION" not in asked:
            raise ValueError("--template chat: this model's chat template leaves out what a user or the model says")
        self.lead = before.removeprefix(asked) if before.startswith(asked) else ""
        self.tail = asked.rpartition("QUESTION")[2]
        ends = [(after.find(name), -len(name), name) for name in tokenizer.special if name in after]
        place, _, name = min(ends, default=(0, 0, None))
        self.close = after[:place]
        self.end = tokenizer.special.get(name, tokenizer.end)

    def prompt_ids(self, row: dict, tokenizer: Tokenizer) -> list[int]:
        return tokenizer.encode_chat(self._prompt(row, tokenizer))

    def _prompt(self, row: dict, tokenizer: Tokenizer) -> str:
        self.text(row)  # which refuses what asks nothing
        request = question({**row, "history": []})
        turns = row.get("history", []) + [{"role": "user", "content": request}] * bool(request)
        text = self._render(turns, True, tokenizer)
        for i, turn in enumerate(turns):
            if tokenizer.protect(turn["content"]).strip() not in text:
                others = [*turns[:i], {**turn, "content": "?"}, *turns[i + 1 :]]
                if self._render(others, True, tokenizer) == text:
                    said = f"{turn['role']} says: {turn['content'][:60]}"
                    raise ValueError(f"the model's chat template leaves out what {said}")
        return text

    def _halves(self, row: dict, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        text, about = self._prompt(row, tokenizer), tokenizer.protect(row["input"]).rstrip()
        body = text.removesuffix(self.tail).rstrip()
        if not body.endswith(about):
            raise ValueError("the model's chat template does not end with the input: it cannot follow an instruction")
        cut = len(body) - len(about)
        return tokenizer.encode_chat(text[:cut]), tokenizer.encode_chat(text[cut:])

    def response_ids(self, row: dict, tokenizer: Tokenizer) -> list[int]:
        output = row["output"].rstrip()
        if opened := re.search(r"(<[\w|]+>)\s*$", self.tail):  # the template has begun the answer, with <think> say
            output = re.sub(rf"^\s*{re.escape(opened[1])}\n?", "", output)
        text = self.lead + tokenizer.protect(output) + self.close
        ids = tokenizer.encode_chat(self.tail + text)
        tail = tokenizer.encode_chat(self.tail)
        # As a continuation of the prompt, whose ids do not depend on the answer: they must not be merged with its own.
        ids = ids[len(tail) :] if ids[: len(tail)] == tail else tokenizer.encode_chat(text)
        return ids + [self.end] * row.get("end", True)

    def end_id(self, tokenizer: Tokenizer) -> int:
        return self.end

    def tail_size(self, tokenizer: Tokenizer) -> int:
        return len(tokenizer.encode_chat(self.tail))

    def answer_text(self, ids: list[int], tokenizer: Tokenizer, row: dict | None = None) -> str:
        return decode_after(":", ids, tokenizer).removeprefix(self.lead).rstrip()

    def _render(self, turns: list[dict], ask: bool, tokenizer: Tokenizer) -> str:
        turns = [{key: tokenizer.protect(text) for key, text in turn.items()} for turn in turns]
        try:
            return self.jinja(messages=turns, tools=None, documents=None, add_generation_prompt=ask, **self.names)
        except Exception as e:  # it is a program of the model's author, and may fail in any way
            raise ValueError(f"the model's chat template refuses this ({type(e).__name__}: {e})") from None


PLAIN = Template()
TEMPLATES = ("plain", "chat", "text")


def make_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template that --template names, one of TEMPLATES."""
    return ChatTemplate(tokenizer) if name == "chat" else TextTemplate() if name == "text" else PLAIN


def encode_after(context: str, text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text that continues another one: at a text's beginning, SentencePiece would put a space before it."""
    before, ids = tokenizer.encode(context), tokenizer.encode(context + text)
    return ids[len(before) :] if ids[: len(before)] == before else tokenizer.encode(text)


def decode_after(context: str, ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of ids that continue another text: at a text's beginning, SentencePiece would leave out a space."""
    before = tokenizer.encode(context)
    return tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]


def compile_jinja(source: str) -> Callable[..., str]:
    """A chat template as a function of its variables, run in a sandbox with the settings that transformers uses."""
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment as Environment
    except ImportError:
        raise ModuleNotFoundError("--template chat needs the package jinja2: pip install jinja2") from None
    version = importlib.metadata.version("jinja2")
    if [int(number) for number in re.findall(r"\d+", version)[:3]] < [3, 1, 6]:  # a template could leave the sandbox
        raise ModuleNotFoundError(f"--template chat needs jinja2 3.1.6 or newer, not {version}: pip install -U jinja2")

    def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # in transformers' order
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    # transformers' own tag {% generation %} marks the answers, and prints what is inside it.
    source = re.sub(r"({%[-+]?\s*)generation(\s*[-+]?%})", r"\1if true\2", source)
    source = re.sub(r"({%[-+]?\s*)endgeneration(\s*[-+]?%})", r"\1endif\2", source)
    try:
        return environment.from_string(source).render
    except jinja2.TemplateError as e:
        raise ValueError(f"--template chat: this model's chat template cannot be read ({e})") from None
