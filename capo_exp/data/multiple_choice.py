"""Multiple-choice problem sets (GPQA): the choices stand below the question, and the answer is a letter."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

from capo_exp.config.errors import ConfigError
from capo_exp.data.math_problems import as_text, check_columns, is_own, own_problems, to_problems
from capo_exp.data.rows import Problems, read_table, require

ASK = "Answer with the letter of the right choice."
"""Part of the question, since no prompt style can know that a letter is wanted."""


def problems(
    split: str,
    *,
    path: str | None,
    name: str,
    hub_id: str | None,
    hub_config: str | None,
    hub_revision: str | None,
    columns: Mapping[str, str],
    wrong: Sequence[str],
    seed: int,
    hub_split: str | None = None,
) -> Problems:
    """One split in the order of its source, with the choices of each question in an order of its own.

    The order depends on the seed and the row's place in the source and on nothing else. A row that lacks a
    choice is unusable.

    Args:
        split: see math_problems.problems, as for the others that are not here. A file with this project's own
            columns, whose questions show their choices and whose answers are letters, is taken as it is.
        path: see there.
        name: see there.
        hub_id: see there.
        hub_config: see there.
        hub_revision: see there.
        columns: see there; `answer` is the column of the right choice's text.
        wrong: columns of the other choices.
        seed: of the order.
        hub_split: see there.

    Raises:
        ConfigError: as math_problems.problems; no wrong choices, or too many.
    """
    check_columns(columns)
    if not 0 < len(wrong) < len(ascii_uppercase):
        raise ConfigError(f"got dataset.source.wrong={list(wrong)}, expected columns of the wrong choices")
    table = read_table(
        split,
        path=path,
        name=name,
        hub_id=hub_id,
        hub_config=hub_config,
        hub_revision=hub_revision,
        hub_split=hub_split,
    )
    if is_own(table):
        return own_problems(table, f"{name}/{split}")
    require(table, {*columns.values(), *wrong}, "; change dataset.path or dataset.source.columns")
    rows = [_lettered(row, columns, wrong, f"{seed}/{index}") for index, row in enumerate(table.rows)]
    return to_problems(replace(table, rows=rows), columns, str, f"{name}/{split}")


def _lettered(
    row: Mapping[str, Any], columns: Mapping[str, str], wrong: Sequence[str], seed: str
) -> dict[str, Any]:
    """The row with its choices in the question, and the letter of the right one as its answer."""
    right, question = columns["answer"], columns["problem"]
    choices = [right, *wrong]
    random.Random(seed).shuffle(choices)
    texts = [as_text(row[choice]).strip() for choice in choices]
    shown = "\n".join(f"{letter}) {text}" for letter, text in zip(ascii_uppercase, texts, strict=False))
    answer = ascii_uppercase[choices.index(right)] if all(texts) else ""
    asked = as_text(row[question]).strip()
    return {**row, question: f"{asked}\n\n{shown}\n\n{ASK}" if asked else "", right: answer}
