"""Builds what a YAML names: functions with their numbers bound, or objects. Imports only what is built.

A parameter that a YAML sets is keyword-only, and its annotation says what it may be, as in
`Annotated[float, POSITIVE]`, at any depth: in Optional, lists, mappings and typed dictionaries.
"""

import importlib
import importlib.resources
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from capo_exp.config.declare import declares
from capo_exp.config.errors import ConfigError, error, suggest
from capo_exp.config.ranges import Rule
from capo_exp.config.schema import AlgoConfig, TrainConfig

PACKAGES = ["capo_exp"]
"""Where a `_target_` may stand."""
SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "text", NoneType: "null"}
MADE_HERE = "cache://"
"""Begins the path of a model that is made on this machine when it is first used; see core/smollm2.py."""
CACHE_DIR_VARIABLE = "CAPO_CACHE_DIR"


def build_part(part: Mapping[str, Any], *, key: str) -> Any:
    """Builds `{_target_, _partial_, <numbers>}`: a function with its numbers bound, or an object.

    Args:
        part: The YAML node as plain values.
        key: Its dotted place in the configuration, for messages.

    Raises:
        ConfigError: as check_part, for it or a part inside it; and those that a target raises.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate  # 0.1 s that `--help` does not need

    for where, each in find_parts(part, key):
        check_part(each, key=where)
    try:
        return instantiate(dict(part), _convert_="all")
    except InstantiationException as failure:
        if isinstance(failure.__cause__, ConfigError):
            raise failure.__cause__ from None
        raise


def check_parts(config: TrainConfig) -> None:
    """Compares all parts with their functions, which imports torch.

    Raises:
        ConfigError: as check_part, for the first that does not fit.
    """
    for key, part in find_parts(config):
        try:
            check_part(part, key=key)
        except ConfigError as failure:
            if key != "algo.selection" or not config.algo.variant:
                raise
            goes = f"selection={config.algo.variant} goes on an algorithm without one, such as algo=grpo"
            raise ConfigError(f"{failure} ({goes})") from failure


def check_part(part: Mapping[str, Any], *, key: str) -> None:
    """Compares a part with the signature of its function: names, kinds and ranges.

    Raises:
        ConfigError: for a target outside the allowed packages or absent, an unknown parameter, a value of
            another kind or outside its range, a number without a value, or two in the wrong order.
    """
    function = locate(part, key)
    settings = read_settings(function)
    for name, value in part.items():
        if name in ("_target_", "_partial_"):
            continue
        if name not in settings:
            choices = ", ".join(settings) or "none"
            raise ConfigError(f"{key}.{name}: unknown parameter of {part['_target_']}; known: {choices}")
        for fault in find_faults(settings[name].annotation, f"{key}.{name}", value):
            raise fault
    for name, setting in settings.items():
        if name not in part and setting.default is setting.empty and _has_number(setting.annotation):
            raise ConfigError(f"{key}.{name}: no value; {part['_target_']} needs a number here")
    ordered = declares(function, "ordered")
    if ordered and part[ordered[0]] > part[ordered[1]]:
        low, high = ordered
        raise error(f"{key}.{low}", part[low], f"at most {high}={part[high]}")


def check_target(part: Mapping[str, Any], *, key: str) -> None:
    """Refuses a part that names nothing, or something outside the allowed packages. Imports nothing."""
    target = str(part.get("_target_", ""))
    if not target.startswith(tuple(f"{package}." for package in PACKAGES)):
        wanted = f"a function of {' or '.join(PACKAGES)}, as in capo_exp.algorithms.neutral.keep_all"
        raise error(f"{key}._target_", target, wanted)


def find_faults(kind: Any, key: str, value: Any) -> Iterator[ConfigError]:
    """Yields why a value is not of an annotation's kind, or not within a range in it; nothing where it is.

    What is no number, text, or collection of them is not looked at.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(value, Mapping) and "_target_" in value:
        return  # a part of its own
    if origin is Annotated:
        rules = [mark for mark in inner[1:] if isinstance(mark, Rule)]
        if any(find_faults(inner[0], key, value)):
            yield from [error(key, value, rules[0].expected)] if rules else find_faults(inner[0], key, value)
        elif value is not None:
            yield from (error(key, value, rule.expected) for rule in rules if not rule.holds(value))
    elif origin in (Union, UnionType):
        faults = [list(find_faults(each, key, value)) for each in inner]
        yield from faults[0] if all(faults) else ()
    elif kind in SCALARS:
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            yield error(key, value, SCALARS[kind])
    elif is_typeddict(kind):
        kinds = get_type_hints(kind, include_extras=True)
        if not isinstance(value, Mapping) or set(value) != set(kinds):
            yield error(key, value, f"a mapping with {', '.join(kinds)}")
        else:
            yield from chain(*(find_faults(kinds[name], f"{key}.{name}", value[name]) for name in kinds))
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            yield error(key, value, "a mapping")
        else:
            yield from chain(*(find_faults(inner[1], f"{key}.{name}", value[name]) for name in value))
    elif isinstance(origin, type) and issubclass(origin, Sequence):
        if not isinstance(value, list | tuple):
            yield error(key, value, "a list")
        else:
            yield from chain(*(find_faults(inner[0], f"{key}[{i}]", each) for i, each in enumerate(value)))


