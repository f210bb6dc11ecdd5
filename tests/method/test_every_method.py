"""What holds for every entry of METHODS, on both architectures.  A new method is covered as soon as it is registered:
-k mine.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHS, right_padded, small_model, small_tuner

from baselines import METHODS, build
from plumbing.checkpoint import load_checkpoint, save_tuner
from plumbing.compiling import compile_parts
from sample import generate

# Options beyond the defaults that the tests below should see too.
VARIANTS = {
    "iapt": ["P=3 m=5 repeat=1 activation=gelu"],
    "dynamic": ["length=1 pool=3", "position=task P=4", "position=before length=1"],
    "lora": ["on=all r=2"],
}
WAYS = [(method, options, "all") for method in METHODS for options in ["", *VARIANTS.get(method, [])]]
WAYS += [(method, "", "answer") for method, cls in METHODS.items() if "answer" in cls.acts]
CASES = [(arch, *way) for arch in ARCHS for way in WAYS]
CASES += [("qk-norm", method, "", "all") for method in METHODS]
# Of those that act on the answer alone, by default one of each kind: a softmax of its own, the words', hooks.
KINDS = [("iapt", "answer"), ("ptuning2", "answer"), ("lora", "answer")]
QUICK = [case for case in CASES if case[0] in ARCHS and (case[3] == "all" or (case[1], case[3]) in KINDS)]
QUICK += [("qk-norm", "iapt", "", "all"), ("qk-norm", "paper-iapt", "", "all")]


def slow_unless(quick):
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


def name_of(case):
    arch, method, options, act = case
    return "-".join(filter(None, (arch, method, options.replace(" ", ","), act.removeprefix("all"))))


@pytest.fixture(params=slow_unless(QUICK), ids=name_of)
def tuned(request):
    """A small frozen model with a shaken tuner attached, and how to make the like again."""
    arch, method, options, act = request.param
    model, options = small_model(arch), options.split()
    tuner = small_tuner(method, model, options, act)
    return SimpleNamespace(arch=arch, method=method, options=options, act=act, model=model, tuner=tuner)


def test_a_tuner_acts(tuned):
    """The shaken tuners below change the logits; otherwise the tests that compare logits could not fail."""
    model, tuner = tuned.model, tuned.tuner
    plain = small_model(tuned.arch)
    idx, mask = right_padded([9], 9)
    assert (model(idx, mask, tuner) - plain(idx)).abs().max() > 1e-3


def test_cached_batched_ragged_decoding_equals_the_plain_forward_one_row_at_a_time(tuned):
    model, tuner = tuned.model, tuned.tuner
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [7, 7, 7, 2]]
    together = generate(model, prompts, tuner, max_new=6)
    for prompt, new in zip(prompts, together):
        ids = list(prompt)
        for _ in range(6):
            idx = torch.tensor([ids])
            instr = torch.arange(len(ids))[None] < len(prompt)
            ids.append(model(idx, instr, tuner)[0, -1].argmax().item())
        assert new == ids[len(prompt) :]


def test_decoding_one_token_gives_the_logits_of_the_whole_sequence(tuned):
    model, tuner = tuned.model, tuned.tuner
    idx, _ = right_padded([9, 9], 9)
    logits, cache = model.prefill(idx[:, :6], torch.tensor([6, 3]), tuner, room=3)
    for i in range(3):  # the second row goes on after three tokens, over its own padding
        logits = model.step(torch.stack((idx[0, 6 + i], idx[1, 3 + i])), cache)
    for row, prompt in ((0, 6), (1, 3)):
        instr = torch.arange(prompt + 3)[None] < prompt
        whole = model(idx[row : row + 1, : prompt + 3], instr, tuner)[0, -1]
        torch.testing.assert_close(logits[row], whole, atol=1e-4, rtol=1e-4)


def test_the_response_cannot_reach_the_prompt(tuned):
    """The one bug that makes results too good: soft tokens that have seen the response have seen the labels."""
    model, tuner = tuned.model, tuned.tuner
    idx, instr = right_padded([6, 4], 12)
    idx = torch.where(instr, idx, torch.randint(1, 50, idx.shape))
    other = torch.where(instr, idx, torch.randint(1, 50, idx.shape))
    assert (idx != other).any(1).all()
    a, b = model(idx, instr, tuner), model(other, instr, tuner)
    torch.testing.assert_close(a[instr], b[instr], atol=0, rtol=0)


def test_padding_cannot_reach_anything(tuned):
    model, tuner = tuned.model, tuned.tuner
    idx, instr = right_padded([6, 4], 6)
    alone = model(idx[1:, :4], instr[1:, :4], tuner)
    torch.testing.assert_close(model(idx, instr, tuner)[1:, :4], alone, atol=1e-4, rtol=1e-4)


def test_every_trained_parameter_gets_a_gradient_even_after_an_evaluation(tuned):
    model, tuner = tuned.model, tuned.tuner
    idx, instr = right_padded([6, 4], 12)
    targets = torch.where(instr, -1, torch.randint(1, 50, idx.shape))
    tuner.eval()
    with torch.no_grad():
        model(idx, instr, tuner, targets)
    generate(model, [[1, 2, 3]], tuner, max_new=2)
    tuner.train()
    model(idx, instr, tuner, targets).backward()
    silent = [name for name, p in tuner.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_what_acts_on_the_answer_alone_leaves_the_prompt_s_cache_as_the_frozen_model_makes_it(tuned):
    """Bit for bit, up to the prompt's last token; and hidden states before it are the frozen model's, too."""
    if tuned.act == "all":
        pytest.skip("it acts on the prompt, too")
    plain, (idx, instr) = small_model(tuned.arch), right_padded([6, 4], 6)
    length = torch.tensor([6, 4])
    logits, cache = tuned.model.prefill(idx, length, tuned.tuner, room=2)
    other_logits, other = plain.prefill(idx, length, room=2)
    assert (logits - other_logits).abs().max() > 1e-3
    for ours, theirs in zip(cache.layers, other.layers):
        for row, n in enumerate(length - 1):
            assert torch.equal(ours.joined.k[row, :, :n], theirs.joined.k[row, :, :n])
            assert torch.equal(ours.joined.v[row, :, :n], theirs.joined.v[row, :, :n])
    ours, theirs = tuned.model.hidden(idx, instr, tuned.tuner), plain.hidden(idx)
    for row, n in enumerate(length - 1):
        assert torch.equal(ours[row, :n], theirs[row, :n]) and not torch.allclose(ours[row, n], theirs[row, n])


def test_hidden_states_that_are_not_used_may_be_left_out_but_no_others_change(tuned):
    idx, instr = right_padded([6, 4], 12)
    idx = torch.where(instr, idx, torch.randint(1, 50, idx.shape))
    used = torch.stack((torch.arange(12) - 5, torch.arange(12) - 3))  # places behind the prompt's last token
    whole = tuned.model.hidden(idx, instr, tuned.tuner)
    part = tuned.model.hidden(idx, instr, tuned.tuner, n=4)
    assert part.shape == whole.shape
    torch.testing.assert_close(part[used < 4], whole[used < 4], atol=1e-5, rtol=1e-5)


def test_frozen_weights_do_not_change(tuned):
    model, tuner = tuned.model, tuned.tuner
    optimizer = torch.optim.AdamW(tuner.groups(0.01))
    idx, instr = right_padded([6, 4], 12)
    for _ in range(3):
        optimizer.zero_grad()
        model(idx, instr, tuner, torch.where(instr, -1, idx)).backward()
        optimizer.step()
    tuner.detach()
    before = small_model(tuned.arch).state_dict()
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_groups_hold_every_parameter_once(tuned):
    held = [id(p) for group in tuned.tuner.groups(1.0) for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in tuned.tuner.parameters())


def test_saved_and_loaded_gives_the_same_logits(tuned, tmp_path):
    idx, instr = right_padded([9, 5], 9)
    wanted = tuned.model(idx, instr, tuned.tuner)
    meta = {"method": tuned.method, "options": tuned.options, "init": "", "base": ""}
    save_tuner(tmp_path / "t.pt", tuned.tuner, meta)
    model = small_model(tuned.arch)
    loaded = build(tuned.method, model.config, tuned.options, tuned.act).eval()
    loaded.attach(model)
    loaded.load_state_dict(load_checkpoint(tmp_path / "t.pt")["tuner"])
    assert torch.equal(model(idx, instr, loaded), wanted)


def test_detached_the_model_is_as_it_was(tuned):
    idx, instr = right_padded([9, 5], 9)
    tuned.tuner.detach()
    assert torch.equal(tuned.model(idx), small_model(tuned.arch)(idx))


def test_a_prompt_is_read_in_evaluation_mode_and_the_mode_is_left_as_it_was(tuned):
    """What draws while it trains must not draw while it answers."""
    wanted = generate(tuned.model, [[1, 2, 3], [4]], tuned.tuner, max_new=4)
    tuned.tuner.train()
    for _ in range(3):
        assert generate(tuned.model, [[1, 2, 3], [4]], tuned.tuner, max_new=4) == wanted
    assert tuned.tuner.training
    tuned.tuner.eval()
    generate(tuned.model, [[1]], tuned.tuner, max_new=1)
    assert not tuned.tuner.training


def test_beside_a_model_in_bf16_what_is_learned_stays_in_fp32(tuned):
    """Forward, backward and decoding."""
    if tuned.method == "full":
        pytest.skip("nothing is frozen: all is in fp32")
    model, tuner = tuned.model.bfloat16(), tuned.tuner
    idx, instr = right_padded([6, 4], 12)
    model(idx, instr, tuner, torch.where(instr, -1, idx)).backward()
    grads = [p.grad for p in tuner.parameters() if p.grad is not None]
    assert grads and all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
    assert [len(new) for new in generate(model, [[3, 1, 4], [5]], tuner, max_new=3)] == [3, 3]


# Tracing takes seconds: by default, three kinds of method on one architecture.
TRACED = [("llama", method, "", act) for method, act in (("iapt", "all"), ("prompt", "all"), ("iapt", "answer"))]


@pytest.mark.parametrize("tuned", slow_unless(TRACED), indirect=True, ids=name_of)
def test_compiled_equals_eager(tuned):
    """The hidden states and their gradients, as `train.py --compile` computes them.  aot_eager traces forward and
    backward as inductor does, in seconds.
    """
    model, tuner = tuned.model, tuned.tuner
    idx, instr = right_padded([6, 4], 12)
    eager = model.hidden(idx, instr, tuner)
    eager.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in tuner.named_parameters() if p.grad is not None}
    tuner.zero_grad()
    torch._dynamo.reset()
    compile_parts(model, tuner, backend="aot_eager", fullgraph=True)
    compiled = model.hidden(idx, instr, tuner)
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
    for name, p in tuner.named_parameters():
        if name in grads:
            torch.testing.assert_close(p.grad, grads[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["iapt", pytest.param("lora", marks=pytest.mark.slow)])
def test_however_many_layers_there_are_as_many_graphs_are_compiled(method):
    """Each block has its own weights, and its own hooks: nothing of them may become a constant of a graph."""
    graphs = {}
    for layers in (3, 6):
        model = small_model("llama", n_layer=layers)
        tuner, graphs[layers] = small_tuner(method, model), []
        torch._dynamo.reset()
        compile_parts(model, tuner, backend=lambda graph, _, seen=graphs[layers]: seen.append(graph) or graph)
        model.hidden(*right_padded([6, 4], 12), tuner).sum().backward()
    assert len(graphs[3]) == len(graphs[6]) == {"iapt": 4, "lora": 2}[method]  # each with and without gradients of x
