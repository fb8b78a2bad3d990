"""Accuracy on held-out problems, by the same rollout engine and verifier as training."""

from collections.abc import Sequence
from statistics import fmean

from capo_exp.config import TrainConfig
from capo_exp.rewards import Verifier
from capo_exp.rollout import RolloutEngine
from capo_exp.types import Prompt


def evaluate(
    engine: RolloutEngine,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    config: TrainConfig,
    *,
    seed: int,
    weight_version: int,
) -> dict[str, float]:
    """Mean accuracy over problems and samples, with the sampling of config.evaluation."""
    numbers = config.evaluation
    groups = engine.generate(
        prompts,
        group_size=numbers.samples,
        max_tokens=config.dataset.max_completion_tokens,
        temperature=numbers.temperature,
        top_k=0,
        top_p=1.0,
        seed=seed,
        weight_version=weight_version,
    )
    texts = [[completion.text for completion in group.completions] for group in groups]
    result = verifier.score(texts, [prompt.problem.answer for prompt in prompts])
    completions = [completion for group in groups for completion in group.completions]
    return {
        "eval/accuracy": fmean(reward for row in result.rewards for reward in row),
        "eval/problems": len(prompts),
        "eval/no_answer_fraction": result.metrics["reward/no_answer_fraction"],
        "eval/truncated_fraction": fmean(completion.truncated for completion in completions),
        "eval/completion_length/mean": fmean(len(completion.token_ids) for completion in completions),
    }
