"""Builds what a YAML names: functions with their numbers bound, or objects. The one place that does.

A configuration is data, also a stranger's: it names parts, and parts are public functions and classes of the
modules in PART_MODULES, or of a package that the command line of this process allows with plugins=[PKG].
Nothing else is imported, called or built, wherever in the configuration it stands.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType
from typing import Any

from capo_exp.config.declare import declares
from capo_exp.config.errors import ConfigError, error, suggest
from capo_exp.config.plugins import find_plugin
from capo_exp.config.schema import AlgoConfig, TrainConfig
from capo_exp.config.signature import check_settings, is_like

PART_MODULES = re.compile(
    r"capo_exp\.(algorithms\.(?!protocols)[a-z]\w*|data\.(arithmetic|keywords|math_problems|multiple_choice|own_rows|questions)"
    r"|grading\.(function|terms|verifier)|rollout\.(demonstrations|hf|pairs|vllm_settings))"
)
"""Where the parts of this package stand. What a module there imports is no part, nor is a private name."""
MARKS = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}
"""Keys with which Hydra marks what it would build. A part has the first two."""
REWARD = "function"
"""Key of a part of ours that names a reward function of a user's package; it is allowed as _target_ is."""


def build_part(part: Mapping[str, Any], *, key: str) -> Any:
    """Builds `{_target_, _partial_, <its numbers>}`: a function with its numbers bound, or an object.

    Args:
        part: The YAML node as plain values.
        key: Its dotted place in the configuration, for messages.

    Raises:
        ConfigError: as check_part, for it or a part inside it; and those that a target raises.
    """
    for where, each in find_parts(part, key):
        check_part(each, key=where)
    return _build(part, key)


