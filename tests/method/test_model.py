"""The decoder and generation: the mask, the loss, sampling, beam search, stopping, limits, and two real pretrained
models.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import right_padded, shared, small_model, small_tuner

from baselines import METHODS
from baselines.embedded import Embedded, EmbeddedTuner
from data import Tokenizer
from model import Config, Soft, Tuner, attention_mask, rotary, rotate
from plumbing.caches import beam_search, read_prefix
from plumbing.compiling import compiled_step
from plumbing.head_loss import HeadLoss, head_loss
from plumbing.pretrained import load_pretrained
from sample import generate, prefill, sample_token

# -- The decoder -------------------------------------------------------------------------------------------------------


def test_a_token_looks_at_tokens_up_to_itself_and_at_all_soft_tokens_behind_them():
    k = torch.zeros(2, 1, 2, 4)
    causal = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    soft = torch.ones(3, 2).bool()
    assert attention_mask(3, None) is None
    assert torch.equal(attention_mask(3, Soft(k, k))[0, 0], torch.cat((causal, soft), 1))
    keep = torch.tensor([[True, True], [False, True]])
    mask = attention_mask(3, Soft(k, k, keep[:, None, None]))
    assert torch.equal(mask[1, 0], torch.cat((causal, soft & keep[1]), 1))
    assert torch.equal(mask[0, 0], torch.cat((causal, soft), 1))


@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_the_loss_of_a_frozen_head_and_its_gradient_are_those_of_cross_entropy(model, monkeypatch, chunk):
    monkeypatch.setattr(HeadLoss, "LOGITS", 50 * chunk)
    tuner = small_tuner("iapt", model)
    idx, instr = right_padded([6, 4], 12)
    targets = torch.where(instr, -1, torch.randint(1, 50, idx.shape))

    def gradients(loss):
        tuner.zero_grad()
        loss.backward()
        return [loss.detach(), *(p.grad for p in tuner.parameters())]

    plain = gradients(F.cross_entropy(model(idx, instr, tuner)[targets >= 0], targets[targets >= 0]) * 3)
    for loss in (model(idx, instr, tuner, targets), head_loss(model, model.hidden(idx, instr, tuner), targets)):
        for a, b in zip(gradients(loss * 3), plain):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_loss_keeps_no_logits():
    model = small_model("gpt2", vocab_size=5000)
    x, kept = torch.randn(300, 32, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        HeadLoss.apply(x, model.head.weight, torch.randint(5000, (300,)), None, 0.0)
    assert kept == [300 * 32]


def test_the_loss_without_a_target_is_zero_and_not_nan(model):
    idx = torch.randint(1, 50, (2, 8))
    assert model(idx, targets=torch.full_like(idx, -1)).item() == 0


def test_the_loss_counts_targets_alone(model):
    idx = torch.randint(1, 50, (2, 8))
    targets = torch.where(torch.arange(8) > 4, idx, -1)
    nats = -model(idx).log_softmax(-1).gather(2, idx[..., None])[..., 0]
    torch.testing.assert_close(model(idx, targets=targets), nats[:, 5:].mean())


def test_the_loss_without_any_target_is_zero_and_so_is_its_gradient(model):
    """A mean over nothing is nan, and would become the gradient of everything."""
    tuner, (idx, instr) = small_tuner("lora", model), right_padded([6, 4], 6)
    nothing = torch.full_like(idx, -1)
    for loss in (model(idx, instr, tuner, nothing), head_loss(model, model.hidden(idx, instr, tuner), nothing)):
        loss.backward()
        assert loss.item() == 0 and not any(p.grad.any() for p in tuner.parameters())


def loss_and_kept(model, tuner):
    """The loss of a batch, and how many numbers are kept for its backward pass."""
    idx, instr = right_padded([6, 4], 12)
    targets, kept = torch.where(instr, -1, idx), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = model(idx, instr, tuner, targets)
    return loss, sum(kept)


@pytest.mark.parametrize(
    "method, act", [*((m, "all") for m in ("iapt", "lora", "dynamic")), ("iapt", "answer"), ("lora", "answer")]
)
def test_checkpointing_changes_nothing_but_what_is_kept(model, method, act):
    if act not in METHODS[method].acts:
        pytest.skip("it acts on the whole prompt")
    tuner = small_tuner(method, model, act=act).train()

    def run():
        torch.manual_seed(0)
        tuner.zero_grad()
        loss, kept = loss_and_kept(model, tuner)
        loss.backward()
        return [loss.detach(), *(p.grad for p in tuner.parameters())], kept

    plain, all_activations = run()
    model.checkpointing = True
    recomputed, layer_inputs = run()
    assert layer_inputs < 0.7 * all_activations
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed))


def test_with_checkpointing_a_generator_keeps_nothing_of_its_own(model):
    """Only the hidden states that enter each layer are kept, whatever the method makes of them."""
    model.checkpointing = True
    kept = {loss_and_kept(model, small_tuner(m, model))[1] for m in ("iapt", "paper-iapt", "capt", "ptuning2", "lora")}
    assert len(kept) == 1


def test_grouped_queries_equal_repeated_keys_and_values():
    """Two heads share a key/value head each: as if k and v had four heads, pairwise alike."""
    grouped, plain = small_model("llama"), small_model("llama", n_kv_head=4)
    state = grouped.state_dict()
    for name in list(state):
        if ".attn.k." in name or ".attn.v." in name:
            state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    plain.load_state_dict(state)
    idx = torch.randint(0, 50, (2, 10))
    torch.testing.assert_close(grouped(idx), plain(idx), atol=1e-5, rtol=1e-5)


def test_queries_are_turned_in_fp32_and_rounded_once():
    config, x = Config(vocab_size=9, n_head=2, n_embd=64, arch="llama"), torch.randn(1, 2, 8, 32).bfloat16()
    rope = rotary(config, torch.arange(1000, 1008))
    assert torch.equal(rotate(x, rope), rotate(x.float(), rope).bfloat16())
    near, far = (rotate(x.float(), rotary(config, torch.tensor([at]))) for at in (1000.0, 1001.0))
    assert (near - far).abs().max() > 0.5  # bf16 cannot tell these positions apart


def test_rotary_attention_depends_on_distances_alone():
    """Shifting all positions by a constant changes nothing: so soft tokens at position 0 do not disturb tokens that
    keep theirs.
    """
    model = small_model("llama")
    block, x, position = model.h[0], torch.randn(1, 7, 32), torch.arange(7)
    here, there, stretched = (block(x, rotary(model.config, at))[0] for at in (position, position + 13, position * 2))
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(here, stretched, atol=1e-3)


def test_a_tuner_without_the_instruction_s_mask_is_refused(model):
    idx, _ = right_padded([5], 5)
    with pytest.raises(ValueError, match="a tuner needs instr .* it got None"):
        model(idx, None, small_tuner("iapt", model))


# -- Soft tokens among the embeddings, and uneven layers ---------------------------------------------------------------


class Around(EmbeddedTuner):
    """Two soft tokens before the instruction and one after it, as prompt tuning and dynamic prompting place them."""

    def __init__(self, C):
        super().__init__()
        self.rows = torch.randn(3, C)

    def embed(self, x, instr):
        (B, T, C), n = x.shape, instr.sum(1, keepdim=True)
        token = torch.arange(T).expand(B, T)
        at = token + 2 + (token >= n)
        out = self.rows[2].expand(B, T + 3, C).clone()
        out[:, :2] = self.rows[:2]
        return Embedded(out.scatter(1, at[..., None].expand(B, T, C), x), at, at.new_full((B,), 3))


def test_soft_tokens_among_the_embeddings_are_as_if_they_were_tokens(model):
    """By hand, for one row: tokens keep their positions, and logits are read off the place before the next token."""
    tuner, idx = Around(32), torch.tensor([[5, 6, 7, 8, 9]])
    instr = torch.arange(5)[None] < 3
    x, rope = model.embed(idx, torch.arange(5))
    x = torch.cat((tuner.rows[None, :2], x[:, :3], tuner.rows[None, 2:], x[:, 3:]), 1)
    rope = None if rope is None else rotary(model.config, torch.tensor([0, 0, 0, 1, 2, 3, 3, 4]))
    for block in model.h:
        x, _, _ = block(x, rope)
    wanted = model.head(model.ln_f(x))[0, [2, 3, 5, 6, 7]]  # what follows token 2 is read off the soft token after it
    torch.testing.assert_close(model(idx, instr, tuner)[0], wanted, atol=1e-5, rtol=1e-5)


def test_soft_tokens_among_the_embeddings_decode_from_the_cache_like_the_rest(model):
    tuner, prompts = Around(32), [[3, 1, 4, 1, 5], [9]]
    for prompt, new in zip(prompts, generate(model, prompts, tuner, max_new=5)):
        ids = list(prompt)
        for _ in range(5):
            instr = torch.arange(len(ids))[None] < len(prompt)
            ids.append(model(torch.tensor([ids]), instr, tuner)[0, -1].argmax().item())
        assert new == ids[len(prompt) :]


@pytest.mark.parametrize("separate", [False, True])
def test_layers_with_different_numbers_of_soft_tokens_decode_from_the_cache(model, separate):
    class Uneven(Tuner):
        def soft_tokens(self, l, x, instr):
            return None if l == 0 else torch.ones(len(x), 3, 32) * torch.arange(1, 4)[:, None]

    tuner = Uneven()
    tuner.separate = separate
    idx, instr = torch.tensor([[3, 1, 4, 1, 5]]), torch.ones(1, 5, dtype=torch.bool)
    _, cache = model.prefill(idx[:, :3], torch.tensor([3]), tuner, room=2)
    for t in (3, 4):
        logits = model.step(idx[:, t], cache)
    torch.testing.assert_close(logits, model(idx, instr, tuner)[:, -1], atol=1e-5, rtol=1e-5)
    assert (logits - model(idx)[:, -1]).abs().max() > 0.01


# -- Generation --------------------------------------------------------------------------------------------------------


def test_a_row_stops_at_its_own_end_and_the_others_go_on(model):
    prompts = [[3, 1, 4], [5, 9]]
    free = generate(model, prompts, max_new=8)
    stop = free[0][2]
    stopped = generate(model, prompts, max_new=8, stop=stop)
    cut = [row[: row.index(stop)] if stop in row else row for row in free]
    assert stopped == cut and len(stopped[0]) <= 2


def test_the_same_seed_gives_the_same_sample_and_another_seed_another(model):
    settings = dict(max_new=20, temperature=1.5, top_k=30)
    first, again, other = (generate(model, [[1, 2]], seed=seed, **settings) for seed in (1, 1, 2))
    assert first == again != other


def test_sampling_keeps_to_the_top_k_and_to_the_mass_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4000, 1)
    g = torch.Generator().manual_seed(0)
    assert set(sample_token(logits, 1.0, top_k=2, generator=g).tolist()) == {0, 1}
    assert set(sample_token(logits, 1.0, top_p=0.9, generator=g).tolist()) == {0, 1, 2}
    assert set(sample_token(logits, 1.0, top_p=1e-6, generator=g).tolist()) == {0}
    share = sample_token(logits, 1.0, generator=g).bincount(minlength=4) / 4000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [1e-320, 1e-38, 1e-5, 1e30])
def test_no_temperature_overflows(model, temperature):
    """Next to zero it is greedy; logits divided by it would be infinite."""
    greedy = generate(model, [[1, 2, 3], [4]], max_new=8)
    drawn = generate(model, [[1, 2, 3], [4]], max_new=8, temperature=temperature)
    assert (drawn == greedy) == (temperature < 1)


def padded(prompts):
    n = max(map(len, prompts))
    return torch.tensor([p + [0] * (n - len(p)) for p in prompts]), torch.tensor([len(p) for p in prompts])


def log_p_of(model, prompt, new, tuner=None):
    idx = torch.tensor([prompt + new])
    log_p = model(idx, torch.arange(idx.shape[1])[None] < len(prompt), tuner)[0].log_softmax(-1)
    return sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(new))


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_continuations(penalty):
    """Four tokens, three steps, token 0 ends a text: the best of them all, counted out."""
    model, prompts = small_model("gpt2", vocab_size=4), [[1, 2, 3], [2]]
    results = generate(model, prompts, max_new=3, stop=0, beams=64, length_penalty=penalty)
    tree = [[0]] + [[a, 0] for a in (1, 2, 3)] + [[a, b, c] for a in (1, 2, 3) for b in (1, 2, 3) for c in range(4)]
    for prompt, new in zip(prompts, results):
        best = max(tree, key=lambda new: log_p_of(model, prompt, new) / len(new) ** penalty)
        assert new == [t for t in best if t]


def test_one_beam_is_greedy_and_five_find_likelier_texts(model):
    prompts, gains = [[3, 1, 4, 1, 5], [9, 2], [6]], []
    for method in ("iapt", "prompt", "lora"):
        tuner = small_tuner(method, model)
        greedy = generate(model, prompts, tuner, max_new=6)
        assert beam_search(model.step, *model.prefill(*padded(prompts), tuner, 6), 1, 6, None, 1.0) == greedy
        wide = generate(model, prompts, tuner, max_new=6, beams=5)
        for prompt, a, b in zip(prompts, greedy, wide):
            gains.append(log_p_of(model, prompt, b, tuner) - log_p_of(model, prompt, a, tuner))
        tuner.detach()
    assert min(gains) > -1e-3 and max(gains) > 0.1


def test_a_beam_search_of_several_rows_is_that_of_each_row_alone(model):
    prompts, settings = [[3, 1, 4, 1, 5], [9, 2], [6]], dict(max_new=8, beams=3, stop=7)
    assert generate(model, prompts, **settings) == [generate(model, [p], **settings)[0] for p in prompts]


@pytest.mark.parametrize("method", ["iapt", "lora", None])
def test_prompts_go_on_from_what_has_been_read_and_leave_it_as_it_is(model, method):
    """Kept from an earlier question about the same text, for any method that acts on the answer alone, or none."""
    tuner = small_tuner(method, model, act="answer") if method else None
    text, questions = list(range(1, 10)), [[3, 1, 4], [5], [9, 2]]
    with tuner.silent() if tuner else torch.no_grad():
        past = read_prefix(model, text, 3)
    before = [x.clone() for layer in past.layers for x in layer.joined]
    for _ in range(2):
        logits, cache = prefill(model, questions, tuner, 2, past)
        wanted, _ = prefill(model, [text + question for question in questions], tuner, 2)
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        model.step(logits.argmax(-1), cache)
    assert all(torch.equal(a, b) for a, b in zip(before, (x for layer in past.layers for x in layer.joined)))


@pytest.mark.parametrize("method", ["iapt", "ptuning2", "lora"])
def test_so_it_is_where_a_method_acts_on_the_answer_alone(model, method):
    tuner = small_tuner(method, model, act="answer")
    prompts, settings = [[3, 1, 4, 1, 5], [9, 2], [6]], dict(max_new=8, beams=3, stop=7)
    together = generate(model, prompts, tuner, **settings)
    assert together == [generate(model, [p], tuner, **settings)[0] for p in prompts]
    greedy = generate(model, prompts, tuner, max_new=6)
    assert beam_search(model.step, *model.prefill(*padded(prompts), tuner, 6), 1, 6, None, 1.0) == greedy


def test_what_cannot_be_generated_is_refused_with_the_numbers(model):
    with pytest.raises(ValueError, match="at most 64 tokens, got 70"):
        model(torch.ones(1, 70, dtype=torch.long))
    with pytest.raises(ValueError, match="at most 64 tokens, got 70"):
        model.prefill(torch.ones(1, 70, dtype=torch.long), torch.tensor([70]), small_tuner("iapt", model, act="answer"))
    with pytest.raises(ValueError, match="only a tuner that acts on the answer alone can go on"):
        prefill(model, [[1]], small_tuner("iapt", model), 1, read_prefix(model, [1, 2], 1))
    with pytest.raises(ValueError, match="60 tokens and 10 new"):
        generate(model, [[1] * 60], max_new=10)
    with pytest.raises(ValueError, match="empty prompt"):
        generate(model, [[1], []])
    with pytest.raises(ValueError, match="3 beams or a temperature, not both"):
        generate(model, [[1]], max_new=5, beams=3, temperature=1.0)


@pytest.mark.parametrize("arch, method", [("gpt2", "iapt"), ("llama", "prompt"), ("llama", "lora")])
def test_the_compiled_decode_step_is_one_graph_and_equals_the_plain_one(arch, method):
    model = small_model(arch)
    tuner, prompts = small_tuner(method, model), [[3, 1, 4, 1, 5], [9]]
    torch._dynamo.reset()
    step = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    assert generate(model, prompts, tuner, max_new=6, step=step) == generate(model, prompts, tuner, max_new=6)


def test_the_compiled_step_changes_pytorch_s_settings_only_while_it_runs(model, monkeypatch):
    """Its weights are packed because `freezing` is on; for the rest of the process it must be as it was."""
    import torch._inductor.config as inductor

    seen = []
    note = lambda f: seen.append(inductor.freezing) if f == model.step else None  # and not the look for a compiler
    monkeypatch.setattr(torch, "compile", lambda f, **settings: lambda *args: note(f))
    before = inductor.freezing
    compiled_step(model)(None, None)
    assert seen == [True] and inductor.freezing is before is False


@pytest.mark.slow
def test_a_step_with_packed_weights_equals_the_plain_one():
    model = small_model("llama")
    tuner, (idx, instr) = small_tuner("iapt", model), right_padded([5, 3], 5)
    logits, cache = model.prefill(idx, instr.sum(1), tuner, 6)
    _, other = model.prefill(idx, instr.sum(1), tuner, 6)
    torch._dynamo.reset()
    step = compiled_step(model)
    for _ in range(6):
        new = logits.argmax(-1)
        logits = model.step(new, cache)
        torch.testing.assert_close(step(new, other), logits, atol=1e-5, rtol=1e-5)


# -- Real models -------------------------------------------------------------------------------------------------------


def test_a_real_gpt2_says_what_it_should():
    folder = shared("checkpoints", "tinystories-instruct-3m")
    model, tokenizer = load_pretrained(folder), Tokenizer.load(folder)
    prompt = tokenizer.encode("User: Hello, how are you today?\nBot:")
    (new,) = generate(model, [prompt], max_new=40, stop=tokenizer.end)
    assert tokenizer.decode(new) == " I'm doing well, thank you. How are you?"


def test_a_real_llama_says_what_it_should():
    folder = shared("checkpoints", "tinystories-656k-llama")
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    tokenizer = Tokenizer.load(folder)
    prompt = tokenizer.prompt("Once upon a time, there was a little girl")
    assert prompt[0] == tokenizer.begin == 1 and tokenizer.end == 2
    (new,) = generate(load_pretrained(folder), [prompt], max_new=24, stop=tokenizer.end)
    assert tokenizer.decode(new).startswith(". She was three years old. She loved to explore and explore her house.")
