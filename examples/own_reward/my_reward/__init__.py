"""Rewards of a package of its own."""

import re


def near(completion: str, answer: str, problem: str) -> float:
    """Returns 1 if the last number of the completion is the answer, half as much for each one that it is off,
    and 0 without a number."""
    del problem
    numbers = re.findall(r"-?\d+", completion)
    return 0.5 ** abs(int(numbers[-1]) - int(answer)) if numbers and len(numbers[-1]) < 9 else 0.0
