"""The method itself: the rational activation and its hand-derived gradients, the pooling, the generator, and where the
soft tokens act.
"""

import copy
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from conftest import generator_of, right_padded, shake, small_model, small_tuner

import iapt
from baselines import Constants, PTuning2
from iapt import IAPT, Generator, PaperGenerator, PaperIAPT, Rational, RationalFunction
from model import Config, Context, Soft, Tuner, attention_mask, rotary

# -- The activation ----------------------------------------------------------------------------------------------------


def test_the_rationals_gradients_are_right_for_x_a_and_b():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 7, generator=g, dtype=torch.double, requires_grad=True)
    a = torch.randn(7, generator=g, dtype=torch.double, requires_grad=True)
    b = torch.randn(5, generator=g, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(RationalFunction.apply, (x, a, b))


def test_the_rational_is_its_formula():
    x = torch.linspace(-4, 4, 101, dtype=torch.double)
    a, b = torch.randn(7, dtype=torch.double), torch.randn(5, dtype=torch.double)
    n = sum(a[j] * x**j for j in range(7))
    s = sum(b[i] * x ** (i + 1) for i in range(5))
    torch.testing.assert_close(RationalFunction.apply(x, a, b), n / (1 + s.abs()))


def test_at_the_kink_the_gradient_is_a_subgradient():
    x = torch.zeros(3, requires_grad=True)
    a, b = torch.tensor([1.0, 2, 0, 0, 0, 0, 0]), torch.ones(5, requires_grad=True)
    RationalFunction.apply(x, a, b).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0, 2.0] and b.grad.tolist() == [0.0] * 5


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
    """Against float64, over more numbers than a batch of a large model has."""
    torch.manual_seed(0)
    x, g, r = torch.randn(64, 4, 256), torch.randn(64, 4, 256), shake(Rational(), 0.01)
    r64 = copy.deepcopy(r).double()
    x64 = (x.double() / 4).requires_grad_()
    RationalFunction.apply(x64, r64.a, r64.b).backward(g.double())
    for ours, exact in zip(gradients_of(x, r, g)[2:], (r64.a.grad, r64.b.grad)):
        assert ((ours - exact).abs() / exact.abs()).max() < 2e-4


@pytest.mark.slow
def test_the_compiled_rational_equals_the_eager_one():
    torch.manual_seed(0)
    x, g, r = torch.randn(64, 1000), torch.randn(64, 1000), shake(Rational(), 0.01)
    eager = gradients_of(x, r, g)
    r.compile(fullgraph=True)
    for compiled, plain in zip(gradients_of(x, r, g), eager):
        torch.testing.assert_close(compiled, plain, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4, 5)])
def test_the_activation_takes_any_shape(shape):
    x, r = torch.randn(shape, requires_grad=True), Rational()
    r(x).sum().backward()
    flat = copy.deepcopy(r)
    flat.zero_grad()
    flat(x.detach().reshape(1, -1)).sum().backward()
    torch.testing.assert_close([x.grad.shape, r.a.grad, r.b.grad], [x.shape, flat.a.grad, flat.b.grad])


# -- The generator -----------------------------------------------------------------------------------------------------


GENERATORS = [IAPT.generator, PaperGenerator]  # IAPT's is ours, or with --generator a reader's own


def generator(cls=IAPT.generator, P=4):
    torch.manual_seed(0)
    return shake(cls(torch.nn.Parameter(0.2 * torch.randn(32, 5)), 16, P, "rational"))


