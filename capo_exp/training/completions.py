"""Sampled completions as table rows, with what the curvature model said of each of their tokens."""

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from capo_exp.core.batch import join
from capo_exp.core.types import Batch, StepRecord
from capo_exp.training.rollout_step import Rollout, Update


def tabulate_completions(
    rollout: Rollout, batch: Batch, updates: Sequence[Update], count: int, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, object]]:
    """Makes a row of each completion of the first `count` groups, with the shifts of the last pass; a
    completion that the filter took out keeps none of its tokens. An advantage is the mean over a completion's
    tokens, before a correction."""

    def join_last(get: Callable[[StepRecord], Tensor]) -> Tensor:
        last = [(update.rows, get(update.record)) for update in updates if update.record is not None]
        return join(last, batch.completion_mask)

    keep = join_last(lambda record: record.selection.keep_mask)
    policy_shift = join_last(lambda record: record.shifts.policy_shift)
    objective_shift = join_last(lambda record: record.shifts.objective_shift)
    groups, size = rollout.groups[:count], rollout.rewards.shape[1]
    seen = {i for group in groups for completion in group.completions for i in completion.token_ids}
    texts = {i: tokenizer.decode([i]) for i in seen}
    rows: list[dict[str, object]] = []
    for p, group in enumerate(groups):
        for g, completion in enumerate(group.completions):
            row, tokens = p * size + g, slice(0, len(completion.token_ids))
            rows.append(
                {
                    "prompt": group.prompt.text,
                    "completion": completion.text,
                    "answer": group.prompt.problem.answer,
                    "family": group.prompt.problem.family,
                    "reward": rollout.rewards[p, g].item(),
                    "advantage": batch.advantages[row, tokens].double().mean().item(),
                    "truncated": completion.truncated,
                    "weight_version": group.weight_version,
                    "token_ids": list(completion.token_ids),
                    "tokens": [texts[i] for i in completion.token_ids],
                    "log_prob": list(completion.sampler_log_probs),
                    "policy_shift": policy_shift[row, tokens].tolist(),
                    "objective_shift": objective_shift[row, tokens].tolist(),
                    "keep": keep[row, tokens].tolist(),
                }
            )
    return rows
