"""Pairs of completions whose rewards are known: what they are, how a run keeps them, and their engine."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from transformers import PreTrainedTokenizerBase

from capo_exp.config.ranges import Rule
from capo_exp.core.types import Completion, Prompt, RolloutGroup
from capo_exp.rollout import SamplingRequest
from capo_exp.runs.files import write_atomic

FILE = "pairs.json"
"""In the run directory."""


@dataclass(frozen=True)
class Pair:
    """Two completions of a state: of a prompt, or of what a solution of it begins with."""

    level: str  # solution | inference | step
    problem: str  # id of the problem
    begun: tuple[int, ...]  # Tokens of the solution that are part of the state; () = the prompt
    completions: tuple[Completion, Completion]  # What follows the state: all of it, or one step
    rewards: tuple[float, float]  # They differ; of a step the mean reward of what goes on from it
    state_rewards: tuple[float, ...]  # Of the completions sampled on from the state


@dataclass(frozen=True)
class Pairs:
    """The pairs of a run, and what sampling them took."""

    pairs: Sequence[Pair]
    completions: int
    tokens: int

    @property
    def text(self) -> str:
        """Is all of it as JSON; numbers come back to the last bit."""
        return json.dumps(self, default=vars) + "\n"

    @property
    def digest(self) -> str:
        """Is 16 hex digits over all of it."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def write_pairs(path: Path, built: Pairs) -> None:
    """Writes the whole of it or nothing."""
    write_atomic(path, built.text)


def read_pairs(path: Path) -> Pairs | None:
    """Reads what `write_pairs` wrote; None where there is nothing, or something else."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        for row in known["pairs"]:
            row["completions"] = [Completion(**_tuples(one)) for one in row["completions"]]
        return Pairs(**known | {"pairs": [Pair(**_tuples(row)) for row in known["pairs"]]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


class PairRollout:
    """Hands out a pair for each prompt of a request; the prompts are those that `hold` returns."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        samples: Annotated[int, Rule(lambda v: v >= 2, "an integer of at least 2")],
    ) -> None:
        self.samples = samples
        """Completions from which the two of a pair are taken, and whose mean reward is a state's value."""
        self._tokenizer = tokenizer
        self._groups: dict[str, RolloutGroup] = {}

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of tokens, without special ones."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def hold(self, pairs: Sequence[Pair], prompts: Sequence[Prompt]) -> dict[str, list[float]]:
        """Takes the pairs of some problems, of which these are the prompts.

        Returns:
            The id of each pair -> the rewards of its state's completions.
        """
        asked = {prompt.problem.id: prompt for prompt in prompts}
        known: dict[str, list[float]] = {}
        for pair in pairs:
            prompt, name = asked[pair.problem], f"{pair.problem}/{pair.level}"
            text, token_ids = prompt.text + self.decode(pair.begun), prompt.token_ids + pair.begun
            state = Prompt(replace(prompt.problem, id=name), text, token_ids)
            self._groups[name] = RolloutGroup(state, pair.completions, weight_version=0, rewards=pair.rewards)
            known[name] = list(pair.state_rewards)
        return known

    @property
    def prompts(self) -> list[Prompt]:
        """The state of each pair, as a prompt whose problem has the pair's id."""
        return [group.prompt for group in self._groups.values()]

    def generate(self, request: SamplingRequest) -> list[RolloutGroup]:
        """Returns the pair of each prompt, whatever the request says beside them."""
        return [self._groups[prompt.problem.id] for prompt in request.prompts]
