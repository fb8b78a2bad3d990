"""The property that defines the method: what is clipped keeps a gradient, of a bounded weight."""

import torch
from my_method import clipped_weight

from capo_exp import TokenLossInput


def test_a_clipped_token_still_learns() -> None:
    log_probs = torch.log(torch.tensor([[0.5, 0.9]])).requires_grad_()
    old = torch.log(torch.tensor([[0.5, 0.3]]))  # ratios 1 and 3
    ones = torch.ones(1, 2)
    inputs = TokenLossInput(log_probs, old, old, 2 * ones, ones.bool(), torch.zeros(1, 2))
    loss = clipped_weight(inputs, clip_eps_low=float("inf"), clip_eps_high=0.2)
    loss.values.sum().backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-2.0, -2.4]]))  # -A min(r, 1.2)
    assert loss.clipped.tolist() == [[False, True]]
