"""Every figure: one function each, from a study to panels.

Smoothing and start points of the CAPO paper's figures are those of the authors' scripts.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any

from capo_exp.config.errors import ConfigError, suggest
from capo_exp.figures.bars import bars, cell_of, heat
from capo_exp.figures.curves import Curve
from capo_exp.figures.labels import algorithm, is_safe, method
from capo_exp.figures.lines import lines
from capo_exp.figures.panel import Level, Panel
from capo_exp.figures.per_run import settings_table, stages
from capo_exp.figures.study import Lacking, Metric, Study
from capo_exp.figures.tokens import tokens
from capo_exp.runs.read import LoggedRun

Fits = Callable[[LoggedRun], bool]
TRAINING = Metric("reward/accuracy", "training accuracy", "percent", smoothing=0.1, start=True)
HELD_OUT = Metric("eval/accuracy", "held-out accuracy", "percent")
FROM_START = replace(HELD_OUT, smoothing=0.35, start=True)
BENCHMARKS = Metric("test/accuracy", "accuracy on benchmarks", "percent")
REJECTED = Metric("selection/rejection_rate", "share of tokens", "percent")
SHARE = replace(TRAINING, label="share of seeds")
AREA = replace(TRAINING, label="mean training accuracy")
WHOLE = (-0.05, 1.05)
RHO = "Spearman's rank correlation"
LABELS = {
    **{metric.key: metric.label for metric in (TRAINING, HELD_OUT, BENCHMARKS, REJECTED)},
    **dict.fromkeys((f"{REJECTED.key}_policy", f"{REJECTED.key}_objective"), REJECTED.label),
}
"""What stands at the axis of a metric that figure=metrics was asked for."""
SELECTING = ("CAPO", "Dr. CAPO", "ReinCAPO")
BASES = ("GRPO", "Dr. GRPO", "REINFORCE")
TRAINS = {"regime.learning_rate": "not 0"}
SELECTS = {"algo.selection._target_": "not keep_all"}


def trains(run: LoggedRun) -> bool:
    """Returns whether a run's weights move: those at learning rate 0 are start points, no curves."""
    return run.setting("regime.learning_rate") != 0


def is_plain(run: LoggedRun, labels: Sequence[str]) -> bool:
    """Returns whether a run trains one of these methods with nothing on top of it: its label says so."""
    return method(run) in labels and trains(run)


def selects(run: LoggedRun) -> bool:
    """Returns whether a run's selection may reject tokens."""
    return not str(run.setting("algo.selection._target_")).endswith(".keep_all")


def _named(labels: Sequence[str]) -> dict[str, str]:
    return {"method": f"= {'|'.join(labels)}"}


def _plain(study: Study, labels: Sequence[str]) -> list[Curve]:
    return study.choose(lambda run: is_plain(run, labels), _named(labels) | TRAINS)


def _by_algorithm(study: Study, fits: Fits, needed: Fits, wanted: dict[str, str]) -> dict[str, list[Curve]]:
    """Returns the curves of the algorithms of which some have what is needed."""
    groups = grouped(study.choose(fits, wanted), lambda curve: algorithm(curve.run))
    found = {name: mine for name, mine in groups.items() if any(needed(curve.run) for curve in mine)}
    if not found:
        raise Lacking(study.explain_lack(wanted))
    return found


compared = partial(lines, reference="end", summary=("final", "max"))
"""Draws curves with the line of the reference's end."""
ranked = partial(compared, efficiency=True)
"""Says also how soon they reach it."""


def _both(study: Study, drawn: Sequence[Curve]) -> list[Panel]:
    training = ranked(study, drawn, TRAINING, "Training accuracy")
    return [training, ranked(study, drawn, FROM_START, "Held-out accuracy")]


def figure_1(study: Study) -> list[Panel]:
    """Draws training accuracy of GRPO, GRPO (A) and CAPO, with the sample-efficiency factor."""
    return [ranked(study, _plain(study, ("GRPO", "CAPO")), TRAINING, "Training accuracy")]


def figure_2(study: Study) -> list[Panel]:
    """Draws figure 1 with Dr. GRPO and REINFORCE, and accuracy on held-out problems."""
    return _both(study, _plain(study, ("CAPO", *BASES)))


