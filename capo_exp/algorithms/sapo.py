"""SAPO: soft adaptive policy optimisation (Qwen team 2025, arXiv 2511.20347)."""

import torch

from capo_exp.algorithms.kinds import Positive
from capo_exp.core.types import TokenLoss, TokenLossInput


def soft_gate(
    inputs: TokenLossInput, *, positive_temperature: Positive, negative_temperature: Positive
) -> TokenLoss:
    """Returns -4 / tau sigmoid(tau (r - 1)) A per token, tau by the sign of A: a gate that closes smoothly in
    place of a clip. At r = 1 the gradient is -A grad ln pi; as tau goes to 0 it is that of the plain ratio.

    Source: arXiv 2511.20347, the soft gate; the numbers as there, 1.0 and 1.05.
    """
    advantages = inputs.advantages
    tau = torch.where(advantages > 0, positive_temperature, negative_temperature)
    gate = 4 / tau * torch.sigmoid(tau * (inputs.log_ratio.exp() - 1))
    return TokenLoss(values=-gate * advantages, clipped=torch.zeros_like(inputs.completion_mask))
