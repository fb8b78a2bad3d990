"""Which samples of a problem gave the same answer, for maj@k. Knows nothing of the gold answer."""

from collections.abc import Sequence
from fractions import Fraction

from capo_exp.grading.verifier import Verifier

MAX_COMPARED = 200
"""Characters; a longer answer is the same as another only as text."""


def number_answers(answers: Sequence[Sequence[str]], verifier: Verifier) -> list[list[int]]:
    r"""Numbers the answers of each problem so that equal ones, by the verifier, have the same number.

    In rounds: the first answer of a problem that has no class yet founds one, and all others without a class
    are compared with it, those of all problems in one call.

    Args:
        answers: of each problem, the extracted answer of each sample; "" = none, class -1.
        verifier: judges `\boxed{answer}` against the founder.
    """
    found = [{text: -1 for text in texts if not text} for texts in map(_distinct, answers)]
    pending = [[text for text in texts if text] for texts in map(_distinct, answers)]
    while any(pending):
        founders = [texts[0] if texts else "" for texts in pending]
        rest = [texts[1:] for texts in pending]
        same = _same(founders, rest, verifier)
        for known, founder, others, equal in zip(found, founders, rest, same, strict=True):
            if founder:
                number = max(known.values(), default=-1) + 1
                known |= {founder: number}
                known |= {text: number for text, alike in zip(others, equal, strict=True) if alike}
        pending = [
            [text for text, alike in zip(others, equal, strict=True) if not alike]
            for others, equal in zip(rest, same, strict=True)
        ]
    return [[known[text.strip()] for text in texts] for known, texts in zip(found, answers, strict=True)]


def _number(text: str) -> Fraction | None:
    """`1,234`, `0.5` or `1/2` as a number; two numbers need no verifier."""
    try:
        return Fraction(text.replace(",", "")) if text.isascii() and len(text) <= MAX_COMPARED else None
    except (ValueError, ZeroDivisionError):
        return None


def _distinct(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(text.strip() for text in texts))


def _same(founders: list[str], rest: list[list[str]], verifier: Verifier) -> list[list[bool]]:
    known = [
        [_at_once(founder, text) for text in others] for founder, others in zip(founders, rest, strict=True)
    ]
    asked = [
        [rf"\boxed{{{text}}}" for text, same in zip(others, decided, strict=True) if same is None]
        for others, decided in zip(rest, known, strict=True)
    ]
    verdicts = verifier.score(asked, [(founder or "0",) for founder in founders]).grades
    judged = [iter(grades) for grades in verdicts]
    return [
        [next(grades).correct if same is None else same for same in decided]
        for grades, decided in zip(judged, known, strict=True)
    ]


def _at_once(founder: str, text: str) -> bool | None:
    """Whether two different texts are the same answer, where that takes no verifier; None where it does."""
    if max(len(founder), len(text)) > MAX_COMPARED:
        return False
    numbers = _number(founder), _number(text)
    return None if None in numbers else numbers[0] == numbers[1]
