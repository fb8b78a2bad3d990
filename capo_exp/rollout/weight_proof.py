"""Whether an engine holds the learner's weights: its log-probs of some prompts against the learner's own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capo_exp import policy
from capo_exp.collate import collate
from capo_exp.rollout import EngineFailed
from capo_exp.rollout.vllm_process import Request, Response
from capo_exp.types import Completion, Prompt, RolloutGroup

PROBE_PROMPTS = 4
PROBE_TOKENS = 128
"""At most, the last of each prompt."""


def probe_difference(
    generate: Callable[[Sequence[Request]], list[Response]],
    model: PreTrainedModel,
    compute_dtype: torch.dtype,
    prompts: Sequence[Prompt],
) -> Tensor:
    """[N] nats: |engine - learner| of the log-probs of prompt tokens at temperature 1.

    Args:
        generate: of the engine.
        model: the learner's.
        compute_dtype: of the learner.
        prompts: the first PROBE_PROMPTS with two tokens or more are the probe.

    Raises:
        EngineFailed: if there is no such prompt.
    """
    probe = [prompt for prompt in prompts if len(prompt.token_ids) > 1][:PROBE_PROMPTS]
    if not probe:
        raise EngineFailed("vLLM: prompts of one token cannot prove its weights: expected 2 tokens or more")
    params = {"n": 1, "temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}
    responses = generate([Request(prompt.token_ids, params) for prompt in probe])
    groups = [_as_completion(p, r.prompt_log_probs) for p, r in zip(probe, responses, strict=True)]
    batch = collate(groups, pad_token_id=0, device=model.device)
    own = policy.log_probs(
        model, batch, temperature=1.0, chunk_tokens=PROBE_TOKENS, compute_dtype=compute_dtype
    )
    return (own - batch.sampler_log_probs).abs()[batch.completion_mask]


def _as_completion(prompt: Prompt, log_probs: Sequence[float]) -> RolloutGroup:
    """The end of a prompt in the place of a completion."""
    count = min(PROBE_TOKENS, len(prompt.token_ids) - 1)
    end = Completion(prompt.token_ids[-count:], tuple(log_probs[-count:]), "", truncated=False)
    return RolloutGroup(Prompt(prompt.problem, "", prompt.token_ids[:-count]), (end,), 0)