def _has_number(kind: Any) -> bool:
    """Returns whether an annotation speaks of numbers, at any depth."""
    return kind in (bool, int, float) or any(map(_has_number, get_args(kind)))


def find_parts(node: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the dotted key of every part of a configuration, and the part; those in a part, too."""
    if is_dataclass(node):
        for field in fields(node):
            yield from find_parts(getattr(node, field.name), f"{prefix}.{field.name}".lstrip("."))
    elif isinstance(node, Mapping):
        yield prefix, node
        for name, child in node.items():  # a part that takes a part, as controls.at_rate takes a score
            if isinstance(child, Mapping) and "_target_" in child:
                yield from find_parts(child, f"{prefix}.{name}")


def read_settings(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns what a YAML may set of a function or class: its keyword-only parameters, with their ranges."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return {each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY}


def locate(part: Mapping[str, Any], key: str) -> Callable[..., Any]:
    """Imports the function or class that a part names.

    Raises:
        ConfigError: if it stands outside the allowed packages, or is not there.
    """
    check_target(part, key=key)
    target = str(part["_target_"])
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as failure:
        absent = str(failure.name)
        if absent.partition(".")[0] in PACKAGES:
            raise ConfigError(f"{key}._target_={target}: there is no module {absent}") from failure
        raise error(f"{key}._target_", target, f"the package {absent} to be installed") from failure
    found = getattr(module, name, None)
    if not callable(found):
        own = [n for n, v in vars(module).items() if callable(v) and v.__module__ == module_name]
        raise ConfigError(f"{key}._target_={target}: unknown function; {suggest(name, own)}")
    return found


def uses_reward_kl(algo: AlgoConfig) -> bool:
    """Returns whether the shaping or the credit, with the numbers it has, uses the KL to the reference."""
    parts = {"algo.shaping": algo.shaping, "algo.credit": algo.credit}
    numbers = [(part, declares(locate(part, key), "needs_kl")) for key, part in parts.items()]
    return any(number is not None and part.get(number) != 0 for part, number in numbers)


def needs_reference(algo: AlgoConfig) -> bool:
    """Returns whether a run holds a frozen reference model."""
    return algo.kl_coefficient > 0 or uses_reward_kl(algo)


def is_local_path(path: str) -> bool:
    """Returns whether a model path means this machine's disk and not a hub id."""
    return path.startswith(("pkg://", MADE_HERE, "/", "./", "../", "~")) or Path(path).is_dir()


def resolve_model_path(path: str) -> str:
    """Returns the directory that pkg://PACKAGE/DIR means, or cache://NAME (in CAPO_CACHE_DIR, else in
    ~/.cache/capo_exp), or any other path as it is.

    Raises:
        ConfigError: for a package that is not installed.
    """
    if path.startswith(MADE_HERE):
        cache = Path(os.environ.get(CACHE_DIR_VARIABLE) or "~/.cache/capo_exp").expanduser()
        return str(cache / path.removeprefix(MADE_HERE))
    if not path.startswith("pkg://"):
        return str(Path(path).expanduser()) if path.startswith("~") else path
    package, _, inside = path.removeprefix("pkg://").partition("/")
    try:
        return str(importlib.resources.files(package).joinpath(inside))
    except ModuleNotFoundError as failure:
        raise error("model.path", path, f"an installed package, got {package}") from failure
