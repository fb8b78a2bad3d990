"""Rollouts with transformers and the learner's own weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import nan
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
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

RACE, BLOCK = 4096, 256
"""The largest vocabulary with noise for each token; tokens that are drawn together in larger ones."""

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
        generator = torch.Generator(self._model.device).manual_seed(request.seed)
        size = max(1, self._max_sequences // request.group_size)
        groups: list[RolloutGroup] = []
        for start in range(0, len(request.prompts), size):
            cut = slice(start, start + size)
            part = replace(request, prompts=request.prompts[cut], begun=request.begun[cut])
            completions = iter(self._sample(part, generator))
            groups += [
                RolloutGroup(prompt, tuple(islice(completions, request.group_size)), request.weight_version)
                for prompt in part.prompts
            ]
        return groups

    def start(self, directory: Path, prompts: Sequence[Prompt]) -> None:
        """Does nothing, nor do rest and close: no engine runs, and no memory is held between calls."""

    def rest(self) -> None: ...

    def metrics(self) -> dict[str, float]:
        """Returns zeros: weights are not sent, and never stale."""
        return {"time/transfer_seconds": 0.0, "mismatch/probe_difference": 0.0}

    def close(self) -> None: ...

    def _sample(self, request: SamplingRequest, generator: torch.Generator) -> list[Completion]:
        pairs = zip(request.prompts, request.beginnings(), strict=True)
        known = [[*prompt.token_ids, *begun] for prompt, begun in pairs]
        padded = self._tokenizer.pad({"input_ids": known}, return_tensors="pt", padding_side="left")
        encoded = padded.to(self._model.device)
        with torch.no_grad(), policy.autocast(self._model.device, self._compute_dtype):
            tokens, log_probs = decode(self._model, encoded, request, self._ends, generator)
        ended = torch.isin(tokens, torch.tensor(self._ends, device=tokens.device)).cumsum(1)
        lengths = ((ended == 0).sum(1) + 1).tolist()
        known = zip(request.beginnings(), request.room(), strict=True)
        begun = [each for each in known for _ in range(request.group_size)]
        rows: list[list[int]] = []
        scores: list[list[float]] = []
        sampled = zip(begun, tokens.tolist(), log_probs.tolist(), lengths, strict=True)
        for (ids, room), new, own, length in sampled:
            count = min(length, room)
            rows.append([*ids, *new[:count]])
            scores.append([*[nan] * len(ids), *own[:count]])
        texts = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [
            Completion(tuple(ids), tuple(own), text, truncated=ids[-1] not in self._ends)
            for ids, own, text in zip(rows, scores, texts, strict=True)
        ]


def decode(
    model: PreTrainedModel,
    prompts: Mapping[str, Tensor],
    request: SamplingRequest,
    ends: Sequence[int],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Samples a group of completions for each prompt.

    Not transformers' `generate`: a group's prompt is computed once, rows that have ended leave the batch, and
    the log-prob of each sampled token is kept instead of the scores of the whole vocabulary. Nor could the
    model's own generation_config.json add a penalty of which the learner knows nothing.

    Args:
        model: the learner's.
        prompts: input_ids and attention_mask [P, S], padded on the left, with what has begun.
        request: what has begun, group size, limits, temperature (0 = greedy), top_k and top_p.
        ends: tokens that end a completion.
        generator: draws the tokens.

    Returns:
        Tokens [P * G, T], 0 after the end, and their log-probs [nats] under the full softmax at the
        temperature, which is the learner's, whatever top_k and top_p leave to sample from.
    """
    input_ids, mask, size = prompts["input_ids"], prompts["attention_mask"], request.group_size
    rows = input_ids.shape[0] * size
    room = input_ids.new_tensor(request.room())
    limit, room = int(room.max()), room.repeat_interleave(size)
    tokens = input_ids.new_zeros(rows, limit)
    log_probs = torch.zeros(rows, limit, device=input_ids.device)
    cut, ending = make_cut(request.top_k, request.top_p), torch.tensor(ends, device=input_ids.device)
    cache = DynamicCache(config=model.config)
    logits = _next_logits(model, input_ids, mask, cache).repeat_interleave(size, 0)
    cache.batch_repeat_interleave(size)
    context = input_ids.repeat_interleave(size, 0)
    mask = torch.cat([mask.repeat_interleave(size, 0), mask.new_ones(rows, limit)], 1)
    active = torch.arange(rows, device=input_ids.device)
    alive = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
    for position in range(limit):
        logits = logits.float() / (request.temperature or 1.0)
        scores = logits.log_softmax(1)
        if request.temperature == 0:
            chosen = scores.argmax(1)
        else:
            chosen = draw_tokens(scores if cut is None else cut(context, logits).log_softmax(1), generator)
        tokens[active[alive], position] = chosen[alive]
        log_probs[active[alive], position] = scores.gather(1, chosen[:, None]).squeeze(1)[alive]
        alive = alive & ~torch.isin(chosen, ending) & (room[active] > position + 1)
        remaining = int(alive.sum())
        if remaining == 0 or position == limit - 1:
            break
        context = torch.cat([context, chosen[:, None]], 1)
        if remaining <= 0.75 * len(active):
            kept = alive.nonzero().squeeze(1)
            active, alive, context, mask = active[kept], alive[kept], context[kept], mask[kept]
            cache.batch_select_indices(kept)
        logits = _next_logits(model, context[:, -1:], mask[:, : context.shape[1]], cache)
    return tokens, log_probs


