"""Rollout engines: a request -> RolloutGroups. One file an engine; this file imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from capo_exp.config.errors import RunFailed

if TYPE_CHECKING:
    from pathlib import Path

    from capo_exp.core.types import Prompt, RolloutGroup


class EngineFailed(RunFailed):
    """The engine reported an error, died, did not answer in time, or holds other weights than the learner."""


@dataclass(frozen=True)
class SamplingRequest:
    """One call of an engine: what to sample, and how."""

    prompts: Sequence[Prompt]
    group_size: int
    """Completions of each prompt."""
    max_tokens: int
    """Length limit; a completion that reaches it without ending is marked as truncated."""
    temperature: float
    """0 = greedy."""
    top_k: int
    """0 = off."""
    top_p: float
    """1 = off."""
    seed: int
    """The same request gives the same completions while the weights stay."""
    weight_version: int
    """Number of optimiser steps that the learner's weights have seen; recorded with each group."""
    begun: Sequence[tuple[int, ...]] = ()
    """Tokens with which each prompt's completions begin, fewer than max_tokens, which counts them, too; () =
    none. The completions returned are whole."""
    new_tokens: int | None = None
    """Limit of what is sampled beyond what has begun, where that is less; None = max_tokens alone."""

    def beginnings(self) -> Sequence[tuple[int, ...]]:
        """Returns what has begun of each prompt's completions."""
        return self.begun or [()] * len(self.prompts)

    def room(self) -> list[int]:
        """Returns how many tokens may be sampled of each prompt's completions."""
        rest = [self.max_tokens - len(begun) for begun in self.beginnings()]
        return rest if self.new_tokens is None else [min(each, self.new_tokens) for each in rest]


class RolloutEngine(Protocol):
    """What training and evaluation ask of an engine."""

    def generate(self, request: SamplingRequest) -> list[RolloutGroup]:
        """Returns one group per prompt, in order, sampled with the learner's present weights.

        Raises:
            EngineFailed: if an engine outside this process cannot do that.
        """
        ...

    def start(self, directory: Path, prompts: Sequence[Prompt]) -> None:
        """Starts what has to run before the first call.

        Args:
            directory: folder of the run; takes the engine's log.
            prompts: some of the run's, the same after a resume; an engine proves its weights with them.
        """
        ...

    def rest(self) -> None:
        """Lets the engine give memory to the learner: sampling is over for now."""
        ...

    def metrics(self) -> dict[str, float]:
        """Returns what transfers took since the last call, and what the last proof of the weights showed."""
        ...

    def close(self) -> None:
        """Returns all memory; the engine cannot be used afterwards."""
        ...
