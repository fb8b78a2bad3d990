"""Terms beside correctness: what the text looks like and how long it is. They count in training only.

Total reward = correctness + format_weight x format + length_weight x length. A term is a function; its number
is logged on its own, also with weight 0. Group filters see correctness alone; algo.shaping (such as DAPO's
overlong punishment, which is not repeated here) gets the total. Imports no torch.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from capo_exp.config.build import build_part
from capo_exp.config.ranges import AT_LEAST_1
from capo_exp.config.schema import Part, RewardConfig
from capo_exp.grading.extract import find_last_box


def no_format(text: str) -> float:
    """Stands for no format term."""
    del text
    return 0.0


def think_then_answer(text: str) -> float:
    """Returns 1 if the text is <think> reasoning </think> and then an answer, each tag once; else 0.

    Source: the format reward of DeepSeek-R1 (arXiv 2501.12948).
    """
    once = text.count("<think>") == text.count("</think>") == 1
    return float(once and re.fullmatch(r"\s*<think>.*</think>\s*\S.*", text, re.DOTALL) is not None)


def one_box(text: str) -> float:
    r"""Returns 1 if there is exactly one \boxed{...} and its braces balance; else 0."""
    return float(text.count(r"\boxed") == 1 and bool(find_last_box(text)))


def think_then_one_box(text: str) -> float:
    """Returns 1 if think_then_answer holds and the answer, not the reasoning, has the one box; else 0."""
    return think_then_answer(text) * one_box(text.rpartition("</think>")[2])


def no_length(tokens: int) -> float:
    """Stands for no length term."""
    del tokens
    return 0.0


def brevity(tokens: int, *, max_tokens: Annotated[int, AT_LEAST_1]) -> float:
    """Returns 1 for an empty completion, falling to 0 at max_tokens: a positive weight rewards few tokens."""
    return max(0.0, 1.0 - tokens / max_tokens)


def exploration(tokens: int, *, max_tokens: Annotated[int, AT_LEAST_1]) -> float:
    """Returns 0 for an empty completion, rising to 1 at max_tokens: a positive weight pays for more thinking,
    right or wrong. Source: RLSP, arXiv 2502.06773, the simplest exploration reward; that it is linear, and
    its weight, are ours."""
    return min(1.0, tokens / max_tokens)


@dataclass(frozen=True)
class RewardTerms:
    """The terms of a run; None = there is no such term."""

    format: Callable[[str], float] | None = None
    format_weight: float = 0.0
    length: Callable[[int], float] | None = None
    length_weight: float = 0.0


def build_terms(config: RewardConfig) -> RewardTerms:
    """Builds the terms that do something.

    Raises:
        ConfigError: as build_part.
    """
    return RewardTerms(
        _build(config.format, "format", no_format),
        config.format_weight,
        _build(config.length, "length", no_length),
        config.length_weight,
    )


def measure_terms(terms: RewardTerms, completions: Sequence[tuple[str, int]]) -> dict[str, list[float]]:
    """Returns the numbers of each term there is, for completions given as text and number of tokens, by the
    key under which they are logged."""
    found: dict[str, list[float]] = {}
    if terms.format is not None:
        found["reward/format"] = [terms.format(text) for text, _ in completions]
    if terms.length is not None:
        found["reward/length"] = [terms.length(tokens) for _, tokens in completions]
    return found


def _build(part: Part, name: str, neutral: Callable[..., float]) -> Callable[..., float] | None:
    if part["_target_"] == f"{__name__}.{neutral.__name__}":
        return None
    return build_part(part, key=f"reward.{name}")
