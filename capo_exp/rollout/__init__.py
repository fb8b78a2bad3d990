"""Rollout engines: prompts -> RolloutGroups. One file an engine, the same signature."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from capo_exp.config.errors import RunFailed
from capo_exp.core.types import Prompt, RolloutGroup


class EngineFailed(RunFailed):
    """The engine reported an error, died, did not answer in time, or holds other weights than the learner."""


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
        """One group per prompt, in order, sampled with the learner's present weights.

        Raises:
            EngineFailed: if an engine outside this process cannot do that.
        """
        ...

    def start(self, directory: Path, prompts: Sequence[Prompt]) -> None:
        """Starts what has to run before the first call.

        Args:
            directory: of the run; takes the engine's log.
            prompts: some of the run's, the same after a resume; an engine proves its weights with them.
        """
        ...

    def rest(self) -> None:
        """Sampling is over for now: memory may go to the learner."""
        ...

    def metrics(self) -> dict[str, float]:
        """What transfers since the last call took, and what the last proof of the weights showed."""
        ...

    def close(self) -> None:
        """Returns all memory; the engine cannot be used afterwards."""
        ...
