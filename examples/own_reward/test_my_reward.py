"""The rewards on completions whose worth is known."""

from my_reward import near
from my_reward.ranked import shortest


def test_a_near_miss_earns_something() -> None:
    assert [near(text, "12", "") for text in ("so 12", "so 13", "10", "no idea", "9" * 5000)] == [
        1,
        0.5,
        0.25,
        0,
        0,
    ]


def test_the_shortest_right_completion_earns_most() -> None:
    texts, answers, problems = ["12", "5 + 7 = 12", "13", "7"], ["12", "12", "12", "7"], ["a", "a", "a", "b"]
    assert shortest(texts, answers, problems) == [1, 0.5, 0, 1]
