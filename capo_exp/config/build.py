"""Builds what a YAML names: functions with their numbers bound, or objects. Imports only what is built."""

import importlib
import importlib.resources
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

from capo_exp.config.errors import ConfigError, suggest
from capo_exp.config.schema import TrainConfig

PACKAGE = "capo_exp"
MADE_HERE = "cache://"
"""Begins the path of a model that is made on this machine when it is first used; see core/smollm2.py."""
CACHE_DIR_VARIABLE = "CAPO_CACHE_DIR"


def build_part(part: Mapping[str, Any], *, key: str, runtime: Collection[str] = ()) -> Any:
    """Builds `{_target_, _partial_, <numbers>}`: a function with its numbers bound, or an object.

    Args:
        part: the YAML node as plain values.
        key: its dotted place in the configuration, for messages.
        runtime: parameters that the caller passes later; the YAML must not set them.

    Raises:
        ConfigError: for a target outside this package or absent, an unknown parameter, or a missing number;
            and those that the target, or a part inside it, raises.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate  # 0.1 s that `--help` does not need

    parameters = check_names(part, key=key, runtime=runtime)
    missing = [p.name for p in parameters.values() if _is_number(p) and p.name not in {*part, *runtime}]
    if missing:
        raise ConfigError(f"{key}.{missing[0]}: no value; {part['_target_']} needs a number here")
    try:
        return instantiate(dict(part), _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise


def check_parts(config: TrainConfig) -> None:
    """Compares all parts with their targets' signatures, which imports torch.

    Raises:
        ConfigError: as check_names, for the first that does not fit.
    """
    for key, part in find_parts(config):
        try:
            check_names(part, key=key)
        except ConfigError as error:
            if key != "algo.selection" or not config.algo.variant:
                raise
            goes = (
                f"selection={config.algo.variant} goes on an algorithm without a selection, such as algo=grpo"
            )
            raise ConfigError(f"{error} ({goes})") from error


def check_names(
    part: Mapping[str, Any], *, key: str, runtime: Collection[str] = ()
) -> Mapping[str, inspect.Parameter]:
    """Compares a part with the signature of its target, and returns that signature's parameters.

    Raises:
        ConfigError: as `build`, but for missing numbers.
    """
    check_target(part, key=key)
    target = str(part["_target_"])
    parameters = inspect.signature(_locate(target, key)).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise AssertionError(f"{target} takes **kwargs; parts must name their parameters")
    known = [name for name, p in parameters.items() if _is_setting(p) and name not in runtime]
    for name, value in part.items():
        if name in ("_target_", "_partial_"):
            continue
        if name not in known:
            choices = ", ".join(known) or "none"
            raise ConfigError(f"{key}.{name}: unknown parameter of {target}; known: {choices}")
        if _is_number(parameters[name]) and not isinstance(value, int | float):
            raise ConfigError(f"{key}.{name}={value}: expected a number for {target}")
    return parameters


def check_target(part: Mapping[str, Any], *, key: str) -> None:
    """Refuses a part that names nothing, or something outside this package. Imports nothing."""
    target = part.get("_target_", "")
    if not str(target).startswith(f"{PACKAGE}."):
        raise ConfigError(
            f"{key}._target_={target}: expected a function of {PACKAGE}, as in {PACKAGE}.algorithm.keep_all"
        )


def find_parts(node: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every (dotted key, part) of a configuration."""
    if is_dataclass(node):
        for field in fields(node):
            yield from find_parts(getattr(node, field.name), f"{prefix}.{field.name}".lstrip("."))
    elif isinstance(node, Mapping):
        yield prefix, node
        for name, child in node.items():  # a part that takes a part, as controls.at_rate takes a score
            if isinstance(child, Mapping) and "_target_" in child:
                yield from find_parts(child, f"{prefix}.{name}")


def _locate(target: str, key: str) -> Callable[..., Any]:
    """Imports a function or class of this package."""
    where = f"{key}._target_={target}"
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != PACKAGE:
            raise ConfigError(f"{where}: expected the package {error.name} to be installed") from error
        raise ConfigError(f"{where}: there is no module {error.name}") from error
    found = getattr(module, name, None)
    if not callable(found):
        own = [n for n, v in vars(module).items() if callable(v) and v.__module__ == module_name]
        raise ConfigError(f"{where}: unknown function; {suggest(name, own)}")
    return found


def _is_setting(parameter: inspect.Parameter) -> bool:
    """Whether a YAML may set the parameter: keyword-only, or plainly a number or text."""
    return parameter.kind is parameter.KEYWORD_ONLY or parameter.annotation in (int, float, bool, str)


def _is_number(parameter: inspect.Parameter) -> bool:
    """Whether the parameter is a number that the YAML has to give."""
    kinds = get_args(parameter.annotation) or (parameter.annotation,)  # those of a Callable cannot be hashed
    keyword = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
    return keyword and all(kind in (int, float, bool) for kind in kinds)


def is_local_path(path: str) -> bool:
    """Whether a model path means this machine's disk and not a hub id."""
    return path.startswith(("pkg://", MADE_HERE, "/", "./", "../", "~")) or Path(path).is_dir()


def resolve_model_path(path: str) -> str:
    """`pkg://capo_exp/assets/tiny` -> its directory in the installed package; `cache://x` -> x in
    CAPO_CACHE_DIR, else in ~/.cache/capo_exp; any other path as it is.

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
    except ModuleNotFoundError as error:
        raise ConfigError(f"model.path={path}: expected an installed package, got {package}") from error