def _next_logits(model: PreTrainedModel, new: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Computes [N, V] after the new tokens, which are the last ones of what the mask covers."""
    state = model(
        input_ids=new,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return state.logits[:, -1]


def draw_tokens(log_probs: Tensor, generator: torch.Generator) -> Tensor:
    """Draws one token [N] of each row [N, V]."""
    probs = log_probs.exp()
    return _race(probs, generator) if probs.shape[1] <= RACE else _choose_in_blocks(probs, generator)


def _race(probs: Tensor, generator: torch.Generator) -> Tensor:
    """Draws by the exponential race: argmax of p / e with e ~ Exp(1) is a draw from p."""
    noise = torch.empty_like(probs).exponential_(generator=generator)
    return torch.div(probs, noise, out=noise).argmax(1)


def _choose_in_blocks(probs: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a block of tokens, then a token in it, with two random numbers a row in place of V: on a CPU the
    noise of 49,152 tokens takes as long as a small model."""
    blocks = pad(probs, (0, -probs.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    block = _choose(blocks.sum(2), generator)
    rows = torch.arange(len(block), device=block.device)
    return block * BLOCK + _choose(blocks[rows, block], generator)


def _choose(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draws an index [N] with probabilities proportional to the weights [N, n]."""
    sums = weights.double().cumsum(1)
    point = torch.rand(len(sums), 1, generator=generator, dtype=sums.dtype, device=sums.device)
    found = torch.searchsorted(sums, point * sums[:, -1:], right=True).squeeze(1)
    return found.clamp(max=weights.shape[1] - 1)  # beyond it where they are not finite, which ends the step


def make_cut(top_k: int, top_p: float) -> Cut | None:
    """Makes what limits the tokens to sample from; None = all of them are allowed."""
    top = [TopKLogitsWarper(top_k)] if top_k else []
    nucleus = [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return LogitsProcessorList([*top, *nucleus]) if top or nucleus else None  # pyright: ignore[reportReturnType]


def find_end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns all tokens that end a completion: a chat model can have several; its tokenizer names one.

    Of those that the model's files name only special tokens count: no other may end a completion.
    """
    own = model.generation_config.eos_token_id if model.generation_config else None
    named: list[Any] = own if isinstance(own, list) else [own]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    known: Any = tokenizer.eos_token_id
    return sorted({known, *(special & set(named))})
