"""Where completions and their rewards come from: a step's own, and what parts ask for beside them."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from math import nan
from statistics import fmean

import torch
from torch import Tensor

from capo_exp.algorithms.protocols import Algorithm
from capo_exp.config.schema import TrainConfig
from capo_exp.core.seeds import CONTINUATION, ORDER, REFERENCE, derive_seed
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import Prompt, RolloutGroup, UnfinishedGroup
from capo_exp.data.prompts import choose_visits
from capo_exp.distributed.world import SINGLE, World
from capo_exp.evaluation.draw import grade_groups
from capo_exp.grading.compare import Grade
from capo_exp.grading.terms import RewardTerms, measure_terms
from capo_exp.grading.verifier import RewardResult, Verifier, join_results
from capo_exp.rollout import RolloutEngine, SamplingRequest
from capo_exp.rollout.dealt import sample


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
    spell: Callable[[Sequence[int]], list[str]] | None = None  # The texts of tokens, which algo.states reads
    reference_rewards: Mapping[str, list[float]] = field(default_factory=dict[str, list[float]])
    """Problem id -> the rewards of the reference's completions, which checkpoints keep; of no problem without
    algo.reference_samples."""
    unfinished: Sequence[UnfinishedGroup] = ()
    """What earlier steps have begun, which checkpoints keep; none without algo.rollout_tokens."""

    def recall(self, groups: Sequence[RolloutGroup]) -> Tensor | None:
        """Returns the reference's rewards [P, N] of the prompts of groups; None without any."""
        if not self.reference_rewards:
            return None
        return torch.tensor([self.reference_rewards[group.prompt.problem.id] for group in groups])


@dataclass(frozen=True)
class Drawn:
    """Groups of completions, graded, and what sampling them took."""

    groups: list[RolloutGroup]
    verdicts: Tensor  # [P, G] the verifier's rewards
    rewards: Tensor  # [P, G] total: the verifier's and the terms'
    grades: list[list[Grade]]
    metrics: dict[str, float]
    prompts: int  # Those that began
    tokens: int  # Those sampled
    unfinished: Sequence[UnfinishedGroup] = ()  # What is not graded yet

    @property
    def completions(self) -> int:
        """The completions graded."""
        return self.rewards.numel()


def draw(
    config: TrainConfig,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    seed: tuple[int, int, int],
    weight_version: int,
    watch: Stopwatch,
    begun: Sequence[tuple[int, ...]] = (),
) -> Drawn:
    """Samples a group for each prompt, all in one call, or micro-batch by micro-batch, in whichever process,
    and grades it. `seed` is a stream, a step and which of its calls of that kind this is."""
    requests = make_requests(
        config, prompts, group_size=group_size, seed=seed, weight_version=weight_version, begun=begun
    )
    groups, scored = sample_scored(sampler, requests, watch)
    tokens = sum(len(one.token_ids) for group in groups for one in group.completions)
    known = group_size * sum(map(len, begun))
    return grade_drawn(sampler, groups, scored, prompts=len(prompts), tokens=tokens - known, watch=watch)


