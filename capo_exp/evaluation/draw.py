"""Prompts -> completions and their scores, by the same engine and verifier as training."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from capo_exp.config.schema import TrainConfig
from capo_exp.core.types import Prompt, RolloutGroup
from capo_exp.distributed.world import SINGLE, World
from capo_exp.grading.verifier import RewardResult, Verifier
from capo_exp.rollout import RolloutEngine, SamplingRequest
from capo_exp.rollout.dealt import sample


def draw_completions(
    engine: RolloutEngine, request: SamplingRequest, world: World = SINGLE
) -> list[RolloutGroup]:
    """Samples what is asked for, the same for the same seed, whatever the number of processes that share it
    out: greedy prompts are dealt, others stay in one call, for they share a generator."""
    if world.size == 1:
        return engine.generate(request)
    engines = world.blocks.size
    size = -(-len(request.prompts) // engines) if request.temperature == 0 else len(request.prompts)
    starts = range(0, len(request.prompts), size)
    cut = [replace(request, prompts=request.prompts[start : start + size]) for start in starts]
    return sample(engine, cut, world)


def grade_groups(verifier: Verifier, groups: Sequence[RolloutGroup]) -> RewardResult:
    """Returns the verdicts on the completions of each prompt."""
    texts = [[completion.text for completion in group.completions] for group in groups]
    asked = [group.prompt.problem for group in groups]
    return verifier.score(texts, [each.golds for each in asked], [each.problem for each in asked])


def evaluate_policy(
    engine: RolloutEngine,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    config: TrainConfig,
    *,
    seed: int,
    weight_version: int,
    world: World = SINGLE,
) -> dict[str, float]:
    """Returns what training logs of its held-out problems, sampled as config.evaluation says: means over all
    completions alike, under the names of eval.jsonl."""
    numbers = config.evaluation
    request = SamplingRequest(
        prompts, numbers.samples, config.dataset.max_completion_tokens, numbers.temperature,
        top_k=0, top_p=numbers.top_p, seed=seed, weight_version=weight_version,
    )  # fmt: skip
    groups = draw_completions(engine, request, world)
    graded = world.first(lambda: grade_groups(verifier, groups)).grades
    completions = [completion for group in groups for completion in group.completions]
    grades = [grade for row in graded for grade in row]
    return {
        "eval/accuracy": fmean(grade.correct for grade in grades),
        "eval/problems": len(groups),
        "eval/no_answer_fraction": fmean(grade.reason == "no_answer" for grade in grades),
        "eval/truncated_fraction": fmean(completion.truncated for completion in completions),
        "eval/completion_length/mean": fmean(len(completion.token_ids) for completion in completions),
    }
