"""What is particular to one method, and what the generic tests are worth: deliberately broken methods fail them."""

from types import SimpleNamespace
from typing import Literal

import pytest
import test_every_method as generic
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import right_padded, shake, small_model, small_tuner

from baselines import METHODS, build, spell_out
from baselines.prompts import Dynamic, layouts
from model import Config, Tuner
from plumbing.cli import UsageError
from sample import generate


class Odd(Tuner):
    def __init__(self, config, extra: int = 0, many: int = 3, rate: float = 0.5, on: bool = True,
                 word: Literal["a", "b"] = "a", hook=None):  # fmt: skip
        super().__init__()
        self.values = extra, many, rate, on, word


def test_whatever_options_a_method_has_all_of_them_spelled_out_build_it_again(monkeypatch):
    monkeypatch.setitem(METHODS, "odd", Odd)
    for options in ([], ["extra=2", "many=1", "rate=0", "on=0", "word=b"], ["extra=0", "rate=1e-3"]):
        spelled_out = spell_out("odd", options)
        assert len(spelled_out) == 5 and build("odd", None, spelled_out).values == build("odd", None, options).values
    assert build("odd", None, ["on=0", "word=b"]).values == (0, 3, 0.5, False, "b")


@pytest.mark.parametrize(
    "option, says",
    [
        ("size=4", "odd has no option 'size'. It has: extra=0, many=3, rate=0.5, on=1, word=a"),
        ("hook=x", "no option 'hook'"),
        ("many=four", "odd's option many takes a whole number, got 'four'"),
        ("many=0", "odd's option many must be from 1 to 2147483647, got 0"),
        ("extra=-1", "odd's option extra must be from 0 to 2147483647, got -1"),
        ("rate=x", "odd's option rate takes a number, got 'x'"),
        ("rate=inf", "odd's option rate must be a finite number of 0 or more, got inf"),
        ("rate=nan", "odd's option rate must be a finite number of 0 or more, got nan"),
        ("rate=-1", "odd's option rate must be a finite number of 0 or more, got -1"),
        ("on=maybe", "odd's option on takes 0 or 1, got 'maybe'"),
        ("word=c", "odd's option word can be a, b; got 'c'"),
    ],
)
def test_a_wrong_option_is_named_with_what_it_may_be(monkeypatch, option, says):
    monkeypatch.setitem(METHODS, "odd", Odd)
    for f in (spell_out, lambda name, options: build(name, None, options)):
        with pytest.raises(UsageError) as e:
            f("odd", [option])
        assert says in str(e.value)


def test_merged_lora_is_the_frozen_model_with_other_weights(model):
    tuner = small_tuner("lora", model, ["on=all", "r=3"])
    idx, instr = right_padded([9, 5], 9)
    wanted = model(idx, instr, tuner)
    tuner.merge(model)
    torch.testing.assert_close(model(idx), wanted, atol=1e-4, rtol=1e-4)


def test_lora_that_is_not_for_the_prompt_cannot_be_merged(model):
    with pytest.raises(ValueError, match="acts on the answer alone cannot be merged"):
        small_tuner("lora", model, act="answer").merge(model)


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_training_starts_at_the_frozen_model(model, method):
    idx, _ = right_padded([9, 5], 9)
    frozen = model(idx)
    tuner = build(method, model.config)
    tuner.start(model)
    tuner.attach(model)
    torch.testing.assert_close(model(idx), frozen, atol=0.05, rtol=0.05)
    if method == "lora":
        assert torch.equal(model(idx), frozen)


@pytest.mark.parametrize("method", ["prompt", "dynamic"])
def test_soft_tokens_among_the_embeddings_start_as_embeddings_of_tokens(model, method):
    tuner = build(method, model.config)
    tuner.start(model)
    assert (tuner.rows.flatten(0, -2)[:, None] == model.wte.weight).all(-1).any(1).all()


def test_the_layouts_of_dynamic_prompting_are_those_made_by_hand():
    P, T, lengths = 3, 6, [4, 2]
    instr = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    soft, tokens = ["s0", "s1", "s2"], [f"t{i}" for i in range(T)]
    for n in range(P + 1):
        index, first = layouts(P, T, torch.tensor([[n], [n]]), instr)
        for row, t in enumerate(lengths):
            for i in range(P + 1):
                b = min(i, n)
                wanted = soft[:b] + tokens[:t] + soft[b:n] + tokens[t:] + soft[n:]
                assert [(soft + tokens)[j] for j in index[row, i]] == wanted
                assert wanted[first[row, i]] == "t0"


def test_a_soft_token_that_dynamic_prompting_leaves_out_does_not_act(model):
    """The published code's adaptive length shortens nothing.  Here the unused tokens can be anything."""
    tuner = small_tuner("dynamic", model, ["length=1", "position=task", "P=5"])
    with torch.no_grad():
        tuner.count.weight.zero_()
        tuner.count.bias.copy_(torch.tensor([0.0, 0, 9, 0, 0, 0]))  # two of them
        tuner.logits.copy_(torch.tensor([0.0, 9, 0, 0, 0, 0]))  # one before the instruction, so one after it
    idx, instr = right_padded([6, 4], 9)
    wanted = model(idx, instr, tuner)
    with torch.no_grad():
        tuner.rows[:, 2:] += 10
    assert torch.equal(model(idx, instr, tuner), wanted)
    two = small_tuner("dynamic", model, ["position=task", "P=2"])
    with torch.no_grad():
        two.rows.copy_(tuner.rows[:, :2])
        two.logits.copy_(torch.tensor([0.0, 9, 0]))
    torch.testing.assert_close(model(idx, instr, two), wanted, atol=1e-4, rtol=1e-4)