def figure_3(study: Study) -> list[Panel]:
    """Draws predicted shifts m_F and m_H of tokens and of the update, with the reference's maximum."""
    drawn = _plain(study, (*SELECTING, *BASES))
    panels = []
    for shift, unit, log in (("policy", "m_F (nats)", True), ("objective", "m_H (reward units)", False)):
        for key, of in ((f"token/{shift}_shift/mean", "a token"), (f"batch/{shift}_shift", "the update")):
            metric = Metric(f"curvature/{key}", unit, smoothing=0.35, log=log)
            title = f"{shift.capitalize()} shift of {of}"
            panels.append(lines(study, drawn, metric, title, reference="max", summary=("max", "mean")))
    return panels


def figure_4(study: Study) -> list[Panel]:
    """Draws CAPO's selection added to GRPO, Dr. GRPO and REINFORCE, against these bases."""
    chosen = study.choose(
        lambda run: is_plain(run, (*SELECTING, *BASES)) and not is_safe(run),
        _named((*SELECTING, *BASES)) | {"regime.name": "not conservative"} | TRAINS,
    )
    if not any(method(curve.run) in SELECTING for curve in chosen):
        raise Lacking(study.explain_lack(_named(SELECTING)))
    return _both(study, chosen)


def figure_5(study: Study) -> list[Panel]:
    """Draws the share of tokens that a selection rejects, in all and by reason."""
    drawn = study.choose(selects, SELECTS)
    shown = partial(lines, study, drawn, summary=("max", "mean"), limits=(0, None))
    by_reason = [
        shown(replace(REJECTED, key=f"{REJECTED.key}_{reason}"), f"Because of the {reason} shift")
        for reason in ("policy", "objective")
    ]
    return [shown(REJECTED, "Rejected for any reason"), *by_reason]


def figure_6(study: Study) -> list[Panel]:
    """Draws Adam's or SGD's step in the last-layer model, against no selection; a panel for each base."""

    def fits(run: LoggedRun, label: str, base: str) -> bool:
        return is_plain(run, (label, f"{label} sgd model")) or (is_plain(run, (base,)) and not is_safe(run))

    pairs = list(zip(SELECTING, BASES, strict=True))
    wanted = _named(SELECTING) | {"curvature.optimizer_model": "= sgd"}
    drawn = study.choose(lambda run: any(fits(run, *pair) for pair in pairs), wanted)
    panels = []
    for label, base in pairs:
        mine = [curve for curve in drawn if fits(curve.run, label, base)]
        panel = lines(study, mine, TRAINING, label.replace(". ", "."), reference="end")
        models = {c.run.setting("curvature.optimizer_model") for c in mine if method(c.run) != base}
        lack = "" if "sgd" in models else study.explain_lack(wanted)
        panels.append(replace(panel, series=(), lack=lack) if lack else panel)
    return panels


def figure_7(study: Study) -> list[Panel]:
    """Draws several passes over each batch with PPO's clip, one panel for each number of passes."""
    drawn = study.choose(
        lambda run: (run.setting("algo.num_iterations") or 0) > 1 and trains(run),
        {"algo.num_iterations": "> 1"},
    )
    metric = replace(TRAINING, x="counter/optimizer_step")
    by_passes = grouped(drawn, lambda curve: curve.run.setting("algo.num_iterations"))
    shown = partial(compared, study, metric=metric, heading=metric.label)
    return [shown(drawn=by_passes[n], title=f"{n} passes") for n in sorted(by_passes)]


def figure_8(study: Study) -> list[Panel]:
    """Draws a KL penalty in place of CAPO's selection, and the largest gradient norm."""

    def has_kl(run: LoggedRun) -> bool:
        return (run.setting("algo.kl_coefficient") or 0) > 0 and trains(run)

    def fits(run: LoggedRun) -> bool:
        return has_kl(run) or (is_plain(run, ("GRPO", "Dr. GRPO")) and not is_safe(run))

    norm = Metric("policy/grad_norm", "norm before clipping", log=True)
    panels = []
    for name, mine in _by_algorithm(study, fits, has_kl, {"algo.kl_coefficient": "> 0"}).items():
        panels.append(compared(study, mine, TRAINING, name, heading=TRAINING.label))
        title, heading = f"{name}: largest gradient norm", f"{norm.label}, max"
        panels.append(bars(study, mine, norm, title, "max", heading=heading))
    return panels


