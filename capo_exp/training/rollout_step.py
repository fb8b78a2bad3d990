"""One rollout step: prompts -> completions -> rewards -> credit -> optimiser steps over the batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from capo_exp.algorithms.kl import kl_k1
from capo_exp.algorithms.protocols import Algorithm
from capo_exp.algorithms.step_bound import reward_surprisal
from capo_exp.config.declare import asked
from capo_exp.config.schema import TrainConfig
from capo_exp.core.batch import collate, join, minibatches, narrow, take, totals
from capo_exp.core.seeds import MINIBATCH, ORDER, ROLLOUT, derive_seed
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import Batch, RolloutGroup, StepInput, StepRecord, UnfinishedGroup
from capo_exp.data.prompts import choose_visits
from capo_exp.training.budget import draw_within_budget
from capo_exp.training.learner import Learner
from capo_exp.training.optimizer_step import take_optimizer_step
from capo_exp.training.returned import as_tensor, check_any, check_finite
from capo_exp.training.sampler import Drawn, Sampler, draw, value_states
from capo_exp.training.step_metrics import merge_rounds, rollout_metrics

Offers = dict[str, Any]


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
    offers: Offers = field(default_factory=dict[str, Any])  # What parts may ask for: config.declare.OFFERS
    unfinished: Sequence[UnfinishedGroup] = ()  # What the next step goes on with


@dataclass(frozen=True)
class Update:
    """One optimiser step."""

    rows: Tensor  # [b] rows of the batch that it saw
    metrics: dict[str, float]
    record: StepRecord | None  # What it saw, without a K or an H; only of the last pass


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
    the group filter. If fewer pass to the end the step trains on those; if none, on the last round's. With
    algo.rollout_tokens there are as many groups as a budget of tokens ends.
    """
    wanted = config.regime.prompts_per_step
    seen: list[RolloutGroup] = []
    passed: list[RolloutGroup] = []
    passed_rewards: list[Tensor] = []
    rounds: list[Drawn] = []
    order = derive_seed(config.seed, ORDER, 0)
    for number in range(algorithm.max_sampling_rounds):
        start = first + number * wanted
        if algorithm.rollout_tokens is not None:
            drawn = draw_within_budget(
                config, algorithm, sampler, step=step, first=start, weight_version=weight_version, watch=watch
            )
        else:
            visits = choose_visits(len(sampler.prompts), first=start, count=wanted, seed=order)
            drawn = draw(
                config, sampler, [sampler.prompts[i] for i in visits], group_size=config.regime.group_size,
                seed=(ROLLOUT, step, number), weight_version=weight_version, watch=watch,
            )  # fmt: skip
        offers = asked(algorithm.group_filter, _offer(drawn.groups, sampler))
        keep = algorithm.group_filter(drawn.verdicts, **offers)
        groups = [len(drawn.groups)]
        as_tensor(keep, "P", groups, "algo.group_filter", algorithm.group_filter, dtype=torch.bool)
        rounds.append(drawn)
        seen += drawn.groups
        passed += [group for group, kept in zip(drawn.groups, keep.tolist(), strict=True) if kept]
        passed_rewards.append(drawn.rewards[keep])
        if len(passed) >= wanted:
            break
    every = torch.cat([drawn.rewards for drawn in rounds])
    filtered = 1 - len(passed) / len(seen)
    if passed:
        used, used_rewards = passed[:wanted], torch.cat(passed_rewards)[:wanted]
    else:
        used, used_rewards = seen[-wanted:], every[-wanted:]
    grades = [row for drawn in rounds for row in drawn.grades]
    metrics = rollout_metrics(seen, every, grades) | merge_rounds([drawn.metrics for drawn in rounds])
    metrics |= {"rollout/sampling_rounds": float(len(rounds)), "rollout/filtered_group_fraction": filtered}
    prompts, unfinished = sum(drawn.prompts for drawn in rounds), rounds[-1].unfinished
    values = None
    if algorithm.continuations:
        values, drawn = value_states(
            config, algorithm, sampler, used, step=step, weight_version=weight_version, watch=watch
        )
        rounds.append(drawn)
        metrics["rollout/states"] = float(len(drawn.groups))
        metrics["reward/state_value"] = drawn.rewards.mean().item()
    return Rollout(
        groups=used,
        rewards=used_rewards,
        rewarded=bool(every.any()),
        prompts=prompts,
        completions=sum(drawn.completions for drawn in rounds),
        tokens=sum(drawn.tokens for drawn in rounds),
        metrics=metrics,
        offers=_offer(used, sampler, values),
        unfinished=unfinished,
    )


