"""Names of curves for people: the algorithm, its regime, and what else sets a curve apart."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from capo_exp.config.schema import conf_dir
from capo_exp.figures.settings import Settings, shorten, varying

ALGORITHMS = {
    "capo": "CAPO",
    "dr_capo": "Dr. CAPO",
    "rein_capo": "ReinCAPO",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "grpo_kl": "GRPO + KL",
    "grpo_drift": "GRPO + drift",
    "grpo_dual_clip": "GRPO, dual clip",
    "grpo_no_clip": "GRPO, no clip",
    "ppo_clip": "PPO clip",
    "reinforce": "REINFORCE",
    "reinforce_pp": "REINFORCE++",
    "reinforce_pp_baseline": "REINFORCE++ baseline",
    "rloo": "RLOO",
    "dapo": "DAPO",
    "dppo": "DPPO",
    "dppo_kl": "DPPO, binary KL",
    "gspo": "GSPO",
    "cispo": "CISPO",
    "prorl": "ProRL",
    "dash": "DASH",
    "cpgd": "CPGD",
    "cpgd_std": "CPGD, std weights",
    "cpgd_equal": "CPGD, equal weights",
    "cpgd_unprocessed": "CPGD, unprocessed rewards",
    "cpg": "CPG",
    "pgd": "PGD",
    "pg": "PG",
    "sft": "SFT",
}
"""algo.name -> name in the papers; others are shown as they are."""
REGIMES = {"conservative": "", "aggressive": "A", "zero": "learning rate 0"}
"""regime.name -> what stands in parentheses; others are shown as they are."""
TEXTS = {
    "model.name": "{}",
    "dataset.name": "{}",
    "regime.learning_rate": "lr {}",
    "regime.prompts_per_step": "{} prompts",
    "regime.group_size": "groups of {}",
    "algo.selection._target_": "selection {}",
    "algo.selection.policy_shift_max": "m_F < {}",
    "algo.selection.objective_shift_max": "m_H < {}",
    "algo.selection.objective_shift_min": "m_H > {}",
    "algo.selection.rate": "rate {}",
    "algo.num_iterations": "{} passes",
    "algo.num_minibatches": "{} minibatches",
    "algo.token_loss.clip_eps_low": "clip {}",
    "algo.token_loss.clip_eps_high": "clip high {}",
    "algo.kl_coefficient": "KL {}",
    "curvature.optimizer_model": "{} model",
    "optimizer.schedule": "{} schedule",
    "rollout.name": "{}",
    "rollout.temperature": "temperature {}",
    "num_steps": "{} steps",
}
"""Key -> how its value is told; earlier ones are preferred where several would tell the curves apart."""
SUBJECTS = ("model.name", "dataset.name")
MAX_LENGTH = 56
"""Characters of a label."""


def base_label(settings: Settings, fallback: str) -> str:
    """Algorithm and regime, such as `CAPO (A)`, and what was put on top of it; fallback if unknown."""
    name = settings.get("algo.name")
    if not name:
        return fallback
    regime = str(settings.get("regime.name") or "")
    mark = REGIMES.get(regime, regime)
    variant = str(settings.get("algo.variant") or "")
    is_selection = (conf_dir() / "selection" / f"{variant}.yaml").is_file()
    extra = f"selection {variant}" if is_selection else variant.replace("_", " ")
    step = str(settings.get("algo.step_rule_name") or "").replace("_", " ")
    return " ".join(filter(None, [ALGORITHMS.get(name, str(name)), mark and f"({mark})", extra, step]))


def unique_labels(table: Sequence[Settings], bases: Sequence[str]) -> list[str]:
    """Labels that no two curves share: where bases are the same, with the fewest settings that differ.

    Args:
        table: The settings of each curve, all different.
        bases: The base label of each curve. Model and dataset are added where the curves have several.
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
    return _numbered([shorten(label, MAX_LENGTH) for label in labels])


def _numbered(labels: Sequence[str]) -> list[str]:
    """Sets apart what shortening or rounding has made the same."""
    count, seen = Counter(labels), Counter[str]()
    result = []
    for label in labels:
        seen[label] += 1
        result.append(f"{label} #{seen[label]}" if count[label] > 1 else label)
    return result


def telling_keys(table: Sequence[Settings]) -> list[str]:
    """The fewest keys, found greedily, whose values are different in all; the order is that of preference."""
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
    """A setting in few words, such as `lr 5e-4`."""
    *groups, name = key.split(".")
    if name in ("_target_", "name"):
        name = groups[-1]
    if key not in settings:
        return f"without {name}"
    value = settings[key]
    if key.endswith("._target_"):
        value = str(value).rpartition(".")[2]
    return TEXTS.get(key, f"{name} {{}}").format(short(value))


def short(value: Any) -> str:
    """A value in few characters: 0.0001 -> 1e-4."""
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if isinstance(value, float):
        if not 0 < abs(value) < 1e-2:
            return f"{value:g}"
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return shorten(str(value), 24)
