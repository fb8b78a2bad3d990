"""Rollouts with transformers' `generate` and the learner's own weights."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from capo_exp.config.ranges import AT_LEAST_1
from capo_exp.core import policy
from capo_exp.core.types import Completion, Prompt, RolloutGroup
from capo_exp.rollout import SamplingRequest

Cut = Callable[[Tensor, Tensor], Tensor]  # (context, logits) -> the same, -inf at what must not be sampled


class HFRollout:
    """Samples completions. Shares the model with the learner, so its weights are never stale."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        compute_dtype: torch.dtype,
        *,
        max_sequences_per_call: Annotated[int, AT_LEAST_1],
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_sequences = max_sequences_per_call
        self._compute_dtype = compute_dtype
        self._ends = find_end_token_ids(model, tokenizer)

    def generate(self, request: SamplingRequest) -> list[RolloutGroup]:
        """Returns one group per prompt, the same for the same request and weights."""
        settings = GenerationConfig(
            max_new_tokens=request.max_tokens,
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=self._ends,
            # What is left open here is filled from the model's own generation_config.json.
            num_beams=1,
            num_return_sequences=1,
            use_cache=True,
            cache_implementation="dynamic",
        )
        generator = torch.Generator(self._model.device).manual_seed(request.seed)
        size = max(1, self._max_sequences // request.group_size)
        groups: list[RolloutGroup] = []
        for start in range(0, len(request.prompts), size):
            part = request.prompts[start : start + size]
            completions = iter(self._sample(part, request, settings, generator))
            groups += [
                RolloutGroup(prompt, tuple(islice(completions, request.group_size)), request.weight_version)
                for prompt in part
            ]
        return groups

    def start(self, directory: Path, prompts: Sequence[Prompt]) -> None:
        """Does nothing: no engine runs beside the learner."""

    def rest(self) -> None:
        """Does nothing: no memory is held between calls."""

    def metrics(self) -> dict[str, float]:
        """Returns zeros: weights are not sent, and never stale."""
        return {"time/transfer_seconds": 0.0, "mismatch/probe_difference": 0.0}

    def close(self) -> None:
        """Does nothing: no memory is held beside the learner's model."""

    def _sample(
        self,
        prompts: Sequence[Prompt],
        request: SamplingRequest,
        settings: GenerationConfig,
        generator: torch.Generator,
    ) -> list[Completion]:
        encoded = self._tokenizer.pad(
            {"input_ids": [list(prompt.token_ids) for prompt in prompts]},
            return_tensors="pt",
            padding_side="left",
        ).to(self._model.device)
        with policy.autocast(self._model.device, self._compute_dtype):
            tokens, log_probs = self._model.generate(  # pyright: ignore[reportCallIssue]
                **encoded,
                generation_config=settings,
                custom_generate=decode,
                temperature=request.temperature,
                cut=make_cut(request.top_k, request.top_p),
                group_size=request.group_size,
                generator=generator,
            )
        drawn = zip(tokens.tolist(), log_probs.tolist(), strict=True)
        rows = [_end(row, scores, self._ends) for row, scores in drawn]
        texts = self._tokenizer.batch_decode([ids for ids, _ in rows], skip_special_tokens=True)
        return [
            Completion(tuple(ids), tuple(scores), text, truncated=ids[-1] not in self._ends)
            for (ids, scores), text in zip(rows, texts, strict=True)
        ]


def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: object,
    stopping_criteria: object,
    generation_config: GenerationConfig,
    temperature: float,
    cut: Cut | None,
    group_size: int,
    generator: torch.Generator,
    **model_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Runs the sampling loop inside `generate` (its `custom_generate` hook), written for groups.

    Three differences from the built-in loop: a group's prompt is computed once, rows that have ended leave
    the batch, and the log-prob of each sampled token is kept instead of the scores of the whole vocabulary.
    The distribution is that of `temperature` (0 = greedy) and `cut` alone: `generate`'s own processors add a
    repetition penalty and the like from the model's generation_config.json, of which the learner knows
    nothing. model_kwargs holds what `generate` prepared: attention_mask (None without padding) and
    past_key_values.

    Returns:
        Tokens [P * G, T] padded with the pad token, and their log-probs [nats] under the full softmax at the
        temperature, which is the learner's, whatever `cut` leaves to sample from.
    """
    del logits_processor, stopping_criteria  # made from the model's own settings as well
    rows = input_ids.shape[0] * group_size
    limit = generation_config.max_new_tokens
    assert limit is not None
    ends = torch.tensor(generation_config.eos_token_id, device=input_ids.device)
    tokens = input_ids.new_full((rows, limit), generation_config.pad_token_id)
    log_probs = torch.zeros(rows, limit, device=input_ids.device)
    mask = model_kwargs["attention_mask"]
    mask = torch.ones_like(input_ids) if mask is None else mask
    state = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=model_kwargs["past_key_values"],
        use_cache=True,
        logits_to_keep=1,
    )
    cache = state.past_key_values
    cache.batch_repeat_interleave(group_size)
    logits = state.logits[:, -1].repeat_interleave(group_size, 0)
    context = input_ids.repeat_interleave(group_size, 0)
    mask = torch.cat([mask.repeat_interleave(group_size, 0), mask.new_ones(rows, limit)], 1)
    active = torch.arange(rows, device=input_ids.device)
    alive = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
    for position in range(limit):
        logits = logits.float() / (temperature or 1.0)
        scores = logits.log_softmax(1)
        if temperature == 0:
            chosen = scores.argmax(1)
        else:
            allowed = scores if cut is None else cut(context, logits).log_softmax(1)
            chosen = _draw(allowed, generator)
        tokens[active[alive], position] = chosen[alive]
        log_probs[active[alive], position] = scores.gather(1, chosen[:, None]).squeeze(1)[alive]
        alive = alive & ~torch.isin(chosen, ends)
        remaining = int(alive.sum())
        if remaining == 0 or position == limit - 1:
            break
        context = torch.cat([context, chosen[:, None]], 1)
        if remaining <= 0.75 * len(active):
            kept = alive.nonzero().squeeze(1)
            active, alive, context, mask = active[kept], alive[kept], context[kept], mask[kept]
            cache.batch_select_indices(kept)
        logits = _next_logits(model, context, mask, cache)
    return tokens, log_probs


def _next_logits(model: PreTrainedModel, context: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    seen = mask[:, : context.shape[1]]
    state = model(
        input_ids=context[:, -1:],
        attention_mask=seen,
        position_ids=seen.sum(1, keepdim=True) - 1,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return state.logits[:, -1]


def _draw(log_probs: Tensor, generator: torch.Generator) -> Tensor:
    """Draws one token a row, by the exponential race: argmax of p / e with e ~ Exp(1) is a draw from p."""
    noise = torch.empty_like(log_probs).exponential_(generator=generator)
    return (log_probs.exp() / noise).argmax(1)


def make_cut(top_k: int, top_p: float) -> Cut | None:
    """Makes what limits the tokens to sample from; None = all of them are allowed."""
    top = [TopKLogitsWarper(top_k)] if top_k else []
    nucleus = [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return LogitsProcessorList([*top, *nucleus]) if top or nucleus else None  # pyright: ignore[reportReturnType]


def _end(tokens: list[int], log_probs: list[float], ends: list[int]) -> tuple[list[int], list[float]]:
    """Returns the row up to and including its end-of-sequence token."""
    length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:length], log_probs[:length]


def find_end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns all tokens that end a completion: a chat model can have several; its tokenizer names one."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    known = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return sorted({token for token in known if isinstance(token, int)})
