"""Weights of the credit where sampler and learner disagree about how likely a token was.

Both give the log-prob of each token under the weights that sampled, but engines compute it differently. Every
function: log_ratio [B, T] nats, ln of the learner's probability over the sampler's, completion_mask [B, T]
bool -> weights [B, T] that multiply the advantages, without a graph, 0 on padding. A correction never gives
NaN or infinity: a token whose ratio is not a number has weight 0. What a loss has beside the advantages, such
as a KL to the reference or CPGD's drift, is not weighted.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.algorithms.kinds import From1, Positive, UpTo1
from capo_exp.core.masked import masked_mean, masked_sum

LogRatio = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]
Weights = Float[Tensor, "B T"]


def uncorrected(log_ratio: LogRatio, completion_mask: Mask) -> Weights:
    """Returns 1 on every token, whatever the ratio: CAPO and the papers it compares with."""
    return completion_mask.to(log_ratio.dtype)


def truncate_tokens(log_ratio: LogRatio, completion_mask: Mask, *, ratio_cap: Positive) -> Weights:
    """Returns min(ratio, ratio_cap): truncated importance sampling (TIS).

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training", cap 2;
    verl's rollout_is=token.
    """
    ratio = _token_ratio(log_ratio, completion_mask)
    return torch.where(ratio > 0, ratio.clamp(max=ratio_cap), 0.0)


def mask_tokens(
    log_ratio: LogRatio, completion_mask: Mask, *, ratio_low: UpTo1, ratio_high: From1
) -> Weights:
    """Returns the ratio where ratio_low <= ratio <= ratio_high, else 0: IcePop.

    Source: Ring-1T, arXiv 2510.18855, [0.5, 5].
    """
    ratio = _token_ratio(log_ratio, completion_mask)
    return torch.where((ratio_low <= ratio) & (ratio <= ratio_high), ratio, 0.0)


def mask_sequences(log_ratio: LogRatio, completion_mask: Mask, *, ratio_cap: Positive) -> Weights:
    """Returns the ratio of the whole completion, the product over its tokens, at each of them; 0 at all of
    them where it is above ratio_cap.

    Source: masked importance sampling (MIS), in TRL the default, "sequence_mask" with cap 3.
    """
    ratio = _completion_ratio(log_ratio, completion_mask)
    return torch.where(completion_mask & (ratio <= ratio_cap), ratio, 0.0)


def truncate_sequences(log_ratio: LogRatio, completion_mask: Mask, *, ratio_cap: Positive) -> Weights:
    """Returns min(ratio of the whole completion, ratio_cap) at each of its tokens.

    Source: truncated importance sampling of sequences, verl's rollout_is=sequence, cap 2.
    """
    ratio = _completion_ratio(log_ratio, completion_mask).clamp(max=ratio_cap)
    return torch.where(completion_mask & (ratio > 0), ratio, 0.0)


def mask_geometric(
    log_ratio: LogRatio, completion_mask: Mask, *, ratio_low: UpTo1, ratio_high: From1
) -> Weights:
    """Returns each token's ratio where the geometric mean of the completion's ratios is within the bounds, 0
    at all of its tokens where it is not: how far a completion may drift does not depend on its length.

    Source: verl's geometric rejection, [0.999, 1.001]; weights as in OpenRLHF's seq-mask-tis.
    """
    mean = masked_mean(log_ratio.detach(), completion_mask, 1).exp()[:, None]
    ratio = _token_ratio(log_ratio, completion_mask)
    return torch.where((ratio_low <= mean) & (mean <= ratio_high) & ratio.isfinite(), ratio, 0.0)


def _completion_ratio(log_ratio: LogRatio, completion_mask: Mask) -> Float[Tensor, "B 1"]:
    return masked_sum(log_ratio.detach(), completion_mask, 1).exp()[:, None]


def _token_ratio(log_ratio: LogRatio, completion_mask: Mask) -> Weights:
    """Returns exp(log_ratio) of each token, 0 on padding whatever stands there."""
    return log_ratio.detach().masked_fill(~completion_mask, -torch.inf).exp()
