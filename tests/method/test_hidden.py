"""An instruction that is hidden: it is read, soft tokens stand in its place, and nothing else of it is left."""

import re
import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHS, right_padded, small_model, small_tuner

from baselines import METHODS, hidden
from baselines.hidden import Summary
from baselines.tenants import Tenants
from data import Example, collate
from data.instructions import join_rows, load_instruction, read_instructions, save_instruction
from data.reads import Reads, Teacher, seen
from data.scores import BLIND, evaluate
from plumbing.compiling import compile_parts
from plumbing.head_loss import head_loss
from plumbing.pretrained import read_safetensors, write_safetensors
from sample import generate
from train import add_gradients

ABLE = [method for method, cls in METHODS.items() if "hidden" in cls.acts]
READERS = ["iapt", "summary", "paper-iapt", "capt", "mine"]  # the others know nothing of the instruction
QUICK = [("llama", method) for method in ABLE] + [("gpt2", "iapt"), ("gpt2", "summary")]
CASES = [(arch, method) for arch in ARCHS for method in ABLE]
CASES = [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.fixture(params=CASES, ids="-".join)
def tuned(request):
    arch, method = request.param
    model = small_model(arch)
    return SimpleNamespace(arch=arch, method=method, model=model, tuner=small_tuner(method, model, act="hidden"))


def rows(lengths=(6, 4), width=12):
    """Random tokens, and the mask of their instructions."""
    idx, instr = right_padded(lengths, width)
    return torch.where(instr, idx, torch.randint(1, 50, idx.shape, generator=torch.Generator().manual_seed(1))), instr


def with_another_instruction(idx, instr):
    """All words of the instructions changed but the first, whose key and value stay."""
    changed = torch.where(instr, idx % 49 + 1, idx)
    changed[:, 0] = idx[:, 0]
    return changed


def test_nothing_but_soft_tokens_is_left_of_the_instruction(tuned):
    """With another instruction, and the soft tokens of this one, what follows is the same, bit for bit."""
    (idx, instr), model, tuner = rows(), tuned.model, tuned.tuner
    other, write = with_another_instruction(idx, instr), tuner.write
    before = model(idx, instr, tuner)
    contexts = write(model, model.read(idx[:, :6], instr.sum(1), tuner, whole=True).states, instr[:, :6])
    changed = model(other, instr, tuner)
    assert (tuned.method in READERS) == bool((changed - before)[~instr].abs().max() > 1e-4)
    tuner.write = lambda *_: contexts
    assert torch.equal(model(other, instr, tuner)[~instr], before[~instr])


def test_what_is_blind_sees_the_first_word_alone(model):
    idx, instr = rows()
    blind, other = model(idx, instr, BLIND), with_another_instruction(idx, instr)
    assert torch.equal(model(other, instr, BLIND)[~instr], blind[~instr])
    other[:, 0] += 1
    assert not torch.equal(model(other, instr, BLIND)[~instr], blind[~instr])


def test_input_and_answer_stand_at_the_places_that_they_have_where_the_instruction_is_seen(model):
    """An instruction of one word is its own sink: hidden or not, the model sees all of it."""
    idx, instr = rows((1, 1), 9)
    torch.testing.assert_close(model(idx, instr, BLIND), model(idx), atol=1e-4, rtol=1e-4)


def test_rows_together_are_rows_alone(tuned):
    idx, instr = rows()
    together = tuned.model(idx, instr, tuned.tuner)
    for row in range(2):
        alone = tuned.model(idx[row : row + 1], instr[row : row + 1], tuned.tuner)
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)


def test_generation_that_goes_on_from_instructions_read_before_equals_the_plain_forward(tuned):
    instructions, rests = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]], [[7], [8, 2, 9, 9], [3, 3]]
    past = read_instructions(tuned.model, instructions, tuned.tuner)
    together = generate(tuned.model, rests, max_new=5, past=past)
    for first, rest, new in zip(instructions, rests, together):
        ids = first + rest
        for _ in range(5):
            instr = torch.arange(len(ids))[None] < len(first)
            ids.append(tuned.model(torch.tensor([ids]), instr, tuned.tuner)[0, -1].argmax().item())
        assert new == ids[len(first + rest) :]


