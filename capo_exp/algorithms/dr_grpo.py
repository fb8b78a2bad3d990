"""Dr. GRPO: GRPO without its length and difficulty biases (arXiv 2503.20783)."""

from jaxtyping import Float
from torch import Tensor

from capo_exp.config.declare import compares_group
from capo_exp.core.masked import centre


@compares_group
def group_centred(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Returns R - mean within each prompt's group. Source: arXiv 2503.20783, section 3.2."""
    return centre(rewards)
