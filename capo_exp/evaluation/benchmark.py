"""One model on one benchmark, part by part, in a folder that tells what became of every problem.

FOLDER/card.json            all that the score depends on
FOLDER/parts/00000.parquet  while it is under way: the completions of the first problems, and so on
FOLDER/completions.parquet  one row a completion: text, extracted answer, verdict and its reason
FOLDER/problems.parquet     one row a problem: prompt, gold answer, how often it was solved
FOLDER/scores.json          avg@n, pass@k, maj@k with intervals; there only when all is done
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capo_exp.core.seeds import EVALUATION, derive_seed
from capo_exp.core.types import Prompt
from capo_exp.evaluation.card import Card
from capo_exp.evaluation.draw import Answered
from capo_exp.evaluation.scores import score_rows
from capo_exp.evaluation.stored import read_rows, write_rows
from capo_exp.grading.verifier import Verifier
from capo_exp.runs.files import write_atomic
from capo_exp.runs.lock import is_locked, locked

Scores = dict[str, Any]
Answer = Callable[[Sequence[Prompt], int], list[Answered]]
Told = Callable[[int, int, float], None]
"""(problems sampled by this command, problems done, sum of their shares of right answers)"""
POLL_SECONDS = 1.0


def evaluate_benchmark(
    folder: Path,
    card: Card,
    prompts: Sequence[Prompt],
    answer: Answer,
    verifier: Verifier,
    *,
    overwrite: bool,
    told: Told,
) -> Scores:
    """Samples, grades and scores; goes on from the parts that are there; reads the scores if all is done.

    Args:
        folder: named after the card's digest, so that what is in it belongs to it.
        card: of this score.
        prompts: the benchmark.
        answer: (prompts of a part, its seed) -> their graded completions.
        verifier: compares answers for maj@k.
        overwrite: whether to begin again.
        told: called after each part that was sampled.

    Raises:
        ConfigError: the folder cannot be written.
    """
    if not overwrite and (scores := read_scores(folder)) is not None:
        return scores
    with work_alone(folder):
        if overwrite:
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != ".lock":
                    path.unlink()
        elif (scores := read_scores(folder)) is not None:  # another process was faster
            return scores
        write_atomic(folder / "card.json", json.dumps(card, indent=2, default=str) + "\n")
        rows = _answered_rows(folder / "parts", card, prompts, answer, told)
        scores, problems = score_rows(rows, verifier)
        for problem, prompt in zip(problems, prompts, strict=True):
            problem["prompt"] = prompt.text
        write_rows(folder / "completions.parquet", rows)
        write_rows(folder / "problems.parquet", problems)
        write_atomic(folder / "scores.json", json.dumps(scores, indent=2) + "\n")
        shutil.rmtree(folder / "parts", ignore_errors=True)
    return scores


@contextmanager
def work_alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is at work in the folder, then keeps others out."""
    waiting = False
    while is_locked(folder):
        if not waiting:
            logging.getLogger(__name__).warning("%s: another process is at it; waiting", folder)
        waiting = True
        time.sleep(POLL_SECONDS)
    with locked(folder):
        yield


def _answered_rows(
    parts: Path, card: Card, prompts: Sequence[Prompt], answer: Answer, told: Told
) -> list[dict[str, Any]]:
    """Returns the rows of all parts; samples those that are not on disk."""
    size, seed = card["sampling"]["problems_per_call"], card["sampling"]["seed"]
    parts.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    sampled = 0
    for number, start in enumerate(range(0, len(prompts), size)):
        part, some = parts / f"{number:05d}.parquet", prompts[start : start + size]
        fresh = not part.exists()
        if fresh:
            write_rows(part, _rows(answer(some, derive_seed(seed, EVALUATION, number)), start))
        rows += read_rows(part)
        if fresh:
            sampled += len(some)
            right = sum(row["correct"] for row in rows) / card["sampling"]["samples"]
            told(sampled, start + len(some), right)
    return rows


def read_scores(folder: Path) -> Scores | None:
    """Returns scores.json, or None before all is done."""
    path = folder / "scores.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _rows(answered: Sequence[Answered], start: int) -> list[dict[str, Any]]:
    return [
        {
            "index": start + i,
            "id": each.prompt.problem.id,
            "sample": sample,
            "problem": each.prompt.problem.problem,
            "gold": list(each.prompt.problem.golds),
            "level": each.prompt.problem.level,
            "type": each.prompt.problem.family,
            "completion": completion.text,
            "tokens": len(completion.token_ids),
            "truncated": completion.truncated,
            "extracted": grade.extracted,
            "correct": grade.correct,
            "reason": grade.reason,
        }
        for i, each in enumerate(answered)
        for sample, (completion, grade) in enumerate(zip(each.completions, each.grades, strict=True))
    ]
