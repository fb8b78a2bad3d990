"""The measures of docs/study/real_weights.md, from the runs.parquet that benchmarks/many_runs.py writes.

A task is a folder, with one file or more; --picture draws the curves, those of docs/study_real_weights.png
and of docs/study_evidence.png:

cd outputs/reference/smollm2
python ../../../scripts/judge_real_rates.py sums/runs.parquet max_of_three/runs.parquet --picture curves.png
python ../../../scripts/judge_real_rates.py {sums,max_of_three}/{runs,evidence}.parquet --picture curves.png

--rates draws how wrong the rate may be, one task, docs/study_rates.png:

python ../../../scripts/judge_real_rates.py sums/{runs,evidence,plain,cpu,tenth}.parquet --rates rates.png

--reach 0.6 prints how many completions each run needs to that accuracy, --shifts how well the last layer's
prediction and the rate alone say how far a step moved the policy.
"""

import argparse
import sys
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, inf, isfinite, log, log10
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import pyarrow.parquet as pq
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from capo_exp.config.schema import conf_dir
from capo_exp.figures.labels import short
from capo_exp.figures.style import DASHES, OTHER, SETTINGS, SPARE, as_bytes

STEPS, COMPLETIONS = 50, 96
PICTURE_RATE = 1e-3
FLAT = 2
"""Per cent that a curve stays below, if the caption has to say that it is there."""
LOOKS = {
    "grpo": ("GRPO", "conf", "-"),
    "grpo_large_eps": ("GRPO, Adam's eps 1e-3", SPARE[3], "-"),
    "evidence": ("GRPO, step by evidence", SPARE[7], "-"),
    "measured": ("GRPO, measured step", SPARE[4], "-"),
    "calibrated": ("GRPO, calibrated step", SPARE[0], "-"),
    "predicted": ("GRPO, predicted step", OTHER, DASHES[2]),
    "capo": ("CAPO", "conf", "-"),
    "capo_no_upper": ("CAPO, no upper bound on m_H", SPARE[2], "-"),
    "policy_bound": ("the bound on m_F alone", SPARE[1], DASHES[1]),
}
"""Method -> its label, colour and dashes in the picture; conf: the colour that every figure gives it."""

CAPTION = """Thick: the median of three seeds, of which one that was ended counts as 0 from there; thin: \
each seed. Every point is the mean of four steps. Cross: a seed was ended there, for want of reward. \
m_F, m_H: the predicted shift of a token's log-prob and of the objective, both of which CAPO bounds."""

Curves = dict[tuple[str, float, int], list[float]]
"""(method, rate, seed) -> accuracy of each step."""


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


def means(accuracies: Sequence[float]) -> dict[int, float]:
    """Returns the mean of the last four steps at each step that has four."""
    return {t: fmean(accuracies[t - 4 : t]) for t in range(4, len(accuracies) + 1)}


def measure(accuracies: Sequence[float], base: float) -> Measures:
    """Returns the measures of a whole run; steps that an early end left out count as 0."""
    a = [*accuracies, *[0.0] * (STEPS - len(accuracies))]
    m = means(a)
    final, end, peak = fmean(a[-12:]), fmean(a[-8:]), max(m.values())
    first_90 = next((t for t, value in m.items() if value >= 0.9), STEPS)
    rose = peak >= 2 * base
    return Measures(
        final=final,
        peak=peak,
        end=end,
        to_80=reach(a, 0.8),
        dips=sum(value < 0.8 for value in a[first_90:]),
        collapsed=end <= peak / 2 or (not rose and final < base / 2),
        held=rose and end >= 0.9 * peak,
    )


def reach(accuracies: Sequence[float], level: float) -> float:
    """Returns the completions until the mean of four steps is `level` for the first time; infinite if it
    never is."""
    return next((float(COMPLETIONS * t) for t, mean in means(accuracies).items() if mean >= level), inf)


def width(learning: Sequence[bool], rates: Sequence[float]) -> float:
    """Returns the decades of the longest run of neighbouring rates that learn; -1 without any."""
    runs = [(i, j) for i in range(len(rates)) for j in range(i, len(rates)) if all(learning[i : j + 1])]
    return max((log10(rates[j] / rates[i]) for i, j in runs), default=-1.0)


