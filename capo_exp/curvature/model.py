"""Predicted shifts under the last-layer model (CAPO, arXiv 2510.00819, section 5).

Only the last layer W [V, H] is modelled, logits z = W h. For a sampled token a with support probabilities pi
over K ids:

    v    = onehot(a) - pi                  logit error                                            [K]
    g    = A v (x) h                       gradient of A log pi(a) with respect to the K rows     [K, H]
    u    = Ghat h,  s = <v, u>             what the optimiser's direction Ghat does to the logits [K], scalar
    m_F  = 1/2 lr^2 s^2                    policy shift
    m_H  = lr A s + 1/2 lr^2 A (s^2 - Var_pi(u))   objective shift

m_F is half the squared change of ln pi(a), exact to second order: the k2 estimate from the sampled token, not
the KL of the token's step, which is an order of magnitude smaller in the median. Ghat is g itself (SGD model)
or Adam's bias-corrected direction once the token's gradient joins the stored moments. Everything runs in the
dtype of `hidden`, float32 or better. Nothing of B*T*K*H elements is ever built: the directions are made for a
few tokens at a time, few enough to stay in a processor's cache. On a GPU `kernels` does the same over (token,
id) pairs sorted by row; what is here stays the reference.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from capo_exp.core.types import AdamState, Batch, BatchShifts, PolicyOutput, TokenOrRow, TokenShifts
from capo_exp.curvature.backend import find_kernels
from capo_exp.curvature.table import decay, grow
from capo_exp.distributed.world import SINGLE, World

# Elements of one [tokens, K, H] working block: a CPU core's second-level cache holds two; a GPU wants few
# launches.
_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
# Vocabulary rows for each of a token's K, up to which the product with all rows costs less than with its own.
_FEW_ROWS = 16


@dataclass(frozen=True)
class Tokens:
    """Sampled tokens of a batch, packed to one row a token, in the order of the batch."""

    hidden: Float[Tensor, "N H"]  # last-layer input that produced the token's logits
    probs: Float[Tensor, "N K"]  # probabilities renormalised over the support
    ids: Int[Tensor, "N K"]  # int64, vocabulary ids of the support
    logit_error: Float[Tensor, "N K"]
    """[N, K] v = onehot(a) - pi; a sampled token outside the support has an all-zero one-hot."""
    advantages: Float[Tensor, " N"]  # reward units
    rows: Int[Tensor, " N"]  # int64, the completion that holds the token
    completions: int  # Of the batch, those without a token here, too


@dataclass(frozen=True)
class RowGradients:
    """Mean gradient of each vocabulary row over the tokens whose support holds it."""

    ids: Int[Tensor, " R"]  # int64, ascending
    means: Float[Tensor, "R H"]
    counts: Int[Tensor, " R"]  # int64, how many tokens' supports hold the row


def init_adam_state(
    vocab_size: int,
    hidden_size: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> AdamState:
    """Makes an optimiser model that has seen nothing. The table starts with its zero row alone.

    dtype is that of the table: float32, or bfloat16 for half the memory.

    Raises:
        ValueError: if a beta is not inside (0, 1).
    """
    if not all(0 < beta < 1 for beta in betas):
        raise ValueError(f"curvature.betas={list(betas)}: expected two numbers inside (0, 1)")
    empty = torch.zeros(1, hidden_size, dtype=dtype, device=device)
    slots = torch.zeros(vocab_size, dtype=torch.int64, device=device)
    return AdamState(slots, empty, empty.clone(), 0, (float(betas[0]), float(betas[1])), eps)


def token_shifts(
    hidden: Float[Tensor, "B T H"],
    topk_probs: Float[Tensor, "B T K"],
    topk_ids: Int[Tensor, "B T K"],
    token_ids: Int[Tensor, "B T"],
    advantages: TokenOrRow,
    learning_rate: float,
    state: AdamState | None,
) -> TokenShifts:
    """Predicts what each token's own update would do: m_F [B, T] in nats and m_H [B, T] in reward units.

    Args:
        hidden: [B, T, H] last-layer input that produced the token's logits.
        topk_probs: [B, T, K] probabilities renormalised over the support.
        topk_ids: [B, T, K] vocabulary ids of the support.
        token_ids: [B, T] sampled tokens.
        advantages: [B], or [B, T] where tokens of a completion differ.
        learning_rate: the scheduler's current value.
        state: Adam moments, or None for the SGD model.
    """
    columns = (hidden, topk_probs, topk_ids, token_ids, _by_token(advantages, token_ids))
    rows = torch.arange(len(token_ids), device=token_ids.device).repeat_interleave(token_ids.shape[1])
    tokens = _make_tokens((values.flatten(0, 1) for values in columns), rows, len(token_ids))
    policy, objective = predict_shifts(tokens, learning_rate=learning_rate, state=state)
    return TokenShifts(policy.view(token_ids.shape), objective.view(token_ids.shape))


def update_adam_state(
    state: AdamState,
    hidden: Float[Tensor, "B T H"],
    topk_probs: Float[Tensor, "B T K"],
    topk_ids: Int[Tensor, "B T K"],
    token_ids: Int[Tensor, "B T"],
    advantages: TokenOrRow,
    keep_mask: Bool[Tensor, "B T"],
) -> AdamState:
    """Returns the moments after an optimiser step on the kept tokens, keep_mask [B, T] bool; the other shapes
    are those of `token_shifts`. The given moments stay as they are; training, which needs them no more, calls
    the two functions by itself and saves the copy."""
    tokens = pack(hidden, topk_probs, topk_ids, token_ids, advantages, keep_mask)
    return apply_row_gradients(copy_moments(state), mean_row_gradients(tokens))


def copy_moments(state: AdamState) -> AdamState:
    """Returns the same moments in a table of their own, without room to grow."""
    return replace(state, first=state.first.clone(), second=state.second.clone())


def pack(
    hidden: Float[Tensor, "B T H"],
    topk_probs: Float[Tensor, "B T K"],
    topk_ids: Int[Tensor, "B T K"],
    token_ids: Int[Tensor, "B T"],
    advantages: TokenOrRow,
    mask: Bool[Tensor, "B T"],
) -> Tokens:
    """Packs the tokens at the True positions of mask; the other shapes are those of `token_shifts`."""
    columns = (hidden, topk_probs, topk_ids, token_ids, _by_token(advantages, token_ids))
    return _make_tokens((values[mask] for values in columns), mask.nonzero()[:, 0], len(mask))


def pack_batch(output: PolicyOutput, batch: Batch, advantages: Tensor, mask: Tensor) -> Tokens:
    """Packs a batch's tokens at the True positions of mask [B, T], with these advantages [B, T]; of a batch
    that is shared out, those of the rows that the output holds."""
    columns = (batch.token_ids, advantages, mask)
    own = columns if output.rows is None else [column[output.rows] for column in columns]
    return pack(output.hidden, output.topk_probs, output.topk_ids, *own)


def _by_token(advantages: TokenOrRow, token_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return advantages if advantages.dim() == 2 else advantages[:, None].expand_as(token_ids)


def _make_tokens(columns: Iterable[Tensor], rows: Int[Tensor, " N"], completions: int) -> Tokens:
    """Makes N tokens of hidden [N, H], probabilities and ids [N, K], token ids and advantages [N]."""
    hidden, probs, ids, token_ids, advantages = columns
    error = (ids == token_ids[:, None]).to(probs.dtype) - probs
    return Tokens(hidden, probs, ids, error, advantages.to(hidden.dtype), rows, completions)


def predict_shifts(
    tokens: Tokens, *, learning_rate: float, state: AdamState | None
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Predicts m_F [N] in nats and m_H [N] in reward units of each token's own update.

    Source: CAPO, arXiv 2510.00819, section 5, in closed form; equal to the authors' program.
    """
    moments = _moments(state)
    if moments is None:
        change = tokens.logit_error * (tokens.advantages * tokens.hidden.square().sum(1))[:, None]
    else:
        change = _adam_logit_change(tokens, moments)
    s, variance = _along(tokens, change)
    policy = 0.5 * (learning_rate * s) ** 2
    curvature = 0.5 * learning_rate**2 * (s.square() - variance)
    return policy, tokens.advantages * (learning_rate * s + curvature)


