"""Several tenants in one batch: each row is what it would be alone, and prompts cost nothing after they are read."""

import pytest
import torch
from conftest import right_padded, shake, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from baselines import METHODS, build
from baselines.embedded import Embedded, EmbeddedTuner
from baselines.tenants import Tenants
from sample import generate

MIXED = [
    ("iapt", "activation=relu"), ("paper-iapt", "P=2"), ("ptuning2", "P=7"), ("prompt", "P=3"),
    ("dynamic", "length=1 P=4"), ("constants", "P=3"),
    ("lora", "r=2"), ("lora", "r=5 alpha=8"), ("lora", "on=k,o,up"), ("adapter", ""),
]  # fmt: skip
SHIFTED = [("prompt", "P=3 shift=1"), ("ptuning2", "P=3 shift=1"), ("prompt", "P=3 shift=1")]
SOFT, EMBEDDINGS, LORA = MIXED[:3], MIXED[3:5], MIXED[6:8]
ALIKE = [("iapt", "m=3"), ("iapt", "m=3"), ("iapt", "m=3 activation=gelu"), ("iapt", "m=4 P=2 repeat=6")]


def tenant(method, options, model, seed):
    """A shaken tuner, not attached: no two are alike."""
    torch.manual_seed(seed)
    tuner = build(method, model.config, options.split())
    tuner.start(model)
    return shake(tuner, 0.1, seed).eval()


def alone(model, tuner, f):
    if tuner is None:
        return f(None)
    tuner.attach(model)
    out = f(tuner)
    tuner.detach()
    return out


@pytest.mark.parametrize(
    "mixed",
    [MIXED, SOFT, LORA, EMBEDDINGS, ALIKE, SHIFTED],
    ids=["all", "soft", "lora", "embeddings", "alike", "shifted"],
)
def test_a_mixed_batch_equals_one_tenant_at_a_time(model, mixed):
    tuners = [tenant(*spec, model, seed) for seed, spec in enumerate(mixed)]
    tenant_of_row = [*range(len(tuners)), *[-1] * (mixed is not SHIFTED), 0, 1]
    idx, instr = right_padded([(5 + 3 * i) % 9 + 1 for i in range(len(tenant_of_row))], 9)
    tenants = Tenants(tuners, tenant_of_row)
    tenants.attach(model)
    together = model(idx, instr, tenants)
    tenants.detach()
    for row, t in enumerate(tenant_of_row):
        n = instr[row].sum()
        own = idx[row : row + 1, :n], instr[row : row + 1, :n]
        wanted = alone(model, tuners[t] if t >= 0 else None, lambda tuner, own=own: model(*own, tuner))
        torch.testing.assert_close(together[row : row + 1, :n], wanted, atol=1e-4, rtol=1e-4)


def test_tenants_with_different_numbers_of_rows_keep_their_own(model):
    a, b = (tenant("iapt", "m=3", model, seed) for seed in range(2))
    idx, instr = right_padded([5, 4, 3, 6], 6)
    tenants = Tenants([a, b], [0, 1, 1, 1])
    tenants.attach(model)
    wanted = torch.cat((model(idx[:1], instr[:1], a), model(idx[1:], instr[1:], b)))
    torch.testing.assert_close(model(idx, instr, tenants), wanted, atol=1e-4, rtol=1e-4)


def test_a_row_without_separate_soft_tokens_sees_zeros_and_no_row_a_mask_that_hides_nothing(model):
    """A softmax over nothing is nan in some kernels; and a mask costs time at every step."""
    a, b, c = (tenant(*given, model, 0) for given in (("constants", "P=3"), ("constants", "P=5"), ("ptuning2", "P=2")))
    x, instr = torch.randn(3, 6, 32), torch.ones(3, 6, dtype=torch.bool)
    joined, separate = Tenants([a, b, c], [0, 1, 2]).context(model.h[0], 0, x, instr)
    assert (
        separate.keep[:, 0, 0].tolist() == [[True] * 3 + [False] * 2, [True] * 5, [True] * 5]
        and not separate.v[2].any()
    )
    assert joined.keep[:, 0, 0].tolist() == [[False] * 2, [False] * 2, [True] * 2]
    joined, separate = Tenants([a, a], [0, 1, 1]).context(model.h[0], 0, x, instr)
    assert joined is None and separate.keep is None


