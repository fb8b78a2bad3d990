"""DPPO: divergence proximal policy optimisation (Qi et al. 2026, arXiv 2602.04879), its binary divergences.

Held against the learner's old policy, it acts from the second update on a batch, as PPO's clip does;
`anchored` at the sampler, the official program's default, at the first update, too, where the sampler
computes otherwise.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from capo_exp.algorithms.kinds import NonNegativeOrInf, Positive, Share
from capo_exp.algorithms.surrogates import sampler_else_old
from capo_exp.config.declare import corrects
from capo_exp.core.types import TokenLoss, TokenLossInput

LEAST = 1e-8
"""Probability of the other tokens where it rounds to 0."""


def tv_masked(
    inputs: TokenLossInput, *, delta_low: NonNegativeOrInf, delta_high: NonNegativeOrInf, ratio_cap: Positive
) -> TokenLoss:
    """Returns -min(r, ratio_cap) A, without a gradient where a token's probability p has left its old one, q,
    in the direction of A by |p - q| > delta_high (A > 0) or delta_low (A < 0).

    Source: arXiv 2602.04879, binary total variation.
    """
    return _mask_beyond(inputs, _tv, (delta_low, delta_high), ratio_cap)


def kl_masked(
    inputs: TokenLossInput, *, delta_low: NonNegativeOrInf, delta_high: NonNegativeOrInf, ratio_cap: Positive
) -> TokenLoss:
    """Returns the same with the divergence q ln(q / p) + (1 - q) ln((1 - q) / (1 - p)), in nats.

    Source: arXiv 2602.04879, binary KL.
    """
    return _mask_beyond(inputs, _kl, (delta_low, delta_high), ratio_cap)


@corrects(unless_zero="sampler_share")
def anchored(
    inputs: TokenLossInput, *, token_loss: Callable[..., TokenLoss], sampler_share: Share
) -> TokenLoss:
    """Returns a token loss with the sampler's log-probs in place of the learner's old ones, for mask and
    ratio alike; the learner's where nobody sampled (demonstrations). A sampler_share of 0 leaves the old
    ones, and one in between is between both.

    Source: the official program of arXiv 2602.04879: its default, 1, and its "recompute", 0.
    """

    def anchor(sampler: Tensor, old: Tensor) -> Tensor:
        return old.lerp(sampler_else_old(sampler, old), sampler_share)

    old = anchor(inputs.sampler_log_probs, inputs.old_log_probs)
    step = inputs.step
    if step is not None:
        step = replace(step, old_log_probs=anchor(step.batch.sampler_log_probs, step.old_log_probs))
    return token_loss(replace(inputs, old_log_probs=old, step=step))


def _mask_beyond(
    inputs: TokenLossInput,
    divergence: Callable[[Tensor, Tensor], Tensor],
    deltas: tuple[float, float],
    ratio_cap: float,
) -> TokenLoss:
    now, old, advantages = inputs.log_probs.detach(), inputs.old_log_probs, inputs.advantages
    ratio = (now - old).exp()
    delta = torch.where(advantages > 0, deltas[1], deltas[0])
    along = (ratio - 1) * advantages > 0
    left = along & (divergence(now.exp(), old.exp()) > delta)
    score = torch.where(left, 0.0, inputs.log_probs - now)  # 0 in value; its gradient is that of ln p
    return TokenLoss(values=-ratio.clamp(max=ratio_cap) * advantages * (1 + score), clipped=left)


def _tv(new: Tensor, old: Tensor) -> Tensor:
    return (new - old).abs()


def _kl(new: Tensor, old: Tensor) -> Tensor:
    """A probability that rounds to 1 leaves the others what float32 shows, LEAST, as in verl."""
    left = (1 - new).clamp(min=LEAST)
    return torch.xlogy(old, old / new) + torch.xlogy(1 - old, (1 - old) / left)
