"""Builds what a YAML names: functions with their numbers bound, or objects. The one place that does.

A configuration is data, also a stranger's: it names parts, and parts are public functions and classes of the
modules in PART_MODULES, or of a package that the command line of this process allows with plugins=[PKG].
Nothing else is imported, called or built, wherever in the configuration it stands.

A parameter that a YAML sets is keyword-only, and its annotation says what it may be, as in
`Annotated[float, POSITIVE]`, at any depth: in Optional, lists, mappings and typed dictionaries.
"""

import importlib
import importlib.resources
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import FunctionType, NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from capo_exp.config.declare import declares
from capo_exp.config.errors import ConfigError, error, suggest
from capo_exp.config.ranges import Rule
from capo_exp.config.schema import AlgoConfig, TrainConfig

PART_MODULES = re.compile(
    r"capo_exp\.(algorithms\.(?!protocols)[a-z]\w*|data\.(arithmetic|keywords|math_problems|multiple_choice|questions)"
    r"|grading\.(terms|verifier)|rollout\.(demonstrations|hf|vllm_settings))"
)
"""Where the parts of this package stand. What a module there imports is no part, nor is a private name."""
PLUGINS = "CAPO_EXP_PLUGINS"
"""Environment variable: the packages that the command line allows. The processes of a run inherit it."""
MARKS = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}
"""Keys with which Hydra marks what it would build. A part has the first two."""
SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "text", NoneType: "null"}
MADE_HERE = "cache://"
"""Begins the path of a model that is made on this machine when it is first used; see core/smollm2.py."""
CACHE_DIR_VARIABLE = "CAPO_CACHE_DIR"


def allow_plugins(names: Iterable[str]) -> None:
    """Lets `_target_` name functions of these packages, and of no others, in this process and its children.

    Only a command line calls it: what a file or a record says allows nothing.

    Raises:
        ConfigError: for what is no package of a user's own.
    """
    allowed = list(names)
    for name in allowed:
        root = name.partition(".")[0]
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name) or root in {
            "capo_exp",
            *sys.stdlib_module_names,
        }:
            raise error("plugins", f"[{name}]", "names of packages of your own, as in plugins=[mypackage]")
    os.environ[PLUGINS] = ",".join(allowed)


