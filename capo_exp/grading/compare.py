"""Whether a completion's answer is the gold answer: one text against another, without limits of time or
memory; verifier.py runs what can hang where it can be killed.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from capo_exp.grading.extract import find_last_box, has_minus, read_answer, read_boxes_side_by_side
from capo_exp.grading.reading import PLAIN_NUMBER, Answer, read_formula, read_gold
from capo_exp.grading.spelling import find_letter, moments_differ, plain_text, split_parts, units_differ

LONGEST = 1_000_000  # characters read, from the end: twice what 128,000 tokens come to
STYLES = ("auto", "boxed", "gsm8k", "final_answer")


@dataclass(frozen=True)
class Grade:
    """The verdict on one completion."""

    correct: bool
    extracted: str
    """The answer found in the completion, as text; empty if none."""
    reason: str
    """correct | wrong | no_answer | gold_unparsable | error | timeout | crash."""


def grade(completion: str, gold: str, style: str = "auto") -> Grade:
    r"""Decides whether a completion's answer equals the gold answer, as math-verify reads both.

    There is no time limit, and some answers take for ever: MathVerifier adds the limit.

    The answer is the last box whose braces balance. Without one it is what the style declares:

    - "boxed", the paper's training reward: an announced formula ("the final answer is $5$"); malformed LaTeX
      such as `\frac12` is not read, in a box neither.
    - "auto", for text that was not asked for LaTeX: the same but tolerant of malformed LaTeX, then what
      follows "answer is" or a heading, then a number or formula anywhere ("A: 26").
    - "gsm8k": what follows the last ####.
    - "final_answer": what follows the last "answer is" or "Answer:", with or without LaTeX.

    What is exact is compared exactly, a decimal to the digits of the gold (equal.py). Spelling, units, dates
    and labels: spelling.py. A gold that is a plain number wants a number, not a sum or product that gives it,
    since a model that earns for those learns to repeat the question; fractions, roots and powers may stay.
    Several boxes side by side are one answer of several parts if the gold is one, too.

    Differences from the authors' program. A gold that cannot be parsed earns 0 and is counted (theirs: 1,
    which makes all rewards of the group equal and so skips it; see MathVerifier's unparsable_gold). The last
    box counts, not all boxes close to it. An answer that is the gold letter by letter is correct, even if it
    cannot be read. docs/BENCHMARKS.md has the agreement with known labels.

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
    return PLAIN_NUMBER.fullmatch(gold) is not None


def can_read_gold(gold: str) -> bool:
    """Returns whether grade can read a gold answer, as a formula or as a word."""
    try:
        return is_plain_number(gold) or read_gold(gold) is not None
    except Exception:
        return False


def _grade(completion: str, gold: str, style: str) -> Grade:
    from sympy.core.random import seed

    seed(0)  # sympy settles some comparisons with random numbers
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-out is off
    expected = read_gold(gold)
    if expected is None:
        return Grade(False, "", "gold_unparsable")
    box = find_last_box(completion)
    if box is not None and box.strip() == gold.strip().strip("$") and not has_minus(completion, box):
        return Grade(True, box.strip(), "correct")  # also what the style cannot read
    answer = read_answer(completion, style)
    if answer is None:
        return Grade(False, "", "no_answer")
    if _equal(expected, answer):
        return Grade(True, answer.body, "correct")
    joined = read_boxes_side_by_side(completion, style) if _SEPARATOR.search(gold) else None
    if joined is not None and _equal(expected, joined):
        return Grade(True, joined.body, "correct")
    return Grade(False, answer.body, "wrong")


_SEPARATOR = re.compile(r"[,;]|\b(?:and|or)\b")
_ARITHMETIC = re.compile(r"(?:[\d.,\s(){}*/^+-]|\\(?:[dt]?frac|times|div|cdot)){1,200}")
_OPERATOR = re.compile(r"[\d)}]\s*(?:[-+*]|\\(?:times|div|cdot(?!\s*\())(?!\s*10\s*\^))")


def _equal(gold: Answer, answer: Answer) -> bool:
    r"""Returns whether two answers are equal: 50\% equals 50 and 0.5, but 0.5\% does not equal 50\%."""
    if (different := moments_differ(gold.text, answer.text)) is not None:
        return not different
    one, other = plain_text(gold.text), plain_text(answer.text)
    word = gold.value is None or (one.isalpha() and len(one) > 2)  # also True and ODD, which can be formulas
    spaced = re.sub(r",\s+", ",", one) == re.sub(r",\s+", ",", other)  # 70,110 may be a list
    if spaced or (word and len(one) > 1 and one.lower() == other.lower()):
        return True
    if len(one) == 1 and one == find_letter(answer.text):
        return True
    if units_differ(gold.unit, answer.unit) or (is_plain_number(gold.body) and _is_unevaluated(answer.body)):
        return False
    if gold.labels or answer.labels:
        return _equal_by_label(gold, answer)
    return gold.value is not None and answer.value is not None and _equal_values(gold, answer)


def _is_unevaluated(body: str) -> bool:
    """Returns whether an answer is a sum or product of numbers: 94 + 85 repeats the question of 179."""
    last = body.rpartition("=")[2]
    return _ARITHMETIC.fullmatch(last) is not None and _OPERATOR.search(last) is not None


def _equal_values(gold: Answer, answer: Answer) -> bool:
    from sympy import Expr

    from capo_exp.grading.equal import equal, exact

    if gold.percent == answer.percent or not (
        isinstance(gold.value, Expr) and isinstance(answer.value, Expr)
    ):
        return equal(gold.value, answer.value)
    share = answer.percent and gold.value.is_number and abs(gold.value) < 1  # 0.25 is not 0.25 percent
    if not share and equal(gold.value, answer.value):
        return True
    if gold.percent:
        return equal(exact(gold.value) / 100, answer.value)
    return equal(gold.value, exact(answer.value) / 100)


def _equal_by_label(gold: Answer, answer: Answer) -> bool:
    """Compares what each label says; without labels their order counts, in a gold list none."""
    if gold.labels and answer.labels:
        golds, answers = gold.labels, answer.labels
        return golds.keys() == answers.keys() and all(_equal_texts(golds[key], answers[key]) for key in golds)
    labels, bare = (gold.labels, answer) if gold.labels else (answer.labels, gold)
    parts = split_parts(re.sub(r"^(?:\\\{|\()(.*?)(?:\\\}|\))$", r"\1", bare.body))
    if len(parts) != len(labels):
        return False
    if gold.labels:
        return all(map(_equal_texts, labels.values(), parts))
    if bare.body.startswith("("):
        return all(map(_equal_texts, parts, (labels[key] for key in sorted(labels))))
    return all(any(_equal_texts(part, said) for said in labels.values()) for part in parts)


def _equal_texts(gold: str, answer: str) -> bool:
    one, other = read_formula(gold), read_formula(answer)
    return one is not None and other is not None and _equal(one, other)


def last_number_match(completion: str, answer: str) -> Grade:
    """Grades as correct if the last number of the text is the answer, a whole number.

    An expression that equals the answer is not the answer: whoever accepts one trains a model to repeat the
    question (docs/study/real_weights.md).
    """
    numbers = re.findall(r"(?<![\d.])-?\d[\d,]*(?:\.\d+)?", completion.replace("\u2212", "-"))
    if not numbers:
        return Grade(False, "", "no_answer")
    last, wanted = (re.sub(r"\.0+$", "", each.strip().replace(",", "")) for each in (numbers[-1], answer))
    correct = last == wanted
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