def figure_accuracy(study: Study) -> list[Panel]:
    """Draws training and held-out accuracy of every curve, with the sample-efficiency factor."""
    drawn = study.choose(trains, TRAINS)
    training = ranked(study, drawn, TRAINING, "Training accuracy")
    return [training, compared(study, drawn, HELD_OUT, "Held-out accuracy")]


def figure_calibration(study: Study) -> list[Panel]:
    """Draws the rank correlation of predicted with measured shifts over training (table 5)."""
    drawn = study.choose(trains, TRAINS)
    titles = {
        "policy_shift/spearman": "m_F with the measured KL",
        "policy_shift/last_layer_spearman": "m_F with the last layer's KL",
        "entropy/spearman": "Control: entropy with the measured KL",
        "objective_shift/spearman": "m_H with the measured change",
        "objective_shift/last_layer_spearman": "m_H with the last layer's change",
        "ratio": "Measured over predicted KL",
    }
    panels = []
    for name, title in titles.items():
        is_ratio = name == "ratio"
        label, level = ("ratio", "as predicted") if is_ratio else (RHO, "no relation")
        metric = Metric(f"calibration/{name}", label, smoothing=0.1, log=is_ratio)
        levels = [Level(level, float(is_ratio))]
        panels.append(lines(study, drawn, metric, title, levels=levels, summary=("mean",)))
    return panels


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
    rejected = partial(lines, limits=(0, None), summary=("max", "mean"), heading=REJECTED.label)
    panels = []
    for name, mine in _by_algorithm(study, is_bounded, has_one_bound, wanted).items():
        panels.append(compared(study, mine, TRAINING, name, heading=TRAINING.label))
        panels.append(rejected(study, mine, REJECTED, f"{name}: rejected tokens"))
    return panels


def figure_criterion(study: Study) -> list[Panel]:
    """Draws seeds that collapsed or kept their peak, rejected tokens, accuracy: what docs/STUDY.md asks."""
    drawn = study.choose(trains, TRAINS)
    rivals = [c for c in study.curves if is_plain(c.run, ("GRPO",)) and not is_safe(c.run)]
    bar = partial(bars, study, drawn)
    return [
        bar(SHARE, "Collapsed seeds", "collapsed", limits=WHOLE),
        bar(SHARE, "Seeds that kept their peak", "kept", limits=WHOLE),
        bar(REJECTED, "Rejected tokens", "mean"),
        bar(TRAINING, "Peak", "peak"),
        bar(TRAINING, "Final", "final"),
        bar(AREA, "Area under the curve", "auc"),
        bar(AREA, "Lead over plain GRPO", "lead", rivals=rivals),
    ]


def figure_stability(study: Study) -> list[Panel]:
    """Draws the share of seeds that collapsed, when, worst and final accuracy, area under the curve."""
    bar = partial(bars, study, study.choose(trains, TRAINS))
    when = replace(TRAINING, label="training completions", unit="completions")
    return [
        bar(SHARE, "Collapsed seeds", "collapsed", limits=WHOLE),
        bar(when, "First collapse", "first_collapse", limits=(0, None)),
        bar(AREA, "Area under the curve", "auc"),
        bar(TRAINING, "Peak", "peak"),
        bar(TRAINING, "Worst after the peak", "worst"),
        bar(TRAINING, "Final", "final"),
    ]


def figure_regimes(study: Study) -> list[Panel]:
    """Draws final and worst accuracy over learning rate and batch, one row for each method."""
    groups = grouped(study.choose(trains, TRAINS), lambda curve: method(curve.run) or curve.label)
    panels = []
    for name, mine in groups.items():
        if len({cell_of(curve) for curve in mine}) > 1 or len(mine) > 1:
            for measure in ("final", "worst"):
                options = {"heading": f"{TRAINING.label}, {measure}"}
                panels.append(heat(study, mine, TRAINING, f"{name}: {measure} accuracy", measure, **options))
    if not panels:
        raise Lacking("needs a method with more than one learning rate or batch")
    return panels


