"""Whether a problem that is trained on is also one that is evaluated on."""

import re
import unicodedata
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


def find_overlap(problems: Sequence[Problem], others: Sequence[Problem]) -> set[int]:
    """Returns the indices of the problems that one of the others asks, too, by `normalise`."""
    asked = {normalise(other.problem) for other in others}
    return {index for index, problem in enumerate(problems) if normalise(problem.problem) in asked}


def count_repeated(problems: Sequence[Problem]) -> int:
    """Returns how many problems ask the same as an earlier one."""
    return len(problems) - len({normalise(problem.problem) for problem in problems})
