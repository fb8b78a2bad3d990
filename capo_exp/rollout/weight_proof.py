"""Whether an engine holds the learner's weights: its log-probs of some prompts against the learner's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capo_exp.core import policy
from capo_exp.core.batch import collate
from capo_exp.core.types import Completion, Prompt, RolloutGroup
from capo_exp.rollout import EngineFailed
from capo_exp.rollout.vllm_process import Request, Response

PROBE_PROMPTS = 4
PROBE_TOKENS = 128
"""At most, the last of each prompt."""


@dataclass(frozen=True)
class WeightProbe:
    """Log-probs [N] nats of the same tokens under learner and engine."""

    learner: Tensor
    engine: Tensor

    @property
    def difference(self) -> Tensor:
        """Is [N] nats, not negative; NaN where either is."""
        return (self.learner - self.engine).abs()

    def only_learner_moved(self, before: "WeightProbe", *, by: float) -> bool:
        """Whether the engine says to the last bit what it said before, although the learner's log-probs have
        moved by more than `by` nats on average: then it has not got the new weights."""
        moved = (self.learner - before.learner).abs().mean().item() > by
        return moved and torch.equal(self.engine, before.engine)


def probe_weights(
    generate: Callable[[Sequence[Request]], list[Response]],
    model: PreTrainedModel,
    compute_dtype: torch.dtype,
    prompts: Sequence[Prompt],
) -> WeightProbe:
    """Returns both log-probs of the prompts' last tokens, at temperature 1.

    Args:
        generate: the engine's.
        model: the learner's.
        compute_dtype: the learner's.
        prompts: have two tokens or more.
    """
    params = {"n": 1, "temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}
    responses = generate([Request(prompt.token_ids, params) for prompt in prompts])
    groups = [_as_completion(p, r.prompt_log_probs) for p, r in zip(prompts, responses, strict=True)]
    batch = collate(groups, pad_token_id=0, device=model.device)
    own = policy.log_probs(model, batch, policy.ForwardSettings(1.0, PROBE_TOKENS, compute_dtype))
    return WeightProbe(own[batch.completion_mask], batch.sampler_log_probs[batch.completion_mask])


def choose_probe_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Returns the first few prompts that can prove anything.

    Raises:
        EngineFailed: if none has two tokens.
    """
    chosen = [prompt for prompt in prompts if len(prompt.token_ids) > 1][:PROBE_PROMPTS]
    if not chosen:
        raise EngineFailed("vLLM: prompts of one token cannot prove its weights: expected 2 tokens or more")
    return chosen


def _as_completion(prompt: Prompt, log_probs: Sequence[float]) -> RolloutGroup:
    """Puts the end of a prompt in the place of a completion."""
    count = min(PROBE_TOKENS, len(prompt.token_ids) - 1)
    end = Completion(prompt.token_ids[-count:], tuple(log_probs[-count:]), "", truncated=False)
    return RolloutGroup(Prompt(prompt.problem, "", prompt.token_ids[:-count]), (end,), 0)
