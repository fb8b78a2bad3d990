"""Whether a part fits: its numbers the annotations of its function, and the function its place.

A parameter that a YAML sets is keyword-only, and its annotation says what it may be, as in
`Annotated[float, POSITIVE]`, at any depth: in Optional, lists, mappings and typed dictionaries.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from capo_exp.config.declare import OFFERS, declares
from capo_exp.config.errors import ConfigError, error
from capo_exp.config.ranges import Rule

SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "text", NoneType: "null"}


def is_like(found: Callable[..., Any], model: Callable[..., Any]) -> bool:
    """Returns whether a part can stand where another does: a loss cannot where an advantage has to be.

    Functions of ours have the same parameters, OFFERS apart, and result, classes are of one room; of a
    function of a user's package the number of parameters is compared, of a user's class nothing.
    """
    if isinstance(model, type):
        return found.__module__.split(".")[:2] == model.__module__.split(".")[:2] or not _is_ours(found)
    (names, result), (wanted, wanted_result) = _read_shape(found), _read_shape(model)
    return (names, result) == (wanted, wanted_result) if _is_ours(found) else len(names) == len(wanted)


def _is_ours(function: Callable[..., Any]) -> bool:
    return function.__module__.startswith("capo_exp.")


def _read_shape(function: Callable[..., Any]) -> tuple[list[str], str]:
    """Returns the names of what a caller always passes, and the annotation of the result."""
    signature = inspect.signature(function)
    named = [name for name, each in signature.parameters.items() if each.kind is not each.KEYWORD_ONLY]
    return [name for name in named if name not in OFFERS], str(signature.return_annotation)


def check_settings(function: Callable[..., Any], part: Mapping[str, Any], key: str) -> None:
    """Compares what a part sets with the signature of its function: names, kinds and ranges.

    Raises:
        ConfigError: for an unknown parameter, a value of another kind or outside its range, a number without
            a value, or two in the wrong order.
    """
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
        if name not in part and setting.default is setting.empty and _has_range(setting.annotation):
            raise ConfigError(f"{key}.{name}: no value; {part['_target_']} needs one here")
    if ordered := declares(function, "ordered"):
        least, most = (part.get(name, settings[name].default) for name in ordered)
        if least > most:
            raise error(f"{key}.{ordered[0]}", least, f"at most {ordered[1]}={most}")
    if not part.get("_partial_"):
        try:
            inspect.signature(function).bind(**{name: None for name in part if name[0] != "_"})
        except TypeError as failure:
            raise ConfigError(
                f"{key}: {part['_target_']} cannot be called with these values alone ({failure}); "
                "expected _partial_: true, or what is missing"
            ) from None


def read_settings(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns what a YAML may set of a function or class: its keyword-only parameters, with their ranges."""
    parameters = inspect.signature(function).parameters.values()
    settings = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    return {each.name: each.replace(annotation=_evaluate(each.annotation, function)) for each in settings}


def _evaluate(annotation: Any, function: Callable[..., Any]) -> Any:
    """Returns what an annotation means that a module with `from __future__ import annotations` holds as text;
    Any where its names exist for type checkers alone."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, vars(sys.modules[function.__module__]))
    except NameError:
        return Any


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
