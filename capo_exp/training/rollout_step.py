"""One rollout step: prompts -> completions -> rewards -> credit -> optimiser steps over the batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from capo_exp.algorithms.kl import kl_k1
from capo_exp.algorithms.protocols import Algorithm
from capo_exp.config.schema import TrainConfig
from capo_exp.core.batch import collate, join, minibatches, take, totals
from capo_exp.core.seeds import MINIBATCH, ORDER, ROLLOUT, derive_seed
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import (
    Batch,
    Prompt,
    RolloutGroup,
    StepInput,
    StepRecord,
)
from capo_exp.data.prompts import choose_visits
from capo_exp.distributed.world import SINGLE, World
from capo_exp.grading.compare import Grade
from capo_exp.grading.terms import RewardTerms, measure_terms
from capo_exp.grading.verifier import RewardResult, Verifier
from capo_exp.rollout import RolloutEngine, SamplingRequest
from capo_exp.rollout.dealt import sample
from capo_exp.training.learner import Learner
from capo_exp.training.optimizer_step import take_optimizer_step
from capo_exp.training.step_metrics import merge_rounds, rollout_metrics


@dataclass(frozen=True)
class Sampler:
    """Where completions and their rewards come from."""

    engine: RolloutEngine
    resting: RolloutEngine
    """Gives its memory back while the learner works: the engine itself, or the one of evaluations where
    completions are demonstrations."""
    verifier: Verifier
    prompts: Sequence[Prompt]
    terms: RewardTerms
    world: World = SINGLE
    """The processes that share out the sampling; the first one grades, so that a time limit means the same to
    all."""


@dataclass(frozen=True)
class Rollout:
    """The groups that a rollout step trains on, and what it took to get them."""

    groups: list[RolloutGroup]
    rewards: Tensor  # [P, G] total: the verifier's and the terms'
    rewarded: bool  # Whether any completion, one of a filtered group too, has a reward other than 0
    prompts: int  # Prompts drawn from the data
    completions: int  # Completions sampled, those of filtered groups too
    tokens: int  # Tokens sampled
    metrics: dict[str, float]


@dataclass(frozen=True)
class Update:
    """One optimiser step."""

    rows: Tensor  # [b] rows of the batch that it saw
    metrics: dict[str, float]
    record: StepRecord | None  # What it saw; only of the last pass, for a batch's hidden states are large


@dataclass(frozen=True)
class RolloutStep:
    """One rollout step, done."""

    rollout: Rollout
    batch: Batch
    updates: list[Update]
    metrics: dict[str, float]  # What all its updates share


def take_rollout_step(
    learner: Learner, sampler: Sampler, *, step: int, first: int, pad_token_id: int
) -> RolloutStep:
    """Samples fresh completions, then takes the optimiser steps over them.

    `step` counts from 1, `first` the prompts drawn before it.
    """
    watch = Stopwatch()
    with watch("total"):
        rollout = sample_rollout(
            learner.config, learner.algorithm, sampler,
            step=step, first=first, weight_version=learner.optimizer_step, watch=watch,
        )  # fmt: skip
        sampler.resting.rest()
        with watch("credit"):
            batch, credit_metrics = assign_credit(rollout, learner, pad_token_id=pad_token_id)
        updates = list(take_updates(learner, batch, step=step))
    clock = {f"time/{name}_seconds": value for name, value in watch.seconds.items()}
    clock["time/tokens_per_second"] = rollout.tokens / watch.seconds["total"]
    return RolloutStep(rollout, batch, updates, rollout.metrics | credit_metrics | clock)


def sample_rollout(
    config: TrainConfig,
    algorithm: Algorithm,
    sampler: Sampler,
    *,
    step: int,
    first: int,
    weight_version: int,
    watch: Stopwatch,
) -> Rollout:
    """Samples and scores prompts_per_step groups; again, up to max_sampling_rounds times, while too few pass
    the group filter. If fewer pass to the end the step trains on those; if none, on the last round's.
    """
    wanted = config.regime.prompts_per_step
    seen: list[RolloutGroup] = []
    passed: list[RolloutGroup] = []
    passed_rewards: list[Tensor] = []
    all_rewards: list[Tensor] = []
    grades: list[list[Grade]] = []
    verdicts: list[dict[str, float]] = []
    for number in range(algorithm.max_sampling_rounds):
        with watch("rollout"):
            groups = _generate(config, sampler, step, number, first + number * wanted, weight_version)
        with watch("reward"):
            result = sampler.world.first(partial(_grade, sampler.verifier, groups))
            completions = [one for group in groups for one in group.completions]
            measured = measure_terms(sampler.terms, [(one.text, len(one.token_ids)) for one in completions])
        rewards = torch.tensor(result.rewards)
        keep = algorithm.group_filter(rewards)
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
    metrics = rollout_metrics(seen, every, grades) | merge_rounds(verdicts)
    metrics |= {"rollout/sampling_rounds": float(len(verdicts)), "rollout/filtered_group_fraction": filtered}
    return Rollout(used, used_rewards, bool(every.any()), len(seen), len(lengths), sum(lengths), metrics)


def assign_credit(rollout: Rollout, learner: Learner, *, pad_token_id: int) -> tuple[Batch, dict[str, float]]:
    """Makes the batch: rewards shaped, turned into advantages, spread over tokens; returns metrics, too."""
    algorithm = learner.algorithm
    batch = collate(rollout.groups, pad_token_id=pad_token_id, device=learner.model.device)
    mask, shape, kl = batch.completion_mask, rollout.rewards.shape, torch.zeros_like(batch.advantages)
    if algorithm.uses_reward_kl:
        own = learner.log_probs(batch)
        kl = kl_k1(own, learner.reference_log_probs(batch, own))
    sums = [values.sum(1).float().view(shape) for values in (mask, kl)]
    shaped = algorithm.shaping(rollout.rewards.to(mask.device), *sums)
    advantages = algorithm.advantage(shaped)
    batch = replace(batch, advantages=algorithm.credit(advantages.reshape(-1), mask, kl))
    return batch, {"reward/mean": shaped.mean().item()}


def take_updates(learner: Learner, batch: Batch, *, step: int) -> Iterator[Update]:
    """Takes num_iterations passes of num_minibatches optimiser steps over what the completion filter leaves.

    The old log-probs are those of the weights that sampled: of the first update's own forward pass, or, where
    the first pass has several minibatches, of one more before it.
    `step`, the rollout step, decides how minibatches are drawn.
    """
    algorithm = learner.algorithm
    kept = algorithm.completion_filter(batch)
    filtered = 1 - kept.float().mean().item()
    assert kept.any(), "a completion filter has to leave something"
    stored: Tensor | None = None
    if algorithm.num_minibatches > 1:
        seen = kept.nonzero().squeeze(1)
        stored = join([(seen, learner.log_probs(take(batch, seen)))], batch.completion_mask)
    for iteration in range(algorithm.num_iterations):
        seed = derive_seed(learner.config.seed, MINIBATCH, step, iteration)
        for part in minibatches(len(kept), algorithm.num_minibatches, seed):
            rows = part[kept[part].cpu()]
            if not len(rows):
                continue
            sizes = totals(take(batch, part if algorithm.filter_denominator == "all" else rows))
            given = StepInput(take(batch, rows), sizes, None if stored is None else stored[rows])
            metrics, record = take_optimizer_step(learner, given)
            metrics["selection/filtered_completion_fraction"] = filtered
            if stored is None:  # one minibatch: its rows and record are all there is
                stored = join([(rows, record.old_log_probs)], batch.completion_mask)
            yield Update(rows, metrics, record if iteration == algorithm.num_iterations - 1 else None)


def _generate(
    config: TrainConfig, sampler: Sampler, step: int, number: int, first: int, weight_version: int
) -> list[RolloutGroup]:
    """Samples one round: all its prompts in one call, or micro-batch by micro-batch, in whichever process."""
    regime = config.regime
    order = derive_seed(config.seed, ORDER, 0)
    indices = choose_visits(len(sampler.prompts), first=first, count=regime.prompts_per_step, seed=order)
    prompts = [sampler.prompts[i] for i in indices]
    size = len(prompts)
    if config.rollout.chunking == "per_micro_batch":
        size = max(1, config.model.micro_batch_size // regime.group_size)
    chunks = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    requests = [
        SamplingRequest(
            chunk,
            group_size=regime.group_size,
            max_tokens=config.dataset.max_completion_tokens,
            temperature=config.rollout.temperature,
            top_k=config.rollout.top_k,
            top_p=config.rollout.top_p,
            seed=derive_seed(config.seed, ROLLOUT, step, number * len(chunks) + position),
            weight_version=weight_version,
        )
        for position, chunk in enumerate(chunks)
    ]
    return sample(sampler.engine, requests, sampler.world)


def _grade(verifier: Verifier, groups: Sequence[RolloutGroup]) -> RewardResult:
    texts = [[completion.text for completion in group.completions] for group in groups]
    asked = [group.prompt.problem for group in groups]
    return verifier.score(texts, [each.golds for each in asked], [each.problem for each in asked])


def total_reward(rewards: Tensor, measured: Mapping[str, Sequence[float]], terms: RewardTerms) -> Tensor:
    """Returns the verifier's rewards [P, G] + weight x term; `measured` has P * G numbers of each term that
    is on."""
    weights = {"reward/format": terms.format_weight, "reward/length": terms.length_weight}
    for key, values in measured.items():
        if weights[key]:  # else not even a rounding
            rewards = rewards + weights[key] * torch.tensor(values).view(rewards.shape)
    return rewards
