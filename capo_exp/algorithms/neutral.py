"""Parts that do nothing: what a YAML leaves out, and where every comparison starts."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.config.errors import ConfigError
from capo_exp.core.types import Batch, Scored, Selection
from capo_exp.curvature.step_trial import Decision, Proposal


def all_groups(rewards: Float[Tensor, "P G"]) -> Bool[Tensor, " P"]:
    """No filter: every group counts."""
    return torch.ones(len(rewards), dtype=torch.bool, device=rewards.device)


def unshaped(
    rewards: Float[Tensor, "P G"], lengths: Float[Tensor, "P G"], kl: Float[Tensor, "P G"]
) -> Float[Tensor, "P G"]:
    """The verifier's reward as it is."""
    del lengths, kl
    return rewards


def every_token(
    advantages: Float[Tensor, " B"], completion_mask: Bool[Tensor, "B T"], kl: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """A completion's advantage is that of each of its tokens."""
    del kl
    return advantages[:, None] * completion_mask


def all_completions(batch: Batch) -> Bool[Tensor, " B"]:
    """No filter: the learner sees every completion."""
    return torch.ones_like(batch.truncated)


def keep_all(scored: Scored) -> Selection:
    """No selection: every completion token takes part."""
    return Selection(scored.batch.completion_mask)


def require_whole_step(scored: Scored, name: str) -> None:
    """For selections that cannot decide about a part of the step.

    Raises:
        ConfigError: naming the key that gives a selection all of it.
    """
    if not scored.whole_step:
        raise ConfigError(f"algo.scoring_pass=false: expected true, since {name} needs the whole step")


def full_step(proposal: Proposal) -> Decision:
    """Takes the proposed step whole, without looking at it."""
    del proposal
    return Decision(1.0)
