"""M2PO: second-moment trust policy optimisation (Zheng et al. 2025, arXiv 2510.01161)."""

import torch

from capo_exp.algorithms.kinds import NonNegativeOrInf
from capo_exp.algorithms.surrogates import LogRatio
from capo_exp.config.declare import whole_step
from capo_exp.core.masked import masked_top
from capo_exp.core.types import Scored, Selection


@whole_step
def second_moment(scored: Scored, *, log_ratio: LogRatio, second_moment_max: NonNegativeOrInf) -> Selection:
    """Rejects, of the step's tokens that have moved in the direction of A, those with the largest (ln r)^2
    until the mean of (ln r)^2 over the rest of them is at most second_moment_max [nats^2].

    One bound on a mean lets most large ratios stay, where a clip would cut each of them; tokens that moved
    against A are free, as under PPO's clip. Source: arXiv 2510.01161, algorithm 1; the authors'
    program clips at a common ratio instead (docs/PAPER_MAP.md).
    """
    mask, ratio = scored.batch.completion_mask, log_ratio(scored)
    moved = mask & (ratio * scored.batch.advantages > 0)
    squares = ratio.square()[moved].sort().values
    within = squares.cumsum(0) <= second_moment_max * torch.arange(1, len(squares) + 1, device=squares.device)
    beyond = masked_top(ratio.square(), moved, len(squares) - int(within.sum()))
    return Selection(mask & ~beyond, rejected_by={"second_moment": beyond})