def test_a_beam_search_goes_on_from_an_instruction_as_it_does_from_one_row_alone(model):
    tuner, rests = small_tuner("summary", model, act="hidden"), [[7], [8, 2, 9]]
    instructions = [[3, 1, 4, 1, 5], [9, 2]]
    together = generate(model, rests, max_new=5, beams=3, past=read_instructions(model, instructions, tuner))
    for first, rest, new in zip(instructions, rests, together):
        alone = generate(model, [rest], max_new=5, beams=3, past=read_instructions(model, [first], tuner))
        assert alone == [new]


def test_every_trained_parameter_gets_a_gradient_and_the_same_whether_instructions_are_read_then_or_before(tuned):
    examples = [Example([3, 1, 4, 1, 5, 9], [2, 6, 7], 4), Example([5, 3, 5], [8, 9], 2), Example([9, 7, 9, 3], [2], 3)]
    batch, reads, grads = collate(examples, 64), Reads(tuned.model, tuned.tuner), []
    tuned.tuner.train()
    for kept in (None, reads, reads):
        tuned.tuner.zero_grad()
        add_gradients(tuned.model, tuned.tuner, batch, 1, kept)
        grads.append([p.grad.clone() for p in tuned.tuner.parameters()])
    for name, a, b, c in zip(dict(tuned.tuner.named_parameters()), *grads):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)
        assert torch.equal(b, c)
        assert a.abs().sum() > 0, name