@pytest.mark.parametrize("mixed", [MIXED, ALIKE, SHIFTED], ids=["all", "alike", "shifted"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_mixed_batch_is_continued_as_each_row_alone(model, beams, mixed):
    tuners = [tenant(*spec, model, seed) for seed, spec in enumerate(mixed)]
    tenant_of_row = [*range(len(tuners)), -1 if mixed is not SHIFTED else 0, 2]
    prompts = [torch.randint(1, 50, (3 + i % 4,)).tolist() for i in range(len(tenant_of_row))]
    tenants = Tenants(tuners, tenant_of_row)
    tenants.attach(model)
    together = generate(model, prompts, tenants, max_new=6, beams=beams)
    tenants.detach()
    for prompt, t, new in zip(prompts, tenant_of_row, together):
        f = lambda tuner, prompt=prompt: generate(model, [prompt], tuner, max_new=6, beams=beams)
        assert new == alone(model, tuners[t] if t >= 0 else None, f)[0]
    assert torch.equal(model(torch.tensor([prompts[0]])), small_model(model.config.arch)(torch.tensor([prompts[0]])))


class Inputs(TorchDispatchMode):
    """The storages that operations read."""

    def __init__(self):
        super().__init__()
        self.read = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.read |= {x.untyped_storage().data_ptr() for x in tensors}
        return func(*args, **(kwargs or {}))


def test_a_decode_step_reads_no_tensor_of_a_prompt_tenant_but_those_of_lora(model):
    for specs, reads in ((MIXED[:4], False), (ALIKE[:2], False), (LORA, True)):
        tuners = [tenant(*spec, model, seed) for seed, spec in enumerate(specs)]
        tenants = Tenants(tuners, range(len(tuners)))
        tenants.attach(model)
        own = {p.untyped_storage().data_ptr() for p in tenants.parameters()}
        own |= {m.untyped_storage().data_ptr() for hooked in tenants.hooked for m in getattr(hooked, "A", [])}
        idx = torch.ones(len(tuners), 4, dtype=torch.long)
        logits, cache = model.prefill(idx, torch.full((len(tuners),), 4), tenants, room=2)
        with Inputs() as inputs:
            model.step(logits.argmax(-1), cache)
        tenants.detach()
        assert bool(inputs.read & own) == reads


def test_what_cannot_share_a_model_is_refused(model):
    with pytest.raises(ValueError, match="Full changes the model itself"):
        Tenants([METHODS["full"](model.config)], [0])
    with pytest.raises(ValueError, match="there are 1"):
        Tenants([METHODS["capt"](model.config)], [0, 1])
    plain, shifted = (build("prompt", model.config, options) for options in ((), ["shift=1"]))
    with pytest.raises(ValueError, match="words have other positions .shift=1.: ask them one after the other"):
        Tenants([plain, shifted], [0, 1])
    with pytest.raises(ValueError, match="frozen model's words keep their positions .shift=0.: ask it by itself"):
        Tenants([shifted], [0, -1])
    with pytest.raises(ValueError, match="3 rows, but tenants of 2"):
        generate(model, [[1], [2], [3]], Tenants([METHODS["capt"](model.config)], [0, 0]), 2)


def test_an_embedding_tenant_that_adds_no_rows_still_acts(model):
    class Shift(EmbeddedTuner):
        def embed(self, x, instr):
            B, T, _ = x.shape
            return Embedded(x + 1, torch.arange(T).expand(B, T), torch.zeros(B, dtype=torch.long))

    idx, instr = right_padded([5, 5], 5)
    both = model(idx, instr, Tenants([Shift()], [0, -1]))
    torch.testing.assert_close(both[:1], model(idx[:1], instr[:1], Shift()))
    torch.testing.assert_close(both[1:], model(idx[1:]))


@pytest.mark.parametrize("same", [20, 17, 5])
def test_what_all_prompts_begin_with_is_read_once_and_nothing_changes(model, same, monkeypatch):
    """For tenants that act on the answer alone: the frozen model's reading does for all of them."""
    specs = [("iapt", "m=3"), ("ptuning2", "P=3"), ("lora", "r=2"), ("lora", "r=5"), ("constants", "P=2")]
    tuners = [tenant(*spec, model, seed) for seed, spec in enumerate(specs)]
    for tuner in tuners:
        tuner.act = "answer"
    start = torch.randint(1, 50, (same,)).tolist()
    prompts = [start + torch.randint(1, 50, (i % 4,)).tolist() for i in range(6)]
    read, rows = model.read, []
    monkeypatch.setattr(
        model, "read", lambda idx, *more, **named: rows.append(tuple(idx.shape)) or read(idx, *more, **named)
    )
    tenants = Tenants(tuners, [*range(5), -1])
    tenants.attach(model)
    together = generate(model, prompts, tenants, max_new=5)
    tenants.detach()
    assert rows == ([(1, same - 1), (6, 4)] if same > 16 else [(6, same + 3)])
    for prompt, new, tuner in zip(prompts, together, [*tuners, None]):
        assert new == alone(model, tuner, lambda tuner, prompt=prompt: generate(model, [prompt], tuner, max_new=5))[0]


def test_tenants_that_act_on_the_answer_share_no_batch_with_others(model):
    a, b = (tenant("iapt", "m=3", model, seed) for seed in range(2))
    a.act = "answer"
    with pytest.raises(ValueError, match="act on all tokens and on the answer alone: ask them one after the other"):
        Tenants([a, b], [0, 1])
