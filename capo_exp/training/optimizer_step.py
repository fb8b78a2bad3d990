"""One optimiser step with the instruments that look at it."""

from math import isfinite

from capo_exp.config.errors import RunFailed
from capo_exp.core.batch import totals
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import Batch, StepInput, StepRecord, own_log_probs
from capo_exp.training.instruments import look_after, look_before
from capo_exp.training.learner import Learner
from capo_exp.training.step_metrics import gradient_metrics


class TrainingDiverged(RunFailed):
    """A loss or gradient that is not finite; the weights are those before the step."""


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
    before = look_before(learner, gradient, watch)
    metrics |= learner.apply(gradient, watch)
    metrics |= look_after(learner, before, metrics["curvature/batch/policy_shift"], watch)
    return metrics | {f"time/{name}_seconds": value for name, value in watch.seconds.items()}, gradient.record


def step_once(learner: Learner, batch: Batch) -> tuple[dict[str, float], StepRecord]:
    """Takes the first and only optimiser step on a batch, all of whose rows count."""
    return take_optimizer_step(learner, StepInput(batch, totals(batch), own_log_probs))
