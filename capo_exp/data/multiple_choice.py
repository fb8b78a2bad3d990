"""Multiple-choice problem sets (GPQA): the choices stand below the question, and the answer is a letter."""

import random
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Annotated

from capo_exp.config.errors import error
from capo_exp.config.ranges import AT_LEAST_0
from capo_exp.data.math_problems import as_text
from capo_exp.data.rows import Rows

ASK = "Answer with the letter of the right choice."
"""Part of the question, since no prompt style can know that a letter is wanted."""


def letter_choices(
    rows: Rows, columns: Mapping[str, str], *, wrong: Sequence[str], seed: Annotated[int, AT_LEAST_0]
) -> Rows:
    """Puts the choices into each question, in an order of its own; the right one's letter is the answer.

    The order depends on the seed and the row's place in the source and on nothing else. A row that lacks a
    choice has no answer, and so is unusable. Files with this project's own columns do not come here: their
    questions show the choices, and their answers are letters.

    Args:
        rows: as the source has them.
        columns: `answer` is the column of the right choice's text.
        wrong: columns of the other choices.
        seed: of the order.

    Raises:
        ConfigError: no wrong choices, too many, or none of that name.
    """
    absent = [name for name in wrong if rows and name not in rows[0]]
    if not 0 < len(wrong) < len(ascii_uppercase) or absent:
        there = f" among {', '.join(rows[0])}" if rows else ""
        raise error("dataset.source.choices.wrong", list(wrong), f"columns of the wrong choices{there}")
    right, question = columns["answer"], columns["problem"]
    lettered: Rows = []
    for index, row in enumerate(rows):
        choices = [right, *wrong]
        random.Random(f"{seed}/{index}").shuffle(choices)
        texts = [as_text(row[choice]).strip() for choice in choices]
        shown = "\n".join(f"{letter}) {text}" for letter, text in zip(ascii_uppercase, texts, strict=False))
        answer = ascii_uppercase[choices.index(right)] if all(texts) else ""
        asked = as_text(row[question]).strip()
        lettered.append({**row, question: f"{asked}\n\n{shown}\n\n{ASK}" if asked else "", right: answer})
    return lettered
