"""The method itself: the rational activation and its hand-derived gradients, the pooling, the generator, the two
spaces.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import right_padded, shake, small_model, small_tuner

import iapt
from baselines import PTuning2, build, complete
from checkpoint import fill, load_tuner, save_tuner
from iapt import IAPT, POOLS, Centre, Rational, RationalFunction, last_pool, mean_pool
from model import Config, places


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
    p = sum(a[j] * x**j for j in range(7))
    q = (
        1 + sum(b[i] * x ** (i + 1) for i in range(5)).abs()
    )  # the absolute value of the sum, not the sum of absolute values
    torch.testing.assert_close(RationalFunction.apply(x, a, b), p / q)


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
    """dR/da <= 1 and |dR/db| <= |R| <= 4 on [-4, 4], for the coefficients that learn: Adam moves them all alike."""
    x, r, step = torch.linspace(-4, 4, 801), Rational(), 1e-2
    before = r(x).detach()
    for c, most in ((r.a, 1), (r.b, 4)):
        for j in range(len(c)):
            with torch.no_grad():
                c[j] += step
                assert 0.01 * step < (r(x) - before).abs().max() <= 1.01 * most * step
                c[j] -= step


def test_a_checkpoint_from_before_coefficients_had_a_unit_is_the_same_function(model, tmp_path):
    tuner = small_tuner("iapt", model, ["unit=1"])
    options = [o for o in complete("iapt", ["unit=1"]) if not o.startswith("unit")]
    save_tuner(tmp_path / "t.pt", tuner, {"method": "iapt", "options": options, "init": "", "base": ""})
    content = load_tuner(tmp_path / "t.pt")
    loaded = build("iapt", model.config, content["meta"]["options"])
    fill(loaded, content, "t.pt")
    idx, instr = right_padded([9, 5], 9)
    assert torch.equal(model(idx, instr, loaded), model(idx, instr, tuner))


def test_only_x_and_the_coefficients_are_kept_for_the_backward_pass():
    x, r = torch.randn(1000, requires_grad=True), Rational()

    def kept(f, *inputs):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            f(*inputs)
        return sum(sizes)

    assert kept(RationalFunction.apply, x, r.a, r.b) == 1000 + 12
    assert kept(r, x) == 1000 + 12 + 12  # and the units of the coefficients


def gradients_of(x, r, g):
    x = x.detach().requires_grad_()
    r.zero_grad()
    r(x).backward(g)
    return [r(x).detach(), x.grad, r.a.grad, r.b.grad]


def test_the_coefficients_gradients_are_summed_without_losing_digits():
    """Against float64, over a million numbers."""
    torch.manual_seed(0)
    x, g, r = torch.randn(1024, 1024), torch.randn(1024, 1024), shake(Rational(), 0.01)
    exact = gradients_of(x.double(), copy.deepcopy(r).double(), g.double())
    for got, wanted in zip(gradients_of(x, r, g)[2:], exact[2:]):
        assert ((got - wanted).abs() / wanted.abs()).max() < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_rational_equals_the_eager_one(monkeypatch, dtype):
    """Each pass is one kernel, and nothing but x is kept."""
    torch.manual_seed(0)
    x, g, r = torch.randn(64, 1000).to(dtype), torch.randn(64, 1000).to(dtype), shake(Rational(), 0.01)
    eager = gradients_of(x, r, g)
    monkeypatch.setattr(iapt, "LARGE", 0)
    compiled = gradients_of(x, r, g)
    for a, b in zip(compiled, eager):
        torch.testing.assert_close(a, b, atol=1e-5 if a.dtype == torch.float32 else 1e-2, rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4, 5)])
def test_the_activation_takes_any_shape(shape):
    x, r = torch.randn(shape, requires_grad=True), Rational()
    r(x).sum().backward()
    flat = copy.deepcopy(r)
    flat.zero_grad()
    flat(x.detach().reshape(1, -1)).sum().backward()
    torch.testing.assert_close([x.grad.shape, r.a.grad, r.b.grad], [x.shape, flat.a.grad, flat.b.grad])


def test_pooling_weights_are_a_distribution_over_the_instruction():
    z, w = torch.randn(2, 8, 5), torch.randn(5, 4)
    _, instr = right_padded([6, 3], 8)
    for name in ("normed", "attention", "mean", "last"):
        pool = POOLS[name]
        weights = pool(z, w, instr)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        assert (weights * ~instr[:, None]).abs().max() == 0
        torch.testing.assert_close(weights[1:, :, :3], pool(z[1:, :3], w, instr[1:, :3]))
    torch.testing.assert_close((mean_pool(z, w, instr) @ z)[1, 0], z[1, :3].mean(0))
    torch.testing.assert_close((last_pool(z, w, instr) @ z)[1, 0], z[1, 2])


def test_the_paper_s_form_has_the_parameter_count_from_which_it_was_inferred():
    """MiLoRA reports 83.9M for IAPT on LLaMA-2 7B with a bottleneck of 320."""
    config = Config(arch="llama", vocab_size=32000, n_layer=32, n_head=32, n_embd=4096)
    with torch.device("meta"):
        tuner = IAPT(
            config,
            m=320,
            pool="attention",
            space="hidden",
            static=0,
            centre=False,
            norm=False,
            share=1,
            apart=False,
        )
    assert sum(p.numel() for p in tuner.parameters()) == 32 * (2 * 4096 * 320 + 320 * 4 + 12) == 83_927_424


@pytest.mark.parametrize("space", ["hidden", "kv"])
def test_it_starts_at_its_static_part(model, space):
    """The up-projection starts at zero, so at first the prompt does not depend on the instruction."""
    tuner = IAPT(model.config, space=space)
    x, instr = torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    assert torch.equal(tuner.prompt(1, x, instr)[0], tuner.static[1])
    assert len(tuner.static[1].unique(dim=0)) == 12
    shake(tuner)
    assert not torch.equal(*tuner.prompt(1, x, instr))


@pytest.mark.parametrize("space", ["hidden", "kv"])
def test_what_is_generated_for_a_soft_token_is_added_to_each_of_its_constants_and_to_nothing_beside(model, space):
    tuner = shake(IAPT(model.config, P=2, static=3, beside=1, space=space))
    x, instr = torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    s, generated = tuner.prompt(1, x, instr), tuner.generators[1](x, instr)
    assert generated.shape[1] == 2 and not torch.allclose(generated[:, 0], generated[:, 1])
    added = s - tuner.static[1]
    assert torch.allclose(added, torch.cat([torch.zeros_like(generated[:, :1]), *[generated] * 3], 1), atol=1e-5)


@pytest.mark.parametrize("static", [0, 1, 2])
def test_soft_tokens_beside_the_generated_ones_are_the_same_for_every_instruction(model, static):
    tuner = shake(IAPT(model.config, beside=3, static=static))
    x, instr = torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    s = tuner.prompt(1, x, instr)
    assert s.shape[:2] == (2, 3 + 4 * max(1, static))
    assert torch.equal(s[0, :3], s[1, :3]) and torch.equal(s[0, :3], tuner.static[1][:3])
    assert not (s[0, 3:] == s[1, 3:]).any()


@pytest.mark.parametrize("norm", [0, 1])
def test_with_norm_the_length_of_hidden_states_is_nothing_and_q_has_unit_mean_square(model, norm):
    g = shake(IAPT(model.config, norm=bool(norm))).generators[0]
    if norm:
        g.centre.data += 4  # far from all q: what is small is left small
    x, instr = torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    q, longer = g.pooled(x, instr), g.pooled(7 * x, instr)
    assert torch.allclose(q, longer, atol=1e-4) == bool(norm)
    assert torch.allclose(q.pow(2).mean(-1), torch.ones(2, 4), atol=1e-4) == bool(norm)


def test_prepending_soft_tokens_and_discarding_them_equals_extra_keys_and_values(model):
    """At a layer, soft tokens stand before the input, are transformed with it and dropped: only their keys and values
    act.
    """
    tuner = small_tuner("iapt", model, ["space=hidden", "apart=0", "static=1"])
    idx, instr = right_padded([9, 9], 9)
    x, rope = model.embed(idx, torch.arange(9))
    position = torch.tensor([0, 0, 0, 0, *range(9)])  # soft tokens at position 0, the others at their own
    for l, block in enumerate(model.h):
        s = tuner.prompt(l, x, instr)
        prepended, _ = block(torch.cat((s, x), 1), model.rotary(position) if model.rotary else None)
        x, _ = block(x, rope, tuner.kv(block, l, x, instr))
        torch.testing.assert_close(x, prepended[:, 4:], atol=1e-5, rtol=1e-5)


def test_soft_tokens_apart_add_a_softmax_of_their_own_to_what_attention_finds(model):
    """By hand: with the same queries, softmax(q k / sqrt(D)) v goes through the output projection and is added."""
    block, D, groups = model.h[0], model.config.head_dim, model.config.n_head // model.config.n_kv_head
    x, rope = model.embed(right_padded([5, 5], 5)[0], torch.arange(5))
    k, v = (torch.randn(2, model.config.n_kv_head, 3, D) for _ in range(2))
    got = []
    block.mlp.register_forward_pre_hook(lambda _, given: got.append(given[0]))
    block.ln_2.register_forward_pre_hook(lambda _, given: got.append(given[0]))
    block(x, rope)
    block(x, rope, None, (k, v, None))
    q, _, _ = block.attn.qkv(block.ln_1(x), rope)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    found = (q @ k.transpose(2, 3) / D**0.5).softmax(-1) @ v
    wanted = found.transpose(1, 2).flatten(2) @ block.attn.o.weight.T
    torch.testing.assert_close(got[2] - got[0], wanted, atol=1e-5, rtol=1e-5)


def test_soft_tokens_apart_take_no_attention_from_the_tokens(model):
    """With values of zero they do nothing; among the tokens, keys alone would draw attention away from them."""
    idx, instr = right_padded([7, 4], 7)
    for apart in (True, False):
        tuner = shake(PTuning2(model.config, P=3, apart=apart))
        for s in tuner.static:
            s.data[:, s.shape[1] // 2 :] = 0
        assert torch.equal(model(idx, instr, tuner), model(idx)) == apart


def test_normed_pooling_is_not_sharpened_by_the_length_of_z():
    z, w, (_, instr) = torch.randn(2, 8, 5), torch.randn(5, 4), right_padded([6, 3], 8)
    for name in ("normed", "attention"):
        assert torch.allclose(POOLS[name](z, w, instr), POOLS[name](9 * z, w, instr), atol=1e-5) == (name == "normed")


def test_what_is_left_where_all_instructions_are_alike_is_not_blown_up(model):
    g = shake(IAPT(model.config)).generators[0]
    x, instr = torch.randn(1, 6, 32), torch.ones(1, 6, dtype=torch.bool)
    z, weights = g.reads(x, instr)
    g.centre.data = (weights @ z)[0].detach() + 1e-4
    assert g.pooled(x, instr).abs().max() < 0.1


def test_decay_pulls_no_coefficient_and_no_mean_towards_zero(model):
    tuner = IAPT(model.config)
    exempt = {id(p) for g in tuner.generators for p in (*g.act.parameters(), g.centre)}
    assert {id(p) for group in tuner.groups(1.0) if group.get("weight_decay") == 0.0 for p in group["params"]} == exempt


def test_without_pooling_all_instructions_are_one(model):
    tuner = shake(IAPT(model.config, pool="none"))
    x, instr = torch.randn(3, 6, 32), right_padded([6, 4, 5], 6)[1]
    a, b, c = tuner.prompt(0, x, instr)
    assert torch.equal(a, b) and torch.equal(b, c)


def test_the_centre_becomes_the_mean_of_q_whatever_the_loss_and_whatever_the_batch_s_parts():
    q, c = torch.randn(64, 4, 5) + torch.randn(4, 5), torch.zeros(4, 5, requires_grad=True)
    optimizer = torch.optim.Adam([c], lr=0.05)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        optimizer.zero_grad()
        (1e-3 * Centre.apply(q, c).exp().sum()).backward()
        optimizer.step()
    torch.testing.assert_close(c.detach(), q.mean(0), atol=0.01, rtol=0)
    x, c = q.clone().requires_grad_(), torch.zeros(4, 5, requires_grad=True)
    Centre.apply(x, c).backward(q)
    assert torch.equal(x.grad, q)  # what q stands about does not matter to q
    whole, c.grad = c.grad, None
    for part in q.split(16):
        Centre.apply(part, c).sum().backward()
    torch.testing.assert_close(c.grad, whole, atol=0, rtol=1e-4)  # both are tiny


def test_q_is_measured_from_its_centre(model):
    g = shake(IAPT(model.config)).generators[0]
    x, instr = torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    z, weights = g.reads(x, instr)
    g.centre.data = (weights @ z)[0].detach()
    assert (g.pooled(x, instr)[0] == 0).all() and (g.pooled(x, instr)[1] != 0).any()


def test_a_slot_that_is_not_kept_does_not_act(model):
    block = model.h[0]
    idx, _ = right_padded([5, 5], 5)
    x, rope = model.embed(idx, torch.arange(5))
    k, v = block.soft_kv(torch.randn(2, 4, 32))
    keep = torch.tensor([[True] * 4, [True, False, True, False]])
    y, _ = block(x, rope, (k, v, keep), None, places((k, v, keep), None, x))
    fewer, _ = block(x[1:], rope, (k[1:, :, ::2], v[1:, :, ::2], None))
    torch.testing.assert_close(y[1:], fewer)
    assert not torch.allclose(y, block(x, rope, (k, v, None))[0])


def test_shared_projections_are_shared_and_nothing_else_is():
    model = small_model("llama", n_layer=4)
    a, b, c, d = IAPT(model.config, share=2).generators
    assert a.down is b.down and a.up is b.up and b.down is not c.down and c.up is d.up
    assert len({id(g.w_sa) for g in (a, b, c, d)}) == len({id(g.act) for g in (a, b, c, d)}) == 4
    for share, different in ((0, 1), (1, 4), (3, 2)):
        generators = IAPT(model.config, share=share).generators
        assert len({id(g.down) for g in generators}) == len({id(g.up) for g in generators}) == different
