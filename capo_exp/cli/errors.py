"""Hydra's errors in one line: the key, what was got, what was expected."""

import difflib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from capo_exp.cli.compose import compose_config, find_choices, is_group
from capo_exp.config.errors import ConfigError, suggest
from capo_exp.config.errors import error as wrong_value
from capo_exp.config.schema import TrainConfig, conf_dir, expected_type
from capo_exp.sweep.job import full_error


@contextmanager
def in_one_line(schema: type = TrainConfig) -> Iterator[None]:
    """Turns an error in composing a configuration into a ConfigError, unless the user wants all of it."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, AttributeError) as error:
        ours = not isinstance(error, AttributeError) or "full_key:" in str(error)  # OmegaConf names the key
        if full_error() or isinstance(error, ConfigError) or not ours:
            raise
        raise ConfigError(_Composing(schema).condense(error).replace("\n", "\\n")) from None


@dataclass(frozen=True)
class _Composing:
    schema: type

    def condense(self, error: Exception) -> str:
        """Says what was wrong with the command line or a YAML."""
        text = str(error)
        if isinstance(error, MissingConfigException):
            return _missing_choice(error)
        if isinstance(error, OverrideParseException):
            return f"{error.override}: expected key=value; {' '.join(text.splitlines()[0].split())}"
        if match := re.search(r"(?:full_key: |override '?[~+]*)([\w.]+)", text):
            taken = (each for each in sys.argv[1:] if each.startswith("~"))
            above = (each for each in taken if match[1].startswith(f"{each[1:].split('=')[0]}."))
            if gone := next(above, ""):
                return f"{match[1]}: {gone} leaves nothing that holds it; expected one of the two"
        if match := re.match(r"Could not override '([^']+)'", text):
            return self._unknown_key(match[1])
        if text.startswith("Config group override"):  # algo=null: Hydra does not name it
            given = next((a for a in sys.argv[1:] if a.endswith("=null")), "")
            return f"{given}: {suggest('', find_choices(given.partition('=')[0]))}"
        if match := re.match(r"Error merging override ~([^=]+)", text):
            return f"~{match[1]}: a key that cannot be left out; expected {match[1]}=, {self._type(match[1])}"
        if match := re.match(r"Error merging override (\+*)([^=]+)=(.*)", text, re.DOTALL):
            key, parent = match[2], match[2]
            while parent and not self._type(parent):
                parent = parent.rpartition(".")[0]
            inside = f"{parent}=, {self._type(parent)}, with no keys in it"
            if expected := self._type(key) or (inside if parent else ""):
                return str(wrong_value(key, match[3], expected))
            return f"{key}={match[3]}: {_first_line(error.__cause__ or error)}"
        if match := re.search(r"full_key: (\S+)", text):
            if re.search(r"Key '\S+' not in '", text):
                return f"{self._unknown_key(match[1])} ({text.partition(':')[0]})"  # In 'experiment/x'
            kind = self._type(match[1])
            return f"{match[1]}: {_first_line(error)}" + (f"; expected {kind}" if kind else "")
        return _first_line(error)

    def _type(self, key: str) -> str:
        return expected_type(key, self.schema)

    def _unknown_key(self, key: str) -> str:
        given = next((a for a in sys.argv[1:] if a.partition("=")[0] == key), key)
        known = self._known_keys()
        if key in known and given.startswith(f"{key}={{"):
            return f"{given}: brings keys that are not there yet; expected +{given}"
        if key in known:  # a sweep whose jobs have different keys
            return (
                f"{given}: expected a key of every job of the sweep; sweep it with the choices that have it"
            )
        parent, _, name = key.rpartition(".")
        siblings = [k for k in known if k.rpartition(".")[0] == parent]
        same_name = [k for k in known if k.rpartition(".")[2] == name]
        names = [k.rpartition(".")[2] for k in siblings]
        meant = [f"{parent}.{n}".lstrip(".") for n in difflib.get_close_matches(name, names, n=1)]
        if near := meant or same_name:
            return f"{given}: unknown key; nearest: {near[0]}"
        return f"{given}: unknown key; {suggest(name, names or [k for k in known if '.' not in k])}"

    def _known_keys(self) -> list[str]:
        """Returns the keys of the configuration that the command line's group choices compose."""
        if self.schema is not TrainConfig:
            return [key.name for key in fields(self.schema)]
        plain = [a for a in sys.argv[1:] if re.fullmatch(r"[\w/]+=[\w/]+", a)]
        choices = [a for a in plain if (conf_dir() / a.partition("=")[0]).is_dir()]
        for attempt in (choices, []):  # the second for a choice that does not compose or stands elsewhere
            with suppress(HydraException):
                return list(_dotted(OmegaConf.to_container(compose_config(attempt))))
        return []


def _missing_choice(error: MissingConfigException) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return _first_line(error)
    # A nested choice, experiment=paper/x: the group is the part that Hydra was asked for.
    top = group if is_group(group) or group.startswith("hydra/") else group.split("/")[0]
    choice = f"{group}/{choice}".removeprefix(f"{top}/")
    known = {*find_choices(top), *(name for name in error.options or [] if "/_" not in f"/{name}")}
    lacks = "no directory, no hub id org/name and an unknown choice" if top == "model" else "unknown choice"
    return f"{top}={choice}: {lacks}; {suggest(choice, sorted(known))}"


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    for name, child in node.items():
        yield f"{prefix}{name}"
        if isinstance(child, dict):
            yield from _dotted(child, f"{prefix}{name}.")


def _first_line(error: BaseException) -> str:
    """Returns the message without Hydra's and OmegaConf's further lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    details = ("full_key", "object_type", "reference_type", "Config search path", "provider=", "See http")
    text = "; ".join(line for line in lines if not line.startswith(details)) or type(error).__name__
    return text.replace(":;", ":")
