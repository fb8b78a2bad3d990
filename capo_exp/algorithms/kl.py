"""Estimates of KL(policy || reference) from the sampled token alone."""

from jaxtyping import Float
from torch import Tensor


def kl_k1(log_probs: Float[Tensor, "..."], ref_log_probs: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Returns k1 = ln(policy / reference) per token [nats]: unbiased; as a loss its gradient is 0 on average,
    so it belongs in the reward. Source: Schulman 2020, "Approximating KL divergence"."""
    return log_probs - ref_log_probs


def kl_k2(log_probs: Float[Tensor, "..."], ref_log_probs: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Returns k2 = 1/2 ln(policy / reference)^2 per token [nats]: as a loss on-policy its gradient is that of
    the KL.

    Source: Schulman 2020.
    """
    return 0.5 * (log_probs - ref_log_probs).square()


def kl_k3(log_probs: Float[Tensor, "..."], ref_log_probs: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Returns the k3 estimate of KL(policy || reference) per token [nats]: exp(d) - 1 - d with d = ref -
    current; never negative.

    Source: Schulman 2020; GRPO, arXiv 2402.03300, eq. 4.
    """
    difference = ref_log_probs - log_probs
    return difference.exp() - 1 - difference
