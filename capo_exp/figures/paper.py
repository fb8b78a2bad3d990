"""Figures 1 to 8 of the CAPO paper: one function each, from a study to panels.

Smoothing and start points are those of the authors' scripts.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from capo_exp.figures.bars import bars
from capo_exp.figures.curves import Curve
from capo_exp.figures.labels import algorithm, is_safe, method
from capo_exp.figures.lines import Told, lines
from capo_exp.figures.panel import Panel
from capo_exp.figures.study import Lacking, Metric, Study
from capo_exp.runs.read import LoggedRun

Fits = Callable[[LoggedRun], bool]
TRAINING = Metric("reward/accuracy", "training accuracy", "percent", smoothing=0.1, start=True)
HELD_OUT = Metric("eval/accuracy", "held-out accuracy", "percent")
FROM_START = replace(HELD_OUT, smoothing=0.35, start=True)
REJECTED = Metric("selection/rejection_rate", "share of tokens", "percent")
FROM_ZERO = replace(REJECTED, limits=(0, None))
SELECTING = ("CAPO", "Dr. CAPO", "ReinCAPO")
BASES = ("GRPO", "Dr. GRPO", "REINFORCE")
TRAINS = {"regime.learning_rate": "not 0"}
SELECTS = {"algo.selection._target_": "not keep_all"}
COMPARED = Told(reference="end", summary=("final", "max"))
RANKED = replace(COMPARED, efficiency=True)
OF_PANELS = replace(COMPARED, heading=TRAINING.label)
EXTENT = Told(summary=("max", "mean"))


def trains(run: LoggedRun) -> bool:
    """Returns whether a run's weights move: those at learning rate 0 are start points, no curves."""
    return run.setting("regime.learning_rate") != 0


def is_plain(run: LoggedRun, labels: Sequence[str]) -> bool:
    """Returns whether a run trains one of these methods with nothing on top of it: its label says so."""
    return method(run) in labels and trains(run)


def selects(run: LoggedRun) -> bool:
    """Returns whether a run's selection may reject tokens."""
    return not str(run.setting("algo.selection._target_")).endswith(".keep_all")


def grouped(drawn: Sequence[Curve], by: Callable[[Curve], Any]) -> dict[Any, list[Curve]]:
    """Groups curves by a value, in the order of the curves."""
    groups: dict[Any, list[Curve]] = {}
    for curve in drawn:
        groups.setdefault(by(curve), []).append(curve)
    return groups


def by_algorithm(study: Study, fits: Fits, needed: Fits, wanted: dict[str, str]) -> dict[str, list[Curve]]:
    """Returns the curves of the algorithms of which some have what is needed."""
    groups = grouped(study.choose(fits, wanted), lambda curve: algorithm(curve.run))
    found = {name: mine for name, mine in groups.items() if any(needed(curve.run) for curve in mine)}
    if not found:
        raise Lacking(study.explain_lack(wanted))
    return found


def _named(labels: Sequence[str]) -> dict[str, str]:
    return {"method": f"= {'|'.join(labels)}"}


def _plain(study: Study, labels: Sequence[str]) -> list[Curve]:
    return study.choose(lambda run: is_plain(run, labels), _named(labels) | TRAINS)


def _both(study: Study, drawn: Sequence[Curve]) -> list[Panel]:
    training = lines(study, drawn, TRAINING, "Training accuracy", RANKED)
    return [training, lines(study, drawn, FROM_START, "Held-out accuracy", RANKED)]


def figure_1(study: Study) -> list[Panel]:
    """Draws training accuracy of GRPO, GRPO (A) and CAPO, with the sample-efficiency factor."""
    return [lines(study, _plain(study, ("GRPO", "CAPO")), TRAINING, "Training accuracy", RANKED)]


def figure_2(study: Study) -> list[Panel]:
    """Draws figure 1 with Dr. GRPO and REINFORCE, and accuracy on held-out problems."""
    return _both(study, _plain(study, ("CAPO", *BASES)))


def figure_3(study: Study) -> list[Panel]:
    """Draws predicted shifts m_F and m_H of tokens and of the update, with the reference's maximum."""
    drawn, told = _plain(study, (*SELECTING, *BASES)), replace(EXTENT, reference="max")
    panels = []
    for shift, unit, log in (("policy", "m_F (nats)", True), ("objective", "m_H (reward units)", False)):
        for key, of in ((f"token/{shift}_shift/mean", "a token"), (f"batch/{shift}_shift", "the update")):
            metric = Metric(f"curvature/{key}", unit, smoothing=0.35, log=log)
            panels.append(lines(study, drawn, metric, f"{shift.capitalize()} shift of {of}", told))
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
    titles = {"": "Rejected for any reason"}
    titles |= {f"_{shift}": f"Because of the {shift} shift" for shift in ("policy", "objective")}
    return [
        lines(study, drawn, replace(FROM_ZERO, key=REJECTED.key + reason), title, EXTENT)
        for reason, title in titles.items()
    ]


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
        panel = lines(study, mine, TRAINING, label.replace(". ", "."), Told(reference="end"))
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
    return [lines(study, by_passes[n], metric, f"{n} passes", OF_PANELS) for n in sorted(by_passes)]


def figure_8(study: Study) -> list[Panel]:
    """Draws a KL penalty in place of CAPO's selection, and the largest of the steps' mean gradient norms."""

    def has_kl(run: LoggedRun) -> bool:
        return (run.setting("algo.kl_coefficient") or 0) > 0 and trains(run)

    def fits(run: LoggedRun) -> bool:
        return has_kl(run) or (is_plain(run, ("GRPO", "Dr. GRPO")) and not is_safe(run))

    norm = Metric("policy/grad_norm", "norm before clipping", log=True)
    panels = []
    for name, mine in by_algorithm(study, fits, has_kl, {"algo.kl_coefficient": "> 0"}).items():
        panels.append(lines(study, mine, TRAINING, name, OF_PANELS))
        panels.append(bars(study, mine, norm, f"{name}: largest gradient norm", "max", f"{norm.label}, max"))
    return panels
