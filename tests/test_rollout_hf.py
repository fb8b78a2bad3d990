"""Sampling with transformers: the right distribution, the right log-probs, ends and lengths."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from transformers import AddedToken

from capo_exp.core import policy
from capo_exp.core.batch import collate
from capo_exp.core.types import Problem, Prompt
from capo_exp.rollout import SamplingRequest, decode
from capo_exp.rollout.hf import HFRollout


class Tokenizer:
    """As much of a tokenizer as the engine uses, for a vocabulary without text."""

    pad_token_id, eos_token_id = 0, 1
    added_tokens_decoder: ClassVar = {1: AddedToken("</s>", special=True)}

    def pad(self, encoded, **_):
        from transformers import BatchEncoding

        rows = encoded["input_ids"]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})

    def batch_decode(self, rows, **_):
        return [self.decode(row) for row in rows]

    def decode(self, row, **_):
        return " ".join(map(str, row))


def prompts(*rows):
    return [Prompt(Problem(str(i), "", ""), "", row) for i, row in enumerate(rows)]


def engine(model, max_sequences=100):
    return HFRollout(model, Tokenizer(), torch.float32, max_sequences_per_call=max_sequences)


def sample(model, rows, max_sequences=100, **changes):
    request = SamplingRequest(rows, 4, 9, 1.0, top_k=0, top_p=1.0, seed=3, weight_version=5)
    return engine(model, max_sequences).generate(replace(request, **changes))


def learner_log_probs(model, groups):
    batch = collate(groups, pad_token_id=0, device=torch.device("cpu"))
    return batch, policy.log_probs(model, batch, policy.ForwardSettings(0.8, 1000, torch.float32))


ROWS = prompts((5, 6, 7), (8,), (9, 10, 11, 12, 13), (14, 15))


def test_greedy_tokens_are_those_of_plain_generate(small_model):
    groups = sample(small_model, ROWS, temperature=0.0, group_size=2)
    for prompt, group in zip(ROWS, groups, strict=True):
        ids = torch.tensor([prompt.token_ids])
        numbers = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": 1}
        plain = small_model.generate(ids, **numbers)[0, ids.shape[1] :].tolist()
        assert [list(completion.token_ids) for completion in group.completions] == [plain] * 2


def test_log_probs_are_the_learners_at_the_same_temperature(small_model):
    own = small_model.generation_config  # what a chat model ships with must not reach the sampler
    own.repetition_penalty, own.no_repeat_ngram_size, own.min_new_tokens, own.num_beams = 1.5, 2, 5, 2
    for limit in ({}, {"top_k": 3}, {"top_p": 0.5}):  # whatever is cut off
        groups = sample(small_model, ROWS, temperature=0.8, max_tokens=20, **limit)
        batch, exact = learner_log_probs(small_model, groups)
        torch.testing.assert_close(batch.sampler_log_probs, exact, rtol=1e-4, atol=1e-4)
        assert limit or not batch.completion_mask.all()  # rows ended at different places


def test_top_k_and_top_p_limit_what_is_sampled(small_model):
    """The tokens come from the limited distribution; their log-probs are of the full softmax."""
    logits = small_model(torch.tensor([ROWS[0].token_ids])).logits[0, -1]
    ranked = (logits / 0.8).softmax(0).sort(descending=True)
    nucleus = int((ranked.values.cumsum(0) < 0.5).sum()) + 1
    many = {"group_size": 3000, "max_tokens": 1, "max_sequences": 3000, "temperature": 0.8}
    for limit, allowed in (({"top_k": 3}, 3), ({"top_p": 0.5}, nucleus)):
        group = sample(small_model, ROWS[:1], **many, **limit)[0]
        drawn = torch.tensor([c.token_ids[0] for c in group.completions])
        assert set(drawn.tolist()) == set(ranked.indices[:allowed].tolist())
        shares = ranked.values[:allowed] / ranked.values[:allowed].sum()
        counts = (drawn[:, None] == ranked.indices[:allowed]).float().mean(0)
        torch.testing.assert_close(counts, shares, rtol=0, atol=0.04)  # 4 standard deviations
        full = dict(zip(ranked.indices.tolist(), ranked.values.log().tolist(), strict=True))
        for completion in group.completions:
            assert completion.sampler_log_probs[0] == pytest.approx(full[completion.token_ids[0]], abs=1e-4)


def test_limits_that_cut_off_nothing_change_no_bit(small_model):
    plain = sample(small_model, ROWS)
    assert sample(small_model, ROWS, top_k=40) == plain
    assert sample(small_model, ROWS, temperature=0.0, top_k=1) == sample(small_model, ROWS, temperature=0.0)


@pytest.mark.parametrize("length", [1, 2, 12])
def test_ends_and_truncation(length, small_model):
    groups = sample(small_model, ROWS, group_size=16, max_tokens=length)
    completions = [completion for group in groups for completion in group.completions]
    assert length < 12 or {c.truncated for c in completions} == {True, False}
    for completion in completions:
        assert len(completion.token_ids) == len(completion.sampler_log_probs) <= length
        assert completion.truncated == (completion.token_ids[-1] != 1)
        assert 1 not in completion.token_ids[:-1]
        assert len(completion.token_ids) == length or not completion.truncated


def test_same_seed_same_completions_and_calls_of_any_size(small_model):
    first, again, other = (sample(small_model, ROWS, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    split = sample(small_model, ROWS, max_sequences=4)
    assert [len(group.completions) for group in split] == [4] * 4
    assert [group.prompt for group in split] == ROWS
    assert {group.weight_version for group in split} == {5}


@pytest.mark.parametrize("vocabulary", [40, 5000])
def test_logits_that_are_not_finite_are_left_to_the_learner(vocabulary):
    drawn = decode.draw_tokens(torch.full((3, vocabulary), torch.nan), torch.Generator())
    assert drawn.shape == (3,) and (drawn < -(-vocabulary // decode.BLOCK) * decode.BLOCK).all()


@pytest.mark.parametrize("vocabulary", [40, 4097, 10_000])
def test_tokens_are_drawn_as_often_as_they_are_probable(vocabulary):
    probable = torch.tensor([0, 1, 39, vocabulary // 2, vocabulary - 2, vocabulary - 1]).unique()
    probs = torch.full((vocabulary,), 1e-6)
    probs[probable] = torch.arange(1.0, len(probable) + 1)
    probs[2] = 0
    rows = (probs / probs.sum()).log().expand(2_000, -1)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.cat([decode.draw_tokens(rows, generator) for _ in range(10)])
    counts, expected = torch.bincount(drawn, minlength=vocabulary), 20_000 * probs / probs.sum()
    assert counts.sum() == 20_000 and counts[2] == 0 and len(counts) == vocabulary
    assert ((counts - expected).abs() <= 4 * expected.sqrt() + 1)[probable].all()
    again = decode.draw_tokens(rows, torch.Generator().manual_seed(1))
    assert torch.equal(again, drawn[:2_000])
