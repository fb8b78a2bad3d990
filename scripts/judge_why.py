"""The table of docs/study/real_why.md, from the runs.parquet that benchmarks/many_runs.py writes.

cd outputs/reference/smollm2
python ../../../scripts/judge_why.py sums/why.parquet
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pyarrow.parquet as pq

Row = Mapping[str, Any]
STEPS, LAST = 25, 10
LOST, LEARNS = 0.02, 0.10
"""Final accuracies below and from which the criterion speaks."""
PAIRS = {
    "probability of a token": ("rejected/probability", "kept/probability"),
    "frequency of its id in the step": ("rejected/frequency", "kept/frequency"),
    "place in the completion": ("rejected/position", "kept/position"),
    "with A < 0": ("rejected/negative", "kept/negative"),
    "gradient, kept over all: cosine, norm": ("gradient/cosine", "gradient/norm_ratio"),
    "update after Adam, kept over all: cosine, norm": ("update/cosine", "update/norm_ratio"),
    "policy shift, nats a token: real, every token kept": ("policy_shift", "policy_shift_unmasked"),
    "gain of the surrogate: real, every token kept": ("gain", "gain_unmasked"),
    "log-prob of rejected tokens with A < 0: real, every token kept": (
        "log_prob_change/rejected_negative", "log_prob_change_unmasked/rejected_negative",
    ),
}  # fmt: skip
"""What the table calls two metrics of a diagnosed step; rejected and kept tokens stand in this order."""


def read(path: Path) -> dict[tuple[str, int], list[Row]]:
    """Returns the rows of each finished run, by method and seed, in the order of the file."""
    found: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in pq.read_table(path).to_pylist():
        if row["state"] == "finished":
            values = dict(part.split("=", 1) for part in row["overrides"].split())
            found[values["experiment/study/real"], int(values["seed"])].append(row)
    return dict(found)


def final(rows: Sequence[Row]) -> float:
    """Returns F, the mean accuracy of the last steps; those that an early end left out count as 0."""
    accuracies = [row["reward/accuracy"] for row in rows]
    return fmean([*accuracies, *[0.0] * (STEPS - len(rows))][-LAST:])


def verdict(value: float) -> str:
    """Says what the criterion calls a run with this F."""
    return "lost" if value < LOST else "learns" if value >= LEARNS else "neither"


def table(runs: Mapping[tuple[str, int], Sequence[Row]]) -> list[str]:
    """Returns the table, a line a measure, a column a run; diagnosed steps without reward do not count."""
    asked = {
        key: [row for row in rows if row.get("diagnosis/policy_shift") is not None and row["reward/accuracy"]]
        for key, rows in runs.items()
    }

    def line(name: str, tell: Callable[[tuple[str, int]], str]) -> str:
        return f"| {name} | {' | '.join(tell(key) for key in runs)} |"

    def of_runs(metric: str, places: int = 2) -> Callable[[tuple[str, int]], str]:
        return lambda key: f"{_median(runs[key], metric):.{places}f}"

    def of_diagnosed(*metrics: str) -> Callable[[tuple[str, int]], str]:
        return lambda key: " / ".join(_tell(_median(asked[key], f"diagnosis/{m}")) for m in metrics)

    return [
        line("run, seed", lambda key: f"`{key[0]}`, {key[1]}"),
        line("---", lambda _: "---"),
        line("F", lambda key: f"{final(runs[key]):.3f}, {verdict(final(runs[key]))}"),
        line("entropy, all steps", of_runs("policy/entropy")),
        line("length, all steps", of_runs("rollout/completion_length/mean", 1)),
        line("tokens rejected, all steps", of_runs("selection/rejection_rate")),
        line("diagnosed steps", lambda key: str(len(asked[key]))),
        line("their part of the signal, sum of abs(A) (1 - p)", of_diagnosed("rejected/signal_share")),
        *(line(name, of_diagnosed(*metrics)) for name, metrics in PAIRS.items()),
    ]


def _median(rows: Sequence[Row], name: str) -> float:
    values = [row[name] for row in rows if row.get(name) is not None and isfinite(row[name])]
    return median(values) if values else float("nan")


def _tell(value: float) -> str:
    return f"{value:.2g}" if isfinite(value) else "-"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    sys.stdout.write("\n".join(table(read(parser.parse_args().runs))) + "\n")


if __name__ == "__main__":
    main()
