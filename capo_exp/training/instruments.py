"""Instruments that look at an optimiser step from outside, where they are due: what they need is taken before
the step, what they say comes after it. Training never notices them."""

from dataclasses import dataclass

from capo_exp.core.seeds import CALIBRATION, DIAGNOSIS, derive_seed
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import Gradient, Selection
from capo_exp.curvature.calibration import (
    SampleSize,
    TokenSample,
    calibration_metrics,
    policy_move,
    sample_tokens,
)
from capo_exp.curvature.diagnosis import (
    COMPARED,
    Effect,
    Metrics,
    StepVector,
    changes_the_step,
    class_metrics,
    comparison_metrics,
    effect_metrics,
    gradients_aside,
    imagined_step,
)
from capo_exp.training.learner import Learner


@dataclass(frozen=True)
class Diagnosis:
    """What a diagnosis needs from before the step."""

    sample: TokenSample
    metrics: Metrics  # What is known already
    unmasked: Effect | None  # Of the same step with every token kept; None where it is the step itself


@dataclass(frozen=True)
class Before:
    """What the instruments took before an optimiser step; None from those that are not due."""

    gradient: Gradient
    diagnosis: Diagnosis | None
    calibration: TokenSample | None


def look_before(learner: Learner, gradient: Gradient, watch: Stopwatch) -> Before:
    """Takes what is due; call it between `learner.backward` and `learner.apply`."""
    numbers = learner.config.curvature
    diagnosis, calibration = None, None
    if _due(learner, numbers.diagnose_every):
        with watch("diagnosis"):
            diagnosis = _begin_diagnosis(learner, gradient)
    if _due(learner, numbers.calibrate_every):
        with watch("calibration"):
            calibration = _sample(learner, gradient, CALIBRATION)
    return Before(gradient, diagnosis, calibration)


def look_after(learner: Learner, before: Before, predicted: float, watch: Stopwatch) -> Metrics:
    """Measures what the step did; call it after `learner.apply`. `predicted` is the policy shift [nats] of
    the whole step by the optimiser model."""
    metrics: Metrics = {}
    if before.calibration is not None:
        with watch("calibration"):
            sample = before.calibration
            metrics |= calibration_metrics(learner.model, sample, learner.settings, predicted=predicted)
    if before.diagnosis is not None:
        with watch("diagnosis"):
            begun, record = before.diagnosis, before.gradient.record
            real = _measure_effect(learner, before.gradient, begun.sample)
            metrics |= begun.metrics | effect_metrics(record, real)
            metrics |= effect_metrics(record, begun.unmasked or real, "_unmasked")
    return metrics


def _begin_diagnosis(learner: Learner, gradient: Gradient) -> Diagnosis:
    record, sample = gradient.record, _sample(learner, gradient, DIAGNOSIS)
    moments = learner.moments(gradient.given.totals)
    classes = class_metrics(record, learning_rate=learner.learning_rate, moments=moments)
    if not changes_the_step(record.selection, record.batch.completion_mask):
        return Diagnosis(sample, classes | dict.fromkeys(COMPARED, 1.0), unmasked=None)
    compared, effect = _imagine_unmasked(learner, gradient, sample)
    return Diagnosis(sample, classes | compared, effect)


def _imagine_unmasked(learner: Learner, gradient: Gradient, sample: TokenSample) -> tuple[Metrics, Effect]:
    """Compares the step with the same step with every token kept, which is taken and undone; the model, its
    gradients and the optimiser stay as they are."""
    model, optimizer = learner.model, learner.optimizer
    everything = Selection(gradient.given.batch.completion_mask)
    with imagined_step(model, optimizer) as update:
        pass
    with gradients_aside(model) as gradients:
        unmasked = learner.backward_selected(gradient.given, everything, Stopwatch())
        unmasked_gradients = [parameter.grad for parameter in model.parameters()]
        with imagined_step(model, optimizer) as unmasked_update:
            effect = _measure_effect(learner, gradient, sample)
    real = StepVector(gradients, gradient.norm, update)
    return comparison_metrics(real, StepVector(unmasked_gradients, unmasked.norm, unmasked_update)), effect


def _measure_effect(learner: Learner, gradient: Gradient, sample: TokenSample) -> Effect:
    """Looks at the policy as it is now."""
    shift = policy_move(learner.model, sample, learner.settings)
    return Effect(learner.log_probs(gradient.given.batch), shift)


def _sample(learner: Learner, gradient: Gradient, stream: int) -> TokenSample:
    """Draws a sample of the step's tokens as they are now."""
    numbers = learner.config.curvature
    size = SampleSize(numbers.calibrate_completions, numbers.calibrate_tokens)
    seed = derive_seed(learner.config.seed, stream, learner.optimizer_step)
    return sample_tokens(learner.model, gradient.record, size, learner.settings, seed=seed)


def _due(learner: Learner, every: int) -> bool:
    """Returns whether this optimiser step is an `every`-th; 0 = never."""
    return every > 0 and (learner.optimizer_step + 1) % every == 0
