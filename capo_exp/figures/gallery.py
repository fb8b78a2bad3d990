"""Every figure: one function each, from a study to panels.

Smoothing and start points of the CAPO paper's figures are those of the authors' scripts.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from capo_exp.config.errors import ConfigError, suggest
from capo_exp.figures.bars import bars, cell_of, heat
from capo_exp.figures.curves import Curve
from capo_exp.figures.labels import algorithm, method
from capo_exp.figures.lines import lines
from capo_exp.figures.panel import Level, Panel
from capo_exp.figures.per_run import settings_table, stages
from capo_exp.figures.study import Lacking, Metric, Study
from capo_exp.figures.tokens import tokens
from capo_exp.runs.read import Run

TRAINING = Metric("reward/accuracy", "training accuracy", "percent", smoothing=0.1, start=True)
HELD_OUT = Metric("eval/accuracy", "held-out accuracy", "percent")
FROM_START = replace(HELD_OUT, smoothing=0.35, start=True)
BENCHMARKS = Metric("test/accuracy", "accuracy on benchmarks", "percent")
REJECTED = Metric("selection/rejection_rate", "share of tokens", "percent")
LABELS = {
    **{metric.key: metric.label for metric in (TRAINING, HELD_OUT, BENCHMARKS, REJECTED)},
    **dict.fromkeys((f"{REJECTED.key}_policy", f"{REJECTED.key}_objective"), REJECTED.label),
}
"""What stands at the axis of a metric that figure=metrics was asked for."""
SELECTING = ("CAPO", "Dr. CAPO", "ReinCAPO")
BASES = ("GRPO", "Dr. GRPO", "REINFORCE")
TRAINS = {"regime.learning_rate": "not 0"}
SELECTS = {"algo.selection._target_": "not capo_exp.algorithms.neutral.keep_all"}


def trains(run: Run) -> bool:
    """Returns whether a run's weights move: those at learning rate 0 are start points, no curves."""
    return run.setting("regime.learning_rate") != 0


def is_plain(run: Run, labels: Sequence[str]) -> bool:
    """Returns whether a run trains one of these methods with nothing on top of it: its label says so."""
    return method(run) in labels and trains(run)


def is_safe(run: Run) -> bool:
    """Returns whether a run is in the conservative regime."""
    return run.setting("regime.name") == "conservative"


def selects(run: Run) -> bool:
    """Returns whether a run's selection may reject tokens."""
    return run.setting("algo.selection._target_") != "capo_exp.algorithms.neutral.keep_all"


def _plain(study: Study, labels: Sequence[str]) -> list[Curve]:
    return study.choose(lambda run: is_plain(run, labels), {"method": "= " + "|".join(labels)} | TRAINS)


def _accuracy(study: Study, drawn: Sequence[Curve], metric: Metric, title: str, factor: bool = True) -> Panel:
    """Returns accuracy with the reference's line and what the table says of it."""
    return lines(study, drawn, metric, title, reference="end", efficiency=factor, summary=("final", "max"))


def _both(study: Study, drawn: Sequence[Curve]) -> list[Panel]:
    training = _accuracy(study, drawn, TRAINING, "Training accuracy")
    return [training, _accuracy(study, drawn, FROM_START, "Held-out accuracy")]


def figure_1(study: Study) -> list[Panel]:
    """Draws training accuracy of GRPO, GRPO (A) and CAPO, with the sample-efficiency factor."""
    return [_accuracy(study, _plain(study, ("GRPO", "CAPO")), TRAINING, "Training accuracy")]


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
        {"method": "= " + "|".join((*SELECTING, *BASES)), "regime.name": "not conservative"} | TRAINS,
    )
    if not any(method(curve.run) in SELECTING for curve in chosen):
        raise Lacking(study.explain_lack({"method": "= " + "|".join(SELECTING)}))
    return _both(study, chosen)


def figure_5(study: Study) -> list[Panel]:
    """Draws the share of tokens that a selection rejects, in all and by reason."""
    drawn = study.choose(selects, SELECTS)
    titles = {
        "": "Rejected for any reason", "_policy": "Because of the policy shift",
        "_objective": "Because of the objective shift",
    }  # fmt: skip
    return [
        lines(
            study, drawn, replace(REJECTED, key=REJECTED.key + reason), title, summary=("max", "mean"),
            limits=(0, None),
        )
        for reason, title in titles.items()
    ]  # fmt: skip


