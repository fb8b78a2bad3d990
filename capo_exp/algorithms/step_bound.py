"""Bounds on the policy shift of the whole optimiser step, by shortening it: what CAPO's bounds are for,
without rejecting tokens. Ours; the line search is TRPO's (arXiv 1502.05477, appendix C).

The shift is the mean KL(policy before || after) [nats a token] over a sample of the step's completion tokens.
It grows with the square of the step, so a step that moves the policy by k times the bound is shortened to
sqrt(1 / k).
"""

from math import sqrt

from jaxtyping import Float
from torch import Tensor

from capo_exp.algorithms.kinds import Count, PositiveOrInf, Share
from capo_exp.core.step import StepDecision, StepTrial
from capo_exp.core.types import StepRecord

SHORT_OF = 0.95
"""Share of the way to the bound that a search aims at, so that the next look need not find it just above."""


def measured(
    trial: StepTrial, *, policy_shift_max: PositiveOrInf, completions: Count, tokens: Count, max_looks: Count
) -> StepDecision:
    """Shortens the step until the measured shift [nats a token] is within the bound. Each look, of max_looks
    at most, is a forward pass over the completions; after the last one its scale is taken all the same."""
    trial.take(completions=completions, tokens=tokens)
    step_scale, shift = _search(trial, 1.0, policy_shift_max, max_looks)
    return StepDecision(step_scale, metrics={"step/policy_shift_measured": shift})


def predicted(
    trial: StepTrial, *, policy_shift_max: PositiveOrInf, completions: Count, tokens: Count
) -> StepDecision:
    """Shortens the step until the shift [nats a token] that the last layer alone would make, a small share of
    the whole, is within the bound; no forward pass."""
    trial.take(completions=completions, tokens=tokens)
    whole = trial.last_layer(1.0)
    step_scale = _shorten(whole, policy_shift_max)
    return StepDecision(step_scale, metrics={"step/policy_shift_predicted": whole * step_scale**2})


def calibrated(
    trial: StepTrial,
    *,
    policy_shift_max: PositiveOrInf,
    completions: Count,
    tokens: Count,
    every: Count,
    memory_share: Share,
    max_looks: Count,
) -> StepDecision:
    """Does as `predicted`, with the prediction multiplied by how much more the whole model moved when it was
    last measured. Every `every`-th step is measured, and shortened as by `measured`; until a ratio is known,
    every step. memory_share is the weight of the old ratio in the geometric mean with the new; 0 = none."""
    memory = trial.proposed.memory
    since, ratio = memory.get("since", 0.0), memory.get("ratio")
    due = ratio is None or since >= every
    trial.take(completions=completions, tokens=tokens)
    whole = trial.last_layer(1.0)
    step_scale = 1.0 if ratio is None else _shorten(ratio * whole, policy_shift_max)
    metrics: dict[str, float] = {}
    if due:
        step_scale, shift = _search(trial, step_scale, policy_shift_max, max_looks)
        metrics["step/policy_shift_measured"] = shift
        alone = trial.last_layer(step_scale)
        seen = shift / alone if alone > 0 else 0.0
        if seen > 0:
            ratio = seen if ratio is None else ratio**memory_share * seen ** (1 - memory_share)
    if ratio is not None:
        metrics |= {"step/ratio": ratio, "step/policy_shift_predicted": ratio * whole * step_scale**2}
    kept = {} if ratio is None else {"ratio": ratio}
    return StepDecision(step_scale, {**kept, "since": 1.0 if due else since + 1.0}, metrics)


def evidence(
    trial: StepTrial, *, share: PositiveOrInf, completions: Count, tokens: Count, memory_share: Share
) -> StepDecision:
    """Shortens the step until it moves the policy by no more nats than `share` times what the step's rewards
    say (`reward_evidence`); where all rewards of every prompt are alike, no step is taken.

    The last layer's prediction for all tokens, times how much more the model has moved so far, says how
    short; one forward pass over a few completions shortens the step further where it finds more than that.
    memory_share is the weight of the old ratio in the geometric mean with the new; 0 = the last one alone.
    """
    said, memory = reward_evidence(trial.proposed.record), dict(trial.proposed.memory)
    if said == 0:
        return StepDecision(0.0, memory, {"step/policy_shift_bound": 0.0})
    bound = share * said
    predicted, ratio = trial.proposed.predicted.policy_shift, memory.get("ratio")
    step_scale = 1.0 if ratio is None else _shorten(ratio * predicted, bound)
    trial.take(completions=completions, tokens=tokens, step_scale=step_scale)
    seen = trial.measured(step_scale)
    if ratio is None and seen > bound:  # of the whole step; the ratio is wanted at one that may be taken
        step_scale = _shorten(seen, bound)
        seen = trial.measured(step_scale)
    metrics = {"step/policy_shift_bound": bound}
    expected = predicted * step_scale**2
    if seen > 0 and expected > 0:
        now = seen / expected
        ratio = now if ratio is None else ratio**memory_share * now ** (1 - memory_share)
        memory["ratio"] = metrics["step/ratio"] = ratio
    shorter = _shorten(seen, bound)
    metrics["step/policy_shift_measured"] = seen * shorter**2
    return StepDecision(step_scale * shorter, memory, metrics)


def reward_evidence(record: StepRecord) -> float:
    """Returns what the rewards of a step say about its completions, in nats a token: the mean surprisal of a
    completion's reward by the mean length of a completion, which is the entropy of the rewards within their
    prompts where the step has all of them. What the correction dropped whole says nothing."""
    kept = record.weights.any(1)
    tokens = record.batch.completion_mask[kept].sum()
    return (record.batch.surprisal[kept].sum() / tokens.clamp(min=1)).item()


def reward_surprisal(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Returns -ln of the share of a prompt's completions that have this one's reward, in nats; of all
    completions where a prompt has but one."""
    prompts = rewards.view(1, -1) if rewards.shape[1] == 1 else rewards
    same = prompts[:, :, None] == prompts[:, None, :]
    return -same.float().mean(2).log().view(rewards.shape)


def _search(trial: StepTrial, step_scale: float, bound: float, max_looks: int) -> tuple[float, float]:
    """Returns the step_scale and its measured shift."""
    shift = trial.measured(step_scale)
    for _ in range(max_looks - 1):
        if shift <= bound:
            break
        step_scale *= min(SHORT_OF, SHORT_OF * sqrt(bound / shift))
        shift = trial.measured(step_scale)
    return step_scale, shift


def _shorten(shift: float, bound: float) -> float:
    """One that is not a number shortens nothing; it ends the run by itself."""
    return sqrt(bound / shift) if shift > bound else 1.0
