"""Completions that nobody sampled: the dataset's worked solutions, for supervised fine-tuning."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from capo_exp.config.errors import ConfigError
from capo_exp.core.types import Completion, Prompt, RolloutGroup


class DemonstrationRollout:
    """Hands out `Problem.demonstration` with an end-of-sequence token, as if the model had written it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        max_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        weight_version: int,
    ) -> list[RolloutGroup]:
        """group_size copies of each prompt's demonstration, cut at max_tokens and then marked truncated.

        Raises:
            ConfigError: if a problem has no demonstration.
        """
        del temperature, top_k, top_p, seed
        copies = [(self._completion(prompt, max_tokens),) * group_size for prompt in prompts]
        return [RolloutGroup(p, c, weight_version) for p, c in zip(prompts, copies, strict=True)]

    def _completion(self, prompt: Prompt, max_tokens: int) -> Completion:
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
