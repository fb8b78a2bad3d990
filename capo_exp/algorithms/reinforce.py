"""REINFORCE without a baseline, as the CAPO paper compares with (arXiv 2510.00819, section 6)."""

from jaxtyping import Float
from torch import Tensor


def raw_reward(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Returns A = R. [P, G] -> [P, G]. Source: Williams 1992."""
    return rewards
