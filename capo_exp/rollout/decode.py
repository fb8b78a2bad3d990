"""Decoding with transformers: a group's completions of each prompt, and the log-prob of each token."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from capo_exp.rollout import SamplingRequest

RACE, BLOCK = 4096, 256
"""The largest vocabulary with noise for each token; tokens that are drawn together in larger ones."""

Cut = Callable[[Tensor, Tensor], Tensor]  # (context, logits) -> the same, -inf at what must not be sampled


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
        Tokens [P * G, T], -1 after the end, and their log-probs [nats] under the full softmax at the
        temperature, which is the learner's, whatever top_k and top_p leave to sample from.
    """
    input_ids, mask, size = prompts["input_ids"], prompts["attention_mask"], request.group_size
    rows = input_ids.shape[0] * size
    room = input_ids.new_tensor(request.room())
    limit, room = int(room.max()), room.repeat_interleave(size)
    tokens = input_ids.new_full((rows, limit), -1)
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
