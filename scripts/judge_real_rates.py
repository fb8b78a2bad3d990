"""The measures of docs/study/real_weights.md, from the runs.parquet that benchmarks/many_runs.py writes.

python scripts/judge_real_rates.py outputs/reference/smollm2/runs.parquet
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log10
from pathlib import Path
from statistics import fmean, median

import pyarrow.parquet as pq

STEPS, COMPLETIONS = 50, 96


@dataclass(frozen=True)
class Measures:
    """What the criterion says of one run."""

    final: float
    peak: float
    end: float
    """Mean of the last eight steps."""
    to_80: float
    """Completions; infinite if four steps never reach 80 %."""
    dips: int
    collapsed: bool
    held: bool


def measure(accuracies: Sequence[float], base: float) -> Measures:
    """Returns the measures of a whole run; steps that an early end left out count as 0."""
    a = [*accuracies, *[0.0] * (STEPS - len(accuracies))]
    m = {t: fmean(a[t - 4 : t]) for t in range(4, STEPS + 1)}
    final, end, peak = fmean(a[-12:]), fmean(a[-8:]), max(m.values())
    first_80 = next((t for t, value in m.items() if value >= 0.8), inf)
    first_90 = next((t for t, value in m.items() if value >= 0.9), STEPS)
    rose = peak >= 2 * base
    return Measures(
        final=final,
        peak=peak,
        end=end,
        to_80=COMPLETIONS * first_80,
        dips=sum(value < 0.8 for value in a[first_90:]),
        collapsed=end <= peak / 2 or (not rose and final < base / 2),
        held=rose and end >= 0.9 * peak,
    )


def width(learning: Sequence[bool], rates: Sequence[float]) -> float:
    """Returns the decades of the longest run of neighbouring rates that learn; -1 without any."""
    runs = [(i, j) for i in range(len(rates)) for j in range(i, len(rates)) if all(learning[i : j + 1])]
    return max((log10(rates[j] / rates[i]) for i, j in runs), default=-1.0)


def read_curves(path: Path) -> dict[tuple[str, float, int], list[float]]:
    """Returns (method, rate, seed) -> accuracy of each step; of finished runs only."""
    columns = ["overrides", "state", "counter/rollout_step", "reward/accuracy"]
    found: dict[tuple[str, float, int], dict[int, float]] = defaultdict(dict)
    for row in pq.read_table(path, columns=columns).to_pylist():
        if row["state"] == "finished":
            values = dict(part.split("=", 1) for part in row["overrides"].split())
            method = values["experiment/study/real"]
            key = (method, float(values["regime.learning_rate"]), int(values["seed"]))
            found[key][row["counter/rollout_step"]] = row["reward/accuracy"]
    return {key: [steps[t] for t in sorted(steps)] for key, steps in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    curves = read_curves(parser.parse_args().runs)
    base = fmean(value for curve in curves.values() for value in curve[:2])
    cells: dict[tuple[str, float], list[Measures]] = defaultdict(list)
    for (method, rate, _), curve in sorted(curves.items()):
        cells[method, rate].append(measure(curve, base))
    finals = {cell: median(one.final for one in found) for cell, found in cells.items()}
    fastest = min(
        (median(m.to_80 for m in found) for (name, _), found in cells.items() if name == "grpo"), default=inf
    )
    best = max(finals.values())
    lines = [f"base {base:.3f}, best median F {best:.3f}, smallest C of grpo {fastest:g} completions"]
    lines.append("method, rate, seeds, F (median), P, end, C (median), dips, collapsed, held, learns, fast")
    for (method, rate), found in sorted(cells.items()):
        n, time = len(found), median(one.to_80 for one in found)
        learns, fast = finals[method, rate] >= 0.9 * best, time <= 1.25 * fastest
        counts = [sum(one.collapsed for one in found), sum(one.held for one in found)]
        lines.append(
            f"{method}, {rate:g}, {n}, {finals[method, rate]:.3f}, {median(m.peak for m in found):.3f}, "
            f"{median(m.end for m in found):.3f}, {time:g}, {fmean(m.dips for m in found):.1f}, "
            f"{counts[0]}/{n}, {counts[1]}/{n}, {learns}, {fast}"
        )
    rates = sorted({rate for _, rate in cells})
    for method in sorted({name for name, _ in cells}):
        learning = [
            finals.get((method, rate), 0.0) >= 0.9 * best for rate in rates
        ]  # a missing cell does not
        at = ", ".join(f"{rate:g}" for rate, yes in zip(rates, learning, strict=True) if yes)
        lines.append(f"{method} learns at {at or 'no rate'}: {width(learning, rates):.2f} decades")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
