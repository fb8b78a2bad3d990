"""One forward pass: against full logits, padding, chunks, and the shift by one."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from capo_exp.config.errors import ConfigError
from capo_exp.core import packing, policy
from capo_exp.core.batch import CutSize, join, padding_share, split, take
from capo_exp.core.token_scores import score_hidden, top_ids
from capo_exp.core.types import Problem, Prompt
from capo_exp.rollout import SamplingRequest
from capo_exp.rollout.hf import HFRollout


def run(model, batch, temperature=1.0, top_k=5, chunk=1000):
    settings = policy.ForwardSettings(temperature, chunk, torch.float32)
    return policy.forward(model, batch, settings, top_k=top_k)


def row_logits(model, batch, row):
    """Full logits of one row without any padding, and its completion tokens."""
    ids = batch.input_ids[row][batch.attention_mask[row].bool()]
    count = int(batch.completion_mask[row].sum())
    return model(ids[None]).logits[0, -count - 1 : -1], ids[-count:]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_row_agrees_with_cross_entropy_of_its_full_logits(small_model, random_batch, temperature):
    batch = random_batch()
    output = run(small_model, batch, temperature)
    for row in range(len(batch.advantages)):
        logits, targets = row_logits(small_model, batch, row)
        logits = logits / temperature
        count = len(targets)
        expected = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        torch.testing.assert_close(output.log_probs[row, :count], expected, rtol=1e-4, atol=1e-5)
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(output.entropy[row, :count], entropy, rtol=1e-4, atol=1e-5)
        support, inside = logits.topk(5).indices, 0
        for t, target in enumerate(targets):  # a sampled token outside the top 5 takes the fifth place
            inside += int(target in support[t])
            support[t, 4] = support[t, 4] if target in support[t] else target
        assert torch.equal(output.topk_ids[row, :count], support) and (count < 5 or inside < count)
        probs = logits.gather(1, support).softmax(-1)
        torch.testing.assert_close(output.topk_probs[row, :count], probs, rtol=1e-4, atol=1e-5)
        again = output.hidden[row, :count] @ small_model.lm_head.weight.T
        torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)  # the state that made these logits
        assert not output.log_probs[row, count:].any()


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_chunks_of_the_last_layer_change_neither_values_nor_gradients(small_model, random_batch, chunk):
    batch = random_batch()
    results = []
    for size in (1000, chunk):
        small_model.zero_grad()
        output = run(small_model, batch, chunk=size)
        (output.log_probs * batch.advantages[:, None]).sum().backward()
        results.append(
            (output.log_probs.detach(), output.entropy, [p.grad.clone() for p in small_model.parameters()])
        )
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab", [5, 640, 1000])
def test_scores_of_a_wide_last_layer_are_those_of_its_whole_logits(vocab):
    """640 and 1000 ids are ten and fifteen blocks, with a rest or without; the gradient is autograd's."""
    generator = torch.Generator().manual_seed(vocab)
    head = torch.nn.Linear(6, vocab, bias=False)
    hidden, weights = torch.randn(2, 40, 6, generator=generator)[0], torch.randn(40, generator=generator)
    ids = torch.randint(vocab, (40,), generator=generator)
    gradients = []
    for fused in (True, False):
        states = hidden.clone().requires_grad_()
        log_probs = (
            score_hidden(head, states, ids, 4, 16)[0]
            if fused
            else head(states).log_softmax(1).gather(1, ids[:, None]).squeeze(1)
        )
        gradients.append(torch.autograd.grad((weights * log_probs).sum(), (states, head.weight)))
    torch.testing.assert_close(*gradients)
    logits = head(hidden)
    assert torch.equal(top_ids(logits, 4), logits.topk(4).indices)
    assert top_ids(logits[:0], 4).shape == (0, 4)  # of a process that makes the passes of others' rows


@pytest.mark.parametrize("hidden_shift", [0, 1])
@pytest.mark.parametrize("length", [1, 7])
def test_shared_prompts_and_packed_rows_change_neither_values_nor_gradients(
    small_model, random_batch, length, hidden_shift
):
    batch = random_batch(rows=6, length=length)
    for row in range(1, 6, 2):  # rows 2 i and 2 i + 1 are a group
        for tensor in (batch.input_ids, batch.attention_mask):
            tensor[row, :5] = tensor[row - 1, :5]
    batch = take(batch, torch.tensor([3, 0, 5, 1, 2]))  # a group in two places, and one that is not whole
    packing.prepare_model(small_model)  # which leaves padded rows as they are
    tokens = int(batch.attention_mask[:, : 5 + length - 1 + hidden_shift].sum())
    computed: list[int] = []
    small_model.get_input_embeddings().register_forward_hook(
        lambda module, ids, out: computed.append(ids[0].numel())
    )
    results = []
    for how in ({}, {"share_prompts": True}, {"pack": True}):
        small_model.zero_grad()
        settings = policy.ForwardSettings(0.7, 1000, torch.float32, **how)
        output = policy.forward(small_model, batch, settings, top_k=5, hidden_shift=hidden_shift)
        (output.log_probs * batch.advantages).sum().backward()
        results.append((vars(output.detached()), [p.grad.clone() for p in small_model.parameters()]))
    for result in results[1:]:
        torch.testing.assert_close(results[0], result, rtol=1e-4, atol=1e-5)
    columns = length - 1 + hidden_shift
    assert computed == [5 * (5 + columns), 3 * 5, *([5 * columns] if columns else []), tokens]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_have_the_same_gradients_at_every_length_and_leave_sampling_alone(
    composed, random_batch, checkpointing
):
    words = f"model.gradient_checkpointing={str(checkpointing).lower()}"
    configs = [composed(words, f"model.compile={each}").model for each in ("false", "true")]
    eager, compiled = (policy.load_model(each, torch.device("cpu")).train(checkpointing) for each in configs)
    batches = [random_batch(rows=rows, length=length) for rows, length in ((8, 7), (8, 7), (6, 10), (4, 21))]
    for number, batch in enumerate(batches):
        gradients: list[Tensor] = []
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            for model in (eager, compiled):
                model.zero_grad()
                (run(model, batch).log_probs * batch.advantages).sum().backward()
                gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()
    settings = policy.ForwardSettings(1.0, 1000, torch.float32)
    scored = [policy.log_probs(model, batches[0], settings) for model in (eager, compiled)]
    torch.testing.assert_close(*scored, rtol=1e-4, atol=1e-5)

    tokenizer = policy.load_tokenizer(configs[0])
    prompt = Prompt(Problem("0", "1 + 1?", "2"), "1 + 1 =", tuple(tokenizer("1 + 1 =")["input_ids"]))
    request = SamplingRequest([prompt], 4, 12, 1.0, 0, 1.0, seed=0, weight_version=0)
    with torch.compiler.set_stance("fail_on_recompile"):
        engines = [
            HFRollout(each.eval(), tokenizer, torch.float32, max_sequences_per_call=8)
            for each in (eager, compiled)
        ]
        first, second = (engine.generate(request) for engine in engines)
    assert first == second


