"""One model on one benchmark, part by part, in a folder that tells what became of every problem.

FOLDER/card.json            all that the score depends on
FOLDER/parts/00000.parquet  while it is under way: the completions of the first problems, and so on;
                            00000-ungraded.parquet before the verifier has seen them
FOLDER/completions.parquet  one row a completion: text, extracted answer, verdict and its reason
FOLDER/problems.parquet     one row a problem: prompt, gold answer, how often it was solved
FOLDER/scores.json          avg@n, pass@k, maj@k with intervals; there only when all is done
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capo_exp.config.errors import ConfigError
from capo_exp.config.schema import TrainConfig
from capo_exp.core.seeds import EVALUATION, derive_seed
from capo_exp.core.types import Prompt, RolloutGroup
from capo_exp.evaluation.card import Card
from capo_exp.evaluation.scores import Row, score_rows
from capo_exp.evaluation.stored import write_rows
from capo_exp.grading.verifier import Verifier
from capo_exp.runs.files import open_regular, remove, write_json
from capo_exp.runs.lock import InProgress, is_locked, locked
from capo_exp.runs.parse import is_parquet, read_rows

Scores = dict[str, Any]
Sample = Callable[[Sequence[Prompt], int], Sequence[RolloutGroup]]
Told = Callable[[int, int, float], None]
"""(problems sampled by this command, problems done, sum of their shares of right answers)"""
POLL_SECONDS = 1.0

WRITTEN = ("card.json", "scores.json", "completions.parquet", "problems.parquet", "parts")
"""What a score leaves in its folder."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark as the model reads it."""

    config: TrainConfig
    prompts: list[Prompt]
    dropped: int  # Problems that are not asked, for their prompt is longer than `max_prompt_tokens`
    where: str  # The file or hub dataset
    verifier: Verifier  # Grades, and compares answers for maj@k


def evaluate_benchmark(
    folder: Path, card: Card, benchmark: Benchmark, sample: Sample, *, overwrite: bool, told: Told
) -> Scores:
    """Samples, grades and scores; goes on from the parts that are there; reads the scores if all is done.

    Args:
        folder: named after the card's digest, so that what is in it belongs to it.
        card: of this score.
        benchmark: what is asked.
        sample: (prompts of a part, its seed) -> their completions.
        overwrite: whether to begin again.
        told: called after each part that was not there.

    Raises:
        ConfigError: the folder cannot be written.
    """
    if not overwrite and (scores := read_scores(folder)) is not None:
        return scores
    for place in (folder, folder.parent):
        if place.is_symlink():
            raise ConfigError(f"{place} is a link, which is not followed; expected a folder, or output=DIR")
    with work_alone(folder):
        if overwrite:
            for name in WRITTEN:
                remove(folder / name)
        elif (scores := read_scores(folder)) is not None:  # another process was faster
            return scores
        write_json(folder / "card.json", card)
        rows = _answered_rows(folder / "parts", card, benchmark, sample, told)
        scores, problems = score_rows(rows, benchmark.verifier)
        for problem, prompt in zip(problems, benchmark.prompts, strict=True):
            problem["prompt"] = prompt.text
        write_rows(folder / "completions.parquet", rows)
        write_rows(folder / "problems.parquet", problems)
        write_json(folder / "scores.json", scores)
        shutil.rmtree(folder / "parts", ignore_errors=True)
    return scores


@contextmanager
def work_alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is at work in the folder, then keeps others out."""
    if is_locked(folder):
        logging.getLogger(__name__).warning("%s: another process is at it; waiting", folder)
    with ExitStack() as stack:
        while True:
            with suppress(InProgress):  # of several who wait one is first
                stack.enter_context(locked(folder))
                break
            time.sleep(POLL_SECONDS)
        yield


def _answered_rows(parts: Path, card: Card, benchmark: Benchmark, sample: Sample, told: Told) -> list[Row]:
    """Returns the rows of all parts; samples and grades those that are not on disk.

    What was sampled is on disk before it is graded, so that a verifier that fails costs no sample.
    """
    size, seed, samples = (card["sampling"][key] for key in ("problems_per_call", "seed", "samples"))
    prompts = benchmark.prompts
    parts.mkdir(exist_ok=True)
    rows: list[Row] = []
    sampled = 0
    for number, start in enumerate(range(0, len(prompts), size)):
        some = prompts[start : start + size]
        part, ungraded = (parts / f"{number:05d}{suffix}.parquet" for suffix in ("", "-ungraded"))
        fresh = not is_parquet(part)
        if fresh:
            if not is_parquet(ungraded):
                groups = sample(some, derive_seed(seed, EVALUATION, number))
                write_rows(ungraded, _rows(groups, start))
            write_rows(part, _graded(read_rows(ungraded), benchmark.verifier))
            ungraded.unlink()
        rows += read_rows(part)
        if fresh:
            sampled += len(some)
            told(sampled, start + len(some), sum(row["correct"] for row in rows) / samples)
    return rows


def read_scores(folder: Path) -> Scores | None:
    """Returns scores.json, or None before all is done; a damaged one is made anew.

    Raises:
        ConfigError: what stands there cannot be read.
    """
    try:
        with suppress(FileNotFoundError, ValueError), open_regular(folder / "scores.json") as file:
            if isinstance(found := json.loads(file.read()), dict):
                return found
    except OSError as error:
        raise ConfigError(f"{error}; remove it, or use output=DIR") from error
    return None


def _rows(groups: Sequence[RolloutGroup], start: int) -> list[Row]:
    rows: list[Row] = []
    for index, group in enumerate(groups, start):
        asked = group.prompt.problem
        for sample, given in enumerate(group.completions):
            rows.append({
                "index": index, "id": asked.id, "sample": sample, "problem": asked.problem,
                "gold": list(asked.golds), "level": asked.level, "type": asked.family,
                "completion": given.text, "tokens": len(given.token_ids), "truncated": given.truncated,
            })  # fmt: skip
    return rows


def _graded(rows: Sequence[Row], verifier: Verifier) -> list[Row]:
    texts, golds = [[row["completion"]] for row in rows], [tuple(row["gold"]) for row in rows]
    grades = verifier.score(texts, golds, [row["problem"] for row in rows]).grades
    return [{**row, **asdict(grade)} for row, (grade,) in zip(rows, grades, strict=True)]
