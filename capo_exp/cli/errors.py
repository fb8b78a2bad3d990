"""Hydra's errors in one line: the key, what was got, what was expected."""

import difflib
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from capo_exp.cli.compose import compose_config, entries, find_choices, is_group
from capo_exp.cli.peers import PEERS
from capo_exp.config.errors import ConfigError, printable, suggest
from capo_exp.config.errors import error as wrong_value
from capo_exp.config.schema import TrainConfig, conf_dir, expected_type
from capo_exp.sweep.job import full_error

SAID = (HydraException, OmegaConfBaseException, YAMLError, ValueError)
"""What Hydra means to raise."""
LONGEST = 1000
"""Characters of a message: one can hold a value of any length."""


@contextmanager
def in_one_line(schema: type = TrainConfig) -> Iterator[None]:
    """Turns an error in composing a configuration into a ConfigError, unless the user wants all of it."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if full_error() or not (isinstance(error, SAID) or _is_hydras(error)):
            raise
        text = _Composing(schema).condense(error).replace("\n", "\\n")
        raise ConfigError(printable(text if len(text) <= LONGEST else f"{text[:LONGEST]}...")) from None


def _is_hydras(error: Exception) -> bool:
    """Returns whether Hydra or OmegaConf failed, not a disk, and no function of ours that they called."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in modules]
    last = next(name for name in reversed(packages) if name in ("hydra", "omegaconf", "capo_exp"))
    return last != "capo_exp" and not isinstance(error, OSError)


@dataclass(frozen=True)
class _Composing:
    schema: type

    def condense(self, error: Exception) -> str:
        """Says what was wrong with the command line or a YAML."""
        text = str(error)
        if isinstance(error, MissingConfigException):
            return _missing_choice(error)
        if isinstance(error, OverrideParseException):
            said, wanted = " ".join(text.splitlines()[0].split()), "key=value"
            if re.match(r"[^=]+=[^'\"]*$", str(error.override)):  # a character that Hydra's grammar has not
                wanted += ", in quotes where the value has more than words, as in key='\"a; b\"'"
            return f"{error.override}: expected {wanted}; {said}"
        if match := re.search(r"(?:full_key: |override '?[~+]*)([\w.]+)", text):
            taken = (each for each in sys.argv[1:] if each.startswith("~"))
            above = (each for each in taken if match[1].startswith(f"{each[1:].split('=')[0]}."))
            if gone := next(above, ""):
                return f"{match[1]}: {gone} leaves nothing that holds it; expected one of the two"
        if match := re.match(r"Error resolving interpolation '([^']+)'", text):
            group = "|".join(re.findall(r"\w+", match[1]))  # that is not there
            given = next((a for a in sys.argv[1:] if re.match(rf"~({group})\b|({group})=.*\$", a)), match[1])
            return f"{given}: expected the name of a choice, for other choices are named after it"
        if match := re.match(r"Could not override '([^']+)'", text):
            return self._unknown_key(match[1])
        if text.startswith("Config group override"):  # algo=null: Hydra does not name it
            said = (re.fullmatch(r"[~+]*([\w/]+)(?:@[^=]*)?=(.*)", a) for a in sys.argv[1:])
            groups = [m for m in said if m and (conf_dir() / m[1]).is_dir()]
            wrong = [m for m in groups if set(entries(m[2])) - {*find_choices(m[1])}]
            told = (f"{m[0]}: {suggest('', find_choices(m[1]))}" for m in wrong)
            return next(told, _first_line(error))
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
        match = re.search(r"full_key: (\S+)", text)
        if match and re.search(r"Key '\S+' not in '", text):
            where = text.partition(":")[0]  # In 'experiment/x'
            if (conf_dir() / match[1]).is_dir():
                where += f", which has to begin with the line `# @package` of the files of conf/{match[1]}"
            return f"{self._unknown_key(match[1])} ({where})"
        if choice := re.search(r"str is not a subclass of \w+\. value: (.*)", text):
            wanted = f"expected a choice below defaults, as in `- override /algo: {choice[1].strip()}`"
            return f"{_first_line(error)}; {wanted}"
        if match and self._type(match[1].partition(".")[0]):
            kind = self._type(match[1])
            return f"{match[1]}: {_first_line(error)}" + (f"; expected {kind}" if kind else "")
        if match or not isinstance(error, SAID):
            kind, words = type(error).__name__, " ".join(sys.argv[1:])
            return f"{words}: expected overrides that Hydra can read, got {kind}: {_first_line(error)}"
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
        same_name = [k for k in known if k.rpartition(".")[2] == name]
        names = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent]
        meant = [f"{parent}.{n}".lstrip(".") for n in difflib.get_close_matches(name, names, n=1)]
        foreign = self.schema is TrainConfig and parent not in known
        if near := same_name or ([PEERS[name]] if foreign and name in PEERS else meant):
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
    if top == "dataset" and re.search(r"[/.]", choice):
        lacks += f"; a file is dataset=file dataset.path={choice}"
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
