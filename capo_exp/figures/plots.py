"""From the records of a run to axes. Draws on matplotlib's Agg canvas: no display, no pyplot state."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from capo_exp.core.intervals import ema
from capo_exp.figures import style
from capo_exp.figures.bands import FEW_POINTS, ended, taken
from capo_exp.figures.labels import short
from capo_exp.figures.panel import label_levels
from capo_exp.runs import metrics as names
from capo_exp.runs.read import Array, LoggedRun, load_run, read_series

NOTE = """policy: m_F, predicted for each token, nats; |objective|: the size of m_H, reward units; max, p99 \
and mean: over the tokens of a step; wide lines: the bounds beyond which the selection rejects a token"""


def plot_run(run_dir: Path | str) -> Path:
    """Draws run.png in the run directory: accuracy, predicted shifts and rejection rate over completions.

    The numbers behind it are metrics.jsonl and eval.jsonl beside it.
    """
    run = load_run(run_dir)
    with rc_context(style.SETTINGS):
        figure = Figure(figsize=(8.0, 8.6), layout="constrained")
        accuracy, shifts, rejection = figure.subplots(3, 1, sharex=True, height_ratios=[1.15, 1.15, 0.8])
        figure.suptitle(run_title(run), x=0.01, ha="left", fontsize=11, parse_math=False)
        rejection.xaxis.set_major_formatter(EngFormatter(sep=""))
        draw_accuracy(accuracy, run)
        draw_rejection(rejection, run)
        rejection.set_xlim(left=0)
        draw_shifts(shifts, run)
        rejection.set_xlabel("completions sampled for training")
        note = textwrap.fill(NOTE, 120)
        figure.supxlabel(note, x=0.01, ha="left", fontsize=7.5, color=style.OTHER, parse_math=False)
        picture = style.as_bytes(figure, "png", {"Software": "matplotlib"})
    path = run.path / "run.png"
    path.write_bytes(picture)
    return path


def run_title(run: LoggedRun) -> str:
    """Says what ran: algorithm, model, dataset; regime, learning rate, batch, seed; where it ended early."""
    subject = [str(run.setting(f"{group}.name", "?")) for group in ("algo", "model", "dataset")]
    rate = run.setting("regime.learning_rate")
    batch = [run.setting(f"regime.{key}", "?") for key in ("prompts_per_step", "group_size")]
    lines = [
        " · ".join(subject),
        f"{run.setting('regime.name', '?')} · learning rate {short(float(rate)) if rate is not None else '?'}"
        f" · {batch[0]} prompts x {batch[1]} completions a step · seed {run.setting('seed', '?')}",
    ]
    if ended(run, names.COMPLETIONS)[1]:
        lines.append(f"{outcome(run)} after {steps_done(run)} of {run.setting('num_steps')} steps")
    return "\n".join(lines)


def outcome(run: LoggedRun) -> str:
    """Says in a word or two how a run ended, such as `finished` or `stopped, no reward`."""
    unrewarded = bool(run.metrics) and bool(run.metrics[-1].get(names.UNREWARDED_STEPS))
    given_up = run.state == "finished" and unrewarded and ended(run, names.COMPLETIONS)[1]
    return "stopped, no reward" if given_up else run.state


def steps_done(run: LoggedRun) -> int:
    """Returns the last rollout step that the run has taken."""
    return int(max((row[names.STEP] for row in taken(run) if row.get(names.STEP) is not None), default=0))


def draw_accuracy(axes: Axes, run: LoggedRun) -> None:
    """Draws training accuracy, raw and smoothed, and the evaluations as points."""
    colour = style.colour(run)
    x, y = read_series(run.steps or run.metrics, names.TRAIN_ACCURACY)
    _line(axes, x, y, color=colour, linewidth=0.8, alpha=0.4)
    label, weight = ("training, each step", 1.0) if len(y) < FEW_POINTS else ("training, EMA 0.1", 0.1)
    _line(axes, x, ema(y, weight), color=colour, label=label)
    points = {"marker": "o", "markersize": 5.5, "markerfacecolor": "white", "markeredgewidth": 1.4}
    held_out = read_series(run.evaluations, names.EVAL_ACCURACY)
    _line(axes, *held_out, color="#222222", linewidth=1.0, label="held-out problems", **points)
    axes.set(ylim=(0, 1), ylabel="accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _head(axes, "Accuracy")


def draw_shifts(axes: Axes, run: LoggedRun) -> None:
    """Draws predicted shifts of single tokens on a log scale, and the bounds if the selection has any."""
    dotted, solid, dashed = {"ls": ":", "lw": 1.2}, {"ls": "-", "lw": 1.5}, {"ls": "--", "lw": 1.2}
    for shift, prefix, looks in (
        ("policy", names.POLICY_SHIFT, {"max": dotted, "p99": solid, "mean": dashed}),
        ("|objective|", names.OBJECTIVE_SHIFT, {"max": dotted, "p99": solid}),
    ):
        for name, look in looks.items():
            x, y = read_series(run.metrics, prefix + name)
            size = np.where(y == 0, np.nan, np.abs(y))  # a log scale has no 0
            _line(axes, x, size, color=style.SHIFT_COLOURS[shift], label=f"{shift} {name}", **look)
    if axes.lines:
        axes.set_yscale("log")
        axes.margins(y=0.12)
    selection = run.setting("algo.selection", {})
    keys = {"policy": ["policy_shift_max"], "|objective|": ["objective_shift_min", "objective_shift_max"]}
    bounds = {(abs(selection.get(key) or 0), shift) for shift, names in keys.items() for key in names}
    drawn = sorted((size, shift) for size, shift in bounds if size and np.isfinite(size))
    for size, shift in drawn:
        axes.axhline(size, color=style.SHIFT_COLOURS[shift], linewidth=3.5, alpha=0.28, zorder=1)
    label_levels(axes, [(y, f"bound {short(float(y))}", style.SHIFT_COLOURS[shift]) for y, shift in drawn])
    axes.set_ylabel("nats, reward units")
    _head(axes, "Predicted shifts")


def draw_rejection(axes: Axes, run: LoggedRun) -> None:
    """Draws the share of tokens that the selection left out."""
    x, total = read_series(run.metrics, names.REJECTION_RATE)
    top = np.nanmax(total, initial=0.0)
    if np.isfinite(total).any():  # an area, since one reason alone is often the total
        axes.fill_between(x, total, color=style.colour(run), alpha=0.3, linewidth=0, label="total")
    for reason, label, look in (("_policy", "policy", "--"), ("_objective", "|objective|", ":")):
        x, y = read_series(run.metrics, names.REJECTION_RATE + reason)
        if top > 0:
            _line(axes, x, y, ls=look, lw=1.5, color=style.SHIFT_COLOURS[label], label=f"by {label} shift")
    if top == 0:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color=style.OTHER)
    axes.set(ylabel="share of tokens", ylim=(0, 1.15 * top or 0.01))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _head(axes, "Rejected tokens")


def _line(axes: Axes, x: Array, y: Array, **look: Any) -> None:
    if np.isfinite(y).any():
        lone = {"marker": "."} if len(y) == 1 else {}  # a line needs two points to be seen
        axes.plot(x, y, clip_on=False, **{**lone, **look})


def _head(axes: Axes, title: str) -> None:
    """Writes the title, and below it the legend, as wide as both may be."""
    axes.set_title(title, pad=19)
    if axes.get_legend_handles_labels()[0]:
        tight = {"borderaxespad": 0.1, "borderpad": 0.1, "columnspacing": 1.1}
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, **tight)
