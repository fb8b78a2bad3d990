"""StepRecord -> metrics of the step. Pure; train.py logs what comes out. Meanings are in metric_names.py."""

from torch import Tensor

from capo_exp.masked import masked_max, masked_mean, masked_quantile, share
from capo_exp.types import StepRecord

_REASONS = ("policy", "objective")


def summarise(record: StepRecord) -> dict[str, float]:
    """Statistics over the completion tokens of the whole step, the same however it was cut into
    micro-batches."""
    mask, output = record.batch.completion_mask, record.output
    selection = record.selection
    none = mask.new_zeros(mask.shape)
    ratio = (output.log_probs - record.old_log_probs).exp()
    metrics = {
        "loss/kl": masked_mean(record.kl, mask),
        "loss/clip_fraction": share(record.clipped, mask),
        "policy/entropy": masked_mean(output.entropy, mask),
        "policy/ratio_max": masked_max(ratio, mask),
        "policy/sampler_kl_k3": masked_mean(sampler_kl_k3(record), mask),
        "advantage/std": masked_mean(record.batch.advantages, mask, 1).std(correction=0),
        "selection/rejection_rate": share(mask & ~selection.keep_mask, mask),
        **{
            f"selection/rejection_rate_{why}": share(rejected, mask)
            for why, rejected in {**dict.fromkeys(_REASONS, none), **selection.rejected_by}.items()
        },
        **_distribution("curvature/token/policy_shift", record.shifts.policy_shift, mask),
        **_distribution("curvature/token/objective_shift", record.shifts.objective_shift, mask),
        "curvature/token/objective_shift/min": -masked_max(-record.shifts.objective_shift, mask),
    }
    return {name: value.item() for name, value in metrics.items()}


def sampler_kl_k3(record: StepRecord) -> Tensor:
    """k3 estimate of KL(sampler || policy at sampling) per token [B, T] nats: how far the engine's log-probs
    are off."""
    difference = record.old_log_probs - record.batch.sampler_log_probs
    return difference.exp() - 1 - difference


def _distribution(name: str, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {
        f"{name}/mean": masked_mean(values, mask),
        f"{name}/p99": masked_quantile(values, mask, 0.99),
        f"{name}/max": masked_max(values, mask),
    }