def test_no_tensor_of_all_logits_exists_in_forward_or_backward(small_model, random_batch):
    batch = random_batch(rows=8, prompt=3, length=30)
    tokens, vocabulary = int(batch.completion_mask.sum()), small_model.config.vocab_size
    shapes: list[tuple[int, ...]] = []
    head = small_model.lm_head
    head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    run(small_model, batch, chunk=16).log_probs.sum().backward()
    assert len(shapes) == 2 * -(-tokens // 16)  # once forward, once again in the backward pass
    assert all(shape[0] <= 16 and shape[1] == vocabulary for shape in shapes)


def test_micro_batches_are_trimmed_and_put_back_at_their_rows(small_model, random_batch):
    batch = random_batch(rows=9, prompt=6, length=12)
    whole = run(small_model, batch).log_probs
    parts = split(batch, CutSize(4))
    assert sorted(int(row) for rows, _ in parts for row in rows) == list(range(9))
    assert min(part.input_ids.shape[1] for _, part in parts) < batch.input_ids.shape[1]
    joined = join([(rows, run(small_model, part).log_probs) for rows, part in parts], batch.completion_mask)
    torch.testing.assert_close(joined, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [10, 25, 40, 1000])
def test_micro_batches_by_tokens_are_as_full_as_they_may_be(random_batch, tokens, packed):
    batch, size = random_batch(rows=30), CutSize(1, tokens, packed)
    cuts = split(batch, size)
    assert sorted(int(row) for rows, _ in cuts for row in rows) == list(range(30))
    count = lambda cut: int(cut.attention_mask.sum()) if packed else cut.attention_mask.numel()  # noqa: E731
    assert all(count(cut) <= tokens or len(rows) == 1 for rows, cut in cuts)
    for (rows, _), (after, _) in pairwise(cuts):
        ((_, longer),) = split(take(batch, torch.cat([rows, after[:1]])), CutSize(30))
        assert count(longer) > tokens
    held = sum(count(cut) for _, cut in cuts)
    assert padding_share(batch, size) == pytest.approx(1 - int(batch.attention_mask.sum()) / held)


@pytest.mark.parametrize(("prompt", "length", "together"), [(40, 4, True), (2, 40, False)])
def test_a_group_stays_together_where_its_shared_prompt_saves_more_than_padding_takes(
    random_batch, prompt, length, together
):
    batch = random_batch(rows=16, prompt=prompt, length=length)
    batch.advantages[batch.group_ids % 2 == 1] = 0.0
    batch.group_ids.add_(100)  # a part of a rollout step has the ids of the whole
    cuts = split(batch, CutSize(2, share_prompts=True))
    assert all(len(cut.group_ids.unique()) == 1 for _, cut in cuts) == together
    assert [bool(cut.advantages.any()) for _, cut in cuts] == 4 * [True] + 4 * [False]
    apart = split(batch, CutSize(2))
    assert any(len(cut.group_ids.unique()) > 1 for _, cut in apart)


def test_models_that_mix_neighbours_are_not_packed(small_model):
    for name, value in (("sliding_window", 4096), ("model_type", "mamba")):
        model = copy.deepcopy(small_model)
        setattr(model.config, name, value)
        with pytest.raises(ConfigError, match=r"^model\.pack=.*expected false for this"):
            packing.prepare_model(model)


@pytest.mark.parametrize(
    ("model", "able", "expected"),
    [
        ("smollm2_135m", "amx_bf16", torch.bfloat16),
        ("smollm2_135m", "avx512_bf16", torch.bfloat16),
        ("smollm2_135m", "avx512_f", torch.float32),
        ("tiny", "amx_bf16", torch.float32),
    ],
)
def test_auto_is_bfloat16_where_a_cpu_gains_by_it(
    composed, monkeypatch,
    model, able, expected,
):  # fmt: skip
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True})
    assert policy.choose_dtype(composed(f"model={model}").model, torch.device("cpu")) == expected
