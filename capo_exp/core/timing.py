"""Seconds by stage."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up wall time under names: `with watch("rollout"): ...`. A GPU's queue is waited for."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = _now()
        try:
            yield
        finally:
            self.seconds[name] += _now() - start


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # else time lands in the stage that first reads a result
    return time.perf_counter()