def read_curves(path: Path) -> Curves:
    """Returns the curves of a runs.parquet; of finished runs only."""
    columns = ["overrides", "state", "counter/rollout_step", "reward/accuracy"]
    found: dict[tuple[str, float, int], dict[int, float]] = defaultdict(dict)
    for row in pq.read_table(path, columns=columns).to_pylist():
        if row["state"] == "finished":
            values = dict(part.split("=", 1) for part in row["overrides"].split())
            own = [f"{key}={value}" for key, value in values.items() if key.startswith("algo.")]
            method = " ".join([values["experiment/study/real"], *own])
            key = (method, float(values["regime.learning_rate"]), int(values["seed"]))
            found[key][row["counter/rollout_step"]] = row["reward/accuracy"]
    return {key: [steps[t] for t in sorted(steps)] for key, steps in found.items()}


def judge_shifts(path: Path) -> list[str]:
    """Returns, for each method that measured its steps, by which factor the ratio of the measured shift to a
    prediction changes: from step to step (median and 90 % of the steps of a run), and from the first ten
    steps to the last fifteen; medians over the runs with half of their steps measured. Predicted are the last
    layer's shift and the squared rate, each by what was taken of the step."""
    names = ("optim/step_scale", "step/policy_shift_measured", "curvature/batch/policy_shift")
    columns = ["run", "overrides", "state", "optim/learning_rate", *names]
    ratios: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in pq.read_table(path, columns=columns).to_pylist():
        scale, measured, predicted = (row[name] for name in names)
        if row["state"] == "finished" and scale and measured and predicted:
            method = next(part for part in row["overrides"].split() if "study/real=" in part).split("=")[1]
            logs = log(predicted * scale**2), 2 * log(row["optim/learning_rate"] * scale)
            ratios[method][row["run"]].append((log(measured) - logs[0], log(measured) - logs[1]))
    lines = []
    for method, found in ratios.items():
        runs = [run for run in found.values() if len(run) >= STEPS / 2]
        for name, place in (("the last layer", 0), ("the squared rate", 1)):
            said: list[tuple[float, float, float]] = []
            for run in runs:
                each = [pair[place] for pair in run]
                changes = [abs(b - a) for a, b in pairwise(each)]
                drift = median(each[-15:]) - median(each[:10])
                said.append((median(changes), quantiles(changes, n=10)[-1], drift))
            if not said:
                continue
            factors = [exp(median(column)) for column in zip(*said, strict=True)]
            lines.append(f"{method}, {len(runs)} runs, {name}: {', '.join(f'{x:.3g}' for x in factors)}")
    return lines


def judge(curves: Curves) -> list[str]:
    """Returns the table of one task, a line a cell, then where each method learns."""
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
        learns = finals[method, rate] >= 0.9 * best
        fast = time <= 1.25 * fastest if isfinite(fastest) else "undefined"
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
    return lines


