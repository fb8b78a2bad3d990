"""From a study to the numbers of each panel, whatever is drawn of them. No matplotlib."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from capo_exp.figures import stats
from capo_exp.figures.bands import Band
from capo_exp.figures.catalogue import PanelSpec, defaults
from capo_exp.figures.curves import Curve
from capo_exp.figures.matching import meets
from capo_exp.figures.stats import Estimate
from capo_exp.figures.study import Series, Study, band, end, estimate, series_of, start_of
from capo_exp.runs.read import Array

NAN = float("nan")
STABILITY = {
    "worst": "worst_after_peak", "peak": "peak", "auc": "auc", "collapsed": "collapsed_share",
    "kept": "kept_share",
}  # fmt: skip
"""Word of a panel -> field of stats.Stability."""


@dataclass(frozen=True)
class Level:
    """A horizontal line."""

    label: str
    y: float


@dataclass(frozen=True)
class Crossing:
    """Where a curve reaches the reference's line."""

    curve: Curve
    x: float
    y: float
    factor: float


@dataclass(frozen=True)
class Column:
    """One column of the table: a cell for each curve that has one, by its label."""

    heading: str
    unit: str
    cells: Mapping[str, Estimate | str]


@dataclass(frozen=True)
class Panel:
    """What one pair of axes shows."""

    spec: PanelSpec
    title: str
    series: tuple[Series, ...]
    levels: tuple[Level, ...] = ()
    crossings: tuple[Crossing, ...] = ()
    columns: tuple[Column, ...] = ()
    further: tuple[tuple[str, Series], ...] = ()
    """Numbers beside the drawn ones, with their names."""
    x_max: float | None = None
    absent: tuple[str, ...] = ()
    """Labels of curves that lack the metric."""
    short: tuple[str, ...] = ()
    """Curves with seeds that end early, and how many."""


def y_label(spec: PanelSpec) -> str:
    """The panel's own, else one for its metric, else the metric."""
    return spec.y_label or defaults()["y_labels"].get(spec.key, spec.key)


def heading(spec: PanelSpec) -> str:
    """Name of a panel in the table; one for all that a split makes."""
    name = y_label(spec) if spec.split else spec.title
    return f"{name}, {spec.measure.replace('_', ' ')}" if spec.split and spec.draw != "lines" else name


def lines(spec: PanelSpec, title: str, study: Study, drawn: Sequence[Curve]) -> Panel:
    """A metric over x."""
    found = {curve.label: b for curve in drawn if (b := band(study, curve, spec)) and b.count.any()}
    shown = [curve for curve in drawn if curve.label in found]
    level = reference_level(spec, study, drawn) if shown else None
    factors = efficiencies(spec, study, shown) if spec.efficiency and level else {}
    return Panel(
        spec=spec,
        title=title,
        series=tuple(series_of(curve, found[curve.label]) for curve in shown),
        levels=(*([level] if level else []), *(Level(name, y) for name, y in spec.levels.items())),
        crossings=tuple(
            Crossing(curve, f.method_x, f.target, f.factor)
            for curve in shown
            if (f := factors.get(curve.label)) and f.method_x is not None and f.factor is not None
        ),
        columns=columns_of(spec, study, found, factors),
        x_max=end_of_axis(spec, study, shown, found),
        absent=tuple(curve.label for curve in drawn if curve.label not in found),
        short=tuple(f"{name} {missing(b)} of {b.seeds}" for name, b in found.items() if missing(b)),
    )


def columns_of(
    spec: PanelSpec, study: Study, found: Mapping[str, Band], factors: Mapping[str, stats.Factor]
) -> tuple[Column, ...]:
    """What the table says of curves: the summaries of the panel, and how soon each reaches the reference."""
    numbers = [
        Column(f"{heading(spec)}, {how}", spec.unit, {k: reduced(study, b, how) for k, b in found.items()})
        for how in spec.summary
    ]
    cells = {label: factor_cell(factors[label]) if label in factors else "reference" for label in found}
    last = Column(f"{heading(spec)}, sample efficiency", "times", cells)
    return (*numbers, *([last] if factors else []))


def missing(found: Band) -> int:
    """Seeds that end before the curve's last value for the table."""
    return found.seeds - int(found.count[end(found)])


def end_of_axis(
    spec: PanelSpec, study: Study, shown: Sequence[Curve], found: Mapping[str, Band]
) -> float | None:
    """Where the longest curve beside the reference ends; None = show everything."""
    others = [curve for curve in shown if not is_reference(study, curve)]
    if spec.x_end == "all" or not others:
        return None
    return max(float(found[curve.label].x[-1]) for curve in others)


def is_reference(study: Study, curve: Curve) -> bool:
    """Whether a curve of a figure has the runs of the study's reference."""
    reference = study.reference
    return reference is not None and curve.runs[0].path in [run.path for run in reference.runs]