def hidden_states(lengths=(6, 3), T=8):
    """H (B, T, C) and instr (B, T)."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(len(lengths), T, 32, generator=g), right_padded(list(lengths), T)[1]


def nine_lines():
    """The function that iapt.py begins with."""
    (code,) = re.findall(r"    def soft_tokens.*?(?=    #   and in)", iapt.__doc__, re.DOTALL)
    names = {"torch": torch, "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-4)}
    exec(textwrap.dedent(code), names)
    return names["soft_tokens"]


def test_the_nine_lines_are_what_iapt_computes(model):
    """Each row on its own, as the lines have it: whatever stands in its padding, and in other rows."""
    tuner, (H, instr) = shake(IAPT(model.config)), hidden_states()
    g, heads = tuner.generators[1], model.h[1].attn.heads
    soft = tuner.kv(model.h[1], 1, H, instr)
    for row in range(2):
        parts = tuner.keys[1], tuner.values[1], g.W_down, g.W_sa, g.R, g.W_up
        k, v = nine_lines()(H[row], instr[row], *parts)
        torch.testing.assert_close(soft.k[row], heads(k[None])[0])
        torch.testing.assert_close(soft.v[row], heads(v[None])[0], atol=1e-4, rtol=1e-4)


def test_line_1_z_is_the_normed_states_times_w_down():
    """Scaled before or after the product.  A state of zeros has no length, and must not become nan."""
    g, (H, _) = generator(), hidden_states()
    torch.testing.assert_close(g.project(H), F.rms_norm(H, (32,)) @ g.W_down, atol=1e-4, rtol=1e-4)
    assert g.project(torch.zeros_like(H)).isfinite().all()


def test_line_2_a_is_a_softmax_over_the_prompt():
    g, (H, instr) = generator(), hidden_states()
    Z = F.rms_norm(H, (32,)) @ g.W_down
    A = g.attention(Z, instr)
    for row, t in enumerate((6, 3)):
        torch.testing.assert_close(A[row, :t], (Z[row, :t] @ g.W_sa).softmax(0))
        assert not A[row, t:].any()


def test_line_3_q_is_the_normed_readings():
    g, (H, instr), seen = generator(), hidden_states(), []
    g.R.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    g(H, instr)
    readings = g.attention(g.project(H), instr).mT @ g.project(H)
    torch.testing.assert_close(seen[0], F.rms_norm(readings, (5,), eps=1e-4))


def test_line_4_s_is_the_activation_of_q_times_w_up():
    g, (H, instr), seen = generator(), hidden_states(), []
    g.R.register_forward_hook(lambda _, inputs, out: seen.append(out))
    _, S = g(H, instr)
    torch.testing.assert_close(S, seen[0] @ g.W_up)
    assert S.shape == (2, 4, 16) and S.dtype == torch.float32


@pytest.mark.parametrize("cls", GENERATORS)
def test_the_weights_are_a_distribution_over_the_instruction(cls):
    """Whatever stands in the padding and in the response."""
    (H, instr), g = hidden_states(), generator(cls)
    A = g.attention(g.project(H), instr)  # (B, T, P)
    torch.testing.assert_close(A.sum(1), torch.ones(2, 4))
    assert (A * ~instr[..., None]).abs().max() == 0
    torch.testing.assert_close(A[1:, :3], g.attention(g.project(H[1:, :3]), instr[1:, :3]))


@pytest.mark.parametrize("cls", GENERATORS)
def test_with_norms_the_length_of_hidden_states_is_nothing_and_q_has_unit_mean_square(cls):
    g, normed, seen = generator(cls), cls is not PaperGenerator, []
    g.R.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    H, instr = hidden_states()
    g(H, instr), g(7 * H, instr)
    q, longer = seen
    assert torch.allclose(q, longer, atol=1e-3) == normed
    assert torch.allclose(q.pow(2).mean(-1), torch.ones(2, 4), atol=1e-2) == normed


@pytest.mark.parametrize("cls", GENERATORS)
def test_a_generator_keeps_no_copy_of_the_hidden_states_for_the_backward_pass(cls):
    """In the frozen model's dtype: a copy of H (B, T, C) in fp32, or normed, would be kept for every layer."""
    g, H = generator(cls), torch.randn(4, 50, 32).bfloat16()
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        g(H.requires_grad_(), torch.ones(4, 50, dtype=torch.bool))
    del kept[H.untyped_storage().data_ptr()]
    assert max(kept.values()) <= 4 * 50 * 5 * 4  # Z in fp32


# -- The soft tokens ---------------------------------------------------------------------------------------------------


def test_the_parameter_counts_are_those_of_the_docstrings():
    """MiLoRA reports 83.9M for IAPT on LLaMA-2 7B with a bottleneck of 320."""
    with torch.device("meta"):
        paper = PaperIAPT(Config(arch="llama", vocab_size=32000, n_layer=32, n_head=32, n_embd=4096), m=320)
        ours = IAPT(Config(arch="llama", vocab_size=1000, n_layer=4, n_head=4, n_embd=128))  # the shipped model's sizes
    assert sum(p.numel() for p in paper.parameters()) == 32 * (2 * 4096 * 320 + 320 * 4 + 12) == 83_927_424
    each = 8 * 4 + 12 + 8 * 128 + 2 * 4 * 3 * 128
    assert sum(p.numel() for p in ours.parameters()) == 128 * 8 + 4 * each == 17_584