@pytest.mark.parametrize("method", ["iapt", "summary"])
def test_recomputing_activations_changes_nothing(method):
    model = small_model("llama")
    tuner, (idx, instr) = small_tuner(method, model, act="hidden"), rows()
    grads = []
    for model.checkpointing in (False, True):
        tuner.zero_grad()
        model(idx, instr, tuner, torch.where(instr, -1, idx)).backward()
        grads.append([p.grad.clone() for p in tuner.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["iapt", "summary"])
def test_compiled_it_is_the_same(method):
    model, other = small_model("llama"), small_model("llama")
    tuner, same = (small_tuner(method, m, act="hidden") for m in (model, other))
    idx, instr = rows()
    compile_parts(other, same)
    torch.testing.assert_close(other(idx, instr, same), model(idx, instr, tuner), atol=1e-4, rtol=1e-4)


def test_tenants_that_read_hidden_instructions_are_each_alone(model):
    tuners = [small_tuner(method, model, act="hidden") for method in ("summary", "iapt", "constants")]
    owners, rests = [2, 0, 1, 0], [[7], [8, 2, 9], [3, 3], [5]]
    instructions = [[3, 1, 4], [9, 2], [6, 5, 3, 5], [9, 2]]
    past = read_instructions(model, instructions, Tenants(tuners, owners))
    together = generate(model, rests, max_new=4, past=past)
    for t, first, rest, new in zip(owners, instructions, rests, together):
        assert generate(model, [rest], max_new=4, past=read_instructions(model, [first], tuners[t])) == [new]


# -- Summary -----------------------------------------------------------------------------------------------------------


def untrained(model, P, act="hidden"):
    tuner = Summary(model.config, P=P, m=4)
    tuner.act = act
    return tuner


def test_the_lines_of_its_docstring_are_what_summary_computes(model):
    (code,) = re.findall(r"    (def summary.*?)    #   and", hidden.__doc__, re.DOTALL)
    names = {"torch": torch, "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-4)}
    tuner, x = small_tuner("summary", model, act="hidden"), torch.randn(1, 7, 32)
    instr, g = torch.arange(7)[None] < 6, tuner.generators[1]
    parts = 4.0 * ((torch.arange(7) + 0.5)[:, None] / 6 * 4).floor().eq(torch.arange(4))
    exec(textwrap.dedent("    " + code), names | {"parts": parts}, made := {})
    block = model.h[1]
    words, flat = block.soft_kv(x), lambda s: s[0].transpose(0, 1).flatten(1)
    keys, values = made["summary"](x[0], instr[0], flat(words.k), flat(words.v), g.W_down, g.W_sa, g.R, g.W_up)
    soft = tuner.kv(block, 1, x, instr)
    torch.testing.assert_close(flat(soft.v), values, atol=1e-4, rtol=1e-4)
    if model.config.arch == "gpt2":  # LLaMA's are turned
        torch.testing.assert_close(flat(soft.k), keys, atol=1e-4, rtol=1e-4)


def test_an_untrained_summary_has_the_means_of_parts_of_the_instruction(model):
    """Of four words and two soft tokens, each is nearly the mean of two words; e^4 to 1 is their share."""
    block, x = model.h[0], torch.randn(1, 4, 32)
    soft, words = untrained(model, 2).kv(block, 0, x, torch.ones(1, 4, dtype=torch.bool)), block.soft_kv(x)
    near = torch.tensor([4.0, 4.0, 0.0, 0.0]).softmax(0)
    for p, weights in enumerate((near, near.flip(0))):
        torch.testing.assert_close(soft.v[0, :, p], weights @ words.v[0], atol=1e-5, rtol=1e-5)
        if model.config.arch == "gpt2":
            torch.testing.assert_close(soft.k[0, :, p], weights @ words.k[0], atol=1e-5, rtol=1e-5)


def test_a_part_without_a_word_is_the_nearest_word(model):
    """Five soft tokens and two words: the middles of the words are at 1.25 and 3.75 parts."""
    generator = untrained(model, 5).generators[0]
    A = generator.attention(torch.zeros(1, 3, 4), torch.tensor([[True, True, False]]))
    assert (A[0, 2] == 0).all() and A[0, 0].gt(0.9).tolist() == [True, True, True, False, False]
    assert A[0, 1].gt(0.9).tolist() == [False, False, False, True, True]


def test_a_summary_as_long_as_the_instruction_is_nearly_the_instruction():
    """With sharp weights each soft token is a word, at its own place: what follows cannot tell them apart."""
    model, (idx, instr) = small_model("llama"), rows((6, 6), 12)
    tuner = untrained(model, 6)
    for generator in tuner.generators:
        generator.attention = lambda Z, instr: torch.eye(6).expand(len(Z), -1, -1)
    seeing, contexts = model(idx), tuner.write
    hidden = model(idx, instr, DropsTheFirst(tuner))
    torch.testing.assert_close(hidden[~instr], seeing[~instr], atol=1e-3, rtol=1e-3)
    assert contexts and (model(idx, instr, BLIND) - seeing)[~instr].abs().max() > 0.1


class DropsTheFirst(Summary):
    """The first word is kept by itself: it must not count twice."""

    def __init__(self, tuner):
        super().__init__(tuner.config, P=6, m=4)
        self.generators, self.act = tuner.generators, "hidden"

    def soft(self, *args):
        k, v, _ = super().soft(*args)
        return type(super().soft(*args))(k[:, :, 1:], v[:, :, 1:])

    def write(self, model, states, instr):  # its attention is no function of vmap's
        return [self.context(block, l, x, instr) for l, (block, x) in enumerate(zip(model.h, states))]


# -- Learning from the model that sees ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_a_mix_of_the_divergence_from_the_teacher_and_the_answers_own(share):
    model, (idx, instr) = small_model("llama"), rows()
    targets = torch.where(instr, -1, idx)
    x, teacher = torch.randn(2, 12, 32, requires_grad=True), torch.randn(int((targets >= 0).sum()), 32)
    loss = head_loss(model, x, targets, teacher, share)
    log_q, log_p = model.head(x[targets >= 0]).log_softmax(-1), model.head(teacher).log_softmax(-1)
    own = F.nll_loss(log_q, targets[targets >= 0])
    wanted = share * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") + (1 - share) * own
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (loss, wanted)))


