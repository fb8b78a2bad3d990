"""How pairs of completions are made of what a model samples itself."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from capo_exp.algorithms.protocols import Algorithm
from capo_exp.config.schema import TrainConfig
from capo_exp.core.seeds import PAIRS
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import Completion
from capo_exp.rollout.pairs import Pair, PairRollout, Pairs
from capo_exp.training.sampler import Sampler, draw, list_visited

State = tuple[int, tuple[int, ...]]
"""Number of a prompt, and the tokens that its completions begin with."""


@dataclass(frozen=True)
class Outcomes:
    """Completions of a state, whole, and what each earns."""

    completions: Sequence[Completion]
    rewards: Sequence[float]

    @property
    def ends(self) -> tuple[Completion, Completion]:
        """The best and the worst; of equals the first sampled."""
        best, worst = (self.rewards.index(end(self.rewards)) for end in (max, min))
        return self.completions[best], self.completions[worst]

    @property
    def differ(self) -> bool:
        """Is true where one is better than another."""
        return max(self.rewards) > min(self.rewards)


class PairBuilder:
    """Samples with the model as it is, and makes a pair of each problem and level of algo.pair_levels.

    solution: the best and the worst of the completions of the prompt.
    inference: of those that go on from the last state of that worst one from which they still differ.
    step: what the worst one did next in that state, and the first step of the best that goes on from it; each
        has the mean reward of the completions that go on from it.

    Where two earn the same there is no pair. Source: the levels are those of MDPO, arXiv 2506.15706; which
    state the parts begin in is ours.
    """

    def __init__(
        self, config: TrainConfig, algorithm: Algorithm, sampler: Sampler, source: PairRollout
    ) -> None:
        """Takes the prompts that the run would visit, and source.samples completions of each state."""
        assert sampler.spell is not None, "where steps begin is in the texts of tokens"
        self._config, self._algorithm, self._sampler, self._source = config, algorithm, sampler, source
        self._spell, self._prompts = sampler.spell, list_visited(config, algorithm, sampler.prompts)
        self._outcomes: dict[State, Outcomes] = {}
        self._values: dict[State, float] = {}  # Reward of what is whole, mean reward of what is not
        self._calls = self._completions = self._tokens = 0

    def build(self) -> Pairs:
        """Returns the same for the same seed, prompts and weights."""
        levels, outcomes = self._algorithm.pair_levels or ["solution"], self._outcomes
        roots: list[State] = [(p, ()) for p in range(len(self._prompts))]
        self._sample(roots)
        worst = {root[0]: outcomes[root].ends[1] for root in roots if outcomes[root].differ}
        states = [(p, one.token_ids[:t]) for p, one in worst.items() for t in self._starts(one)]
        self._sample(states if levels != ["solution"] else ())
        last = {state[0]: state for state in states if state in outcomes and outcomes[state].differ}
        steps = {s: (self._step(outcomes[s].ends[0], s), self._step(worst[s[0]], s)) for s in last.values()}
        self._sample((s[0], one.token_ids) for s in steps for one in steps[s] if "step" in levels)
        made = {
            "solution": {root: outcomes[root].ends for root in roots},
            "inference": {state: outcomes[state].ends for state in last.values() if state[1]},
            "step": steps,
        }
        pairs = [self._pair(level, *each) for level in levels for each in made[level].items()]
        return Pairs([p for p in pairs if p.rewards[0] != p.rewards[1]], self._completions, self._tokens)

    def _sample(self, states: Iterable[State]) -> None:
        """Samples on from those states of which nothing is known, all in one call."""
        fresh = [state for state in dict.fromkeys(states) if state not in self._values]
        if not fresh:
            return
        drawn = draw(
            self._config, self._sampler, [self._prompts[p] for p, _ in fresh],
            begun=[begun for _, begun in fresh], group_size=self._source.samples,
            seed=(PAIRS, self._calls, 0), weight_version=0, watch=Stopwatch(),
        )  # fmt: skip
        for state, group, rewards in zip(fresh, drawn.groups, drawn.rewards.tolist(), strict=True):
            self._outcomes[state], self._values[state] = Outcomes(group.completions, rewards), fmean(rewards)
            for one, reward in zip(group.completions, rewards, strict=True):
                self._values[state[0], one.token_ids] = reward
        self._calls += 1
        self._completions += drawn.completions
        self._tokens += drawn.tokens

    def _starts(self, one: Completion) -> list[int]:
        return self._algorithm.states(self._spell(one.token_ids))

    def _step(self, one: Completion, state: State) -> Completion:
        """Cuts a completion behind the step that follows a state."""
        end = next((t for t in self._starts(one) if t > len(state[1])), None)
        return one if end is None else replace(self._cut(one, 0, end), truncated=False)

    def _cut(self, one: Completion, start: int, end: int | None = None) -> Completion:
        ids, log_probs = one.token_ids[start:end], one.sampler_log_probs[start:end]
        return replace(one, token_ids=ids, sampler_log_probs=log_probs, text=self._source.decode(ids))

    def _pair(self, level: str, state: State, both: tuple[Completion, Completion]) -> Pair:
        """Makes a pair of what two solutions have behind a state."""
        (p, begun), (one, other) = state, both
        parts = self._cut(one, len(begun)), self._cut(other, len(begun))
        rewards = self._values[p, one.token_ids], self._values[p, other.token_ids]
        name, known = self._prompts[p].problem.id, tuple(self._outcomes[state].rewards)
        return Pair(level, name, begun, parts, rewards, known)