def mean_row_gradients(tokens: Tokens, world: World = SINGLE) -> RowGradients:
    """Sums the gradients of all processes' tokens per vocabulary row and divides by the number of tokens that
    touch the row.

    Source: the authors' program, which gathers sums and counts of all its processes.
    """
    flat, support = tokens.ids.reshape(-1), tokens.ids.shape[1]
    highest = max(world.together(lambda: int(flat.max()) if len(flat) else -1)) if world.size > 1 else 0
    own = torch.bincount(flat, minlength=highest + 1)
    counts = world.sum(own)
    ids = counts.nonzero().squeeze(1)
    order = flat.argsort(stable=True)
    weights = (tokens.advantages[:, None] * tokens.logit_error).reshape(-1)[order]
    starts = pad(own[ids].cumsum(0), (1, 0))
    sums = world.sum(_sum_rows(tokens.hidden, order // support, weights, starts))
    return RowGradients(ids, sums.div_(counts[ids].to(sums.dtype)[:, None]), counts[ids])


def apply_row_gradients(state: AdamState, gradients: RowGradients) -> AdamState:
    """Gives the table a step, in place, and returns the moments after it: seen rows decay and take their mean
    gradient, all others stay as they are. Whoever needs the moments before it copies them first."""
    missing = gradients.ids[state.slot_of_id[gradients.ids] == 0]
    slot_of_id, used, most = state.slot_of_id.clone(), len(state.first), 1 + len(state.slot_of_id)
    slot_of_id[missing] = torch.arange(used, used + len(missing), device=missing.device)
    first, second = (grow(table, used + len(missing), most) for table in (state.first, state.second))
    decay(first, second, slot_of_id[gradients.ids], gradients.means, state.betas, state.step)
    return replace(state, slot_of_id=slot_of_id, first=first, second=second, step=state.step + 1)


def batch_shifts(
    tokens: Tokens,
    gradients: RowGradients,
    *,
    learning_rate: float,
    state: AdamState | None,
    world: World = SINGLE,
) -> BatchShifts:
    """Predicts what the mean update of all processes' tokens, of these row gradients, does to them; 0 without
    tokens.

    objective_shift is the mean over tokens of A (ratio - 1) to second order in that update, exact where K =
    V. The others are the authors' "global" level: second-order terms are averaged over each completion's
    tokens and then over all completions, and the first-order term of objective_shift_by_row is the inner
    product of update and row gradients, in which a row that one support holds weighs as much as one that all
    hold.
    """
    number, completions = world.sum(torch.tensor([len(tokens.rows), tokens.completions])).tolist()
    if not number:
        return BatchShifts(0.0, 0.0, 0.0)
    moments = _moments(state)
    step = gradients.means if moments is None else _adam_rows(moments, gradients)
    s, variance = _along(tokens, _row_logit_change(tokens, gradients.ids, step))
    per_token = (completions * torch.bincount(tokens.rows)[tokens.rows]).to(s.dtype).reciprocal()
    curvature = 0.5 * learning_rate**2 * tokens.advantages * (s.square() - variance)
    policy = 0.5 * learning_rate**2 * (s.square() * per_token).sum()
    gain = (learning_rate * tokens.advantages * s + curvature).sum()
    policy, gain, second_order = world.sum(torch.stack([policy, gain, (curvature * per_token).sum()]))
    size = _rows_of_block(step)
    inner = sum((a * b).sum() for a, b in zip(gradients.means.split(size), step.split(size), strict=True))
    by_row = learning_rate * inner + second_order
    return BatchShifts(policy.item(), (gain / number).item(), by_row.item())


def completion_shifts(
    tokens: Tokens, *, learning_rate: float, state: AdamState | None, world: World = SINGLE
) -> list[BatchShifts]:
    """Predicts what the mean update of each completion does to its own tokens.

    Source: the authors' "sentence" level.
    """
    del world  # a completion is in one process
    shifts: list[BatchShifts] = []
    columns = [values for values in vars(tokens).values() if isinstance(values, Tensor)]
    for row in range(tokens.completions):
        own = Tokens(*(values[tokens.rows == row] for values in columns), completions=1)
        gradients = mean_row_gradients(own)
        shifts.append(batch_shifts(own, gradients, learning_rate=learning_rate, state=state))
    return shifts


def whole_shifts(
    tokens: Tokens, *, learning_rate: float, state: AdamState | None, world: World = SINGLE
) -> list[BatchShifts]:
    """Predicts what the mean update of all processes' tokens does, once for each completion here."""
    gradients = mean_row_gradients(tokens, world)
    whole = batch_shifts(tokens, gradients, learning_rate=learning_rate, state=state, world=world)
    return [whole] * tokens.completions


def _along(tokens: Tokens, change: Float[Tensor, "N K"]) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Returns s = <v, u> and Var_pi(u), both [N], for a change u [N, K] of the logits."""
    s = (tokens.logit_error * change).sum(1)
    mean = (tokens.probs * change).sum(1, keepdim=True)
    return s, (tokens.probs * (change - mean).square()).sum(1)


def _blocks(tokens: Tokens) -> Iterator[slice]:
    """Yields slices of tokens whose [tokens, K, H] block is small: never all tokens at once, however few
    there are."""
    count, support = tokens.ids.shape
    limit = _BLOCK_ELEMENTS.get(tokens.ids.device.type, 2**22) // (support * tokens.hidden.shape[1])
    size = max(1, min(limit, (count + 1) // 2))
    return (slice(start, start + size) for start in range(0, count, size))


def _adam_logit_change(tokens: Tokens, state: AdamState) -> Float[Tensor, "N K"]:
    """Returns u = Ghat h [N, K] for the direction that Adam would take if this token's gradient came next.

    With t = step + 1, Ghat = (b1 m + (1-b1) g) / (1-b1^t) / (sqrt((b2 q + (1-b2) g^2) / (1-b2^t)) + eps).
    Numerator and denominator are divided by b1 and sqrt(b2 / (1-b2^t)), so that a block needs no pass for the
    decay.
    """
    (beta1, beta2), sign, (scale, eps) = state.betas, state.sign, _bias_correction(state)
    slots = state.slot_of_id[tokens.ids]
    weight = 1.0 if state.token_weight is None else state.token_weight
    coefficients = weight * tokens.advantages[:, None] * tokens.logit_error
    in_first, in_second = sign * (1 - beta1) / beta1, (1 - beta2) / beta2
    if kernels := find_kernels(tokens.hidden):
        moments = (state.first, state.second)
        change = kernels.along_adam(tokens.hidden, slots, moments, coefficients, in_first, in_second, eps)
        return change.mul_(sign * scale)
    blocks: list[Tensor] = []
    rooms = [table.new_empty(0) for table in (state.first, state.second)]
    for block in _blocks(tokens):
        hidden, a = tokens.hidden[block], coefficients[block, :, None]
        direction = _rows(state.first, slots[block], rooms[0]).to(hidden.dtype)
        direction.addcmul_(a, hidden[:, None, :], value=in_first)
        spread = _rows(state.second, slots[block], rooms[1]).to(hidden.dtype)
        spread.addcmul_(a.square(), hidden.square()[:, None, :], value=in_second).sqrt_().add_(eps)
        blocks.append(direction.div_(spread).mul_(hidden[:, None, :]).sum(2))
    return torch.cat(blocks).mul_(sign * scale) if blocks else coefficients


def _row_logit_change(
    tokens: Tokens, ids: Int[Tensor, " R"], step: Float[Tensor, "R H"]
) -> Float[Tensor, "N K"]:
    """Returns what a step of the rows of these ids, ascending, does to the logits."""
    places = torch.searchsorted(ids, tokens.ids)
    if kernels := find_kernels(tokens.hidden):
        return kernels.along_rows(tokens.hidden, places, step)
    if len(ids) <= _FEW_ROWS * places.shape[1]:  # of all rows at once, a product that is faster than few rows
        size = max(1, _BLOCK_ELEMENTS["cpu"] // max(1, len(ids)))
        parts = zip(tokens.hidden.split(size), places.split(size), strict=True)
        blocks = [(hidden @ step.T).gather(1, own) for hidden, own in parts]
    else:
        room = step.new_empty(0)
        pairs = ((_rows(step, places[b], room), tokens.hidden[b, None, :]) for b in _blocks(tokens))
        blocks = [rows.mul_(hidden).sum(2) for rows, hidden in pairs]
    return torch.cat(blocks) if blocks else tokens.probs


def _sum_rows(
    hidden: Float[Tensor, "N H"],
    tokens: Int[Tensor, " pairs"],
    weights: Float[Tensor, " pairs"],
    starts: Int[Tensor, " bounds"],
) -> Float[Tensor, "R H"]:
    """Sums weight x hidden over each row's pairs, which lie between its start and the next."""
    if kernels := find_kernels(hidden):
        return kernels.sum_rows(hidden, tokens, weights, starts)
    return embedding_bag(tokens, hidden, starts[:-1], mode="sum", per_sample_weights=weights)


def _adam_rows(state: AdamState, gradients: RowGradients) -> Float[Tensor, "R H"]:
    """Returns Ghat [R, H], the direction of each row if its mean gradient came next, or its part of the
    loss's gradient where the moments are of that."""
    (beta1, beta2), sign, (scale, eps) = state.betas, state.sign, _bias_correction(state)
    slots, weight = state.slot_of_id[gradients.ids], state.token_weight
    step = torch.empty_like(gradients.means)
    size = _rows_of_block(step)
    for start in range(0, len(step), size):
        block = slice(start, start + size)
        means = gradients.means[block]
        if weight is not None:
            means = means * (weight * gradients.counts[block])[:, None]
        direction = state.first[slots[block]].to(means.dtype).add_(means, alpha=sign * (1 - beta1) / beta1)
        spread = state.second[slots[block]].to(means.dtype).add_(means.square(), alpha=(1 - beta2) / beta2)
        step[block] = direction.div_(spread.sqrt_().add_(eps)).mul_(sign * scale)
    return step


def _rows_of_block(table: Tensor) -> int:
    """Returns how many rows are worked on at once, so that no copy of the whole table is needed."""
    return max(1, _BLOCK_ELEMENTS["cuda"] // table.shape[1])


def _rows(table: Tensor, slots: Tensor, room: Tensor) -> Tensor:
    """Returns [tokens, K, H] rows of a table, a copy in `room`: to find memory for each block would take
    longer than to fill it."""
    room.resize_(slots.numel(), table.shape[1])
    return torch.index_select(table, 0, slots.reshape(-1), out=room).view(*slots.shape, table.shape[1])


def _moments(state: AdamState | None) -> AdamState | None:
    """Returns the moments to form a direction with; None = the raw gradient is the direction."""
    return None if state is None or state.step < state.raw_steps else state


def _bias_correction(state: AdamState) -> tuple[float, float]:
    """Returns the factor and the eps that remain after b1 and sqrt(b2 / (1-b2^t)) are divided out."""
    beta1, beta2 = state.betas
    root = (beta2 / (1 - beta2 ** (state.step + 1))) ** 0.5
    return beta1 / (1 - beta1 ** (state.step + 1)) / root, state.eps / root
