"""VinePPO: values by Monte Carlo where a reasoning step begins (Kazemnejad et al. 2024, arXiv 2410.01679)."""

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.algorithms.kinds import Positive
from capo_exp.config.ranges import PATTERN
from capo_exp.core.masked import whiten


def step_starts(texts: Sequence[str], *, pattern: Annotated[str, PATTERN]) -> list[int]:
    """Returns the first token, and each that is the first to begin at or after the end of a match of a
    regular expression; not the last token, which ends a completion.

    Source: the authors' program, which splits at new lines and between sentences, and further in LaTeX.
    """
    ends = [match.end() for match in re.finditer(pattern, "".join(texts))]
    begins = [0, *accumulate(map(len, texts))][:-1]
    found = {next((t for t, at in enumerate(begins) if at >= end), 0) for end in ends}
    return sorted({0, *(t for t in found if t < len(texts) - 1)})


def step_advantages(
    advantages: Float[Tensor, " B"],
    completion_mask: Bool[Tensor, "B T"],
    kl: Float[Tensor, "B T"],
    state_values: Float[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """Returns V(state after the step) - V(state before it) at each token of a step; after the last one it is
    the completion's reward, for which the advantages have to stand (reinforce.raw_reward).

    The steps of a completion add up to R - V(prompt). Source: arXiv 2410.01679, section 4; V is the mean
    reward of algo.continuations completions that go on from the state, discount 1.
    """
    del kl
    known = ~state_values.isnan()
    places = torch.arange(known.shape[1], device=known.device).expand_as(known)
    start = places.where(known, 0).cummax(1).values
    following = places.where(known, known.shape[1]).flip(1).cummin(1).values.flip(1)
    after = torch.cat([following[:, 1:], following.new_full((len(known), 1), known.shape[1])], 1)
    values = torch.cat([state_values, advantages[:, None]], 1)
    return torch.where(completion_mask, values.gather(1, after) - values.gather(1, start), 0.0)


def whitened_step_advantages(
    advantages: Float[Tensor, " B"],
    completion_mask: Bool[Tensor, "B T"],
    kl: Float[Tensor, "B T"],
    state_values: Float[Tensor, "B T"],
    *,
    eps: Positive,
) -> Float[Tensor, "B T"]:
    """Returns step_advantages, whitened over the completion tokens of the rollout step; all equal gives 0.

    Source: the authors' program, whose PPO whitens advantages.
    """
    return whiten(step_advantages(advantages, completion_mask, kl, state_values), completion_mask, eps)