def reference_level(spec: PanelSpec, study: Study, drawn: Sequence[Curve]) -> Level | None:
    """The value at the end of the reference's curve, or its largest one."""
    curve = study.reference if spec.reference != "none" else None
    found = band(study, curve, spec) if curve else None
    if curve is None or found is None or not found.count.any():
        return None
    label = next((one.label for one in drawn if is_reference(study, one)), curve.label)
    if spec.reference == "max":
        return Level(f"{label}, largest", float(np.nanmax(found.centre)))
    last = end(found)
    return Level(f"{label} at {thousands(found.x[last])}", float(found.centre[last]))


def thousands(x: float) -> str:
    """Such as 59.9k."""
    size = next((s for s in ("M", "k") if abs(x) >= {"M": 1e6, "k": 1e3}[s]), "")
    return f"{x / {'M': 1e6, 'k': 1e3, '': 1}[size]:.3g}{size}"


def efficiencies(spec: PanelSpec, study: Study, shown: Sequence[Curve]) -> dict[str, stats.Factor]:
    """Sample-efficiency factor of each curve but the reference, by label."""
    reference = study.reference and band(study, study.reference, spec)
    if study.reference is None or reference is None:
        return {}
    start = start_of(study, study.reference, spec)
    others = [(curve, band(study, curve, spec)) for curve in shown if not is_reference(study, curve)]
    return {c.label: stats.sample_efficiency(reference, b, start=start) for c, b in others if b is not None}


def factor_cell(factor: stats.Factor) -> Estimate | str:
    """A factor with its interval, or why there is none."""
    if factor.factor is None:
        return "not reached" if np.isfinite(factor.target) else "reference does not improve"
    return Estimate(factor.factor, factor.low, factor.high)


def reduced(study: Study, found: Band, how: str) -> Estimate:
    """One number for a curve: at its end, or the mean, largest or smallest of each seed's values."""
    if how == "final":
        last = end(found)
        return Estimate(*(float(part[last]) for part in (found.centre, found.low, found.high)))
    of = {"mean": np.nanmean, "max": np.nanmax, "min": np.nanmin}[how]
    seeds = found.values[np.isfinite(found.values).any(axis=1)]
    return estimate(study, of(seeds, axis=1))


def bars(spec: PanelSpec, title: str, study: Study, drawn: Sequence[Curve]) -> Panel:
    """One number for each curve."""
    found = {curve.label: b for curve in drawn if (b := band(study, curve, spec)) and b.count.any()}
    shown = [curve for curve in drawn if curve.label in found]
    cells = {c.label: one_number(spec, study, c, found[c.label]) for c in shown}
    return Panel(
        spec=spec,
        title=title,
        series=tuple(_one(curve, spec.measure, cells[curve.label], found[curve.label]) for curve in shown),
        columns=(Column(heading(spec), spec.unit, cells),),
        absent=tuple(curve.label for curve in drawn if curve.label not in found),
    )


def _one(curve: Curve, name: str, cell: Estimate | str, found: Band) -> Series:
    value = Estimate(NAN, NAN, NAN) if isinstance(cell, str) else cell
    return Series(curve, [name], *parts([value]), np.array([found.seeds]))


def parts(estimates: Sequence[Estimate]) -> tuple[Array, Array, Array]:
    """Values, lower and upper bounds, [n] each."""
    value, low, high = np.array([(one.value, one.low, one.high) for one in estimates]).T
    return value, low, high


def one_number(spec: PanelSpec, study: Study, curve: Curve, found: Band) -> Estimate | str:
    """The panel's measure of a curve."""
    if spec.measure in ("final", "mean", "max", "min"):
        return reduced(study, found, spec.measure)
    if spec.measure == "lead":
        return lead(spec, study, curve)
    start = start_of(study, curve, spec)
    first = float(found.centre[np.isfinite(found.centre)][0])
    stable = stats.stability(found, start=first if start is None else start, kind=study.interval)
    if spec.measure == "first_collapse":
        return "none" if stable.first_collapse is None else Estimate(stable.first_collapse, NAN, NAN)
    return getattr(stable, STABILITY[spec.measure])


def lead(spec: PanelSpec, study: Study, curve: Curve) -> Estimate | str:
    """Area under a curve less that of the best of its rivals, over the seeds that both have."""
    rivals = [one for one in study.curves if any(meets(one.runs[0], wanted) for wanted in spec.rivals)]
    areas = [(one, seeds) for one in rivals if (seeds := areas_of_seeds(spec, study, one))]
    if not areas:
        return "no rival"
    best, theirs = max(areas, key=lambda pair: float(np.mean(list(pair[1].values()))))
    if best.runs[0].path == curve.runs[0].path:
        return "the best rival"
    own = areas_of_seeds(spec, study, curve)
    shared = sorted(own.keys() & theirs.keys())
    if not shared:
        return "no seed in common"
    return estimate(study, np.array([own[seed] - theirs[seed] for seed in shared]))


def areas_of_seeds(spec: PanelSpec, study: Study, curve: Curve) -> dict[int, float]:
    """Area under the curve of each seed; empty if not all runs have the metric."""
    found = band(study, curve, spec)
    if found is None or found.seeds < len(curve.runs):
        return {}
    areas = stats.areas(found)
    return {run.setting("seed"): float(area) for run, area in zip(curve.runs, areas, strict=True)}
