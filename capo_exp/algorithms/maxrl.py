"""MaxRL: maximum-likelihood reinforcement learning (Tajwar et al. 2026, arXiv 2602.02710)."""

import torch
from jaxtyping import Float
from torch import Tensor

from capo_exp.config.declare import compares_group
from capo_exp.core.masked import centre


@compares_group
def mean_normalised(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Returns (R - mean) / mean within each prompt's group, 0 where the mean is not positive.

    With rewards of 0 and 1 the policy gradient is the mean score of the correct completions minus that of
    all: an estimate of grad ln P(correct), in which hard prompts weigh more. [P, G] -> [P, G].
    Source: arXiv 2602.02710, the on-policy estimator.
    """
    mean = rewards.mean(1, keepdim=True)
    return torch.where(mean > 0, centre(rewards) / mean.where(mean > 0, 1.0), 0.0)