def _build(node: Any, key: str) -> Any:
    """Copies plain values, and puts what they name in place of the parts among them."""
    if isinstance(node, list | tuple):
        return [_build(each, f"{key}[{index}]") for index, each in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    values = {name: _build(value, f"{key}.{name}") for name, value in node.items() if name not in MARKS}
    if "_target_" not in node:
        return values
    function = locate(node, key)
    return partial(function, **values) if node.get("_partial_") else function(**values)


def check_parts(config: TrainConfig) -> None:
    """Compares all parts with their functions and with what fits in their place, which imports torch.

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
    for group in (config.algo, config.dataset, config.rollout, config.reward):
        for field in fields(group):
            like, part = field.metadata.get("like"), getattr(group, field.name)
            if not like or part is None:
                continue
            if not is_like(locate(part, field.name), locate({"_target_": like}, "")):
                prefix = type(group).__name__.removesuffix("Config").lower()
                wanted = f"a part that is called like {like}"
                raise error(f"{prefix}.{field.name}._target_", part["_target_"], wanted)


def check_part(part: Mapping[str, Any], *, key: str) -> None:
    """Compares a part with its function.

    Raises:
        ConfigError: for a target outside the allowed packages or absent, and as check_settings.
    """
    check_settings(locate(part, key), part, key)
    if names_reward(part):
        locate_reward(part[REWARD], f"{key}.{REWARD}")


def check_target(part: Mapping[str, Any], *, key: str) -> None:
    """Refuses a part that names nothing, or no part of this package or an allowed one. Imports nothing.

    Raises:
        ConfigError: it does; or it has a key by which Hydra would build something else.
    """
    for mark in MARKS & set(part):
        if mark not in ("_target_", "_partial_") or (mark == "_partial_" and type(part[mark]) is not bool):
            raise error(
                f"{key}.{mark}", part[mark], "only _target_, _partial_ (true or false) and its numbers"
            )
    _check_name(part.get("_target_", ""), f"{key}._target_")
    if names_reward(part):
        _check_name(part[REWARD], f"{key}.{REWARD}")


def names_reward(part: Mapping[str, Any]) -> bool:
    """Returns whether a part of ours names a reward function by its key REWARD."""
    return REWARD in part and str(part["_target_"]).startswith("capo_exp.")


def _check_name(target: Any, key: str) -> None:
    module, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
    is_part = PART_MODULES.fullmatch(module) is not None and not key.endswith(f".{REWARD}")
    if not re.fullmatch(r"[^\W_]\w*", name) or not (is_part or find_plugin(module)):
        ours, root = {"", "capo_exp", *sys.stdlib_module_names}, module.partition(".")[0]
        yours = root if re.fullmatch(r"\w+", root) and root not in ours else ""
        parts = "a function of capo_exp, as in capo_exp.algorithms.neutral.keep_all"
        own = f"of your own package, which plugins=[{yours or 'mypackage'}] on the command line allows"
        if key.endswith(f".{REWARD}"):
            raise error(key, target, f"a function {own}")
        raise error(key, target, f"{parts}, or {own}" if yours else parts)


def find_parts(node: Any, key: str = "", *, part: bool = True) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the dotted key of every part of a configuration, and the part.

    Parts are the mappings that stand where the schema has a part, and whatever is marked as one, at any
    depth, also where nothing would build it.
    """
    if is_dataclass(node):
        for field in fields(node):
            yield from find_parts(getattr(node, field.name), f"{key}.{field.name}".lstrip("."))
        return
    if isinstance(node, Mapping) and (part or MARKS & set(node)):
        yield key, node
    for where, child in _list_children(node, key):
        yield from find_parts(child, where, part=False)


def _list_children(node: Any, key: str) -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return [(f"{key}.{name}", child) for name, child in node.items()]
    return [(f"{key}[{i}]", child) for i, child in enumerate(node)] if isinstance(node, list | tuple) else []


def locate(part: Mapping[str, Any], key: str) -> Callable[..., Any]:
    """Imports the function or class that a part names.

    Raises:
        ConfigError: if it is none of an allowed module, or is not there.
    """
    check_target(part, key=key)
    return _import(part["_target_"], f"{key}._target_")


def locate_reward(target: str, key: str) -> Callable[..., Any]:
    """Imports the reward function that reward.verifier.function names.

    Raises:
        ConfigError: as locate; or it cannot be called with three arguments.
    """
    _check_name(target, key)
    function = _import(target, key)
    name = getattr(function, "__qualname__", "")
    if not inspect.isfunction(function) or name != target.rpartition(".")[2]:  # workers find it by its name
        raise error(key, target, "a function that a def at the top of its module makes, under its own name")
    try:
        inspect.signature(function).bind("", "", "")
    except TypeError as failure:
        raise error(key, target, f"a function (completion, answer, problem) -> reward ({failure})") from None
    return function


def _import(target: str, key: str) -> Callable[..., Any]:
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as failure:
        absent = str(failure.name)
        if absent.partition(".")[0] == module_name.partition(".")[0] and "." in absent:
            raise ConfigError(f"{key}={target}: there is no module {absent}") from failure
        wanted = f"the package {absent} to be installed, or its folder in PYTHONPATH"
        raise error(key, target, wanted) from failure
    package = find_plugin(module_name) or module_name
    own = {n: v for n, v in vars(module).items() if n[0] != "_" and _stands_in(package, v)}
    if name not in own:
        raise ConfigError(f"{key}={target}: unknown function; {suggest(name, own)}")
    return own[name]


def _stands_in(package: str, found: object) -> bool:
    """Returns whether a function or class is of a package itself, and not of one that it imports."""
    return isinstance(found, FunctionType | type) and f"{found.__module__}.".startswith(f"{package}.")


def holds_reference(algo: AlgoConfig) -> bool:
    """Returns whether a run holds a frozen reference model, for the loss, the shaping or the credit."""
    parts = {"algo.shaping": algo.shaping, "algo.credit": algo.credit}
    in_reward = any(find_nonzero(part, key, "needs_kl") for key, part in parts.items())
    in_loss = part_declares(algo.token_loss, "algo.token_loss", "needs_reference")
    return algo.kl_coefficient > 0 or in_reward or in_loss


def find_nonzero(part: Mapping[str, Any], key: str, what: str) -> str | None:
    """Returns the key of the number that a part, or one inside it, declares to need something unless it is 0,
    where it is not; None if there is none."""
    for where, each in find_parts(part, key):
        number = declares(locate(each, where), what)
        if number is not None and each.get(number) != 0:
            return f"{where}.{number}"
    return None


def part_declares(part: Mapping[str, Any], key: str, what: str) -> bool:
    """Returns whether a part, or one inside it, declares something."""
    return any(declares(locate(each, where), what) for where, each in find_parts(part, key))
