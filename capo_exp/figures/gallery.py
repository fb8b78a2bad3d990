"""Every figure by its name, and those that the paper does not have: from a study to panels."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

from capo_exp.config.errors import ConfigError, suggest
from capo_exp.figures import paper
from capo_exp.figures.bars import bars, heat
from capo_exp.figures.labels import method
from capo_exp.figures.lines import Told, lines
from capo_exp.figures.panel import Level, Panel
from capo_exp.figures.paper import COMPARED, EXTENT, HELD_OUT, RANKED, REJECTED, TRAINING, TRAINS, trains
from capo_exp.figures.per_run import settings_table, stages
from capo_exp.figures.stats import FEW
from capo_exp.figures.study import Lacking, Metric, Study
from capo_exp.figures.tokens import tokens
from capo_exp.runs.read import LoggedRun

BENCHMARKS = Metric("test/accuracy", "accuracy on benchmarks", "percent")
SHARE = replace(TRAINING, label="share of seeds", limits=(-0.05, 1.05))
UNTIL = replace(TRAINING, label="training completions", unit="completions", limits=(0, None))
AREA = replace(TRAINING, label="mean training accuracy")
DIFFERENCE = replace(TRAINING, label="difference of mean accuracy, points", unit="points")


def figure_accuracy(study: Study) -> list[Panel]:
    """Draws training and held-out accuracy of every curve, with the sample-efficiency factor."""
    drawn = study.choose(trains, TRAINS)
    training = lines(study, drawn, TRAINING, "Training accuracy", RANKED)
    return [training, lines(study, drawn, HELD_OUT, "Held-out accuracy", COMPARED)]


def figure_calibration(study: Study) -> list[Panel]:
    """Draws the rank correlation of predicted with measured shifts over training (table 5)."""
    titles = {
        "policy_shift/spearman": "m_F with the measured KL",
        "policy_shift/last_layer_spearman": "m_F with the last layer's KL",
        "entropy/spearman": "Control: entropy with the measured KL",
        "objective_shift/spearman": "m_H with the measured change",
        "objective_shift/last_layer_spearman": "m_H with the last layer's change",
    }
    drawn, rank = study.choose(trains, TRAINS), "Spearman's rank correlation"
    told = Told(summary=("mean",), levels=(Level("no relation", 0.0),))
    panels = [
        lines(study, drawn, Metric(f"calibration/{name}", rank, smoothing=0.1), title, told)
        for name, title in titles.items()
    ]
    ratio = Metric("calibration/ratio", "ratio", smoothing=0.1, log=True)
    told = replace(told, levels=(Level("as predicted", 1.0),))
    return [*panels, lines(study, drawn, ratio, "Measured over predicted KL", told)]


def figure_constraint(study: Study) -> list[Panel]:
    """Draws the bound on the policy shift alone, on the objective shift alone, or both."""

    def is_bounded(run: LoggedRun) -> bool:
        return (
            run.setting("algo.selection._target_") == "capo_exp.algorithms.capo.shift_bounds"
            and run.setting("algo.variant", "") in ("", "policy_bound", "objective_bound")
            and not run.setting("algo.step_rule_name")
            and run.setting("curvature.optimizer_model") == "adam"
            and trains(run)
        )

    def has_one_bound(run: LoggedRun) -> bool:
        bounds = ("policy_shift_max", "objective_shift_max")
        return any(run.setting(f"algo.selection.{bound}") == inf for bound in bounds)

    wanted = {"algo.selection.policy_shift_max": "= inf or algo.selection.objective_shift_max = inf"}
    panels, rejected = [], replace(EXTENT, heading=REJECTED.label)
    for name, mine in paper.by_algorithm(study, is_bounded, has_one_bound, wanted).items():
        panels.append(lines(study, mine, TRAINING, name, paper.OF_PANELS))
        panels.append(lines(study, mine, paper.FROM_ZERO, f"{name}: rejected tokens", rejected))
    return panels


def figure_criterion(study: Study) -> list[Panel]:
    """Draws seeds that collapsed or kept their peak, rejected tokens, accuracy: what docs/STUDY.md asks."""
    bar = partial(bars, study, study.choose(trains, TRAINS))
    return [
        bar(SHARE, "Collapsed seeds", "collapsed"),
        bar(SHARE, "Seeds that kept their peak", "kept"),
        bar(REJECTED, "Rejected tokens", "mean"),
        bar(TRAINING, "Peak", "max"),
        bar(TRAINING, "Final", "final"),
        bar(AREA, "Area under the curve", "auc"),
        bar(DIFFERENCE, "Lead over plain GRPO", "lead", "Lead over plain GRPO, points"),
    ]


def figure_stability(study: Study) -> list[Panel]:
    """Draws the share of seeds that collapsed, when, worst and final accuracy, area under the curve."""
    bar = partial(bars, study, study.choose(trains, TRAINS))
    return [
        bar(SHARE, "Collapsed seeds", "collapsed"),
        bar(UNTIL, "First collapse", "first_collapse"),
        bar(AREA, "Area under the curve", "auc"),
        bar(TRAINING, "Peak", "max"),
        bar(TRAINING, "Worst after the peak", "worst"),
        bar(TRAINING, "Final", "final"),
    ]


def figure_methods(study: Study) -> list[Panel]:
    """Draws what each method ends with, how soon it is at 90 %, and whether it collapses."""
    bar = partial(bars, study, study.choose(trains, TRAINS))
    return [
        bar(HELD_OUT, "Held-out, final", "last"),
        bar(TRAINING, "Training, final", "final"),
        bar(UNTIL, "Until 90 %", "until_good"),
        bar(SHARE, "Collapsed seeds", "collapsed"),
    ]


def figure_regimes(study: Study) -> list[Panel]:
    """Draws final and worst accuracy over learning rate and batch, one row for each method."""
    groups = paper.grouped(study.choose(trains, TRAINS), lambda curve: method(curve.run) or curve.label)
    panels = [
        heat(study, mine, TRAINING, f"{name}: {measure} accuracy", measure)
        for name, mine in groups.items() if len(mine) > 1
        for measure in ("final", "worst")
    ]  # fmt: skip
    if not panels:
        raise Lacking("needs a method with more than one learning rate or batch")
    return panels


def figure_metrics(study: Study, keys: Sequence[str] = ()) -> list[Panel]:
    """Draws any metrics: keys=policy/entropy,... chooses them; without it those of a healthy run."""
    drawn = study.choose(trains, TRAINS)
    shown = {
        "Entropy": Metric("policy/entropy", "nats"),
        "Gradient norm": Metric("policy/grad_norm", "before clipping", log=True),
        "Length of a completion": Metric("rollout/completion_length/mean", "tokens"),
        "Truncated completions": Metric("rollout/truncated_fraction", "share of completions", "percent"),
        "Groups without a signal": Metric("advantage/zero_group_fraction", "share of prompts", "percent"),
        "Sampler against learner, KL": Metric("mismatch/kl_k3", "k3 (nats)", log=True),
    }
    asked = {key: Metric(key, key) for key in keys} or shown
    return [lines(study, drawn, replace(m, smoothing=0.2), title, Told()) for title, m in asked.items()]


def figure_rejected_tokens(study: Study) -> list[Panel]:
    """Draws which tokens a selection rejects, and how often relative to their count."""
    return [tokens(curve) for curve in study.choose(paper.selects, paper.SELECTS)]


def figure_settings(study: Study) -> list[Panel]:
    """Draws regimes, bounds and training settings of each curve (tables 2 to 4)."""
    return [settings_table(study.choose(trains, TRAINS), "Settings")]


def figure_test(study: Study) -> list[Panel]:
    """Draws mean avg@n over the benchmarks that checkpoints were evaluated on (the paper's TEST)."""
    drawn = study.choose(trains, TRAINS)
    last = [run.evaluations[-1] for run in study.runs if trains(run) and run.evaluations]
    cards = Counter(", ".join(row["cards"]) for row in last if "cards" in row)
    if len(cards) > 1:
        seen = "; ".join(f"{card} ({count} run{'s' * (count > 1)})" for card, count in cards.items())
        wanted = "expected the same: evaluate them by one command"
        raise Lacking(f"runs tested by different cards: {seen}; {wanted}")
    return [lines(study, drawn, BENCHMARKS, "Mean over benchmarks", RANKED)]


def figure_time(study: Study) -> list[Panel]:
    """Draws where the time of a rollout step goes, and curvature's share of it (table 1)."""
    return [stages(study, study.choose(trains, TRAINS), "Time of a step")]


@dataclass(frozen=True)
class FigureSpec:
    """One figure that can be asked for."""

    title: str
    panels: Callable[..., list[Panel]]
    """From a study; `figure_metrics` also takes keys. Its docstring is the figure's line in --help."""
    columns: int = 2  # Panels beside each other
    caption: str = ""
    """What stands before the seeds, the band and the smoothing."""
    alias: str = ""


NORMS = "Of several updates at one x the gradient norm is the mean; the largest is the largest of these."
HEIGHT = "The area is the mean height of the curve."
COLLAPSE = f"""A seed has collapsed when its smoothed accuracy has lost half of what it had gained at its \
peak, and more than noise would take (of fewer than {FEW} values noise is not known, and can do it alone)"""
FIRST = "First collapse is the median over the seeds that collapsed."
SHIFTS = """What the last-layer model predicts: m_F, half the square of the change of a sampled token's \
log-prob, and m_H, the change of the objective, in runs before 2026-11-26 by the authors' formula."""
RANKS = """Rank correlation over the tokens of one step. \
The last layer's shift is what the step would have done alone there."""
WILSON = "the interval of the share is Wilson's."
UNTIL_GOOD = """Until 90 % is where smoothed training accuracy is there first; where not every \
seed gets there, how many do."""
KEPT = """and has kept its peak when it ends with nine tenths of that accuracy; \
intervals of shares are Wilson's."""
LEAD = """The lead is a curve's area less that of plain GRPO at its best learning rate outside the \
conservative regime, paired by seed: 95 % t interval, same batch, over the x both have."""
TOKENS = """The tokens rejected most often, by the share of their occurrences that was rejected."""
SHARES = "The bar is the mean over steps and seeds; in brackets is the interval of the seconds."
WORST = "Worst is the lowest accuracy after the peak; no run has the hatched cells."
BOUNDS = """A selection bounds the predicted shifts m_F and m_H. \
What is empty does not bind, or is no key of the method."""
FIGURES = {
    "1": FigureSpec("Training accuracy", paper.figure_1),
    "2": FigureSpec("Training and held-out accuracy", paper.figure_2),
    "3": FigureSpec("Predicted shifts", paper.figure_3, caption=SHIFTS),
    "4": FigureSpec("CAPO's selection on three base methods", paper.figure_4),
    "5": FigureSpec("Rejected tokens", paper.figure_5, 3, alias="rejection"),
    "6": FigureSpec("Model of the optimiser", paper.figure_6, 3),
    "7": FigureSpec("Passes over a batch and PPO's clip", paper.figure_7),
    "8": FigureSpec("KL to the reference", paper.figure_8, caption=NORMS),
    "accuracy": FigureSpec("Accuracy", figure_accuracy),
    "calibration": FigureSpec("Predicted against measured shifts", figure_calibration, 3, RANKS),
    "constraint": FigureSpec("Which bound", figure_constraint),
    "criterion": FigureSpec("Criterion", figure_criterion, 4, f"{COLLAPSE}, {KEPT} {HEIGHT} {LEAD}"),
    "methods": FigureSpec("Methods", figure_methods, 4, f"{UNTIL_GOOD} {COLLAPSE}; {WILSON}"),
    "metrics": FigureSpec("Health of training", figure_metrics, 3),
    "regimes": FigureSpec("Regimes", figure_regimes, caption=WORST),
    "rejected_tokens": FigureSpec("Rejected tokens", figure_rejected_tokens, 3, TOKENS, "tokens"),
    "settings": FigureSpec("Settings", figure_settings, caption=BOUNDS),
    "stability": FigureSpec("Stability", figure_stability, 3, f"{COLLAPSE}; {WILSON} {FIRST} {HEIGHT}"),
    "test": FigureSpec("Accuracy on benchmarks", figure_test, 1, alias="TEST"),
    "time": FigureSpec("Time of a step", figure_time, 1, SHARES),
}
"""Every figure by its name, those of the paper first."""


def find_figure(name: str) -> str:
    """Returns the name of the figure with a name or alias.

    Raises:
        ConfigError: there is none.
    """
    for known, spec in FIGURES.items():
        if name and name in (known, spec.alias):
            return known
    every = [*FIGURES, *(spec.alias for spec in FIGURES.values() if spec.alias), "all"]
    raise ConfigError(f"figure={name}: no such figure; {suggest(name, every)}")
