"""Whether a problem that is trained on is also one that is evaluated on."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

from capo_exp.core.types import Problem

_UNSEEN = re.compile(
    r"(?P<line_break>\\\\)"
    r"|\\(?:[,:;!>/ ()\[\]]|(?:q?quad|enspace|thinspace|medspace|thickspace|negthinspace)(?![a-zA-Z]))"
    r"|[$~\s]"
)


def normalise(question: str) -> str:
    r"""Returns a question without what does not change what it asks.

    - Unicode as NFKC, which makes one of a full-width or a superscript digit and the digit
    - upper case as lower case
    - no white space
    - no LaTeX spacing: `\,` `\:` `\;` `\!` `\>` `\/` `\ ` `~` `\quad` `\qquad` `\enspace` `\thinspace` ...
    - no marks around formulas: `$`, `\(`, `\)`, `\[`, `\]`

    The line break `\\` stays, and so do all words, numbers and signs.
    """
    text = unicodedata.normalize("NFKC", question).casefold()
    return _UNSEEN.sub(lambda match: match["line_break"] or "", text)


def find_overlap(train: Sequence[Problem], evaluation: Sequence[Problem]) -> list[tuple[int, int]]:
    """Returns all pairs (index in train, index in evaluation) that ask the same by `normalise`, in order."""
    places: dict[str, list[int]] = defaultdict(list)
    for index, problem in enumerate(evaluation):
        places[normalise(problem.problem)].append(index)
    return [
        (index, other)
        for index, problem in enumerate(train)
        for other in places.get(normalise(problem.problem), ())
    ]


def count_repeated(problems: Sequence[Problem]) -> int:
    """Returns how many problems ask the same as an earlier one."""
    return len(problems) - len({normalise(problem.problem) for problem in problems})
