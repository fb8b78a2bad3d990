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
MOVED = 0.1
"""Share of max_probe_difference by which the learner's log-probs have moved for certain, rounding apart."""


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


class WeightProof:
    """Compares an engine with the learner after each transfer, and with what both said before."""

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype, prompts: Sequence[Prompt]) -> None:
        """Chooses the first few prompts that can prove anything.

        Raises:
            EngineFailed: if none has two tokens.
        """
        self._model, self._compute_dtype = model, compute_dtype
        self._prompts = [prompt for prompt in prompts if len(prompt.token_ids) > 1][:PROBE_PROMPTS]
        if not self._prompts:
            raise EngineFailed(
                "vLLM: prompts of one token cannot prove its weights: expected 2 tokens or more"
            )
        self._before: WeightProbe | None = None
        """The first one of those that the engine has answered alike since."""

    def look(self, generate: Callable[[Sequence[Request]], list[Response]]) -> WeightProbe:
        """Returns both log-probs of the prompts' last tokens, at temperature 1; `generate` is the engine's,
        and every process forwards its part of sharded weights."""
        params = {"n": 1, "temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}
        responses = generate([Request(prompt.token_ids, params) for prompt in self._prompts])
        pairs = zip(self._prompts, responses, strict=True)
        groups = [_as_completion(prompt, response.prompt_log_probs) for prompt, response in pairs]
        batch = collate(groups, pad_token_id=0, device=self._model.device)
        settings = policy.ForwardSettings(1.0, PROBE_TOKENS, self._compute_dtype)
        own = policy.log_probs(self._model, batch, settings)
        return WeightProbe(own[batch.completion_mask], batch.sampler_log_probs[batch.completion_mask])

    def judge(self, probe: WeightProbe, step: int, dtype: str, tolerance: float) -> None:
        """Judges the engine's weights after an optimiser step: by the size of the difference, and by whether
        they have changed at all since the learner's moved; many small steps add up.

        Raises:
            EngineFailed: if they are not the learner's.
        """
        before = self._before
        if before is None or not torch.equal(probe.engine, before.engine):
            self._before = probe
        mean, largest = probe.difference.mean().item(), probe.difference.max().item()
        expected = f"on average at most rollout.engine.max_probe_difference.{dtype}={tolerance:g}"
        if before is not None and probe.only_learner_moved(before, by=MOVED * tolerance):
            expected = "the engine's to change with the learner's"
        elif mean <= tolerance:
            return
        raise EngineFailed(
            f"vLLM: its weights are not the learner's: after optimiser step {step} log-probs differ by "
            f"{mean:.3g} nats on average, {largest:.3g} at most; expected {expected}"
        )


def _as_completion(prompt: Prompt, log_probs: Sequence[float]) -> RolloutGroup:
    """Puts the end of a prompt in the place of a completion."""
    count = min(PROBE_TOKENS, len(prompt.token_ids) - 1)
    end = Completion(prompt.token_ids[-count:], tuple(log_probs[-count:]), "", truncated=False)
    return RolloutGroup(Prompt(prompt.problem, "", prompt.token_ids[:-count]), (end,), 0)
