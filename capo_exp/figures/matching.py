"""Which runs a figure is about: conditions of conf/figure/*.yaml on the runs' config."""

from collections.abc import Mapping, Sequence
from typing import Any

from capo_exp.runs.read import LoggedRun


def matching(runs: Sequence[LoggedRun], conditions: Sequence[Mapping[str, Any]]) -> list[LoggedRun]:
    """The runs that meet one of the conditions; all if there are none."""
    return [run for run in runs if not conditions or any(meets(run, wanted) for wanted in conditions)]


def meets(run: LoggedRun, wanted: Mapping[str, Any]) -> bool:
    """Whether every key of the config is as wanted."""
    return all(_fits(run.setting(key), value) for key, value in wanted.items())


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        above, other = wanted.get("above"), wanted.get("not", ())
        return (above is None or (value is not None and value > above)) and value != other
    if isinstance(wanted, list):
        return any(_fits(value, one) for one in wanted)
    return value == wanted or (value is None and not wanted)


def unmet(runs: Sequence[LoggedRun], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are not as wanted in every run."""
    return {key: value for key, value in wanted.items() if not all(meets(run, {key: value}) for run in runs)}


def describe(conditions: Sequence[Mapping[str, Any]]) -> str:
    """The conditions in words, such as `algo.kl_coefficient > 0`, each once."""
    said = [" and ".join(f"{key} {_words(value)}" for key, value in one.items()) for one in conditions]
    return " or ".join(dict.fromkeys(said))


def _words(wanted: Any) -> str:
    if isinstance(wanted, Mapping):
        return " and ".join(f"{'>' if word == 'above' else 'not'} {value}" for word, value in wanted.items())
    return "= " + "|".join(str(one) or '""' for one in (wanted if isinstance(wanted, list) else [wanted]))


def present(runs: Sequence[LoggedRun], conditions: Sequence[Mapping[str, Any]]) -> str:
    """What the runs have at the keys of the conditions, for a message that nothing fits."""
    keys = dict.fromkeys(key for wanted in conditions for key in wanted)
    found = {key: list(dict.fromkeys(str(run.setting(key, "none")) for run in runs)) for key in keys}
    more = {key: ["..."] if len(values) > 4 else [] for key, values in found.items()}
    return ", ".join(f"{key} = {'|'.join([*values[:4], *more[key]])}" for key, values in found.items())
