"""One optimiser step with the instruments that look at it."""

from math import isfinite

import torch

from capo_exp.config.errors import RunFailed
from capo_exp.core.batch import CutSize, padding_share
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import StepInput, StepRecord
from capo_exp.training.instruments import look_after, look_before
from capo_exp.training.learner import Learner
from capo_exp.training.step_metrics import gradient_metrics

DECIDED = ("optim/step_scale", "step/policy_shift_measured", "step/policy_shift_predicted")


class TrainingDiverged(RunFailed):
    """A loss, a gradient or a decided shift that is not finite; of that step nothing is saved."""


def take_optimizer_step(learner: Learner, given: StepInput) -> tuple[dict[str, float], StepRecord]:
    """Makes the gradient and takes the step, between the looks of the instruments that are due.

    Returns:
        The step's metrics, and what it saw of each token.

    Raises:
        TrainingDiverged: if the loss or the gradient norm is not finite. The optimiser has not stepped then.
    """
    watch = Stopwatch()
    gradient = learner.backward(given, watch)
    metrics = gradient_metrics(gradient)
    if not (isfinite(gradient.loss) and isfinite(gradient.norm)):
        learner.optimizer.zero_grad(set_to_none=True)
        found = {"loss/total": gradient.loss, "policy/grad_norm": gradient.norm}
        bad = ", ".join(f"{name}={value}" for name, value in found.items() if not isfinite(value))
        raise TrainingDiverged(f"optimizer step {learner.optimizer_step + 1}: not finite: {bad}")
    _check_rate(learner)
    before = look_before(learner, gradient, watch)
    metrics |= learner.apply(gradient, watch)
    bad = [f"{name}={value}" for name, value in metrics.items() if name in DECIDED and not isfinite(value)]
    if bad:
        raise TrainingDiverged(f"optimizer step {learner.optimizer_step}: not finite: {', '.join(bad)}")
    metrics |= look_after(learner, before, metrics["curvature/batch/policy_shift"], watch)
    metrics["time/padding_fraction"] = padding_share(given.batch, CutSize.of(learner.config.model))
    return metrics | {f"time/{name}_seconds": value for name, value in watch.seconds.items()}, gradient.record


def _check_rate(learner: Learner) -> None:
    """Raises TrainingDiverged for a rate whose step float32 cannot hold, where torch raises a
    RuntimeError."""
    for group in learner.optimizer.param_groups:
        factor = max(1 / (1 - group["betas"][0]), group["weight_decay"])
        if not group["lr"] * factor <= torch.finfo(torch.float32).max:
            number = learner.optimizer_step + 1
            raise TrainingDiverged(f"optimizer step {number}: not finite: a step at rate {group['lr']:g}")