def test_dynamic_prompting_draws_while_training_and_never_afterwards(model):
    """The published code leaves the noise on."""
    tuner = small_tuner("dynamic", model, ["position=task"])
    with torch.no_grad():
        tuner.logits.zero_()
    idx, instr = right_padded([6, 4], 9)
    assert torch.equal(model(idx, instr, tuner), model(idx, instr, tuner))
    tuner.train()
    assert not torch.equal(model(idx, instr, tuner), model(idx, instr, tuner))


def test_the_temperature_of_the_draws_falls_from_one_to_a_half():
    tuner = Dynamic(Config(vocab_size=10, n_embd=8, n_head=2, n_layer=1))
    for done, tau in ((0, 1.0), (0.5, 0.75), (1, 0.5)):
        tuner.progress(done)
        assert tuner.tau == tau


@pytest.mark.parametrize("method", ["prompt", "dynamic", "full"])
def test_a_method_that_cannot_act_on_the_answer_alone_says_so_and_which_can(model, method):
    able = "iapt, summary, paper-iapt, constants, ptuning2, prefix, capt, lora, ia3, adapter, mine"
    with pytest.raises(UsageError, match=f"{method} acts on the whole prompt: --act answer is for {able}"):
        build(method, model.config, act="answer")
    with pytest.raises(UsageError, match=f"{method} acts on the whole prompt: --hide-instruction is for {able}"):
        build(method, model.config, act="hidden")


@pytest.mark.parametrize("method", ["prompt", "ptuning2"])
def test_words_that_begin_behind_the_soft_tokens_positions_are_decoded_as_in_the_whole_sequence(model, method):
    tuner = small_tuner(method, model, ["P=3", "shift=1"])
    case = SimpleNamespace(model=model, tuner=tuner)
    generic.test_decoding_one_token_gives_the_logits_of_the_whole_sequence(case)
    generic.test_cached_batched_ragged_decoding_equals_the_plain_forward_one_row_at_a_time(case)
    unshifted = build(method, model.config, ["P=3"]).eval()
    unshifted.load_state_dict(tuner.state_dict())
    idx, instr = right_padded([9, 5], 9)
    assert (model(idx, instr, tuner) - model(idx, instr, unshifted)).abs().max() > 1e-2
    with pytest.raises(ValueError, match="a prompt of 13 tokens and 52 new ones: this model has room for 64"):
        generate(model, [[1] * 10], tuner, max_new=52)


def test_words_that_are_read_by_the_frozen_model_keep_their_positions(model):
    for act in ("answer", "hidden"):
        with pytest.raises(UsageError, match="ptuning2's option shift=1 is for acting on all tokens"):
            build("ptuning2", model.config, ["shift=1"], act)


@pytest.mark.parametrize("method", ["mine", "capt"])
def test_one_long_state_is_not_all_that_a_mean_reads(method):
    """In a real LLaMA the first token's state is some hundred times as long as the others."""
    x, instr = torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    x[:, 0] = 1000 * x[:1, 0]  # the same in both rows
    tuner = build(method, small_model("llama").config)
    a, b = tuner.soft_tokens(0, x, instr).flatten(1)
    assert F.cosine_similarity(a, b, dim=0) < 0.9


class SeesTheResponse(Tuner):
    """Pools over the whole row."""

    def __init__(self, config):
        super().__init__()
        self.to_soft = nn.ModuleList(nn.Linear(config.n_embd, config.n_embd) for _ in range(config.n_layer))

    def soft_tokens(self, l, x, instr):
        return self.to_soft[l](x.mean(1, keepdim=True))


class Forgets(METHODS["mine"]):
    """Has a parameter that nothing uses."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(4))


class Remembers(METHODS["mine"]):
    """Keeps its soft tokens for the next call, as one may to save time in generation."""

    def kv(self, block, l, x, instr):
        kept = self.__dict__.setdefault("kept", {})
        if (l, x.shape) not in kept:
            kept[l, x.shape] = super().kv(block, l, x, instr)
        return kept[l, x.shape]


class ReadsPadding(METHODS["mine"]):
    """Takes the mean over the padding, too."""

    def soft_tokens(self, l, x, instr):
        return super().soft_tokens(l, F.pad(x[:, :-1], (0, 0, 0, 1)), torch.ones_like(instr))


BROKEN = {
    SeesTheResponse: [generic.test_the_response_cannot_reach_the_prompt, generic.test_padding_cannot_reach_anything],
    ReadsPadding: [generic.test_padding_cannot_reach_anything],
    Forgets: [generic.test_every_trained_parameter_gets_a_gradient_even_after_an_evaluation],
    Remembers: [
        generic.test_every_trained_parameter_gets_a_gradient_even_after_an_evaluation,
        generic.test_cached_batched_ragged_decoding_equals_the_plain_forward_one_row_at_a_time,
    ],
}


@pytest.mark.parametrize("broken, test", [(c, t) for c, tests in BROKEN.items() for t in tests])
def test_a_broken_method_fails_the_tests_that_a_registered_method_runs(monkeypatch, broken, test):
    monkeypatch.setitem(METHODS, "broken", broken)
    model = small_model("gpt2")
    tuner = shake(small_tuner("broken", model), 0.3)
    with pytest.raises(RuntimeError if broken is Remembers and "gradient" in test.__name__ else AssertionError):
        test(SimpleNamespace(arch="gpt2", method="broken", options=[], act="all", model=model, tuner=tuner))
