"""The words of a command line: Hydra's flags, and key=value as Hydra's grammar wants it."""

import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import islice

from hydra.core.override_parser.overrides_parser import OverridesParser

from capo_exp.cli.compose import entries, find_choices, guard, is_group
from capo_exp.config.errors import ConfigError, suggest
from capo_exp.config.memory import find_device
from capo_exp.config.places import MADE_HERE, is_local_path, quoted

SHORT = {
    "-h": "--help", "-c": "--cfg", "-r": "--resolve", "-cd": "--config-dir", "-p": "--package",
    "-i": "--info", "-m": "--multirun", "-sc": "--shell-completion",
}  # fmt: skip
FLAGS = ("--help", "--cfg", "--resolve", "--config-dir", "--package", "--info", "--hydra-help")
"""Hydra's flags that every command takes."""
SWEEP_FLAGS = (*FLAGS, "--multirun", "--run", "--shell-completion", "--version")
VALUES = {"--cfg": "job, hydra or all", "--config-dir": "a folder", "--package": "a key"}
"""Flags that take a value -> what is expected."""
CHOICES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("", "all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
MOST_JOBS = 1_000_000


def as_overrides(words: Sequence[str], config_dir: str | None = None) -> list[str]:
    """Writes `key=value` of the training command as Hydra wants them.

    Raises:
        ConfigError: as choose_by_slash and choose_model.
    """
    keys = Counter(word.partition("=")[0] for word in words)
    for key, count in keys.items():
        if count > 1:
            sys.stderr.write(f"{key}= is given {count} times; the last one counts\n")
    chosen = [choose_engine(word, words) for word in words]
    return [choose_by_slash(each) for word in chosen for each in choose_model(word, config_dir)]


def choose_engine(argument: str, words: Sequence[str]) -> str:
    """Writes `rollout=auto` as the engine that it is here, so that a run's record names it: vllm where the
    learner has a GPU, of which `device=` among the words decides, and vLLM is installed; else hf."""
    if argument != "rollout=auto":
        return argument
    device = [word.removeprefix("device=").strip("'\"") for word in words if word.startswith("device=")]
    gpu = find_device((device or ["auto"])[-1]).startswith("cuda")
    return f"rollout={'vllm' if gpu and find_spec('vllm') else 'hf'}"


def choose_model(argument: str, config_dir: str | None = None) -> list[str]:
    """Writes `model=PLACE` as what it is short for, `model=auto model.path=PLACE`, and a sweep over places
    alike. A place is a directory or a hub id org/name; what else is said of `model` stays as it is.

    Raises:
        ConfigError: a sweep over places and names of conf/model, which are no values of one key.
    """
    key, _, value = argument.partition("=")
    if key != "model" or re.fullmatch(r"\w+\(.*\)", value):
        return [argument]
    known = find_choices("model", config_dir)
    whole = value.strip("'\"")  # a directory may have commas
    given = [whole] if os.path.isdir(os.path.expanduser(whole)) else entries(value)
    places = [each for each in given if each not in known and _is_place(each)]
    if not places:
        return [argument]
    if len(places) < len(given):
        wanted = "expected directories and hub ids alone, or names of conf/model alone, in one sweep"
        raise ConfigError(f"{argument}: {wanted}")
    paths = value if "${" in value and places != [whole] else ",".join(map(quoted, map(_whole, places)))
    return ["model=auto", f"model.path={paths}"]


def _is_place(text: str) -> bool:
    return "/" in text or text[:1] in ("~", ".") or os.path.isdir(text)


def _whole(place: str) -> str:
    """Returns a path from the root, the same wherever the command is given and however it is written."""
    if place.startswith(("pkg://", MADE_HERE)) or not (is_local_path(place) or place in (".", "..")):
        return place
    return os.path.abspath(os.path.expanduser(place))


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
        if (flag in VALUES and not value) or value not in CHOICES.get(flag, [value]):
            wanted = VALUES.get(flag) or ", ".join(CHOICES[flag][1:])
            raise ConfigError(f"{name} {value}".strip() + f": expected {wanted}")
        if equals and flag not in {*VALUES, *CHOICES}:
            raise ConfigError(f"{argument}: expected {name}, which takes no value")
        if flag == "--config-dir" and not os.path.isdir(value):
            raise ConfigError(f"{name} {value}: no such folder; expected one with YAML files as in conf/")
        found.append(f"{flag}={value}" if value else flag)
    guard(others, find_folders(found))
    return found, others


def refuse_endless(overrides: Sequence[str]) -> None:
    """Refuses ranges of more jobs than any sweep has, such as range(0,inf): Hydra lists all before the first.

    Raises:
        ConfigError: such a range.
    """
    count = 1
    for each in OverridesParser.create().parse_overrides(list(overrides)):
        if each.is_range_sweep():
            count *= max(1, sum(1 for _ in islice(each.sweep_string_iterator(), MOST_JOBS)))
        if count >= MOST_JOBS:
            raise ConfigError(f"{each.input_line}: expected a sweep of fewer than {MOST_JOBS:,} jobs")


def find_folders(flags: Sequence[str]) -> list[str]:
    """Returns the folders of --config-dir, of which Hydra takes the last."""
    return [flag.removeprefix("--config-dir=") for flag in flags if flag.startswith("--config-dir=")]


def write_value(kind: object, text: str) -> str:
    """Writes what was typed for a key of a kind in Hydra's grammar, which takes no bare path or comma."""
    if kind == list[str]:
        return f"[{','.join(map(quoted, entries(text)))}]"
    if kind == str | None and text in ("", "null"):
        return "null"
    return quoted(text) if kind in (str, str | None) and text[:1] not in ("'", '"') else text