def _offer(groups: Sequence[RolloutGroup], sampler: Sampler, state_values: Tensor | None = None) -> Offers:
    """Returns what parts may ask for, by the names of config.declare.OFFERS."""
    prompts = [group.prompt for group in groups]
    return {"prompts": prompts, "reference_rewards": sampler.recall(groups), "state_values": state_values}


def assign_credit(rollout: Rollout, learner: Learner, *, pad_token_id: int) -> tuple[Batch, dict[str, float]]:
    """Makes the batch: rewards shaped, turned into advantages, spread over tokens; returns metrics, too."""
    algorithm = learner.algorithm
    batch = collate(rollout.groups, pad_token_id=pad_token_id, device=learner.model.device)
    mask, shape, kl = batch.completion_mask, rollout.rewards.shape, torch.zeros_like(batch.advantages)
    if algorithm.uses_reward_kl:
        own = learner.log_probs(batch)
        kl = kl_k1(own, learner.reference_log_probs(batch, own))
    sums = [values.sum(1).float().view(shape) for values in (mask, kl)]
    rewards = rollout.rewards.to(mask.device)
    shaped = algorithm.shaping(rewards, *sums)
    as_tensor(shaped, "P G", shape, "algo.shaping", algorithm.shaping)
    offers = {k: v.to(mask.device) if isinstance(v, Tensor) else v for k, v in rollout.offers.items()}
    advantages = algorithm.advantage(shaped, **asked(algorithm.advantage, offers))
    as_tensor(advantages, "P G", shape, "algo.advantage", algorithm.advantage)
    credit = algorithm.credit(advantages.reshape(-1), mask, kl, **asked(algorithm.credit, offers))
    as_tensor(credit, "B T", mask.shape, "algo.credit", algorithm.credit)
    check_finite(shaped, "algo.shaping", algorithm.shaping, rewards, *sums)
    check_finite(advantages, "algo.advantage", algorithm.advantage, shaped)
    check_finite(credit, "algo.credit", algorithm.credit, advantages, kl)
    batch = replace(batch, advantages=credit, surprisal=reward_surprisal(rewards).reshape(-1))
    return batch, {"reward/mean": shaped.mean().item()}


def take_updates(learner: Learner, batch: Batch, *, step: int) -> Iterator[Update]:
    """Takes num_iterations passes of num_minibatches optimiser steps over what the completion filter leaves.

    The old log-probs are those of the weights that sampled: of the first update's own forward pass, or, where
    the first pass has several minibatches, of one more before it.
    `step`, the rollout step, decides how minibatches are drawn.
    """
    algorithm = learner.algorithm
    kept, rows = algorithm.completion_filter(batch), [len(batch.input_ids)]
    as_tensor(kept, "B", rows, "algo.completion_filter", algorithm.completion_filter, dtype=torch.bool)
    check_any(kept, "algo.completion_filter", algorithm.completion_filter)
    filtered = 1 - kept.float().mean().item()
    stored: Tensor | None = None
    if algorithm.num_minibatches > 1:
        seen = kept.nonzero().squeeze(1)
        stored = join([(seen, learner.log_probs(take(batch, seen)))], batch.completion_mask)
    for iteration in range(algorithm.num_iterations):
        seed = derive_seed(learner.config.seed, MINIBATCH, step, iteration)
        for part in minibatches(batch.group_ids.cpu(), algorithm.num_minibatches, seed):
            rows = part[kept[part].cpu()]
            if not len(rows):
                continue
            sizes = totals(take(batch, part if algorithm.filter_denominator == "all" else rows))
            given = StepInput(take(batch, rows), sizes, None if stored is None else stored[rows])
            metrics, record = take_optimizer_step(learner, given)
            record = narrow(record)  # the hidden states of a batch are large, and the next pass makes its own
            metrics["selection/filtered_completion_fraction"] = filtered
            if stored is None:  # one minibatch: its rows and record are all there is
                stored = join([(rows, record.old_log_probs)], batch.completion_mask)
            yield Update(rows, metrics, record if iteration == algorithm.num_iterations - 1 else None)
