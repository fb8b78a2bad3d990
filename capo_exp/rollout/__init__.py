"""Rollout engines: prompts -> RolloutGroups. One file an engine, the same signature."""

from collections.abc import Sequence
from typing import Protocol

from capo_exp.types import Prompt, RolloutGroup


class RolloutEngine(Protocol):
    """What train.py and evaluate.py ask of an engine; see hf.HFRollout.generate for the arguments."""

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
        """One group per prompt, in order."""
        ...
