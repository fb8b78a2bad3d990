"""A reward that compares the completions of a problem with each other, so it sees all of a step at once."""

from collections import defaultdict

from capo_exp import takes_lists
from my_reward import near


@takes_lists
def shortest(completions: list[str], answers: list[str], problems: list[str]) -> list[float]:
    """Returns 1 for right completions that are as short as the shortest right one of their problem, half for
    other right ones, else 0."""
    right = [near(*each) == 1.0 for each in zip(completions, answers, problems, strict=True)]
    lengths: dict[str, list[int]] = defaultdict(list)
    for text, problem, good in zip(completions, problems, right, strict=True):
        if good:
            lengths[problem].append(len(text))
    return [
        float(good) * (1.0 if len(text) == min(lengths[problem], default=0) else 0.5)
        for text, problem, good in zip(completions, problems, right, strict=True)
    ]
