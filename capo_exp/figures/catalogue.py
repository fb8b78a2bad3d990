"""The figures that there are: conf/figure/NAME.yaml, read strictly."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from capo_exp.config.errors import ConfigError, suggest
from capo_exp.config.schema import conf_dir
from capo_exp.runs import metrics as names

CHOICES = {
    "draw": ("lines", "bars", "stages", "heat", "tokens", "settings"),
    "source": ("metrics", "eval"),
    "x_end": ("methods", "all"),
    "reference": ("none", "end", "max"),
    "unit": ("number", "percent", "seconds", "completions"),
    "measure": (
        "final", "mean", "max", "min", "worst", "peak", "auc", "collapsed", "kept", "first_collapse", "lead",
    ),
}  # fmt: skip
"""What the words of a panel can be."""

Conditions = list[dict[str, Any]]
"""A run passes if it has what one of the mappings asks: dotted config key -> a value, a list of values, or
`{above: number}` or `{not: value}`. A key that a run does not have counts as "", 0 or false."""


@dataclass(frozen=True)
class PanelSpec:
    """One panel, as the YAML has it; defaults are in _defaults.yaml."""

    title: str = MISSING
    draw: str = MISSING  # lines | bars | stages | heat | tokens | settings
    key: str = MISSING  # metric
    keys: dict[str, str] = field(default_factory=dict)  # label -> metric (stages), config key (settings)
    source: str = MISSING  # metrics | eval: which .jsonl
    x: str = MISSING  # metric on the x axis
    x_end: str = MISSING  # methods: the axis ends where curves other than the reference do | all
    smoothing: float = MISSING  # weight of a new value in the exponential moving average; 1 = none
    start: bool = MISSING  # begin at x = 0 with the value of runs at learning rate 0, if there are any
    reference: str = MISSING  # a line at the reference curve's value: none | end | max
    efficiency: bool = MISSING  # mark where curves reach that line, and the sample-efficiency factor
    levels: dict[str, float] = field(default_factory=dict)  # label -> y of a further line
    measure: str = MISSING  # bars, heat: the number that stands for a curve
    rivals: Conditions = field(default_factory=list)  # lead: the curves whose best one is compared with
    summary: list[str] = field(default_factory=list)  # columns of the table: final | mean | max | min
    unit: str = MISSING
    y_label: str = MISSING
    y_limits: list[float | None] = field(default_factory=list)  # null = from the data
    log: bool = MISSING
    top: int = MISSING  # tokens: how many
    min_count: int = MISSING  # tokens: occurrences that a token needs
    curves: Conditions = field(default_factory=list)  # of this panel; none = those of the figure
    needs: Conditions = field(default_factory=list)  # what at least one of its runs must have
    split: str = MISSING  # one such panel for each value of a config key, or each: method | curve


@dataclass(frozen=True)
class FigureSpec:
    """One figure, as the YAML has it."""

    name: str = MISSING
    title: str = MISSING
    summary: str = MISSING  # one line for --help
    caption: str = MISSING  # before what is said of seeds, band and smoothing
    alias: list[str] = field(default_factory=list)
    curves: Conditions = field(default_factory=list)
    columns: int = MISSING  # panels beside each other
    panels: list[Any] = field(default_factory=list)  # PanelSpec, once read


def figure_names() -> list[str]:
    """Every figure, those of the paper first."""
    found = [path.stem for path in (conf_dir() / "figure").glob("*.yaml") if path.stem[0] != "_"]
    return sorted(found, key=lambda name: (not name.isdigit(), name))


def find_figure(name: str) -> FigureSpec:
    """The figure of a name or alias.

    Raises:
        ConfigError: There is none, or its YAML is wrong.
    """
    if name in figure_names():
        return read_figure(name)
    specs = [read_figure(known) for known in figure_names()]
    for spec in specs:
        if name in spec.alias:
            return spec
    known = [*figure_names(), *(alias for spec in specs for alias in spec.alias), "all"]
    raise ConfigError(f"figure={name}: no such figure; {suggest(name, known)}")


Spec = TypeVar("Spec")


@cache
def defaults() -> dict[str, Any]:
    """conf/figure/_defaults.yaml."""
    return _plain(conf_dir() / "figure" / "_defaults.yaml")


@cache
def read_figure(name: str) -> FigureSpec:
    """conf/figure/NAME.yaml.

    Raises:
        ConfigError: An unknown key or word, a metric that nobody logs, no title, no panel.
    """
    where = f"conf/figure/{name}.yaml"
    given = _plain(conf_dir() / "figure" / f"{name}.yaml")
    panels = [_panel(raw, f"{where}: panels[{i}]") for i, raw in enumerate(given.pop("panels", []))]
    if not panels:
        raise ConfigError(f"{where}: no panels; expected a list of at least one")
    figure = typed(FigureSpec, {**defaults()["figure"], "name": name, **given}, where)
    return replace(figure, panels=panels)


def _panel(raw: Mapping[str, Any], where: str) -> PanelSpec:
    panel = typed(PanelSpec, {**defaults()["panel"], **raw}, where)
    for name, choices in CHOICES.items():
        if (word := getattr(panel, name)) not in choices:
            raise ConfigError(f"{where}.{name}={word}; {suggest(word, choices)}")
    for key in metric_keys(panel):
        check_metric(key, where)
    return panel


def metric_keys(panel: PanelSpec) -> list[str]:
    """The metrics that a panel reads."""
    several = panel.keys.values() if panel.draw == "stages" else ()
    return [key for key in (panel.key, *several) if key]


def check_metric(key: str, where: str) -> None:
    """Whether a run could log it.

    Raises:
        ConfigError: with the nearest names.
    """
    if names.meaning(key) is None:
        raise ConfigError(f"{where}: no metric {key}; {nearest(key, names.METRICS)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The few known names nearest to a wrong one, where a list of all would be too long."""
    choices = list(known)
    last = name.rsplit("/", 1)[-1]
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5) or [c for c in choices if last in c][:3]
    return f"nearest: {', '.join(close)}" if close else "capo_exp/runs/metrics.py has them all"


def typed(kind: type[Spec], values: Mapping[str, Any], where: str) -> Spec:
    """A frozen dataclass from plain values.

    Raises:
        ConfigError: for an unknown key, a missing one, or a value of the wrong type.
    """
    known = [item.name for item in fields(cast(Any, kind))]
    for name in values:
        if name not in known:
            raise ConfigError(f"{where}: unknown key {name}; {suggest(name, known)}")
    try:
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), dict(values)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {error.full_key or '?'}: {str(error).splitlines()[0]}") from error
    assert isinstance(made, kind)
    return made


def _plain(path: Path) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(OmegaConf.load(path))
    except YAMLError as error:
        raise ConfigError(f"conf/figure/{path.name}: no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"conf/figure/{path.name}: expected keys such as title and panels")
    return {str(key): value for key, value in plain.items()}
