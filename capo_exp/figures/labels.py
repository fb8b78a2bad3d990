"""Names of curves for people: the algorithm, its regime, and what else sets a curve apart."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import PurePath
from typing import Any

import yaml

from capo_exp.config.schema import conf_dir
from capo_exp.runs.read import LoggedRun
from capo_exp.runs.settings import Settings, shorten, varying

REGIMES = {"conservative": "", "aggressive": "A", "zero": "learning rate 0"}
"""regime.name -> what stands in parentheses; others are shown as they are."""
TEXTS = {
    "model.name": "{}", "dataset.name": "{}", "regime.learning_rate": "lr {}",
    "regime.prompts_per_step": "{} prompts", "regime.group_size": "groups of {}",
    "algo.selection._target_": "selection {}", "algo.selection.policy_shift_max": "m_F < {}",
    "algo.selection.objective_shift_max": "m_H < {}", "algo.selection.objective_shift_min": "m_H > {}",
    "algo.selection.rate": "rate {}", "algo.num_iterations": "{} passes",
    "algo.num_minibatches": "{} minibatches", "algo.token_loss.clip_eps_low": "clip {}",
    "algo.token_loss.clip_eps_high": "clip high {}", "algo.kl_coefficient": "KL {}",
    "curvature.optimizer_model": "{} model", "optimizer.schedule": "{} schedule", "rollout.name": "{}",
    "rollout.temperature": "temperature {}", "num_steps": "{} steps",
}  # fmt: skip
"""Key -> how its value is told; earlier ones are preferred where several would tell the curves apart."""
SUBJECTS = ("model.name", "dataset.name")
MAX_LENGTH = 56
"""Characters of a label."""


def logged(run: LoggedRun, key: str) -> str:
    """Returns algo.label, algo.colour or algo.marker: the run's own, else that of conf/algo for its name."""
    return str(run.setting(f"algo.{key}") or _shipped(str(run.setting("algo.name", ""))).get(key) or "")


@cache
def _shipped(name: str) -> dict[str, Any]:
    """Returns conf/algo/NAME.yaml, which also runs that are older than those keys can be drawn by."""
    path = conf_dir() / "algo" / f"{PurePath(name).name}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def algorithm(run: LoggedRun) -> str:
    """Returns the name for people, else algo.name; empty without a config.yaml."""
    return logged(run, "label") or str(run.setting("algo.name", ""))


def method(run: LoggedRun) -> str:
    """Returns what was trained, in one label that figures also select by, such as `GRPO selection capo`."""
    return " ".join(filter(None, [algorithm(run), *_on_top(run)]))


def _on_top(run: LoggedRun) -> list[str]:
    variant, step = (str(run.setting(f"algo.{key}", "")) for key in ("variant", "step_rule_name"))
    is_selection = (conf_dir() / "selection" / f"{variant}.yaml").is_file()
    return [f"selection {variant}" if is_selection else variant.replace("_", " "), step.replace("_", " ")]


def is_safe(run: LoggedRun) -> bool:
    """Returns whether a run is in the conservative regime, the paper's safe one."""
    return run.setting("regime.name") == "conservative"


def base_label(run: LoggedRun) -> str:
    """Returns method and regime, such as `CAPO (A)`; the folder's name of a run without a config."""
    regime = str(run.setting("regime.name", ""))
    mark = REGIMES.get(regime, regime)
    parts = [algorithm(run), mark and f"({mark})", *_on_top(run)]
    return " ".join(filter(None, parts)) if algorithm(run) else run.name


def unique_labels(table: Sequence[Settings], bases: Sequence[str]) -> list[str]:
    """Returns labels that no two curves share: equal bases get the fewest settings that differ.

    `table` has the settings of each curve, all different. Model and dataset are added where several are.
    """
    subjects = [key for key in SUBJECTS if len({each[key] for each in table if key in each}) > 1]
    bases = [
        " ".join([base, *(text(key, each) for key in subjects if key in each)])
        for base, each in zip(bases, table, strict=True)
    ]
    labels = list(bases)
    for base in {base for base, count in Counter(bases).items() if count > 1}:
        places = [place for place, each in enumerate(bases) if each == base]
        keys = telling_keys([table[place] for place in places])
        for place in places:
            labels[place] = " ".join([base, *(text(key, table[place]) for key in keys)])
    said = [shorten(label, MAX_LENGTH) for label in labels]
    return [  # shortening or rounding can make two the same
        label if said.count(label) == 1 else f"{label} #{said[: place + 1].count(label)}"
        for place, label in enumerate(said)
    ]


def telling_keys(table: Sequence[Settings]) -> list[str]:
    """Returns the fewest keys, found greedily, whose values tell all apart, in the order of preference."""
    candidates = sorted(varying(table), key=_preference)
    chosen: list[str] = []
    while candidates and _kinds(table, chosen) < len(table):
        best = max(candidates, key=lambda key: _kinds(table, [*chosen, key]))
        if _kinds(table, [*chosen, best]) == _kinds(table, chosen):
            break
        chosen.append(best)
    return sorted(chosen, key=_preference)


def _kinds(table: Sequence[Settings], keys: Sequence[str]) -> int:
    return len({tuple(str(settings.get(key)) for key in keys) for settings in table})


def _preference(key: str) -> tuple[int, int, str]:
    place = list(TEXTS).index(key) if key in TEXTS else len(TEXTS)
    return place, len(key), key


def text(key: str, settings: Mapping[str, Any]) -> str:
    """Says a setting in few words, such as `lr 5e-4`."""
    *groups, name = key.split(".")
    if name in ("_target_", "name"):
        name = groups[-1]
    if key not in settings:
        return f"without {name}"
    value = settings[key]
    if key.endswith("._target_"):
        value = str(value).rpartition(".")[2]
    return TEXTS.get(key, "{name} {}").format(short(value), name=name)


def short(value: Any) -> str:
    """Says a value in few characters: 0.0001 -> 1e-4."""
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if isinstance(value, float):
        if not 0 < abs(value) < 1e-2:
            return f"{value:g}"
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return shorten(str(value), 24)