def figure_6(study: Study) -> list[Panel]:
    """Draws Adam's or SGD's step in the last-layer model, against no selection; a panel for each base."""

    def with_models(run: Run, label: str) -> bool:
        return is_plain(run, (label, f"{label} sgd model"))

    def without(run: Run, label: str) -> bool:
        return is_plain(run, (label,)) and not is_safe(run)

    pairs = list(zip(SELECTING, BASES, strict=True))
    wanted = {"method": "= " + "|".join(SELECTING), "curvature.optimizer_model": "= sgd"}
    drawn = study.choose(
        lambda run: any(with_models(run, label) or without(run, base) for label, base in pairs), wanted
    )
    panels = []
    for label, base in pairs:
        mine = [c for c in drawn if with_models(c.run, label) or without(c.run, base)]
        title = label.replace(". ", ".")
        panel = lines(study, mine, TRAINING, title, reference="end")
        if not any(
            method(c.run) not in BASES and c.run.setting("curvature.optimizer_model") == "sgd" for c in mine
        ):
            panel = replace(panel, series=(), lack=study.explain_lack(wanted))
        panels.append(panel)
    return panels


def figure_7(study: Study) -> list[Panel]:
    """Draws several passes over each batch with PPO's clip, one panel for each number of passes."""
    drawn = study.choose(
        lambda run: (run.setting("algo.num_iterations") or 0) > 1 and trains(run),
        {"algo.num_iterations": "> 1"},
    )
    metric = replace(TRAINING, x="counter/optimizer_step")
    by_passes = grouped(drawn, lambda curve: curve.run.setting("algo.num_iterations"))
    return [
        lines(
            study, by_passes[passes], metric, f"{passes} passes", reference="end", summary=("final", "max"),
            heading=metric.label,
        )
        for passes in sorted(by_passes)
    ]  # fmt: skip


def figure_8(study: Study) -> list[Panel]:
    """Draws a KL penalty in place of CAPO's selection, and the largest gradient norm."""

    def has_kl(run: Run) -> bool:
        return (run.setting("algo.kl_coefficient") or 0) > 0 and trains(run)

    drawn = study.choose(
        lambda run: has_kl(run) or (is_plain(run, ("GRPO", "Dr. GRPO")) and not is_safe(run)),
        wanted := {"algo.kl_coefficient": "> 0"},
    )
    groups = grouped(drawn, lambda curve: algorithm(curve.run))
    groups = {name: mine for name, mine in groups.items() if any(has_kl(curve.run) for curve in mine)}
    if not groups:
        raise Lacking(study.explain_lack(wanted))
    norm = Metric("policy/grad_norm", "norm before clipping", log=True)
    panels = []
    for name, mine in groups.items():
        options: dict[str, Any] = {"reference": "end", "summary": ("final", "max"), "heading": TRAINING.label}
        panels.append(lines(study, mine, TRAINING, name, **options))
        title, heading = f"{name}: largest gradient norm", f"{norm.label}, max"
        panels.append(bars(study, mine, norm, title, "max", heading=heading))
    return panels


def figure_accuracy(study: Study) -> list[Panel]:
    """Draws training and held-out accuracy of every curve, with the sample-efficiency factor."""
    drawn = study.choose(trains, TRAINS)
    training = _accuracy(study, drawn, TRAINING, "Training accuracy")
    return [training, _accuracy(study, drawn, HELD_OUT, "Held-out accuracy", factor=False)]


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
    ranks = Metric("", "Spearman's rank correlation", smoothing=0.1)
    ratio = Metric("", "ratio", smoothing=0.1, log=True)
    panels = []
    for name, title in titles.items():
        shown, level = (
            (ratio, Level("as predicted", 1)) if name == "ratio" else (ranks, Level("no relation", 0))
        )
        metric = replace(shown, key=f"calibration/{name}")
        panels.append(lines(study, drawn, metric, title, levels=[level], summary=("mean",)))
    return panels


