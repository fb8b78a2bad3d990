"""Whether a completion's answer is the gold answer: one text against another, without limits of time or
memory.

Imports no torch, and math-verify only when it is needed. rewards.py runs what can hang where it can be
killed.
"""

import logging
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

STYLES = ("auto", "boxed")


@dataclass(frozen=True)
class Grade:
    """The verdict on one completion."""

    correct: bool
    extracted: str
    """The answer found in the completion, as text; empty if none."""
    reason: str
    """correct | wrong | no_answer | gold_unparsable | error | timeout | crash."""


def grade(completion: str, gold: str, style: str = "auto") -> Grade:
    r"""Decides with math-verify whether a completion's answer equals the gold answer.

    No time limit: some answers take for ever. MathVerifier adds the limit.

    - "boxed", the paper's training reward: a box, else an announced formula ("the final answer is $5$"); the
      first match only; malformed LaTeX such as `\frac12` is not read.
    - "auto", for text that was not asked for LaTeX: the same but tolerant of malformed LaTeX, and where
      nothing is announced the library's defaults, which find a number or formula anywhere ("A: 26").

    Two differences from the authors' program. A gold that cannot be parsed earns 0 and is counted (theirs: 1,
    which makes all rewards of the group equal and so skips it). A percent sign at the end is dropped where
    math-verify 0.9 would leave the answer unread: `44\%` equals 44.

    Args:
        completion: text of the model's answer.
        gold: the answer alone, with or without $...$ around it.
        style: one of STYLES.

    Raises:
        ValueError: unknown style.

    Source: CAPO (arXiv 2510.00819), accuracy reward of the authors' repository.
    """
    if style not in STYLES:
        raise ValueError(f"unknown grading style {style!r}; known: {', '.join(STYLES)}")
    try:
        return _grade(completion, gold, style)
    except Exception:  # sympy raises nearly anything on odd input; the authors' rule is: exception -> 0
        return Grade(False, "", "error")


def _grade(completion: str, gold: str, style: str) -> Grade:
    from math_verify import verify

    targets = _extraction_targets()
    formula = _as_formula(gold)
    expected = _parse_announced(formula, targets["gold"]) or _parse(formula)
    if not expected:
        return Grade(False, "", "gold_unparsable")
    answer = _parse_announced(completion, targets[style])
    if not answer and style == "auto":
        answer = _parse(completion)
    if not answer:
        return Grade(False, "", "no_answer")
    correct = bool(verify(expected, answer, timeout_seconds=None))  # not symmetric: the gold comes first
    return Grade(correct, _text(answer), "correct" if correct else "wrong")


def _as_formula(text: str) -> str:
    r"""In $...$, for a bare \boxed{44\%} would only be read as a string."""
    text = text.strip()
    return text if len(text) > 1 and text[0] == text[-1] == "$" else f"${text}$"


def _parse(text: str, **options: Any) -> list[Any]:
    """math_verify.parse without its time-out, a Python signal that C code and threads do not obey."""
    from math_verify import parse

    return parse(text, parsing_timeout=None, **options)  # pyright: ignore[reportArgumentType]


def _parse_announced(text: str, target: Any) -> list[Any]:
    """The first match: [expression, text], or [text] if it is no formula; a final percent sign is dropped."""
    options = {"extraction_config": [target], "extraction_mode": "first_match"}
    found = _parse(text, **options)
    percentage = (
        re.fullmatch(r"(.+?)\\?%\s*", found[0], re.DOTALL) if found and found[0] == found[-1] else None
    )
    return (percentage and _parse(rf"\boxed{{{percentage[1]}}}", **options)) or found


def _text(parsed: list[Any]) -> str:
    """The matched text. Never str() of an expression: that can take for ever."""
    return next((item for item in reversed(parsed) if isinstance(item, str)), "")


@cache
def _extraction_targets() -> dict[str, Any]:
    """What counts as LaTeX, for the gold and for each style."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-out is off

    def announced(malformed_operators: bool) -> LatexExtractionConfig:
        rules = NormalizationConfig(  # the authors also set `equations`, which math-verify 0.9 always does
            nits=False, malformed_operators=malformed_operators, basic_latex=True, boxed="all", units=True
        )
        return LatexExtractionConfig(
            normalization_config=rules, boxed_match_priority=0, try_extract_without_anchor=False
        )

    return {"gold": LatexExtractionConfig(), "boxed": announced(False), "auto": announced(True)}


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} whose braces balance; None if there is none."""
    for start in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for token in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):  # \{ and \} are text, not braces
            depth += {"{": 1, "}": -1}.get(token.group(), 0)
            if depth == 0:
                return text[start : start + token.start()]
    return None


def exact_match(completion: str, answer: str) -> Grade:
    """Correct if the last boxed text equals the answer, apart from whitespace around them."""
    if not answer.strip():
        return Grade(False, "", "gold_unparsable")
    boxed = last_boxed(completion)
    if boxed is None:
        return Grade(False, "", "no_answer")
    correct = boxed.strip() == answer.strip()
    return Grade(correct, boxed.strip(), "correct" if correct else "wrong")
