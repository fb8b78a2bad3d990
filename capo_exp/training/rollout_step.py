"""The first half of a rollout step: prompts -> completions -> rewards -> credit, as one batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch import Tensor

from capo_exp.algorithms.protocols import Algorithm
from capo_exp.config.schema import TrainConfig
from capo_exp.core.batch import collate
from capo_exp.core.seeds import ORDER, ROLLOUT, derive_seed
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import Batch, Prompt, RolloutGroup
from capo_exp.data.prompts import choose_visits
from capo_exp.grading.compare import Grade
from capo_exp.grading.terms import RewardTerms, measure_terms
from capo_exp.grading.verifier import RewardResult, Verifier
from capo_exp.rollout import RolloutEngine, SamplingRequest
from capo_exp.training.learner import Learner


@dataclass(frozen=True)
class Sampler:
    """What sampling needs and no step changes."""

    config: TrainConfig
    algorithm: Algorithm
    engine: RolloutEngine
    verifier: Verifier
    prompts: Sequence[Prompt]
    terms: RewardTerms = field(default_factory=RewardTerms)


@dataclass(frozen=True)
class Sample:
    """The groups that a rollout step trains on, and what it took to get them."""

    groups: list[RolloutGroup]
    rewards: Tensor
    """[P, G] total: the verifier's and the terms'."""
    rewarded: bool
    """Whether any completion, one of a filtered group too, has a reward other than 0."""
    prompts: int
    """Prompts drawn from the data."""
    completions: int
    """Completions sampled, those of filtered groups too."""
    tokens: int
    """Tokens sampled."""
    metrics: dict[str, float]


def sample(sampler: Sampler, *, step: int, first: int, weight_version: int, watch: Stopwatch) -> Sample:
    """Samples and scores prompts_per_step groups; again, up to max_sampling_rounds times, while too few pass
    the group filter. If fewer pass to the end the step trains on those; if none, on the last round's.

    Args:
        sampler: the parts.
        step: rollout step, counted from 1.
        first: prompts drawn before this step.
        weight_version: of the weights that sample.
        watch: takes the time of sampling and of verification.
    """
    config, wanted = sampler.config, sampler.config.regime.prompts_per_step
    seen: list[RolloutGroup] = []
    passed: list[RolloutGroup] = []
    passed_rewards: list[Tensor] = []
    all_rewards: list[Tensor] = []
    grades: list[list[Grade]] = []
    verdicts: list[dict[str, float]] = []
    for number in range(config.algo.max_sampling_rounds):
        with watch("rollout"):
            groups = _generate(sampler, step, number, first + number * wanted, weight_version)
        with watch("reward"):
            result = _score(sampler.verifier, groups)
            measured = _measure(sampler.terms, groups)
        rewards = torch.tensor(result.rewards)
        keep = sampler.algorithm.group_filter(rewards)
        rewards = total_reward(rewards, measured, sampler.terms)
        seen += groups
        passed += [group for group, kept in zip(groups, keep.tolist(), strict=True) if kept]
        passed_rewards.append(rewards[keep])
        all_rewards.append(rewards)
        grades += result.grades
        verdicts.append(result.metrics | {key: fmean(values) for key, values in measured.items()})
        if len(passed) >= wanted:
            break
    every = torch.cat(all_rewards)
    filtered = 1 - len(passed) / len(seen)
    if passed:
        used, used_rewards = passed[:wanted], torch.cat(passed_rewards)[:wanted]
    else:
        used, used_rewards = seen[-wanted:], every[-wanted:]
    lengths = [len(completion.token_ids) for group in seen for completion in group.completions]
    metrics = _rollout_metrics(seen, every, grades) | _merge(verdicts)
    metrics |= {"rollout/sampling_rounds": float(len(verdicts)), "rollout/filtered_group_fraction": filtered}
    return Sample(used, used_rewards, bool(every.any()), len(seen), len(lengths), sum(lengths), metrics)


def credited(
    sample: Sample, algorithm: Algorithm, learner: Learner, *, pad_token_id: int
) -> tuple[Batch, dict[str, float]]:
    """The sample as a batch: rewards shaped, turned into advantages, spread over tokens; and its metrics."""
    batch = collate(sample.groups, pad_token_id=pad_token_id, device=learner.model.device)
    mask, shape = batch.completion_mask, sample.rewards.shape
    kl = learner.kl_to_reference(batch) if algorithm.kl_in_reward else torch.zeros_like(batch.advantages)
    sums = [values.sum(1).float().view(shape) for values in (mask, kl)]
    shaped = algorithm.shaping(sample.rewards.to(mask.device), *sums)
    advantages = algorithm.advantage(shaped)
    credited_batch = replace(batch, advantages=algorithm.credit(advantages.reshape(-1), mask, kl))
    return credited_batch, {"reward/mean": shaped.mean().item()}


def _generate(
    sampler: Sampler, step: int, number: int, first: int, weight_version: int
) -> list[RolloutGroup]:
    """One round: all its prompts in one call, or micro-batch by micro-batch."""
    config = sampler.config
    regime = config.regime
    order = derive_seed(config.seed, ORDER, 0)
    indices = choose_visits(len(sampler.prompts), first=first, count=regime.prompts_per_step, seed=order)
    prompts = [sampler.prompts[i] for i in indices]
    size = len(prompts)
    if config.rollout.chunking == "per_micro_batch":
        size = max(1, config.model.micro_batch_size // regime.group_size)
    chunks = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    groups: list[RolloutGroup] = []
    for position, chunk in enumerate(chunks):
        request = SamplingRequest(
            chunk,
            group_size=regime.group_size,
            max_tokens=config.dataset.max_completion_tokens,
            temperature=config.rollout.temperature,
            top_k=config.rollout.top_k,
            top_p=config.rollout.top_p,
            seed=derive_seed(config.seed, ROLLOUT, step, number * len(chunks) + position),
            weight_version=weight_version,
        )
        groups += sampler.engine.generate(request)
    return groups


def _score(verifier: Verifier, groups: Sequence[RolloutGroup]) -> RewardResult:
    texts = [[completion.text for completion in group.completions] for group in groups]
    return verifier.score(texts, [group.prompt.problem.golds for group in groups])


def _measure(terms: RewardTerms, groups: Sequence[RolloutGroup]) -> dict[str, list[float]]:
    return measure_terms(
        terms, [(one.text, len(one.token_ids)) for group in groups for one in group.completions]
    )


def total_reward(rewards: Tensor, measured: Mapping[str, Sequence[float]], terms: RewardTerms) -> Tensor:
    """The verifier's rewards [P, G] + weight x term; `measured` has P * G numbers of each term that is on."""
    weights = {"reward/format": terms.format_weight, "reward/length": terms.length_weight}
    for key, values in measured.items():
        if weights[key]:  # else not even a rounding
            rewards = rewards + weights[key] * torch.tensor(values).view(rewards.shape)
    return rewards


def _merge(verdicts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Rounds are of equal size: shares and terms are averaged, counts added."""
    return {
        name: (fmean if name.endswith(("_fraction", "/format", "/length")) else sum)(
            verdict[name] for verdict in verdicts
        )
        for name in verdicts[0]
    }


def _rollout_metrics(
    groups: Sequence[RolloutGroup], rewards: Tensor, grades: Sequence[Sequence[Grade]]
) -> dict[str, float]:
    completions = [completion for group in groups for completion in group.completions]
    correct = torch.tensor([[grade.correct for grade in group] for group in grades])
    return {
        "reward/accuracy": correct.float().mean().item(),
        "rollout/completion_length/mean": fmean(len(completion.token_ids) for completion in completions),
        "rollout/truncated_fraction": fmean(completion.truncated for completion in completions),
        "advantage/zero_group_fraction": (rewards == rewards[:, :1]).all(1).float().mean().item(),
    }
