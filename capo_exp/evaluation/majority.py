"""Which samples of a problem gave the same answer, for maj@k. Knows nothing of the gold answer."""

import re
from collections.abc import Sequence
from fractions import Fraction

from capo_exp.grading.verifier import Verifier

MAX_COMPARED = 200
"""Characters; a longer answer is the same as another only as text."""


def number_answers(answers: Sequence[Sequence[str]], verifier: Verifier) -> list[list[int]]:
    r"""Numbers the answers of each problem so that equal ones, by the verifier, have the same number.

    In rounds: the first answer of a problem that has no class yet founds one, and all others without a class
    are compared with it, those of all problems in one call, as `\boxed{answer}`.

    Args:
        answers: of each problem, the extracted answer of each sample; "" = none, class -1.
        verifier: judges an answer against the founder of a class.
    """
    known = [{"": -1} for _ in answers]
    pending = [list(dict.fromkeys(text.strip() for text in texts if text.strip())) for texts in answers]
    while any(pending):
        founders = [texts[0] if texts else "" for texts in pending]
        rest = [texts[1:] for texts in pending]
        same = _same(founders, rest, verifier)
        for classes, founder, others, alike in zip(known, founders, rest, same, strict=True):
            if founder:
                number = max(classes.values()) + 1
                classes |= {text: number for text, equal in zip(others, alike, strict=True) if equal}
                classes[founder] = number
        pending = [[text for text in texts if text not in c] for texts, c in zip(rest, known, strict=True)]
    return [[classes[text.strip()] for text in texts] for classes, texts in zip(known, answers, strict=True)]


def _same(founders: list[str], rest: list[list[str]], verifier: Verifier) -> list[list[bool]]:
    pairs = list(zip(founders, rest, strict=True))
    known = [[_at_once(founder, text) for text in others] for founder, others in pairs]
    asked = [
        [rf"\boxed{{{text}}}" for text, same in zip(others, decided, strict=True) if same is None]
        for others, decided in zip(rest, known, strict=True)
    ]
    judged = map(iter, verifier.score(asked, [(founder or "0",) for founder in founders]).grades)
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


def _number(text: str) -> Fraction | None:
    """Reads `1,234`, `0.5` or `1/2`; no exponent, of which a few digits make a number of gigabytes."""
    found = re.fullmatch(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/0*[1-9]\d*)?", text, re.ASCII)
    try:
        return Fraction(text.replace(",", "")) if found else None
    except ValueError:  # 0.5/2
        return None