def test_the_teacher_is_the_frozen_model_that_sees_and_remembers_what_it_has_said():
    model = small_model("llama")
    tuner = small_tuner("lora", model, act="hidden")  # its hooks are silent here
    examples = [Example([3, 1, 4, 1], [2, 6], 2), Example([5, 3, 5], [8, 9, 7], 2)]
    kept, anew = (Teacher(model, tuner, examples, 1.0, gigabytes) for gigabytes in (1.0, 0.0))
    batch = collate(examples, 64)
    wanted = small_model("llama").hidden(batch.idx)[batch.targets >= 0]
    for states in (kept(batch), kept(batch), anew(batch)):
        torch.testing.assert_close(states, wanted)
    assert len(kept.kept) == 2 and not anew.kept
    torch.testing.assert_close(kept(collate(examples[1:], 64)), wanted[2:], atol=1e-5, rtol=1e-4)


def test_the_divergence_of_what_sees_all_is_zero_and_blind_it_is_not(model):
    examples = [Example([3], [2, 6], 1), Example([5], [8, 9, 7], 1)]  # one word: the sink is all of the instruction
    assert abs(evaluate(model, examples, BLIND).kl) < 1e-5
    longer = [Example([3, 1, 4, 1], [2, 6], 3)]
    score = evaluate(model, longer, BLIND)
    assert score.kl > 0.01 and score.loss(0.25) == pytest.approx(0.25 * score.kl + 0.75 * score.nats)
    assert torch.equal(seen(model, collate(longer, 64).idx), model.hidden(collate(longer, 64).idx))


# -- Files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["summary", "iapt"])  # soft tokens among the words, and in a softmax of their own
def test_a_saved_instruction_does_what_its_words_did_beside_others(model, tmp_path, method):
    tuner, path = small_tuner(method, model, act="hidden"), str(tmp_path / "french.safetensors")
    french, other = ([[3, 1, 4, 1, 5]], [[9, 2]])
    save_instruction(path, read_instructions(model, french, tuner), model, tuner)
    past = join_rows([read_instructions(model, other, tuner), load_instruction(path, model, tuner)])
    whole = read_instructions(model, other + french, tuner)
    rests = [[7, 8], [8, 2, 9]]
    assert generate(model, rests, max_new=6, past=past) == generate(model, rests, max_new=6, past=whole)


def test_an_instruction_of_another_run_or_model_is_refused(model, tmp_path):
    tuner, path = small_tuner("summary", model, act="hidden"), str(tmp_path / "x.safetensors")
    save_instruction(path, read_instructions(model, [[3, 1]], tuner), model, tuner)
    with torch.no_grad():
        tuner.generators[0].W_up.add_(1)
    with pytest.raises(ValueError, match="was not written by --save with this run"):
        load_instruction(path, model, tuner)
    with torch.no_grad():
        model.ln_f.weight.add_(1)
    with pytest.raises(ValueError, match="was not written by --save with this model"):
        load_instruction(path, model, tuner)


def test_a_hidden_tuner_neither_reads_a_whole_prompt_nor_is_merged_into_weights(model):
    tuner = small_tuner("lora", model, act="hidden")
    with pytest.raises(ValueError, match="only a tuner that acts on the answer alone can go on"):
        generate(model, [[1, 2, 3]], tuner, max_new=5)
    before = model.h[0].attn.q.weight.clone()
    with pytest.raises(ValueError, match="cannot be merged"):
        tuner.merge(model)
    assert torch.equal(model.h[0].attn.q.weight, before)


@pytest.mark.parametrize("change", ["no position", "no values", "fewer layers", "another kind"])
def test_a_saved_instruction_with_something_missing_is_refused_in_one_line(model, tmp_path, change):
    tuner, path = small_tuner("summary", model, act="hidden"), str(tmp_path / "x.safetensors")
    save_instruction(path, read_instructions(model, [[3, 1]], tuner), model, tuner)
    tensors = {name: lazy.read() for name, lazy in read_safetensors(path).items()}
    if change == "fewer layers":
        tensors["joined.k"] = tensors["joined.k"][1:].clone()
    elif change == "another kind":
        tensors["other.k"] = tensors["joined.k"]
        tensors["other.v"] = tensors["joined.v"]
    else:
        del tensors[{"no position": "position", "no values": "joined.v"}[change]]
    write_safetensors(path, tensors)
    with pytest.raises(ValueError, match="is damaged: save the instruction again"):
        load_instruction(path, model, tuner)
