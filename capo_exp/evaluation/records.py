"""Rows of completions as parquet, and the scores that they add up to. Imports no torch."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from capo_exp.evaluation.majority import classes
from capo_exp.evaluation.scores import Solved, estimate, summary
from capo_exp.grading.verifier import Verifier
from capo_exp.runs.files import replace_file

Row = dict[str, Any]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """One parquet file, whole or not there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with replace_file(path) as partial:
        pq.write_table(pa.Table.from_pylist(list(rows)), partial, compression="zstd")


def read_rows(path: Path) -> list[Row]:
    """All rows of a parquet file."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read().to_pylist()


def scores_of(rows: Sequence[Row], verifier: Verifier) -> tuple[Row, list[Row]]:
    """Scores of graded completions, and a row for each problem.

    Args:
        rows: of whole problems: id, correct, extracted, reason, gold; where known tokens, truncated, level,
            type.
        verifier: compares answers with each other for maj@k.

    Returns:
        scores.json, and problems.parquet in the order in which problems first appear.
    """
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["index"]].append(row)
    answers = [[row["extracted"] for row in group] for group in groups.values()]
    solved = [
        Solved(tuple(row["correct"] for row in group), tuple(numbers))
        for group, numbers in zip(groups.values(), classes(answers, verifier), strict=True)
    ]
    problems = [_problem(group, each) for group, each in zip(groups.values(), solved, strict=True)]
    reasons = Counter(row["reason"] for row in rows)
    scores = {
        "problems": len(groups),
        "samples": min(map(len, groups.values())),
        **summary(solved),
        "no_answer_fraction": reasons["no_answer"] / len(rows),
        "reasons": dict(sorted(reasons.items())),
        "by_level": _by(problems, "level"),
        "by_type": _by(problems, "type"),
    }
    for name, column in (("completion_length", "tokens"), ("truncated_fraction", "truncated")):
        if all(row.get(column) is not None for row in rows):
            scores[name] = fmean(row[column] for row in rows)
    return scores, problems


def _problem(group: Sequence[Row], solved: Solved) -> Row:
    first = group[0]
    votes = Counter(number for number in solved.classes if number >= 0)
    most = votes.most_common(1)[0][0] if votes else None
    return {
        "id": first["id"],
        "problem": first.get("problem"),
        "gold": first["gold"],
        "level": first.get("level"),
        "type": first.get("type"),
        "samples": len(group),
        "correct": sum(solved.correct),
        "accuracy": fmean(solved.correct),
        "majority_answer": "" if most is None else group[solved.classes.index(most)]["extracted"],
        "majority_votes": 0 if most is None else votes[most],
        "different_answers": len(votes),
    }


def _by(problems: Sequence[Row], column: str) -> dict[str, Row]:
    """avg@n of each value of a column; empty where all problems have the same."""
    values = sorted({str(problem[column] or "") for problem in problems})
    if len(values) < 2:
        return {}
    groups = {value: [p["accuracy"] for p in problems if str(p[column] or "") == value] for value in values}
    return {
        value: {"problems": len(group), **vars(estimate(np.array(group)))} for value, group in groups.items()
    }
