"""Values of a command line that is no Hydra override."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from capo_exp.config.errors import ConfigError, suggest

Typed = TypeVar("Typed")


def typed(kind: type[Typed], values: Mapping[str, Any], where: str) -> Typed:
    """Makes a frozen dataclass from plain values.

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


def entries(value: str) -> list[str]:
    """Reads `a,b` or `[a,b]`."""
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    return [entry.strip() for entry in inner.split(",") if entry.strip()]