def allowed_plugins() -> list[str]:
    """Returns the packages that the command line allows."""
    return [name for name in os.environ.get(PLUGINS, "").split(",") if name]


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
    """Compares all parts with their functions and with what stands in their place, which imports torch.

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
    groups = {field.name: getattr(config, field.name) for field in fields(config)}
    for group, values in groups.items():
        for field in fields(values) if is_dataclass(values) else ():
            part = getattr(values, field.name)
            if "like" in field.metadata and part is not None:
                _check_place(part, f"{group}.{field.name}", field.metadata["like"])


def _check_place(part: Mapping[str, Any], key: str, like: str) -> None:
    """Refuses a part of another kind than one that fits: a loss where an advantage has to be.

    A function of ours has the same parameters and result, a class is of the same room; of those of a user's
    package the number of parameters is compared.
    """
    found, model = locate(part, key), locate({"_target_": like}, key)
    bound = {name: None for name in part if name not in MARKS}
    if isinstance(model, type):
        fits = not found.__module__.startswith("capo_exp.") or _room(found) == _room(model)
    elif isinstance(found, FunctionType) and found.__module__.startswith("capo_exp."):
        fits = _shape(found) == _shape(model)
    else:
        try:
            inspect.signature(found).bind(*_shape(model)[0], **bound)
            fits = True
        except TypeError:
            fits = False
    if not fits:
        raise error(f"{key}._target_", part["_target_"], f"a part that is called like {like}")


def _room(function: Any) -> str:
    return function.__module__.split(".")[1]


def _shape(function: Callable[..., Any]) -> tuple[list[str], str]:
    """Returns the names of what a caller passes by position, and the annotation of the result."""
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    return [
        each.name for each in parameters if each.kind is not each.KEYWORD_ONLY
    ], signature.return_annotation


def check_part(part: Mapping[str, Any], *, key: str) -> None:
    """Compares a part with the signature of its function: names, kinds and ranges.

    Raises:
        ConfigError: for a target outside the allowed packages or absent, an unknown parameter, a value of
            another kind or outside its range, a number without a value, or two in the wrong order.
    """
    function = locate(part, key)
    settings = read_settings(function)
    for name, value in part.items():
        if name in MARKS:
            continue
        if name not in settings:
            choices = ", ".join(settings) or "none"
            raise ConfigError(f"{key}.{name}: unknown parameter of {part['_target_']}; known: {choices}")
        for fault in find_faults(settings[name].annotation, f"{key}.{name}", value):
            raise fault
    for name, setting in settings.items():
        if name not in part and setting.default is setting.empty and _has_range(setting.annotation):
            raise ConfigError(f"{key}.{name}: no value; {part['_target_']} needs one here")
    ordered = declares(function, "ordered")
    if ordered and part[ordered[0]] > part[ordered[1]]:
        low, high = ordered
        raise error(f"{key}.{low}", part[low], f"at most {high}={part[high]}")
    if not part.get("_partial_"):
        try:
            inspect.signature(function).bind(**{name: None for name in part if name not in MARKS})
        except TypeError as failure:
            raise ConfigError(
                f"{key}: {part['_target_']} cannot be called with these values alone ({failure}); "
                "expected _partial_: true, or what is missing"
            ) from None


def check_target(part: Mapping[str, Any], *, key: str) -> None:
    """Refuses a part that names nothing, or no part of this package or an allowed one. Imports nothing.

    Raises:
        ConfigError: it does; or it has a key by which Hydra would build something else.
    """
    target = part.get("_target_", "")
    for mark in MARKS & set(part):
        if mark not in ("_target_", "_partial_") or (mark == "_partial_" and type(part[mark]) is not bool):
            raise error(
                f"{key}.{mark}", part[mark], "only _target_, _partial_ (true or false) and its numbers"
            )
    module, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
    own = PART_MODULES.fullmatch(module) is not None
    if not re.fullmatch(r"[^\W_]\w*", name) or not (own or _find_plugin(module)):
        wanted = "a function of capo_exp, as in capo_exp.algorithms.neutral.keep_all"
        root = module.partition(".")[0]
        if re.fullmatch(r"\w+", root) and root not in {"capo_exp", *sys.stdlib_module_names}:
            wanted += f", or of your own package, which plugins=[{root}] on the command line allows"
        raise error(f"{key}._target_", target, wanted)


def _find_plugin(module: str) -> str | None:
    """Returns the allowed package in which a module stands."""
    return next((name for name in allowed_plugins() if f"{module}.".startswith(f"{name}.")), None)


def find_faults(kind: Any, key: str, value: Any) -> Iterator[ConfigError]:
    """Yields why a value is not of an annotation's kind, or not within a range in it; nothing where it is.

    What is no number, text, or collection of them is not looked at.
    """
    origin, inner = get_origin(kind), get_args(kind)
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
        if not isinstance(value, Mapping) or "_target_" in value:
            yield error(key, value, "a mapping")
        else:
            yield from chain(*(find_faults(inner[1], f"{key}.{name}", value[name]) for name in value))
    elif isinstance(origin, type) and issubclass(origin, Sequence):
        if not isinstance(value, list | tuple):
            yield error(key, value, "a list")
        else:
            yield from chain(*(find_faults(inner[0], f"{key}[{i}]", each) for i, each in enumerate(value)))


def _has_range(kind: Any) -> bool:
    """Returns whether an annotation speaks of numbers or has a range, at any depth."""
    return kind in (bool, int, float) or isinstance(kind, Rule) or any(map(_has_range, get_args(kind)))


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


def read_settings(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns what a YAML may set of a function or class: its keyword-only parameters, with their ranges."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return {each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY}


def locate(part: Mapping[str, Any], key: str) -> Callable[..., Any]:
    """Imports the function or class that a part names.

    Raises:
        ConfigError: if it is none of an allowed module, or is not there.
    """
    check_target(part, key=key)
    target = str(part["_target_"])
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as failure:
        absent = str(failure.name)
        if absent.partition(".")[0] == module_name.partition(".")[0] and "." in absent:
            raise ConfigError(f"{key}._target_={target}: there is no module {absent}") from failure
        raise error(f"{key}._target_", target, f"the package {absent} to be installed") from failure
    package = _find_plugin(module_name) or module_name
    own = {n: v for n, v in vars(module).items() if n[0] != "_" and _stands_in(package, v)}
    if name not in own:
        raise ConfigError(f"{key}._target_={target}: unknown function; {suggest(name, own)}")
    return own[name]


def _stands_in(package: str, found: object) -> bool:
    """Returns whether a function or class is of a package itself, and not of one that it imports."""
    return isinstance(found, FunctionType | type) and f"{found.__module__}.".startswith(f"{package}.")


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