def figure_constraint(study: Study) -> list[Panel]:
    """Draws the bound on the policy shift alone, on the objective shift alone, or both."""

    def is_bounded(run: Run) -> bool:
        return (
            run.setting("algo.selection._target_") == "capo_exp.algorithms.capo.shift_bounds"
            and run.setting("algo.variant", "") in ("", "policy_bound", "objective_bound")
            and not run.setting("algo.step_rule_name")
            and run.setting("curvature.optimizer_model") == "adam"
            and trains(run)
        )

    def has_one_bound(curve: Curve) -> bool:
        bounds = ("policy_shift_max", "objective_shift_max")
        return any(curve.run.setting(f"algo.selection.{bound}") == inf for bound in bounds)

    wanted = {"algo.selection.policy_shift_max": "= inf or algo.selection.objective_shift_max = inf"}
    groups = grouped(study.choose(is_bounded, wanted), lambda curve: algorithm(curve.run))
    groups = {name: mine for name, mine in groups.items() if any(map(has_one_bound, mine))}
    if not groups:
        raise Lacking(study.explain_lack(wanted))
    panels = []
    for name, mine in groups.items():
        options: dict[str, Any] = {"reference": "end", "summary": ("final", "max"), "heading": TRAINING.label}
        panels.append(lines(study, mine, TRAINING, name, **options))
        options = {"limits": (0, None), "summary": ("max", "mean"), "heading": REJECTED.label}
        panels.append(lines(study, mine, REJECTED, f"{name}: rejected tokens", **options))
    return panels


def figure_criterion(study: Study) -> list[Panel]:
    """Draws seeds that collapsed or kept their peak, rejected tokens, accuracy: what docs/STUDY.md asks."""
    drawn = study.choose(trains, TRAINS)
    rivals = [c for c in study.curves if is_plain(c.run, ("GRPO",)) and not is_safe(c.run)]
    area = replace(TRAINING, label="mean training accuracy")
    return [
        *_shares_of_seeds(
            study, drawn, {"Collapsed seeds": "collapsed", "Seeds that kept their peak": "kept"}
        ),
        bars(study, drawn, REJECTED, "Rejected tokens", "mean"),
        bars(study, drawn, TRAINING, "Peak", "peak"),
        bars(study, drawn, TRAINING, "Final", "final"),
        bars(study, drawn, area, "Area under the curve", "auc"),
        bars(study, drawn, area, "Lead over plain GRPO", "lead", rivals=rivals),
    ]


def _shares_of_seeds(study: Study, drawn: Sequence[Curve], measures: dict[str, Any]) -> list[Panel]:
    metric = replace(TRAINING, label="share of seeds")
    return [bars(study, drawn, metric, t, how, limits=(-0.05, 1.05)) for t, how in measures.items()]


def figure_stability(study: Study) -> list[Panel]:
    """Draws the share of seeds that collapsed, when, worst and final accuracy, area under the curve."""
    drawn = study.choose(trains, TRAINS)
    when = replace(TRAINING, label="training completions", unit="completions")
    return [
        *_shares_of_seeds(study, drawn, {"Collapsed seeds": "collapsed"}),
        bars(study, drawn, when, "First collapse", "first_collapse", limits=(0, None)),
        bars(study, drawn, replace(TRAINING, label="mean training accuracy"), "Area under the curve", "auc"),
        bars(study, drawn, TRAINING, "Peak", "peak"),
        bars(study, drawn, TRAINING, "Worst after the peak", "worst"),
        bars(study, drawn, TRAINING, "Final", "final"),
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
    return [_accuracy(study, drawn, BENCHMARKS, "Mean over benchmarks")]


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


AREA = "The area is the mean height of the curve."
COLLAPSE = """A seed has collapsed when its smoothed accuracy has lost half of what it had gained at its \
peak, and more than noise would take"""
SHIFTS = """Shifts that the last-layer model predicts. \
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
    "criterion": FigureSpec("Criterion", figure_criterion, 3, f"{COLLAPSE}, {KEPT} {AREA} {LEAD}"),
    "metrics": FigureSpec("Health of training", figure_metrics, 3),
    "regimes": FigureSpec("Regimes", figure_regimes, caption="Worst is the lowest accuracy after the peak."),
    "rejected_tokens": FigureSpec("Rejected tokens", figure_rejected_tokens, 3, TOKENS, "tokens"),
    "settings": FigureSpec("Settings", figure_settings),
    "stability": FigureSpec(
        "Stability", figure_stability, 3, f"{COLLAPSE}; the interval of the share is Wilson's. {AREA}"
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
