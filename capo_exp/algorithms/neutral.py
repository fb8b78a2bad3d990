"""Parts that do nothing: what a YAML leaves out, and where every comparison starts."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.core.step import StepDecision, StepTrial
from capo_exp.core.types import Batch, Scored, Selection


def all_groups(rewards: Float[Tensor, "P G"]) -> Bool[Tensor, " P"]:
    """Filters nothing: every group counts."""
    return torch.ones(len(rewards), dtype=torch.bool, device=rewards.device)


def prompt_alone(texts: Sequence[str]) -> list[int]:
    """Names the prompt the only state of a completion."""
    del texts
    return [0]


def unshaped(
    rewards: Float[Tensor, "P G"], lengths: Float[Tensor, "P G"], kl: Float[Tensor, "P G"]
) -> Float[Tensor, "P G"]:
    """Returns the verifier's reward as it is."""
    del lengths, kl
    return rewards


def every_token(
    advantages: Float[Tensor, " B"], completion_mask: Bool[Tensor, "B T"], kl: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Gives each token its completion's advantage."""
    del kl
    return advantages[:, None] * completion_mask


def all_completions(batch: Batch) -> Bool[Tensor, " B"]:
    """Filters nothing: the learner sees every completion."""
    return torch.ones_like(batch.truncated)


def keep_all(scored: Scored) -> Selection:
    """Selects nothing: every completion token takes part."""
    return Selection(scored.batch.completion_mask)


def full_step(trial: StepTrial) -> StepDecision:
    """Takes the proposed step whole, without looking at it."""
    del trial
    return StepDecision(1.0)
