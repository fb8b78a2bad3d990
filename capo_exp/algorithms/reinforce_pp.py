"""REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): global whitening in place of a critic."""

from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.algorithms.kinds import NonNegative, Positive
from capo_exp.config.declare import needs_kl
from capo_exp.core.masked import whiten


@needs_kl(unless_zero="kl_coefficient")
def whitened_return(
    advantages: Float[Tensor, " B"],
    completion_mask: Bool[Tensor, "B T"],
    kl: Float[Tensor, "B T"],
    *,
    kl_coefficient: NonNegative,
    eps: Positive,
) -> Float[Tensor, "B T"]:
    """Computes the return of each token, undiscounted, whitened over all completion tokens of the batch.

    The reward sits on the last token and each token pays coefficient * ln(policy / reference), so the return
    of token t is A minus the penalty of the tokens from t on. All tokens equal gives exactly zero.
    The "baseline" variant hands in R - group mean, and coefficient 0.
    Source: arXiv 2501.03262, token-level KL and advantage normalisation.
    """
    penalty = (kl_coefficient * kl * completion_mask).flip(1).cumsum(1).flip(1)
    return whiten(advantages[:, None] - penalty, completion_mask, eps)
