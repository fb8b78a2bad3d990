"""Sampling that is shared out over the processes of a run: each asks the engine that is its own."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from capo_exp.core.types import RolloutGroup
from capo_exp.distributed.world import World
from capo_exp.rollout import RolloutEngine, SamplingRequest


def sample(engine: RolloutEngine, requests: Sequence[SamplingRequest], world: World) -> list[RolloutGroup]:
    """Samples request i with engine i mod their number, and returns the groups of all of them in order.

    Every process asks its engine equally often, for nothing if need be: engines take the learner's weights
    when they are asked, and sharded weights are gathered by all at once.
    """
    if not requests:
        return []
    rounds = -(-len(requests) // world.blocks.size)

    def own() -> list[list[RolloutGroup]]:
        share = world.blocks.deal(requests)
        nothing = [replace(requests[0], prompts=(), begun=())] * (rounds - len(share))
        return [engine.generate(request) for request in (*share, *nothing)][: len(share)]

    shares = world.together(own)[:: world.block]  # of those that own an engine
    return [group for groups in world.blocks.collect(shares) for group in groups]


class ReplicaRollout:
    """An engine on a whole copy of a model that is sharded, which is refreshed before it samples with weights
    that it has not seen: what samples forward token by token cannot wait for other processes at each."""

    def __init__(self, engine: RolloutEngine, refresh: Callable[[], None]) -> None:
        self._engine = engine
        self._refresh = refresh
        self._version: int | None = None
        self.start, self.rest = engine.start, engine.rest
        self.metrics, self.close = engine.metrics, engine.close

    def generate(self, request: SamplingRequest) -> list[RolloutGroup]:
        """Does as the engine, with the learner's present weights; every process has to ask."""
        if request.weight_version != self._version:
            self._refresh()
            self._version = request.weight_version
        return self._engine.generate(request)
