"""What the last layer says of sampled tokens: log-probs with a gradient, entropy and the top K, in chunks."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax
from torch.utils.checkpoint import checkpoint

_BLOCK = 64
"""Neighbouring ids among which a maximum is looked for first; near sqrt(V / K) both searches are short."""


def score_hidden(
    head: torch.nn.Module, hidden: Tensor, token_ids: Tensor, top_k: int, chunk_tokens: int
) -> tuple[Tensor, ...]:
    """Computes log_probs [N], entropy [N], topk_probs [N, K], topk_ids [N, K] of hidden [N, H]; the logits of
    at most chunk_tokens tokens exist at a time and are made again in the backward pass."""
    chunks = zip(hidden.split(chunk_tokens), token_ids.split(chunk_tokens), strict=True)
    if len(hidden) <= chunk_tokens:
        return _score(head, hidden, token_ids, top_k)
    scored = [checkpoint(_score, head, h, ids, top_k, use_reentrant=False) for h, ids in chunks]
    return tuple(torch.cat(columns) for columns in zip(*scored, strict=True))  # pyright: ignore[reportArgumentType]


def _score(head: torch.nn.Module, hidden: Tensor, token_ids: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """A sampled token outside the top K takes the last place: else its update, the largest of all, would look
    small."""
    logits = head(hidden)
    log_probs, every = _LogProb.apply(logits, token_ids)  # pyright: ignore[reportGeneralTypeIssues]
    # After what the gradient needs: a checkpoint's second run stops before it gets here.
    with torch.no_grad():
        entropy = every.exp().mul_(every).sum(1).neg_()
        ids = top_ids(logits, top_k)
        outside = (ids != token_ids[:, None]).all(1)
        ids[:, -1] = torch.where(outside, token_ids, ids[:, -1])
        return log_probs, entropy, every.gather(1, ids).softmax(1), ids


class _LogProb(torch.autograd.Function):
    """Log-probs in float32 of one token of each row, and those of all tokens, which have no gradient. The
    gradient takes one pass over the logits, which are all that is kept for it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, token_ids[:, None])
        every = log_softmax(logits, 1, dtype=torch.float32)
        ctx.mark_non_differentiable(every)
        return every.gather(1, token_ids[:, None]).squeeze(1).clone(), every

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (logits, ids), scale = ctx.saved_tensors, gradients[0][:, None]
        change = softmax(logits, 1, dtype=torch.float32).mul_(-scale)
        return change.scatter_(1, ids, change.gather(1, ids) + scale).to(logits.dtype), None


def top_ids(logits: Tensor, top_k: int) -> Tensor:
    """Returns the ids [N, K] of the largest logits of each row, largest first: those of the K blocks with the
    largest maxima, among which they all are."""
    rows, vocabulary = logits.shape
    whole = vocabulary // _BLOCK * _BLOCK
    if whole <= 2 * top_k * _BLOCK:
        return logits.topk(top_k, dim=1).indices
    blocks = logits[:, :whole].unflatten(1, (whole // _BLOCK, _BLOCK))
    chosen = blocks.amax(2).topk(top_k, dim=1, sorted=False).indices[:, :, None]
    ids = (chosen * _BLOCK + torch.arange(_BLOCK, device=logits.device)).flatten(1)
    rest = torch.arange(whole, vocabulary, device=logits.device).expand(rows, -1)
    ids = torch.cat([ids, rest], 1)
    return ids.gather(1, logits.gather(1, ids).topk(top_k, dim=1).indices)