class OwnDown(IAPT):
    """Each layer has its own W_down."""

    def __init__(self, config):
        super().__init__(config)
        for generator in self.generators:
            generator.W_down = torch.nn.Parameter(torch.randn_like(generator.W_down))


@pytest.mark.parametrize("cls", [IAPT, OwnDown])
def test_all_layers_at_once_are_what_each_would_write_alone(model, cls):
    tuner, (_, instr) = shake(cls(model.config)), hidden_states()
    states = list(torch.randn(2, 2, 8, 32))
    together, alone = tuner.write(model, states, instr), Tuner.write(tuner, model, states, instr)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours.separate.k, theirs.separate.k)
        torch.testing.assert_close(ours.separate.v, theirs.separate.v)
    sum(layer.separate.v.sum() for layer in together).backward()
    assert all(g.W_down.grad is not None for g in tuner.generators)
    seen = []
    tuner.generators[1].register_forward_hook(lambda *_: seen.append(1))
    tuner.write(model, states, instr)
    assert seen == [1]


def test_training_starts_as_the_frozen_model(model):
    """Values and W_up start at zero, and every parameter of the soft tokens moves from there."""
    idx, instr = right_padded([9, 5], 9)
    tuner = IAPT(model.config)
    assert torch.equal(model(idx, instr, tuner), model(idx))
    model(idx, instr, tuner, idx).backward()
    moved = [*tuner.values, *(g.W_up for g in tuner.generators)]
    assert all(p.grad.abs().sum() > 0 for p in moved)


def test_what_is_generated_for_a_soft_token_is_added_to_each_of_its_values_and_to_no_key(model):
    tuner = shake(IAPT(model.config, P=2, repeat=3))
    x, instr = torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    _, generated = tuner.generators[1](x, instr)
    assert generated.shape[1] == 2 and not torch.allclose(generated[:, 0], generated[:, 1])
    soft, heads = tuner.kv(model.h[1], 1, x, instr), model.h[1].attn.heads
    torch.testing.assert_close(soft.v, heads(tuner.values[1] + torch.cat([generated] * 3, 1)))
    torch.testing.assert_close(soft.k, heads(tuner.keys[1].expand(2, -1, -1)))


def test_the_paper_s_form_starts_as_states_of_different_words_that_stand_alone(model):
    tuner, entering, words = PaperIAPT(model.config, m=6), [], torch.arange(50)[:, None]
    tuner.start(model)
    spy = Tuner()
    spy.soft_tokens = lambda l, x, instr: entering.append(x[:, 0])
    model.hidden(words, words >= 0, spy)
    for x, generator in zip(entering, tuner.generators, strict=True):
        cosines = F.normalize(x) @ F.normalize(generator.W_up).mT  # (words, m)
        assert (cosines.amax(0) > 1 - 1e-5).all()
        assert len(cosines.argmax(0).unique()) > 1  # not m times the same word
        torch.testing.assert_close(generator.W_up.square().mean(1), torch.ones(6), atol=1e-4, rtol=1e-4)


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
        prepended, _, _ = block(torch.cat((tuner.soft_tokens(l, x, instr), x), 1), rope_of_all)
        soft = tuner.context(block, l, x, instr)
        assert soft.separate is None
        x, _, _ = block(x, rope, soft, attention_mask(9, soft.joined))
        torch.testing.assert_close(x, prepended[:, 4:], atol=1e-5, rtol=1e-5)


def test_separate_soft_tokens_add_a_softmax_of_their_own_to_what_attention_finds(model):
    """By hand: with the same queries, softmax(q k / sqrt(D)) v goes through the output projection and is added."""
    block, D, groups = model.h[0], model.config.head_dim, model.config.n_head // model.config.n_kv_head
    x, rope = model.embed(right_padded([5, 5], 5)[0], torch.arange(5))
    k, v = (torch.randn(2, model.config.n_kv_head, 3, D) for _ in range(2))
    after_attention = []
    block.ln_2.register_forward_pre_hook(lambda _, inputs: after_attention.append(inputs[0]))
    block(x, rope)
    block(x, rope, Context(separate=Soft(k, v)))
    q, _, _ = block.attn.qkv(block.ln_1(x), rope)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    found = (q @ k.transpose(2, 3) / D**0.5).softmax(-1) @ v
    wanted = found.transpose(1, 2).flatten(2) @ block.attn.o.weight.T
    torch.testing.assert_close(after_attention[1] - after_attention[0], wanted, atol=1e-5, rtol=1e-5)


