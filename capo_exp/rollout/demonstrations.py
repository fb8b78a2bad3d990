"""Completions that nobody sampled: the dataset's worked solutions, for supervised fine-tuning."""

from transformers import PreTrainedTokenizerBase

from capo_exp.config.errors import ConfigError
from capo_exp.core.types import Completion, Prompt, RolloutGroup
from capo_exp.rollout import SamplingRequest


class DemonstrationRollout:
    """Hands out `Problem.demonstration` with an end-of-sequence token, as if the model had written it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def generate(self, request: SamplingRequest) -> list[RolloutGroup]:
        """Returns group_size copies of each demonstration, cut at max_tokens and then marked as truncated.

        Raises:
            ConfigError: if a problem has no demonstration.
        """
        size, version = request.group_size, request.weight_version
        made = [self._complete(prompt, request.max_tokens) for prompt in request.prompts]
        return [RolloutGroup(p, (c,) * size, version) for p, c in zip(request.prompts, made, strict=True)]

    def _complete(self, prompt: Prompt, max_tokens: int) -> Completion:
        text = prompt.problem.demonstration
        if not text:
            raise ConfigError(
                f"rollout.train_engine: problem {prompt.problem.id} has no demonstration; "
                "expected a dataset with worked solutions, or rollout=hf"
            )
        end = self._tokenizer.eos_token_id
        token_ids = [*self._tokenizer(text, add_special_tokens=False)["input_ids"], end]
        truncated = len(token_ids) > max_tokens
        kept = token_ids[:max_tokens]
        if truncated:
            text = self._tokenizer.decode(kept)
        return Completion(tuple(kept), (float("nan"),) * len(kept), str(text), truncated)
