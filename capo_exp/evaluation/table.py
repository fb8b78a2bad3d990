"""Scores of models on benchmarks as a table, and as rows that figures read. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from capo_exp.core.intervals import Estimate
from capo_exp.evaluation.scores import estimate
from capo_exp.evaluation.stored import StoredScores


@dataclass(frozen=True)
class BenchmarkScore:
    """The score of one model on one benchmark."""

    model: str
    step: int | None  # Of the checkpoint; 0 = the model that training began with; None = no run
    completions: float | None  # That training had sampled by then
    benchmark: str
    card: str  # Benchmark and digest: equal ones can be compared
    scores: dict[str, Any]
    accuracies: dict[str, float]  # Problem id -> share of right samples


def results_table(results: Sequence[BenchmarkScore]) -> Table:
    """Returns a row for each benchmark of each model; the mean over benchmarks; and what training gained."""
    n = results[0].scores["samples"]
    table = Table(box=None, pad_edge=False)
    measures = (f"avg@{n} [95 %]", f"pass@{n} [95 %]", f"maj@{n} [95 %]")
    _add_columns(table, ["model", "benchmark"], ["problems", *measures, "tokens", "truncated", "no answer"])
    for own in _by_weights(results):
        model = own[0].model
        for result in own:
            table.add_row(Text(model), Text(result.benchmark), *_cells(result.scores))
        if len(own) > 1:
            table.add_row(Text(model), "TEST (mean)", "", str(test_accuracy(own)), style="bold")
        if gained := gains(own, [result for result in results if result.step == 0]):
            for name, gain in gained.items():
                table.add_row(Text(f"{model} - base"), Text(name), "", str(gain))
    return table


def _by_weights(results: Sequence[BenchmarkScore]) -> list[list[BenchmarkScore]]:
    """A run that began with another's step_000100 has a step of this name, too."""
    found: dict[tuple[str, int | None], list[BenchmarkScore]] = {}
    for result in results:
        found.setdefault((result.model, result.step), []).append(result)
    return list(found.values())


def _add_columns(table: Table, labels: Sequence[str], numbers: Sequence[str]) -> None:
    for name in labels:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)


def _cells(scores: dict[str, Any]) -> list[str]:
    n = str(scores["samples"])
    return [
        f"{scores['problems']:,}",
        str(Estimate(**scores["average"])),
        str(Estimate(**scores["pass_at"][n])),
        str(Estimate(**scores["majority_at"][n])) if scores["majority_at"] else "",
        f"{scores['completion_length']:.0f}" if "completion_length" in scores else "",
        f"{100 * scores['truncated_fraction']:.1f} %" if "truncated_fraction" in scores else "",
        f"{100 * scores['no_answer_fraction']:.1f} %",
    ]


def test_accuracy(results: Sequence[BenchmarkScore]) -> Estimate:
    """Returns the unweighted mean of avg@n over benchmarks: what the paper plots as TEST accuracy."""
    return estimate(*(np.array(list(result.accuracies.values())) for result in results))


def gains(own: Sequence[BenchmarkScore], base: Sequence[BenchmarkScore]) -> dict[str, Estimate]:
    """Returns the gain of avg@n over the base model on the same problems, by benchmark, and its mean.

    The bootstrap draws problems, each with both of its accuracies.
    """
    before = {result.benchmark: result.accuracies for result in base}
    if not own or own[0].step in (0, None) or any(result.benchmark not in before for result in own):
        return {}
    vectors = {
        (name := result.benchmark): np.array([a - before[name][key] for key, a in result.accuracies.items()])
        for result in own
    }
    each = {name: estimate(vector) for name, vector in vectors.items()}
    return each | ({"TEST (mean)": estimate(*vectors.values())} if len(vectors) > 1 else {})


def test_rows(results: Sequence[BenchmarkScore], before: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each of a run's checkpoints and its base model: its step, the completions of training
    until then, the test scores.

    Rows of earlier commands, `before`, stay unless the same step was tested by the same cards again. Those of
    equal `cards` can be compared and stand together, those of this command last.
    """
    rows: dict[tuple[tuple[str, ...], int], dict[str, Any]] = {}
    for row in (row for row in before if {"cards", "counter/rollout_step"} <= row.keys()):
        rows[tuple(row["cards"]), row["counter/rollout_step"]] = dict(row)
    for same in _by_weights([result for result in results if result.step is not None]):
        own = sorted(same, key=lambda result: result.card)
        step, cards = own[0].step or 0, [result.card for result in own]
        known = {} if own[0].completions is None else {"counter/completions": own[0].completions}
        rows.pop((tuple(cards), step), None)
        rows[tuple(cards), step] = {
            "counter/rollout_step": step,
            **known,
            "test/accuracy": test_accuracy(own).value,
            **{f"test/accuracy/{result.benchmark}": result.scores["average"]["value"] for result in own},
            "cards": cards,
        }
    newest = list(dict.fromkeys(cards for cards, _ in reversed(rows)))[::-1]
    return [rows[key] for key in sorted(rows, key=lambda key: (newest.index(key[0]), key[1]))]


def stored_table(found: Sequence[StoredScores]) -> Table:
    """Returns a row for each group of a file of completions, with its labels' accuracy where it has labels.

    pass and maj are those of the samples that each of its problems has.
    """
    table = Table(box=None, pad_edge=False)
    columns = ["problems", "samples", "avg [95 %]", "pass", "maj", "no answer"]
    if any(each.scores["by_label"] is not None for each in found):
        columns += ["by label", "false neg.", "false pos."]
    _add_columns(table, list(found[0].group), columns)
    for each in found:
        n, scores = str(each.scores["samples"]), each.scores
        problems, average, *_, no_answer = _cells(scores)
        found_at = [scores[name].get(n) for name in ("pass_at", "majority_at")]
        share, majority = ("" if at is None else f"{100 * at['value']:.1f}" for at in found_at)
        cells = [problems, n, average, share, majority, no_answer]
        if (labels := scores["by_label"]) is not None:
            cells += [f"{100 * labels:.1f}", str(scores["false_negatives"]), str(scores["false_positives"])]
        table.add_row(*map(Text, each.group.values()), *cells)
    return table
