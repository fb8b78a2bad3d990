"""Prompts -> completions and their scores, by the same engine and verifier as training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from capo_exp.config.schema import TrainConfig
from capo_exp.core.types import Prompt, RolloutGroup
from capo_exp.distributed.world import SINGLE, World
from capo_exp.grading.verifier import Verifier
from capo_exp.rollout import RolloutEngine, SamplingRequest
from capo_exp.rollout.dealt import sample


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    samples: int  # Completions a problem
    temperature: float  # 0 = greedy
    top_k: int  # 0 = off
    top_p: float  # 1 = off
    max_tokens: int  # Of a completion


def draw_completions(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    seed: int,
    weight_version: int,
    world: World = SINGLE,
) -> list[RolloutGroup]:
    """Samples `sampling.samples` completions of every prompt, the same for the same seed, whatever the number
    of processes that share them out."""
    request = SamplingRequest(
        prompts,
        group_size=sampling.samples,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=seed,
        weight_version=weight_version,
    )
    if world.size == 1:
        return engine.generate(request)
    return sample(engine, _cut(request, world), world)


def _cut(request: SamplingRequest, world: World) -> list[SamplingRequest]:
    """Cuts an evaluation's request into one for each process; one that draws stays whole, for its prompts
    share a generator."""
    size = -(-len(request.prompts) // world.size) if request.temperature == 0 else len(request.prompts)
    starts = range(0, len(request.prompts), size)
    return [replace(request, prompts=request.prompts[start : start + size]) for start in starts]


def evaluate(
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
    sampling = Sampling(
        numbers.samples, numbers.temperature, 0, numbers.top_p, config.dataset.max_completion_tokens
    )
    groups = draw_completions(
        engine, prompts, sampling, seed=seed, weight_version=weight_version, world=world
    )
    texts = [[completion.text for completion in group.completions] for group in groups]
    asked = [prompt.problem for prompt in prompts]
    golds = [problem.golds for problem in asked]
    graded = world.first(lambda: verifier.score(texts, golds, [each.problem for each in asked]).grades)
    completions = [completion for group in groups for completion in group.completions]
    grades = [grade for row in graded for grade in row]
    return {
        "eval/accuracy": fmean(grade.correct for grade in grades),
        "eval/problems": len(groups),
        "eval/no_answer_fraction": fmean(grade.reason == "no_answer" for grade in grades),
        "eval/truncated_fraction": fmean(completion.truncated for completion in completions),
        "eval/completion_length/mean": fmean(len(completion.token_ids) for completion in completions),
    }