def figure_metrics(study: Study, keys: Sequence[str] = ()) -> list[Panel]:
    """Draws any metrics: keys=policy/entropy,... chooses them; without it those of a healthy run."""
    drawn = study.choose(trains, TRAINS)
    share: dict[str, Any] = {"unit": "percent", "smoothing": 0.2}
    shown = {
        "Entropy": Metric("policy/entropy", "nats", smoothing=0.2),
        "Gradient norm": Metric("policy/grad_norm", "before clipping", smoothing=0.2, log=True),
        "Length of a completion": Metric("rollout/completion_length/mean", "tokens", smoothing=0.2),
        "Truncated completions": Metric("rollout/truncated_fraction", "share of completions", **share),
        "Groups without a signal": Metric("advantage/zero_group_fraction", "share of prompts", **share),
        "Sampler against learner, KL": Metric("mismatch/kl_k3", "k3 (nats)", smoothing=0.2, log=True),
    }
    asked = {key: Metric(key, LABELS.get(key, key), smoothing=0.2) for key in keys}
    return [lines(study, drawn, metric, title) for title, metric in (asked or shown).items()]


def figure_rejected_tokens(study: Study) -> list[Panel]:
    """Draws which tokens a selection rejects, and how often relative to their count."""
    return [tokens(curve) for curve in study.choose(selects, SELECTS)]


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
    return [ranked(study, drawn, BENCHMARKS, "Mean over benchmarks")]


def figure_time(study: Study) -> list[Panel]:
    """Draws where the time of a rollout step goes, and curvature's share of it (table 1)."""
    return [stages(study, study.choose(trains, TRAINS), "Time of a step")]


def grouped(drawn: Sequence[Curve], by: Callable[[Curve], Any]) -> dict[Any, list[Curve]]:
    """Groups curves by a value, in the order of the curves."""
    groups: dict[Any, list[Curve]] = {}
    for curve in drawn:
        groups.setdefault(by(curve), []).append(curve)
    return groups


@dataclass(frozen=True)
class FigureSpec:
    """One figure that can be asked for."""

    title: str
    panels: Callable[..., list[Panel]]
    """From a study; `figure_metrics` also takes keys. Its docstring is the figure's line in --help."""
    columns: int = 2
    """Panels beside each other."""
    caption: str = ""
    """What stands before the seeds, the band and the smoothing."""
    alias: str = ""


HEIGHT = "The area is the mean height of the curve."
COLLAPSE = """A seed has collapsed when its smoothed accuracy has lost half of what it had gained at its \
peak, and more than noise would take"""
SHIFTS = """Shifts that the last-layer model predicts; \
of the update token by token, in runs before 2026-11-26 by the authors' formula. \
The dashed line is the largest value of the reference's curve."""
RANKS = """Rank correlation over the tokens of one step. \
The last layer's shift is what the step would have done alone there."""
KEPT = """and has kept its peak when it ends with nine tenths of that accuracy; \
intervals of shares are Wilson's."""
LEAD = """The lead is a curve's area less that of plain GRPO at its best learning rate, \
over the seeds that both have."""
TOKENS = """The tokens rejected most often; the bar is the share of their occurrences that was rejected."""
FIGURES = {
    "1": FigureSpec("Training accuracy", figure_1),
    "2": FigureSpec("Training and held-out accuracy", figure_2),
    "3": FigureSpec("Predicted shifts", figure_3, caption=SHIFTS),
    "4": FigureSpec("CAPO's selection on three base methods", figure_4),
    "5": FigureSpec("Rejected tokens", figure_5, 3, alias="rejection"),
    "6": FigureSpec("Model of the optimiser", figure_6, 3),
    "7": FigureSpec("Passes over a batch and PPO's clip", figure_7),
    "8": FigureSpec("KL to the reference", figure_8),
    "accuracy": FigureSpec("Accuracy", figure_accuracy),
    "calibration": FigureSpec("Predicted against measured shifts", figure_calibration, 3, RANKS),
    "constraint": FigureSpec("Which bound", figure_constraint),
    "criterion": FigureSpec("Criterion", figure_criterion, 3, f"{COLLAPSE}, {KEPT} {HEIGHT} {LEAD}"),
    "metrics": FigureSpec("Health of training", figure_metrics, 3),
    "regimes": FigureSpec("Regimes", figure_regimes, caption="Worst is the lowest accuracy after the peak."),
    "rejected_tokens": FigureSpec("Rejected tokens", figure_rejected_tokens, 3, TOKENS, "tokens"),
    "settings": FigureSpec("Settings", figure_settings),
    "stability": FigureSpec(
        "Stability", figure_stability, 3, f"{COLLAPSE}; the interval of the share is Wilson's. {HEIGHT}"
    ),
    "test": FigureSpec("Accuracy on benchmarks", figure_test, 1, alias="TEST"),
    "time": FigureSpec("Time of a step", figure_time, 1),
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
