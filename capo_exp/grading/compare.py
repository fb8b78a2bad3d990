"""Whether a completion's answer is the gold answer: one text against another, without limits of time or
memory; verifier.py runs what can hang where it can be killed.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from capo_exp.grading.extract import (
    Answer,
    find_last_box,
    gold_has_text,
    read_answer,
    read_boxes_side_by_side,
    read_gold,
)

LONGEST = 1_000_000  # characters read, from the end: twice what 128,000 tokens come to
STYLES = ("auto", "boxed", "gsm8k", "final_answer")
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\\[dt]?frac\{-?\d+\}\{\d+\})")


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

    There is no time limit, and some answers take for ever: MathVerifier adds the limit.

    The answer is the last box whose braces balance. Without one it is what the style declares:

    - "boxed", the paper's training reward: an announced formula ("the final answer is $5$"); malformed LaTeX
      such as `\frac12` is not read, in a box neither.
    - "auto", for text that was not asked for LaTeX: the same but tolerant of malformed LaTeX, and where
      nothing is announced the library's defaults, which find a number or formula anywhere ("A: 26").
    - "gsm8k": what follows the last ####.
    - "final_answer": what follows the last "answer is" or "Answer:", with or without LaTeX.

    Several boxes side by side are one answer of several parts if the gold is one, too. 50\% is 50 and 0.5.

    Differences from the authors' program. A gold that cannot be parsed earns 0 and is counted (theirs: 1,
    which makes all rewards of the group equal and so skips it; see MathVerifier's unparsable_gold). The last
    box counts, not all boxes close to it. An answer that is the gold letter by letter is correct, even if it
    cannot be read. Forms that math-verify 0.9 misreads are put right first (extract.py); docs/BENCHMARKS.md
    has the agreement with known labels.

    Args:
        completion: the model's answer as text.
        gold: the answer alone, with or without $...$ around it.
        style: one of STYLES.

    Raises:
        ValueError: the style is unknown.

    Source: CAPO (arXiv 2510.00819), accuracy reward of the authors' repository.
    """
    if style not in STYLES:
        raise ValueError(f"unknown grading style {style!r}; known: {', '.join(STYLES)}")
    try:
        return _grade(completion[-LONGEST:], gold, style)
    except Exception:  # sympy raises nearly anything on odd input; the authors' rule is: exception -> 0
        return Grade(False, "", "error")


def grade_any(completion: str, golds: Sequence[str], style: str = "auto") -> Grade:
    """Grades against several ways to write the gold answer; any of them counts."""
    return choose_best(grade(completion, gold, style) for gold in golds)


def choose_best(grades: Iterable[Grade]) -> Grade:
    """Returns the first that is correct, else the first whose gold could be read, else the first."""
    every = list(grades) or [Grade(False, "", "gold_unparsable")]
    readable = [one for one in every if one.reason != "gold_unparsable"]
    return next((one for one in readable if one.correct), (readable or every)[0])


def is_plain_number(gold: str) -> bool:
    """Returns whether a gold answer is a number or a fraction of numbers, as half of MATH's; these need no
    parser."""
    return _NUMBER.fullmatch(gold) is not None


def can_read_gold(gold: str) -> bool:
    """Returns whether grade can read a gold answer, as a formula or as a word."""
    if is_plain_number(gold):
        return True
    try:
        return gold_has_text(gold)
    except Exception:
        return False


def _grade(completion: str, gold: str, style: str) -> Grade:
    from sympy.core.random import seed

    seed(0)  # sympy settles some comparisons with random numbers
    expected = read_gold(gold)
    if expected is None:
        return Grade(False, "", "gold_unparsable")
    if (box := find_last_box(completion)) is not None and box.strip() == gold.strip().strip("$"):
        return Grade(True, box.strip(), "correct")  # also what the style cannot read
    answer = read_answer(completion, style)
    if answer is None:
        return Grade(False, "", "no_answer")
    if _equal(expected, answer):
        return Grade(True, answer.text, "correct")
    joined = read_boxes_side_by_side(completion, style) if _SEPARATOR.search(gold) else None
    if joined is not None and _equal(expected, joined):
        return Grade(True, joined.text, "correct")
    return Grade(False, answer.text, "wrong")


_SEPARATOR = re.compile(r"[,;]|\b(?:and|or)\b")


def _equal(gold: Answer, answer: Answer) -> bool:
    r"""Returns whether two answers are equal: 50\% equals 50 and 0.5, but 0.5\% does not equal 50\%."""
    from latex2sympy2_extended.latex2sympy2 import convert_to_pct
    from math_verify import verify
    from sympy import Expr

    golds, answers = list(gold.found), list(answer.found)
    if gold.percent != answer.percent:
        side = golds if gold.percent else answers
        side += [convert_to_pct(found) for found in side[:1] if isinstance(found, Expr)]
    return bool(verify(golds, answers, timeout_seconds=None))  # not symmetric: the gold comes first


def last_number_match(completion: str, answer: str) -> Grade:
    """Grades as correct if the last number of the text is the answer, a whole number.

    An expression that equals the answer is not the answer: whoever accepts one trains a model to repeat the
    question (docs/study/real_weights.md).
    """
    numbers = re.findall(r"(?<![\d.])-?\d[\d,]*(?:\.\d+)?", completion)
    if not numbers:
        return Grade(False, "", "no_answer")
    last = numbers[-1].replace(",", "")
    correct = last == answer.strip()
    return Grade(correct, last, "correct" if correct else "wrong")


def exact_match(completion: str, answer: str) -> Grade:
    """Grades as correct if the last boxed text equals the answer, apart from whitespace around them."""
    if not answer.strip():
        return Grade(False, "", "gold_unparsable")
    boxed = find_last_box(completion)
    if boxed is None:
        return Grade(False, "", "no_answer")
    correct = boxed.strip() == answer.strip()
    return Grade(correct, boxed.strip(), "correct" if correct else "wrong")