def draw(tasks: Mapping[str, Curves], target: Path) -> None:
    """Draws the curves at PICTURE_RATE, a panel a task: every seed thin, the median of the seeds thick."""
    with rc_context(SETTINGS):
        figure = Figure(figsize=(9.6, 5.3), layout="constrained")
        panels: list[Axes] = list(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0])
        said: list[str] = []
        for panel, (task, curves) in zip(panels, tasks.items(), strict=True):
            of = {name: [c for key, c in curves.items() if key[:2] == (name, PICTURE_RATE)] for name in LOOKS}
            of = {name: mine for name, mine in of.items() if mine}
            flat = [LOOKS[name][0] for name, mine in of.items() if _draw_method(panel, name, mine) < FLAT]
            said += [f"In {task} these lie on each other at 0: {'; '.join(flat)}."] if flat else []
            panel.set(title=f"{task}, learning rate {short(PICTURE_RATE)}", xlabel="training completions")
            panel.set(xlim=(0, COMPLETIONS * STEPS), ylim=(-3, 103))
        panels[0].set_ylabel("training accuracy, %")
        lines, labels = panels[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside upper left", ncols=4, handlelength=2.4)
        below = textwrap.fill(" ".join([CAPTION, *said]), 150)
        figure.supxlabel(below, x=0.005, ha="left", fontsize=7.5, color=OTHER)
        target.write_bytes(as_bytes(figure, "png", {"Software": "matplotlib"}))


def draw_rates(task: str, curves: Curves, target: Path) -> None:
    """Draws final accuracies over the rates: every seed a point, the median of a cell's seeds on the line."""
    cells: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (method, rate, _), curve in sorted(curves.items()):
        cells[method][rate].append(100 * measure(curve, base=0.0).final)
    with rc_context(SETTINGS):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        panel: Axes = figure.subplots()
        for method in (name for name in LOOKS if name in cells):
            label, colour, dashes = _look(method)
            found = cells[method]
            points = [(rate, final) for rate, finals in found.items() for final in finals]
            panel.plot(*zip(*points, strict=True), "o", color=colour, markersize=3, alpha=0.5)
            middle = [median(finals) for finals in found.values()]
            panel.plot(list(found), middle, color=colour, linestyle=dashes, linewidth=2, label=label)
        panel.set(xscale="log", xlabel="learning rate", ylabel="training accuracy, last 12 of 50 steps, %")
        panel.set(title=task, ylim=(-3, 103))
        figure.legend(loc="outside upper left", ncols=3, handlelength=2.4)
        target.write_bytes(as_bytes(figure, "png", {"Software": "matplotlib"}))


def _look(method: str) -> tuple[str, str, Any]:
    """Returns a method's label, colour and dashes."""
    label, colour, dashes = LOOKS[method]
    if colour == "conf":
        colour = OmegaConf.select(OmegaConf.load(conf_dir() / "algo" / f"{method}.yaml"), "colour")
    return label, colour, dashes


def _draw_method(panel: Axes, method: str, curves: Sequence[Sequence[float]]) -> float:
    """Draws means of four steps up to a run's last, which a cross marks if the run was ended early; returns
    the largest median."""
    label, colour, dashes = _look(method)
    for curve in curves:
        m = {COMPLETIONS * t: 100 * value for t, value in means(curve).items()}
        panel.plot(list(m), list(m.values()), color=colour, linestyle=dashes, linewidth=0.7, alpha=0.45)
        if len(curve) < STEPS:
            panel.plot([max(m)], [m[max(m)]], "x", color=colour, markersize=5, clip_on=False)
    last = max(len(curve) for curve in curves)
    padded = [means([*curve, *[0.0] * (last - len(curve))]) for curve in curves]
    middle = {COMPLETIONS * t: 100 * median(m[t] for m in padded) for t in padded[0]}
    panel.plot(list(middle), list(middle.values()), color=colour, linestyle=dashes, linewidth=2, label=label)
    return max(middle.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--picture", type=Path, help="where to draw the curves")
    parser.add_argument("--rates", type=Path, help="where to draw final accuracies over the rates of a task")
    parser.add_argument("--reach", type=float, help="print completions to this accuracy instead")
    parser.add_argument("--shifts", action="store_true", help="judge predictions of a step's shift instead")
    arguments = parser.parse_args()
    if arguments.shifts:
        for path in arguments.runs:
            sys.stdout.write("\n".join([f"{path}:", *judge_shifts(path)]) + "\n")
        return
    if arguments.reach:
        for path in arguments.runs:
            for (method, rate, seed), curve in sorted(read_curves(path).items()):
                needed = reach(curve, arguments.reach)
                sys.stdout.write(f"{method}, {rate:g}, {seed}: {needed:g}\n")
        return
    tasks: dict[str, Curves] = defaultdict(dict)
    files: dict[tuple[str, object], Path] = {}
    for path in arguments.runs:
        task = path.resolve().parent.name
        for run, curve in read_curves(path).items():
            if (other := files.setdefault((task, run), path)) is not path:
                raise SystemExit(f"{other} and {path} both have {run} of {task}; name one of them")
            tasks[task][run] = curve
    for task, curves in tasks.items():
        sys.stdout.write("\n".join([f"{task}:", *judge(curves)]) + "\n")
    if arguments.picture:
        draw(tasks, arguments.picture)
    if arguments.rates:
        ((task, curves),) = tasks.items()
        draw_rates(task, curves, arguments.rates)


if __name__ == "__main__":
    main()