def test_separate_soft_tokens_take_no_attention_from_the_tokens(model):
    """With values of zero they do nothing; joined with the tokens, keys alone would draw attention away from them."""
    idx, instr = right_padded([7, 4], 7)
    separate, joined = shake(Constants(model.config, P=3)), shake(PTuning2(model.config, P=3))
    with torch.no_grad():
        for values in separate.values:
            values.zero_()
        for constants in joined.constants:
            constants[:, constants.shape[1] // 2 :] = 0
    assert torch.equal(model(idx, instr, separate), model(idx))
    assert not torch.equal(model(idx, instr, joined), model(idx))


def test_a_soft_token_that_is_not_kept_does_not_act(model):
    block = model.h[0]
    idx, _ = right_padded([5, 5], 5)
    x, rope = model.embed(idx, torch.arange(5))
    k, v, _ = block.soft_kv(torch.randn(2, 4, 32))
    some = Soft(k, v, torch.tensor([[True] * 4, [True, False, True, False]])[:, None, None])
    fewer = Soft(k[1:, :, ::2], v[1:, :, ::2])
    y, _, _ = block(x, rope, Context(joined=some), attention_mask(5, some))
    wanted, _, _ = block(x[1:], rope, Context(joined=fewer), attention_mask(5, fewer))
    torch.testing.assert_close(y[1:], wanted)
    y, _, _ = block(x, rope, Context(separate=some))
    torch.testing.assert_close(y[1:], block(x[1:], rope, Context(separate=fewer))[0])
    assert not torch.allclose(y, block(x, rope, Context(separate=Soft(k, v)))[0])


def test_a_method_may_say_which_soft_tokens_are_kept(model):
    keep = torch.tensor([[True, False, True], [True, True, True]])

    class Some(Constants):
        def kv(self, *args):
            return super().kv(*args)._replace(keep=keep)

    idx, instr = right_padded([5, 5], 5)
    soft = Some(model.config, P=3).context(model.h[0], 0, model.embed(idx, torch.arange(5))[0], instr)
    assert soft.separate.keep is keep


def test_decay_pulls_no_coefficient_and_no_constant_towards_zero(model):
    tuner = IAPT(model.config)
    exempt = {id(p) for g in tuner.generators for p in g.R.parameters()} | {
        *map(id, tuner.keys),
        *map(id, tuner.values),
    }
    assert {id(p) for group in tuner.groups(1.0) if group.get("weight_decay") == 0.0 for p in group["params"]} == exempt


def test_scores_of_a_reading_start_with_a_variance_of_one_whatever_the_size():
    for m in (100, 900):
        generator = Generator(torch.nn.Parameter(torch.randn(4, m)), 2, 64, "gelu")
        assert generator.W_sa.std().item() * m**0.5 == pytest.approx(1, abs=0.05)


def test_a_wider_model_gets_a_smaller_rate():
    narrow, wide = (IAPT(Config(vocab_size=9, n_layer=1, n_head=2, n_embd=C)).lr for C in (64, 256))
    assert narrow == 4 * wide


def test_layers_share_the_down_projection_of_ours_and_nothing_else():
    config = small_model("llama", n_layer=4).config
    for cls, shared in ((IAPT, 1), (PaperIAPT, 4)):
        generators = cls(config).generators
        assert len({id(g.W_down) for g in generators}) == shared
        assert len({id(g.W_up) for g in generators}) == 4
        assert len({id(g.W_sa) for g in generators}) == len({id(g.R) for g in generators}) == 4


def test_a_reader_s_own_generator_is_the_class_of_that_name_or_one_derived_from_ours(tmp_path):
    path = tmp_path / "my.py"
    start = "import torch\nfrom iapt import Generator as Ours\nclass Helper: pass\n"
    for code, name in (("class Mean(Ours): pass", "Mean"), ("class Generator(torch.nn.Module): pass", "Generator")):
        path.write_text(f"{start}{code}\n")
        assert generator_of(str(path)).__name__ == name
    path.write_text(start)
    with pytest.raises(pytest.UsageError, match="it has Helper, and should have one called Generator"):
        generator_of(str(path))
    with pytest.raises(pytest.UsageError, match="No such file"):
        generator_of(str(tmp_path / "none.py"))
