"""The second half of a rollout step: the optimiser steps that one batch is good for."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from capo_exp.algorithms.protocols import Algorithm
from capo_exp.config.schema import TrainConfig
from capo_exp.core.batch import join, minibatches, take, totals
from capo_exp.core.seeds import MINIBATCH, derive_seed
from capo_exp.core.types import Batch, StepRecord
from capo_exp.training.learner import Learner


@dataclass(frozen=True)
class Update:
    """One optimiser step."""

    rows: Tensor
    """[b] rows of the batch that it saw."""
    metrics: dict[str, float]
    record: StepRecord | None
    """What it saw; only of the last pass, for a batch's hidden states are large."""


def updates(
    learner: Learner, algorithm: Algorithm, config: TrainConfig, batch: Batch, *, step: int
) -> Iterator[Update]:
    """num_iterations passes of num_minibatches optimiser steps over what the completion filter leaves.

    The old log-probs are those of the weights that sampled: of the first update's own forward pass, or, where
    the first pass has several minibatches, of one more before it.

    Args:
        learner: takes the steps.
        algorithm: its parts.
        config: of the run.
        batch: all rows of the rollout step.
        step: rollout step, counted from 1; decides how minibatches are drawn.
    """
    algo = config.algo
    kept = algorithm.completion_filter(batch)
    filtered = 1 - kept.float().mean().item()
    assert kept.any(), "a completion filter has to leave something"
    seen = kept.nonzero().squeeze(1)
    old_log_probs: Tensor | None = None
    if algo.num_minibatches > 1:
        old_log_probs = join([(seen, learner.log_probs(take(batch, seen)))], batch.completion_mask)
    for iteration in range(algo.num_iterations):
        seed = derive_seed(config.seed, MINIBATCH, step, iteration)
        for part in minibatches(len(kept), algo.num_minibatches, seed):
            rows = part[kept[part].cpu()]
            if not len(rows):
                continue
            sizes = totals(take(batch, part if algo.filter_denominator == "all" else rows))
            old = None if old_log_probs is None else old_log_probs[rows]
            metrics, record = learner.step(take(batch, rows), old, sizes)
            metrics["selection/filtered_completion_fraction"] = filtered
            yield Update(rows, metrics, record if iteration == algo.num_iterations - 1 else None)
        if old_log_probs is None:  # one minibatch: its rows and record are all there is
            old_log_probs = join([(rows, record.old_log_probs)], batch.completion_mask)
