"""Rollouts that stop at a budget of tokens; what has not ended goes on in the next step, with its weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from capo_exp.algorithms.protocols import Algorithm
from capo_exp.config.schema import TrainConfig
from capo_exp.core.seeds import ORDER, RESUMED, ROLLOUT, derive_seed
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import Completion, Prompt, RolloutGroup, UnfinishedGroup
from capo_exp.data.prompts import choose_visits
from capo_exp.rollout.dealt import sample
from capo_exp.training.sampler import Drawn, Sampler, grade_drawn, make_requests

Rows = dict[tuple[int, int], Completion]
"""Place of a group in the pool and of a completion in it -> the completion, as far as it is sampled."""
NOTHING = Completion((), (), "", truncated=True)
"""A completion that has not begun."""


def draw_within_budget(
    config: TrainConfig,
    algorithm: Algorithm,
    sampler: Sampler,
    *,
    step: int,
    first: int,
    weight_version: int,
    watch: Stopwatch,
) -> Drawn:
    """Samples algo.rollout_tokens tokens of prompts_per_step groups, of which earlier steps have begun the
    first, and grades those groups of which every completion has ended.

    Each completion gets an equal share of the budget, and of what others leave over by ending, until less
    than a token for each is left. A step in which no group has ended by then spends another budget. A group
    that began more than algo.max_age steps ago begins anew, so that no token that trains is older.

    Source: C3PO++, Ring-1T, arXiv 2510.18855; the shares and the whole groups are ours.
    """
    assert algorithm.rollout_tokens is not None
    longest, left, calls = config.dataset.max_completion_tokens, algorithm.rollout_tokens, 0
    pool = _fill(config, algorithm, sampler, step, first, weight_version)
    prompts, kept = [sampler.prompts[group.visit] for group in pool], len(sampler.unfinished)
    rows: Rows = {(p, g): one for p, group in enumerate(pool) for g, one in enumerate(group.completions)}
    before = {at: len(one.token_ids) for at, one in rows.items()}
    while going := {at: one for at, one in rows.items() if one.truncated and len(one.token_ids) < longest}:
        if left < len(going):
            if len({p for p, _ in going}) < len(pool):
                break
            left += algorithm.rollout_tokens
        share, seeds = left // len(going), ((ROLLOUT, step, 0), (RESUMED, step, calls, 0))
        with watch("rollout"):
            rows |= _go_on(config, sampler, prompts, going, share, seeds, weight_version)
        left -= sum(len(rows[at].token_ids) - len(one.token_ids) for at, one in going.items())
        calls += 1
    ended, unfinished, goes_on = list[RolloutGroup](), list[UnfinishedGroup](), {p for p, _ in going}
    for p, group in enumerate(pool):
        completions = tuple(one for (q, _), one in rows.items() if q == p)
        if p in goes_on:
            unfinished.append(replace(group, completions=completions))
        else:
            ended.append(RolloutGroup(prompts[p], completions, group.weight_version))
    metrics = {
        "rollout/unfinished_completions": float(len(going)),
        "rollout/unfinished_age": fmean([step + 1 - pool[p].step for p, _ in going] or [0]),
        "rollout/resumed_tokens": float(sum(n for (p, _), n in before.items() if p not in goes_on)),
        "rollout/restarted_groups": float(sum(group.step == step for group in pool[:kept])),
    }
    spent = sum(len(rows[at].token_ids) - n for at, n in before.items())
    drawn = grade_drawn(sampler, ended, prompts=len(pool) - kept, tokens=spent, watch=watch)
    return replace(drawn, metrics=drawn.metrics | metrics, unfinished=unfinished)


def read_unfinished(groups: Iterable[Mapping[str, Any]]) -> list[UnfinishedGroup]:
    """Returns the groups of which a checkpoint has the `asdict`."""
    return [
        UnfinishedGroup(**{**group, "completions": tuple(Completion(**one) for one in group["completions"])})
        for group in groups
    ]


def _fill(
    config: TrainConfig, algorithm: Algorithm, sampler: Sampler, step: int, first: int, weight_version: int
) -> list[UnfinishedGroup]:
    """Returns prompts_per_step groups: the unfinished ones, begun anew where too old, and then new ones."""

    def begin(visit: int) -> UnfinishedGroup:
        return UnfinishedGroup(visit, step, weight_version, (NOTHING,) * config.regime.group_size)

    old = step - algorithm.max_age
    pool = [begin(group.visit) if group.step < old else group for group in sampler.unfinished]
    count, order = config.regime.prompts_per_step - len(pool), derive_seed(config.seed, ORDER, 0)
    visits = choose_visits(len(sampler.prompts), first=first, count=count, seed=order) if count else ()
    return [*pool, *map(begin, visits)]


def _go_on(
    config: TrainConfig,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    going: Rows,
    share: int,
    seeds: tuple[tuple[int, ...], tuple[int, ...]],
    weight_version: int,
) -> Rows:
    """Samples at most `share` tokens more of each completion: new groups as ever, and what has begun one by
    one. What was sampled before keeps the log-probs that it was sampled with."""
    fresh = list(dict.fromkeys(p for (p, _), one in going.items() if not one.token_ids))
    begun = {at: one for at, one in going.items() if one.token_ids}
    make = partial(make_requests, config, weight_version=weight_version, new_tokens=share)
    size, known = config.regime.group_size, [one.token_ids for one in begun.values()]
    requests = make([prompts[p] for p in fresh], group_size=size, seed=seeds[0])
    requests += make([prompts[p] for p, _ in begun], group_size=1, seed=seeds[1], begun=known)
    sampled = [one for group in sample(sampler.engine, requests, sampler.world) for one in group.completions]
    places = [*((p, g) for p in fresh for g in range(size)), *begun]
    return {at: _keep_log_probs(going[at], one) for at, one in zip(places, sampled, strict=True)}


def _keep_log_probs(before: Completion, after: Completion) -> Completion:
    known = before.sampler_log_probs
    return replace(after, sampler_log_probs=known + after.sampler_log_probs[len(known) :])
