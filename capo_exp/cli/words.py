"""The words of a command line: Hydra's flags, and key=value as Hydra's grammar wants it."""

import re
from collections.abc import Sequence
from pathlib import Path

from capo_exp.cli.compose import entries, find_choices, guard, is_group
from capo_exp.config.errors import ConfigError, suggest

SHORT = {
    "-h": "--help", "-c": "--cfg", "-r": "--resolve", "-cd": "--config-dir", "-p": "--package",
    "-i": "--info", "-m": "--multirun", "-sc": "--shell-completion",
}  # fmt: skip
FLAGS = ("--help", "--cfg", "--resolve", "--config-dir", "--package", "--info", "--hydra-help")
"""Hydra's flags that every command takes."""
SWEEP_FLAGS = (*FLAGS, "--multirun", "--run", "--shell-completion", "--version")
VALUES = {"--cfg": "job, hydra or all", "--config-dir": "a folder", "--package": "a key"}
"""Flags that take a value -> what is expected."""


def choose_by_slash(argument: str) -> str:
    """Writes `rollout.correction=token_mask` as Hydra wants the choice of a nested group: with a slash.

    Raises:
        ConfigError: it names no choice, such as `reward=123`, or no key, or has text that wants quotes.
    """
    key, equals, value = argument.partition("=")
    if not key.strip("+~"):
        raise ConfigError(f"{argument or repr(argument)}: expected key=value")
    if not value.isascii() and not re.search(r"[\"']", value):
        raise ConfigError(f"{argument}: expected quotes around such text, as in {key}='\"{value}\"'")
    group = key.lstrip("+").replace(".", "/")
    if not equals or value[:1] == "{" or not is_group(group):
        return argument
    if re.fullmatch(r"[\d\s.,_eE+-]*\d[\d\s.,_eE+-]*|\[.*\]", value):
        raise ConfigError(f"{argument}: expected a choice of {group}; {suggest(value, find_choices(group))}")
    return f"{group}={value}" if "." in key and key[0] != "+" else argument


def quoted(text: object) -> str:
    """Writes any text as a value of Hydra's grammar."""
    escaped = str(text).replace("'", "\\'")
    return f"'{escaped}'"


def split_flags(arguments: Sequence[str], flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns flags, as --flag or --flag=value, and the rest, for Hydra's parser takes no mixture of the two.

    Raises:
        ConfigError: an unknown flag, or a wrong value of one.
    """
    found, others, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        flag = SHORT.get(name, name)
        if not argument.startswith("-"):
            others.append(argument)
            continue
        if flag not in flags:
            raise ConfigError(f"{argument}: no flag of this command; {suggest(name, flags)}")
        if not equals and rest and (flag in VALUES or (flag == "--info" and "=" not in rest[0])):
            value = rest.pop(0)
        if flag in VALUES and (not value or (flag == "--cfg" and value not in ("job", "hydra", "all"))):
            raise ConfigError(f"{name} {value}".strip() + f": expected {VALUES[flag]}")
        if flag == "--config-dir" and not Path(value).is_dir():
            raise ConfigError(f"{name} {value}: no such folder; expected one with YAML files as in conf/")
        found.append(f"{flag}={value}" if value else flag)
    guard(others, [flag.removeprefix("--config-dir=") for flag in found if flag.startswith("--config-dir=")])
    return found, others


def write_value(kind: object, text: str) -> str:
    """Writes what was typed for a key of a kind in Hydra's grammar, which takes no bare path or comma."""
    if kind == list[str]:
        return f"[{','.join(map(quoted, entries(text)))}]"
    if kind == str | None and text in ("", "null"):
        return "null"
    return quoted(text) if kind in (str, str | None) and text[:1] not in ("'", '"') else text
