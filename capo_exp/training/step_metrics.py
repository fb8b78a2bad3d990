"""Metrics of a rollout and of an optimiser step. Pure; the loop logs what comes out. Meanings are in
runs/metrics.py."""

from collections.abc import Sequence
from math import log
from statistics import fmean

import torch
from torch import Tensor

from capo_exp.core.masked import masked_max, masked_mean, masked_quantile, share
from capo_exp.core.types import Gradient, RolloutGroup, StepRecord
from capo_exp.grading.compare import Grade


def gradient_metrics(gradient: Gradient) -> dict[str, float]:
    """Returns what is known of an optimiser step before it is taken."""
    return {"loss/total": gradient.loss, "policy/grad_norm": gradient.norm, **summarise(gradient.record)}


def summarise(record: StepRecord) -> dict[str, float]:
    """Makes statistics over the completion tokens of the whole step, the same however it was cut into
    micro-batches."""
    mask, output, selection = record.batch.completion_mask, record.output, record.selection
    reasons = dict.fromkeys(("policy", "objective"), torch.zeros_like(mask)) | selection.rejected_by
    ratio = (output.log_probs - record.old_log_probs).exp()
    metrics = {
        "loss/kl": masked_mean(record.kl, mask),
        "loss/clip_fraction": share(record.clipped, mask),
        "policy/entropy": masked_mean(output.entropy, mask),
        "policy/ratio_max": masked_max(ratio, mask),
        **_mismatch(record),
        "advantage/std": masked_mean(record.batch.advantages, mask, 1).std(correction=0),
        "selection/rejection_rate": share(mask & ~selection.keep_mask, mask),
        "selection/weight": masked_mean(selection.weighed(selection.keep_mask.to(ratio.dtype)), mask),
        **{f"selection/rejection_rate_{why}": share(rejected, mask) for why, rejected in reasons.items()},
        **_distribution("curvature/token/policy_shift", record.shifts.policy_shift, mask),
        **_distribution("curvature/token/objective_shift", record.shifts.objective_shift, mask),
        "curvature/token/objective_shift/min": -masked_max(-record.shifts.objective_shift, mask),
    }
    metrics["policy/sampler_kl_k3"] = metrics["mismatch/kl_k3"]
    return {name: value.item() for name, value in metrics.items()}


def merge_rounds(verdicts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Merges rounds of equal size: shares and terms are averaged, counts added."""
    return {
        name: (fmean if name.endswith(("_fraction", "/format", "/length")) else sum)(
            verdict[name] for verdict in verdicts
        )
        for name in verdicts[0]
    }


def rollout_metrics(
    groups: Sequence[RolloutGroup], rewards: Tensor, grades: Sequence[Sequence[Grade]]
) -> dict[str, float]:
    """Describes all completions that a rollout step sampled; rewards [P, G]. Pairs, which bring their rewards
    and no grades, have no accuracy."""
    completions = [completion for group in groups for completion in group.completions]
    correct = torch.tensor([[grade.correct for grade in group] for group in grades])
    return {
        **({"reward/accuracy": correct.float().mean().item()} if grades else {}),
        "rollout/completion_length/mean": fmean(len(completion.token_ids) for completion in completions),
        "rollout/truncated_fraction": fmean(completion.truncated for completion in completions),
        "advantage/zero_group_fraction": (rewards == rewards[:, :1]).all(1).float().mean().item(),
    }


def _mismatch(record: StepRecord) -> dict[str, Tensor]:
    """Says how far the sampler's log-probs are off, before and after the correction: of each token's ratio of
    learner to sampler, and of its weight. Where all weights are 1 nothing was corrected: both are the raw
    values."""
    mask, weights = record.batch.completion_mask, record.weights.double()  # in float32 k3 near 1 is rounding
    kept = mask & (weights > 0)
    raw = (record.old_log_probs - record.batch.sampler_log_probs).double()
    untouched = ((weights == 1) | ~mask).all()
    return {
        **_ratios("mismatch", raw, mask),
        **_ratios("mismatch/corrected", torch.where(untouched, raw, weights.log()), kept),
        "mismatch/dropped_fraction": share(mask & ~kept, mask),
    }


def _ratios(name: str, log_ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Describes ln ratios [B, T] nats, float64; NaN, where nobody sampled, stays NaN."""
    ratio = log_ratio.exp()
    beyond = torch.where(log_ratio.isnan(), log_ratio, (log_ratio.abs() > log(2)).double())
    return {
        f"{name}/kl_k1": masked_mean(-log_ratio, mask),
        f"{name}/kl_k3": masked_mean(log_ratio.expm1() - log_ratio, mask),
        f"{name}/ratio_max": masked_max(ratio, mask),
        f"{name}/beyond_2x_fraction": masked_mean(beyond, mask),
    }


def _distribution(name: str, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {
        f"{name}/mean": masked_mean(values, mask),
        f"{name}/p99": masked_quantile(values, mask, 0.99),
        f"{name}/max": masked_max(values, mask),
    }
