"""The method itself: the rational activation and its hand-derived gradients, the pooling, the generator, and where the
soft tokens act.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import right_padded, shake, small_model, small_tuner

from baselines import PTuning2
from iapt import (
    IAPT,
    Generator,
    NormedGenerator,
    PaperIAPT,
    Rational,
    RationalFunction,
    SubtractMean,
    projections,
    rational,
    rational_backward,
)
from model import Config, Soft, attention_mask, rotary, split_kv

# -- The activation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [(6, 5), (5, 4), (3, 3), (1, 1), (0, 1), (2, 6)])
def test_the_rationals_gradients_are_right_for_x_a_and_b(degrees):
    n, k = degrees
    g = torch.Generator().manual_seed(n)
    x = torch.randn(4, 7, generator=g, dtype=torch.double, requires_grad=True)
    a = torch.randn(n + 1, generator=g, dtype=torch.double, requires_grad=True)
    b = torch.randn(k, generator=g, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(RationalFunction.apply, (x, a, b))


def test_the_rational_is_its_formula():
    x = torch.linspace(-4, 4, 101, dtype=torch.double)
    a, b = torch.randn(7, dtype=torch.double), torch.randn(5, dtype=torch.double)
    n = sum(a[j] * x**j for j in range(7))
    s = sum(b[i] * x ** (i + 1) for i in range(5))
    torch.testing.assert_close(RationalFunction.apply(x, a, b), n / (1 + s.abs()))


def test_at_the_kink_the_gradient_is_a_subgradient():
    x = torch.zeros(3, requires_grad=True)
    a, b = torch.tensor([1.0, 2.0]), torch.ones(1, requires_grad=True)
    RationalFunction.apply(x, a, b).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0, 2.0] and b.grad.tolist() == [0.0]


def test_it_starts_as_gelu():
    x = torch.linspace(-8, 8, 4001)
    assert (Rational()(x) - F.gelu(x)).abs().max() < 3.5e-3


def test_half_precision_does_not_overflow():
    x = torch.tensor([-40.0, 40.0], dtype=torch.float16, requires_grad=True)
    y = Rational()(x)
    y.sum().backward()
    assert y.dtype == x.dtype and y.isfinite().all() and x.grad.isfinite().all()


def test_the_same_step_of_any_coefficient_bends_the_curve_by_no_more_than_that_where_inputs_lie():
    """dR/da <= 1 and |dR/db| <= |R| <= 4 on [-4, 4]: Adam moves all coefficients alike."""
    x, r, step = torch.linspace(-4, 4, 801), Rational(), 1e-2
    before = r(x).detach()
    for c, limit in ((r.a, 1), (r.b, 4)):
        for j in range(len(c)):
            with torch.no_grad():
                c[j] += step
                assert 0.01 * step < (r(x) - before).abs().max() <= 1.01 * limit * step
                c[j] -= step


def test_only_x_and_the_coefficients_are_kept_for_the_backward_pass():
    x, r, sizes = torch.randn(1000, requires_grad=True), Rational(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        r(x)
    assert sum(sizes) == 1000 + 12


def gradients_of(x, r, g):
    x = x.detach().requires_grad_()
    r.zero_grad()
    r(x).backward(g)
    return [r(x).detach(), x.grad, r.a.grad, r.b.grad]


def test_the_coefficients_gradients_are_summed_without_losing_digits():
    """Against float64, over a million numbers."""
    torch.manual_seed(0)
    x, g, r = torch.randn(1024, 1024), torch.randn(1024, 1024), shake(Rational(), 0.01)
    r64 = copy.deepcopy(r).double()
    x64 = (x.double() / 4).requires_grad_()
    RationalFunction.apply(x64, r64.a, r64.b).backward(g.double())
    for ours, exact in zip(gradients_of(x, r, g)[2:], (r64.a.grad, r64.b.grad)):
        assert ((ours - exact).abs() / exact.abs()).max() < 5e-6


@pytest.mark.slow
def test_the_compiled_rational_equals_the_eager_one():
    torch.manual_seed(0)
    x, g, r = torch.randn(64, 1000), torch.randn(64, 1000), shake(Rational(), 0.01).requires_grad_(False)
    inputs = x, r.a, r.b
    torch.testing.assert_close(torch.compile(rational)(*inputs), rational(*inputs), atol=1e-5, rtol=1e-5)
    compiled = torch.compile(rational_backward)(*inputs, g)
    for a, b in zip(compiled, rational_backward(*inputs, g)):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4, 5)])
def test_the_activation_takes_any_shape(shape):
    x, r = torch.randn(shape, requires_grad=True), Rational()
    r(x).sum().backward()
    flat = copy.deepcopy(r)
    flat.zero_grad()
    flat(x.detach().reshape(1, -1)).sum().backward()
    torch.testing.assert_close([x.grad.shape, r.a.grad, r.b.grad], [x.shape, flat.a.grad, flat.b.grad])


# -- The generator -----------------------------------------------------------------------------------------------------


def generator(cls, P=4):
    torch.manual_seed(0)
    return shake(cls(*projections(32, 5, 16, up_std=1.0), P, "rational"))


def hidden_states(lengths=(6, 3), T=8):
    """x (B, T, C) and instr (B, T)."""
    return torch.randn(len(lengths), T, 32), right_padded(list(lengths), T)[1]


@pytest.mark.parametrize("cls", [Generator, NormedGenerator])
def test_pooling_weights_are_a_distribution_over_the_instruction(cls):
    """Whatever stands in the padding and in the response."""
    (x, instr), g = hidden_states(), generator(cls)
    _, weights = g.read(x, instr)  # (B, P, T)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4))
    assert (weights * ~instr[:, None]).abs().max() == 0
    torch.testing.assert_close(weights[1:, :, :3], g.read(x[1:, :3], instr[1:, :3])[1])
    other = torch.where(instr[..., None], x, torch.randn_like(x))
    torch.testing.assert_close(g(other, instr), g(x, instr))


def test_normed_pooling_is_not_sharpened_by_the_length_of_z():
    x, instr = hidden_states()
    for cls in (Generator, NormedGenerator):
        g = generator(cls)
        _, before = g.read(x, instr)
        with torch.no_grad():
            g.down.weight *= 9
        assert torch.allclose(g.read(x, instr)[1], before, atol=1e-5) == (cls is NormedGenerator)


@pytest.mark.parametrize("cls", [Generator, NormedGenerator])
def test_with_norms_the_length_of_hidden_states_is_nothing_and_q_has_unit_mean_square(cls):
    g, normed = generator(cls), cls is NormedGenerator
    if normed:
        g.centre.data += 4  # far from all q: what is small is left small
    x, instr = hidden_states()
    q, longer = g.pool(x, instr), g.pool(7 * x, instr)
    assert torch.allclose(q, longer, atol=1e-4) == normed
    assert torch.allclose(q.pow(2).mean(-1), torch.ones(2, 4), atol=1e-4) == normed


def test_q_is_measured_from_its_centre():
    g, (x, instr) = generator(NormedGenerator), hidden_states()
    z, weights = g.read(x, instr)
    g.centre.data = (weights @ z)[0].detach()
    q = g.pool(x, instr)
    assert (q[0] == 0).all() and (q[1] != 0).any()


def test_what_is_left_where_all_instructions_are_alike_is_not_blown_up():
    g, (x, instr) = generator(NormedGenerator), hidden_states([6])
    z, weights = g.read(x, instr)
    g.centre.data = (weights @ z)[0].detach() + 1e-4
    assert g.pool(x, instr).abs().max() < 0.1


def test_the_centre_becomes_the_mean_of_q_whatever_the_loss_and_whatever_the_batch_s_parts():
    q, c = torch.randn(64, 4, 5) + torch.randn(4, 5), torch.zeros(4, 5, requires_grad=True)
    optimizer = torch.optim.Adam([c], lr=0.05)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        optimizer.zero_grad()
        (1e-3 * SubtractMean.apply(q, c).exp().sum()).backward()
        optimizer.step()
    torch.testing.assert_close(c.detach(), q.mean(0), atol=0.01, rtol=0)
    x, c = q.clone().requires_grad_(), torch.zeros(4, 5, requires_grad=True)
    SubtractMean.apply(x, c).backward(q)
    assert torch.equal(x.grad, q)  # the centre does not change the gradient of q
    whole, c.grad = c.grad, None
    for part in q.split(16):
        SubtractMean.apply(part, c).sum().backward()
    torch.testing.assert_close(c.grad, whole, atol=0, rtol=1e-4)  # both are tiny


# -- The soft tokens ---------------------------------------------------------------------------------------------------


def test_the_parameter_counts_are_those_of_the_docstrings():
    """MiLoRA reports 83.9M for IAPT on LLaMA-2 7B with a bottleneck of 320."""
    with torch.device("meta"):
        paper = PaperIAPT(Config(arch="llama", vocab_size=32000, n_layer=32, n_head=32, n_embd=4096), m=320)
        ours = IAPT(Config(arch="llama", vocab_size=1000, n_layer=4, n_head=4, n_embd=128))  # the shipped model's sizes
    assert sum(p.numel() for p in paper.parameters()) == 32 * (2 * 4096 * 320 + 320 * 4 + 12) == 83_927_424
    shared, each = 128 * 16 + 2 * 16 * 128, 2 * 16 * 4 + 12 + 2 * 4 * 3 * 128
    assert sum(p.numel() for p in ours.parameters()) == shared + 4 * each == 18_992


def test_training_starts_at_the_constants(model):
    """W_up starts at zero, so at first the soft tokens do not depend on the instruction."""
    tuner, block = IAPT(model.config), model.h[1]
    x, instr = torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    constants = split_kv(tuner.constants[1].expand(2, -1, -1), model.config.head_dim)
    soft = tuner.kv(block, 1, x, instr)
    assert torch.equal(soft.k, constants.k) and torch.equal(soft.v, constants.v)
    assert len(tuner.constants[1].unique(dim=0)) == 12
    shake(tuner)
    assert not torch.equal(*tuner.kv(block, 1, x, instr).k)


def test_what_is_generated_for_a_soft_token_is_added_to_each_of_its_constants(model):
    tuner = shake(IAPT(model.config, P=2, repeat=3))
    x, instr = torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    generated = tuner.generators[1](x, instr)
    assert generated.shape[1] == 2 and not torch.allclose(generated[:, 0], generated[:, 1])
    soft = tuner.kv(model.h[1], 1, x, instr)
    constants = split_kv(tuner.constants[1][None], model.config.head_dim)
    added = split_kv(torch.cat([generated] * 3, 1), model.config.head_dim)
    torch.testing.assert_close(soft.k, constants.k + added.k)
    torch.testing.assert_close(soft.v, constants.v + added.v)


def test_prepending_soft_tokens_and_discarding_them_equals_extra_keys_and_values(model):
    """At a layer, the paper's soft tokens stand before the input, are transformed with it and dropped: only their keys
    and values act.
    """
    tuner = small_tuner("paper-iapt", model)
    idx, instr = right_padded([9, 9], 9)
    x, rope = model.embed(idx, torch.arange(9))
    position = torch.tensor([0, 0, 0, 0, *range(9)])  # soft tokens at position 0, the others at their own
    rope_of_all = None if rope is None else rotary(model.config, position)
    for l, block in enumerate(model.h):
        prepended, _, _ = block(torch.cat((tuner.prompt(l, x, instr), x), 1), rope_of_all)
        joined, separate = tuner.soft(block, l, x, instr)
        assert separate is None
        x, _, _ = block(x, rope, attention_mask(x, None, joined), joined)
        torch.testing.assert_close(x, prepended[:, 4:], atol=1e-5, rtol=1e-5)


def test_separate_soft_tokens_add_a_softmax_of_their_own_to_what_attention_finds(model):
    """By hand: with the same queries, softmax(q k / sqrt(D)) v goes through the output projection and is added."""
    block, D, groups = model.h[0], model.config.head_dim, model.config.n_head // model.config.n_kv_head
    x, rope = model.embed(right_padded([5, 5], 5)[0], torch.arange(5))
    k, v = (torch.randn(2, model.config.n_kv_head, 3, D) for _ in range(2))
    after_attention = []
    block.ln_2.register_forward_pre_hook(lambda _, inputs: after_attention.append(inputs[0]))
    block(x, rope)
    block(x, rope, separate=Soft(k, v))
    q, _, _ = block.attn.qkv(block.ln_1(x), rope)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    found = (q @ k.transpose(2, 3) / D**0.5).softmax(-1) @ v
    wanted = found.transpose(1, 2).flatten(2) @ block.attn.o.weight.T
    torch.testing.assert_close(after_attention[1] - after_attention[0], wanted, atol=1e-5, rtol=1e-5)


def test_separate_soft_tokens_take_no_attention_from_the_tokens(model):
    """With values of zero they do nothing; joined with the tokens, keys alone would draw attention away from them."""
    idx, instr = right_padded([7, 4], 7)
    for separate in (True, False):
        tuner = shake(PTuning2(model.config, P=3, separate=separate))
        for constants in tuner.constants:
            constants.data[:, constants.shape[1] // 2 :] = 0
        assert torch.equal(model(idx, instr, tuner), model(idx)) == separate


def test_a_soft_token_that_is_not_kept_does_not_act(model):
    block = model.h[0]
    idx, _ = right_padded([5, 5], 5)
    x, rope = model.embed(idx, torch.arange(5))
    k, v, _ = block.soft_kv(torch.randn(2, 4, 32))
    some = Soft(k, v, torch.tensor([[True] * 4, [True, False, True, False]]))
    fewer = Soft(k[1:, :, ::2], v[1:, :, ::2])
    y, _, _ = block(x, rope, attention_mask(x, None, some), some)
    wanted, _, _ = block(x[1:], rope, attention_mask(x[1:], None, fewer), fewer)
    torch.testing.assert_close(y[1:], wanted)
    y, _, _ = block(x, rope, separate=some)
    torch.testing.assert_close(y[1:], block(x[1:], rope, separate=fewer)[0])
    assert not torch.allclose(y, block(x, rope, separate=Soft(k, v))[0])


def test_decay_pulls_no_coefficient_no_mean_and_no_constant_towards_zero(model):
    tuner = IAPT(model.config)
    exempt = {id(p) for g in tuner.generators for p in (*g.act.parameters(), g.centre)} | set(map(id, tuner.constants))
    assert {id(p) for group in tuner.groups(1.0) if group.get("weight_decay") == 0.0 for p in group["params"]} == exempt


def test_layers_share_the_projections_of_ours_and_nothing_else():
    config = small_model("llama", n_layer=4).config
    for cls, projections_in_all in ((IAPT, 1), (PaperIAPT, 4)):
        generators = cls(config).generators
        assert len({id(g.down) for g in generators}) == len({id(g.up) for g in generators}) == projections_in_all
        assert len({id(g.w_sa) for g in generators}) == len({id(g.act) for g in generators}) == 4