def sample_scored(
    sampler: Sampler, requests: Sequence[SamplingRequest], watch: Stopwatch
) -> tuple[list[RolloutGroup], RewardResult | None]:
    """Samples, and scores each call's completions while the next call samples; None where the verifier cannot
    do that, or the completions come from elsewhere or are spread over processes."""
    own = sampler.engine is sampler.resting and sampler.world.size == 1
    if not own or len(requests) < 2 or not getattr(sampler.verifier, "beside_sampling", False):
        with watch("rollout"):
            return sample(sampler.engine, requests, sampler.world), None
    groups, scored = list[RolloutGroup](), list[Future[RewardResult]]()
    thread = ThreadPoolExecutor(1)
    try:
        for request in requests:
            with watch("rollout"):
                part = sampler.engine.generate(request)
            groups += part
            scored.append(thread.submit(grade_groups, sampler.verifier, part))
        with watch("reward"):
            return groups, join_results([each.result() for each in scored])
    except BaseException:
        sampler.verifier.close()  # or the thread would go on grading for nobody
        raise
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def make_requests(
    config: TrainConfig,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    seed: tuple[int, ...],
    weight_version: int,
    begun: Sequence[tuple[int, ...]] = (),
    new_tokens: int | None = None,
) -> list[SamplingRequest]:
    """Cuts what `draw` samples into calls; the last number of `seed` counts the calls of its kind."""
    size = len(prompts)
    if config.rollout.chunking == "per_micro_batch":
        size = max(1, config.model.micro_batch_size // group_size)
    starts = range(0, len(prompts), max(1, size))
    *stream, number = seed
    return [
        SamplingRequest(
            prompts[start : start + size],
            group_size=group_size,
            max_tokens=config.dataset.max_completion_tokens,
            temperature=config.rollout.temperature,
            top_k=config.rollout.top_k,
            top_p=config.rollout.top_p,
            seed=derive_seed(config.seed, *stream, number * len(starts) + position),
            weight_version=weight_version,
            begun=begun[start : start + size],
            new_tokens=new_tokens,
        )
        for position, start in enumerate(starts)
    ]


def grade_drawn(
    sampler: Sampler,
    groups: list[RolloutGroup],
    scored: RewardResult | None = None,
    *,
    prompts: int,
    tokens: int,
    watch: Stopwatch,
) -> Drawn:
    """Grades groups, unless they are scored, of which sampling took so many new prompts and tokens."""
    earned = [group.rewards for group in groups if group.rewards is not None]
    if earned:
        return Drawn(groups, torch.tensor(earned), torch.tensor(earned), [], {}, prompts, tokens)
    with watch("reward"):
        result = scored or sampler.world.first(partial(grade_groups, sampler.verifier, groups))
        completions = [one for group in groups for one in group.completions]
        measured = measure_terms(sampler.terms, [(one.text, len(one.token_ids)) for one in completions])
    verdicts = torch.tensor(result.rewards)
    rewards = total_reward(verdicts, measured, sampler.terms)
    metrics = result.metrics | {key: fmean(values) for key, values in measured.items()}
    return Drawn(groups, verdicts, rewards, result.grades, metrics, prompts, tokens)


def value_states(
    config: TrainConfig,
    algorithm: Algorithm,
    sampler: Sampler,
    groups: Sequence[RolloutGroup],
    *,
    step: int,
    weight_version: int,
    watch: Stopwatch,
) -> tuple[Tensor, Drawn]:
    """Estimates the value of the states that algo.states names, by the mean reward of completions that go on
    from each; those of a prompt that are equal, as the prompt itself, share them. All are sampled at once.

    Returns:
        Values [B, T], NaN at a token before which there is none, and what was sampled.
    """
    assert sampler.spell is not None, "algo.continuations needs the texts of tokens"
    rows = [(p, one.token_ids) for p, group in enumerate(groups) for one in group.completions]
    starts = [algorithm.states(sampler.spell(ids)) for _, ids in rows]
    places = {(b, t): (p, ids[:t]) for b, (p, ids) in enumerate(rows) for t in starts[b]}
    states = list(dict.fromkeys(places.values()))
    drawn = draw(
        config, sampler, [groups[p].prompt for p, _ in states], group_size=algorithm.continuations,
        begun=[ids for _, ids in states], seed=(CONTINUATION, step, 0), weight_version=weight_version,
        watch=watch,
    )  # fmt: skip
    known = dict(zip(states, drawn.rewards.mean(1).tolist(), strict=True))
    values = torch.full((len(rows), max(len(ids) for _, ids in rows)), nan)
    for place, state in places.items():
        values[place] = known[state]
    return values, drawn


def list_visited(config: TrainConfig, algorithm: Algorithm, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Returns the prompts that a run will visit, in their own order."""
    count = config.num_steps * config.regime.prompts_per_step * algorithm.max_sampling_rounds
    seed, total = derive_seed(config.seed, ORDER, 0), len(prompts)
    visits = choose_visits(total, first=0, count=min(count, total), seed=seed)
    return [prompts[i] for i in sorted(set(visits))]


def remember_reference(
    config: TrainConfig, algorithm: Algorithm, sampler: Sampler
) -> tuple[Sampler, int, int]:
    """Samples algo.reference_samples completions of every prompt that the run will visit, while the policy is
    the reference still; returns a sampler that knows their rewards, and how many completions and tokens that
    took."""
    drawn = draw(
        config, sampler, list_visited(config, algorithm, sampler.prompts),
        group_size=algorithm.reference_samples, seed=(REFERENCE, 0, 0), weight_version=0, watch=Stopwatch(),
    )  # fmt: skip
    pairs = zip(drawn.groups, drawn.rewards.tolist(), strict=True)
    known = {group.prompt.problem.id: rewards for group, rewards in pairs}
    return replace(sampler, reference_rewards=known), drawn.completions, drawn.tokens


def total_reward(rewards: Tensor, measured: Mapping[str, Sequence[float]], terms: RewardTerms) -> Tensor:
    """Returns the verifier's rewards [P, G] + weight x term; `measured` has P * G numbers of each term that
    is on."""
    weights = {"reward/format": terms.format_weight, "reward/length": terms.length_weight}
    for key, values in measured.items():
        if weights[key]:  # else not even a rounding
            rewards = rewards + weights[key] * torch.tensor(values).view(rewards.shape)
    return rewards
